//! The tiers of x86-64: what they share (key contexts), and the way from a job to the kernel of its tier.
//!
//! Every tier reads the same context, so that what is left after a tier's full registers goes to the next narrower one
//! under the same keys.
//!
//! ```text
//! Context, 384 bytes:  round keys (240) | first, tier (16) | H, H^2, ... H^8 (128)
//! ```
#![expect(unsafe_code, reason = "the one call of each kernel, and the operations of registers")]

mod aads;
mod block;
mod chacha_avx512;
mod gcm;
mod gcm_aesni;
mod gcm_vaes256;
mod gcm_vaes512;
mod job;
mod long;
mod set_up;
mod short;

use std::arch::x86_64::{
    _MM_HINT_T0, _mm_aesenclast_si128, _mm_prefetch, _mm_set1_epi32, _mm_setzero_si128,
};

use zeroize::{Zeroize, zeroize_stack};

use self::{block::to_u128, job::Job};
use super::{
    BlockKey, BlockPair, Iv, KeyRef, Keys, Open, STACK_LEN, Seal,
    ahead::{AHEAD, Stream},
};
use crate::cpu::{Vaes512, Wide};

/// Round keys of AES-256, the most there are.
const ROUND_KEYS: usize = 15;
/// Powers of H that a context holds: blocks that share one reduction.
const POWERS: usize = 8;

/// A key set up for AES-GCM, for every tier of this room.
#[repr(C, align(64))]
pub(super) struct Context {
    schedule: Schedule,
    /// H, H^2, ..., times x, in the order of GHASH's bits.
    powers: [[u8; 16]; POWERS],
}

/// The round keys of one key, at the end of the array: shorter keys begin at a later place, so that keys of all lengths
/// can share a register.
#[repr(C, align(16))]
pub(super) struct Schedule {
    keys: [[u8; 16]; ROUND_KEYS],
    /// Where the round keys begin.
    first: u8,
    wide: Wide,
}

/// A key set up for single blocks.
pub(super) type BlockContext = Schedule;

const _: () = assert!(size_of::<Context>() == 384);

impl Schedule {
    /// Where the round keys of AES-128 begin.
    const FIRST_MAX: usize = 4;

    /// Expands an AES-256 key.
    pub(super) fn new(wide: Wide, material: &[u8; 32]) -> Self {
        let mut schedule = Self::empty(wide);
        schedule.expand(material);
        schedule
    }

    fn empty(wide: Wide) -> Self {
        Self { keys: [[0; 16]; ROUND_KEYS], first: 0, wide }
    }

    pub(super) fn wide(&self) -> Wide {
        self.wide
    }

    /// FIPS 197 section 5.2, word by word, for a key of any length.
    fn expand(&mut self, material: &[u8]) {
        assert!(matches!(material.len(), 16 | 24 | 32), "an AES key has 16, 24 or 32 bytes");
        let words = material.len() / 4;
        let first = 8 - words;
        let schedule = self.keys[first..].as_flattened_mut().as_chunks_mut::<4>().0;
        schedule[..words].copy_from_slice(material.as_chunks().0);
        let mut constant = 1;
        for i in words..schedule.len() {
            let mut word = u32::from_le_bytes(schedule[i - 1]);
            if i % words == 0 {
                word = substitute(self.wide, word.rotate_right(8)) ^ constant;
                // x^8 = x^4 + x^3 + x + 1, needed by AES-128 alone.
                constant = (constant << 1) ^ ((constant >> 7) * 0x11b);
            } else if words > 6 && i % words == 4 {
                word = substitute(self.wide, word);
            }
            word ^= u32::from_le_bytes(schedule[i - words]);
            schedule[i] = word.to_le_bytes();
        }
        self.first = u8::try_from(first).expect("at most 4");
    }
}

impl AsRef<Schedule> for Schedule {
    fn as_ref(&self) -> &Schedule {
        self
    }
}

impl AsRef<Schedule> for Context {
    fn as_ref(&self) -> &Schedule {
        &self.schedule
    }
}

