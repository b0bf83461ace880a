//! The stock of a pool: which of its keys may be handed out, and which have to go.
//!
//! Keys lie in magazines, which were filled in one batch. A queue holds full ones; each thread takes keys out of the
//! magazine in its slot, and gets the next one from the queue when that is empty. So a key costs no access to what
//! other cores have written, except every so many: handing over single keys between cores takes about as long as making
//! them.
//!
//! Nobody waits for a slot. A thread that finds its own in use goes on to the next; whoever looks through the slots
//! passes over one in use, as if its magazine were in the hands of the thread that uses it.
//!
//! The rules are apart from threads and clocks, so that they can be checked in many orders of events (`tests` below, by
//! `loom`): a key is handed out if nothing has changed in its KEK's versions and state since *before* it was made, and
//! if it is young enough. Whoever makes keys reads the number of changes first and the KEK afterwards
//! ([`Changes::then_read`]); whoever changes the KEK stores it first and counts afterwards ([`Changes::publish`]).

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU64, Ordering},
};

use atomic_refcell::AtomicRefCell;
use crossbeam::{queue::ArrayQueue, utils::CachePadded};

use crate::{kernel, keys::handle::Changes};

/// Keys of one batch. Never empty where others can find it.
pub(super) struct Magazine<T> {
    pub(super) keys: Vec<T>,
    /// The number of changes of the KEK before they were made, and when that was.
    pub(super) changes: u64,
    pub(super) made_ms: u64,
    /// Keys that were handed out and are not counted yet: a count that threads share would cost as much as all the
    /// rest.
    pub(super) uncounted: u64,
}

/// Where magazines wait.
pub(super) trait Shelf<M> {
    fn put(&self, magazine: M) -> Result<(), M>;
    fn take(&self) -> Option<M>;
    fn len(&self) -> usize;
    fn room(&self) -> usize;
}

impl<M> Shelf<M> for ArrayQueue<M> {
    fn put(&self, magazine: M) -> Result<(), M> {
        self.push(magazine)
    }

    fn take(&self) -> Option<M> {
        self.pop()
    }

    fn len(&self) -> usize {
        Self::len(self)
    }

    fn room(&self) -> usize {
        self.capacity() - Self::len(self)
    }
}

/// Where the magazine is of which a thread takes its keys.
pub(super) trait Place<M> {
    /// Works on what is there, alone. `None` if somebody else does so now.
    fn try_with<R>(&self, work: impl FnOnce(&mut Option<M>) -> R) -> Option<R>;
}

impl<M> Place<M> for AtomicRefCell<Option<M>> {
    #[inline]
    fn try_with<R>(&self, work: impl FnOnce(&mut Option<M>) -> R) -> Option<R> {
        self.try_borrow_mut().ok().map(|mut magazine| work(&mut magazine))
    }
}

/// Keys and the rules for them.
pub(super) struct Stock<T, Q, P, const SLOTS: usize> {
    shelf: Q,
    slots: [CachePadded<P>; SLOTS],
    max_age_ms: u64,
    taken: AtomicU64,
    expired: AtomicU64,
    drained: AtomicU64,
    keys: PhantomData<fn() -> T>,
}

