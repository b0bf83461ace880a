//! Batches made anew in their own memory, and memory that one batch leaves to the next.
//!
//! Method: one batch is made again and again with changing sizes, lengths and operations, with views of earlier
//! contents held meanwhile; everything that can be seen has to belong to the present contents, and everything that was
//! seen has to stay. What the engine keeps is read from `recycled_bytes`.

use std::{collections::HashSet, sync::Arc, thread};

use keymill::{
    CreateKey, DataKey, DataKeyBatch, DecryptRequest, Engine, ErrorKind, GenerateDataKeyRequest,
    KeyHandle, NoAad, Operation, SameAad, Scheme, limits,
};

const OPERATIONS: [Operation; 4] = [
    Operation::GenerateDataKey,
    Operation::AdvanceGenerateDataKeyWithoutPlaintext,
    Operation::AdvanceGenerateDataKey,
    Operation::GenerateDataKeyWithoutPlaintext,
];

const ADVANCE: Operation = Operation::AdvanceGenerateDataKey;

fn with_key(engine: &Engine) -> KeyHandle {
    engine
        .create_key(&CreateKey { alias: Some("alias/a".into()), ..CreateKey::default() })
        .unwrap();
    engine.key("alias/a").unwrap()
}

fn engine_with_key() -> (Engine, KeyHandle) {
    let engine = Engine::in_memory().unwrap();
    let key = with_key(&engine);
    (engine, key)
}

/// A pseudo-random sequence, so that a failure repeats.
fn mix(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 40).unwrap()
}

/// A data key with what it was when it was seen first.
struct Seen {
    view: DataKey,
    plaintext: Option<Vec<u8>>,
    blob: Vec<u8>,
}

impl Seen {
    fn new(view: DataKey) -> Self {
        let plaintext = view.plaintext().map(|plaintext| plaintext.expose().to_vec());
        let blob = view.ciphertext_blob().to_vec();
        Self { view, plaintext, blob }
    }

    fn assert_unchanged(&self) {
        let plaintext = self.view.plaintext().map(keymill::SecretBytes::expose);
        assert_eq!(plaintext, self.plaintext.as_deref());
        assert_eq!(self.view.ciphertext_blob(), &self.blob);
    }
}

#[test]
fn a_batch_made_again_and_again_holds_what_was_asked_for_last_and_views_keep_theirs() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let engine = Engine::builder().thread_pool(Arc::new(pool)).in_memory().unwrap();
    let derived = with_key(&engine);
    let direct = CreateKey { scheme: Some(Scheme::Direct), ..CreateKey::default() };
    let direct = engine.create_key(&direct).unwrap().key_id;
    let direct = engine.key(direct.as_str()).unwrap();
    let mut batch = DataKeyBatch::new();
    let (mut seen, mut state) = (Vec::new(), 5);
    let mut plaintexts = HashSet::new();
    for turn in 0..300 {
        let key = if mix(&mut state).is_multiple_of(2) { &derived } else { &direct };
        let operation = OPERATIONS[mix(&mut state) % 4];
        let count = [0, 1, 7, 33, 300, 1500, 9000][mix(&mut state) % 7];
        let len = [16, 32, 33, 64, 500, 1024][mix(&mut state) % 6];
        if mix(&mut state).is_multiple_of(3) {
            let id = key.key_id();
            let mut requests =
                vec![GenerateDataKeyRequest::new(id.as_str(), len).aad(b"same"); count];
            if let Some(first) = requests.first_mut() {
                first.number_of_bytes = 17;
            }
            engine.generate_data_key_batch_into(&mut batch, operation, &requests).unwrap();
        } else {
            let aads = SameAad(b"same");
            engine.generate_data_keys_into(&mut batch, operation, key, len, count, aads).unwrap();
        }
        assert_eq!((batch.len(), batch.errors().len()), (count, 0));
        for index in 0..count {
            let made = batch.get(index).unwrap();
            assert_eq!(made.key_id(), key.key_id());
            assert_eq!(made.plaintext().is_some(), operation.returns_plaintext());
            if let Some(plaintext) = made.plaintext() {
                assert!(plaintext.len() == len as usize || index == 0);
                assert!(plaintexts.insert(plaintext[..16].to_vec()), "a data key of before");
            }
        }
        if count > 0 {
            let made = batch.get(mix(&mut state) % count).unwrap();
            let request = DecryptRequest::new(made.ciphertext_blob()).aad(b"same");
            let id = key.key_id();
            let opened = engine.advance_decrypt(&request.key_id(id.as_str()).iv(made.iv()));
            let opened = opened.unwrap();
            let plaintext = made.plaintext().unwrap_or(opened.plaintext().expose());
            assert_eq!(opened.plaintext().expose(), plaintext);
            // Every other batch is shared when it is made anew.
            if turn % 2 == 0 {
                seen.push(Seen::new(made.to_data_key()));
            }
        }
        seen.iter().for_each(Seen::assert_unchanged);
        if seen.len() > 10 {
            seen.remove(mix(&mut state) % 10);
        }
    }
    drop((batch, engine));
    seen.iter().for_each(Seen::assert_unchanged);
}

