//! AES-GCM and ChaCha20 over many messages: the one match on the tier.
//!
//! Callers hand over checked slices and keys that were set up before; nothing here can fail, so `seal_many` returns
//! nothing. Lengths that do not fit each other are broken facts of the caller and panic, in release too.
//!
//! Public: message lengths, AAD, counts, which keys are equal. Secret: keys and plaintexts.

pub(crate) mod ahead;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use zeroize::zeroize_stack;

#[cfg(target_arch = "x86_64")]
use crate::cpu::Wide;
use crate::{
    cpu::{Level, Tier},
    error::Result,
    limits::{IV_LEN, TAG_LEN},
    os::LockedBox,
};

/// Bytes of stack that hold what kernels, and the code between them, leave behind. Callers that are done overwrite them
/// (`zeroize_stack`): once a chunk or call, not once a kernel.
pub(crate) const STACK_LEN: usize = 8192;

/// Most bytes of a message. Far above what anybody passes, and far below what the counter (2^32 blocks) and
/// the bound of SP 800-38D allow, so that no kernel meets either in the midst of a message.
const LEN_MAX: usize = 1 << 32;

/// An IV as it stands in a batch's IV column.
pub(crate) type Iv = [u8; IV_LEN];

/// A long-lived key set up for AES-GCM (round keys, H and its powers), in locked pages, bound to the tier that set it
/// up. Wiped on drop.
pub(crate) struct GcmKey(GcmInner);

enum GcmInner {
    Portable(LockedBox<portable::GcmKey>),
    #[cfg(target_arch = "x86_64")]
    Wide(LockedBox<x86_64::Context>),
}

impl GcmKey {
    /// Sets up one key of 16, 24 or 32 bytes.
    ///
    /// # Errors
    /// `Machine` if there is no memory.
    pub(crate) fn new(tier: Tier, material: &[u8]) -> Result<Self> {
        Ok(Self(match tier.level() {
            Level::Portable => {
                GcmInner::Portable(LockedBox::new_with(|| portable::GcmKey::new(material))?)
            }
            #[cfg(target_arch = "x86_64")]
            Level::Wide(wide) => {
                GcmInner::Wide(LockedBox::new_with(|| x86_64::Context::new(wide, material))?)
            }
        }))
    }

    pub(crate) fn key(&self) -> KeyRef<'_> {
        match &self.0 {
            GcmInner::Portable(key) => KeyRef(RefInner::Portable(key)),
            #[cfg(target_arch = "x86_64")]
            GcmInner::Wide(context) => KeyRef(RefInner::Wide(context)),
        }
    }
}

/// Keys that were set up together for one batch, in ordinary memory that serves again for the next ones. Wiped on drop.
pub(crate) struct GcmKeys(ManyInner);

enum ManyInner {
    Portable(Vec<portable::GcmKey>),
    #[cfg(target_arch = "x86_64")]
    Wide(Vec<x86_64::Context>),
}

impl GcmKeys {
    /// No keys.
    pub(crate) fn new() -> Self {
        Self(ManyInner::Portable(Vec::new()))
    }

    /// Sets up AES-256 keys, in order, in place of those that were here.
    pub(crate) fn set_up_many(&mut self, tier: Tier, materials: &[[u8; 32]]) {
        match tier.level() {
            Level::Portable => {
                if !matches!(self.0, ManyInner::Portable(_)) {
                    self.0 = ManyInner::Portable(Vec::new());
                }
                let ManyInner::Portable(keys) = &mut self.0 else { unreachable!("just made") };
                keys.clear();
                if keys.capacity() < materials.len() {
                    keys.reserve_exact(materials.len());
                }
                keys.extend(materials.iter().map(|key| portable::GcmKey::new(key)));
            }
            #[cfg(target_arch = "x86_64")]
            Level::Wide(wide) => {
                if !matches!(self.0, ManyInner::Wide(_)) {
                    self.0 = ManyInner::Wide(Vec::new());
                }
                let ManyInner::Wide(contexts) = &mut self.0 else { unreachable!("just made") };
                x86_64::set_up_many(wide, materials, contexts);
            }
        }
    }

    /// Wipes the keys and keeps their memory.
    pub(crate) fn clear(&mut self) {
        match &mut self.0 {
            ManyInner::Portable(keys) => keys.clear(),
            #[cfg(target_arch = "x86_64")]
            ManyInner::Wide(contexts) => contexts.clear(),
        }
    }

