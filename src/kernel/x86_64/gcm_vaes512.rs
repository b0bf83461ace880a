//! AES-GCM on AVX-512 with VAES and VPCLMULQDQ: four messages in a register.

use std::arch::x86_64::*;

use super::{super::Iv, gcm::gcm_kernel, set_up::set_up_kernel};

type V = __m512i;
const LANES: usize = 4;
const OVERLAP: bool = true;

gcm_kernel! {
    "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq";

    fn zero() -> V { _mm512_setzero_si512() }
    fn xor(a: V, b: V) -> V { _mm512_xor_si512(a, b) }
    fn and(a: V, b: V) -> V { _mm512_and_si512(a, b) }
    fn aesenc(block: V, key: V) -> V { _mm512_aesenc_epi128(block, key) }
    fn aesenclast(block: V, key: V) -> V { _mm512_aesenclast_epi128(block, key) }
    fn clmul<const HALVES: i32>(a: V, b: V) -> V { _mm512_clmulepi64_epi128::<HALVES>(a, b) }
    fn shuffle(block: V, places: V) -> V { _mm512_shuffle_epi8(block, places) }
    fn swap_halves(block: V) -> V { _mm512_shuffle_epi32::<0x4e>(block) }
    fn shift_left_bytes<const N: i32>(block: V) -> V { _mm512_bslli_epi128::<N>(block) }
    fn twice(block: V) -> V { _mm512_add_epi64(block, block) }
    fn top_bits(block: V) -> V { _mm512_srli_epi64::<63>(block) }
    fn spread_sign(block: V) -> V { _mm512_shuffle_epi32::<0xff>(_mm512_srai_epi32::<31>(block)) }
    fn broadcast(block: __m128i) -> V { _mm512_broadcast_i32x4(block) }
    fn from_lanes(lanes: [__m128i; LANES]) -> V {
        let low = _mm256_set_m128i(lanes[1], lanes[0]);
        let high = _mm256_set_m128i(lanes[3], lanes[2]);
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
    fn to_lanes(register: V) -> [__m128i; LANES] {
        [
            _mm512_castsi512_si128(register),
            _mm512_extracti32x4_epi32::<1>(register),
            _mm512_extracti32x4_epi32::<2>(register),
            _mm512_extracti32x4_epi32::<3>(register),
        ]
    }
    fn load_end(bytes: &[u8]) -> __m128i {
        let at = bytes.len().saturating_sub(1) / 16 * 16;
        let there = _cvtu32_mask16((1 << (bytes.len() - at)) - 1);
        // SAFETY: `there` selects what `bytes` has from `at` on, 16 bytes at most; the load touches no others.
        unsafe { _mm_maskz_loadu_epi8(there, bytes.as_ptr().add(at).cast()) }
    }
    fn load_ivs(ivs: &[Iv; LANES]) -> V {
        // 48 bytes in three loads; then twelve of them into each lane.
        let bytes = ivs.as_flattened();
        let blocks = [0, 16, 32, 32].map(|at| load(block_at(bytes, at)));
        let places = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
        _mm512_maskz_permutexvar_epi32(0x7777, places, from_lanes(blocks))
    }
}

set_up_kernel!("aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq");
