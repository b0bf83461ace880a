//! What must not open: every flipped bit in every lane, and what belongs to another message. A refused message gives
//! zeros, and its neighbours open undisturbed.

use super::{Columns, GROUP, Message, SetUp, Source, check_open_many};

#[test]
fn every_single_bit_flip_is_refused_in_every_lane() {
    let mut source = Source::new(5);
    // Short cuts for one and for several blocks, what has none, and no ciphertext at all.
    for (key_len, len, aad_len) in [(32, 32, 16), (16, 16, 0), (24, 33, 20), (32, 0, 16)] {
        let material = source.bytes(key_len);
        let good: Vec<_> =
            (0..GROUP + 1).map(|_| source.message_under(&material, len, aad_len)).collect();
        let set_ups = SetUp::all(&good);
        for lane in 0..good.len() {
            let mut batch = good.clone();
            batch[lane].valid = false;
            for bit in 0..8 * (good[lane].sealed.len() + aad_len + 12) {
                flip(&mut batch[lane], bit);
                let columns = Columns::of(&batch);
                for set_up in &set_ups {
                    set_up.each_way(batch.len(), |keys, how| {
                        columns.check_open(columns.all(), keys, how);
                    });
                }
                flip(&mut batch[lane], bit);
            }
        }
    }
}

/// Flips bit `bit` of blob, AAD and IV, one behind the other.
fn flip(message: &mut Message, bit: usize) {
    let parts = message.sealed.iter_mut().chain(&mut message.aad).chain(&mut message.iv);
    *parts.into_iter().nth(bit / 8).expect("counted by the caller") ^= 1 << (bit % 8);
}

/// Every set of refused messages of a register and its neighbour, under keys of their own.
#[test]
fn every_set_of_forgeries() {
    let mut source = Source::new(12);
    let good: Vec<_> = (0..8).map(|_| source.message(32, 32, 16)).collect();
    let set_ups = SetUp::all(&good);
    for set in 0..256 {
        let batch = forge(&good, 0, set);
        check_open_many(&set_ups, &batch);
        check_open_many(&set_ups, &batch[..7]);
    }
}

/// The same under one key and around the places where passes meet: the last one also goes back over messages that were
/// opened, and refused, before.
#[test]
fn every_set_of_forgeries_where_passes_meet() {
    let mut source = Source::new(14);
    let material = source.bytes(32);
    let good: Vec<_> = (0..GROUP + 1).map(|_| source.message_under(&material, 32, 16)).collect();
    let set_ups = SetUp::all(&good);
    for set in 0..256 {
        for (first, count) in [(4, 12), (5, 13), (9, GROUP + 1)] {
            check_open_many(&set_ups, &forge(&good, first, set)[..count]);
        }
    }
}

/// Changes the tags of the messages in `set`, of eight from `first` on.
fn forge(good: &[Message], first: usize, set: usize) -> Vec<Message> {
    let mut batch = good.to_vec();
    for i in (0..8).filter(|i| set >> i & 1 == 1) {
        let message = &mut batch[first + i];
        message.sealed[32 + i] ^= 0x80;
        message.valid = false;
    }
    batch
}

#[test]
fn what_belongs_to_another_message_is_refused() {
    let mut source = Source::new(6);
    let good: Vec<_> = (0..6).map(|_| source.message(32, 32, 16)).collect();
    let swap = |change: fn(&mut Message, &Message)| {
        let mut batch = good.clone();
        for (i, message) in batch.iter_mut().enumerate() {
            change(message, &good[(i + 1) % good.len()]);
            message.valid = false;
        }
        check_open_many(&SetUp::all(&batch), &batch);
    };
    swap(|message, other| message.iv = other.iv);
    swap(|message, other| message.aad.clone_from(&other.aad));
    swap(|message, other| message.material.clone_from(&other.material));
    swap(|message, other| message.sealed.clone_from(&other.sealed));
    swap(|message, other| message.sealed[32..].copy_from_slice(&other.sealed[32..]));
    swap(|message, _| message.sealed[32..].fill(0));
    swap(|message, _| message.aad.push(0));
    swap(|message, _| message.aad.truncate(15));
}
