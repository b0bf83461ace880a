//! Leases: the wraps of a `Direct` version that this process may still make without asking the store.
//!
//! The store counts what it grants; a lease that is lost (crash, fork) is spent. The counter is one atomic word of
//! generation and remaining wraps, so that a forked child finds nothing to take and no lock is needed.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{
    limits::{LEASE_FIRST, LEASE_MAX},
    os::{self, Generation},
};

const COUNT_BITS: u32 = 40;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

/// The lease of one version in this process.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    /// Generation in the high 24 bits, remaining wraps in the low 40.
    word: AtomicU64,
    /// Leases taken so far, for their doubling size, in the low 8 bits; above them, the wraps that the store had
    /// granted to everybody when it was last heard. In one word: what a version is made of lies in few cache lines,
    /// and a batch of many keys waits for each.
    history: AtomicU64,
}

const TAKEN_BITS: u32 = 8;
const TAKEN_MASK: u64 = (1 << TAKEN_BITS) - 1;

fn pack(generation: Generation, count: u64) -> u64 {
    generation.low_24() << COUNT_BITS | count
}

impl Lease {
    /// Takes up to `want` wraps and says how many.
    pub(crate) fn take(&self, want: u64) -> u64 {
        let now = os::generation();
        let mut got = 0;
        let _ = self.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let left = left(word, now);
            got = left.min(want);
            Some(pack(now, left - got))
        });
        // Forked in between: what was there is the parent's.
        if os::generation() == now { got } else { 0 }
    }

    /// Adds wraps that the store granted in generation `of`, or that were taken then and not used. What belongs to
    /// another process is dropped, and so is everything where forks cannot be told.
    pub(crate) fn add(&self, wraps: u64, of: Generation) {
        let now = os::generation();
        if now != of || !os::can_keep_state() {
            return;
        }
        let _ = self.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            // Both are bounded far below 2^40 (limits.rs); the bound of a version is 2^32.
            Some(pack(now, (left(word, now) + wraps).min(COUNT_MASK)))
        });
    }

    /// How many wraps there are to take.
    #[cfg(any(feature = "server", test))]
    pub(crate) fn left(&self) -> u64 {
        left(self.word.load(Ordering::Relaxed), os::generation())
    }

    /// Notes what the store says it has granted of the version.
    pub(crate) fn note_spent(&self, spent: u64) {
        let note = |history: u64| Some(spent << TAKEN_BITS | history & TAKEN_MASK);
        let _ = self.history.fetch_update(Ordering::Relaxed, Ordering::Relaxed, note);
    }

    /// What was noted last.
    #[cfg(any(feature = "server", test))]
    pub(crate) fn spent(&self) -> u64 {
        self.history.load(Ordering::Relaxed) >> TAKEN_BITS
    }

    /// How many wraps beyond need the next lease should ask for: doubling up to `max`.
    pub(crate) fn next_surplus(&self, max: u64) -> u64 {
        if !os::can_keep_state() {
            return 0;
        }
        // Counted as far as it makes a difference.
        let most = u64::from(LEASE_MAX.ilog2());
        let count = |history: u64| (history & TAKEN_MASK < most).then_some(history + 1);
        let counted = self.history.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        let times = counted.unwrap_or(most) & TAKEN_MASK;
        (LEASE_FIRST << times).min(max)
    }
}

fn left(word: u64, now: Generation) -> u64 {
    if word >> COUNT_BITS == now.low_24() { word & COUNT_MASK } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_gives_what_it_has_and_no_more() {
        let lease = Lease::default();
        assert_eq!((lease.left(), lease.take(5)), (0, 0));
        lease.add(7, os::generation());
        assert_eq!(lease.left(), 7);
        assert_eq!((lease.take(5), lease.left()), (5, 2));
        assert_eq!((lease.take(5), lease.take(5), lease.left()), (2, 0, 0));
    }

    #[test]
    fn threads_never_take_more_than_was_added() {
        let lease = Lease::default();
        lease.add(100_000, os::generation());
        let total: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| (0..10_000).map(|i| lease.take(1 + i % 5)).sum::<u64>()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(total, 100_000);
    }

    #[test]
    fn where_forks_cannot_be_told_no_lease_is_kept() {
        os::tests::without_mark(|| {
            let lease = Lease::default();
            assert_eq!(lease.next_surplus(LEASE_MAX), 0);
            lease.add(7, os::generation());
            assert_eq!(lease.take(5), 0);
        });
    }

    #[test]
    fn surplus_doubles_up_to_its_maximum() {
        let lease = Lease::default();
        let sizes: Vec<_> = (0..30).map(|_| lease.next_surplus(LEASE_MAX)).collect();
        assert_eq!(sizes[..3], [LEASE_FIRST, 2 * LEASE_FIRST, 4 * LEASE_FIRST]);
        assert_eq!(sizes[29], LEASE_MAX);
        // Whatever is noted in between.
        let lease = Lease::default();
        for (nth, size) in sizes.into_iter().enumerate() {
            lease.note_spent((1 << 32) - nth as u64);
            assert_eq!(lease.next_surplus(LEASE_MAX), size);
            assert_eq!(lease.spent(), (1 << 32) - nth as u64);
        }
    }
}