impl Drop for Schedule {
    fn drop(&mut self) {
        self.keys.as_flattened_mut().zeroize();
    }
}

impl Context {
    /// Sets up a key of 16, 24 or 32 bytes.
    pub(super) fn new(wide: Wide, material: &[u8]) -> Self {
        let mut context = Self::empty(wide);
        context.schedule.expand(material);
        // SAFETY: every token of `wide` proves what the tier `aesni` needs.
        unsafe { gcm_aesni::set_up_powers_of(&mut context) };
        context
    }

    fn empty(wide: Wide) -> Self {
        Self { schedule: Schedule::empty(wide), powers: [[0; 16]; POWERS] }
    }

    pub(super) fn wide(&self) -> Wide {
        self.schedule.wide
    }

    /// Asks for the context to be brought into the first cache.
    #[inline]
    fn prefetch(&self) {
        Self::prefetch_at(std::ptr::from_ref(self).addr());
    }

    /// The same for what is known to lie, or to have lain, at an address.
    #[inline]
    pub(super) fn prefetch_at(address: usize) {
        for line in (0..size_of::<Self>()).step_by(64) {
            prefetch_at(address.wrapping_add(line));
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.powers.as_flattened_mut().zeroize();
    }
}

/// Asks for what lies at an address to be brought into the first cache.
#[inline]
pub(super) fn prefetch_at(address: usize) {
    // SAFETY: a hint, which reads nothing and cannot fault, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address)) };
}

/// SubWord: the last round of AES on four equal columns, where ShiftRows changes nothing. Constant in time.
fn substitute(_proof: Wide, word: u32) -> u32 {
    #[target_feature(enable = "aes,pclmulqdq,sse4.1,ssse3")]
    fn by_aes(word: u32) -> u32 {
        let columns = _mm_set1_epi32(word.cast_signed());
        let low = to_u128(_mm_aesenclast_si128(columns, _mm_setzero_si128())) & 0xffff_ffff;
        u32::try_from(low).expect("masked")
    }
    // SAFETY: every token of `Wide` proves what the tier `aesni` needs.
    unsafe { by_aes(word) }
}

pub(super) fn seal_many(wide: Wide, job: Seal<'_>) {
    let keys = job.keys;
    run(wide, keys, &mut Job::seal(job));
}

/// As `seal_many`; overwrites what the kernel left on the stack.
pub(super) fn seal_and_wipe(wide: Wide, job: Seal<'_>) {
    let is_small = job.ivs.len() == 1 && job.len.max(job.aads[0].len()) <= SMALL_LEN;
    let keys = job.keys;
    let mut job = Job::seal(job);
    run(wide, keys, &mut job);
    // From here, below this frame: the job itself holds no secrets.
    if is_small {
        zeroize_stack::<SMALL_STACK_LEN>();
    } else {
        zeroize_stack::<STACK_LEN>();
    }
}

/// Bytes of one message, and of its AAD, for which the kernels need little stack, ...
const SMALL_LEN: usize = 64;
/// ... and how much: the frames of optimised builds add up to 1.7 KiB.
const SMALL_STACK_LEN: usize = if cfg!(debug_assertions) { STACK_LEN } else { 2048 };

/// The streams of `ivs`.
pub(super) fn key_streams(context: &Context, ivs: &[Iv; AHEAD], streams: &mut [Stream; AHEAD]) {
    match context.wide() {
        // SAFETY: the token proves the features of the tier.
        Wide::AesNi(_) => unsafe { gcm_aesni::key_streams(context, ivs, streams) },
        // SAFETY: as above.
        Wide::Vaes256(_) => unsafe { gcm_vaes256::key_streams(context, ivs, streams) },
        // SAFETY: as above.
        Wide::Vaes512(_) => unsafe { gcm_vaes512::key_streams(context, ivs, streams) },
    }
}

/// Seals one message of at most as many bytes as `stream` has for it. `out` is [`TAG_LEN`] bytes longer.
pub(super) fn seal_one(
    context: &Context,
    stream: &Stream,
    aad: &[u8],
    plaintext: &[u8],
    out: &mut [u8],
) {
    // SAFETY: every token of `Wide`, which a context has, proves what the tier `aesni` needs.
    unsafe { gcm_aesni::seal_one(context, stream, aad, plaintext, out) }
}

pub(super) fn open_many(wide: Wide, job: Open<'_>) {
    let keys = job.keys;
    run(wide, keys, &mut Job::open(job));
}

/// Runs the kernel of the tier, or of the next narrower one if there are not enough messages for one register.
fn run(wide: Wide, keys: Keys<'_>, job: &mut Job<'_>) {
    match (narrowed(wide, job.count()), keys) {
        // SAFETY: the token proves the features of the tier.
        (Wide::AesNi(_), Keys::One(key)) => unsafe { gcm_aesni::run_one(key.wide(), job) },
        // SAFETY: as above.
        (Wide::AesNi(_), Keys::Each(keys)) => unsafe { gcm_aesni::run_each(keys, job) },
        // SAFETY: as above.
        (Wide::Vaes256(_), Keys::One(key)) => unsafe { gcm_vaes256::run_one(key.wide(), job) },
        // SAFETY: as above.
        (Wide::Vaes256(_), Keys::Each(keys)) => unsafe { gcm_vaes256::run_each(keys, job) },
        // SAFETY: as above.
        (Wide::Vaes512(_), Keys::One(key)) => unsafe { gcm_vaes512::run_one(key.wide(), job) },
        // SAFETY: as above.
        (Wide::Vaes512(_), Keys::Each(keys)) => unsafe { gcm_vaes512::run_each(keys, job) },
    }
}

/// The widest tier up to `wide` whose register `count` messages fill.
fn narrowed(wide: Wide, count: usize) -> Wide {
    match wide {
        Wide::Vaes512(token) if count < 4 => narrowed(Wide::Vaes256(token.narrower()), count),
        Wide::Vaes256(token) if count < 2 => Wide::AesNi(token.narrower()),
        enough => enough,
    }
}

/// Sets up AES-256 keys in `contexts`, which becomes as long as `materials`.
pub(super) fn set_up_many(wide: Wide, materials: &[[u8; 32]], contexts: &mut Vec<Context>) {
    contexts.truncate(materials.len());
    if contexts.first().is_some_and(|context| context.wide() != wide) {
        contexts.clear();
    }
    if contexts.capacity() < materials.len() {
        // Growing would leave copies behind.
        contexts.clear();
        contexts.reserve_exact(materials.len());
    }
    contexts.resize_with(materials.len(), || Context::empty(wide));
    match narrowed(wide, materials.len()) {
        _ if materials.is_empty() => {}
        // SAFETY: the token proves the features of the tier.
        Wide::AesNi(_) => unsafe { gcm_aesni::set_up(materials, contexts) },
        // SAFETY: as above.
        Wide::Vaes256(_) => unsafe { gcm_vaes256::set_up(materials, contexts) },
        // SAFETY: as above.
        Wide::Vaes512(_) => unsafe { gcm_vaes512::set_up(materials, contexts) },
    }
}

pub(super) fn encrypt_pairs(wide: Wide, keys: &[&BlockKey], pairs: &mut [BlockPair]) {
    match narrowed(wide, pairs.len()) {
        // SAFETY: the token proves the features of the tier.
        Wide::AesNi(_) => unsafe { gcm_aesni::encrypt_pairs(keys, pairs) },
        // SAFETY: as above.
        Wide::Vaes256(_) => unsafe { gcm_vaes256::encrypt_pairs(keys, pairs) },
        // SAFETY: as above.
        Wide::Vaes512(_) => unsafe { gcm_vaes512::encrypt_pairs(keys, pairs) },
    }
}

pub(super) fn chacha_fill(
    _proof: Vaes512,
    seed: &[u8; 32],
    stream: u64,
    block: u64,
    out: &mut [u8],
) {
    // SAFETY: the token proves the features of the tier.
    unsafe { chacha_avx512::fill(seed, stream, block, out) };
}
