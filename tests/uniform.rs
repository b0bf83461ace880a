//! Batches of one key and one length, and where their AADs come from.
//!
//! Method: every result is opened again in its place, with the key and the AAD that were asked for; sources that are
//! too short, too long or wrong are refused as a whole; the deterministic engine shows that batches of request structs
//! are the same batches.

use std::{collections::HashSet, sync::Arc};

use keymill::{
    AadSource, CreateKey, DataKeyBatch, DecryptRequest, Engine, ErrorKind, GenerateDataKeyRequest,
    KeyHandle, KeySpec, NoAad, Operation, SameAad, Scheme, limits,
};

const OPERATIONS: [Operation; 4] = [
    Operation::GenerateDataKey,
    Operation::GenerateDataKeyWithoutPlaintext,
    Operation::AdvanceGenerateDataKey,
    Operation::AdvanceGenerateDataKeyWithoutPlaintext,
];

fn of_scheme(scheme: Scheme) -> CreateKey {
    CreateKey { scheme: Some(scheme), ..CreateKey::default() }
}

fn new_key(engine: &Engine, scheme: Scheme) -> KeyHandle {
    let id = engine.create_key(&of_scheme(scheme)).unwrap().key_id;
    engine.key(id.as_str()).unwrap()
}

fn on_threads(threads: usize) -> Engine {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    Engine::builder().thread_pool(Arc::new(pool)).in_memory().unwrap()
}

/// A pseudo-random sequence, so that a failure repeats.
fn mix(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 40).unwrap()
}

/// Every item of `batch` opens with its own AAD, to its own plaintext if it has one.
fn assert_opens<'a>(
    engine: &Engine,
    batch: &DataKeyBatch,
    (operation, key, len): (Operation, &KeyHandle, usize),
    aad: impl Fn(usize) -> &'a [u8],
) {
    let id = key.key_id();
    let opening: Vec<_> = (batch.iter().enumerate())
        .map(|(index, key)| {
            let key = key.unwrap();
            assert_eq!(key.plaintext().is_some(), operation.returns_plaintext());
            assert_eq!(key.request_id(), batch.request_id(index));
            DecryptRequest::new(key.ciphertext_blob())
                .key_id(id.as_str())
                .iv(key.iv())
                .aad(aad(index))
        })
        .collect();
    let opened = match operation {
        Operation::GenerateDataKey | Operation::GenerateDataKeyWithoutPlaintext => {
            engine.decrypt_batch(&opening).unwrap()
        }
        _ => engine.advance_decrypt_batch(&opening).unwrap(),
    };
    let mut seen = HashSet::new();
    for (index, (opened, made)) in opened.iter().zip(batch.iter()).enumerate() {
        let (opened, made) =
            (opened.unwrap_or_else(|e| panic!("item {index}: {e}")), made.unwrap());
        assert_eq!(opened.plaintext().len(), len);
        assert!(made.plaintext().is_none_or(|plaintext| plaintext == opened.plaintext()));
        assert_eq!(opened.key_version_id(), made.key_version_id());
        assert!(len < 16 || seen.insert(opened.plaintext()), "a data key twice");
    }
}

#[test]
fn every_key_opens_in_its_place_for_any_count_and_any_number_of_threads() {
    let aads: Vec<_> = (0..20_000u32).map(u32::to_be_bytes).collect();
    for threads in [1, 2, 8] {
        let engine = on_threads(threads);
        for scheme in [Scheme::Derived, Scheme::Direct] {
            let key = new_key(&engine, scheme);
            engine.rotate_key(key.key_id().as_str()).unwrap();
            for (turn, count) in
                [0, 1, 31, 32, 33, 1023, 1024, 1025, 2049, 20_000].into_iter().enumerate()
            {
                let operation = OPERATIONS[turn % 4];
                for operation in [operation, Operation::AdvanceGenerateDataKey] {
                    let mut batch = DataKeyBatch::new();
                    engine
                        .generate_data_keys_into(&mut batch, operation, &key, 32, count, &aads)
                        .unwrap();
                    assert_eq!((batch.len(), batch.is_empty()), (count, count == 0));
                    assert_opens(&engine, &batch, (operation, &key, 32), |index| &aads[index]);
                }
            }
        }
    }
}

