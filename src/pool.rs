//! Pre-generated data keys: a bounded queue for one KEK, one length and one AAD, refilled in the background.
//!
//! `stock` has the rules by which a key is handed out or dropped; `config` has what a
//! pool is told; this file has the pool, its thread, and its numbers.
//!
//! What others got wrong here, and what this pool does instead (Hadoop KMS's `ValueQueue`): the first access does not
//! wait until the queue is full (HDFS-11885), it generates directly; one bad key does not fail the pools of others
//! (HDFS-13603), since each pool has a thread of its own; a rotation does not leave keys of the old version to be
//! handed out until the queue has drained, since every key is checked when it is taken; there is no lock on the way to
//! a key (HADOOP-20045); and capacity, age and the number of keys of one call are bounded.
//!
//! # Forks
//! What waits in a pool belongs to one process. A child abandons the queue and the thread that it inherited, and its
//! first `take` starts a pool of its own. Where forks cannot be told no keys are kept: every `take` generates.

mod config;
mod stock;

use std::{
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use atomic_refcell::AtomicRefCell;
use crossbeam::{
    channel::{self, Receiver, RecvTimeoutError, Sender},
    queue::ArrayQueue,
};

use crate::{
    batch::{check_item_count, data_key::DataKey, result::DataKeyBatch},
    engine::Engine,
    error::{Error, Result},
    keys::{
        KeyHandle,
        handle::{Changes, KeyCell},
    },
    limits::{KEY_POOL_BACKOFF_MAX, KEY_POOL_BATCH_ITEMS, KEY_POOL_TICK},
    os::{self, Generation, PerProcess},
    request::aads::SameAad,
};
pub use config::KeyPoolConfig;
use stock::{Magazine, Stock};

/// The numbers of a [`KeyPool`], since it was made (in a forked child: since the child's first use).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct KeyPoolMetrics {
    /// Keys that wait.
    pub depth: usize,
    /// Most keys that may wait.
    pub capacity: usize,
    /// Keys that were handed out from the queue.
    pub hits: u64,
    /// Keys that were generated directly, since none waited.
    pub misses: u64,
    /// Batches that were made for the queue.
    pub refills: u64,
    /// Time that these took together.
    pub refill_time: Duration,
    /// Batches that failed.
    pub refill_failures: u64,
    /// Why the last batch failed; `None` if it did not.
    pub last_error: Option<Error>,
    /// Keys that were dropped for their age.
    pub expired: u64,
    /// Keys that were dropped because their KEK was rotated, disabled or deleted.
    pub drained: u64,
}

/// Data keys ahead of need, for one KEK, one length and one AAD. `Send` and `Sync`; share it in an `Arc`.
///
/// [`KeyPool::take`] hands a key out at once, and generates one directly when none waits: it neither blocks nor fails
/// for want of a stock. No key is handed out that was made before its KEK was rotated, disabled or deleted: at once
/// where this engine did that, within a second where another process did. Nor is one that is older than the maximum
/// age.
///
/// The plaintexts that wait are wiped when they expire, when their KEK changes (both within a fraction of a second) and
/// when the pool is dropped. They lie in ordinary memory; SECURITY.md says what a pool means for cloned virtual
/// machines. Each pool has a thread, which sleeps while the pool is full. Keys of a `Direct` KEK count as wraps
/// when they are made, whether they are ever taken or not.
///
/// ```
/// use keymill::{CreateKey, Engine, KeyPool, KeyPoolConfig, Operation};
///
/// let engine = Engine::in_memory()?;
/// engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
/// let key = engine.key("alias/app")?;
/// let config = KeyPoolConfig::new(Operation::AdvanceGenerateDataKey, 32).aad(b"volume-7");
/// let pool = KeyPool::new(&engine, &key, config)?;
/// let page_key = pool.take()?;
/// assert_eq!(page_key.plaintext().expect("asked for").len(), 32);
/// # Ok::<(), keymill::Error>(())
/// ```
pub struct KeyPool {
    maker: Maker,
    /// The keys of the process that made the pool, without a look into `later`.
    first: Option<Running>,
    home: Generation,
    /// Those of its children, each in its own.
    later: PerProcess<Option<Running>>,
}

/// What makes keys.
#[derive(Clone)]
struct Maker {
    engine: Engine,
    handle: KeyHandle,
    cell: Arc<KeyCell>,
    config: KeyPoolConfig,
}

type Full = Magazine<DataKey>;

/// A pool in one process.
struct Running {
    shared: Arc<Keys>,
    wake: Sender<()>,
    woken: Receiver<()>,
    /// Whether the system has given a thread. Without one every key is generated when it is taken.
    has_thread: AtomicBool,
    thread: Mutex<Thread>,
}

