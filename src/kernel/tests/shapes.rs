//! Lengths, AADs, counts, IVs and key lengths, over messages of an oracle.
//!
//! Messages whose shape does not matter to a test are taken from a pool, so that each is sealed by the oracle once.

use super::{GROUP, Message, SLACKS, Source, TIGHT, check_both, oracle::seal_by_oracle};
use crate::limits::{AAD_LEN_MAX, NUMBER_OF_BYTES_MAX};

const KEY_LENS: [usize; 3] = [16, 24, 32];

#[test]
fn every_length_of_a_data_key() {
    let mut source = Source::new(0);
    for len in 0..=NUMBER_OF_BYTES_MAX {
        let key_len = KEY_LENS[len % 3];
        let aads = [AADS[len % AADS.len()], 16, AADS[(len * 7 + 3) % AADS.len()]];
        // A key for each and AADs of any lengths, in passes of every size; then one key, and AADs alike.
        let count = 1 + len * 5 % (GROUP + 3);
        let mut each: Vec<_> =
            (0..count).map(|i| source.message(key_len, len, aads[i % 3])).collect();
        check_both(&mut each, &mut source, SLACKS[len % SLACKS.len()]);
        let (count, aad_len) = (1 + (len * 7 + 2) % (GROUP + 3), [16, 0, 20, 32][len / 16 % 4]);
        let mut one = under_one_key(&mut source, KEY_LENS[len / 3 % 3], count, len, aad_len);
        check_both(&mut one, &mut source, SLACKS[len / 5 % SLACKS.len()]);
    }
}

fn under_one_key(
    source: &mut Source,
    key_len: usize,
    count: usize,
    len: usize,
    aad_len: usize,
) -> Vec<Message> {
    let material = source.bytes(key_len);
    (0..count).map(|_| source.message_under(&material, len, aad_len)).collect()
}

/// Around every edge of a 16-byte block and of the groups of blocks that kernels reduce together, up to the most.
const AADS: [usize; 27] = [
    0,
    1,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    63,
    64,
    65,
    111,
    112,
    113,
    127,
    128,
    129,
    255,
    256,
    257,
    511,
    1024,
    4095,
    8191,
    AAD_LEN_MAX,
];

#[test]
fn every_edge_of_the_aad_in_every_lane() {
    let mut source = Source::new(1);
    for (number, &aad_len) in AADS.iter().enumerate() {
        for (k, (len, count)) in [(0, 5), (1, 4), (16, 7), (32, 9), (33, 3)].into_iter().enumerate()
        {
            let key_len = KEY_LENS[(number + k) % 3];
            // All of one length, and each of another.
            let mut alike: Vec<_> =
                (0..count).map(|_| source.message(key_len, len, aad_len)).collect();
            check_both(&mut alike, &mut source, TIGHT);
            let other = |i: usize| AADS[(number + i * 5) % AADS.len()];
            let mut mixed: Vec<_> =
                (0..count).map(|i| source.message(key_len, len, other(i))).collect();
            check_both(&mut mixed, &mut source, SLACKS[number % SLACKS.len()]);
        }
    }
}

/// Alike, and beside an AAD of any other length up to 257: the lane that has most changes with the length.
#[test]
fn every_length_of_the_aad() {
    let mut source = Source::new(10);
    for aad_len in (0..=257).chain([1024, AAD_LEN_MAX]) {
        let (key_len, len) = (KEY_LENS[aad_len % 3], [32, 16, 0, 64, 5, 128][aad_len % 6]);
        let count = 1 + aad_len * 3 % (GROUP + 1);
        let mut alike = under_one_key(&mut source, key_len, count, len, aad_len);
        check_both(&mut alike, &mut source, TIGHT);
        let mut other: Vec<_> = (0..GROUP + 1)
            .map(|i| source.message(key_len, len, (aad_len + i * 83 * (aad_len % 4)) % 258))
            .collect();
        check_both(&mut other, &mut source, TIGHT);
    }
}

/// What the kernels have short cuts for, and its neighbours on each side: whole blocks, few enough of them.
#[test]
fn every_short_shape_at_every_count() {
    let mut source = Source::new(11);
    for len in [0, 15, 16, 17, 32, 48, 64, 80] {
        for aad_len in [0, 16, 32, 48, 64, 80, 96, 112, 113] {
            for key_len in [16, 32] {
                let pool = under_one_key(&mut source, key_len, 2 * GROUP + 1, len, aad_len);
                for count in 1..=2 * GROUP + 1 {
                    check_both(&mut pool[..count].to_vec(), &mut source, TIGHT);
                }
            }
        }
    }
}

/// Short messages whose AADs take many reductions, in passes that overlap.
#[test]
fn short_messages_with_long_aads() {
    let mut source = Source::new(13);
    for (len, aad_len) in [(16, 300), (32, AAD_LEN_MAX), (32, 129), (64, 1024), (64, 1000)] {
        let pool = under_one_key(&mut source, 32, 2 * GROUP + 1, len, aad_len);
        for count in [1, 2, 4, 5, 7, 8, 9, 12, 13, 16, 17, 2 * GROUP + 1] {
            check_both(&mut pool[..count].to_vec(), &mut source, TIGHT);
        }
    }
}