#[test]
fn the_named_calls_are_those_of_their_operations() {
    let engine = Engine::in_memory().unwrap();
    let key = new_key(&engine, Scheme::Derived);
    let rotated = engine.rotate_key(key.key_id().as_str()).unwrap();
    let raw = engine.generate_data_keys(&key, 24, 50, NoAad).unwrap();
    let advance = engine.advance_generate_data_keys(&key, 24, 50, NoAad).unwrap();
    assert_opens(&engine, &raw, (Operation::GenerateDataKey, &key, 24), |_| b"");
    assert_opens(&engine, &advance, (Operation::AdvanceGenerateDataKey, &key, 24), |_| b"");
    let version = |batch: &DataKeyBatch| batch.get(49).unwrap().key_version_id();
    assert_eq!(version(&raw), rotated.initial_version().key_version_id);
    assert_eq!(version(&advance), rotated.primary_version().key_version_id);
}

#[test]
fn lengths_from_one_byte_to_the_longest() {
    let engine = Engine::in_memory().unwrap();
    let key = new_key(&engine, Scheme::Derived);
    for operation in [Operation::GenerateDataKey, Operation::AdvanceGenerateDataKey] {
        let mut batch = DataKeyBatch::new();
        for len in [1, 2, 15, 16, 17, 31, 33, 64, 100, 255, 256, 512, 1000, 1023, 1024] {
            engine
                .generate_data_keys_into(&mut batch, operation, &key, len, 300, SameAad(b"x"))
                .unwrap();
            assert_opens(&engine, &batch, (operation, &key, len as usize), |_| b"x");
        }
    }
}

/// A source that is no slice: AADs of all lengths, cut out of one text.
struct Cut {
    text: Vec<u8>,
    count: Option<usize>,
}

impl Cut {
    fn new(count: Option<usize>) -> Self {
        let text = (0..limits::AAD_LEN_MAX).map(|at| u8::try_from(at % 251).unwrap()).collect();
        Self { text, count }
    }
}

impl AadSource for Cut {
    fn count(&self) -> Option<usize> {
        self.count
    }

    fn aad(&self, index: usize) -> &[u8] {
        let len = match index % 61 {
            0 => limits::AAD_LEN_MAX,
            1 => 0,
            _ => index * 7 % 130,
        };
        &self.text[..len]
    }
}

#[test]
fn aads_come_from_any_source() {
    let engine = on_threads(2);
    let unequal: Vec<Vec<u8>> =
        (0..9000).map(|i| vec![u8::try_from(i % 256).unwrap(); i * 37 % 300]).collect();
    let all_lens: Vec<Vec<u8>> = (0..=limits::AAD_LEN_MAX).map(|len| vec![0x5a; len]).collect();
    let array = [b"one".to_vec(), Vec::new(), vec![3; 100]];
    let strings = ["a", "longer", ""];
    let cut = Cut::new(Some(4000));
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let key = new_key(&engine, scheme);
        let make = |count, aads: &dyn AadSource| {
            let batch = engine.advance_generate_data_keys(&key, 32, count, aads).unwrap();
            let what = (Operation::AdvanceGenerateDataKey, &key, 32);
            assert_opens(&engine, &batch, what, |index| aads.aad(index));
        };
        make(100, &NoAad);
        make(100, &SameAad(b"for all"));
        make(100, &SameAad(vec![9; limits::AAD_LEN_MAX]));
        make(100, &SameAad(String::from("text")));
        make(9000, &unequal);
        make(8193, &all_lens);
        make(3, &array);
        make(3, &strings);
        make(2, &&array[1..]);
        make(4000, &cut);
        make(5000, &Cut::new(None));
        // More than are needed.
        make(1, &array);
        make(0, &array);
        make(33, &cut);
    }
}

