//! Callers who may use some keys only, and what a server asks.
//!
//! Method: an access that denies named keys and counts its questions, on every operation, by every way that leads to a
//! key. Whoever may use a key gets the same as without the hook.

mod due;
mod stale;

use std::{
    collections::HashSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::Engine;
use crate::{
    batch::{data_key::DataKey, resolve::Reading, result::DataKeyBatch},
    error::{Error, ErrorKind, Result},
    keys::{
        KeyId,
        access::{Access, Everything},
        ring::Key,
    },
    limits::LEASE_FIRST,
    request::{CreateKey, DecryptRequest, EncryptRequest, GenerateDataKeyRequest, Operation},
    wrap::{Scheme, blob::Form},
};

/// Denies these keys.
#[derive(Default)]
struct Denies {
    keys: HashSet<KeyId>,
    asked: AtomicUsize,
}

impl Denies {
    fn these(keys: &[KeyId]) -> Self {
        Self { keys: keys.iter().copied().collect(), asked: AtomicUsize::new(0) }
    }

    fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::Relaxed)
    }
}

impl Access for Denies {
    fn permits(&self, key: &Key) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        !self.keys.contains(&key.record.id)
    }
}

const OPERATIONS: [Operation; 4] = [
    Operation::GenerateDataKey,
    Operation::GenerateDataKeyWithoutPlaintext,
    Operation::AdvanceGenerateDataKey,
    Operation::AdvanceGenerateDataKeyWithoutPlaintext,
];

const FORMS: [Form; 2] = [Form::Raw, Form::SelfDescribing];

/// An engine with `alias/yes` and `alias/no`, and an access that denies the latter.
fn set_up(scheme: Scheme) -> (Engine, [KeyId; 2], Denies) {
    let engine = Engine::in_memory().unwrap();
    let ids = ["alias/yes", "alias/no"].map(|alias| {
        let alias = Some(alias.to_owned());
        let key = CreateKey { alias, scheme: Some(scheme), ..CreateKey::default() };
        engine.create_key(&key).unwrap().key_id
    });
    let denies = Denies::these(&ids[1..]);
    (engine, ids, denies)
}

fn assert_denied<T>(result: Result<T>, name: &str) {
    let error = result.err().expect("refused");
    let message = format!("This operation for \"{name}\" is forbidden by permission system.");
    assert_eq!((error.kind(), error.message()), (ErrorKind::NoPermission, message));
    assert!(error.request_id().is_some());
}

fn generate(engine: &Engine, name: &str, operation: Operation) -> DataKey {
    engine.generate_one_as(&Everything, &GenerateDataKeyRequest::new(name, 32), operation).unwrap()
}

#[test]
fn a_denied_key_generates_and_encrypts_nothing_by_any_name() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let (engine, [yes, no], denies) = set_up(scheme);
        for operation in OPERATIONS {
            for name in ["alias/no", no.as_str()] {
                let request = GenerateDataKeyRequest::new(name, 32);
                assert_denied(engine.generate_one_as(&denies, &request, operation), name);
            }
            for name in ["alias/yes", yes.as_str()] {
                let request = GenerateDataKeyRequest::new(name, 32);
                engine.generate_one_as(&denies, &request, operation).unwrap();
                assert_eq!(denies.asked(), if name == "alias/yes" { 3 } else { 1 });
            }
        }
        for form in FORMS {
            for name in ["alias/no", no.as_str()] {
                let request = EncryptRequest::new(name, b"text");
                assert_denied(engine.encrypt_as(&denies, &request, form), name);
                // It is not told of the scheme either, to which an Iv would be an error.
                assert_denied(engine.encrypt_as(&denies, &request.iv(&[1; 12]), form), name);
            }
            engine.encrypt_as(&denies, &EncryptRequest::new("alias/yes", b"text"), form).unwrap();
        }
        // A refusal takes no wrap of the budget.
        let unused = engine.describe_key("alias/no").unwrap();
        assert_eq!(unused.versions[0].wraps_granted, 0);
    }
}