    /// The key of the material at `index`.
    pub(crate) fn key(&self, index: usize) -> KeyRef<'_> {
        match &self.0 {
            ManyInner::Portable(keys) => KeyRef(RefInner::Portable(&keys[index])),
            #[cfg(target_arch = "x86_64")]
            ManyInner::Wide(contexts) => KeyRef(RefInner::Wide(&contexts[index])),
        }
    }
}

/// A key that was set up, wherever it lies.
#[derive(Clone, Copy)]
pub(crate) struct KeyRef<'a>(RefInner<'a>);

#[derive(Clone, Copy)]
enum RefInner<'a> {
    Portable(&'a portable::GcmKey),
    #[cfg(target_arch = "x86_64")]
    Wide(&'a x86_64::Context),
}

impl<'a> KeyRef<'a> {
    fn portable(self) -> &'a portable::GcmKey {
        match self.0 {
            RefInner::Portable(key) => key,
            #[cfg(target_arch = "x86_64")]
            RefInner::Wide(_) => panic!("the keys of one call are of one tier"),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn wide(self) -> &'a x86_64::Context {
        match self.0 {
            RefInner::Wide(context) => context,
            RefInner::Portable(_) => panic!("the keys of one call are of one tier"),
        }
    }
}

impl KeyRef<'_> {
    /// Where the key lies, for [`prefetch_key_at`].
    pub(crate) fn place(self) -> usize {
        match self.0 {
            RefInner::Portable(_) => 0,
            #[cfg(target_arch = "x86_64")]
            RefInner::Wide(context) => std::ptr::from_ref(context).addr(),
        }
    }
}