/// The error of a batch that held keys before, which are gone now, as all others are.
fn refused(
    engine: &Engine,
    key: &KeyHandle,
    (len, count): (u32, usize),
    aads: impl AadSource,
) -> keymill::Error {
    let advance = Operation::AdvanceGenerateDataKey;
    let mut batch = engine.advance_generate_data_keys(key, 32, 10, NoAad).unwrap();
    let before = engine.describe_key(key.key_id().as_str()).unwrap();
    let made = engine.generate_data_keys_into(&mut batch, advance, key, len, count, aads);
    assert!(batch.is_empty() && batch.errors().is_empty() && batch.iter().len() == 0);
    let after = engine.describe_key(key.key_id().as_str()).unwrap();
    let wraps = |key: &keymill::KeyMetadata| key.initial_version().wraps_granted;
    assert_eq!(wraps(&before), wraps(&after), "a refused batch took wraps");
    made.expect_err("the batch is refused")
}

#[test]
fn what_is_wrong_with_one_is_refused_for_all() {
    let engine = Engine::in_memory().unwrap();
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let key = new_key(&engine, scheme);
        let few = refused(&engine, &key, (32, 4), [b"a", b"b", b"c"]);
        assert_eq!(few.kind(), ErrorKind::InvalidParameter);
        assert!(few.message().contains('3') && few.message().contains('4'), "{few}");
        let none: [&[u8]; 0] = [];
        assert_eq!(refused(&engine, &key, (32, 1), none).kind(), ErrorKind::InvalidParameter);

        // The first that is too long is named, with its own length.
        let mut aads = vec![vec![0; limits::AAD_LEN_MAX]; 100];
        aads[41].push(0);
        aads[77].extend([0; 800]);
        let long = refused(&engine, &key, (32, 100), &aads);
        assert_eq!(long.kind(), ErrorKind::InvalidParameter);
        assert!(long.message().contains("data key 41 has 8193 bytes"), "{long}");
        // One that nobody uses is nobody's fault.
        assert_eq!(engine.generate_data_keys(&key, 32, 41, &aads).unwrap().len(), 41);
        let long = refused(&engine, &key, (32, 7), SameAad(vec![0; limits::AAD_LEN_MAX + 1]));
        assert_eq!(long.kind(), ErrorKind::InvalidParameter);

        for len in [0, 1025, u32::MAX] {
            let error = refused(&engine, &key, (len, 10), NoAad);
            assert_eq!(error.kind(), ErrorKind::InvalidParameter);
            assert!(error.message().contains(&len.to_string()), "{error}");
        }
        let many = refused(&engine, &key, (1, limits::BATCH_ITEMS_MAX + 1), NoAad);
        assert_eq!(many.kind(), ErrorKind::LimitExceeded);
        assert!(many.message().contains("1048576"), "{many}");
        let large = refused(&engine, &key, (1024, 600_000), NoAad);
        assert_eq!(large.kind(), ErrorKind::LimitExceeded);
        assert!(large.message().contains("1 GiB"), "{large}");
        let endless = refused(&engine, &key, (32, usize::MAX), NoAad);
        assert_eq!(endless.kind(), ErrorKind::LimitExceeded);
        let id = key.key_id();
        engine.disable_key(id.as_str()).unwrap();
        assert_eq!(refused_when_disabled(&engine, &key), ErrorKind::Disabled);
    }
}

fn refused_when_disabled(engine: &Engine, key: &KeyHandle) -> ErrorKind {
    engine.generate_data_keys(key, 32, 0, NoAad).expect_err("the key is disabled").kind()
}