#[test]
fn a_denied_item_of_a_generating_batch_leaves_the_others_alone() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let (engine, [yes, no], denies) = set_up(scheme);
        let names = ["alias/yes", "alias/no", yes.as_str(), no.as_str(), "alias/absent"];
        for operation in OPERATIONS {
            // Names that follow each other, that alternate, and one alone.
            for name_of in [|i: usize| i / 20, |i| i % 5, |i: usize| [1, 0][i.min(1)], |_| 1] {
                let requests: Vec<_> = (0..100)
                    .map(|i| {
                        let number_of_bytes = 16 + u32::try_from(i % 2).unwrap();
                        GenerateDataKeyRequest::new(names[name_of(i)], number_of_bytes)
                    })
                    .collect();
                let mut batch = DataKeyBatch::default();
                engine.generate_batch_as(&denies, &mut batch, operation, &requests).unwrap();
                for (i, (item, request)) in batch.iter().zip(&requests).enumerate() {
                    match name_of(i) {
                        0 | 2 => assert_eq!(item.unwrap().key_id(), yes),
                        4 => assert_eq!(item.unwrap_err().kind(), ErrorKind::KeyNotFound),
                        _ => {
                            let error = item.unwrap_err();
                            assert_eq!(error.index(), Some(i));
                            assert_denied(Err::<(), Error>(error.clone()), request.key_id);
                        }
                    }
                }
                // Once for each name and length, and again where the store was asked for the absent one.
                assert!(denies.asked() <= 2 * 4 * 2);
            }
        }
        let unused = engine.describe_key("alias/no").unwrap();
        assert_eq!(unused.versions[0].wraps_granted, 0);
    }
}

/// Every way that leads to a key: name, alias, the blob itself, a version id, and what the KMS's SDKs mix.
#[test]
fn a_denied_key_opens_nothing_by_any_way() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let (engine, [yes, no], denies) = set_up(scheme);
        let raw = generate(&engine, "alias/no", Operation::GenerateDataKey);
        let advanced = generate(&engine, "alias/no", Operation::AdvanceGenerateDataKey);
        let version = raw.key_version_id();
        let of_raw = DecryptRequest::new(raw.ciphertext_blob()).iv(raw.iv());
        let of_advanced = DecryptRequest::new(advanced.ciphertext_blob());
        let by_version = DecryptRequest { key_version_id: Some(version.as_str()), ..of_raw };
        for (request, reading, name) in [
            (of_raw.key_id("alias/no"), Reading::Raw, "alias/no"),
            (of_raw.key_id("alias/no"), Reading::Advance, "alias/no"),
            (of_raw.key_id(no.as_str()), Reading::Raw, no.as_str()),
            (by_version, Reading::Raw, no.as_str()),
            (of_advanced, Reading::Advance, no.as_str()),
            (of_advanced.key_id("alias/no"), Reading::Advance, "alias/no"),
            // A name that is permitted does not open the way to another key, nor tell its id.
            (of_advanced.key_id("alias/yes"), Reading::Advance, "alias/yes"),
            (of_advanced.key_id(yes.as_str()), Reading::Advance, yes.as_str()),
        ] {
            assert_denied(engine.decrypt_one_as(&denies, &request, reading), name);
            let batch = engine.decrypt_batch_as(&denies, &[request], reading).unwrap();
            assert_denied(batch.get(0).map_err(Error::clone), name);
            // Whoever holds the engine is not denied.
            let open = engine.decrypt_one_as(&Everything, &request, reading);
            assert!(open.is_ok() || open.unwrap_err().kind() == ErrorKind::InvalidParameter);
        }
        // Nor the other way round: a permitted blob does not tell which key a denied name leads to.
        let mine = generate(&engine, "alias/yes", Operation::AdvanceGenerateDataKey);
        let request = DecryptRequest::new(mine.ciphertext_blob());
        engine.decrypt_one_as(&denies, &request, Reading::Advance).unwrap();
        let named = request.key_id("alias/no");
        assert_denied(engine.decrypt_one_as(&denies, &named, Reading::Advance), "alias/no");
        // Raw blobs of the permitted key, by a version id.
        let mine = generate(&engine, "alias/yes", Operation::GenerateDataKey);
        let version = mine.key_version_id();
        let request = DecryptRequest {
            key_version_id: Some(version.as_str()),
            ..DecryptRequest::new(mine.ciphertext_blob()).iv(mine.iv())
        };
        engine.decrypt_one_as(&denies, &request, Reading::Raw).unwrap();
    }
}