/// The thread of a pool, and when the system was last asked for it.
struct Thread {
    handle: Option<JoinHandle<()>>,
    asked: Instant,
}

/// What the pool and its thread share.
struct Keys {
    /// Pointers, so that a key that another core made is not fetched before it is read.
    stock: Stock<DataKey, ArrayQueue<Full>, AtomicRefCell<Option<Full>>, SLOTS>,
    low_watermark: u64,
    /// Whether the thread was told to refill and has not begun to.
    woken: AtomicBool,
    misses: AtomicU64,
    made: AtomicU64,
    refills: AtomicU64,
    refill_ns: AtomicU64,
    failures: AtomicU64,
    last_error: ArcSwapOption<Error>,
}

impl KeyPool {
    /// Makes a pool and returns at once: it fills in the background.
    ///
    /// # Errors
    /// `InvalidParameter` for lengths, a capacity, a low watermark or an age outside their limits, and for a handle of
    /// another engine. Without a thread every key is generated when it is taken. The state of the KEK is looked at when
    /// keys are made: see [`KeyPoolMetrics::last_error`].
    pub fn new(engine: &Engine, key: &KeyHandle, config: KeyPoolConfig) -> Result<Self> {
        let cell = Arc::clone(key.of_engine(engine.number())?);
        config.check()?;
        let maker = Maker { engine: engine.clone(), handle: key.clone(), cell, config };
        let home = os::generation();
        let first = os::can_keep_state().then(|| Running::start(&maker));
        Ok(Self { maker, first, home, later: PerProcess::empty() })
    }

    /// Takes a key, or generates one if none waits.
    ///
    /// # Errors
    /// Those of [`Engine::generate_data_key`], if one had to be generated.
    pub fn take(&self) -> Result<DataKey> {
        loop {
            let generation = os::generation();
            let found = self.with_keys(generation, |running| running.take(&self.maker));
            // Forked meanwhile: what was taken may be the other process's too.
            if os::generation() != generation {
                std::mem::forget(found);
                continue;
            }
            return match found {
                Some(key) => Ok(key),
                None => self.maker.one(),
            };
        }
    }

    /// Takes `count` keys; what the stock lacks is generated in one batch. None for a `count` of 0.
    ///
    /// # Errors
    /// `Rejected.LimitExceeded` for more than 1,048,576 keys; those of [`Engine::generate_data_key`] if some had to be
    /// generated. The keys that were taken are wiped then.
    pub fn take_many(&self, count: usize) -> Result<Vec<DataKey>> {
        check_item_count(count)?;
        loop {
            let generation = os::generation();
            let mut taken = Vec::new();
            self.with_keys(generation, |running| {
                let next = || running.take(&self.maker);
                taken.extend(std::iter::from_fn(next).take(count));
                let missing = (count - taken.len()) as u64;
                // The first that was not there is counted.
                running.shared.misses.fetch_add(missing.saturating_sub(1), Ordering::Relaxed);
                None::<DataKey>
            });
            if taken.len() < count {
                let missing = count - taken.len();
                let mut batch = DataKeyBatch::default();
                self.maker.batch(&mut batch, missing)?;
                for key in batch.iter() {
                    taken.push(key?.detach());
                }
            }
            // Forked meanwhile, also while the missing ones were made: what was taken may be the other process's too.
            if os::generation() != generation {
                std::mem::forget(taken);
                continue;
            }
            return Ok(taken);
        }
    }

    /// The numbers of the pool.
    pub fn metrics(&self) -> KeyPoolMetrics {
        let mut metrics =
            KeyPoolMetrics { capacity: self.maker.config.capacity, ..KeyPoolMetrics::default() };
        self.with_keys(os::generation(), |running| {
            running.shared.report(&mut metrics);
            None::<DataKey>
        });
        metrics
    }

    /// The KEK's handle.
    pub fn key(&self) -> &KeyHandle {
        &self.maker.handle
    }

    /// Does `work` with this process's keys, if there are any.
    fn with_keys<T>(
        &self,
        generation: Generation,
        work: impl FnOnce(&Running) -> Option<T>,
    ) -> Option<T> {
        if generation == self.home {
            return self.first.as_ref().and_then(work);
        }
        // Without a thread a child generates directly.
        let start = |_: Option<&Option<Running>>| match os::can_keep_state() {
            true => Some(Running::start(&self.maker)),
            false => None,
        };
        self.later.get_or(start).as_ref().and_then(work)
    }
}

impl Drop for KeyPool {
    fn drop(&mut self) {
        let generation = os::generation();
        if let Some(first) = self.first.take() {
            if generation == self.home {
                drop(first);
            } else {
                std::mem::forget(first);
            }
        }
    }
}