/// Slots are not in request order where AADs differ in length: results have to be.
#[test]
fn mixed_batches_keep_request_order_whatever_the_lengths_of_their_aads() {
    let engine = on_threads(2);
    let specs = [
        (KeySpec::Aes256, Scheme::Derived),
        (KeySpec::Aes256, Scheme::Direct),
        (KeySpec::Aes128, Scheme::Direct),
    ];
    let names = specs.map(|(spec, scheme)| {
        let key = CreateKey { spec, scheme: Some(scheme), ..CreateKey::default() };
        engine.create_key(&key).unwrap().key_id
    });
    let text: Vec<u8> = (0..9000).map(|at| u8::try_from(at % 249).unwrap()).collect();
    let mut state = 99;
    let mut batch = DataKeyBatch::new();
    for round in 0..120 {
        let count = mix(&mut state) % if round % 20 == 0 { 12_000 } else { 700 };
        let (key_count, len_count) = (1 + mix(&mut state) % 3, 1 + mix(&mut state) % 3);
        let spread = [1, 17, 40, 90, 300, 8193][mix(&mut state) % 6];
        // Long runs of one shape, or a new shape with every item; a refused one now and then.
        let run = [1, 1, 5, 40, 400][mix(&mut state) % 5];
        let bad_every = [0, 0, 7, 100][mix(&mut state) % 4];
        let mut requests: Vec<GenerateDataKeyRequest<'_>> = Vec::new();
        while requests.len() < count {
            let name = names[mix(&mut state) % key_count].as_str();
            let len = u32::try_from(16 + 8 * (mix(&mut state) % len_count)).unwrap();
            for _ in 0..1 + mix(&mut state) % run {
                // Different bytes, not lengths alone.
                let (from, len_of_aad) = (mix(&mut state) % 800, mix(&mut state) % spread);
                let bad = bad_every > 0 && mix(&mut state).is_multiple_of(bad_every);
                let name = if bad { "alias/absent" } else { name };
                requests.push(
                    GenerateDataKeyRequest::new(name, len).aad(&text[from..from + len_of_aad]),
                );
            }
        }
        let operation = OPERATIONS[mix(&mut state) % 4];
        engine.generate_data_key_batch_into(&mut batch, operation, &requests).unwrap();
        assert_eq!(batch.len(), requests.len());
        for (index, request) in requests.iter().enumerate() {
            let made = batch.get(index);
            assert_eq!(made.is_err(), request.key_id == "alias/absent", "item {index}");
            let Ok(made) = made else {
                assert_eq!(made.unwrap_err().index(), Some(index));
                continue;
            };
            assert_eq!(made.key_id().as_str(), request.key_id);
        }
        let good = || (0..requests.len()).filter(|index| batch.get(*index).is_ok());
        let opening: Vec<_> = good()
            .map(|index| {
                let (key, request) = (batch.get(index).unwrap(), &requests[index]);
                let opening = DecryptRequest::new(key.ciphertext_blob()).aad(request.aad);
                opening.key_id(request.key_id).iv(key.iv())
            })
            .collect();
        let opened = engine.advance_decrypt_batch(&opening).unwrap();
        for (opened, index) in opened.iter().zip(good()) {
            let opened = opened.unwrap_or_else(|e| panic!("round {round}, item {index}: {e}"));
            assert_eq!(opened.plaintext().len(), requests[index].number_of_bytes as usize);
            let made = batch.get(index).unwrap();
            assert!(made.plaintext().is_none_or(|plaintext| plaintext == opened.plaintext()));
        }
    }
}

#[test]
fn no_iv_comes_twice_under_a_version_and_a_salt() {
    let engine = on_threads(2);
    let mut batch = DataKeyBatch::new();
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let key = new_key(&engine, scheme);
        let mut seen = HashSet::new();
        let mut total = 0;
        for turn in 0..400 {
            let count = [1, 5, 31, 32, 64, 257, 1025, 100, 8, 12_000][turn % 10] / (1 + turn / 200);
            let operation = OPERATIONS[turn % 4];
            engine.generate_data_keys_into(&mut batch, operation, &key, 16, count, NoAad).unwrap();
            total += count;
            let salt_at = if turn % 4 < 2 { 0 } else { limits::BLOB_HEAD_LEN };
            for made in batch.iter().map(Result::unwrap) {
                let salt: [u8; limits::SALT_LEN] = match scheme {
                    Scheme::Derived => {
                        made.ciphertext_blob()[salt_at..][..limits::SALT_LEN].try_into().unwrap()
                    }
                    Scheme::Direct => [0; limits::SALT_LEN],
                };
                // Raw and self-describing blobs are made under the same version here.
                assert!(seen.insert((salt, *made.iv())), "an IV twice");
            }
        }
        assert_eq!(seen.len(), total);
    }
}

