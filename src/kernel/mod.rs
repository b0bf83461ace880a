//! AES-GCM and ChaCha20 over many messages: the one match on the tier.
//!
//! Callers hand over checked slices and keys that were set up before; nothing here can fail, so `seal_many` returns
//! nothing. Lengths that do not fit each other are broken facts of the caller and panic, in release too.
//!
//! Public: message lengths, AAD, counts, which keys are equal. Secret: keys and plaintexts.

mod portable;
#[cfg(test)]
mod tests;

use crate::{
    cpu::Tier,
    limits::{IV_LEN, TAG_LEN},
};

/// An IV as it stands in a batch's IV column.
pub(crate) type Iv = [u8; IV_LEN];

/// A key set up for AES-GCM (round keys, H and its powers), bound to the tier that set it up. Wiped on drop.
pub(crate) struct GcmKey(GcmInner);

enum GcmInner {
    Portable(portable::GcmKey),
}

impl GcmKey {
    /// Sets up one key of 16, 24 or 32 bytes.
    pub(crate) fn new(tier: Tier, material: &[u8]) -> Self {
        match tier {
            Tier::Portable => Self(GcmInner::Portable(portable::GcmKey::new(material))),
        }
    }
}

/// Sets up many keys of one length, `materials.len()` of them, in order.
pub(crate) fn set_up_many(tier: Tier, materials: &[[u8; 32]]) -> Vec<GcmKey> {
    materials.iter().map(|material| GcmKey::new(tier, material)).collect()
}

/// A key set up for single AES-256 blocks, which key derivation needs. Wiped on drop.
pub(crate) struct BlockKey(portable::BlockKey);

impl BlockKey {
    pub(crate) fn new(_tier: Tier, material: &[u8; 32]) -> Self {
        Self(portable::BlockKey::new(material))
    }

    /// Encrypts each block in place.
    pub(crate) fn encrypt_blocks(&self, blocks: &mut [[u8; 16]]) {
        self.0.encrypt_blocks(blocks);
    }
}

/// The key of each message.
#[derive(Clone, Copy)]
pub(crate) enum Keys<'a> {
    /// One key for all.
    One(&'a GcmKey),
    /// A key for each message, in order.
    Each(&'a [&'a GcmKey]),
}

impl<'a> Keys<'a> {
    fn of(self, message: usize) -> &'a GcmKey {
        match self {
            Keys::One(key) => key,
            Keys::Each(keys) => keys[message],
        }
    }

    fn fits(self, count: usize) -> bool {
        match self {
            Keys::One(_) => true,
            Keys::Each(keys) => keys.len() == count,
        }
    }
}

/// Messages of one length to seal. `ivs.len()` is their count.
pub(crate) struct Seal<'a> {
    pub(crate) keys: Keys<'a>,
    pub(crate) ivs: &'a [Iv],
    /// One for each message.
    pub(crate) aads: &'a [&'a [u8]],
    /// Bytes of each message.
    pub(crate) len: usize,
    /// `count * len` bytes.
    pub(crate) plaintexts: &'a [u8],
    /// `count * stride` bytes; message *i* is written as ciphertext and tag at `i * stride + offset`. Bytes outside
    /// those places are left alone.
    pub(crate) out: &'a mut [u8],
    pub(crate) stride: usize,
    pub(crate) offset: usize,
}

/// Seals every message of `job`.
pub(crate) fn seal_many(job: Seal<'_>) {
    let count = job.ivs.len();
    assert!(job.keys.fits(count) && job.aads.len() == count);
    assert_eq!(Some(job.plaintexts.len()), count.checked_mul(job.len));
    assert_eq!(Some(job.out.len()), count.checked_mul(job.stride));
    let end = job.len.checked_add(TAG_LEN).and_then(|end| end.checked_add(job.offset));
    assert!(end.is_some_and(|end| end <= job.stride));
    portable::seal_many(job);
}

/// Messages of one length to open. `ivs.len()` is their count.
pub(crate) struct Open<'a> {
    pub(crate) keys: Keys<'a>,
    pub(crate) ivs: &'a [Iv],
    /// One for each message.
    pub(crate) aads: &'a [&'a [u8]],
    /// Ciphertext and tag of each message, `len + TAG_LEN` bytes.
    pub(crate) sealed: &'a [&'a [u8]],
    /// Bytes of each message.
    pub(crate) len: usize,
    /// `count * len` bytes: the plaintexts, zeros for a message whose tag is wrong.
    pub(crate) out: &'a mut [u8],
    /// One for each message: whether its tag is right.
    pub(crate) verdicts: &'a mut [bool],
}

/// Opens every message of `job`. A wrong tag zeroes that message's output and leaves its neighbours alone.
pub(crate) fn open_many(job: Open<'_>) {
    let count = job.ivs.len();
    assert!(job.keys.fits(count) && job.aads.len() == count && job.sealed.len() == count);
    assert_eq!(job.verdicts.len(), count);
    assert_eq!(Some(job.out.len()), count.checked_mul(job.len));
    let sealed_len = job.len.checked_add(TAG_LEN);
    assert!(job.sealed.iter().all(|sealed| Some(sealed.len()) == sealed_len));
    portable::open_many(job);
}

/// Writes the ChaCha20 key stream of `rand_chacha::ChaCha20Rng` (64-bit counter, 64-bit stream id) from the start of
/// 64-byte block `block` of stream `stream`.
pub(crate) fn chacha_fill(_tier: Tier, seed: &[u8; 32], stream: u64, block: u64, out: &mut [u8]) {
    portable::chacha_fill(seed, stream, block, out);
}
