//! A little of everything, for emulators and Miri, which are a hundred to a million times slower than a CPU:
//! `cargo test --lib small_battery`. Every path of a kernel comes up: passes of one, two and four subgroups, each
//! number of columns with a path of its own, tails, ragged AADs, keys of several lengths in one register, and many
//! reductions.
//!
//! Miri runs even less: it finds undefined behaviour, and the emulator wrong results.

use super::{Message, SLACKS, Source, TIGHT, check_both, tiers};
use crate::kernel::{GcmKeys, Keys, Seal, chacha_fill, seal_many};

/// Counts up to a pass of the widest tier and one message more.
const COUNTS: &[usize] =
    if cfg!(miri) { &[1, 3, 9] } else { &[1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33] };
const LENS: &[usize] =
    if cfg!(miri) { &[0, 13, 32] } else { &[0, 1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 129] };

#[test]
fn small_battery_of_messages() {
    let mut source = Source::new(500);
    for (k, &count) in COUNTS.iter().enumerate() {
        for (n, &len) in LENS.iter().enumerate() {
            let aad_len = [16, 0, 32, 20, 64, 113][(n + k) % 6];
            let material = source.bytes([32, 16, 24][(n + k) % 3]);
            let mut one: Vec<Message> =
                (0..count).map(|_| source.message_under(&material, len, aad_len)).collect();
            check_both(&mut one, &mut source, SLACKS[(n + k) % SLACKS.len()]);
            // Ragged AADs, and keys of one length or of all.
            let key_len = |i: usize| if k % 2 == 0 { 32 } else { [32, 16, 24][i % 3] };
            let mut each: Vec<Message> =
                (0..count).map(|i| source.message(key_len(i), len, (n + i) * 5 % 41)).collect();
            check_both(&mut each, &mut source, TIGHT);
        }
    }
}

/// Several strips and reductions.
#[test]
fn small_battery_of_long_messages() {
    let mut source = Source::new(501);
    for count in if cfg!(miri) { &[5][..] } else { &[1, 2, 9, 17] } {
        let mut messages: Vec<Message> =
            (0..*count).map(|i| source.message(32, 300, 100 + i)).collect();
        check_both(&mut messages, &mut source, TIGHT);
    }
}

#[test]
fn small_battery_of_keys() {
    let mut source = Source::new(502);
    for count in if cfg!(miri) { &[5][..] } else { &[1, 2, 3, 4, 5, 15, 16, 17, 21] } {
        let messages: Vec<Message> = (0..*count).map(|_| source.message(32, 32, 16)).collect();
        let materials: Vec<[u8; 32]> =
            messages.iter().map(|m| m.material.as_slice().try_into().expect("32")).collect();
        for &tier in tiers() {
            let mut keys = GcmKeys::new();
            // Twice: the second time in memory that holds keys already.
            keys.set_up_many(tier, &materials[..1]);
            keys.set_up_many(tier, &materials);
            for (i, message) in messages.iter().enumerate() {
                let mut out = [0; 48];
                seal_many(Seal {
                    keys: Keys::One(keys.key(i)),
                    ivs: &[message.iv],
                    aads: &[&message.aad],
                    len: 32,
                    plaintexts: &message.plaintext,
                    out: &mut out,
                    stride: 48,
                    offset: 0,
                });
                assert!(out == *message.sealed, "{tier}: key {i} of {count}");
            }
        }
    }
}

/// Keys for single blocks lie in locked pages, which Miri does not know.
#[cfg(not(miri))]
#[test]
fn small_battery_of_derivations() {
    use super::oracle::encrypt_pair;
    use crate::kernel::{BlockKey, BlockPair, encrypt_pairs};

    let mut source = Source::new(503);
    for count in 1..=18 {
        let materials: Vec<[u8; 32]> =
            (0..count).map(|_| source.bytes(32).try_into().expect("32")).collect();
        let pairs: Vec<BlockPair> = (0..count)
            .map(|_| [0; 2].map(|_: u8| source.bytes(16).try_into().expect("16")))
            .collect();
        for &tier in tiers() {
            let keys: Vec<_> = (materials.iter())
                .map(|material| BlockKey::new(tier, material).expect("memory"))
                .collect();
            let mut done = pairs.clone();
            encrypt_pairs(&keys.iter().collect::<Vec<_>>(), &mut done);
            for ((done, material), pair) in done.iter().zip(&materials).zip(&pairs) {
                assert_eq!(*done, encrypt_pair(material, *pair), "{tier}: {count}");
            }
        }
    }
}

/// Whole groups of blocks, tails, and counters that carry within a group.
#[test]
fn small_battery_of_key_streams() {
    let lens: &[usize] =
        if cfg!(miri) { &[1100] } else { &[0, 1, 63, 64, 65, 256, 1023, 1024, 1025, 2100] };
    for &len in lens {
        for block in [0, u64::from(u32::MAX) - 5, u64::MAX - 3] {
            let mut expected = vec![0; len];
            chacha_fill(tiers()[tiers().len() - 1], &[9; 32], 7, block, &mut expected);
            for &tier in tiers() {
                let mut out = vec![0; len];
                chacha_fill(tier, &[9; 32], 7, block, &mut out);
                assert!(out == expected, "{tier}: {len} bytes from block {block:#x}");
            }
        }
    }
}
