//! The deterministic mode: the same seed and the same calls give the same bytes, for any number of threads and any
//! tier.
#![cfg(feature = "deterministic")]

use std::sync::Arc;

use keymill::{
    CreateKey, EncryptRequest, Encrypted, Engine, GenerateDataKeyRequest, KeySpec, Scheme, Tier,
};

/// Everything that a fixed row of calls returns, as one string of bytes.
fn transcript(seed: u8, threads: usize, tier: Tier) -> Vec<u8> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let builder = Engine::builder().thread_pool(Arc::new(pool)).tier(tier);
    let engine = builder.deterministic([seed; 32]).unwrap();
    assert_eq!(engine.tier(), tier.min(Tier::detect().unwrap()));
    let mut names = Vec::new();
    for i in 0..40 {
        let (spec, scheme) = match i % 4 {
            0 => (KeySpec::Aes128, Scheme::Direct),
            1 => (KeySpec::Aes256, Scheme::Direct),
            _ => (KeySpec::Aes256, Scheme::Derived),
        };
        let key = CreateKey { spec, scheme: Some(scheme), ..CreateKey::default() };
        names.push(engine.create_key(&key).unwrap().key_id);
    }
    let mut out = Vec::new();
    let mut put = |key: keymill::DataKeyRef<'_>| {
        out.extend_from_slice(key.key_version_id().as_str().as_bytes());
        out.extend_from_slice(key.iv());
        out.extend_from_slice(key.plaintext().unwrap_or_default());
        out.extend_from_slice(key.ciphertext_blob());
        out.extend_from_slice(key.request_id().as_bytes());
    };
    let mut texts = Vec::new();
    let mut put_text = |made: keymill::Result<Encrypted>| {
        let made = made.unwrap();
        texts.extend_from_slice(made.iv());
        texts.extend_from_slice(made.ciphertext_blob());
        texts.extend_from_slice(made.request_id().as_bytes());
    };
    for round in 0..3usize {
        let requests: Vec<_> = (0..9000usize)
            .map(|i| {
                // Long runs, short runs and lone items.
                let name = &names[if i % 3 == 0 { 2 } else { (i * i + round) % names.len() }];
                let number_of_bytes =
                    if i % 5 == 0 { 32 } else { 1 + u32::try_from(i % 70).unwrap() };
                GenerateDataKeyRequest::new(name.as_str(), number_of_bytes).aad(&[7; 64][..i % 64])
            })
            .collect();
        for batch in [
            engine.generate_data_key_batch(&requests).unwrap(),
            engine.advance_generate_data_key_batch(&requests[..100]).unwrap(),
            engine.advance_generate_data_key_without_plaintext_batch(&requests).unwrap(),
        ] {
            batch.iter().for_each(|key| put(key.unwrap()));
        }
        // Texts by every way: under a wrapping state, a version, a salt of their own.
        for len in [20, 1000, 5000] {
            let (text, iv) = (vec![9; len], Some(&[3; 12][..]));
            for name in &names[..3] {
                let request = EncryptRequest::new(name.as_str(), &text);
                put_text(engine.encrypt(&request));
                put_text(engine.advance_encrypt(&request));
            }
            let request = EncryptRequest::new(names[2].as_str(), &text);
            put_text(engine.encrypt(&EncryptRequest { iv, ..request }));
        }
        engine.rotate_key(names[3].as_str()).unwrap();
    }
    out.append(&mut texts);
    for name in &names {
        let single = engine
            .advance_generate_data_key(&GenerateDataKeyRequest::new(name.as_str(), 24))
            .unwrap();
        out.extend_from_slice(single.ciphertext_blob());
    }
    out
}

#[test]
fn the_same_seed_gives_the_same_bytes_for_any_number_of_threads_and_any_tier() {
    let best = Tier::available()[0];
    let one = transcript(1, 1, best);
    assert!(one == transcript(1, 2, best), "2 threads differ from 1");
    assert!(one == transcript(1, 8, best), "8 threads differ from 1");
    assert!(one != transcript(2, 1, best), "another seed gives the same bytes");
    for tier in &Tier::available()[1..] {
        assert!(one == transcript(1, 2, *tier), "{tier} differs from {best}");
    }
}
