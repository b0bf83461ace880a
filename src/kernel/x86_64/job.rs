//! What a kernel works on, with its lengths checked once, and how its messages are cut into passes.

use super::super::{Iv, Open, Seal, common_len};
use crate::limits::TAG_LEN;

/// The job of a [`Seal`] or an [`Open`].
///
/// The pointers that it gives out rest on these facts, which [`Job::seal`] and [`Job::open`] assert and nothing
/// changes: each column has an element for each message; an input has `len` bytes (and a tag behind, when opening); an
/// output has `len` bytes (and room for a tag behind, when sealing), apart from all others, within `out`.
pub(super) struct Job<'a> {
    opens: bool,
    ivs: &'a [Iv],
    aads: &'a [&'a [u8]],
    len: usize,
    /// Plaintexts of `len` bytes, side by side, of a sealing job.
    plaintexts: &'a [u8],
    /// Ciphertext and tag of each message, of an opening job.
    sealed: &'a [&'a [u8]],
    /// From the first output on.
    out: &'a mut [u8],
    stride: usize,
    verdicts: &'a mut [bool],
    /// The length of every AAD, if they have one.
    aad_len: Option<usize>,
}

/// The first message of a subgroup: so many messages of the job as a register has lanes.
#[derive(Clone, Copy)]
pub(super) struct Start<const LANES: usize> {
    at: usize,
    /// Messages before this one are done.
    done: usize,
}

impl<'a> Job<'a> {
    pub(super) fn seal(job: Seal<'a>) -> Self {
        job.check();
        let Seal { keys: _, ivs, aads, len, plaintexts, out, stride, offset } = job;
        let (sealed, verdicts, aad_len) = (&[][..], &mut [][..], common_len(aads));
        // Not kept beside the stride: both would be copied as one register, which waits until the caller's stores of
        // the two have reached the cache.
        let out = &mut out[if ivs.is_empty() { 0 } else { offset }..];
        Self { opens: false, ivs, aads, len, plaintexts, sealed, out, stride, verdicts, aad_len }
    }

    pub(super) fn open(job: Open<'a>) -> Self {
        let Open { keys: _, ivs, aads, sealed, len, out, verdicts } = job;
        let count = ivs.len();
        assert!(aads.len() == count && sealed.len() == count && verdicts.len() == count);
        assert_eq!(Some(out.len()), count.checked_mul(len));
        assert_eq!(common_len(sealed), len.checked_add(TAG_LEN));
        let (stride, aad_len) = (len, common_len(aads));
        let plaintexts = &[];
        Self { opens: true, ivs, aads, len, plaintexts, sealed, out, stride, verdicts, aad_len }
    }

    #[inline]
    pub(super) fn count(&self) -> usize {
        self.ivs.len()
    }

    /// Whether messages are opened, not sealed.
    #[inline]
    pub(super) fn opens(&self) -> bool {
        self.opens
    }

    /// Bytes of each message.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The length of every AAD, if they have one.
    #[inline]
    pub(super) fn aad_len(&self) -> Option<usize> {
        self.aad_len
    }

    /// Columns of key stream: one for the tag, and one for each block.
    #[inline]
    pub(super) fn columns(&self) -> usize {
        1 + self.len.div_ceil(16)
    }

    /// The number of blocks of each message, if these are one, two or four whole ones.
    #[inline]
    pub(super) fn short_blocks(&self) -> Option<usize> {
        matches!(self.len, 16 | 32 | 64).then_some(self.len / 16)
    }

