//! Wrapping states: a salt, its derived key and the next IV, for single calls and short runs of a `Derived` version.
//!
//! States lie in a few slots inside the key version and are taken by an atomic swap, so that no lock is held while a
//! key is made, two threads never use one state at once, and dropping the version wipes them. A state serves at most
//! 2^20 wraps and one second, and never crosses a fork.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering, fence},
};

use crossbeam::{atomic::AtomicCell, utils::CachePadded};
use once_cell::race::OnceBox;

use super::{derived::XaesKey, iv_plus};
use crate::{
    error::Result,
    kernel::{GcmKey, Iv, KeyRef},
    limits::{IV_LEN, SALT_LEN, STATE_AGE_MAX, STATE_SLOTS, STATE_WRAPS_MAX},
    os::{self, Generation},
    rng::Rng,
};

// A lock in its place could be held by a thread that a forked child does not have.
const _: () = assert!(AtomicCell::<Option<Box<WrappingState>>>::is_lock_free());

/// A salt with its derived key, the next IV, and what is left of its wraps.
pub(crate) struct WrappingState {
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
    /// Made on first use: two kilobytes, and most keys of a large store rest.
    slots: OnceBox<Slots>,
    resting: AtomicBool,
}

/// Each on cache lines of its own: threads do not share them.
#[derive(Default)]
struct Slots([CachePadded<AtomicCell<Option<Box<WrappingState>>>>; STATE_SLOTS]);

/// What a state is looked for with: the process, the time, and the slot of the thread.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    generation: Generation,
    now_ms: u64,
    slot: usize,
}

impl Moment {
    pub(crate) fn now(rng: &Rng) -> Self {
        let generation = os::generation();
        // A deterministic engine must not depend on threads or time.
        if rng.is_deterministic() {
            return Self { generation, now_ms: 0, slot: 0 };
        }
        Self { generation, now_ms: os::coarse_ms(), slot: os::thread_number() % STATE_SLOTS }
    }
}

impl StateSlots {
    /// Takes `count` IVs of a wrapping state, a new one if the thread's slot has none to go on with.
    ///
    /// A fork in the middle would give both processes the same IVs: operations look at the process generation once
    /// more before they return anything, and start over.
    ///
    /// # Errors
    /// `Machine` if there are no random bytes for a new salt.
    pub(crate) fn reserve(
        &self,
        root: &XaesKey,
        rng: &Rng,
        moment: Moment,
        count: u64,
    ) -> Result<Reserved> {
        assert!(count <= STATE_WRAPS_MAX);
        let mut state = self.take(root, rng, moment, count)?;
        let first_iv = state.advance(count);
        let reserved = Reserved { salt: state.salt, key: Arc::clone(&state.key), first_iv };
        self.put_back(state, moment);
        Ok(reserved)
    }

    /// Takes the state of the thread's slot out, or a new one if there is none with `count` IVs left. It is the
    /// caller's alone until [`StateSlots::put_back`].
    ///
    /// # Errors
    /// As [`StateSlots::reserve`].
    pub(crate) fn take(
        &self,
        root: &XaesKey,
        rng: &Rng,
        moment: Moment,
        count: u64,
    ) -> Result<Box<WrappingState>> {
        let usable = match self.slot(moment).take() {
            Some(inherited) if inherited.generation != moment.generation => {
                std::mem::forget(inherited);
                None
            }
            found => found.filter(|state| {
                state.left >= count
                    && u128::from(moment.now_ms.saturating_sub(state.born_ms))
                        < STATE_AGE_MAX.as_millis()
            }),
        };
        match usable {
            Some(state) => Ok(state),
            None => Ok(Box::new(WrappingState::new(root, rng, moment)?)),
        }
    }

    /// Puts a state into the slot for the thread's next call.
    pub(crate) fn put_back(&self, state: Box<WrappingState>, moment: Moment) {
        if !os::can_keep_state() || self.resting.load(Ordering::Acquire) {
            return;
        }
        // Dropped, if another thread of this slot was faster.
        drop(self.slot(moment).swap(Some(state)));
        // `rest` may have passed over the slot while the state was out of it, or before there were slots. The swap, and
        // the fence there, keep the order on both sides: one of the two sees the other.
        if self.resting.load(Ordering::SeqCst) {
            self.wipe();
        }
    }

    fn slot(&self, moment: Moment) -> &AtomicCell<Option<Box<WrappingState>>> {
        &self.slots.get_or_init(Box::default).0[moment.slot]
    }

    /// Wipes the states and keeps none from now on, until [`StateSlots::wake`]: the version is disabled or rotated.
    pub(crate) fn rest(&self) {
        self.resting.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.wipe();
    }

    /// Keeps states again.
    pub(crate) fn wake(&self) {
        self.resting.store(false, Ordering::Release);
    }

    fn wipe(&self) {
        for slot in self.slots.get().into_iter().flat_map(|slots| &slots.0) {
            if let Some(state) = slot.take()
                && state.generation != os::generation()
            {
                std::mem::forget(state);
            }
        }
    }

    #[cfg(test)]
    fn kept(&self) -> usize {
        let slots = self.slots.get().into_iter().flat_map(|slots| &slots.0);
        slots
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
    fn new(root: &XaesKey, rng: &Rng, moment: Moment) -> Result<Self> {
        let mut nonce = [0; SALT_LEN + IV_LEN];
        rng.fill(&mut nonce)?;
        let (salt, iv) = nonce.split_at(SALT_LEN);
        let salt = salt.try_into().expect("SALT_LEN");
        Ok(Self {
            generation: moment.generation,
            born_ms: moment.now_ms,
            salt,
            key: Arc::new(root.derive(&salt)?),
            next_iv: iv.try_into().expect("IV_LEN"),
            left: STATE_WRAPS_MAX,
        })
    }

    /// Takes the next `count` IVs, of which the state has as many left, and returns the first.
    pub(crate) fn advance(&mut self, count: u64) -> Iv {
        let first = self.next_iv;
        self.next_iv = iv_plus(&first, count);
        self.left = self.left.checked_sub(count).expect("taken with so many left");
        first
    }

    pub(crate) fn salt(&self) -> &[u8; SALT_LEN] {
        &self.salt
    }

    pub(crate) fn key(&self) -> KeyRef<'_> {
        self.key.key()
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
                    let reserved = states.reserve(&root, &rng, Moment::now(&rng), count).unwrap();
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
        let salt = |count| states.reserve(&root, &rng, Moment::now(&rng), count).unwrap().salt;
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
            let salt = || states.reserve(&root, &rng, Moment::now(&rng), 1).unwrap().salt;
            assert_ne!(salt(), salt());
            assert_eq!(states.kept(), 0);
        });
    }

    #[test]
    fn resting_slots_keep_nothing() {
        let ((root, states), rng) = (set_up(), Rng::Os(Tier::PORTABLE));
        states.reserve(&root, &rng, Moment::now(&rng), 1).unwrap();
        assert_eq!(states.kept(), 1);
        states.rest();
        assert_eq!(states.kept(), 0);
        states.reserve(&root, &rng, Moment::now(&rng), 1).unwrap();
        assert_eq!(states.kept(), 0);
        states.wake();
        states.reserve(&root, &rng, Moment::now(&rng), 1).unwrap();
        assert_eq!(states.kept(), 1);
    }
}