#[test]
fn a_batch_that_nobody_shares_stays_where_it_is() {
    let (engine, key) = engine_with_key();
    let mut batch = DataKeyBatch::new();
    let make = |batch: &mut DataKeyBatch, count| {
        engine.generate_data_keys_into(batch, ADVANCE, &key, 32, count, NoAad).unwrap();
        batch.get(0).unwrap().plaintext().unwrap().as_ptr()
    };
    let place = make(&mut batch, 1000);
    assert_eq!(make(&mut batch, 1000), place);
    assert_eq!(make(&mut batch, 10), place);
    assert_eq!(make(&mut batch, 999), place);
    let view = batch.get(0).unwrap().to_data_key();
    assert_ne!(make(&mut batch, 1000), place);
    assert_eq!(view.plaintext().unwrap().expose().as_ptr(), place);
    // A view of the blobs alone keeps them, too.
    let blob = batch.get(999).unwrap().to_data_key().ciphertext_bytes();
    let bytes = blob.to_vec();
    let place = batch.get(0).unwrap().plaintext().unwrap().as_ptr();
    assert_ne!(make(&mut batch, 1000), place);
    assert_eq!(blob, bytes);
}

#[test]
fn a_failed_call_leaves_an_empty_batch() {
    let (engine, key) = engine_with_key();
    let other = Engine::in_memory().unwrap();
    let stranger = with_key(&other);
    let long = vec![0; limits::AAD_LEN_MAX + 1];
    let request = GenerateDataKeyRequest::new("alias/a", 1024);
    let mut batch = DataKeyBatch::default();
    type Call<'a> = &'a dyn Fn(&mut DataKeyBatch) -> keymill::Result<()>;
    let into = |batch: &mut DataKeyBatch, key, len, count| {
        engine.generate_data_keys_into(batch, ADVANCE, key, len, count, SameAad(b"x"))
    };
    let calls: [(ErrorKind, Call<'_>); 7] = [
        (ErrorKind::InvalidParameter, &|batch| into(batch, &key, 0, 10)),
        (ErrorKind::InvalidParameter, &|batch| into(batch, &stranger, 32, 10)),
        (ErrorKind::LimitExceeded, &|batch| into(batch, &key, 32, limits::BATCH_ITEMS_MAX + 1)),
        (ErrorKind::LimitExceeded, &|batch| into(batch, &key, 1024, 700_000)),
        (ErrorKind::InvalidParameter, &|batch| {
            engine.generate_data_keys_into(batch, ADVANCE, &key, 32, 3, SameAad(&long))
        }),
        (ErrorKind::InvalidParameter, &|batch| {
            engine.generate_data_keys_into(batch, ADVANCE, &key, 32, 3, [b"a"])
        }),
        (ErrorKind::LimitExceeded, &|batch| {
            engine.generate_data_key_batch_into(batch, ADVANCE, &vec![request; 700_000])
        }),
    ];
    for (nth, (kind, call)) in calls.into_iter().enumerate() {
        into(&mut batch, &key, 32, 1000).unwrap();
        let view = Seen::new(batch.get(500).unwrap().to_data_key());
        let error = call(&mut batch).unwrap_err();
        assert_eq!(error.kind(), kind, "call {nth}: {error}");
        assert!(batch.is_empty() && batch.errors().is_empty(), "call {nth}");
        assert_eq!(batch.iter().count(), 0);
        view.assert_unchanged();
        // And again, without a view: the next call finds everything in order.
        into(&mut batch, &key, 32, 1000).unwrap();
        call(&mut batch).unwrap_err();
        assert!(batch.is_empty());
    }
    batch.clear();
    assert!(batch.is_empty());
    into(&mut batch, &key, 32, 5).unwrap();
    assert_eq!(batch.len(), 5);
}

#[test]
fn a_batch_moves_between_engines_and_its_memory_goes_home() {
    let (here, key) = engine_with_key();
    let (there, other) = engine_with_key();
    let mut batch = here.advance_generate_data_keys(&key, 1024, 1000, NoAad).unwrap();
    assert_eq!((here.recycled_bytes(), there.recycled_bytes()), (0, 0));
    there.generate_data_keys_into(&mut batch, ADVANCE, &other, 1024, 1000, NoAad).unwrap();
    assert_eq!(batch.get(0).unwrap().key_id(), other.key_id());
    assert!(here.recycled_bytes() > 2_000_000, "the memory went home");
    assert_eq!(there.recycled_bytes(), 0);
    drop(batch);
    assert!(there.recycled_bytes() > 2_000_000);
}

#[test]
fn what_waits_grows_with_drops_and_is_bounded() {
    let item = 2 * 32 + limits::IV_LEN;
    for max in [0, 1, 100_000, 1_000_000] {
        let engine = Engine::builder().recycled_bytes_max(max).in_memory().unwrap();
        let key = with_key(&engine);
        let make = |count| engine.generate_data_keys(&key, 32, count, NoAad).unwrap();
        let batches: Vec<_> = [1, 10, 100, 1000, 10_000].into_iter().map(make).collect();
        let mut before = engine.recycled_bytes();
        assert_eq!(before, 0);
        for batch in batches {
            let fits = batch.len() * 2 * item + before <= max;
            drop(batch);
            let now = engine.recycled_bytes();
            assert!(now <= max && now >= before, "{now} bytes wait of {max}");
            assert_eq!(now > before, now != before);
            assert!(!fits || now > before, "there was room under {max}");
            before = now;
        }
        assert_eq!(before > 0, max >= 100_000);
        // The next batch takes some of them along, and brings them back.
        let batch = make(5);
        assert!(engine.recycled_bytes() < before || before == 0);
        drop(batch);
        assert!(engine.recycled_bytes() <= max);
    }
    // In number, too.
    let (engine, key) = engine_with_key();
    let batches: Vec<_> =
        (0..100).map(|_| engine.generate_data_keys(&key, 32, 100, NoAad).unwrap()).collect();
    let one = 100 * (item + 28);
    drop(batches);
    let most = 2 * limits::RECYCLED_BATCHES_MAX * one;
    assert!((one..=most).contains(&engine.recycled_bytes()), "{}", engine.recycled_bytes());
}

#[test]
fn batches_and_views_outlive_their_engine() {
    let (engine, key) = engine_with_key();
    let mut batch = engine.advance_generate_data_keys(&key, 32, 2000, NoAad).unwrap();
    let view = Seen::new(batch.get(77).unwrap().to_data_key());
    let blobs: Vec<_> =
        batch.iter().map(|key| key.unwrap().ciphertext_blob().to_vec()).take(3).collect();
    let requests: Vec<_> = blobs.iter().map(|blob| DecryptRequest::new(blob)).collect();
    let opened = engine.advance_decrypt_batch(&requests).unwrap();
    drop((engine, key));
    assert_eq!(opened.get(2).unwrap().plaintext(), batch.get(2).unwrap().plaintext().unwrap());
    let (other, key) = engine_with_key();
    other.generate_data_keys_into(&mut batch, ADVANCE, &key, 32, 10, NoAad).unwrap();
    assert_eq!(batch.get(9).unwrap().key_id(), key.key_id());
    view.assert_unchanged();
    drop((opened, batch));
    view.assert_unchanged();
    drop(view);
}

/// Decrypting takes its memory from where generating leaves it: a failed item must not show what was there.
#[test]
fn what_decrypting_returns_is_its_own() {
    let (engine, key) = engine_with_key();
    let mut old = HashSet::new();
    for turn in 0..30 {
        let made = engine.advance_generate_data_keys(&key, 32, 1500, NoAad).unwrap();
        let mut blobs: Vec<_> =
            made.iter().map(|key| key.unwrap().ciphertext_blob().to_vec()).collect();
        let plaintexts: Vec<_> =
            made.iter().map(|key| key.unwrap().plaintext().unwrap().to_vec()).collect();
        drop(made);
        // Every seventh is damaged, in a shorter or longer batch than that before.
        let count = 1 + turn * 37 % 1500;
        for blob in blobs[..count].iter_mut().step_by(7) {
            *blob.last_mut().unwrap() ^= 1;
        }
        let requests: Vec<_> =
            blobs[..count].iter().map(|blob| DecryptRequest::new(blob)).collect();
        let opened = engine.advance_decrypt_batch(&requests).unwrap();
        assert_eq!(opened.errors().len(), count.div_ceil(7));
        for (index, item) in opened.iter().enumerate() {
            match item {
                Ok(item) => {
                    assert_eq!(item.plaintext(), plaintexts[index]);
                    assert!(!old.contains(item.plaintext()), "a key of an earlier batch");
                    if index == 1 {
                        let view = item.to_decrypted();
                        assert_eq!(view.plaintext().expose(), plaintexts[index]);
                    }
                }
                Err(_) => assert!(index.is_multiple_of(7)),
            }
        }
        old.extend(plaintexts);
    }
    assert!(engine.recycled_bytes() > 0);
}

#[test]
fn many_threads_share_what_waits() {
    let (engine, key) = engine_with_key();
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|number| {
                let (engine, key) = (&engine, &key);
                scope.spawn(move || {
                    let mut seen = Vec::new();
                    for turn in 0..200 {
                        let count = 1 + (turn * 31 + number * 7) % 400;
                        let batch = engine.generate_data_keys(key, 32, count, NoAad).unwrap();
                        seen.extend(
                            batch.iter().map(|key| key.unwrap().plaintext().unwrap().to_vec()),
                        );
                    }
                    seen
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len(), "a data key twice");
}
