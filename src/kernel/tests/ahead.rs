//! Messages sealed with key streams that were made ahead of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Message, Source, tiers};
use crate::{
    cpu::Tier,
    kernel::{
        GcmKey, Iv,
        ahead::{AHEAD, AHEAD_LEN_MAX, KeyStreams},
    },
    limits::TAG_LEN,
};

/// `AHEAD` messages under one key.
pub(super) fn messages(
    source: &mut Source,
    key_len: usize,
    len: usize,
    aad: usize,
) -> Vec<Message> {
    let material = source.bytes(key_len);
    (0..AHEAD).map(|_| source.message_under(&material, len, aad)).collect()
}

/// The key of `messages` on `tier`, and their streams; `None` where the tier has none.
pub(super) fn set_up(tier: Tier, messages: &[Message]) -> Option<(GcmKey, KeyStreams)> {
    let key = GcmKey::new(tier, &messages[0].material).expect("memory");
    key.key().has_streams().then(|| {
        let ivs: Vec<Iv> = messages.iter().map(|message| message.iv).collect();
        let mut streams = KeyStreams::new().expect("memory");
        streams.fill(key.key(), ivs.first_chunk().expect("as many as streams"));
        (key, streams)
    })
}

#[test]
fn every_length_and_aad() {
    let mut source = Source::new(600);
    for len in 0..=AHEAD_LEN_MAX {
        for (k, aad_len) in
            (0..70).chain([79, 80, 81, 95, 96, 97, 111, 112, 113, 300, 1024]).enumerate()
        {
            let messages = messages(&mut source, [32, 16, 24][(len + k) % 3], len, aad_len);
            for &tier in tiers() {
                let Some((key, mut streams)) = set_up(tier, &messages) else { continue };
                for (i, message) in messages.iter().enumerate() {
                    assert!(!streams.is_empty());
                    let mut out = vec![0xa5; len + TAG_LEN];
                    streams.seal(key.key(), &message.aad, &message.plaintext, &mut out);
                    assert!(out == message.sealed, "{tier}: {i}, {len} bytes, AAD {aad_len}");
                }
                assert!(streams.is_empty());
            }
        }
    }
}

/// The tiers with streams are all but the portable one.
#[test]
fn only_the_portable_tier_has_no_streams() {
    for &tier in tiers() {
        let key = GcmKey::new(tier, &[1; 32]).expect("memory");
        assert_eq!(key.key().has_streams(), tier != Tier::PORTABLE, "{tier}");
    }
}

#[test]
fn a_stream_that_is_not_there_and_lengths_that_do_not_fit_panic() {
    for &tier in tiers() {
        let key = GcmKey::new(tier, &[1; 32]).expect("memory");
        let panics = |filled: bool, len: usize, out: usize| {
            let call = AssertUnwindSafe(|| {
                let mut streams = KeyStreams::new().expect("memory");
                if filled {
                    streams.fill(key.key(), &[[2; 12]; AHEAD]);
                }
                streams.seal(key.key(), b"aad", &vec![3; len], &mut vec![0; out]);
            });
            catch_unwind(call).is_err()
        };
        assert_eq!(panics(true, 32, 48), tier == Tier::PORTABLE);
        for (filled, len, out) in [(false, 32, 48), (true, 33, 49), (true, 32, 47), (true, 32, 49)]
        {
            assert!(panics(filled, len, out), "{tier}: {filled} {len} {out}");
        }
    }
}
