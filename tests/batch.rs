//! Batches through the public API: order, content, refusals, limits, threads.
//!
//! Method: mixed batches of every scheme, spec, length and AAD; each result is opened again singly, in a batch, and
//! compared with what its request asked for.

use std::{collections::HashSet, sync::Arc};

use keymill::{
    CreateKey, DecryptRequest, Engine, ErrorKind, GenerateDataKeyRequest, KeySpec, Scheme, limits,
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