#[test]
fn a_direct_key_at_its_bound_refuses_the_items_beyond_in_order() {
    let left = 70;
    let spent = limits::WRAPS_PER_VERSION_MAX - left;
    let engine = Engine::builder().initial_spent(spent).in_memory().unwrap();
    for (nth, operation) in OPERATIONS.into_iter().enumerate() {
        let key = new_key(&engine, Scheme::Direct);
        let id = key.key_id();
        let mut batch = DataKeyBatch::new();
        let aads = Cut::new(None);
        let make = |batch: &mut DataKeyBatch, count| {
            engine.generate_data_keys_into(batch, operation, &key, 32, count, &aads).unwrap();
            let made = batch.iter().take_while(Result::is_ok).count();
            assert!(batch.iter().skip(made).all(|item| item.is_err()));
            assert_eq!((batch.len(), batch.errors().len()), (count, count - made));
            for (error, index) in batch.errors().iter().zip(made..) {
                assert_eq!(error.kind(), ErrorKind::LimitExceeded);
                assert_eq!(error.index(), Some(index));
                assert_eq!(error.request_id(), Some(batch.request_id(index)));
            }
            made
        };
        assert_eq!(make(&mut batch, 10), 10);
        let beyond = [100, 3000, 61, 60][nth];
        assert_eq!(make(&mut batch, beyond), 60);
        let opening: Vec<_> = (0..60)
            .map(|index| {
                let made = batch.get(index).unwrap();
                DecryptRequest::new(made.ciphertext_blob())
                    .key_id(id.as_str())
                    .iv(made.iv())
                    .aad(aads.aad(index))
            })
            .collect();
        let opened = engine.advance_decrypt_batch(&opening).unwrap();
        assert!(opened.errors().is_empty(), "{:?}", opened.errors()[0]);
        drop((opened, opening));
        assert_eq!(make(&mut batch, 5), 0);
        assert_eq!(make(&mut batch, 0), 0);
        // A rotation gives the Advance operations a new version, with wraps of its own.
        engine.rotate_key(id.as_str()).unwrap();
        assert_eq!(make(&mut batch, 5), if nth < 2 { 0 } else { 5 });
    }
}

#[cfg(feature = "deterministic")]
#[test]
fn request_structs_of_one_key_make_the_same_batch() {
    let counts = [0, 1, 31, 32, 33, 1023, 1024, 1025, 2049, 20_000];
    let transcript = |structs: bool, threads: usize, scheme: Scheme| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let builder = Engine::builder().thread_pool(Arc::new(pool));
        let engine = builder.deterministic([3; 32]).unwrap();
        let key = new_key(&engine, scheme);
        let id = key.key_id();
        let aads = Cut::new(None);
        let (mut batch, mut out) = (DataKeyBatch::new(), Vec::new());
        for (turn, count) in counts.into_iter().enumerate() {
            for (len, operation) in [(32, OPERATIONS[turn % 4]), (100, OPERATIONS[2])] {
                let requests: Vec<_> = (0..count)
                    .map(|at| GenerateDataKeyRequest::new(id.as_str(), len).aad(aads.aad(at)))
                    .collect();
                if structs {
                    engine.generate_data_key_batch_into(&mut batch, operation, &requests)
                } else {
                    engine.generate_data_keys_into(&mut batch, operation, &key, len, count, &aads)
                }
                .unwrap();
                for made in batch.iter().map(Result::unwrap) {
                    out.extend_from_slice(made.key_version_id().as_str().as_bytes());
                    out.extend_from_slice(made.iv());
                    out.extend_from_slice(made.plaintext().unwrap_or_default());
                    out.extend_from_slice(made.ciphertext_blob());
                    out.extend_from_slice(made.request_id().as_bytes());
                }
            }
        }
        out
    };
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let uniform = transcript(false, 1, scheme);
        assert!(uniform == transcript(true, 1, scheme), "structs differ");
        assert!(uniform == transcript(false, 8, scheme), "threads differ");
        assert!(uniform == transcript(true, 2, scheme), "structs on threads differ");
    }
}
