//! Settings of an engine, and the ways to open one.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{Clock, Config, Engine, MonotonicClock};
use crate::{
    cpu::Tier,
    error::{Error, Result},
    limits::{LEASE_MAX, RECYCLED_BYTES_DEFAULT, STALE_MAX_DEFAULT, WRAPS_PER_VERSION_MAX},
    os,
    rng::Rng,
    store::{KeyStore, MemoryStore, RootKey, SqliteStore},
};

/// Settings of an engine: thread pool, clock, and the sizes that tests inject.
#[must_use]
pub struct EngineBuilder {
    clock: Option<Clock>,
    pool: Option<Arc<rayon::ThreadPool>>,
    lease_max: u64,
    initial_spent: u64,
    due_work: DueWork,
    recycled_bytes_max: usize,
    stale_max: Duration,
    monotonic: Option<MonotonicClock>,
    tier: Option<Tier>,
}

/// When an engine executes due rotations and deletions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DueWork {
    /// Every minute, and rotations also when it opens. Deletions once the engine has watched its clock for a day: see
    /// [`Engine::run_due`].
    #[default]
    ByItself,
    /// When [`Engine::run_due`] is called.
    OnRequest,
}

impl Default for EngineBuilder {
    fn default() -> Self {
        Self {
            clock: None,
            pool: None,
            lease_max: LEASE_MAX,
            initial_spent: 0,
            due_work: DueWork::ByItself,
            recycled_bytes_max: RECYCLED_BYTES_DEFAULT,
            stale_max: STALE_MAX_DEFAULT,
            monotonic: None,
            tier: None,
        }
    }
}

impl std::fmt::Debug for EngineBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineBuilder")
            .field("lease_max", &self.lease_max)
            .field("initial_spent", &self.initial_spent)
            .finish_non_exhaustive()
    }
}

impl EngineBuilder {
    /// Runs large batches on this pool instead of rayon's global one.
    ///
    /// A batch waits until threads of the pool are free to help with it: where the global pool is busy for long with
    /// other work, an engine should have its own.
    ///
    /// Needed in a forked child whose parent had started rayon's global pool before any engine: that pool has no
    /// workers in the child, and nothing tells. (A child of a process with engines works on the caller's thread.)
    pub fn thread_pool(mut self, pool: Arc<rayon::ThreadPool>) -> Self {
        self.pool = Some(pool);
        self
    }

    /// The clock by which keys are dated, rotated and deleted. The wall clock unless set.
    pub fn clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.clock = Some(Box::new(clock));
        self
    }

    /// When due rotations and deletions are executed: by itself unless set.
    pub fn due_work(mut self, when: DueWork) -> Self {
        self.due_work = when;
        self
    }

    /// Most wraps that a lease of a `Direct` version takes from the store beyond what a call needs: at most 2^20, which
    /// is the default. A crash wastes what is leased; 0 asks the store in every call.
    pub fn lease_max(mut self, wraps: u64) -> Self {
        self.lease_max = wraps.min(LEASE_MAX);
        self
    }

    /// Most bytes of memory that the engine keeps from batches that are gone, zeroed, for the next ones: 128 MiB unless
    /// set, which is a million results; 0 keeps none. New memory costs more than what is written into it.
    pub fn recycled_bytes_max(mut self, bytes: usize) -> Self {
        self.recycled_bytes_max = bytes;
        self
    }

    /// How long the engine goes on with what it last read of a store in a file that cannot be read or does not answer:
    /// 60 seconds unless set. Then every operation on data keys is refused with `ServiceUnavailableTemporary` until the
    /// store can be read again, since keys and clients may have been disabled meanwhile. A file that was replaced or
    /// removed is refused at once. Engines in memory never refuse.
    pub fn stale_max(mut self, time: Duration) -> Self {
        self.stale_max = time;
        self
    }

    /// The clock that goes steadily, in milliseconds.
    #[cfg(test)]
    pub(crate) fn monotonic(mut self, clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        self.monotonic = Some(Box::new(clock));
        self
    }

    /// The wraps that new `Direct` versions count as spent from the start: 0 unless set. For tests of the bound.
    pub fn initial_spent(mut self, wraps: u64) -> Self {
        self.initial_spent = wraps.min(WRAPS_PER_VERSION_MAX);
        self
    }

    /// The widest tier whose kernels to use: the best of this CPU unless set. Lowers the choice and never raises it;
    /// where `KEYMILL_TIER` asks for a lower one, that one is taken.
    ///
    /// ```
    /// # fn main() -> keymill::Result<()> {
    /// use keymill::{Engine, Tier};
    ///
    /// let engine = Engine::builder().tier(Tier::at_most("aesni")?).in_memory()?;
    /// assert!(engine.tier() <= Tier::at_most("aesni")?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn tier(mut self, widest: Tier) -> Self {
        self.tier = Some(widest);
        self
    }

    /// As [`Engine::open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(self, store: impl AsRef<Path>, root_key: &RootKey) -> Result<Engine> {
        let tier = self.lowered_tier()?;
        let store = SqliteStore::open(store.as_ref(), root_key, tier)?;
        self.start(Box::new(store), Rng::Os(tier), tier)
    }

    /// As [`Engine::create`].
    ///
    /// # Errors
    /// As there.
    pub fn create(self, store: impl AsRef<Path>, root_key: &RootKey) -> Result<Engine> {
        let tier = self.lowered_tier()?;
        let rng = Rng::Os(tier);
        let store = SqliteStore::create(store.as_ref(), root_key, &rng)?;
        self.start(Box::new(store), rng, tier)
    }

    /// As [`Engine::in_memory`].
    ///
    /// # Errors
    /// As there.
    pub fn in_memory(self) -> Result<Engine> {
        let tier = self.lowered_tier()?;
        self.start(Box::new(MemoryStore::new()), Rng::Os(tier), tier)
    }

    /// As [`Engine::deterministic`], with these settings.
    ///
    /// # Errors
    /// As there.
    #[cfg(any(feature = "deterministic", fuzzing, test))]
    pub fn deterministic(self, seed: [u8; 32]) -> Result<Engine> {
        let tier = self.lowered_tier()?;
        self.start(Box::new(MemoryStore::new()), Rng::seeded(tier, seed), tier)
    }

    fn lowered_tier(&self) -> Result<Tier> {
        let detected = Tier::detect()?;
        Ok(self.tier.map_or(detected, |widest| widest.min(detected)))
    }

    pub(super) fn start(self, store: Box<dyn KeyStore>, rng: Rng, tier: Tier) -> Result<Engine> {
        let Self { clock, pool, lease_max, initial_spent, due_work, .. } = self;
        let Self { recycled_bytes_max, stale_max, monotonic, .. } = self;
        if pool.as_ref().is_some_and(|pool| pool.current_num_threads() == 0) {
            return Err(Error::invalid("The thread pool has no threads."));
        }
        // A deterministic engine must not depend on the time, nor on the times of background work.
        let background = !rng.is_deterministic();
        let clock = clock.unwrap_or_else(|| match background {
            true => Box::new(SystemTime::now),
            false => Box::new(|| SystemTime::UNIX_EPOCH),
        });
        let config = Config {
            clock,
            pool,
            lease_max,
            initial_spent,
            due_work,
            recycled_bytes_max,
            stale_max,
            monotonic: monotonic.unwrap_or_else(|| Box::new(os::coarse_ms)),
            background,
        };
        Engine::start(store, rng, tier, config)
    }
}