impl std::fmt::Debug for KeyPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyPool")
            .field("key", &self.maker.handle)
            .field("config", &self.maker.config)
            .finish_non_exhaustive()
    }
}

impl Maker {
    fn one(&self) -> Result<DataKey> {
        let KeyPoolConfig { operation, number_of_bytes, aad, .. } = &self.config;
        self.engine.generate_by_handle(&self.handle, *number_of_bytes, aad, *operation)
    }

    fn batch(&self, batch: &mut DataKeyBatch, count: usize) -> Result<()> {
        let KeyPoolConfig { operation, number_of_bytes, aad, .. } = &self.config;
        let aads = SameAad(&aad[..]);
        let key = &self.handle;
        self.engine.generate_data_keys_into(batch, *operation, key, *number_of_bytes, count, aads)
    }
}

impl Running {
    /// Starts the thread, which begins to fill the pool.
    fn start(maker: &Maker) -> Self {
        let config = &maker.config;
        let shared = Arc::new(Keys {
            stock: Stock::new(
                ArrayQueue::new(config.capacity.div_ceil(config.magazine()) + 2 * SLOTS),
                config.max_age_ms(),
            ),
            low_watermark: config.watermark() as u64,
            woken: AtomicBool::new(true),
            misses: AtomicU64::new(0),
            made: AtomicU64::new(0),
            refills: AtomicU64::new(0),
            refill_ns: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            last_error: ArcSwapOption::empty(),
        });
        let (wake, woken) = channel::bounded(1);
        let thread = Mutex::new(Thread { handle: None, asked: Instant::now() });
        let has_thread = AtomicBool::new(false);
        let running = Self { shared, wake, woken, has_thread, thread };
        if let Err(error) = running.spawn(maker, &mut running.thread()) {
            log::warn!("a key pool has no thread and keeps no keys until it gets one: {error}");
        }
        running
    }

    fn thread(&self) -> MutexGuard<'_, Thread> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, maker: &Maker, thread: &mut Thread) -> io::Result<()> {
        thread.asked = Instant::now();
        let mut refiller =
            Refiller::new(maker.clone(), Arc::clone(&self.shared), self.woken.clone());
        let run = move || refiller.run();
        thread.handle = Some(thread::Builder::new().name("keymill-pool".into()).spawn(run)?);
        self.has_thread.store(true, Ordering::Release);
        Ok(())
    }

    /// Asks the system again for the thread that it did not give, now and then.
    fn spawn_late(&self, maker: &Maker) {
        // Whoever comes meanwhile need not wait.
        let Ok(mut thread) = self.thread.try_lock() else { return };
        let waited = thread.asked.elapsed() >= KEY_POOL_BACKOFF_MAX;
        if thread.handle.is_none() && waited && self.spawn(maker, &mut thread).is_ok() {
            log::info!("a key pool has its thread now");
        }
    }

    #[inline(always)]
    fn take(&self, maker: &Maker) -> Option<DataKey> {
        let keys = &*self.shared;
        let taken = keys.stock.take(os::thread_number(), maker.cell.changes(), os::coarse_ms());
        if taken.ended {
            self.look(taken.key.is_none(), maker);
        }
        taken.key
    }

    /// Wakes the thread if there are too few keys. `missed` tells that there was none at all.
    #[cold]
    fn look(&self, missed: bool, maker: &Maker) {
        let keys = &*self.shared;
        if !self.has_thread.load(Ordering::Acquire) {
            self.spawn_late(maker);
        }
        if missed {
            keys.misses.fetch_add(1, Ordering::Relaxed);
        }
        if keys.depth() < keys.low_watermark && !keys.woken.swap(true, Ordering::Relaxed) {
            // One message is enough.
            let _ = self.wake.try_send(());
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The thread ends when there is nobody to wake it.
        self.wake = channel::bounded(0).0;
        if let Some(thread) = self.thread().handle.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a key pool panicked");
        }
    }
}

impl Keys {
    fn report(&self, metrics: &mut KeyPoolMetrics) {
        let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
        self.stock.settle();
        metrics.depth = usize::try_from(self.depth()).unwrap_or(usize::MAX);
        metrics.hits = self.stock.taken();
        metrics.misses = count(&self.misses);
        metrics.refills = count(&self.refills);
        metrics.refill_time = Duration::from_nanos(count(&self.refill_ns));
        metrics.refill_failures = count(&self.failures);
        metrics.last_error = self.last_error.load().as_ref().map(|error| Error::clone(error));
        (metrics.expired, metrics.drained) = (self.stock.expired(), self.stock.drained());
    }