impl<T, Q: Shelf<Magazine<T>>, P: Place<Magazine<T>> + Default, const SLOTS: usize>
    Stock<T, Q, P, SLOTS>
{
    /// `shelf` has room for all magazines that there may be.
    pub(super) fn new(shelf: Q, max_age_ms: u64) -> Self {
        Self {
            shelf,
            slots: std::array::from_fn(|_| CachePadded::default()),
            max_age_ms,
            taken: AtomicU64::new(0),
            expired: AtomicU64::new(0),
            drained: AtomicU64::new(0),
            keys: PhantomData,
        }
    }

    /// Takes a key that may be handed out, by way of slot `slot`. `None` if there is none. What may not be handed out
    /// is dropped on the way, and so wiped. `now_ms` is read before: a slot's atomic exchange lets nothing that comes
    /// after it begin earlier.
    #[inline]
    pub(super) fn take(&self, slot: usize, changes: &impl Changes, now_ms: u64) -> Taken<T> {
        let slot = slot % SLOTS;
        let own = &self.slots[slot];
        let taken = own.try_with(|magazine| self.take_of(magazine, changes, now_ms));
        taken.unwrap_or_else(|| self.take_beside(slot, changes, now_ms))
    }

    /// As [`Stock::take`], where the slot is in use.
    #[cold]
    #[inline(never)]
    fn take_beside(&self, slot: usize, changes: &impl Changes, now_ms: u64) -> Taken<T> {
        let others = (1..SLOTS).map(|more| &self.slots[(slot + more) % SLOTS]);
        let take =
            |slot: &CachePadded<P>| slot.try_with(|found| self.take_of(found, changes, now_ms));
        others.map(take).find_map(|taken| taken).unwrap_or_else(|| {
            // Every slot is in use.
            let mut magazine = None;
            let taken = self.take_of(&mut magazine, changes, now_ms);
            if let Some(mut rest) = magazine {
                self.count(&mut rest);
                self.put(rest);
            }
            taken
        })
    }

    /// Takes a key out of `magazine`, or out of the next one, which then takes its place.
    #[inline]
    fn take_of(
        &self,
        magazine: &mut Option<Magazine<T>>,
        changes: &impl Changes,
        now_ms: u64,
    ) -> Taken<T> {
        if let Some(found) = magazine
            && found.keys.len() > 1
            && self.is_good(found, changes, now_ms)
        {
            found.uncounted += 1;
            return Taken { key: found.keys.pop(), ended: false };
        }
        self.take_last_or_next(magazine, changes, now_ms)
    }

    /// As [`Stock::take_of`], where a magazine comes to its end or is not there.
    #[cold]
    #[inline(never)]
    fn take_last_or_next(
        &self,
        magazine: &mut Option<Magazine<T>>,
        changes: &impl Changes,
        now_ms: u64,
    ) -> Taken<T> {
        loop {
            let Some(found) = magazine.as_mut() else {
                *magazine = self.next();
                match magazine {
                    Some(_) => continue,
                    None => return Taken { key: None, ended: true },
                }
            };
            if !self.may_go_out(found, changes, now_ms) {
                *magazine = None;
                continue;
            }
            let key = found.keys.pop();
            found.uncounted += 1;
            if found.keys.is_empty() {
                self.count(found);
                *magazine = None;
            }
            return Taken { key, ended: true };
        }
    }

    /// A magazine from the queue, or else from another slot.
    #[cold]
    fn next(&self) -> Option<Magazine<T>> {
        let from = |slot: &CachePadded<P>| slot.try_with(Option::take).flatten();
        let next = self.shelf.take().or_else(|| self.slots.iter().find_map(from));
        if let Some(magazine) = &next {
            // Another core wrote the keys: all lines are waited for together, not each by the first key in it.
            let places = magazine.keys.as_ptr_range();
            for line in (places.start.addr()..places.end.addr()).step_by(64) {
                kernel::prefetch_at(line);
            }
        }
        next
    }

    /// Counts the keys that were handed out of a magazine.
    fn count(&self, magazine: &mut Magazine<T>) {
        self.taken.fetch_add(std::mem::take(&mut magazine.uncounted), Ordering::Relaxed);
    }

    /// Counts the keys that were handed out of the magazines in the slots, so that the numbers are those of the moment.
    pub(super) fn settle(&self) {
        for slot in &self.slots {
            slot.try_with(|magazine| magazine.as_mut().map(|magazine| self.count(magazine)));
        }
    }

    /// Puts a magazine on the shelf. Returns whether there was room; if not, its keys are dropped, and so wiped.
    pub(super) fn put(&self, magazine: Magazine<T>) -> bool {
        let put = self.shelf.put(magazine);
        if let Err(magazine) = &put {
            self.drained.fetch_add(magazine.keys.len() as u64, Ordering::Relaxed);
        }
        put.is_ok()
    }

    /// Magazines for which there is room now. Some may hold few keys, so that there is less room for more of them than
    /// the keys that wait tell.
    pub(super) fn room(&self) -> usize {
        self.shelf.room()
    }

    /// Drops, and so wipes, what may not be handed out any more.
    pub(super) fn sweep(&self, changes: &impl Changes, now_ms: u64) {
        for slot in &self.slots {
            slot.try_with(|magazine| {
                magazine.take_if(|magazine| !self.may_go_out(magazine, changes, now_ms))
            });
        }
        for _ in 0..self.shelf.len() {
            let Some(mut magazine) = self.shelf.take() else { return };
            if self.may_go_out(&mut magazine, changes, now_ms) {
                self.put(magazine);
            }
        }
    }

    /// Whether a magazine's keys may be handed out.
    #[inline]
    fn is_good(&self, magazine: &Magazine<T>, changes: &impl Changes, now_ms: u64) -> bool {
        magazine.changes == changes.now()
            && now_ms.saturating_sub(magazine.made_ms) < self.max_age_ms
    }

    /// Whether a magazine's keys may be handed out; counts them if not.
    fn may_go_out(&self, magazine: &mut Magazine<T>, changes: &impl Changes, now_ms: u64) -> bool {
        let is_good = self.is_good(magazine, changes, now_ms);
        if !is_good {
            self.count(magazine);
            let is_current = magazine.changes == changes.now();
            let count = if is_current { &self.expired } else { &self.drained };
            count.fetch_add(magazine.keys.len() as u64, Ordering::Relaxed);
        }
        is_good
    }

    /// Keys that were handed out and counted.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Keys that were dropped for their age.
    pub(super) fn expired(&self) -> u64 {
        self.expired.load(Ordering::Relaxed)
    }

    /// Keys that were dropped because their KEK changed.
    pub(super) fn drained(&self) -> u64 {
        self.drained.load(Ordering::Relaxed)
    }
}

