//! One battery over the kernel interface of this room, run for every tier.
//!
//! What is expected never comes from the kernel under test: it is a published vector, or of `oracle`; and the portable
//! twin must agree, byte for byte. No published vector reaches a kernel that works across messages, so each is replayed
//! in every lane of batches of every remainder, among neighbours with other keys, IVs and AADs.
//!
//! | module | what it covers |
//! |---|---|
//! | `vectors` | NIST CAVP and Wycheproof: every lane, every remainder, `Keys::Each` and `Keys::One` |
//! | `shapes` | lengths, AADs, counts, IVs, key lengths |
//! | `long` | messages of 4 KiB to 3 MiB |
//! | `forgeries` | every flipped bit in every lane, what belongs to another message |
//! | `facts` | lengths that do not fit, key set-up |
//! | `guard` | nothing is touched outside of what was given, by way of unmapped pages |
//! | `chacha` | the key stream |
//! | `ahead` | single messages whose key streams were made ahead |
//! | `small` | a little of all, for emulators and Miri: `cargo test --lib small_battery` |

/// They lie in locked pages, which Miri does not know.
#[cfg(not(miri))]
mod ahead;
mod cavp;
mod chacha;
mod facts;
mod forgeries;
#[cfg(all(unix, not(miri)))]
mod guard;
mod long;
mod oracle;
mod shapes;
mod small;
mod vectors;

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::x86_64;
use super::{GcmKeys, Iv, KeyRef, Keys, ManyInner, Open, Seal, open_many, portable, seal_many};
use crate::{
    cpu::{Level, Tier},
    limits::TAG_LEN,
};
use oracle::{Source, hex};

/// Every tier of this CPU, down from the one that `KEYMILL_TIER` allows: so a lower tier can be run alone. The last is
/// the portable one.
fn tiers() -> &'static [Tier] {
    let best = Tier::detect().expect("KEYMILL_TIER names a tier");
    let available = Tier::available();
    &available[available.iter().position(|tier| *tier == best).expect("the best is available")..]
}

/// Messages of a pass of the widest tier, vaes512: four subgroups of four lanes. Those of narrower tiers divide it.
const GROUP: usize = 16;

/// What output memory holds before a call: a place left unwritten, or written without leave, shows.
const FILLER: u8 = 0xa5;

/// One message, with its sealed form from an oracle (or a forgery of it).
#[derive(Clone)]
struct Message {
    material: Vec<u8>,
    iv: Iv,
    aad: Vec<u8>,
    /// Of no meaning in a forgery.
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

// ---- keys ----

/// The keys of a batch's messages, for one tier. In ordinary memory: locked pages cost a system call for each key, and
/// are nothing that Miri knows.
struct SetUp {
    tier: Tier,
    keys: GcmKeys,
    count: usize,
    /// Whether all messages have one key.
    is_one: bool,
}

impl SetUp {
    fn new(tier: Tier, messages: &[Message]) -> Self {
        let materials = messages.iter().map(|message| message.material.as_slice());
        let is_one = materials.clone().all(|material| material == messages[0].material);
        let keys = GcmKeys(match tier.level() {
            Level::Portable => ManyInner::Portable(materials.map(portable::GcmKey::new).collect()),
            #[cfg(target_arch = "x86_64")]
            Level::Wide(wide) => {
                let contexts = materials.map(|material| x86_64::Context::new(wide, material));
                ManyInner::Wide(contexts.collect())
            }
        });
        Self { tier, keys, count: messages.len(), is_one }
    }

    /// For every tier, the portable twin first.
    fn all(messages: &[Message]) -> Vec<Self> {
        tiers().iter().rev().map(|tier| Self::new(*tier, messages)).collect()
    }

    fn refs(&self) -> Vec<KeyRef<'_>> {
        (0..self.count).map(|i| self.keys.key(i)).collect()
    }

    /// Runs `check` with `Keys::Each` of the first `count` keys, and with `Keys::One` too if all messages have one key.
    fn each_way(&self, count: usize, mut check: impl FnMut(Keys<'_>, &str)) {
        check(Keys::Each(&self.refs()[..count]), &format!("{} Keys::Each", self.tier));
        if self.is_one && self.count > 0 {
            check(Keys::One(self.keys.key(0)), &format!("{} Keys::One", self.tier));
        }
    }
}

// ---- messages ----

/// Messages of one length as the kernels take them.
struct Columns<'m> {
    messages: &'m [Message],
    len: usize,
    ivs: Vec<Iv>,
    aads: Vec<&'m [u8]>,
    plaintexts: Vec<u8>,
    sealed: Vec<&'m [u8]>,
}

impl<'m> Columns<'m> {
    fn of(messages: &'m [Message]) -> Self {
        let len = messages.first().map_or(7, |message| message.plaintext.len());
        Self {
            messages,
            len,
            ivs: messages.iter().map(|message| message.iv).collect(),
            aads: messages.iter().map(|message| message.aad.as_slice()).collect(),
            plaintexts: messages.iter().flat_map(|message| message.plaintext.clone()).collect(),
            sealed: messages.iter().map(|message| message.sealed.as_slice()).collect(),
        }
    }

