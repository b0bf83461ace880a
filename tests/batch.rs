//! Batches through the public API: order, content, refusals, limits, threads.
//!
//! Method: mixed batches of every scheme, spec, length and AAD; each result is opened again singly, in a batch, and
//! compared with what its request asked for.

use std::{collections::HashSet, sync::Arc};

use keymill::{
    CreateKey, DataKey, DecryptRequest, Engine, ErrorKind, GenerateDataKeyRequest, KeySpec, Scheme,
    limits,
};

fn engine_with_keys() -> (Engine, Vec<String>) {
    let engine = Engine::in_memory().unwrap();
    let mut names = Vec::new();
    for (spec, scheme) in [
        (KeySpec::Aes256, Scheme::Derived),
        (KeySpec::Aes256, Scheme::Direct),
        (KeySpec::Aes192, Scheme::Direct),
        (KeySpec::Aes128, Scheme::Direct),
        (KeySpec::Aes256, Scheme::Derived),
    ] {
        let alias = format!("alias/k{}", names.len());
        let key = engine
            .create_key(&CreateKey {
                spec,
                scheme: Some(scheme),
                alias: Some(alias.clone()),
                ..CreateKey::default()
            })
            .unwrap();
        names.push(if names.len() % 2 == 0 { alias } else { key.key_id.to_string() });
    }
    (engine, names)
}

/// A pseudo-random sequence, so that a failure repeats.
fn mix(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 40).unwrap()
}

#[test]
fn every_item_of_a_mixed_batch_opens_in_its_place() {
    let (engine, names) = engine_with_keys();
    let keys: Vec<_> = names.iter().map(|name| engine.describe_key(name).unwrap()).collect();
    let aad: Vec<u8> = (0..limits::AAD_LEN_MAX).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let mut state = 7;
    for count in [0, 1, 2, 31, 32, 33, 100, 1023, 1024, 1025, 5000] {
        let requests: Vec<_> = (0..count)
            .map(|_| {
                let aad_len =
                    if mix(&mut state).is_multiple_of(50) { 8192 } else { mix(&mut state) % 40 };
                let number_of_bytes = u32::try_from(1 + mix(&mut state) % 1024).unwrap();
                GenerateDataKeyRequest::new(&names[mix(&mut state) % names.len()], number_of_bytes)
                    .aad(&aad[..aad_len])
            })
            .collect();
        for advance in [false, true] {
            let batch = if advance {
                engine.advance_generate_data_key_batch(&requests).unwrap()
            } else {
                engine.generate_data_key_batch(&requests).unwrap()
            };
            assert_eq!(batch.len(), count);
            assert!(batch.errors().is_empty());
            let mut seen = HashSet::new();
            let opening: Vec<_> = (batch.iter().zip(&requests))
                .map(|(key, request)| {
                    let key = key.unwrap();
                    assert_eq!(key.plaintext().unwrap().len(), request.number_of_bytes as usize);
                    let nth = names.iter().position(|name| name == request.key_id).unwrap();
                    assert_eq!(key.key_id(), keys[nth].key_id);
                    // One IV under one key: that of the version, or the one derived with the salt.
                    let salt_at = if advance { limits::BLOB_HEAD_LEN } else { 0 };
                    let salt = match keys[nth].scheme {
                        Scheme::Derived => &key.ciphertext_blob()[salt_at..][..limits::SALT_LEN],
                        Scheme::Direct => &[],
                    };
                    assert!(seen.insert((key.key_version_id(), salt, *key.iv())));
                    DecryptRequest::new(key.ciphertext_blob())
                        .key_id(request.key_id)
                        .iv(key.iv())
                        .aad(request.aad)
                })
                .collect();
            let opened = engine.advance_decrypt_batch(&opening).unwrap();
            for (i, key) in batch.iter().enumerate() {
                let key = key.unwrap();
                assert_eq!(opened.get(i).unwrap().plaintext(), key.plaintext().unwrap());
                assert_eq!(opened.get(i).unwrap().key_id(), key.key_id());
                if i % 37 == 0 {
                    let single = if advance {
                        engine.advance_decrypt(
                            &DecryptRequest::new(key.ciphertext_blob()).aad(requests[i].aad),
                        )
                    } else {
                        engine.decrypt(&opening[i])
                    };
                    assert_eq!(single.unwrap().plaintext().expose(), key.plaintext().unwrap());
                }
            }
        }
    }
}

