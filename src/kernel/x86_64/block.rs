//! One block, or less: loads, stores, counters and lengths, for the kernels of every tier.
//!
//! Nothing here reads or writes a byte outside of what it was given, and branches depend on lengths alone.

use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_storeu_si128};

/// One block in a register.
#[inline]
pub(super) fn load(block: &[u8; 16]) -> __m128i {
    // SAFETY: `block` is 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(block.as_ptr().cast()) }
}

#[inline]
pub(super) fn store(block: &mut [u8; 16], value: __m128i) {
    // SAFETY: `block` is 16 writable bytes; the store needs no alignment.
    unsafe { _mm_storeu_si128(block.as_mut_ptr().cast(), value) }
}

#[inline]
pub(super) fn from_u128(value: u128) -> __m128i {
    load(&value.to_le_bytes())
}

#[inline]
pub(super) fn to_u128(value: __m128i) -> u128 {
    let mut bytes = [0; 16];
    store(&mut bytes, value);
    u128::from_le_bytes(bytes)
}

/// The 16 bytes of `bytes` from `at` on.
#[inline]
pub(super) fn block_at(bytes: &[u8], at: usize) -> &[u8; 16] {
    bytes[at..].first_chunk().expect("the caller's lengths fit")
}

/// The last block, of sixteen bytes or of what whole blocks leave, followed by zeros. Reads nothing outside of `bytes`,
/// and branches on lengths alone.
#[inline]
pub(super) fn load_tail(bytes: &[u8]) -> __m128i {
    let n = bytes.len() % 16;
    if let Some(last) = bytes.last_chunk() {
        return from_u128(u128::from_le_bytes(*last) >> (8 * (16 - n) % 128));
    }
    let value = match (bytes.first_chunk(), bytes.last_chunk()) {
        // Two halves that overlap: the second goes where its last byte belongs.
        (Some(first), Some(last)) => {
            let (first, last) = (u64::from_le_bytes(*first), u64::from_le_bytes(*last));
            u128::from(first) | u128::from(last) << (8 * (n - 8))
        }
        _ => match (bytes.first_chunk(), bytes.last_chunk()) {
            (Some(first), Some(last)) => {
                let (first, last) = (u32::from_le_bytes(*first), u32::from_le_bytes(*last));
                u128::from(first) | u128::from(last) << (8 * (n - 4))
            }
            _ => bytes.iter().rev().fold(0, |value, byte| value << 8 | u128::from(*byte)),
        },
    };
    from_u128(value)
}

/// The shuffle that takes the last `n` of 16 bytes to the front, with zeros behind, and reverses the whole.
#[inline]
pub(super) fn tail_places(n: usize) -> __m128i {
    const BYTES: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut places = [0x80; 16];
    for (place, byte) in places.iter_mut().rev().zip(&BYTES[16 - n..]) {
        *place = *byte;
    }
    load(&places)
}

/// Writes the first `bytes.len()` bytes of `value`, at most 16.
#[inline]
pub(super) fn store_head(bytes: &mut [u8], value: __m128i) {
    let value = to_u128(value).to_le_bytes();
    bytes.copy_from_slice(&value[..bytes.len()]);
}

/// The block of counter `counter`, for an IV in the other twelve bytes.
#[inline]
pub(super) fn counter_block(counter: usize) -> __m128i {
    let counter = u32::try_from(counter).expect("messages are far below 2^32 blocks");
    from_u128(u128::from(counter.swap_bytes()) << 96)
}

/// The block that ends GHASH, byte-reversed: lengths in bits.
#[inline]
pub(super) fn length_block(aad_len: usize, len: usize) -> __m128i {
    let bits = |len: usize| len as u128 * 8;
    from_u128(bits(aad_len) << 64 | bits(len))
}
