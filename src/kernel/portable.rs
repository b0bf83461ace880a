//! The safe twin of every tier: one message at a time, on the RustCrypto `aes-gcm` and on `rand_chacha`.
//!
//! No unsafe code here. Both crates detect AES-NI, PCLMULQDQ and AVX2 by themselves and are constant-time in keys and
//! plaintexts.

use std::hint::black_box;

use aes_gcm::{
    AeadInOut, Aes128Gcm, Aes256Gcm, AesGcm, KeyInit,
    aead::inout::InOutBuf,
    aes::{
        Aes192, Aes256,
        cipher::{BlockCipherEncrypt, consts::U12},
    },
};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};
use zeroize::{Zeroize, zeroize_stack};

use super::{Iv, Open, Seal, common_len};
use crate::limits::TAG_LEN;

/// AES-GCM for the three key lengths. The ciphers wipe themselves on drop (feature `zeroize`).
pub(super) enum GcmKey {
    Aes128(Aes128Gcm),
    Aes192(AesGcm<Aes192, U12>),
    Aes256(Aes256Gcm),
}

impl GcmKey {
    pub(super) fn new(material: &[u8]) -> Self {
        match material.len() {
            16 => Self::Aes128(Aes128Gcm::new_from_slice(material).expect("16 bytes")),
            24 => Self::Aes192(AesGcm::new_from_slice(material).expect("24 bytes")),
            32 => Self::Aes256(Aes256Gcm::new_from_slice(material).expect("32 bytes")),
            len => panic!("an AES key has 16, 24 or 32 bytes, not {len}"),
        }
    }

    fn seal(&self, iv: &Iv, aad: &[u8], plaintext: &[u8], out: &mut [u8]) {
        let (ciphertext, tag) = out.split_at_mut(plaintext.len());
        let buffer = InOutBuf::new(plaintext, ciphertext).expect("equal lengths");
        let made = match self {
            Self::Aes128(cipher) => cipher.encrypt_inout_detached(iv.into(), aad, buffer),
            Self::Aes192(cipher) => cipher.encrypt_inout_detached(iv.into(), aad, buffer),
            Self::Aes256(cipher) => cipher.encrypt_inout_detached(iv.into(), aad, buffer),
        };
        tag.copy_from_slice(&made.expect("lengths are far below those of SP 800-38D"));
    }

    /// Checks the tag before it decrypts, so a wrong tag leaves `out` as it was.
    fn open(&self, iv: &Iv, aad: &[u8], sealed: &[u8], out: &mut [u8]) -> bool {
        let (ciphertext, tag) = sealed.split_at(out.len());
        let tag: &[u8; TAG_LEN] = tag.try_into().expect("checked by open_many");
        let buffer = InOutBuf::new(ciphertext, out).expect("equal lengths");
        match self {
            Self::Aes128(cipher) => {
                cipher.decrypt_inout_detached(iv.into(), aad, buffer, tag.into())
            }
            Self::Aes192(cipher) => {
                cipher.decrypt_inout_detached(iv.into(), aad, buffer, tag.into())
            }
            Self::Aes256(cipher) => {
                cipher.decrypt_inout_detached(iv.into(), aad, buffer, tag.into())
            }
        }
        .is_ok()
    }
}

pub(super) struct BlockKey(Aes256);

impl BlockKey {
    pub(super) fn new(material: &[u8; 32]) -> Self {
        Self(Aes256::new(material.into()))
    }

    pub(super) fn encrypt_blocks(&self, blocks: &mut [[u8; 16]]) {
        for block in blocks {
            self.0.encrypt_block(block.into());
        }
    }
}

pub(super) fn seal_many(job: Seal<'_>) {
    job.check();
    let Seal { keys, ivs, aads, len, plaintexts, out, stride, offset } = job;
    for (i, (iv, aad)) in ivs.iter().zip(aads).enumerate() {
        let key = keys.of(i).portable();
        let start = i * stride + offset;
        key.seal(iv, aad, &plaintexts[i * len..][..len], &mut out[start..start + len + TAG_LEN]);
    }
}

pub(super) fn open_many(job: Open<'_>) {
    let Open { keys, ivs, aads, sealed, len, out, verdicts } = job;
    assert_eq!(common_len(sealed), len.checked_add(TAG_LEN));
    for (i, (iv, aad)) in ivs.iter().zip(aads).enumerate() {
        let key = keys.of(i).portable();
        let out = &mut out[i * len..][..len];
        verdicts[i] = key.open(iv, aad, sealed[i], out);
        if !verdicts[i] {
            out.zeroize();
        }
    }
}

pub(super) fn chacha_fill(seed: &[u8; 32], stream: u64, block: u64, out: &mut [u8]) {
    fill(seed, stream, block, out);
    // What the compiler spilled of seed and key stream on the way.
    zeroize_stack::<1536>();
}

/// A frame of its own below that of `chacha_fill`, so that the whole of it is overwritten afterwards.
#[inline(never)]
fn fill(seed: &[u8; 32], stream: u64, block: u64, out: &mut [u8]) {
    const WORDS_PER_BLOCK: u128 = 16;
    let mut rng = ChaCha20Rng::from_seed(*seed);
    rng.set_stream(stream);
    rng.set_word_pos(u128::from(block) * WORDS_PER_BLOCK);
    rng.fill_bytes(out);
    // `rand_chacha` 0.10 does not wipe itself: overwrite seed and buffered key stream where they lie.
    rng = ChaCha20Rng::from_seed([0; 32]);
    black_box(&mut rng);
}
