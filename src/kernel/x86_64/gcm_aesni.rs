//! AES-GCM on AES-NI and PCLMULQDQ: one message in a register, several registers in flight.

use std::arch::x86_64::*;

use super::{super::Iv, gcm::gcm_kernel, set_up::set_up_kernel};

type V = __m128i;
const LANES: usize = 1;
/// Sixteen registers do not hold one pass while the next one has its AES rounds; for `vaes256`, which has no more, it
/// pays nonetheless, since its hash takes as long for two messages as for one.
const OVERLAP: bool = false;

gcm_kernel! {
    "aes,pclmulqdq,sse4.1,ssse3";

    fn zero() -> V { _mm_setzero_si128() }
    fn xor(a: V, b: V) -> V { _mm_xor_si128(a, b) }
    fn and(a: V, b: V) -> V { _mm_and_si128(a, b) }
    fn aesenc(block: V, key: V) -> V { _mm_aesenc_si128(block, key) }
    fn aesenclast(block: V, key: V) -> V { _mm_aesenclast_si128(block, key) }
    fn clmul<const HALVES: i32>(a: V, b: V) -> V { _mm_clmulepi64_si128::<HALVES>(a, b) }
    fn shuffle(block: V, places: V) -> V { _mm_shuffle_epi8(block, places) }
    fn swap_halves(block: V) -> V { _mm_shuffle_epi32::<0x4e>(block) }
    fn shift_left_bytes<const N: i32>(block: V) -> V { _mm_bslli_si128::<N>(block) }
    fn twice(block: V) -> V { _mm_add_epi64(block, block) }
    fn top_bits(block: V) -> V { _mm_srli_epi64::<63>(block) }
    fn spread_sign(block: V) -> V { _mm_shuffle_epi32::<0xff>(_mm_srai_epi32::<31>(block)) }
    fn broadcast(block: __m128i) -> V { block }
    fn from_lanes(lanes: [__m128i; LANES]) -> V { lanes[0] }
    fn to_lanes(register: V) -> [__m128i; LANES] { [register] }
    fn load_end(bytes: &[u8]) -> __m128i { load_tail(bytes) }
    fn load_ivs(ivs: &[Iv; LANES]) -> V {
        let mut bytes = [0; 16];
        bytes[..12].copy_from_slice(&ivs[0]);
        load(&bytes)
    }
}

set_up_kernel!("aes,pclmulqdq,sse4.1,ssse3");

/// H and its powers, for a context that has its round keys already.
#[target_feature(enable = "aes,pclmulqdq,sse4.1,ssse3")]
pub(super) fn set_up_powers_of(context: &mut Context) {
    let mut block = [[zero(); 1]; 1];
    encrypt::<0, _, _, _, _, _>(&[[&context.schedule]], &mut block);
    set_up_powers(block[0][0], std::array::from_mut(context));
}

/// Seals one message whose key stream is there. As many bytes as the stream has at most, and a tag behind them.
#[target_feature(enable = "aes,pclmulqdq,sse4.1,ssse3")]
pub(super) fn seal_one(
    key: &Context,
    stream: &Stream,
    aad: &[u8],
    plaintext: &[u8],
    out: &mut [u8],
) {
    let (ciphertext, tag) = out.split_at_mut(plaintext.len());
    let [mask, stream @ ..] = stream;
    let blocks = aad.len().div_ceil(16) + plaintext.len().div_ceil(16) + 1;
    let mut hash = Hash::new(zero(), blocks);
    let (whole, rest) = aad.as_chunks::<16>();
    for block in whole {
        absorb(&[key], &mut hash, reverse_bytes(load(block)));
    }
    if !rest.is_empty() {
        absorb(&[key], &mut hash, reverse_bytes(load_tail(aad)));
    }
    let (inputs, rest) = plaintext.as_chunks::<16>();
    let (outputs, rest_out) = ciphertext.as_chunks_mut::<16>();
    for ((input, output), stream) in inputs.iter().zip(outputs).zip(stream) {
        let block = xor(load(input), load(stream));
        store(output, block);
        absorb(&[key], &mut hash, reverse_bytes(block));
    }
    if !rest.is_empty() {
        store_head(rest_out, xor(load_tail(rest), load(&stream[inputs.len()])));
        absorb(&[key], &mut hash, reverse_bytes(load_tail(rest_out)));
    }
    absorb(&[key], &mut hash, length_block(aad.len(), plaintext.len()));
    let tag: &mut [u8; 16] = tag.try_into().expect("TAG_LEN");
    store(tag, xor(reverse_bytes(total(&hash)), load(mask)));
}
