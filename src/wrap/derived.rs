//! `Derived`: the key derivation of XAES-256-GCM (C2SP, "The XAES-256-GCM extended-nonce AEAD").
//!
//! ```text
//! L  = AES-256(K, 0^128)
//! K1 = L << 1, xor 0x87 into the last byte if the top bit of L was set      (once for a key version)
//! Mi = 00 || 0i || 'X' || 00 || salt[12]
//! Kx = AES-256(K, M1 xor K1) || AES-256(K, M2 xor K1)                       (once for a salt)
//! XAES-256-GCM(K, salt || IV, ...) = AES-256-GCM(Kx, IV, ...)
//! ```

use zeroize::{Zeroizing, zeroize_stack};

use crate::{
    cpu::Tier,
    kernel::{self, BlockKey, GcmKey, Keys},
    limits::{IV_LEN, SALT_LEN, TAG_LEN},
};

/// A key version prepared for derivations.
pub(crate) struct XaesKey {
    tier: Tier,
    block: BlockKey,
    k1: Zeroizing<[u8; 16]>,
}

impl XaesKey {
    pub(crate) fn new(tier: Tier, material: &[u8; 32]) -> Self {
        let block = BlockKey::new(tier, material);
        let mut l = Zeroizing::new([[0; 16]]);
        block.encrypt_blocks(&mut *l);
        let l = Zeroizing::new(u128::from_be_bytes(l[0]));
        // The top bit of L selects 0x87 without a branch: L is secret.
        let k1 = Zeroizing::new((*l << 1) ^ ((*l >> 127) * 0x87));
        Self { tier, block, k1: Zeroizing::new(k1.to_be_bytes()) }
    }

    /// The tier whose kernels derive and seal.
    pub(crate) fn tier(&self) -> Tier {
        self.tier
    }

    /// The AES-256-GCM key of `salt`, set up.
    pub(crate) fn derive(&self, salt: &[u8; SALT_LEN]) -> GcmKey {
        GcmKey::new(self.tier, &*self.derive_material(salt))
    }

    /// The AES-256-GCM key of `salt`, raw.
    pub(crate) fn derive_material(&self, salt: &[u8; SALT_LEN]) -> Zeroizing<[u8; 32]> {
        let mut halves = Zeroizing::new([[0; 16]; 2]);
        for (half, number) in halves.iter_mut().zip(1..) {
            half[..4].copy_from_slice(&[0, number, b'X', 0]);
            half[4..].copy_from_slice(salt);
            for (byte, mask) in half.iter_mut().zip(self.k1.iter()) {
                *byte ^= mask;
            }
        }
        self.block.encrypt_blocks(&mut *halves);
        Zeroizing::new(halves.as_flattened().try_into().expect("two blocks"))
    }

    /// Seals one message into `out` (ciphertext and tag) under the 24-byte nonce salt ‖ IV. For few messages, such as
    /// the store's records.
    pub(crate) fn seal(
        &self,
        nonce: &[u8; SALT_LEN + IV_LEN],
        aad: &[u8],
        plaintext: &[u8],
        out: &mut [u8],
    ) {
        let (salt, iv) = split(nonce);
        kernel::seal_many(kernel::Seal {
            keys: Keys::One(&self.derive(&salt)),
            ivs: &[iv],
            aads: &[aad],
            len: plaintext.len(),
            plaintexts: plaintext,
            out,
            stride: plaintext.len() + TAG_LEN,
            offset: 0,
        });
        zeroize_stack::<8192>();
    }

    /// Opens one message into `out`, zeros if the tag is wrong. Returns whether it is right.
    pub(crate) fn open(
        &self,
        nonce: &[u8; SALT_LEN + IV_LEN],
        aad: &[u8],
        sealed: &[u8],
        out: &mut [u8],
    ) -> bool {
        let (salt, iv) = split(nonce);
        let mut verdict = [false];
        if sealed.len() == out.len() + TAG_LEN {
            kernel::open_many(kernel::Open {
                keys: Keys::One(&self.derive(&salt)),
                ivs: &[iv],
                aads: &[aad],
                sealed: &[sealed],
                len: out.len(),
                out,
                verdicts: &mut verdict,
            });
        }
        zeroize_stack::<8192>();
        verdict[0]
    }
}

fn split(nonce: &[u8; SALT_LEN + IV_LEN]) -> ([u8; SALT_LEN], [u8; IV_LEN]) {
    let (salt, iv) = nonce.split_at(SALT_LEN);
    (salt.try_into().expect("SALT_LEN"), iv.try_into().expect("IV_LEN"))
}

#[cfg(test)]
mod tests {
    use sha3::{
        Shake128,
        digest::{ExtendableOutput, Update, XofReader},
    };
    use xaes_256_gcm::{Xaes256Gcm, aead::Aead, aead::KeyInit as _, aead::Payload};

    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn seal(key: &[u8; 32], nonce: &[u8; 24], aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
        let mut out = vec![0; plaintext.len() + TAG_LEN];
        XaesKey::new(Tier::Portable, key).seal(nonce, aad, plaintext, &mut out);
        out
    }

    /// The two vectors of the specification: K1 without and with the reduction.
    #[test]
    fn vectors_of_the_specification() {
        let nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX";
        assert_eq!(
            hex(&seal(&[1; 32], nonce, b"", b"XAES-256-GCM")),
            "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"
        );
        assert_eq!(
            hex(&seal(&[3; 32], nonce, b"c2sp.org/XAES-256-GCM", b"XAES-256-GCM")),
            "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"
        );
    }

    /// The accumulated test of the specification, 10,000 rounds, each also checked against an independent crate.
    #[test]
    fn accumulated_test_of_the_specification() {
        let mut inputs = Shake128::default().finalize_xof();
        let mut ciphertexts = Shake128::default();
        for round in 0..10_000 {
            let (mut key, mut nonce, mut len) = ([0; 32], [0; 24], [0; 1]);
            inputs.read(&mut key);
            inputs.read(&mut nonce);
            let mut read = |len: &mut [u8; 1]| {
                inputs.read(len);
                let mut bytes = vec![0; len[0].into()];
                inputs.read(&mut bytes);
                bytes
            };
            let plaintext = read(&mut len);
            let aad = read(&mut len);

            let sealed = seal(&key, &nonce, &aad, &plaintext);
            ciphertexts.update(&sealed);
            let other = Xaes256Gcm::new(&key.into());
            let payload = Payload { msg: &plaintext, aad: &aad };
            assert_eq!(sealed, other.encrypt(&nonce.into(), payload).unwrap(), "round {round}");

            let mut opened = vec![0; plaintext.len()];
            assert!(XaesKey::new(Tier::Portable, &key).open(&nonce, &aad, &sealed, &mut opened));
            assert_eq!(opened, plaintext);
        }
        let mut digest = [0; 32];
        ciphertexts.finalize_xof().read(&mut digest);
        assert_eq!(
            hex(&digest),
            "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"
        );
    }
}