/// One key for AADs of unequal lengths, sorted as in a batch and not: those that share the messages' reduction, and
/// those that have too many blocks for it, beside others that have none.
#[test]
fn short_messages_of_one_key_with_unlike_aads() {
    let mut source = Source::new(14);
    let material = source.bytes(32);
    for len in [16, 32, 64, 48, 33] {
        for aad_len_max in [15, 16, 40, 64, 130, 700] {
            let aads: Vec<_> = (0..2 * GROUP + 1).map(|_| source.below(aad_len_max + 1)).collect();
            let mut pool: Vec<_> =
                aads.iter().map(|aad| source.message_under(&material, len, *aad)).collect();
            for count in [1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 2 * GROUP + 1] {
                check_both(&mut pool[..count].to_vec(), &mut source, SLACKS[count % SLACKS.len()]);
            }
            pool.sort_by_key(|message| message.aad.len().div_ceil(16));
            check_both(&mut pool, &mut source, TIGHT);
        }
    }
}

#[test]
fn every_count_up_to_four_groups_and_one() {
    let mut source = Source::new(2);
    const COUNT_MAX: usize = 4 * GROUP + 1;
    for (k, len) in [16, 32, 60].into_iter().enumerate() {
        for key_len in KEY_LENS {
            let each: Vec<_> =
                (0..257).map(|i| source.message(key_len, len, (i + k) % 40)).collect();
            let one = under_one_key(&mut source, key_len, 257, len, 16);
            for count in (0..=COUNT_MAX).chain([127, 128, 129, 255, 256, 257]) {
                let slack = SLACKS[count % SLACKS.len()];
                // The pool's ends, so that neighbours change with the count.
                check_both(&mut each[257 - count..].to_vec(), &mut source, slack);
                check_both(&mut one[257 - count..].to_vec(), &mut source, slack);
            }
        }
    }
}

/// The interface allows keys of different lengths side by side: every set of lengths in four neighbouring lanes, in
/// every order, each set at every place of a pass; and lanes of which one alone is of another length.
#[test]
fn keys_of_all_lengths_in_one_batch() {
    let mut source = Source::new(3);
    let pool: Vec<Vec<_>> = KEY_LENS
        .iter()
        .map(|key_len| (0..GROUP).map(|i| source.message(*key_len, 32, 16 * (i / 8))).collect())
        .collect();
    for order in 0..81 {
        let lens = [order, order / 3, order / 9, order / 27].map(|digit| digit % 3);
        for before in 0..4 {
            for count in [before + 4, GROUP, GROUP + 1 + before] {
                let kind = |i: usize| if i < before { 2 } else { lens[(i - before) % 4] };
                let mut messages: Vec<_> =
                    (0..count).map(|i| pool[kind(i)][i % GROUP].clone()).collect();
                check_both(&mut messages, &mut source, TIGHT);
            }
        }
    }
    for odd in 0..GROUP {
        for (most, other) in [(0, 1), (1, 0), (2, 0), (0, 2), (1, 2), (2, 1)] {
            let kind = |i| if i == odd { other } else { most };
            let mut messages: Vec<_> = (0..GROUP).map(|i| pool[kind(i)][i].clone()).collect();
            check_both(&mut messages, &mut source, TIGHT);
        }
    }
    // Other lengths than that of the short cut.
    for count in 0..=20 {
        for len in [0, 1, 16, 33, 200] {
            let mut messages: Vec<_> = (0..count)
                .map(|i| source.message(KEY_LENS[i * 2 % 3], len, [16, 0, 33][i % 3]))
                .collect();
            check_both(&mut messages, &mut source, TIGHT);
        }
    }
}

/// IVs as `wrap::iv_plus` counts them on: through every carry, 2^32 and 2^64 among them, and past 2^96. The block
/// counter of GCM is another 32-bit word and must not feel it.
#[test]
fn ivs_that_carry() {
    let mut source = Source::new(4);
    for key_len in KEY_LENS {
        let material = source.bytes(key_len);
        for len in [32, 100] {
            for ones in 0..=12 {
                let mut first = [0; 16];
                first[4..].copy_from_slice(&source.bytes(12));
                first[16 - ones..].fill(0xff);
                let first = u128::from_be_bytes(first).wrapping_sub(8);
                let mut messages: Vec<_> = (0..GROUP as u128 + 1)
                    .map(|i| {
                        let iv = first.wrapping_add(i).to_be_bytes()[4..].try_into().expect("12");
                        let mut message = source.message_under(&material, len, 16);
                        message.sealed =
                            seal_by_oracle(&material, &iv, &message.aad, &message.plaintext);
                        Message { iv, ..message }
                    })
                    .collect();
                check_both(&mut messages, &mut source, TIGHT);
            }
        }
    }
}
