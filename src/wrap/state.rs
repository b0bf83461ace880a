//! Wrapping states: a salt, its derived key and the next IV, for single calls and short runs of a `Derived` version.
//!
//! States lie in a few slots inside the key version and are taken by an atomic swap, so that no lock is held while a
//! key is made, two threads never use one state at once, and dropping the version wipes them. A state serves at most
//! 2^20 wraps and one second, and never crosses a fork.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crossbeam::atomic::AtomicCell;

use super::{derived::XaesKey, iv_plus};
use crate::{
    error::Result,
    kernel::{GcmKey, Iv},
    limits::{IV_LEN, SALT_LEN, STATE_AGE_MAX, STATE_SLOTS, STATE_WRAPS_MAX},
    os::{self, Generation},
    rng::Rng,
};

// A lock in its place could be held by a thread that a forked child does not have.
const _: () = assert!(AtomicCell::<Option<Box<WrappingState>>>::is_lock_free());

struct WrappingState {
    generation: Generation,
    born_ms: u64,
    salt: [u8; SALT_LEN],
    key: Arc<GcmKey>,
    next_iv: Iv,
    left: u64,
}

/// IVs `first_iv`, `first_iv + 1`, ... of one salt, for as many wraps as were asked for.
pub(crate) struct Reserved {
    pub(crate) salt: [u8; SALT_LEN],
    pub(crate) key: Arc<GcmKey>,
    pub(crate) first_iv: Iv,
}

/// The wrapping states of one key version.
#[derive(Default)]
pub(crate) struct StateSlots {
    slots: [AtomicCell<Option<Box<WrappingState>>>; STATE_SLOTS],
    resting: AtomicBool,
}

thread_local! {
    /// The slot that this thread looks into first.
    static SLOT: Cell<Option<usize>> = const { Cell::new(None) };
}

fn slot_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    SLOT.get().unwrap_or_else(|| {
        let slot = NEXT.fetch_add(1, Ordering::Relaxed) % STATE_SLOTS;
        SLOT.set(Some(slot));
        slot
    })
}

impl StateSlots {
    /// Takes `count` IVs of a wrapping state, a new one if the thread's slot has none to go on with.
    ///
    /// A fork in the middle would give both processes the same IVs: operations look at the process generation once
    /// more before they return anything, and start over.
    ///
    /// # Errors
    /// `Machine` if there are no random bytes for a new salt.
    pub(crate) fn reserve(&self, root: &XaesKey, rng: &Rng, count: u64) -> Result<Reserved> {
        assert!(count <= STATE_WRAPS_MAX);
        let generation = os::generation();
        // A deterministic engine must not depend on threads or time.
        let (slot, now_ms) =
            if rng.is_deterministic() { (0, 0) } else { (slot_of_thread(), os::coarse_ms()) };
        let usable = match self.slots[slot].take() {
            Some(inherited) if inherited.generation != generation => {
                std::mem::forget(inherited);
                None
            }
            found => found.filter(|state| {
                state.left >= count
                    && u128::from(now_ms.saturating_sub(state.born_ms)) < STATE_AGE_MAX.as_millis()
            }),
        };
        let mut state = match usable {
            Some(state) => state,
            None => Box::new(WrappingState::new(root, rng, generation, now_ms)?),
        };
        let reserved =
            Reserved { salt: state.salt, key: Arc::clone(&state.key), first_iv: state.next_iv };
        state.next_iv = iv_plus(&state.next_iv, count);
        state.left -= count;
        if os::can_keep_state() && !self.resting.load(Ordering::Acquire) {
            self.slots[slot].store(Some(state));
            // `rest` may have passed over the slot while the state was out of it. Take and store are swaps (acquire and
            // release), so one of the two sees the other.
            if self.resting.load(Ordering::Acquire) {
                self.wipe();
            }
        }
        Ok(reserved)
    }

    /// Wipes the states and keeps none from now on, until [`StateSlots::wake`]: the version is disabled or rotated.
    pub(crate) fn rest(&self) {
        self.resting.store(true, Ordering::Release);
        self.wipe();
    }

    /// Keeps states again.
    pub(crate) fn wake(&self) {
        self.resting.store(false, Ordering::Release);
    }

    fn wipe(&self) {
        for slot in &self.slots {
            if let Some(state) = slot.take()
                && state.generation != os::generation()
            {
                std::mem::forget(state);
            }
        }
    }

    #[cfg(test)]
    fn kept(&self) -> usize {
        self.slots
            .iter()
            .filter(|slot| {
                let state = slot.take();
                let some = state.is_some();
                slot.store(state);
                some
            })
            .count()
    }
}

impl Drop for StateSlots {
    fn drop(&mut self) {
        self.wipe();
    }
}

impl WrappingState {
    fn new(root: &XaesKey, rng: &Rng, generation: Generation, born_ms: u64) -> Result<Self> {
        let mut nonce = [0; SALT_LEN + IV_LEN];
        rng.fill(&mut nonce)?;
        let (salt, iv) = nonce.split_at(SALT_LEN);
        let salt = salt.try_into().expect("SALT_LEN");
        Ok(Self {
            generation,
            born_ms,
            salt,
            key: Arc::new(root.derive(&salt)?),
            next_iv: iv.try_into().expect("IV_LEN"),
            left: STATE_WRAPS_MAX,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::cpu::Tier;

    fn set_up() -> (XaesKey, StateSlots) {
        (XaesKey::new(Tier::PORTABLE, &[7; 32]).unwrap(), StateSlots::default())
    }

    #[test]
    fn no_salt_and_iv_twice_across_threads() {
        let ((root, states), rng) = (set_up(), Rng::Os(Tier::PORTABLE));
        let take = || -> Vec<_> {
            (0..2000)
                .flat_map(|round| {
                    let count = 1 + round % 3;
                    let reserved = states.reserve(&root, &rng, count).unwrap();
                    (0..count).map(move |i| (reserved.salt, iv_plus(&reserved.first_iv, i)))
                })
                .collect()
        };
        let all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2 * STATE_SLOTS).map(|_| scope.spawn(take)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    }

    #[test]
    fn a_state_ends_with_its_wraps_and_with_its_second() {
        let ((root, states), rng) = (set_up(), Rng::Os(Tier::PORTABLE));
        let salt = |count| states.reserve(&root, &rng, count).unwrap().salt;
        let first = salt(STATE_WRAPS_MAX - 1);
        assert_eq!(salt(1), first);
        let second = salt(1);
        assert_ne!(second, first);
        std::thread::sleep(STATE_AGE_MAX + std::time::Duration::from_millis(20));
        assert_ne!(salt(1), second);
    }

    #[test]
    fn where_forks_cannot_be_told_no_state_is_kept() {
        let ((root, states), rng) = (set_up(), Rng::Os(Tier::PORTABLE));
        os::tests::without_mark(|| {
            let salt = || states.reserve(&root, &rng, 1).unwrap().salt;
            assert_ne!(salt(), salt());
            assert_eq!(states.kept(), 0);
        });
    }

    #[test]
    fn resting_slots_keep_nothing() {
        let ((root, states), rng) = (set_up(), Rng::Os(Tier::PORTABLE));
        states.reserve(&root, &rng, 1).unwrap();
        assert_eq!(states.kept(), 1);
        states.rest();
        assert_eq!(states.kept(), 0);
        states.reserve(&root, &rng, 1).unwrap();
        assert_eq!(states.kept(), 0);
        states.wake();
        states.reserve(&root, &rng, 1).unwrap();
        assert_eq!(states.kept(), 1);
    }
}
