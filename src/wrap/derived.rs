//! `Derived`: the key derivation of XAES-256-GCM (C2SP, "The XAES-256-GCM extended-nonce AEAD").
//!
//! ```text
//! L  = AES-256(K, 0^128)
//! K1 = L << 1, xor 0x87 into the last byte if the top bit of L was set      (once for a key version)
//! Mi = 00 || 0i || 'X' || 00 || salt[12]
//! Kx = AES-256(K, M1 xor K1) || AES-256(K, M2 xor K1)                       (once for a salt)
//! XAES-256-GCM(K, salt || IV, ...) = AES-256-GCM(Kx, IV, ...)
//! ```

use zeroize::{Zeroize, Zeroizing, zeroize_stack};

use crate::{
    cpu::Tier,
    error::Result,
    kernel::{self, BlockKey, BlockPair, GcmKey, GcmKeys, KeyRef, Keys},
    limits::{IV_LEN, SALT_LEN, TAG_LEN},
    os::LockedBox,
};

/// A key version prepared for derivations, in locked pages.
pub(crate) struct XaesKey {
    tier: Tier,
    block: BlockKey,
    k1: LockedBox<[u8; 16]>,
}

impl XaesKey {
    /// # Errors
    /// `Machine` if there is no memory.
    pub(crate) fn new(tier: Tier, material: &[u8; 32]) -> Result<Self> {
        let block = BlockKey::new(tier, material)?;
        let mut k1 = LockedBox::new_with(|| [0; 16])?;
        let mut pair = Zeroizing::new([[[0; 16]; 2]]);
        kernel::encrypt_pairs(&[&block], &mut *pair);
        let l = Zeroizing::new(u128::from_be_bytes(pair[0][0]));
        // The top bit of L selects 0x87 without a branch: L is secret.
        let doubled = Zeroizing::new((*l << 1) ^ ((*l >> 127) * 0x87));
        *k1 = doubled.to_be_bytes();
        zeroize_stack::<{ kernel::STACK_LEN }>();
        Ok(Self { tier, block, k1 })
    }

    /// The AES-256-GCM key of `salt`, set up to be kept.
    ///
    /// # Errors
    /// `Machine` if there is no memory.
    pub(crate) fn derive(&self, salt: &[u8; SALT_LEN]) -> Result<GcmKey> {
        let mut pairs = Zeroizing::default();
        derive_pairs(std::iter::once(Derivation { root: self, salt: *salt }), &mut pairs);
        GcmKey::new(self.tier, &materials(&pairs)[0])
    }

    /// The two blocks whose encryption is the key of `salt`.
    fn masked_pair(&self, salt: &[u8; SALT_LEN]) -> BlockPair {
        let mut pair = [[0; 16]; 2];
        for (half, number) in pair.iter_mut().zip(1..) {
            half[..4].copy_from_slice(&[0, number, b'X', 0]);
            half[4..].copy_from_slice(salt);
            let masked = u128::from_ne_bytes(*half) ^ u128::from_ne_bytes(*self.k1);
            *half = masked.to_ne_bytes();
        }
        pair
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
        let mut derived = DerivedKeys::new();
        derived.derive_many(std::iter::once(Derivation { root: self, salt }));
        kernel::seal_many(kernel::Seal {
            keys: Keys::One(derived.key(0)),
            ivs: &[iv],
            aads: &[aad],
            len: plaintext.len(),
            plaintexts: plaintext,
            out,
            stride: plaintext.len() + TAG_LEN,
            offset: 0,
        });
        zeroize_stack::<{ kernel::STACK_LEN }>();
    }

    /// Opens one message into `out`, zeros if the tag (or the length) is wrong. Returns whether it is right.
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
            let mut derived = DerivedKeys::new();
            derived.derive_many(std::iter::once(Derivation { root: self, salt }));
            kernel::open_many(kernel::Open {
                keys: Keys::One(derived.key(0)),
                ivs: &[iv],
                aads: &[aad],
                sealed: &[sealed],
                len: out.len(),
                out,
                verdicts: &mut verdict,
            });
        } else {
            out.fill(0);
        }
        zeroize_stack::<{ kernel::STACK_LEN }>();
        verdict[0]
    }
}

/// A key to be derived.
#[derive(Clone, Copy)]
pub(crate) struct Derivation<'a> {
    pub(crate) root: &'a XaesKey,
    pub(crate) salt: [u8; SALT_LEN],
}

/// Derived keys of one batch, in memory that serves again for the next ones. Wiped on drop.
pub(crate) struct DerivedKeys {
    keys: GcmKeys,
    /// The raw keys, while they are set up; zeros otherwise.
    pairs: Zeroizing<Vec<BlockPair>>,
}

impl DerivedKeys {
    /// No keys.
    pub(crate) fn new() -> Self {
        Self { keys: GcmKeys::new(), pairs: Zeroizing::default() }
    }

    /// Derives the AES-256-GCM key of each derivation and sets it up, all of them together, in place of those that were
    /// here. The roots are of one tier.
    pub(crate) fn derive_many<'a>(
        &mut self,
        derivations: impl ExactSizeIterator<Item = Derivation<'a>> + Clone,
    ) {
        let Some(first) = derivations.clone().next() else {
            self.keys.clear();
            return;
        };
        derive_pairs(derivations, &mut self.pairs);
        self.keys.set_up_many(first.root.tier, materials(&self.pairs));
        self.pairs.as_flattened_mut().as_flattened_mut().zeroize();
    }

    /// Wipes the keys and keeps their memory.
    pub(crate) fn clear(&mut self) {
        self.keys.clear();
    }

    /// The key of the derivation at `index`.
    pub(crate) fn key(&self, index: usize) -> KeyRef<'_> {
        self.keys.key(index)
    }
}

impl Default for DerivedKeys {
    fn default() -> Self {
        Self::new()
    }
}

/// Keys whose blocks are encrypted together.
const TOGETHER: usize = 64;

/// Puts the key of each derivation into `pairs`. By itself, so that blocks masked with K1 pass through a frame below
/// its caller's, which is overwritten, and not through one that is taken to hold no secret.
#[inline(never)]
fn derive_pairs<'a>(
    derivations: impl ExactSizeIterator<Item = Derivation<'a>> + Clone,
    pairs: &mut Vec<BlockPair>,
) {
    if pairs.capacity() < derivations.len() {
        // Growing would leave behind what is here: zeros, or keys if something panicked.
        pairs.zeroize();
        pairs.reserve_exact(derivations.len());
    }
    pairs.clear();
    pairs.extend(derivations.clone().map(|one| one.root.masked_pair(&one.salt)));
    let mut roots = derivations.map(|one| &one.root.block);
    for pairs in pairs.chunks_mut(TOGETHER) {
        let first = roots.next().expect("a root for each pair");
        let mut keys = [first; TOGETHER];
        let keys = &mut keys[..pairs.len()];
        for (place, key) in keys[1..].iter_mut().zip(&mut roots) {
            *place = key;
        }
        kernel::encrypt_pairs(keys, pairs);
    }
}

fn materials(pairs: &[BlockPair]) -> &[[u8; 32]] {
    pairs.as_flattened().as_flattened().as_chunks().0
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
        XaesKey::new(Tier::PORTABLE, key).unwrap().seal(nonce, aad, plaintext, &mut out);
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
            assert!(XaesKey::new(Tier::PORTABLE, &key).unwrap().open(
                &nonce,
                &aad,
                &sealed,
                &mut opened
            ));
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