/// What [`Stock::take`] found.
pub(super) struct Taken<T> {
    pub(super) key: Option<T>,
    /// Whether a magazine came to its end: a time to look how many there are.
    pub(super) ended: bool,
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use loom::{
        sync::{Arc, Mutex, atomic},
        thread,
    };

    use super::*;

    /// Runs `events` in every order in which threads are interrupted against their will twice at most: faults that need
    /// more are rare (M. Musuvathi and S. Qadeer, "Iterative context bounding", 2007), and all orders take minutes.
    fn model(events: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(events);
    }

    /// More than most tests fill.
    const LINE_ROOM: usize = 4;

    /// The queue, as far as its users know.
    struct Line<M>(Mutex<VecDeque<M>>);

    impl<M> Shelf<M> for Line<M> {
        fn put(&self, magazine: M) -> Result<(), M> {
            let mut line = self.0.lock().unwrap();
            if line.len() == LINE_ROOM {
                return Err(magazine);
            }
            line.push_back(magazine);
            Ok(())
        }

        fn room(&self) -> usize {
            LINE_ROOM - self.len()
        }

        fn take(&self) -> Option<M> {
            self.0.lock().unwrap().pop_front()
        }

        fn len(&self) -> usize {
            self.0.lock().unwrap().len()
        }
    }

    /// The cell, likewise.
    struct Spot<M>(Mutex<Option<M>>);

    impl<M> Default for Spot<M> {
        fn default() -> Self {
            Self(Mutex::new(None))
        }
    }

    impl<M> Place<M> for Spot<M> {
        fn try_with<R>(&self, work: impl FnOnce(&mut Option<M>) -> R) -> Option<R> {
            self.0.try_lock().ok().map(|mut magazine| work(&mut magazine))
        }
    }

    /// A KEK: the version that it wraps under, and the number of its changes.
    struct Kek {
        version: atomic::AtomicU64,
        changes: atomic::AtomicU64,
    }

    impl Changes for atomic::AtomicU64 {
        fn now(&self) -> u64 {
            self.load(atomic::Ordering::Acquire)
        }

        fn count(&self) {
            self.fetch_add(1, atomic::Ordering::Release);
        }
    }