/// Whatever a batch remembers of its last items, a refusal is of its own item alone, and so is a permission.
#[test]
fn what_a_decrypting_batch_remembers_permits_nothing() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let (engine, [_, no], denies) = set_up(scheme);
        let made = ["alias/yes", "alias/no"].map(|name| {
            let raw = generate(&engine, name, Operation::GenerateDataKey);
            (raw, generate(&engine, name, Operation::AdvanceGenerateDataKey))
        });
        let versions = made.each_ref().map(|(raw, _)| raw.key_version_id());
        // For each key: by its alias, by its version id, by the blob alone, by both.
        let request = |key: usize, way: usize| {
            let ((raw, advanced), name) = (&made[key], ["alias/yes", "alias/no"][key]);
            let raw = DecryptRequest::new(raw.ciphertext_blob()).iv(raw.iv());
            let advanced = DecryptRequest::new(advanced.ciphertext_blob());
            match way {
                0 => raw.key_id(name),
                1 => DecryptRequest { key_version_id: Some(versions[key].as_str()), ..raw },
                2 => advanced,
                _ => advanced.key_id(name),
            }
        };
        for (reading, ways) in [(Reading::Raw, [0, 1]), (Reading::Advance, [2, 3])] {
            let denied_name = |way| if way == 0 || way == 3 { "alias/no" } else { no.as_str() };
            // All rows of five items: every order of permitted and denied ones, by either way.
            for row in 0..4usize.pow(5) {
                let items: Vec<_> = (0..5)
                    .map(|i| row / 4usize.pow(i) % 4)
                    .map(|choice| (choice / 2, ways[choice % 2]))
                    .collect();
                let requests: Vec<_> = items.iter().map(|(key, way)| request(*key, *way)).collect();
                let batch = engine.decrypt_batch_as(&denies, &requests, reading).unwrap();
                for ((key, way), item) in items.iter().zip(batch.iter()) {
                    if *key == 0 {
                        item.unwrap();
                    } else {
                        assert_denied(item.map_err(Error::clone), denied_name(*way));
                    }
                }
            }
        }
        // Many items of one key are one question.
        denies.asked();
        let requests = [request(0, 0); 100];
        engine.decrypt_batch_as(&denies, &requests, Reading::Raw).unwrap();
        assert_eq!(denies.asked(), 1);
        let requests = [request(0, 2); 100];
        engine.decrypt_batch_as(&denies, &requests, Reading::Advance).unwrap();
        assert_eq!(denies.asked(), 1);
    }
}

