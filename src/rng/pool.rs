//! Per-thread ChaCha20 pools with fast key erasure.
//!
//! What rests between calls is one kilobyte in locked pages: our own 32-byte key, and bytes that the key before it was
//! expanded into by ChaCha20 and that nobody was given yet. A fill hands out the next of them and zeroes them where
//! they lay; when they are spent, the key is expanded again, and the first 32 bytes replace it. So nothing at rest
//! leads back to what was handed out before (D. J. Bernstein, "Fast-key-erasure random-number generators", 2017, which
//! also hands out one expansion in pieces). Whoever reads the pool learns what it would give until it is seeded anew;
//! of a pool that held the key alone that would be just as true, and each single call would pay for a whole expansion.
//!
//! The pool is seeded by the operating system anew every 1 MiB, every second, and in a forked child. Where forks
//! cannot be detected there is no pool: every call asks the operating system.

use std::cell::RefCell;

use zeroize::{Zeroize, Zeroizing, zeroize_stack};

use super::os_fill;
use crate::{
    cpu::Tier,
    error::Result,
    kernel,
    limits::{POOL_AGE_MAX, POOL_BYTES_MAX},
    os::{self, Generation, LockedBox, Moment},
};

/// Bytes of one expansion: sixteen blocks, which the widest kernel makes at once.
const EXPANSION_LEN: usize = 1024;
/// Bytes of a ChaCha20 block.
const BLOCK_LEN: usize = 64;
/// Bytes of stack that hold parts of an expansion after the kernel has made it, and some more: the frames of optimised
/// builds add up to 1.2 KiB.
const USED_STACK_LEN: usize = if cfg!(debug_assertions) { kernel::STACK_LEN } else { 2048 };
/// Bytes at the head of an expansion that are the next key.
const KEY_LEN: usize = 32;

struct Pool {
    /// The key, then bytes that were handed out and are zeros, then those from `next` on, to be handed out. `None`
    /// stands for a box that must not be dropped here: see `Drop`.
    bytes: Option<LockedBox<[u8; EXPANSION_LEN]>>,
    next: usize,
    generation: Generation,
    seeded_ms: u64,
    handed_out: u64,
}

thread_local! {
    static POOL: RefCell<Option<Pool>> = const { RefCell::new(None) };
}

/// Fills every part, in order, from one expansion where they are short. `moment` is now.
pub(super) fn fill(tier: Tier, mut moment: Moment, out: &mut [&mut [u8]]) -> Result<()> {
    if !os::can_keep_state() {
        return fill_from_os(out);
    }
    // A thread that is being torn down has no pool any more.
    let filled = POOL.try_with(|pool| {
        let Ok(mut pool) = pool.try_borrow_mut() else { return fill_from_os(out) };
        loop {
            ready(&mut pool, moment)?.draw(tier, out);
            // A fork while we drew (from a signal handler, say) would leave both processes with these bytes.
            if os::generation() == moment.generation {
                return Ok(());
            }
            moment = Moment::now();
        }
    });
    filled.unwrap_or_else(|_| fill_from_os(out))
}

fn fill_from_os(out: &mut [&mut [u8]]) -> Result<()> {
    out.iter_mut().try_for_each(|part| os_fill(part))
}

/// The thread's pool, seeded anew if it is absent, inherited, old or spent.
fn ready(slot: &mut Option<Pool>, now: Moment) -> Result<&mut Pool> {
    let usable = slot.as_ref().is_some_and(|pool| {
        pool.generation == now.generation
            && pool.handed_out < POOL_BYTES_MAX
            && u128::from(now.ms.saturating_sub(pool.seeded_ms)) < POOL_AGE_MAX.as_millis()
    });
    if !usable {
        seed_anew(slot, now)?;
    }
    Ok(slot.as_mut().expect("just filled"))
}

#[cold]
fn seed_anew(slot: &mut Option<Pool>, now: Moment) -> Result<()> {
    let mut seed = Zeroizing::new([0; KEY_LEN]);
    os_fill(&mut *seed)?;
    let bytes = match slot.take() {
        Some(mut pool) if pool.generation == now.generation => pool.bytes.take(),
        // Inherited: abandoned by its drop.
        _ => None,
    };
    let mut bytes = match bytes {
        Some(bytes) => bytes,
        None => LockedBox::new_with(|| [0; EXPANSION_LEN])?,
    };
    bytes.zeroize();
    bytes[..KEY_LEN].copy_from_slice(&*seed);
    let bytes = Some(bytes);
    *slot = Some(Pool {
        bytes,
        next: EXPANSION_LEN,
        generation: now.generation,
        seeded_ms: now.ms,
        handed_out: 0,
    });
    Ok(())
}

impl Pool {
    fn bytes(&mut self) -> &mut [u8; EXPANSION_LEN] {
        self.bytes.as_mut().expect("only drop takes it")
    }

    fn draw(&mut self, tier: Tier, out: &mut [&mut [u8]]) {
        let len: usize = out.iter().map(|part| part.len()).sum();
        self.handed_out += len as u64;
        if len > EXPANSION_LEN - KEY_LEN {
            for part in out {
                self.draw_many(tier, part);
            }
            return;
        }
        if len > EXPANSION_LEN - self.next {
            // What is left is overwritten: no call is put together of two expansions.
            self.expand(tier);
        }
        let (at, next) = (self.next, self.next + len);
        self.next = next;
        let given = &mut self.bytes()[at..next];
        let mut rest = &*given;
        for part in out {
            part.copy_from_slice(rest.split_off(..part.len()).expect("the lengths add up"));
        }
        // As everywhere where what is wiped may be empty.
        if !given.is_empty() {
            given.zeroize();
        }
    }