#[test]
fn bad_items_are_refused_alone() {
    let (engine, names) = engine_with_keys();
    engine.disable_key(&names[3]).unwrap();
    engine.schedule_key_deletion(&names[4], 7).unwrap();
    let aad = vec![0; limits::AAD_LEN_MAX + 1];
    let good = GenerateDataKeyRequest::new(&names[0], 32);
    let requests = [
        good,
        GenerateDataKeyRequest::new("alias/absent", 32),
        good.aad(&aad[1..]),
        good.aad(&aad),
        GenerateDataKeyRequest::new(&names[1], 0),
        GenerateDataKeyRequest::new(&names[1], 1025),
        GenerateDataKeyRequest::new(&names[3], 16),
        GenerateDataKeyRequest::new(&names[4], 16),
        GenerateDataKeyRequest::new("", 16),
        GenerateDataKeyRequest::new(&names[1], 1024),
    ];
    let batch = engine.generate_data_key_batch(&requests).unwrap();
    let kinds: Vec<_> = batch.iter().map(|key| key.err().map(|error| error.kind())).collect();
    use ErrorKind::*;
    assert_eq!(
        kinds,
        [
            None,
            Some(KeyNotFound),
            None,
            Some(InvalidParameter),
            Some(InvalidParameter),
            Some(InvalidParameter),
            Some(Disabled),
            Some(PendingDeletion),
            Some(KeyNotFound),
            None
        ]
    );
    for error in batch.errors() {
        let index = error.index().unwrap();
        assert_eq!(error.request_id(), Some(batch.request_id(index)));
    }
    // Each refusal is that of the single call.
    for (request, kind) in requests.iter().zip(kinds) {
        let single = engine.generate_data_key(request).err();
        assert_eq!(single.as_ref().map(keymill::Error::kind), kind);
        assert!(single.is_none_or(|error| error.request_id().is_some()));
    }
}