    #[inline]
    pub(super) fn ivs<const LANES: usize>(&self, start: Start<LANES>) -> &'a [Iv; LANES] {
        self.ivs[start.at..].first_chunk().expect("a full subgroup")
    }

    #[inline]
    pub(super) fn aads<const LANES: usize>(&self, start: Start<LANES>) -> &'a [&'a [u8]; LANES] {
        self.aads[start.at..].first_chunk().expect("a full subgroup")
    }

    /// The inputs of a subgroup's messages: each is good for reading `len` bytes, and a tag behind them when opening.
    #[inline]
    pub(super) fn inputs<const LANES: usize>(&self, start: Start<LANES>) -> [*const u8; LANES] {
        if self.opens {
            let sealed: &[&[u8]; LANES] =
                self.sealed[start.at..].first_chunk().expect("a full subgroup");
            return std::array::from_fn(|l| sealed[l].as_ptr());
        }
        let first = self.plaintexts.as_ptr().wrapping_add(start.at * self.len);
        std::array::from_fn(|l| first.wrapping_add(l * self.len))
    }

    /// The outputs of a subgroup's messages: each is good for writing `len` bytes, and a tag behind them when sealing.
    #[inline]
    pub(super) fn outputs<const LANES: usize>(&mut self, start: Start<LANES>) -> [*mut u8; LANES] {
        let first = self.out.as_mut_ptr().wrapping_add(start.at * self.stride);
        std::array::from_fn(|l| first.wrapping_add(l * self.stride))
    }

    /// Notes whether the tags of a subgroup are right, and zeroes the output of those that are not.
    #[inline]
    pub(super) fn judge<const LANES: usize>(&mut self, start: Start<LANES>, good: [bool; LANES]) {
        *self.verdicts[start.at..].first_chunk_mut().expect("a full subgroup") = good;
        if good != [true; LANES] {
            self.zero_refused(start.at, &good);
        }
    }

    #[cold]
    fn zero_refused(&mut self, start: usize, good: &[bool]) {
        for (index, _) in (start..).zip(good).filter(|(_, good)| !**good) {
            self.out[index * self.len..][..self.len].fill(0);
        }
    }
}

/// Cuts messages, at least `LANES` of them, into passes of one, two or four subgroups.
pub(super) struct Passes<const LANES: usize> {
    next: usize,
    count: usize,
}

pub(super) enum Pass<const LANES: usize> {
    One([Start<LANES>; 1]),
    Two([Start<LANES>; 2]),
    Four([Start<LANES>; 4]),
}

impl<const LANES: usize> Passes<LANES> {
    #[inline]
    pub(super) fn new(count: usize) -> Self {
        assert!(count >= LANES, "at least one full register");
        Self { next: 0, count }
    }

    /// The next pass, of two subgroups, if so many are left.
    #[inline]
    pub(super) fn next_two(&mut self) -> Option<[Start<LANES>; 2]> {
        let (first, last) = (self.next, self.count - LANES);
        if self.count.saturating_sub(first) <= LANES {
            return None;
        }
        self.next += 2 * LANES;
        Some([0, LANES].map(|later| Start { at: (first + later).min(last), done: first }))
    }

    /// The next pass, of `most` subgroups at most.
    #[inline]
    pub(super) fn next(&mut self, most: usize) -> Option<Pass<LANES>> {
        let (first, last) = (self.next, self.count - LANES);
        // The last subgroup begins early enough to be full.
        let start =
            |subgroup: usize| Start { at: (first + subgroup * LANES).min(last), done: first };
        let left = self.count.saturating_sub(first).div_ceil(LANES);
        let (pass, subgroups) = match left.min(most) {
            0 => return None,
            1 => (Pass::One([start(0)]), 1),
            2 => (Pass::Two([start(0), start(1)]), 2),
            _ => (Pass::Four([start(0), start(1), start(2), start(3)]), 4),
        };
        self.next += subgroups * LANES;
        Some(pass)
    }
}

impl<const LANES: usize> Start<LANES> {
    pub(super) const FIRST: Self = Self { at: 0, done: 0 };

    /// What `column`, with an element for each message, holds for the subgroup.
    #[inline]
    pub(super) fn of<T: Copy>(self, column: &[T]) -> [T; LANES] {
        *column[self.at..].first_chunk().expect("a full subgroup")
    }

    /// The same, to be written.
    #[inline]
    pub(super) fn of_mut<T>(self, column: &mut [T]) -> &mut [T; LANES] {
        column[self.at..].first_chunk_mut().expect("a full subgroup")
    }

    /// Whether an earlier pass has done message `lane` of the subgroup.
    #[inline]
    pub(super) fn is_done(self, lane: usize) -> bool {
        self.at + lane < self.done
    }
}
