//! What the kernels are compared with, and where the messages come from.
//!
//! AES-GCM of AWS-LC, of a second author; for Miri, which runs no foreign code, GCM as SP 800-38D writes it down, bit
//! by bit, over single AES blocks. Each is checked against the other here, and both against `ring`, so that none stands
//! alone.

use aes_gcm::{
    KeyInit,
    aes::{Aes128, Aes192, Aes256, cipher::BlockCipherEncrypt},
};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{Iv, Message};

/// Repeatable messages.
pub(super) struct Source(ChaCha20Rng);

impl Source {
    pub(super) fn new(seed: usize) -> Self {
        Self(ChaCha20Rng::seed_from_u64(seed as u64))
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill_bytes(&mut bytes);
        bytes
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.0.next_u32()).expect("32 bits") % bound
    }

    /// A message under a key of its own.
    pub(super) fn message(&mut self, key_len: usize, len: usize, aad_len: usize) -> Message {
        let material = self.bytes(key_len);
        self.message_under(&material, len, aad_len)
    }

    pub(super) fn message_under(&mut self, material: &[u8], len: usize, aad_len: usize) -> Message {
        let iv = self.bytes(12).try_into().expect("12 bytes");
        let (aad, plaintext) = (self.bytes(aad_len), self.bytes(len));
        let sealed = seal_by_oracle(material, &iv, &aad, &plaintext);
        Message { material: material.to_vec(), iv, aad, plaintext, sealed, valid: true }
    }
}

/// Ciphertext and tag.
pub(super) fn seal_by_oracle(material: &[u8], iv: &Iv, aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    if cfg!(miri) {
        seal_by_the_book(material, iv, aad, plaintext)
    } else {
        seal_by_aws_lc(material, iv, aad, plaintext)
    }
}

fn seal_by_aws_lc(material: &[u8], iv: &Iv, aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    use aws_lc_rs::aead::{
        AES_128_GCM, AES_192_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey,
    };
    let algorithm = match material.len() {
        16 => &AES_128_GCM,
        24 => &AES_192_GCM,
        _ => &AES_256_GCM,
    };
    let key = LessSafeKey::new(UnboundKey::new(algorithm, material).expect("a key's length"));
    let mut sealed = Vec::with_capacity(plaintext.len() + 16);
    sealed.extend_from_slice(plaintext);
    let iv = Nonce::assume_unique_for_key(*iv);
    key.seal_in_place_append_tag(iv, Aad::from(aad), &mut sealed).expect("short");
    sealed
}

fn seal_by_ring(material: &[u8], iv: &Iv, aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let algorithm = if material.len() == 16 { &AES_128_GCM } else { &AES_256_GCM };
    let key = LessSafeKey::new(UnboundKey::new(algorithm, material).expect("16 or 32 bytes"));
    let mut sealed = plaintext.to_vec();
    let iv = Nonce::assume_unique_for_key(*iv);
    key.seal_in_place_append_tag(iv, Aad::from(aad), &mut sealed).expect("short");
    sealed
}

/// SP 800-38D section 7.1, for a 96-bit IV.
fn seal_by_the_book(material: &[u8], iv: &Iv, aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    let h = u128::from_be_bytes(encrypt_block(material, [0; 16]));
    let counter_block = |number: usize| {
        let mut block = [0; 16];
        block[..12].copy_from_slice(iv);
        block[12..].copy_from_slice(&u32::try_from(number).expect("short").to_be_bytes());
        encrypt_block(material, block)
    };
    let mut sealed = Vec::with_capacity(plaintext.len() + 16);
    for (chunk, number) in plaintext.chunks(16).zip(2..) {
        sealed.extend(chunk.iter().zip(counter_block(number)).map(|(a, b)| a ^ b));
    }
    let mut hash = 0;
    for chunk in aad.chunks(16).chain(sealed.chunks(16)) {
        let mut block = [0; 16];
        block[..chunk.len()].copy_from_slice(chunk);
        hash = multiply(hash ^ u128::from_be_bytes(block), h);
    }
    let lengths = (aad.len() as u128 * 8) << 64 | (plaintext.len() as u128 * 8);
    let tag = multiply(hash ^ lengths, h) ^ u128::from_be_bytes(counter_block(1));
    sealed.extend_from_slice(&tag.to_be_bytes());
    sealed
}

/// SP 800-38D section 6.3, algorithm 1: bit 0 of a block is its first, the most significant one here.
fn multiply(x: u128, y: u128) -> u128 {
    let (mut z, mut v) = (0, y);
    for i in 0..128 {
        if x >> (127 - i) & 1 == 1 {
            z ^= v;
        }
        v = v >> 1 ^ if v & 1 == 1 { 0xe1 << 120 } else { 0 };
    }
    z
}

fn encrypt_block(material: &[u8], mut block: [u8; 16]) -> [u8; 16] {
    let place = (&mut block).into();
    match material.len() {
        16 => Aes128::new_from_slice(material).expect("16 bytes").encrypt_block(place),
        24 => Aes192::new_from_slice(material).expect("24 bytes").encrypt_block(place),
        _ => Aes256::new_from_slice(material).expect("32 bytes").encrypt_block(place),
    }
    block
}

/// Pairs of AES-256 blocks, as `encrypt_pairs` takes them.
pub(super) fn encrypt_pair(material: &[u8], pair: [[u8; 16]; 2]) -> [[u8; 16]; 2] {
    pair.map(|block| encrypt_block(material, block))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_oracles_agree() {
    let mut source = Source::new(100);
    for key_len in [16, 24, 32] {
        for len in (0..70).chain([255, 256, 257, 1024]) {
            for aad_len in [0, 1, 16, 33, 8192] {
                let message = source.message(key_len, len, aad_len);
                let Message { material, iv, aad, plaintext, sealed, .. } = &message;
                assert_eq!(hex(&seal_by_the_book(material, iv, aad, plaintext)), hex(sealed));
                assert_eq!(hex(&seal_by_aws_lc(material, iv, aad, plaintext)), hex(sealed));
                // `ring` has no AES-192.
                if key_len != 24 {
                    assert_eq!(hex(&seal_by_ring(material, iv, aad, plaintext)), hex(sealed));
                }
            }
        }
    }
}