    fn all(&self) -> Range<usize> {
        0..self.messages.len()
    }

    /// Seals the messages of `window`, which are valid, and compares with their sealed forms. Returns all the output.
    fn check_seal(&self, window: Range<usize>, keys: Keys<'_>, slack: Slack, how: &str) -> Vec<u8> {
        let stride = slack.offset + self.len + TAG_LEN + slack.after;
        let mut out = vec![FILLER; window.len() * stride];
        seal_many(Seal {
            keys,
            ivs: &self.ivs[window.clone()],
            aads: &self.aads[window.clone()],
            len: self.len,
            plaintexts: &self.plaintexts[window.start * self.len..window.end * self.len],
            out: &mut out,
            stride,
            offset: slack.offset,
        });
        let messages = &self.messages[window];
        for (i, (place, message)) in out.chunks_exact(stride).zip(messages).enumerate() {
            let (before, rest) = place.split_at(slack.offset);
            let (sealed, after) = rest.split_at(self.len + TAG_LEN);
            let what = || format!("{how}: message {i} of {}, {slack:?}", describe(messages));
            assert!(sealed == message.sealed, "{}", difference(sealed, &message.sealed, &what()));
            assert!(before.iter().chain(after).all(|b| *b == FILLER), "outside: {}", what());
        }
        out
    }

    /// Opens the messages of `window` and compares verdicts and plaintexts; forgeries must give zeros. Returns all of
    /// the output.
    fn check_open(&self, window: Range<usize>, keys: Keys<'_>, how: &str) -> Vec<u8> {
        let messages = &self.messages[window.clone()];
        let mut out = vec![FILLER; messages.len() * self.len];
        // The opposite of what is right, so that a verdict left unwritten shows.
        let mut verdicts: Vec<bool> = messages.iter().map(|message| !message.valid).collect();
        open_many(Open {
            keys,
            ivs: &self.ivs[window.clone()],
            aads: &self.aads[window.clone()],
            sealed: &self.sealed[window],
            len: self.len,
            out: &mut out,
            verdicts: &mut verdicts,
        });
        for (i, message) in messages.iter().enumerate() {
            let what = || format!("{how}: message {i} of {}", describe(messages));
            assert_eq!(verdicts[i], message.valid, "{}", what());
            let opened = &out[i * self.len..][..self.len];
            if message.valid {
                let expected = &message.plaintext;
                assert!(opened == expected, "{}", difference(opened, expected, &what()));
            } else {
                assert!(opened.iter().all(|byte| *byte == 0), "not zeroed: {}", what());
            }
        }
        out
    }
}

/// Seals `messages`, which are of one length and valid, and compares with their sealed forms, and all the output with
/// that of the portable twin.
fn check_seal_many(set_ups: &[SetUp], messages: &[Message], slack: Slack) {
    let columns = Columns::of(messages);
    let mut twin = None;
    for set_up in set_ups {
        set_up.each_way(messages.len(), |keys, how| {
            let out = columns.check_seal(columns.all(), keys, slack, how);
            assert!(out == *twin.get_or_insert_with(|| out.clone()), "{how}: not as the twin");
        });
    }
}

/// Opens `messages`, which are of one length, and compares likewise.
fn check_open_many(set_ups: &[SetUp], messages: &[Message]) {
    let columns = Columns::of(messages);
    let mut twin = None;
    for set_up in set_ups {
        set_up.each_way(messages.len(), |keys, how| {
            let out = columns.check_open(columns.all(), keys, how);
            assert!(out == *twin.get_or_insert_with(|| out.clone()), "{how}: not as the twin");
        });
    }
}

/// Seals and opens `messages` on every tier, and opens them again with some of them forged.
fn check_both(messages: &mut [Message], source: &mut Source, slack: Slack) {
    let set_ups = SetUp::all(messages);
    check_seal_many(&set_ups, messages, slack);
    check_open_many(&set_ups, messages);
    for message in messages.iter_mut() {
        if source.below(3) == 0 {
            let bit = source.below(message.sealed.len() * 8);
            message.sealed[bit / 8] ^= 1 << (bit % 8);
            message.valid = false;
        }
    }
    check_open_many(&set_ups, messages);
}

fn describe(messages: &[Message]) -> String {
    let first = &messages[0];
    let aads: Vec<_> = messages.iter().map(|message| message.aad.len()).collect();
    let keys: Vec<_> = messages.iter().map(|message| message.material.len()).collect();
    let (count, len) = (messages.len(), first.plaintext.len());
    format!("{count} ({len} bytes, keys of {keys:?}, AADs of {aads:?})")
}

/// What differs, in a line that stays readable for a message of megabytes.
fn difference(got: &[u8], expected: &[u8], what: &str) -> String {
    let at = got.iter().zip(expected).position(|(got, expected)| got != expected).unwrap_or(0);
    let block = |bytes: &[u8]| hex(&bytes[at..bytes.len().min(at + 16)]);
    format!("{what}: from byte {at} on {}, not {}", block(got), block(expected))
}
