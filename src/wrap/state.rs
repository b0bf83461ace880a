//! Wrapping states: a salt, its derived key and the next IV, for single calls and short runs of a `Derived` version.
//!
//! States lie in a few slots inside the key version and are taken by an atomic swap, so that no lock is held while a
//! key is made, two threads never use one state at once, and dropping the version wipes them. A state serves at most
//! 2^20 wraps and one second, and never crosses a fork.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering, fence},
};

use crossbeam::{atomic::AtomicCell, utils::CachePadded};
use once_cell::race::OnceBox;

use super::{derived::XaesKey, iv_plus};
use crate::{
    error::Result,
    kernel::{
        self, GcmKey, Iv, Keys,
        ahead::{AHEAD_LEN_MAX, KeyStreams},
    },
    limits::{IV_LEN, SALT_LEN, STATE_AGE_MAX, STATE_SLOTS, STATE_WRAPS_MAX},
    os::{self, Generation, Moment},
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
    /// Of `next_iv` and those that follow it, once there was a single call.
    streams: Option<KeyStreams>,
}

/// IVs `first_iv`, `first_iv + 1`, ... of one salt, for as many wraps as were asked for.
pub(crate) struct Reserved {
    pub(crate) salt: [u8; SALT_LEN],
    pub(crate) key: Arc<GcmKey>,
    pub(crate) first_iv: Iv,
    /// Where the key itself lies, for [`Reserved::prefetch`] alone.
    place: usize,
}

impl Reserved {
    /// Asks for the key to be brought into the caches, without a look at what leads to it: a hint.
    pub(crate) fn prefetch(&self) {
        kernel::prefetch_at(Arc::as_ptr(&self.key).addr());
        kernel::prefetch_key_at(self.place);
    }
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
struct Slots([CachePadded<Slot>; STATE_SLOTS]);

#[derive(Default)]
struct Slot {
    state: AtomicCell<Option<Box<WrappingState>>>,
    /// Where the state lies and where its key does, for [`StateSlots::prefetch_state`] alone.
    places: [AtomicUsize; 3],
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
        let (salt, key) = (state.salt, Arc::clone(&state.key));
        let reserved = Reserved { salt, place: key.key().place(), key, first_iv };
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
        let usable = match self.slot(moment).state.take() {
            Some(inherited) if inherited.generation != moment.generation => {
                std::mem::forget(inherited);
                None
            }
            found => found.filter(|state| {
                state.left >= count
                    && u128::from(moment.ms.saturating_sub(state.born_ms))
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
        let slot = self.slot(moment);
        for (place, at) in slot.places.iter().zip(state.places()) {
            place.store(at, Ordering::Relaxed);
        }
        // Dropped, if another thread of this slot was faster.
        drop(slot.state.swap(Some(state)));
        // `rest` may have passed over the slot while the state was out of it, or before there were slots. The swap, and
        // the fence there, keep the order on both sides: one of the two sees the other.
        if self.resting.load(Ordering::SeqCst) {
            self.wipe();
        }
    }

    /// Asks for the slot to be brought into the caches: a hint, for who will take from many versions and would wait
    /// for the slot of each by itself, since an atomic swap waits for all that comes before it.
    pub(crate) fn prefetch(&self, moment: Moment) {
        if let Some(slots) = self.slots.get() {
            kernel::prefetch(&slots.0[moment.thread % STATE_SLOTS]);
        }
    }

    /// The same for what is in the slot, once that is near.
    pub(crate) fn prefetch_state(&self, moment: Moment) {
        if let Some(slots) = self.slots.get() {
            for place in &slots.0[moment.thread % STATE_SLOTS].places {
                kernel::prefetch_at(place.load(Ordering::Relaxed));
            }
        }
    }

    fn slot(&self, moment: Moment) -> &Slot {
        &self.slots.get_or_init(Box::default).0[moment.thread % STATE_SLOTS]
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
            if let Some(state) = slot.state.take()
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
                let state = slot.state.take();
                let some = state.is_some();
                slot.state.store(state);
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
            born_ms: moment.ms,
            salt,
            key: Arc::new(root.derive(&salt)?),
            next_iv: iv.try_into().expect("IV_LEN"),
            left: STATE_WRAPS_MAX,
            streams: None,
        })
    }

    /// Takes the next `count` IVs, of which the state has as many left, and returns the first.
    pub(crate) fn advance(&mut self, count: u64) -> Iv {
        // They are no longer those of the next IVs.
        if let Some(streams) = &mut self.streams {
            streams.clear();
        }
        self.take_ivs(count)
    }