    impl Kek {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                version: atomic::AtomicU64::new(1),
                changes: atomic::AtomicU64::new(0),
            })
        }

        /// Returns when the rotation is done, as `rotate_key` does.
        fn rotate(&self) {
            self.changes.publish(|| self.version.store(2, atomic::Ordering::Release), true);
        }

        /// Makes keys, each of which is the version that wrapped it.
        fn make(&self, count: usize) -> Magazine<u64> {
            let read = || self.version.load(atomic::Ordering::Acquire);
            let (changes, key) = self.changes.then_read(read);
            Magazine { keys: vec![key; count], changes, made_ms: 0, uncounted: 0 }
        }
    }

    type Modelled<const SLOTS: usize> = Stock<u64, Line<Magazine<u64>>, Spot<Magazine<u64>>, SLOTS>;

    fn stock<const SLOTS: usize>() -> Arc<Modelled<SLOTS>> {
        Arc::new(Stock::new(Line(Mutex::new(VecDeque::new())), 10))
    }

    fn take<const SLOTS: usize>(stock: &Modelled<SLOTS>, slot: usize, kek: &Kek) -> Option<u64> {
        stock.take(slot, &kek.changes, 0).key
    }

    fn magazine(keys: &[u64], changes: u64, made_ms: u64) -> Magazine<u64> {
        Magazine { keys: keys.to_vec(), changes, made_ms, uncounted: 0 }
    }

    /// In every order of a refill, a rotation, and takes that begin after the rotation has returned.
    #[test]
    fn after_a_rotation_no_stale_key_is_handed_out() {
        model(|| {
            let (stock, kek) = (stock::<1>(), Kek::new());
            let refill = thread::spawn({
                let (stock, kek) = (stock.clone(), kek.clone());
                move || {
                    stock.put(kek.make(2));
                    stock.put(kek.make(1));
                }
            });
            kek.rotate();
            for _ in 0..2 {
                if let Some(version) = take(&stock, 0, &kek) {
                    assert_eq!(version, 2, "a key of the version before the rotation");
                }
            }
            refill.join().unwrap();
            while let Some(version) = take(&stock, 0, &kek) {
                assert_eq!(version, 2, "a key of the version before the rotation");
            }
        });
    }

    /// In every order of two takers, of one slot and of two, and a sweep, with one magazine that is stale: each key
    /// goes to one of them.
    #[test]
    fn no_key_is_handed_out_twice_and_none_is_lost() {
        model(takers_and_a_sweep::<1>);
        model(takers_and_a_sweep::<2>);
    }

    fn takers_and_a_sweep<const SLOTS: usize>() {
        let (stock, kek) = (stock::<SLOTS>(), Kek::new());
        stock.put(magazine(&[7, 8], 0, 0));
        stock.put(magazine(&[9], 5, 0));
        let takers: Vec<_> = (0..2)
            .map(|slot| {
                let (stock, kek) = (stock.clone(), kek.clone());
                thread::spawn(move || take(&stock, slot, &kek))
            })
            .collect();
        stock.sweep(&kek.changes, 0);
        let mut all: Vec<_> =
            takers.into_iter().filter_map(|taker| taker.join().unwrap()).collect();
        all.extend(std::iter::from_fn(|| take(&stock, 0, &kek)));
        all.sort_unstable();
        assert_eq!((all, stock.drained(), stock.taken()), (vec![7, 8], 1, 2));
    }

    #[test]
    fn keys_expire_at_their_age() {
        model(|| {
            let (stock, kek) = (stock::<2>(), Kek::new());
            for (key, made_ms) in [(1, 0), (2, 5), (3, 6)] {
                stock.put(magazine(&[key, key], 0, made_ms));
            }
            assert_eq!(stock.take(0, &kek.changes, 15).key, Some(3), "others are ten old");
            assert_eq!((stock.expired(), stock.drained(), stock.taken()), (4, 0, 0));
            stock.settle();
            assert_eq!(stock.taken(), 1);
            stock.sweep(&kek.changes, 16);
            assert_eq!((stock.expired(), stock.taken()), (5, 1));
            assert!(take(&stock, 1, &kek).is_none());
        });
    }

    /// A thread that finds nothing in its slot and in the queue takes what is in the slot of another.
    #[test]
    fn a_key_is_found_in_whatever_slot_it_is() {
        model(|| {
            let (stock, kek) = (stock::<2>(), Kek::new());
            stock.put(magazine(&[4, 5, 6], 0, 0));
            assert_eq!(take(&stock, 0, &kek), Some(6));
            assert_eq!([1, 0, 1].map(|slot| take(&stock, slot, &kek)), [Some(5), Some(4), None]);
        });
    }

    /// A thread that finds every slot in use puts back what it does not take, and whoever has no room is told.
    #[test]
    fn keys_are_neither_lost_nor_handed_out_twice_where_slots_are_in_use() {
        model(|| {
            let (stock, kek) = (stock::<1>(), Kek::new());
            for key in 0..LINE_ROOM as u64 {
                assert!(stock.put(magazine(&[2 * key, 2 * key + 1], 0, 0)));
            }
            assert_eq!(stock.room(), 0);
            let mut taken = stock.slots[0]
                .try_with(|_| (0..3).map(|_| take(&stock, 0, &kek).unwrap()).collect::<Vec<_>>());
            let taken = taken.as_mut().unwrap();
            assert_eq!((stock.room(), stock.taken()), (0, 3), "three are thinner, none is empty");
            assert!(!stock.put(magazine(&[98, 99], 0, 0)));
            assert_eq!(stock.drained(), 2);
            taken.extend(std::iter::from_fn(|| take(&stock, 0, &kek)));
            taken.sort_unstable();
            assert_eq!(*taken, (0..2 * LINE_ROOM as u64).collect::<Vec<_>>());
            assert_eq!(stock.room(), LINE_ROOM);
        });
    }
}
