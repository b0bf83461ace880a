//! No freed block of the heap holds a key.
//!
//! Method: a global allocator looks through every block that is freed for secrets that were registered before: a KEK's
//! material, and data keys whose blobs were made here, so that they are known beforehand. It keeps them masked, so as
//! not to find itself. A control frees a secret on purpose and has to be caught.
#![expect(unsafe_code, reason = "a global allocator")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
};

use keymill::{
    CreateKey, DecryptRequest, EncryptRequest, Engine, GenerateDataKeyRequest, ImportKey, RootKey,
    Scheme,
};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

const MASK: u64 = 0x5a5a_5a5a_5a5a_5a5a;
const SECRETS_MAX: usize = 16;

/// The first eight bytes of every secret, masked.
static SECRETS: [AtomicU64; SECRETS_MAX] = [const { AtomicU64::new(0) }; SECRETS_MAX];
static COUNT: AtomicUsize = AtomicUsize::new(0);
static ARMED: AtomicBool = AtomicBool::new(false);
static HITS: AtomicUsize = AtomicUsize::new(0);

struct Scanner;

#[global_allocator]
static SCANNER: Scanner = Scanner;

// SAFETY: every call goes to the system's allocator, with its own arguments.
unsafe impl GlobalAlloc for Scanner {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is the system's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        if ARMED.load(SeqCst) {
            // SAFETY: the block is still ours, of this length, and was zeroed when it was made.
            look_through(unsafe { std::slice::from_raw_parts(place, layout.size()) });
        }
        // SAFETY: the caller's contract is the system's.
        unsafe { System.dealloc(place, layout) }
    }
    // `realloc` stays the default one: it allocates, copies, and frees through the two above.
}

fn look_through(block: &[u8]) {
    let secrets = &SECRETS[..COUNT.load(SeqCst)];
    for window in block.windows(8) {
        let word = u64::from_ne_bytes(window.try_into().unwrap()) ^ MASK;
        if secrets.iter().any(|secret| secret.load(SeqCst) == word) {
            HITS.fetch_add(1, SeqCst);
        }
    }
}

fn register(secret: &[u8]) {
    let at = COUNT.load(SeqCst);
    let word = u64::from_ne_bytes(secret[..8].try_into().unwrap());
    SECRETS[at].store(word ^ MASK, SeqCst);
    COUNT.store(at + 1, SeqCst);
}

/// Bytes that nothing else is likely to hold, on the stack.
fn secret<const N: usize>(seed: u8) -> [u8; N] {
    let mut state = u64::from(seed) + 77;
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    })
}

#[test]
fn freed_memory_holds_no_key() {
    let (root, kek): ([u8; 32], [u8; 32]) = (secret(1), secret(2));
    let deks: [[u8; 32]; 8] = std::array::from_fn(|nth| secret(10 + u8::try_from(nth).unwrap()));
    [root, kek].iter().chain(&deks).for_each(|secret| register(secret));

    // Blobs of known data keys, made without the engine.
    let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &kek).unwrap());
    let blobs: Vec<Vec<u8>> = (deks.iter())
        .map(|dek| {
            let mut blob = dek.to_vec();
            let nonce = Nonce::assume_unique_for_key([7; 12]);
            cipher.seal_in_place_append_tag(nonce, Aad::empty(), &mut blob).unwrap();
            blob
        })
        .collect();

    let home = tempfile::tempdir().unwrap();
    ARMED.store(true, SeqCst);
    {
        let root = RootKey::from_bytes(&root).unwrap();
        let engine = Engine::create(home.path().join("keys.db"), &root).unwrap();
        let import = ImportKey {
            scheme: Some(Scheme::Direct),
            alias: Some("alias/known".into()),
            ..ImportKey::new(&kek)
        };
        engine.import_key(&import).unwrap();
        let opening = |blob| DecryptRequest::new(blob).key_id("alias/known").iv(&[7; 12]);
        let requests: Vec<_> = blobs.iter().map(|blob| opening(blob)).collect();
        let batch = engine.decrypt_batch(&requests).unwrap();
        let views: Vec<_> = batch.iter().map(|key| key.unwrap().to_decrypted()).collect();
        drop(batch);
        for ((view, dek), blob) in views.iter().zip(&deks).zip(&blobs) {
            assert_eq!(view.plaintext().expose(), dek);
            let copy = view.plaintext().detach();
            let single = engine.decrypt(&opening(blob)).unwrap();
            assert!(copy == *single.plaintext());
        }
    }
    assert_eq!(HITS.load(SeqCst), 0, "decrypting left keys behind");

    // The store again, from its file; then data keys that are known only once they are made.
    {
        let root = RootKey::from_bytes(&root).unwrap();
        let engine = Engine::open(home.path().join("keys.db"), &root).unwrap();
        let create = CreateKey { alias: Some("alias/new".into()), ..CreateKey::default() };
        engine.create_key(&create).unwrap();
        let requests = [GenerateDataKeyRequest::new("alias/new", 48); 100];
        let batch = engine.advance_generate_data_key_batch(&requests).unwrap();
        register(batch.get(0).unwrap().plaintext().unwrap());
        register(batch.get(99).unwrap().plaintext().unwrap());
        let single = engine.generate_data_key(&requests[0]).unwrap();
        register(single.plaintext().unwrap().expose());
        let kept = batch.get(99).unwrap().to_data_key().detach();
        drop((batch, single));
        let opened = engine.advance_decrypt(&DecryptRequest::new(kept.ciphertext_blob())).unwrap();
        assert!(Some(opened.plaintext()) == kept.plaintext());
    }
    assert_eq!(HITS.load(SeqCst), 0, "generating left keys behind");

    // Texts of the caller's, who keeps them, short and long.
    {
        let root = RootKey::from_bytes(&root).unwrap();
        let engine = Engine::open(home.path().join("keys.db"), &root).unwrap();
        let mut texts: [[u8; 2000]; 2] = [[0; 2000]; 2];
        texts[0][..32].copy_from_slice(&secret::<32>(30));
        texts[1][..32].copy_from_slice(&secret::<32>(31));
        for (text, len) in [(&texts[0], 100), (&texts[1], 2000)] {
            register(text);
            for alias in ["alias/new", "alias/known"] {
                let request = EncryptRequest::new(alias, &text[..len]);
                let made = engine.advance_encrypt(&request).unwrap();
                let opening = DecryptRequest::new(made.ciphertext_blob());
                let opened = engine.advance_decrypt(&opening).unwrap();
                assert_eq!(opened.plaintext().expose(), &text[..len]);
                if alias == "alias/new" {
                    engine.encrypt(&request.iv(&[9; 12])).unwrap();
                }
            }
        }
    }
    assert_eq!(HITS.load(SeqCst), 0, "encrypting left texts behind");

    // The control.
    drop(deks[0].to_vec());
    assert_eq!(HITS.load(SeqCst), 1, "the scanner is blind");
    ARMED.store(false, SeqCst);
}
