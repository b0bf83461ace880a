//! After a call nothing of a data key is left on the stack below it.
//!
//! Goal: what kernels and the code around them spill is overwritten, deep enough for every path. Method: a thread calls
//! the engine, copies 64 KiB of the stack below its own frame, and looks for each eight bytes of each data key and of
//! its key stream, also reversed, as hashes have them. Optimised builds alone keep within what is overwritten, and are
//! what users have: `cargo test --release --test stack`, for lower tiers with `KEYMILL_TIER`.
#![cfg(not(debug_assertions))]
#![expect(unsafe_code, reason = "reads the stack below the own frame")]

use std::{collections::HashSet, hint::black_box, thread};

use keymill::{
    CreateKey, DataKey, DecryptRequest, EncryptRequest, Engine, GenerateDataKeyRequest, Scheme,
};

const DEPTH: usize = 64 << 10;
const PIECE: usize = 8;
const TAG_LEN: usize = 16;

/// What lies below the frame of this function's caller, as far as this one leaves it alone.
#[inline(never)]
fn below(copy: &mut Vec<u8>) {
    let here = 0u8;
    let top = (&raw const here).addr();
    for at in top - DEPTH..top {
        // SAFETY: the thread's stack is much larger, and bytes have no invalid values. The capacity is there, so that
        // nothing is called that could write below.
        copy.push(unsafe { std::ptr::with_exposed_provenance::<u8>(at).read_volatile() });
    }
}

/// Pieces of the keys and their key streams that are found in `stack`.
fn found(stack: &[u8], keys: &[(Vec<u8>, Vec<u8>)]) -> usize {
    let mut pieces = HashSet::new();
    for (plaintext, blob) in keys {
        let sealed = &blob[blob.len() - TAG_LEN - plaintext.len()..];
        let stream: Vec<_> = plaintext.iter().zip(sealed).map(|(p, c)| p ^ c).collect();
        for bytes in [plaintext, &stream] {
            for piece in bytes.chunks_exact(PIECE) {
                let mut piece: [u8; PIECE] = piece.try_into().unwrap();
                pieces.insert(piece);
                piece.reverse();
                pieces.insert(piece);
            }
        }
    }
    stack.windows(PIECE).filter(|window| pieces.contains(*window)).count()
}

/// Plaintexts and blobs.
type Keys = Vec<(Vec<u8>, Vec<u8>)>;

/// Runs `call` on a deep stack, and returns how much is left there of the keys that `keys` finds in its result.
fn left_by<R>(call: impl FnOnce() -> R + Send, keys: impl FnOnce(&R) -> Keys + Send) -> usize {
    let look = || {
        let result = call();
        let mut stack = Vec::with_capacity(DEPTH);
        below(&mut stack);
        found(&stack, &keys(&result))
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(8 << 20);
        thread.spawn_scoped(scope, look).unwrap().join().unwrap()
    })
}

fn engine(scheme: Scheme) -> Engine {
    let engine = Engine::in_memory().unwrap();
    let (alias, scheme) = (Some("alias/app".into()), Some(scheme));
    engine.create_key(&CreateKey { alias, scheme, ..CreateKey::default() }).unwrap();
    engine
}

/// Whole blocks and others, short and long.
const LENS: [u32; 14] = [8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 100, 200, 1024];

fn aad(index: usize, alike: bool) -> Vec<u8> {
    vec![7; if alike { 16 } else { index * 5 % 150 }]
}