    fn take_ivs(&mut self, count: u64) -> Iv {
        let first = self.next_iv;
        self.next_iv = iv_plus(&first, count);
        self.left = self.left.checked_sub(count).expect("taken with so many left");
        first
    }

    /// Seals one message, for which the state has an IV left, into `out`: ciphertext and tag. Returns the IV.
    /// Overwrites the stack that was used.
    ///
    /// # Errors
    /// `Machine` if there is no memory for key streams.
    pub(crate) fn seal(&mut self, aad: &[u8], plaintext: &[u8], out: &mut [u8]) -> Result<Iv> {
        let key = self.key.key();
        if plaintext.len() > AHEAD_LEN_MAX || !key.has_streams() {
            let iv = self.advance(1);
            kernel::seal_and_wipe(kernel::Seal {
                keys: Keys::One(self.key.key()),
                ivs: &[iv],
                aads: &[aad],
                len: plaintext.len(),
                plaintexts: plaintext,
                stride: out.len(),
                out,
                offset: 0,
            });
            return Ok(iv);
        }
        let streams = match &mut self.streams {
            Some(streams) => streams,
            none => none.insert(KeyStreams::new()?),
        };
        if streams.is_empty() {
            streams.fill(key, &std::array::from_fn(|i| iv_plus(&self.next_iv, i as u64)));
        }
        streams.seal(key, aad, plaintext, out);
        Ok(self.take_ivs(1))
    }

    pub(crate) fn salt(&self) -> &[u8; SALT_LEN] {
        &self.salt
    }

    /// Where the state begins and ends, and where the count of references to its key is.
    fn places(&self) -> [usize; 3] {
        let start = std::ptr::from_ref(self).addr();
        [start, start + size_of::<Self>() - 1, Arc::as_ptr(&self.key).addr()]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{cpu::Tier, limits::TAG_LEN};

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
                    let reserved = states.reserve(&root, &rng, rng.moment(), count).unwrap();
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

    /// Whatever comes between: key streams made ahead are those of the IVs that are used.
    #[test]
    fn single_messages_and_reservations_take_one_iv_after_the_other() {
        for &tier in Tier::available() {
            let (root, rng) = (XaesKey::new(tier, &[7; 32]).unwrap(), Rng::Os(tier));
            let moment = rng.moment();
            let mut state = WrappingState::new(&root, &rng, moment).unwrap();
            // Their last byte overflows on the way.
            state.next_iv[11] = 0xf0;
            let (mut expected, mut taken) = (state.next_iv, 0);
            let lens = [32, 16, 5, 0, 32, 33, 1024, 32, 31].into_iter().cycle();
            for (round, len) in lens.enumerate().take(100) {
                if round % 7 == 3 {
                    let count = 1 + round as u64 % 5;
                    assert_eq!(state.advance(count), expected);
                    (expected, taken) = (iv_plus(&expected, count), taken + count);
                }
                let plaintext = vec![0x61; len];
                let mut out = vec![0; len + TAG_LEN];
                assert_eq!(state.seal(b"aad", &plaintext, &mut out).unwrap(), expected);
                let nonce = [state.salt, expected].concat().try_into().unwrap();
                let mut opened = vec![0; len];
                assert!(root.open(&nonce, b"aad", &out, &mut opened), "{tier}: {round}");
                assert_eq!(opened, plaintext);
                (expected, taken) = (iv_plus(&expected, 1), taken + 1);
            }
            assert_eq!(state.left, STATE_WRAPS_MAX - taken);
        }
    }

    #[test]
    fn a_state_ends_with_its_wraps_and_with_its_second() {
        let ((root, states), rng) = (set_up(), Rng::Os(Tier::PORTABLE));
        let salt = |count| states.reserve(&root, &rng, rng.moment(), count).unwrap().salt;
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
            let salt = || states.reserve(&root, &rng, rng.moment(), 1).unwrap().salt;
            assert_ne!(salt(), salt());
            assert_eq!(states.kept(), 0);
        });
    }

    #[test]
    fn resting_slots_keep_nothing() {
        let ((root, states), rng) = (set_up(), Rng::Os(Tier::PORTABLE));
        states.reserve(&root, &rng, rng.moment(), 1).unwrap();
        assert_eq!(states.kept(), 1);
        states.rest();
        assert_eq!(states.kept(), 0);
        states.reserve(&root, &rng, rng.moment(), 1).unwrap();
        assert_eq!(states.kept(), 0);
        states.wake();
        states.reserve(&root, &rng, rng.moment(), 1).unwrap();
        assert_eq!(states.kept(), 1);
    }
}
