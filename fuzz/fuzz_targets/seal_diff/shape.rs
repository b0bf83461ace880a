//! The shape of a batch, which is what libFuzzer mutates: some forty bytes that choose lengths, keys, places and
//! forgeries. Everything else follows from the shape's seed (`batch.rs`), so inputs stay small.
//!
//! Numbers are drawn mostly from those at which a kernel over lanes and blocks changes its path. An input that ends
//! early is read as if zeros followed, so what zero stands for is common: one forged message, equal AADs, tight places.

use arbitrary::{Arbitrary, Result, Unstructured};

/// One batch.
#[derive(Debug)]
pub struct Shape {
    /// Messages.
    pub count: usize,
    /// Bytes of each message.
    pub len: usize,
    pub aads: AadLens,
    pub origin: Origin,
    pub owners: Owners,
    pub ivs: Ivs,
    pub forged: Forged,
    /// Bytes before each message's place in the output of `seal_many`, and after it.
    pub offset: usize,
    pub after: usize,
    /// Bytes between an aligned address and each buffer.
    pub lead: usize,
    pub seed: u64,
}

/// Lengths of the AADs.
#[derive(Debug)]
pub enum AadLens {
    /// The same for all.
    Equal(usize),
    /// The first for all messages but one.
    OneOff(usize, usize),
    /// One or the other.
    EitherOf(usize, usize),
    UpTo(usize),
}

/// Where keys come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Drawn, all of so many bytes.
    Drawn(usize),
    /// Drawn, of 16, 24 and 32 bytes.
    Mixed,
    /// Derived together of one root key.
    Derived,
}

/// Who has which key.
#[derive(Clone, Copy, Debug)]
pub enum Owners {
    /// One key for all, of so many that are set up.
    One(usize),
    /// Each message has a key of its own.
    Each,
    /// Messages share so many keys.
    Shared(usize),
}

#[derive(Clone, Copy, Debug)]
pub enum Ivs {
    Drawn,
    /// All bits set, for every message.
    Ones,
    /// A big-endian counter that starts `before` below the carry out of its last `bytes` bytes.
    Counter {
        bytes: u8,
        before: u8,
    },
}

/// Messages that are changed before they are opened.
#[derive(Clone, Copy, Debug)]
pub enum Forged {
    Nobody,
    One,
    /// About one of so many.
    OneOf(usize),
    Everybody,
}

impl Arbitrary<'_> for Shape {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        let mut shape = Self {
            count: usize::from(if u.ratio(3, 4)? {
                *u.choose(COUNTS)?
            } else {
                u.int_in_range(0..=70)?
            }),
            len: length(u, LENS, [1100, 5000])?,
            origin: *u.choose(ORIGINS)?,
            owners: u.arbitrary()?,
            forged: *u.choose(FORGED)?,
            aads: u.arbitrary()?,
            ivs: u.arbitrary()?,
            offset: length(u, SLACKS, [80, 80])?,
            after: length(u, SLACKS, [80, 80])?,
            lead: usize::from(*u.choose(LEADS)?),
            seed: u.arbitrary()?,
        };
        let bytes_each = shape.len + shape.aads.longest();
        shape.count = shape.count.min(BYTES_MAX / bytes_each.max(1));
        Ok(shape)
    }
}

impl AadLens {
    fn longest(&self) -> usize {
        match *self {
            Self::Equal(len) | Self::UpTo(len) => len,
            Self::OneOff(len, other) | Self::EitherOf(len, other) => len.max(other),
        }
    }
}

impl Arbitrary<'_> for AadLens {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        let choice = u.int_in_range(0..=7)?;
        let mut len = || length(u, AAD_LENS, [300, 8192]);
        Ok(match choice {
            0..=3 => Self::Equal(len()?),
            4 => Self::OneOff(len()?, len()?),
            5 | 6 => Self::EitherOf(len()?, len()?),
            _ => Self::UpTo(len()?),
        })
    }
}

impl Arbitrary<'_> for Owners {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        Ok(match u.int_in_range(0..=7)? {
            0..=2 => Self::One(u.int_in_range(1..=5)?),
            3..=5 => Self::Each,
            _ => Self::Shared(u.int_in_range(1..=9)?),
        })
    }
}

impl Arbitrary<'_> for Ivs {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        Ok(match u.int_in_range(0..=7)? {
            0..=3 => Self::Drawn,
            4 => Self::Ones,
            _ => Self::Counter { bytes: u.int_in_range(1..=12)?, before: u.int_in_range(0..=70)? },
        })
    }
}

/// Half the time one of `usual`, else anything up to the first of `most`, seldom up to the second.
fn length(u: &mut Unstructured<'_>, usual: &[u16], most: [u16; 2]) -> Result<usize> {
    Ok(usize::from(if u.ratio(1, 2)? {
        *u.choose(usual)?
    } else {
        let most = if u.ratio(15, 16)? { most[0] } else { most[1] };
        u.int_in_range(0..=most)?
    }))
}

/// Bytes of a batch. Enough for 19 messages with the longest AADs and for 70 usual ones; a few huge batches would take
/// the time of thousands of others.
const BYTES_MAX: usize = 160 << 10;
const COUNTS: &[u8] =
    &[1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 0];
/// Tails of blocks and registers; 32 is a data key.
const LENS: &[u16] = &[
    32, 32, 16, 0, 1, 15, 17, 24, 31, 33, 47, 48, 49, 63, 64, 65, 80, 96, 112, 127, 128, 129, 255,
    256, 257, 1024,
];
const AAD_LENS: &[u16] =
    &[0, 12, 16, 1, 13, 15, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 256];
/// Tight, the heads of the blob layouts, and odd ones.
const SLACKS: &[u16] = &[0, 0, 0, 12, 1, 5, 16, 23, 63];
const LEADS: &[u8] = &[0, 0, 0, 1, 4, 7, 8, 15, 16, 31, 32, 33];
const ORIGINS: &[Origin] = &[
    Origin::Drawn(32),
    Origin::Drawn(32),
    Origin::Drawn(32),
    Origin::Drawn(16),
    Origin::Drawn(24),
    Origin::Mixed,
    Origin::Derived,
    Origin::Derived,
];
const FORGED: &[Forged] = &[
    Forged::One,
    Forged::One,
    Forged::Nobody,
    Forged::OneOf(2),
    Forged::OneOf(5),
    Forged::Everybody,
];
