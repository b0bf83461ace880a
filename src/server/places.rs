//! Places for connections: how many there may be at once, and who makes room when there are no more.
//!
//! A connection is *proven* once a request of it was authenticated and has come whole. Those that are not, in whatever
//! stage they are, cost a stranger nothing, so they are the first to go: the newcomer's own address gives up its oldest
//! if it has its share, else the oldest of all goes. After them come proven ones that have had nothing to do for a
//! while. Only when every connection is at work does a newcomer wait.
//!
//! The share of an address counts only when places run out, and never for loopback: proxies and side-cars share one.
//! The lock is taken when a connection begins, is proven, and ends, not for requests.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::sync::Notify;

use crate::limits::{SERVER_SOURCE_IPV6_BITS, SERVER_SPARE_IDLE_TIME};

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    max: usize,
    /// Most unproven connections of one source when places run out.
    source_max: usize,
    began: Instant,
    taken: Mutex<Taken>,
    /// A place became free, or a connection can be told to make room that could not before.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    /// How many there may be now: fewer than configured after file descriptors ran out.
    max: usize,
    next: u64,
    /// By age.
    all: BTreeMap<u64, Entry>,
    /// Those that are neither proven nor told to go, by age.
    unproven: BTreeMap<u64, Option<Source>>,
    by_source: HashMap<Source, BTreeSet<u64>>,
    /// Those that were told to go and are not gone yet.
    leaving: usize,
}

#[derive(Debug)]
struct Entry {
    signals: Arc<Signals>,
    is_leaving: bool,
}

/// What a connection and its places tell each other.
#[derive(Debug)]
struct Signals {
    leave: Notify,
    /// Milliseconds since `Places::began` at which a proven connection last had something to do, `BUSY`, or `UNPROVEN`.
    rests_since: AtomicU64,
}

const BUSY: u64 = u64::MAX;
const UNPROVEN: u64 = u64::MAX - 1;

/// Where a connection comes from, as far as shares are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(u128);

impl Source {
    fn of(remote: SocketAddr) -> Option<Self> {
        let address = remote.ip().to_canonical();
        if address.is_loopback() {
            return None;
        }
        Some(Self(match address {
            IpAddr::V4(address) => u32::from(address).into(),
            IpAddr::V6(address) => u128::from(address) >> (128 - SERVER_SOURCE_IPV6_BITS) << 64,
        }))
    }
}

/// The place of a connection. Free again when dropped.
#[derive(Debug)]
pub(super) struct Place(Seat);

/// What the requests of a connection tell its place, also after it was left.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    places: Arc<Places>,
    number: u64,
    signals: Arc<Signals>,
}

