//! Long messages, whose blocks need many strips and many reductions, and a counter of more than one byte.

use super::{Message, Source, TIGHT, check_both};

/// Counts for each size: one message, a full register and one more.
fn check(len: usize, counts: &[usize]) {
    let mut source = Source::new(300 + len);
    for (k, key_len) in [32, 16, 24].into_iter().enumerate() {
        for &count in counts {
            // One key and AADs alike; a key for each and AADs of other lengths.
            let material = source.bytes(key_len);
            let mut one: Vec<Message> =
                (0..count).map(|_| source.message_under(&material, len, 16 * k)).collect();
            check_both(&mut one, &mut source, TIGHT);
            let mut each: Vec<Message> =
                (0..count).map(|i| source.message(key_len, len, i * 37 % 300)).collect();
            check_both(&mut each, &mut source, TIGHT);
        }
    }
}

/// Around each edge of a strip and of a reduction: multiples of 8 blocks, and of the sum of both with an AAD.
#[test]
fn around_4_kib() {
    for len in [4080, 4095, 4096, 4097, 4112, 4200] {
        check(len, &[1, 2, 5, 17]);
    }
}

#[test]
fn around_64_kib() {
    for len in [(64 << 10) - 1, 64 << 10, (64 << 10) + 1] {
        check(len, &[1, 2, 5]);
    }
}

/// The counter's third byte begins in the midst of a message: block 65,536, with J0 as block 1.
#[test]
fn around_1_mib() {
    for len in [(1 << 20) - 33, (1 << 20) + 1] {
        check(len, &[1, 3]);
    }
}

#[test]
fn three_mib() {
    check(3 << 20, &[1, 2]);
}
