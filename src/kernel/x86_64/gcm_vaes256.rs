//! AES-GCM on AVX2 with VAES and VPCLMULQDQ: two messages in a register.

use std::arch::x86_64::*;

use super::{super::Iv, gcm::gcm_kernel, set_up::set_up_kernel};

type V = __m256i;
const LANES: usize = 2;
const OVERLAP: bool = true;

gcm_kernel! {
    "aes,avx2,pclmulqdq,vaes,vpclmulqdq";

    fn zero() -> V { _mm256_setzero_si256() }
    fn xor(a: V, b: V) -> V { _mm256_xor_si256(a, b) }
    fn and(a: V, b: V) -> V { _mm256_and_si256(a, b) }
    fn aesenc(block: V, key: V) -> V { _mm256_aesenc_epi128(block, key) }
    fn aesenclast(block: V, key: V) -> V { _mm256_aesenclast_epi128(block, key) }
    fn clmul<const HALVES: i32>(a: V, b: V) -> V { _mm256_clmulepi64_epi128::<HALVES>(a, b) }
    fn shuffle(block: V, places: V) -> V { _mm256_shuffle_epi8(block, places) }
    fn swap_halves(block: V) -> V { _mm256_shuffle_epi32::<0x4e>(block) }
    fn shift_left_bytes<const N: i32>(block: V) -> V { _mm256_bslli_epi128::<N>(block) }
    fn twice(block: V) -> V { _mm256_add_epi64(block, block) }
    fn top_bits(block: V) -> V { _mm256_srli_epi64::<63>(block) }
    fn spread_sign(block: V) -> V { _mm256_shuffle_epi32::<0xff>(_mm256_srai_epi32::<31>(block)) }
    fn broadcast(block: __m128i) -> V { _mm256_broadcastsi128_si256(block) }
    fn from_lanes(lanes: [__m128i; LANES]) -> V { _mm256_set_m128i(lanes[1], lanes[0]) }
    fn to_lanes(register: V) -> [__m128i; LANES] {
        [_mm256_castsi256_si128(register), _mm256_extracti128_si256::<1>(register)]
    }
    fn load_end(bytes: &[u8]) -> __m128i { load_tail(bytes) }
    fn load_ivs(ivs: &[Iv; LANES]) -> V {
        // The second load begins with four bytes of the first IV, so that neither reads past the end.
        let bytes = ivs.as_flattened();
        let both = from_lanes([load(block_at(bytes, 0)), load(block_at(bytes, 8))]);
        let places = _mm256_setr_epi8(
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, -1, -1, -1, -1, //
            4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1, -1, -1, -1,
        );
        shuffle(both, places)
    }
}

set_up_kernel!("aes,avx2,pclmulqdq,vaes,vpclmulqdq");
