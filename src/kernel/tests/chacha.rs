//! `chacha_fill` of every tier against `rand_chacha`, against the vectors of RFC 8439 section 2.3.2 and appendix A.1,
//! and against ChaCha20 as the RFC writes it down (with the 64-bit counter of the original cipher).

use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    FILLER,
    oracle::{Source, hex},
    tiers,
};
use crate::kernel::chacha_fill;

/// RFC 8439 section 2.3, but counter and stream have 64 bits each.
fn block_by_the_book(seed: &[u8; 32], stream: u64, block: u64) -> [u8; 64] {
    let mut state = [0; 16];
    state[..4].copy_from_slice(&[0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]);
    for (word, bytes) in state[4..12].iter_mut().zip(seed.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
    }
    let low = |wide: u64| u32::try_from(wide & 0xffff_ffff).expect("masked");
    state[12..].copy_from_slice(&[low(block), low(block >> 32), low(stream), low(stream >> 32)]);
    let mut work = state;
    for _ in 0..10 {
        for i in 0..4 {
            quarter_round(&mut work, [i, 4 + i, 8 + i, 12 + i]);
        }
        for i in 0..4 {
            quarter_round(&mut work, [i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4]);
        }
    }
    let mut out = [0; 64];
    for (bytes, (a, b)) in out.chunks_exact_mut(4).zip(work.iter().zip(state)) {
        bytes.copy_from_slice(&a.wrapping_add(b).to_le_bytes());
    }
    out
}

fn quarter_round(x: &mut [u32; 16], [a, b, c, d]: [usize; 4]) {
    for (p, q, r, by) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
        x[p] = x[p].wrapping_add(x[q]);
        x[r] = (x[r] ^ x[p]).rotate_left(by);
    }
}

fn stream_by_the_book(seed: &[u8; 32], stream: u64, block: u64, len: usize) -> Vec<u8> {
    let blocks = (0..).flat_map(|i| block_by_the_book(seed, stream, block.wrapping_add(i)));
    blocks.take(len).collect()
}

fn stream_by_rand_chacha(seed: &[u8; 32], stream: u64, block: u64, len: usize) -> Vec<u8> {
    let mut rng = ChaCha20Rng::from_seed(*seed);
    rng.set_stream(stream);
    rng.set_word_pos(u128::from(block) * 16);
    let mut out = vec![0; len];
    rng.fill_bytes(&mut out);
    out
}

/// Fills `len` bytes in the middle of others with every tier, and compares with both oracles.
fn check_chacha_fill(seed: &[u8; 32], stream: u64, block: u64, len: usize) {
    let expected = stream_by_the_book(seed, stream, block, len);
    let what = format!("stream {stream:#x}, block {block:#x}, {len} bytes");
    assert_eq!(hex(&stream_by_rand_chacha(seed, stream, block, len)), hex(&expected), "{what}");
    for &tier in tiers() {
        // Every alignment comes up, since lengths do.
        let before = len % 67;
        let mut out = vec![FILLER; before + len + 65];
        chacha_fill(tier, seed, stream, block, &mut out[before..before + len]);
        assert_eq!(hex(&out[before..before + len]), hex(&expected), "{tier}: {what}");
        let outside = out[..before].iter().chain(&out[before + len..]);
        assert!(outside.copied().all(|byte| byte == FILLER), "{tier}: outside, {what}");
    }
}

#[test]
fn vectors_of_rfc_8439() {
    let key = |at: usize, byte| {
        let mut key = [0; 32];
        key[at] = byte;
        key
    };
    let counting: [u8; 32] = std::array::from_fn(|i| u8::try_from(i).expect("below 32"));
    // Key, stream (the last two words of the nonce), block (counter, and the first word of the nonce), key stream.
    let vectors = [
        (
            [0; 32],
            0,
            0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7\
             da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        ([0; 32], 0, 1, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"),
        (key(31, 1), 0, 1, "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"),
        (key(1, 0xff), 0, 2, "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"),
        (
            [0; 32],
            0x0200_0000_0000_0000,
            0,
            "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7",
        ),
        // Section 2.3.2: nonce 000000090000004a00000000, counter 1.
        (
            counting,
            0x4a00_0000,
            0x0900_0000_0000_0001,
            "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e",
        ),
    ];
    for (seed, stream, block, expected) in vectors {
        for &tier in tiers() {
            let mut out = vec![0; expected.len() / 2];
            chacha_fill(tier, &seed, stream, block, &mut out);
            assert_eq!(hex(&out), expected, "{tier}");
        }
    }
}

#[test]
fn every_length() {
    let mut source = Source::new(200);
    for len in (0..=300).chain([511, 512, 513, 1023, 1024, 1025, 4096, 32 * 1024 + 7]) {
        let seed = source.bytes(32).try_into().expect("32 bytes");
        check_chacha_fill(&seed, 0, 0, len);
        let stream = u64::from_le_bytes(source.bytes(8).try_into().expect("8 bytes"));
        check_chacha_fill(&seed, stream, u64::try_from(source.below(1 << 20)).expect("20"), len);
    }
}

/// Where a 32-bit block counter wraps, and where the 64-bit one does: at every place of a group of blocks.
#[test]
fn counters_that_carry() {
    let seed = Source::new(201).bytes(32).try_into().expect("32 bytes");
    for edge in [1 << 32, 5 << 32, 1 << 63, 0u64] {
        for before in 0..=33 {
            for len in [64, 300, 35 * 64 + 1] {
                check_chacha_fill(&seed, 3, edge.wrapping_sub(before), len);
            }
        }
    }
    for stream in [1, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        check_chacha_fill(&seed, stream, u64::from(u32::MAX), 300);
    }
}

/// A fill continues where another of the same stream ended: what the layout of a chunk relies on.
#[test]
fn fills_continue_each_other() {
    for &tier in tiers() {
        let mut whole = [0; 20 * 64];
        chacha_fill(tier, &[9; 32], 7, 0, &mut whole);
        for block in 0..20 {
            let mut tail = vec![0; whole.len() - block * 64];
            chacha_fill(tier, &[9; 32], 7, block as u64, &mut tail);
            assert_eq!(hex(&tail), hex(&whole[block * 64..]), "{tier}: {block}");
        }
    }
}