#[test]
fn who_may_not_use_a_key_is_not_told_its_state() {
    let (engine, _, denies) = set_up(Scheme::Derived);
    let raw = generate(&engine, "alias/no", Operation::GenerateDataKey);
    let advanced = generate(&engine, "alias/no", Operation::AdvanceGenerateDataKey);
    let mine = generate(&engine, "alias/yes", Operation::AdvanceGenerateDataKey);
    let generating = |name| GenerateDataKeyRequest::new(name, 32);
    let kind = |error: Error| error.kind();
    for change in
        [Engine::disable_key, |engine: &Engine, name: &str| engine.schedule_key_deletion(name, 7)]
    {
        change(&engine, "alias/no").unwrap();
        change(&engine, "alias/yes").unwrap();
        let state = engine.generate_data_key(&generating("alias/yes")).map_err(kind).unwrap_err();
        assert!(matches!(state, ErrorKind::Disabled | ErrorKind::PendingDeletion));
        for (name, expected) in [("alias/no", ErrorKind::NoPermission), ("alias/yes", state)] {
            let request = generating(name);
            let one = engine.generate_one_as(&denies, &request, Operation::GenerateDataKey);
            assert_eq!(one.map_err(kind).unwrap_err(), expected);
            let mut batch = DataKeyBatch::default();
            let operation = Operation::AdvanceGenerateDataKey;
            engine.generate_batch_as(&denies, &mut batch, operation, &[request]).unwrap();
            assert_eq!(batch.errors()[0].kind(), expected);
            for form in FORMS {
                let request = EncryptRequest::new(name, b"text");
                let encrypted = engine.encrypt_as(&denies, &request, form);
                assert_eq!(encrypted.map_err(kind).unwrap_err(), expected);
            }
        }
        let raw = DecryptRequest::new(raw.ciphertext_blob()).iv(raw.iv()).key_id("alias/no");
        let advanced = DecryptRequest::new(advanced.ciphertext_blob());
        let mine = DecryptRequest::new(mine.ciphertext_blob());
        for (request, reading, expected) in [
            (raw, Reading::Raw, ErrorKind::NoPermission),
            (advanced, Reading::Advance, ErrorKind::NoPermission),
            (mine, Reading::Advance, state),
        ] {
            let one = engine.decrypt_one_as(&denies, &request, reading);
            assert_eq!(one.map_err(kind).unwrap_err(), expected);
            let batch = engine.decrypt_batch_as(&denies, &[request], reading).unwrap();
            assert_eq!(batch.errors()[0].kind(), expected);
        }
    }
}

#[test]
fn a_key_is_at_hand_if_nothing_has_to_be_asked_of_the_store() {
    let (engine, [id, _], _) = set_up(Scheme::Derived);
    assert!(engine.is_at_hand("alias/yes", false) && engine.is_at_hand(id.as_str(), true));
    assert!(!engine.is_at_hand("alias/absent", false));

    let (engine, ..) = set_up(Scheme::Direct);
    assert!(!engine.is_at_hand("alias/yes", false));
    engine.encrypt(&EncryptRequest::new("alias/yes", b"text")).unwrap();
    for _ in 0..LEASE_FIRST {
        assert!(engine.is_at_hand("alias/yes", false) && engine.is_at_hand("alias/yes", true));
        engine.advance_encrypt(&EncryptRequest::new("alias/yes", b"text")).unwrap();
    }
    assert!(!engine.is_at_hand("alias/yes", false));
    engine.encrypt(&EncryptRequest::new("alias/yes", b"text")).unwrap();
    // The new primary version has no lease yet.
    engine.rotate_key("alias/yes").unwrap();
    assert!(engine.is_at_hand("alias/yes", false) && !engine.is_at_hand("alias/yes", true));
}

#[test]
fn the_wraps_that_are_left_go_down_by_one_with_each() {
    const SPENT: u64 = 1000;
    let engine = Engine::builder().initial_spent(SPENT).in_memory().unwrap();
    let name = "alias/a";
    let alias = Some(name.to_owned());
    let key = CreateKey { alias, scheme: Some(Scheme::Direct), ..CreateKey::default() };
    engine.create_key(&key).unwrap();
    engine.create_key(&CreateKey::default()).unwrap();
    let version = engine.describe_key(name).unwrap().versions[0].key_version_id;
    let all = (1 << 32) - SPENT;
    assert_eq!(engine.wraps_left(), [(version, all)]);
    for made in 1..=200 {
        engine.encrypt(&EncryptRequest::new(name, b"text")).unwrap();
        assert_eq!(engine.wraps_left(), [(version, all - made)]);
    }
    // Two rotations: the version in the middle wraps no more, and is not told of.
    engine.rotate_key(name).unwrap();
    engine.rotate_key(name).unwrap();
    engine.advance_encrypt(&EncryptRequest::new(name, b"text")).unwrap();
    let versions = engine.describe_key(name).unwrap().versions;
    let mut expected = [(version, all - 200), (versions.last().unwrap().key_version_id, all - 1)];
    expected.sort_unstable();
    assert_eq!(engine.wraps_left(), expected);
}

#[test]
fn request_ids_are_fresh() {
    let engine = Engine::in_memory().unwrap();
    let ids: HashSet<_> = (0..100).map(|_| engine.request_id().unwrap()).collect();
    assert_eq!(ids.len(), 100);
}
