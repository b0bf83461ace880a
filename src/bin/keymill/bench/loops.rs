//! What one would write in the engine's place: `ring-loop` by a careful user, `idiomatic-loop` as it comes to mind.
//!
//! Keys are set up once and one ChaCha20 generator is reused. The loop over `ring` writes into memory that is there;
//! the idiomatic one, over `aes-gcm`, returns a `Vec` for each field. Neither knows of names, versions or errors of
//! items.

use std::collections::HashSet;

use aes_gcm::Aes256Gcm;
use keymill::limits::{IV_LEN, TAG_LEN};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    peers::{Aead, Iv, Ring},
    sealing::Memory,
};
use crate::failure::{Failure, Result};

pub(super) struct RingLoop {
    keys: Vec<Ring>,
    rng: ChaCha20Rng,
}

impl RingLoop {
    pub(super) fn new(keks: &[[u8; 32]]) -> Result<Self> {
        Ok(Self { keys: keks.iter().map(Ring::new).collect(), rng: seeded()? })
    }

    /// Data keys of `len` bytes under the first key, one for each AAD. Ciphertexts and tags lie one after the other at
    /// the beginning of the blobs.
    pub(super) fn make<A: AsRef<[u8]>>(&mut self, len: usize, aads: &[A], out: &mut Memory) {
        let key = &self.keys[0];
        let deks = out.deks.chunks_exact_mut(len).zip(&mut out.ivs);
        let places = deks.zip(out.blobs.chunks_exact_mut(len + TAG_LEN));
        for (aad, ((dek, iv), sealed)) in aads.iter().zip(places) {
            self.rng.fill_bytes(dek);
            self.rng.fill_bytes(iv);
            key.seal(iv, aad.as_ref(), dek, sealed);
        }
    }

    /// A data key for each of `items`, of any length under any of the keys.
    pub(super) fn make_mixed(&mut self, items: &[Item<'_>], out: &mut Memory) {
        let (mut deks, mut blobs) = (&mut out.deks[..], &mut out.blobs[..]);
        for (item, iv) in items.iter().zip(&mut out.ivs) {
            let dek = deks.split_off_mut(..item.len).expect("as long as all lengths");
            let sealed = blobs.split_off_mut(..item.len + TAG_LEN).expect("as long as all blobs");
            self.rng.fill_bytes(dek);
            self.rng.fill_bytes(iv);
            self.keys[item.kek].seal(iv, item.aad, dek, sealed);
        }
    }

    /// One data key under the first key, and its blob: IV, ciphertext and tag.
    #[inline(never)]
    pub(super) fn make_one(&mut self, len: usize, aad: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut dek, mut blob) = (vec![0; len], vec![0; IV_LEN + len + TAG_LEN]);
        let (iv, sealed) = blob.split_first_chunk_mut().expect("IV_LEN is part of it");
        self.rng.fill_bytes(&mut dek);
        self.rng.fill_bytes(iv);
        self.keys[0].seal(iv, aad, &dek, sealed);
        (dek, blob)
    }

    /// Opens what [`RingLoop::make`] sealed.
    pub(super) fn open<A: AsRef<[u8]>>(&self, aads: &[A], made: &Memory, deks: &mut [[u8; 32]]) {
        let sealed = made.blobs.chunks_exact(32 + TAG_LEN);
        for (((aad, dek), iv), sealed) in aads.iter().zip(deks).zip(&made.ivs).zip(sealed) {
            assert!(self.keys[0].open(iv, aad.as_ref(), sealed, dek), "a blob did not open");
        }
    }
}

/// What is asked for of a loop over many keys.
pub(super) struct Item<'a> {
    pub(super) kek: usize,
    pub(super) len: usize,
    pub(super) aad: &'a [u8],
}

pub(super) struct IdiomaticLoop {
    cipher: Aes256Gcm,
    rng: ChaCha20Rng,
}

/// What the idiomatic loop returns for each item.
pub(super) struct Made {
    pub(super) iv: Vec<u8>,
    pub(super) plaintext: Vec<u8>,
    pub(super) blob: Vec<u8>,
}

impl IdiomaticLoop {
    pub(super) fn new(kek: &[u8; 32]) -> Result<Self> {
        Ok(Self { cipher: Aead::new(kek), rng: seeded()? })
    }

    /// A data key of `len` bytes for each AAD.
    pub(super) fn make<A: AsRef<[u8]>>(&mut self, len: usize, aads: &[A]) -> Vec<Made> {
        aads.iter().map(|aad| self.make_one(len, aad.as_ref())).collect()
    }

    pub(super) fn make_one(&mut self, len: usize, aad: &[u8]) -> Made {
        let mut plaintext = vec![0; len];
        self.rng.fill_bytes(&mut plaintext);
        let mut iv = vec![0; IV_LEN];
        self.rng.fill_bytes(&mut iv);
        // What `encrypt` of the allocating interface does, which this program is built without.
        let mut blob = vec![0; len + TAG_LEN];
        let nonce = iv.as_slice().try_into().expect("IV_LEN");
        self.cipher.seal(nonce, aad, &plaintext, &mut blob);
        Made { iv, plaintext, blob }
    }
}

fn seeded() -> Result<ChaCha20Rng> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| {
        Failure::broke(format!("there are no random bytes: {error}"), "try again")
    })?;
    Ok(ChaCha20Rng::from_seed(seed))
}

/// A result to be checked: what was made of a data key, and the AES-256-GCM key that wrapped it.
pub(super) struct Sealed<'a> {
    pub(super) key: [u8; 32],
    pub(super) iv: Iv,
    pub(super) aad: &'a [u8],
    /// Ciphertext and tag.
    pub(super) sealed: &'a [u8],
    pub(super) dek: &'a [u8],
}

/// Whether everything opens by a library of its own, and neither two data keys nor two IVs of a key are equal.
pub(super) fn all_open<'a>(made: impl Iterator<Item = Sealed<'a>>) -> bool {
    let (mut deks, mut ivs) = (HashSet::new(), HashSet::new());
    made.into_iter().all(|one| {
        let mut out = vec![0; one.dek.len()];
        let cipher: Aes256Gcm = Aead::new(&one.key);
        let opens = cipher.open(&one.iv, one.aad, one.sealed, &mut out);
        opens && out == one.dek && deks.insert(one.dek) && ivs.insert((one.key, one.iv))
    })
}