    /// Keys that wait: what was made and neither handed out nor dropped. Too many by what is not counted yet, which is
    /// less than a magazine for each slot.
    fn depth(&self) -> u64 {
        let gone = self.stock.taken() + self.stock.expired() + self.stock.drained();
        self.made.load(Ordering::Relaxed).saturating_sub(gone)
    }
}

/// The thread of a pool.
struct Refiller {
    maker: Maker,
    keys: Arc<Keys>,
    woken: Receiver<()>,
    batch: DataKeyBatch,
    backoff: Option<Backoff>,
}

/// Magazines in use at once, each by the threads of one slot.
const SLOTS: usize = 16;

/// After a failure.
struct Backoff {
    until: Instant,
    next: Duration,
    /// The KEK's changes: another number is a reason to try again.
    changes: u64,
}

impl Refiller {
    fn new(maker: Maker, keys: Arc<Keys>, woken: Receiver<()>) -> Self {
        Self { maker, keys, woken, batch: DataKeyBatch::default(), backoff: None }
    }

    fn run(&mut self) {
        loop {
            self.keys.stock.sweep(self.maker.cell.changes(), os::coarse_ms());
            self.keys.stock.settle();
            if self.is_low() && self.may_try() {
                self.fill();
            }
            match self.woken.recv_timeout(self.nap()) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Until the next look. A pool whose keys live for less than a tick looks more often.
    fn nap(&self) -> Duration {
        KEY_POOL_TICK.min(self.maker.config.max_age / 2).max(Duration::from_millis(1))
    }

    fn is_low(&self) -> bool {
        self.keys.depth() < self.keys.low_watermark
    }

    fn may_try(&self) -> bool {
        self.backoff.as_ref().is_none_or(|backoff| {
            Instant::now() >= backoff.until || self.maker.cell.changes().now() != backoff.changes
        })
    }

    /// Fills the pool up, batch by batch.
    fn fill(&mut self) {
        self.keys.woken.store(false, Ordering::Relaxed);
        loop {
            let config = &self.maker.config;
            let room = (config.capacity as u64).saturating_sub(self.keys.depth());
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            // More would be made for nothing, and spend the wraps of a `Direct` version.
            let room = room.min(self.keys.stock.room().saturating_mul(config.magazine()));
            if room == 0 || self.woken.try_recv() == Err(channel::TryRecvError::Disconnected) {
                return;
            }
            let start = Instant::now();
            let put = self.put(room.min(KEY_POOL_BATCH_ITEMS));
            let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            if let Err(error) = put {
                return self.failed(error);
            }
            self.keys.refills.fetch_add(1, Ordering::Relaxed);
            self.keys.refill_ns.fetch_add(took, Ordering::Relaxed);
            if self.backoff.take().is_some() {
                self.keys.last_error.store(None);
            }
        }
    }

    /// Makes keys and puts them into the queue.
    fn put(&mut self, count: usize) -> Result<()> {
        let Self { maker, batch, keys, .. } = self;
        let made_ms = os::coarse_ms();
        let (changes, made) = maker.cell.changes().then_read(|| maker.batch(batch, count));
        made?;
        let mut first_error = None;
        let mut ready = Vec::with_capacity(maker.config.magazine());
        let put = |full: Vec<DataKey>| {
            // Before they can be taken: what is counted as taken was counted as made.
            keys.made.fetch_add(full.len() as u64, Ordering::Relaxed);
            keys.stock.put(Magazine { keys: full, changes, made_ms, uncounted: 0 });
        };
        for key in batch.iter() {
            match key {
                Ok(key) => ready.push(key.detach()),
                // Of a `Direct` version whose wraps are spent.
                Err(error) => first_error = first_error.or_else(|| Some(error.clone())),
            }
            if ready.len() == maker.config.magazine() {
                put(mem::replace(&mut ready, Vec::with_capacity(maker.config.magazine())));
            }
        }
        if !ready.is_empty() {
            put(ready);
        }
        batch.clear();
        first_error.map_or(Ok(()), Err)
    }

    fn failed(&mut self, error: Error) {
        let before = self.backoff.take();
        if before.is_none() {
            log::warn!("the pool of key {} was not refilled: {error}", self.maker.handle.key_id());
        }
        let wait = before.map_or(KEY_POOL_TICK, |backoff| backoff.next);
        self.keys.failures.fetch_add(1, Ordering::Relaxed);
        self.keys.last_error.store(Some(Arc::new(error)));
        self.backoff = Some(Backoff {
            until: Instant::now() + wait,
            next: (2 * wait).min(KEY_POOL_BACKOFF_MAX),
            changes: self.maker.cell.changes().now(),
        });
    }
}
