//! What the kernels are compared with: AES-GCM and AES of AWS-LC, one message at a time.

use aws_lc_rs::{
    aead::{AES_128_GCM, AES_192_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    cipher::{AES_256, EncryptingKey, UnboundCipherKey},
};

/// A key of 16, 24 or 32 bytes.
pub struct OracleKey(LessSafeKey);

impl OracleKey {
    pub fn new(material: &[u8]) -> Self {
        let algorithm = match material.len() {
            16 => &AES_128_GCM,
            24 => &AES_192_GCM,
            32 => &AES_256_GCM,
            len => panic!("an AES key has 16, 24 or 32 bytes, not {len}"),
        };
        Self(LessSafeKey::new(UnboundKey::new(algorithm, material).expect("checked")))
    }

    /// Ciphertext and tag.
    pub fn seal(&self, iv: [u8; 12], aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::with_capacity(plaintext.len() + 16);
        sealed.extend_from_slice(plaintext);
        let (iv, aad) = (Nonce::assume_unique_for_key(iv), Aad::from(aad));
        self.0.seal_in_place_append_tag(iv, aad, &mut sealed).expect("lengths are small");
        sealed
    }
}

/// The keys that XAES-256-GCM derives of `root`, one for each salt (C2SP, "The XAES-256-GCM extended-nonce AEAD").
pub fn derive(root: &[u8; 32], salts: &[[u8; 12]]) -> Vec<[u8; 32]> {
    let key = UnboundCipherKey::new(&AES_256, root).expect("32 bytes");
    let key = EncryptingKey::ecb(key).expect("AES-256 has ECB");
    let encrypt = |block: u128| {
        let mut bytes = block.to_be_bytes();
        key.encrypt(&mut bytes).expect("one block");
        bytes
    };
    let l = u128::from_be_bytes(encrypt(0));
    let k1 = (l << 1) ^ if l >> 127 == 1 { 0x87 } else { 0 };
    let derive_one = |salt: &[u8; 12]| {
        let half = |number: u8| {
            let mut block = [0; 16];
            block[..4].copy_from_slice(&[0, number, b'X', 0]);
            block[4..].copy_from_slice(salt);
            encrypt(u128::from_be_bytes(block) ^ k1)
        };
        [half(1), half(2)].concat().try_into().expect("two blocks")
    };
    salts.iter().map(derive_one).collect()
}
