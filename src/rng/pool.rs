//! Per-thread ChaCha20 pools with fast key erasure.
//!
//! What rests between calls is our own 32-byte key, in locked pages. A fill expands it with ChaCha20, takes the first
//! 32 bytes as the next key and hands out the rest, so that neither the key at rest nor anything derived from it leads
//! back to bytes handed out before (D. J. Bernstein, "Fast-key-erasure random-number generators", 2017).
//! The key is replaced by one from the operating system every 1 MiB, every second, and in a forked child. Where forks
//! cannot be detected there is no pool: every call asks the operating system.

use std::cell::RefCell;

use zeroize::Zeroizing;

use super::os_fill;
use crate::{
    cpu::Tier,
    error::Result,
    kernel,
    limits::{POOL_AGE_MAX, POOL_BYTES_MAX},
    os::{self, Generation, LockedBox},
};

/// Requests up to this size are cut from one expansion together with the next key.
const SMALL: usize = 224;
/// Bytes of a ChaCha20 block.
const BLOCK_LEN: usize = 64;
/// Bytes at the head of the stream that become the next key.
const KEY_LEN: usize = 32;

struct Pool {
    /// `None` stands for a box that must not be dropped here: see `Drop`.
    key: Option<LockedBox<[u8; KEY_LEN]>>,
    generation: Generation,
    seeded_ms: u64,
    handed_out: u64,
}

thread_local! {
    static POOL: RefCell<Option<Pool>> = const { RefCell::new(None) };
}

/// Fills every part, in order, from one expansion where they are short.
pub(super) fn fill(tier: Tier, out: &mut [&mut [u8]]) -> Result<()> {
    if !os::can_keep_state() {
        return fill_from_os(out);
    }
    // A thread that is being torn down has no pool any more.
    let filled = POOL.try_with(|pool| {
        let Ok(mut pool) = pool.try_borrow_mut() else { return fill_from_os(out) };
        loop {
            let before = os::generation();
            let pool = ready(&mut pool, before)?;
            pool.draw(tier, out);
            // A fork while we drew (from a signal handler, say) would leave both processes with these bytes.
            if os::generation() == before {
                return Ok(());
            }
        }
    });
    filled.unwrap_or_else(|_| fill_from_os(out))
}

fn fill_from_os(out: &mut [&mut [u8]]) -> Result<()> {
    out.iter_mut().try_for_each(|part| os_fill(part))
}

/// The thread's pool, seeded anew if it is absent, inherited, old or spent.
fn ready(slot: &mut Option<Pool>, now: Generation) -> Result<&mut Pool> {
    let now_ms = os::coarse_ms();
    let usable = slot.as_ref().is_some_and(|pool| {
        pool.generation == now
            && pool.handed_out < POOL_BYTES_MAX
            && u128::from(now_ms.saturating_sub(pool.seeded_ms)) < POOL_AGE_MAX.as_millis()
    });
    if !usable {
        let mut seed = Zeroizing::new([0; KEY_LEN]);
        os_fill(&mut *seed)?;
        match slot {
            Some(pool) if pool.generation == now => {
                pool.key_mut().copy_from_slice(&*seed);
                pool.seeded_ms = now_ms;
                pool.handed_out = 0;
            }
            _ => {
                let mut key = LockedBox::new_with(|| [0; KEY_LEN])?;
                key.copy_from_slice(&*seed);
                *slot = Some(Pool {
                    key: Some(key),
                    generation: now,
                    seeded_ms: now_ms,
                    handed_out: 0,
                });
            }
        }
    }
    Ok(slot.as_mut().expect("just filled"))
}

impl Pool {
    fn key_mut(&mut self) -> &mut [u8; KEY_LEN] {
        self.key.as_mut().expect("only drop takes it")
    }

    fn draw(&mut self, tier: Tier, out: &mut [&mut [u8]]) {
        let len: usize = out.iter().map(|part| part.len()).sum();
        self.handed_out += len as u64;
        let key = self.key_mut();
        let mut stream = Zeroizing::new([0; KEY_LEN + SMALL]);
        if len <= SMALL {
            let stream = &mut stream[..KEY_LEN + len];
            kernel::chacha_fill(tier, key, 0, 0, stream);
            let (next_key, mut rest) = stream.split_at(KEY_LEN);
            key.copy_from_slice(next_key);
            for part in out {
                part.copy_from_slice(rest.split_off(..part.len()).expect("the lengths add up"));
            }
        } else {
            // Block 0 for the next key; what follows goes straight to the caller, a part from whole blocks on.
            kernel::chacha_fill(tier, key, 0, 0, &mut stream[..KEY_LEN]);
            let mut block = 1;
            for part in out {
                kernel::chacha_fill(tier, key, 0, block, part);
                block += part.len().div_ceil(BLOCK_LEN) as u64;
            }
            key.copy_from_slice(&stream[..KEY_LEN]);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Inherited state is abandoned, not dropped.
        if self.generation != os::generation() {
            std::mem::forget(self.key.take());
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
                fill(Tier::PORTABLE, &mut [&mut out, &mut other]).unwrap();
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
    fn the_key_at_rest_does_not_lead_back() {
        let mut slot = None;
        let pool = ready(&mut slot, os::generation()).unwrap();
        let before = *pool.key_mut();
        let mut out = [0; 64];
        pool.draw(Tier::PORTABLE, &mut [&mut out]);
        let after = *pool.key_mut();
        let mut stream = [0; 96];
        kernel::chacha_fill(Tier::PORTABLE, &before, 0, 0, &mut stream);
        // Handed out: bytes 32.. of the old key's stream; kept: bytes ..32, from which the old key does not follow.
        assert_eq!((out.as_slice(), after.as_slice()), (&stream[32..], &stream[..32]));
        assert_ne!(before, after);
    }

    #[test]
    fn where_forks_cannot_be_told_nothing_rests_in_a_pool() {
        let fresh_thread = std::thread::spawn(|| {
            os::tests::without_mark(|| {
                let (mut one, mut other) = ([0; 32], [0; 32]);
                fill(Tier::PORTABLE, &mut [&mut one, &mut other]).unwrap();
                assert!(one != other && one != [0; 32]);
                POOL.with_borrow(|pool| assert!(pool.is_none()));
            });
        });
        fresh_thread.join().unwrap();
    }

    #[test]
    fn a_spent_pool_is_seeded_anew() {
        let mut slot = None;
        let pool = ready(&mut slot, os::generation()).unwrap();
        pool.handed_out = POOL_BYTES_MAX;
        let before = *pool.key_mut();
        let pool = ready(&mut slot, os::generation()).unwrap();
        assert_eq!(pool.handed_out, 0);
        assert_ne!(before, *pool.key_mut());
    }
}
