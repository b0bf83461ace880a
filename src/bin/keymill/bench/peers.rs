//! The peers: what a careful user writes over `aes-gcm`, `ring` and `aws-lc-rs`.
//!
//! Keys are set up once, results go straight into memory that is there, nothing is allocated. `ring` works in place,
//! and so does the sealing of `aws-lc-rs`: there the data is copied to its place first.

use aes_gcm::{
    AeadInOut, Aes256Gcm, KeyInit,
    aead::inout::InOutBuf,
    aes::{Aes256, cipher::BlockCipherEncrypt},
};
use keymill::limits::{IV_LEN, SALT_LEN, TAG_LEN};

pub(super) type Iv = [u8; IV_LEN];
pub(super) type Salt = [u8; SALT_LEN];

/// AES-256-GCM of another library: one key, one message at a time.
pub(super) trait Aead {
    fn new(key: &[u8; 32]) -> Self;

    /// Writes ciphertext and tag to `out`.
    fn seal(&self, iv: &Iv, aad: &[u8], dek: &[u8], out: &mut [u8]);

    /// Writes the plaintext of ciphertext and tag to `out`. Returns whether the tag is right.
    fn open(&self, iv: &Iv, aad: &[u8], sealed: &[u8], out: &mut [u8]) -> bool;
}

const SHORT: &str = "short messages";

impl Aead for Aes256Gcm {
    fn new(key: &[u8; 32]) -> Self {
        KeyInit::new(key.into())
    }

    fn seal(&self, iv: &Iv, aad: &[u8], dek: &[u8], out: &mut [u8]) {
        let (ciphertext, tag) = out.split_at_mut(dek.len());
        let buffer = InOutBuf::new(dek, ciphertext).expect("equal lengths");
        let made = self.encrypt_inout_detached(iv.into(), aad, buffer).expect(SHORT);
        tag.copy_from_slice(&made);
    }

    fn open(&self, iv: &Iv, aad: &[u8], sealed: &[u8], out: &mut [u8]) -> bool {
        let (ciphertext, tag) = sealed.split_at(out.len());
        let tag: &[u8; TAG_LEN] = tag.try_into().expect("TAG_LEN");
        let buffer = InOutBuf::new(ciphertext, out).expect("equal lengths");
        self.decrypt_inout_detached(iv.into(), aad, buffer, tag.into()).is_ok()
    }
}

pub(super) struct Ring(ring::aead::LessSafeKey);

impl Aead for Ring {
    fn new(key: &[u8; 32]) -> Self {
        let key = ring::aead::UnboundKey::new(&ring::aead::AES_256_GCM, key).expect("32 bytes");
        Self(ring::aead::LessSafeKey::new(key))
    }

    fn seal(&self, iv: &Iv, aad: &[u8], dek: &[u8], out: &mut [u8]) {
        use ring::aead::{Aad, Nonce};
        let (ciphertext, tag) = out.split_at_mut(dek.len());
        ciphertext.copy_from_slice(dek);
        let nonce = Nonce::assume_unique_for_key(*iv);
        let made = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), ciphertext);
        tag.copy_from_slice(made.expect(SHORT).as_ref());
    }

    fn open(&self, iv: &Iv, aad: &[u8], sealed: &[u8], out: &mut [u8]) -> bool {
        use ring::aead::{Aad, Nonce, Tag};
        let (ciphertext, tag) = sealed.split_at(out.len());
        out.copy_from_slice(ciphertext);
        let nonce = Nonce::assume_unique_for_key(*iv);
        let tag = Tag::try_from(tag).expect("TAG_LEN");
        self.0.open_in_place_separate_tag(nonce, Aad::from(aad), tag, out, 0..).is_ok()
    }
}

pub(super) struct AwsLcRs(aws_lc_rs::aead::LessSafeKey);

impl Aead for AwsLcRs {
    fn new(key: &[u8; 32]) -> Self {
        use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
        Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("32 bytes")))
    }

    fn seal(&self, iv: &Iv, aad: &[u8], dek: &[u8], out: &mut [u8]) {
        use aws_lc_rs::aead::{Aad, Nonce};
        let (ciphertext, tag) = out.split_at_mut(dek.len());
        ciphertext.copy_from_slice(dek);
        let nonce = Nonce::assume_unique_for_key(*iv);
        let made = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), ciphertext);
        tag.copy_from_slice(made.expect(SHORT).as_ref());
    }

    fn open(&self, iv: &Iv, aad: &[u8], sealed: &[u8], out: &mut [u8]) -> bool {
        use aws_lc_rs::aead::{Aad, Nonce};
        let (ciphertext, tag) = sealed.split_at(out.len());
        let nonce = Nonce::assume_unique_for_key(*iv);
        self.0.open_separate_gather(nonce, Aad::from(aad), ciphertext, tag, out).is_ok()
    }
}

/// The derivation of XAES-256-GCM over the crate `aes`.
pub(super) struct Xaes {
    cipher: Aes256,
    k1: u128,
}

impl Xaes {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        let cipher = Aes256::new(key.into());
        let mut block = [0; 16];
        cipher.encrypt_block((&mut block).into());
        let l = u128::from_be_bytes(block);
        Self { cipher, k1: (l << 1) ^ ((l >> 127) * 0x87) }
    }

    /// The AES-256-GCM key of `salt`.
    pub(super) fn derive(&self, salt: &Salt) -> [u8; 32] {
        let mut key = [0; 32];
        for (half, number) in key.as_chunks_mut::<16>().0.iter_mut().zip(1..) {
            half[..4].copy_from_slice(&[0, number, b'X', 0]);
            half[4..].copy_from_slice(salt);
            *half = (u128::from_be_bytes(*half) ^ self.k1).to_be_bytes();
            self.cipher.encrypt_block(half.into());
        }
        key
    }
}