/// Asks for the key at a place, if there still is one, to be brought into the caches: a hint.
pub(crate) fn prefetch_key_at(place: usize) {
    #[cfg(target_arch = "x86_64")]
    x86_64::Context::prefetch_at(place);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Asks for the first bytes of `value` to be brought into the caches: a hint.
#[inline]
pub(crate) fn prefetch<T>(value: &T) {
    prefetch_at(std::ptr::from_ref(value).addr());
}

/// The same for what lies at an address, if there is anything.
#[inline]
pub(crate) fn prefetch_at(address: usize) {
    #[cfg(target_arch = "x86_64")]
    x86_64::prefetch_at(address);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// A key set up for single AES-256 blocks, which key derivation needs, in locked pages. Wiped on drop.
pub(crate) struct BlockKey(BlockInner);

enum BlockInner {
    Portable(LockedBox<portable::BlockKey>),
    #[cfg(target_arch = "x86_64")]
    Wide(LockedBox<x86_64::BlockContext>),
}

impl BlockKey {
    /// # Errors
    /// `Machine` if there is no memory.
    pub(crate) fn new(tier: Tier, material: &[u8; 32]) -> Result<Self> {
        Ok(Self(match tier.level() {
            Level::Portable => {
                BlockInner::Portable(LockedBox::new_with(|| portable::BlockKey::new(material))?)
            }
            #[cfg(target_arch = "x86_64")]
            Level::Wide(wide) => {
                BlockInner::Wide(LockedBox::new_with(|| x86_64::BlockContext::new(wide, material))?)
            }
        }))
    }
}

/// Two blocks that one key encrypts.
pub(crate) type BlockPair = [[u8; 16]; 2];

/// Encrypts each pair of blocks in place, under the key beside it. The keys are of one tier.
pub(crate) fn encrypt_pairs(keys: &[&BlockKey], pairs: &mut [BlockPair]) {
    assert_eq!(keys.len(), pairs.len());
    match keys.first().map(|key| &key.0) {
        None => {}
        Some(BlockInner::Portable(_)) => {
            for (key, pair) in keys.iter().zip(pairs) {
                key.portable().encrypt_blocks(pair);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Some(BlockInner::Wide(first)) => x86_64::encrypt_pairs(first.wide(), keys, pairs),
    }
}

impl BlockKey {
    fn portable(&self) -> &portable::BlockKey {
        match &self.0 {
            BlockInner::Portable(key) => key,
            #[cfg(target_arch = "x86_64")]
            BlockInner::Wide(_) => panic!("the keys of one call are of one tier"),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn wide(&self) -> &x86_64::BlockContext {
        match &self.0 {
            BlockInner::Wide(context) => context,
            BlockInner::Portable(_) => panic!("the keys of one call are of one tier"),
        }
    }
}

/// The key of each message.
#[derive(Clone, Copy)]
pub(crate) enum Keys<'a> {
    /// One key for all.
    One(KeyRef<'a>),
    /// A key for each message, in order. All of one tier; their lengths may differ.
    Each(&'a [KeyRef<'a>]),
}

impl<'a> Keys<'a> {
    fn of(self, message: usize) -> KeyRef<'a> {
        match self {
            Keys::One(key) => key,
            Keys::Each(keys) => keys[message],
        }
    }

    /// The key of the first of `count` messages, whose tier is that of all.
    fn of_first(self, count: usize) -> Option<KeyRef<'a>> {
        (count > 0).then(|| self.of(0))
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

impl Seal<'_> {
    /// Whether the lengths fit each other. Asked where they are relied on.
    ///
    /// # Panics
    /// If they do not.
    #[inline]
    fn check(&self) {
        let count = self.ivs.len();
        assert_eq!(self.aads.len(), count);
        assert_eq!(Some(self.plaintexts.len()), count.checked_mul(self.len));
        assert_eq!(Some(self.out.len()), count.checked_mul(self.stride));
        let end = self.len.checked_add(TAG_LEN).and_then(|end| end.checked_add(self.offset));
        assert!(end.is_some_and(|end| end <= self.stride));
    }
}

/// Seals every message of `job`. By itself, so that what it leaves on the stack is below its caller's frame, which
/// overwrites it.
#[inline(never)]
pub(crate) fn seal_many(job: Seal<'_>) {
    let count = job.ivs.len();
    assert!(job.keys.fits(count) && job.len <= LEN_MAX);
    match job.keys.of_first(count) {
        None => job.check(),
        Some(KeyRef(RefInner::Portable(_))) => portable::seal_many(job),
        #[cfg(target_arch = "x86_64")]
        Some(KeyRef(RefInner::Wide(first))) => x86_64::seal_many(first.wide(), job),
    }
}

/// Seals one message, or a few, and overwrites the stack that the kernel used. Small messages leave little there, so
/// that single calls need not pay for more.
pub(crate) fn seal_and_wipe(job: Seal<'_>) {
    match job.keys.of_first(job.ivs.len()) {
        #[cfg(target_arch = "x86_64")]
        Some(KeyRef(RefInner::Wide(first))) => x86_64::seal_and_wipe(first.wide(), job),
        _ => {
            seal_many(job);
            zeroize_stack::<STACK_LEN>();
        }
    }
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

/// The length of every slice, if they have one.
fn common_len(slices: &[&[u8]]) -> Option<usize> {
    let first = slices.first()?.len();
    // To the end in any case, which takes less time than a branch for each.
    let differences = slices.iter().fold(0, |sum, slice| sum | (slice.len() ^ first));
    (differences == 0).then_some(first)
}

/// Opens every message of `job`. A wrong tag zeroes that message's output and leaves its neighbours alone. By itself,
/// as [`seal_many`].
#[inline(never)]
pub(crate) fn open_many(job: Open<'_>) {
    let count = job.ivs.len();
    assert!(job.keys.fits(count) && job.aads.len() == count && job.sealed.len() == count);
    assert_eq!(job.verdicts.len(), count);
    assert_eq!(Some(job.out.len()), count.checked_mul(job.len));
    assert!(job.len <= LEN_MAX);
    match job.keys.of_first(count) {
        None => {}
        Some(KeyRef(RefInner::Portable(_))) => portable::open_many(job),
        #[cfg(target_arch = "x86_64")]
        Some(KeyRef(RefInner::Wide(first))) => x86_64::open_many(first.wide(), job),
    }
}

/// Writes the ChaCha20 key stream of `rand_chacha::ChaCha20Rng` (64-bit counter, 64-bit stream id) from the start of
/// 64-byte block `block` of stream `stream`.
pub(crate) fn chacha_fill(tier: Tier, seed: &[u8; 32], stream: u64, block: u64, out: &mut [u8]) {
    match tier.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Wide(Wide::Vaes512(token)) => x86_64::chacha_fill(token, seed, stream, block, out),
        _ => portable::chacha_fill(seed, stream, block, out),
    }
}