    /// Replaces the key and everything that is left.
    fn expand(&mut self, tier: Tier) {
        let bytes = self.bytes();
        let mut key = [0; KEY_LEN];
        key.copy_from_slice(&bytes[..KEY_LEN]);
        kernel::chacha_fill(tier, &key, 0, 0, bytes);
        // As a slice: an array is zeroed byte by byte.
        key.as_mut_slice().zeroize();
        self.next = KEY_LEN;
        zeroize_stack::<USED_STACK_LEN>();
    }

    /// More than an expansion holds: it goes straight to the caller. Block 0 is for the next key.
    fn draw_many(&mut self, tier: Tier, out: &mut [u8]) {
        let key = &mut self.bytes()[..KEY_LEN];
        let mut expanded = Zeroizing::new([0; BLOCK_LEN]);
        let old: &mut [u8; KEY_LEN] = key.try_into().expect("KEY_LEN");
        kernel::chacha_fill(tier, old, 0, 1, out);
        kernel::chacha_fill(tier, old, 0, 0, &mut expanded[..KEY_LEN]);
        old.copy_from_slice(&expanded[..KEY_LEN]);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Inherited state is abandoned, not dropped.
        if self.generation != os::generation() {
            std::mem::forget(self.bytes.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn nothing_repeats_across_sizes_reseeds_and_threads() {
        let draw_many = || {
            let mut seen = Vec::new();
            for round in 0..3000usize {
                let mut out = vec![0; 32 + round % 400];
                let mut other = vec![0; 16 + round % 90];
                fill(Tier::PORTABLE, Moment::now(), &mut [&mut out, &mut other]).unwrap();
                seen.push(<[u8; 16]>::try_from(&other[..16]).unwrap());
                seen.push(<[u8; 16]>::try_from(&out[..16]).unwrap());
                seen.push(<[u8; 16]>::try_from(&out[out.len() - 16..]).unwrap());
            }
            seen
        };
        let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(draw_many)).collect();
        let all: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    }

    #[test]
    fn what_rests_does_not_lead_back() {
        let mut slot = None;
        let pool = ready(&mut slot, Moment::now()).unwrap();
        let seed: [u8; 32] = pool.bytes()[..KEY_LEN].try_into().unwrap();
        let (mut first, mut second) = ([0; 64], [0; 7]);
        pool.draw(Tier::PORTABLE, &mut [&mut first, &mut second]);
        let mut stream = [0; EXPANSION_LEN];
        kernel::chacha_fill(Tier::PORTABLE, &seed, 0, 0, &mut stream);
        // Handed out: what follows the first 32 bytes. At rest: those as the key, zeros, and the rest.
        assert_eq!((&first[..], &second[..]), (&stream[32..96], &stream[96..103]));
        assert_eq!(pool.bytes()[..KEY_LEN], stream[..KEY_LEN]);
        assert_eq!(pool.bytes()[KEY_LEN..103], [0; 71]);
        assert_eq!(pool.bytes()[103..], stream[103..]);

        // The next expansion: the key is replaced, and with it everything that was left.
        let mut third = [0; 950];
        pool.draw(Tier::PORTABLE, &mut [&mut third[..], &mut []]);
        let key = stream[..KEY_LEN].try_into().unwrap();
        kernel::chacha_fill(Tier::PORTABLE, &key, 0, 0, &mut stream);
        assert_eq!(third, stream[32..982]);
        assert_eq!(pool.bytes()[..KEY_LEN], stream[..KEY_LEN]);
        assert_eq!(pool.bytes()[KEY_LEN..982], [0; 950]);

        // More than an expansion: from a stream of its own, whose first block is the next key.
        let mut long = [0; 3000];
        pool.draw(Tier::PORTABLE, &mut [&mut long]);
        let key = stream[..KEY_LEN].try_into().unwrap();
        let mut stream = [0; 64 + 3000];
        kernel::chacha_fill(Tier::PORTABLE, &key, 0, 0, &mut stream);
        assert_eq!(long, stream[64..]);
        assert_eq!(pool.bytes()[..KEY_LEN], stream[..KEY_LEN]);
    }

    #[test]
    fn where_forks_cannot_be_told_nothing_rests_in_a_pool() {
        let fresh_thread = std::thread::spawn(|| {
            os::tests::without_mark(|| {
                let (mut one, mut other) = ([0; 32], [0; 32]);
                fill(Tier::PORTABLE, Moment::now(), &mut [&mut one, &mut other]).unwrap();
                assert!(one != other && one != [0; 32]);
                POOL.with_borrow(|pool| assert!(pool.is_none()));
            });
        });
        fresh_thread.join().unwrap();
    }

    #[test]
    fn a_spent_pool_is_seeded_anew() {
        let mut slot = None;
        let pool = ready(&mut slot, Moment::now()).unwrap();
        pool.handed_out = POOL_BYTES_MAX;
        let before = *pool.bytes();
        let pool = ready(&mut slot, Moment::now()).unwrap();
        assert_eq!(pool.handed_out, 0);
        assert_ne!(before[..KEY_LEN], pool.bytes()[..KEY_LEN]);
        assert_eq!((pool.next, &pool.bytes()[KEY_LEN..]), (EXPANSION_LEN, &[0; 992][..]));
    }
}