#[test]
fn a_batch_over_its_limits_is_refused_with_the_limit() {
    let (engine, names) = engine_with_keys();
    let request = GenerateDataKeyRequest::new(&names[0], 1);
    let error =
        engine.generate_data_key_batch(&vec![request; limits::BATCH_ITEMS_MAX + 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert!(error.message().contains("1048576"), "{error}");
    let large = GenerateDataKeyRequest::new(&names[0], 1024);
    let error = engine.generate_data_key_batch(&vec![large; 600_000]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert!(error.message().contains("1 GiB"), "{error}");
}

#[test]
fn without_plaintext_there_is_none_and_the_blob_opens() {
    let (engine, names) = engine_with_keys();
    let requests: Vec<_> =
        (0..100).map(|i| GenerateDataKeyRequest::new(&names[i % names.len()], 48)).collect();
    let batch = engine.advance_generate_data_key_without_plaintext_batch(&requests).unwrap();
    for key in batch.iter().map(|key| key.unwrap()) {
        assert!(key.plaintext().is_none());
        let opened = engine.advance_decrypt(&DecryptRequest::new(key.ciphertext_blob())).unwrap();
        assert_eq!(opened.plaintext().len(), 48);
    }
    let raw = engine.generate_data_key_without_plaintext(&requests[0]).unwrap();
    assert!(raw.plaintext().is_none());
    assert_eq!(raw.ciphertext_blob().len(), 48 + 28);
}

#[test]
fn owned_views_share_the_batch_and_detached_ones_do_not() {
    let (engine, names) = engine_with_keys();
    let requests = [GenerateDataKeyRequest::new(&names[0], 32); 10];
    let batch = engine.generate_data_key_batch(&requests).unwrap();
    let borrowed = batch.get(3).unwrap();
    let owned = borrowed.to_data_key();
    assert_eq!(
        owned.plaintext().unwrap().expose().as_ptr(),
        borrowed.plaintext().unwrap().as_ptr()
    );
    assert_eq!(owned.ciphertext_blob().as_ptr(), borrowed.ciphertext_blob().as_ptr());
    let copy = owned.detach();
    assert_ne!(copy.ciphertext_blob().as_ptr(), owned.ciphertext_blob().as_ptr());
    drop(batch);
    assert_eq!(copy.plaintext(), owned.plaintext());
    assert_eq!(copy.request_id(), owned.request_id());
}

#[test]
fn threads_change_neither_order_nor_validity() {
    for threads in [1, 2, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let engine = Engine::builder().thread_pool(Arc::new(pool)).in_memory().unwrap();
        let key = engine.create_key(&CreateKey::default()).unwrap().key_id;
        let direct = engine
            .create_key(&CreateKey { scheme: Some(Scheme::Direct), ..CreateKey::default() })
            .unwrap()
            .key_id;
        let aads: Vec<_> = (0..20_000u32).map(u32::to_be_bytes).collect();
        let requests: Vec<_> = (aads.iter().enumerate())
            .map(|(i, aad)| {
                let key = if i % 3 == 0 { &direct } else { &key };
                GenerateDataKeyRequest::new(key.as_str(), 1 + u32::try_from(i).unwrap() % 60)
                    .aad(aad)
            })
            .collect();
        let batch = engine.advance_generate_data_key_batch(&requests).unwrap();
        let opening: Vec<_> = (batch.iter().zip(&aads))
            .map(|(key, aad)| DecryptRequest::new(key.unwrap().ciphertext_blob()).aad(aad))
            .collect();
        let opened = engine.advance_decrypt_batch(&opening).unwrap();
        for (opened, key) in opened.iter().zip(batch.iter()) {
            assert_eq!(opened.unwrap().plaintext(), key.unwrap().plaintext().unwrap());
        }
    }
}

/// What the batch remembers of one request must not decide the next.
#[test]
fn an_item_of_a_decrypting_batch_is_decided_as_by_itself() {
    let (engine, names) = engine_with_keys();
    let (a, direct, other) = (&names[0], &names[1], &names[4]);
    let disabled = engine.create_key(&CreateKey::default()).unwrap().key_id.to_string();
    let generate = |name: &str, len| {
        let request = GenerateDataKeyRequest::new(name, len).aad(b"aad");
        let raw = engine.generate_data_key(&request).unwrap();
        (raw, engine.advance_generate_data_key(&request).unwrap())
    };
    let (raw, described) = generate(a, 32);
    let (raw_other, described_other) = generate(other, 32);
    let (raw_direct, described_direct) = generate(direct, 32);
    let (raw_short, described_short) = generate(a, 31);
    // As long as `described`, whose head is 51 bytes.
    let (raw_long, _) = generate(a, 32 + 51);
    let (raw_disabled, described_disabled) = generate(&disabled, 32);
    engine.disable_key(&disabled).unwrap();
    let id = engine.describe_key(a).unwrap().key_id.to_string();
    let versions = [a, other].map(|name| {
        engine.describe_key(name).unwrap().versions[0].key_version_id.as_str().to_owned()
    });
    let long = vec![0; limits::AAD_LEN_MAX + 1];

    fn with<'a>(name: &'a str, key: &'a DataKey) -> DecryptRequest<'a> {
        DecryptRequest::new(key.ciphertext_blob()).key_id(name).iv(key.iv()).aad(b"aad")
    }
    let good = with(a, &raw);
    let plain = DecryptRequest { key_id: None, iv: None, ..good };
    let mut requests = vec![
        good,
        with(&id, &raw),
        with(other, &raw_other),
        with(other, &raw),
        with(direct, &raw_direct),
        with(a, &raw_short),
        with(a, &raw_long),
        with(&disabled, &raw_disabled),
        with(a, &described),
        good.key_id("alias/none"),
        good.aad(b"AAD"),
        good.aad(&long),
        good.iv(&raw.iv()[..11]),
        good.iv(raw_other.iv()),
        plain,
        DecryptRequest { key_id: None, key_version_id: Some(&versions[0]), ..good },
        DecryptRequest { key_id: None, key_version_id: Some(&versions[1]), ..good },
        DecryptRequest { key_id: None, key_version_id: Some("none"), ..good },
        DecryptRequest { ciphertext_blob: b"", ..good },
        DecryptRequest { ciphertext_blob: b"far too short", ..good },
        DecryptRequest { iv: None, ..good },
        DecryptRequest { algorithm: Some("AES_GCM"), ..good },
        DecryptRequest { algorithm: Some("AES_CBC"), ..good },
    ];
    for key in
        [&described, &described_other, &described_direct, &described_short, &described_disabled]
    {
        let request = DecryptRequest { ciphertext_blob: key.ciphertext_blob(), ..plain };
        let cut = &request.ciphertext_blob[..request.ciphertext_blob.len() - 1];
        requests.extend([request, request.key_id(a), request.aad(&long)]);
        requests.push(DecryptRequest { ciphertext_blob: cut, ..request });
    }

    for advance in [false, true] {
        let alone = |request: &DecryptRequest<'_>| {
            match advance {
                true => engine.advance_decrypt(request),
                false => engine.decrypt(request),
            }
            .map(|key| (key.key_version_id(), key.plaintext().expose().to_vec()))
            .map_err(|error| error.to_string())
        };
        let expected: Vec<_> = requests.iter().map(alone).collect();
        assert!(expected.iter().filter(|result| result.is_ok()).count() >= 6);
        for (i, first) in requests.iter().enumerate() {
            for (j, second) in requests.iter().enumerate() {
                let pair = [*first, *second];
                let opened = match advance {
                    true => engine.advance_decrypt_batch(&pair).unwrap(),
                    false => engine.decrypt_batch(&pair).unwrap(),
                };
                for (opened, expected) in opened.iter().zip([&expected[i], &expected[j]]) {
                    let opened = opened
                        .map(|key| (key.key_version_id(), key.plaintext().to_vec()))
                        .map_err(ToString::to_string);
                    assert_eq!(&opened, expected, "{i} {j}, advance: {advance}");
                }
            }
        }
    }
}

/// More salts than are derived at once, in every order in which they may come, with keys that have none in between.
#[test]
fn salts_in_any_order_open_in_their_places() {
    const CALLS: usize = 80;
    const ITEMS: usize = 110;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let engine = Engine::builder().thread_pool(Arc::new(pool)).in_memory().unwrap();
    for (name, scheme) in [("alias/x", Scheme::Derived), ("alias/y", Scheme::Direct)] {
        let (alias, scheme) = (Some(name.to_owned()), Some(scheme));
        engine.create_key(&CreateKey { alias, scheme, ..CreateKey::default() }).unwrap();
    }
    let name = |call: usize| if call % 9 == 8 { "alias/y" } else { "alias/x" };
    let calls: Vec<_> = (0..CALLS)
        .map(|call| {
            let request = GenerateDataKeyRequest::new(name(call), 32).aad(b"aad");
            engine.generate_data_key_batch(&vec![request; ITEMS]).unwrap()
        })
        .collect();
    let by_item = |place: usize| (place % CALLS, place / CALLS);
    let by_call = |place: usize| (place / ITEMS, place % ITEMS);
    let by_two = |place: usize| {
        let (pair, rest) = (place / (2 * ITEMS), place % (2 * ITEMS));
        (2 * pair + rest % 2, rest / 2)
    };
    let orders: [&dyn Fn(usize) -> (usize, usize); 3] = [&by_item, &by_call, &by_two];
    for (nth, order) in orders.into_iter().enumerate() {
        let keys: Vec<_> = (0..CALLS * ITEMS)
            .map(|place| {
                let (call, item) = order(place);
                (name(call), calls[call].get(item).unwrap())
            })
            .collect();
        let is_wrong = |place: usize| place % 97 == 5;
        let requests: Vec<_> = (keys.iter().enumerate())
            .map(|(place, (name, key))| {
                let request = DecryptRequest::new(key.ciphertext_blob()).key_id(name).iv(key.iv());
                request.aad(if is_wrong(place) { b"AAD" } else { b"aad" })
            })
            .collect();
        let opened = engine.decrypt_batch(&requests).unwrap();
        for (place, (opened, (_, key))) in opened.iter().zip(&keys).enumerate() {
            let opened = opened.ok().map(|opened| opened.plaintext());
            let expected = key.plaintext().filter(|_| !is_wrong(place));
            assert_eq!(opened, expected, "{place}, order {nth}");
        }
    }
}

/// Whatever comes first and whatever repeats: items are told apart by the key that their names mean, by length, and by
/// what refuses them, as if each were alone.
#[test]
fn an_item_of_a_batch_is_decided_as_by_itself() {
    let (engine, names) = engine_with_keys();
    let ids = names.iter().map(|name| engine.describe_key(name).unwrap().key_id.to_string());
    let long = "alias/a-name-that-is-longer-than-its-two-ends-together";
    engine.create_alias(long, &names[0]).unwrap();
    let long_unknown = "alias/a-name-that-is-longer-than-its-two-ends,together";
    let known: Vec<_> = names.iter().cloned().chain(ids).chain([long.to_owned()]).collect();
    let too_long = vec![0; limits::AAD_LEN_MAX + 1];
    let variants: Vec<_> = known
        .iter()
        .map(String::as_str)
        .chain(["alias/unknown", long_unknown, ""])
        .flat_map(|name| [32, 16, 0, 1025].map(|len| (name, len)))
        .flat_map(|(name, len)| [&b""[..], b"some aad", &too_long].map(|aad| (name, len, aad)))
        .map(|(name, len, aad)| GenerateDataKeyRequest::new(name, len).aad(aad))
        .collect();
    let alone: Vec<_> = variants
        .iter()
        .map(|request| {
            let made = engine.advance_generate_data_key(request);
            made.map(|key| key.key_version_id()).map_err(|error| error.kind())
        })
        .collect();
    let mut state = 11;
    // Each variant first, among few and among many others.
    for first in 0..variants.len() {
        for (count, others) in [(1, 1), (2, 2), (9, 3), (60, variants.len())] {
            let few: Vec<_> = (0..others).map(|_| mix(&mut state) % variants.len()).collect();
            let chosen: Vec<_> = (0..count)
                .map(|i| if i == 0 { first } else { few[mix(&mut state) % others] })
                .collect();
            let requests: Vec<_> = chosen.iter().map(|index| variants[*index]).collect();
            let batch = engine.advance_generate_data_key_batch(&requests).unwrap();
            for (item, index) in chosen.iter().enumerate() {
                let made = batch.get(item).map(|key| {
                    assert_eq!(
                        key.plaintext().unwrap().len(),
                        32.min(requests[item].number_of_bytes as usize)
                    );
                    let request =
                        DecryptRequest::new(key.ciphertext_blob()).aad(requests[item].aad);
                    assert!(engine.advance_decrypt(&request).is_ok());
                    key.key_version_id()
                });
                let made = made.map_err(|error| error.kind());
                assert_eq!(made, alone[*index], "item {item} of {count}: {:?}", requests[item]);
            }
        }
    }
}