impl Places {
    pub(super) fn new(max: usize, source_max: usize) -> Arc<Self> {
        let max = max.max(1);
        Arc::new(Self {
            max,
            source_max: source_max.max(1),
            began: Instant::now(),
            taken: Mutex::new(Taken { max, ..Taken::default() }),
            changed: Notify::new(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection from `remote`, once there is one. Can be dropped and asked for again.
    pub(super) async fn take(self: &Arc<Self>, remote: SocketAddr) -> Place {
        loop {
            let changed = self.changed.notified();
            if let Some(place) = self.try_take(remote) {
                return place;
            }
            // Proven connections become spare by the mere passing of time.
            let _ = tokio::time::timeout(SERVER_SPARE_IDLE_TIME / 4, changed).await;
        }
    }

    /// A place, or `None`: then somebody was told to make room, if there is anybody.
    fn try_take(self: &Arc<Self>, remote: SocketAddr) -> Option<Place> {
        let mut taken = self.taken();
        let source = Source::of(remote);
        if taken.all.len() >= taken.max {
            if taken.all.len() - taken.leaving >= taken.max {
                self.evict(&mut taken, source);
            }
            return None;
        }
        let number = taken.next;
        taken.next += 1;
        let signals = Signals { leave: Notify::new(), rests_since: AtomicU64::new(UNPROVEN) };
        let signals = Arc::new(signals);
        taken.all.insert(number, Entry { signals: Arc::clone(&signals), is_leaving: false });
        taken.unproven.insert(number, source);
        if let Some(source) = source {
            taken.by_source.entry(source).or_default().insert(number);
        }
        Some(Place(Seat { places: Arc::clone(self), number, signals }))
    }

    /// Tells a connection to go, since file descriptors ran out, and counts with fewer from now on. Returns whether
    /// there was one.
    pub(super) fn make_room(&self) -> bool {
        let mut taken = self.taken();
        taken.max = taken.max.min(taken.all.len()).saturating_sub(1).max(1);
        taken.leaving > 0 || self.evict(&mut taken, None)
    }

    /// Counts with a few more again, up to what is configured.
    pub(super) fn recover(&self) {
        let mut taken = self.taken();
        taken.max = self.max.min(taken.max + (self.max / 64).max(1));
    }

    fn evict(&self, taken: &mut Taken, newcomer: Option<Source>) -> bool {
        let own = newcomer.and_then(|source| taken.by_source.get(&source));
        let own = own.filter(|own| own.len() >= self.source_max);
        let oldest = own
            .and_then(|own| own.first().copied())
            .or_else(|| taken.unproven.first_key_value().map(|(number, _)| *number))
            .or_else(|| self.longest_at_rest(taken));
        let Some(number) = oldest else { return false };
        taken.no_longer_unproven(number);
        let entry = taken.all.get_mut(&number).expect("it has a place");
        entry.is_leaving = true;
        taken.leaving += 1;
        entry.signals.leave.notify_one();
        true
    }

    /// The proven connection that has done nothing for longest. Looks at each, which happens only when all are proven.
    fn longest_at_rest(&self, taken: &Taken) -> Option<u64> {
        let now = self.now();
        let spare = u64::try_from(SERVER_SPARE_IDLE_TIME.as_millis()).unwrap_or(u64::MAX);
        taken
            .all
            .iter()
            .filter(|(_, entry)| !entry.is_leaving)
            .map(|(number, entry)| (entry.signals.rests_since.load(Ordering::Relaxed), *number))
            .filter(|(since, _)| *since < UNPROVEN && now.saturating_sub(*since) >= spare)
            .min()
            .map(|(_, number)| number)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }
}

impl Taken {
    fn no_longer_unproven(&mut self, number: u64) {
        let Some(Some(source)) = self.unproven.remove(&number) else { return };
        if let Some(own) = self.by_source.get_mut(&source) {
            own.remove(&number);
            if own.is_empty() {
                self.by_source.remove(&source);
            }
        }
    }
}

impl Place {
    pub(super) fn seat(&self) -> Seat {
        self.0.clone()
    }

    /// Waits until this connection has to make room for another.
    pub(super) async fn must_leave(&self) {
        self.0.signals.leave.notified().await;
    }

    /// Stays all the same, since there is work that came when the word to leave was on its way.
    pub(super) fn stay(&self) {
        let mut taken = self.0.places.taken();
        if let Some(entry) = taken.all.get_mut(&self.0.number)
            && mem::take(&mut entry.is_leaving)
        {
            taken.leaving -= 1;
        }
        drop(taken);
        self.0.places.changed.notify_one();
    }
}

impl Seat {
    pub(super) fn is_proven(&self) -> bool {
        self.signals.rests_since.load(Ordering::Relaxed) != UNPROVEN
    }

    /// A request of this connection was authenticated and has come whole.
    pub(super) fn prove(&self) {
        if !self.is_proven() {
            self.signals.rests_since.store(BUSY, Ordering::Relaxed);
            self.places.taken().no_longer_unproven(self.number);
        }
    }

    /// Tells since when the connection has had nothing to do, or that it has.
    pub(super) fn rests(&self, since: Option<Instant>) {
        if !self.is_proven() {
            return;
        }
        let since = since.map(|since| since.saturating_duration_since(self.places.began));
        let since = since.map_or(BUSY, |since| u64::try_from(since.as_millis()).unwrap_or(0));
        self.signals.rests_since.store(since, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Seat { places, number, .. } = &self.0;
        let mut taken = places.taken();
        taken.no_longer_unproven(*number);
        if taken.all.remove(number).is_some_and(|entry| entry.is_leaving) {
            taken.leaving -= 1;
        }
        drop(taken);
        places.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn told_to_leave(place: &Place) -> bool {
        place.0.places.taken().all[&place.0.number].is_leaving
    }

    fn from(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().unwrap(), 1)
    }

    #[test]
    fn the_oldest_that_proved_nothing_makes_room_first() {
        let long_ago = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
        let mut places = Places::new(3, 100);
        Arc::get_mut(&mut places).unwrap().began = long_ago;
        let take = || places.try_take(from("127.0.0.1"));
        let (proven, old, young) = (take().unwrap(), take().unwrap(), take().unwrap());
        proven.seat().prove();
        assert!(take().is_none() && take().is_none(), "one leaves for one place");
        let leaving = |which: [&Place; 3]| which.map(told_to_leave);
        assert_eq!(leaving([&proven, &old, &young]), [false, true, false]);
        drop(old);
        let next = take().unwrap();
        next.seat().prove();
        assert!(take().is_none());
        assert_eq!(leaving([&proven, &young, &next]), [false, true, false]);
        drop(young);
        let last = take().unwrap();
        last.seat().prove();
        // Everybody is at work.
        assert!(take().is_none() && !places.make_room());
        next.seat().rests(Some(Instant::now()));
        assert!(take().is_none() && !told_to_leave(&next), "it has only just ended its work");
        next.seat().rests(Some(long_ago));
        assert!(take().is_none());
        assert_eq!(leaving([&proven, &next, &last]), [false, true, false]);
    }

    #[test]
    fn an_address_with_its_share_makes_room_for_itself() {
        for (stranger, same, honest) in [
            ("192.0.2.1", "192.0.2.1", "192.0.2.2"),
            ("2001:db8:0:1::1", "2001:db8:0:1:ffff::9", "2001:db8:0:2::1"),
            ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"),
        ] {
            let places = Places::new(4, 2);
            let take = |address| places.try_take(from(address)).unwrap();
            let first = take(honest);
            let (second, third, fourth) = (take(stranger), take(same), take(stranger));
            assert!(places.try_take(from(same)).is_none());
            assert!(told_to_leave(&second) && !told_to_leave(&first), "{stranger}");
            drop(second);
            let fifth = take(same);
            assert!(places.try_take(from(honest)).is_none());
            assert!(told_to_leave(&first), "who has no share yet takes the oldest place of all");
            drop((first, third, fourth, fifth));
            let taken = places.taken();
            assert!(
                taken.all.is_empty() && taken.unproven.is_empty() && taken.by_source.is_empty()
            );
        }
        // Loopback has no share.
        let places = Places::new(2, 1);
        let other = places.try_take(from("192.0.2.1")).unwrap();
        let local = places.try_take(from("127.0.0.1")).unwrap();
        assert!(places.try_take(from("127.0.0.1")).is_none());
        assert!(told_to_leave(&other) && !told_to_leave(&local));
    }

    #[test]
    fn there_are_fewer_places_while_file_descriptors_are_short() {
        let places = Places::new(100, 100);
        let take = || places.try_take(from("127.0.0.1"));
        let mut taken: Vec<_> = (0..10).map(|_| take().unwrap()).collect();
        assert!(places.make_room());
        assert!(told_to_leave(&taken[0]) && take().is_none());
        taken.remove(0);
        // The tenth descriptor is left to others.
        assert!(take().is_none() && told_to_leave(&taken[0]));
        taken.remove(0);
        taken.push(take().unwrap());
        places.recover();
        assert!(take().is_some());
        (0..200).for_each(|_| places.recover());
        assert_eq!(places.taken().max, 100);
    }

    #[tokio::test]
    async fn a_newcomer_waits_until_there_is_a_place() {
        let places = Places::new(1, 1);
        let first = places.take(from("127.0.0.1")).await;
        first.seat().prove();
        let (places, waiter) = (Arc::clone(&places), Arc::clone(&places));
        let second = tokio::spawn(async move { waiter.take(from("127.0.0.1")).await });
        tokio::task::yield_now().await;
        drop(first);
        drop(second.await.unwrap());
        assert_eq!(places.taken().leaving, 0);
        let unproven = places.take(from("127.0.0.1")).await;
        assert!(places.make_room() && places.make_room());
        assert_eq!(places.taken().leaving, 1);
        unproven.must_leave().await;
        unproven.stay();
        assert_eq!(places.taken().leaving, 0);
    }
}
