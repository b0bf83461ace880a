//! ChaCha20 on AVX-512: sixteen blocks at once.
//!
//! The key stream is that of `rand_chacha::ChaCha20Rng`, byte for byte: 64-bit block counter, 64-bit stream id
//! (D. J. Bernstein, "ChaCha, a variant of Salsa20", 2008).
//!
//! ```text
//!              element 0   element 1  ...  element 15        one register
//! state[0]     word 0      word 0          word 0            of blocks n, n + 1, ... n + 15
//! ...
//! state[15]    word 15     word 15         word 15
//! ```
//! Every register holds one word of sixteen blocks, so that the rounds need no shuffles; a transposition at the end
//! brings each block together.
#![expect(unsafe_code, reason = "stores of whole registers")]

use std::arch::x86_64::*;

use zeroize::Zeroize;

type V = __m512i;

/// Bytes of sixteen blocks.
const GROUP_LEN: usize = 1024;
const BLOCK_LEN: usize = 64;

/// Fills `out` from the start of block `block` on.
#[target_feature(enable = "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq")]
pub(super) fn fill(seed: &[u8; 32], stream: u64, mut block: u64, out: &mut [u8]) {
    let (groups, rest) = out.as_chunks_mut::<GROUP_LEN>();
    for group in groups {
        fill_group(seed, stream, block, group);
        block = block.wrapping_add(16);
    }
    if !rest.is_empty() {
        let mut group = [0; GROUP_LEN];
        fill_group(seed, stream, block, &mut group);
        rest.copy_from_slice(&group[..rest.len()]);
        group.zeroize();
    }
}

#[target_feature(enable = "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq")]
fn fill_group(seed: &[u8; 32], stream: u64, block: u64, out: &mut [u8; GROUP_LEN]) {
    let start = start(seed, stream, block);
    let mut x = start;
    for _ in 0..10 {
        for i in 0..4 {
            quarter_round(&mut x, i, 4 + i, 8 + i, 12 + i);
        }
        for i in 0..4 {
            quarter_round(&mut x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4);
        }
    }
    for (word, start) in x.iter_mut().zip(start) {
        *word = _mm512_add_epi32(*word, start);
    }
    for (block, place) in transposed(x).into_iter().zip(out.as_chunks_mut::<BLOCK_LEN>().0) {
        // SAFETY: `place` is 64 writable bytes; the store needs no alignment.
        unsafe { _mm512_storeu_si512(place.as_mut_ptr().cast(), block) };
    }
}

/// The sixteen words of blocks `block`, `block + 1`, ... before the rounds.
#[target_feature(enable = "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq")]
#[inline]
fn start(seed: &[u8; 32], stream: u64, block: u64) -> [V; 16] {
    let mut start = [_mm512_setzero_si512(); 16];
    for (word, constant) in start.iter_mut().zip(b"expand 32-byte k".as_chunks().0) {
        *word = _mm512_set1_epi32(i32::from_le_bytes(*constant));
    }
    for (word, bytes) in start[4..12].iter_mut().zip(seed.as_chunks().0) {
        *word = _mm512_set1_epi32(i32::from_le_bytes(*bytes));
    }
    // The counters as 64-bit numbers, whose carry goes from word 12 into word 13.
    let first = _mm512_set1_epi64(block.cast_signed());
    let low = _mm512_add_epi64(first, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    let high = _mm512_add_epi64(first, _mm512_setr_epi64(8, 9, 10, 11, 12, 13, 14, 15));
    start[12] = narrowed(low, high);
    start[13] = narrowed(_mm512_srli_epi64::<32>(low), _mm512_srli_epi64::<32>(high));
    for (word, bytes) in start[14..].iter_mut().zip(stream.to_le_bytes().as_chunks().0) {
        *word = _mm512_set1_epi32(i32::from_le_bytes(*bytes));
    }
    start
}

/// The low words of sixteen 64-bit numbers.
#[target_feature(enable = "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq")]
#[inline]
fn narrowed(first: V, second: V) -> V {
    let (first, second) = (_mm512_cvtepi64_epi32(first), _mm512_cvtepi64_epi32(second));
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second)
}

#[target_feature(enable = "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq")]
#[inline]
fn quarter_round(x: &mut [V; 16], a: usize, b: usize, c: usize, d: usize) {
    x[a] = _mm512_add_epi32(x[a], x[b]);
    x[d] = _mm512_rol_epi32::<16>(_mm512_xor_si512(x[d], x[a]));
    x[c] = _mm512_add_epi32(x[c], x[d]);
    x[b] = _mm512_rol_epi32::<12>(_mm512_xor_si512(x[b], x[c]));
    x[a] = _mm512_add_epi32(x[a], x[b]);
    x[d] = _mm512_rol_epi32::<8>(_mm512_xor_si512(x[d], x[a]));
    x[c] = _mm512_add_epi32(x[c], x[d]);
    x[b] = _mm512_rol_epi32::<7>(_mm512_xor_si512(x[b], x[c]));
}

/// Element *j* of register *i* becomes element *i* of register *j*.
#[target_feature(enable = "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq")]
#[inline]
fn transposed(x: [V; 16]) -> [V; 16] {
    // Within each 128-bit lane: four by four words.
    let mut t = x;
    for i in (0..16).step_by(4) {
        let ab_low = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        let ab_high = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        let cd_low = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
        let cd_high = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        t[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
        t[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        t[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        t[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    // Then the lanes: t[4 * r + k] has, in lane q, words 4 * r .. 4 * r + 4 of block 4 * q + k.
    let mut out = x;
    for k in 0..4 {
        let (a, b, c, d) = (t[k], t[4 + k], t[8 + k], t[12 + k]);
        let ab_low = _mm512_shuffle_i32x4::<0x88>(a, b);
        let ab_high = _mm512_shuffle_i32x4::<0xdd>(a, b);
        let cd_low = _mm512_shuffle_i32x4::<0x88>(c, d);
        let cd_high = _mm512_shuffle_i32x4::<0xdd>(c, d);
        out[k] = _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low);
        out[4 + k] = _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high);
        out[8 + k] = _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low);
        out[12 + k] = _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high);
    }
    out
}