#[test]
fn batches_leave_nothing_of_a_key() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let engine = engine(scheme);
        for (len, count, alike) in LENS
            .iter()
            .flat_map(|len| [1, 7, 200].map(|count| [(len, count, true), (len, count, false)]))
            .flatten()
        {
            let aads: Vec<_> = (0..count).map(|i| aad(i, alike)).collect();
            let request = |aad| GenerateDataKeyRequest::new("alias/app", *len).aad(aad);
            let requests: Vec<_> = aads.iter().map(|aad| request(aad)).collect();
            let what = format!("{scheme:?}: {count} of {len}, AADs alike: {alike}");
            let generate = || engine.advance_generate_data_key_batch(&requests).unwrap();
            let keys = |made: &keymill::DataKeyBatch| {
                let of = |i| {
                    let key = made.get(i).unwrap();
                    (key.plaintext().unwrap().to_vec(), key.ciphertext_blob().to_vec())
                };
                (0..count).map(of).collect::<Keys>()
            };
            assert_eq!(left_by(generate, keys), 0, "generate {what}");

            let made = keys(&generate());
            let requests: Vec<_> = made
                .iter()
                .zip(&aads)
                .map(|((_, blob), aad)| DecryptRequest::new(blob).aad(aad))
                .collect();
            let left = left_by(
                || engine.advance_decrypt_batch(&requests).unwrap(),
                |opened| {
                    assert!(
                        made.iter()
                            .enumerate()
                            .all(|(i, key)| *opened.get(i).unwrap().plaintext() == key.0)
                    );
                    made.clone()
                },
            );
            assert_eq!(left, 0, "decrypt {what}");
        }
    }
}

#[test]
fn single_calls_leave_nothing_of_a_key() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let engine = engine(scheme);
        for len in LENS {
            for aad in [0, 16, 33, 200].map(|len| vec![7; len]) {
                let what = format!("{scheme:?}: {len} bytes, AAD of {}", aad.len());
                let request = GenerateDataKeyRequest::new("alias/app", len).aad(&aad);
                let keys = |key: &DataKey| {
                    let plaintext = key.plaintext().unwrap().expose().to_vec();
                    vec![(plaintext, key.ciphertext_blob().to_vec())]
                };
                let generate = || engine.advance_generate_data_key(&request).unwrap();
                // The second call in a thread has key streams that were made ahead.
                let twice = || (generate(), generate()).1;
                assert_eq!(left_by(twice, keys), 0, "generate {what}");

                let made = keys(&generate());
                let request = DecryptRequest::new(&made[0].1).aad(&aad);
                let left = left_by(|| engine.advance_decrypt(&request).unwrap(), |_| made.clone());
                assert_eq!(left, 0, "decrypt {what}");
            }
        }
    }
}

/// Long texts and IVs of the caller's take another way than short ones.
#[test]
fn encryptions_leave_nothing_of_a_text() {
    for scheme in [Scheme::Derived, Scheme::Direct] {
        let engine = engine(scheme);
        for len in LENS.map(|len| len as usize).into_iter().chain([1025, 4096, 5000]) {
            let ivs = [None, Some(&[5; 12][..])];
            for iv in ivs.into_iter().filter(|iv| scheme == Scheme::Derived || iv.is_none()) {
                let what = format!("{scheme:?}: {len} bytes, Iv {iv:?}");
                let text: Vec<u8> = (0..len).map(|i| (i * i * 37 + i * 11 + 3) as u8).collect();
                let request = EncryptRequest { iv, ..EncryptRequest::new("alias/app", &text) };
                let encrypt = || engine.advance_encrypt(&request).unwrap();
                let twice = || (encrypt(), encrypt()).1;
                let keys = |made: &keymill::Encrypted| {
                    vec![(text.clone(), made.ciphertext_blob().to_vec())]
                };
                assert_eq!(left_by(twice, keys), 0, "encrypt {what}");

                let made = encrypt();
                let request = DecryptRequest::new(made.ciphertext_blob());
                let open = || engine.advance_decrypt(&request).unwrap();
                assert_eq!(left_by(open, |_| keys(&made)), 0, "decrypt {what}");
            }
        }
    }
}

#[test]
fn what_is_looked_for_would_be_found() {
    #[inline(never)]
    fn leave(key: &[u8; 32]) {
        let mut copy = [0; 512];
        copy[100..132].copy_from_slice(key);
        black_box(&mut copy);
    }
    let left = thread::Builder::new().stack_size(8 << 20).spawn(|| {
        let key: [u8; 32] = std::array::from_fn(|i| (i * 37 + 11) as u8);
        let mut stack = Vec::with_capacity(DEPTH);
        leave(black_box(&key));
        below(&mut stack);
        found(&stack, &[(key.to_vec(), [&[0; 32][..], &[0; TAG_LEN]].concat())])
    });
    assert!(left.unwrap().join().unwrap() >= 4);
}
