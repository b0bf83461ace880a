//! `Engine`: the operations, and what holds them together. The only room that knows every stage.
//!
//! `mod.rs` opens engines and keeps the ring fresh; `single`, `generate` (batches), `stream` and `decrypt` are the
//! operations on data keys, `encrypt` those on the caller's own texts, `random` gives random bytes, `admin` has the
//! operations on KEKs and aliases, `clients` those on clients of a server, `wraps` the leases of `Direct` versions,
//! `background` the threads, `due`, `events` and `clocks` what an engine does by itself and when, `freshness` the bound
//! on what goes on without the store, `outlook` what a server asks beside all that.
//!
//! An operation whose name ends in `_as` is for a caller who may use some keys only (`keys::access`); the public one of
//! that name is for whoever holds the engine.
//!
//! # Forks
//! Whatever belongs to one process lies in [`Process`], made anew by a child on first use. Every operation on data
//! keys compares the process generation before it returns with that on entry and starts over if they differ.

mod admin;
mod background;
mod builder;
mod clients;
mod clocks;
mod decrypt;
mod due;
mod encrypt;
mod events;
mod freshness;
mod generate;
#[cfg(any(feature = "server", test))]
mod outlook;
mod random;
mod single;
mod stream;
#[cfg(test)]
mod tests;
mod wraps;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;

pub use builder::{DueWork, EngineBuilder};
pub use due::DueReport;
pub use encrypt::Encrypted;
pub use events::{DueEvent, DueEventKind, DueTotals};
pub use freshness::StoreHealth;
pub use single::{DataKeyBuffers, WrittenDataKey};
pub use stream::DataKeyStream;

use crate::{
    batch::fan_out::FanOut,
    clients::ClientDirectory,
    cpu::Tier,
    error::{Error, Result},
    keys::{
        KeyHandle, StoredKey, UnixSeconds,
        ring::{Ring, StoreMoment},
    },
    memory::Recycler,
    os::{self, Current, Generation, PerProcess},
    request_id::RequestId,
    rng::Rng,
    store::{KeyStore, RootKey},
};
use background::Watching;
use clocks::Clocks;
use due::Trust;
use events::Events;
use freshness::Looks;

/// A data-key engine on one key store: `Send`, `Sync`, and cheap to clone; clones are the same engine.
///
/// Dropping the last clone ends the background thread and returns unused leases to the store. An engine goes on to
/// work in a forked child, whose keys and IVs have nothing in common with its parent's.
///
/// ```
/// use keymill::{CreateKey, DecryptRequest, Engine, GenerateDataKeyRequest};
///
/// let engine = Engine::in_memory()?;
/// engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
///
/// let key = engine.generate_data_key(&GenerateDataKeyRequest::new("alias/app", 32).aad(b"/a.jpg"))?;
/// let request = DecryptRequest::new(key.ciphertext_blob())
///     .key_id("alias/app")
///     .iv(key.iv())
///     .aad(b"/a.jpg");
/// assert_eq!(engine.decrypt(&request)?.plaintext(), key.plaintext().expect("asked for"));
/// # Ok::<(), keymill::Error>(())
/// ```
#[derive(Clone)]
pub struct Engine(Arc<Handle>);

/// What all clones of an engine hold; its drop ends the engine.
struct Handle {
    shared: Arc<Shared>,
}

/// What the engine and its background thread share.
struct Shared {
    /// Tells engines apart.
    number: u64,
    store: Box<dyn KeyStore>,
    ring: ArcSwap<Ring>,
    /// Of the same image of the store as the ring, and replaced just before it.
    clients: ArcSwap<ClientDirectory>,
    rng: Rng,
    tier: Tier,
    config: Config,
    home: Generation,
    /// Whether rayon's global pool may have been inherited, without its workers, from a parent with engines.
    forked_before: bool,
    process: PerProcess<Process>,
    /// The generation of the process whose part is there, watcher included, while what was read of the store is fresh.
    /// Says so at the cost of one load; whoever finds that it is not so any more sets it to [`UNSETTLED`].
    settled: AtomicU64,
    recycler: PerProcess<Arc<Recycler>>,
    initial_version_uses: AtomicU64,
}

/// Of no process.
const UNSETTLED: u64 = u64::MAX;

/// Tells the time.
type Clock = Box<dyn Fn() -> SystemTime + Send + Sync>;

/// Tells how much time has passed, in milliseconds.
type MonotonicClock = Box<dyn Fn() -> u64 + Send + Sync>;

/// What a builder sets.
struct Config {
    clock: Clock,
    pool: Option<Arc<rayon::ThreadPool>>,
    lease_max: u64,
    initial_spent: u64,
    due_work: DueWork,
    recycled_bytes_max: usize,
    stale_max: Duration,
    monotonic: MonotonicClock,
    background: bool,
}

/// What belongs to one process.
struct Process {
    /// Held while the ring is read anew, so that an older image never replaces a newer one.
    refresh: Mutex<()>,
    watching: Watching,
    looks: Looks,
    clocks: Clocks,
    /// What the engine did by itself here.
    events: Events,
}

impl Engine {
    /// Opens the store in the file at `store`. It has to exist.
    ///
    /// # Errors
    /// `StoreMissing`, `WrongRootKey`, `StoreCorrupt`, `StoreUnavailable`: see [`ErrorKind`](crate::ErrorKind).
    pub fn open(store: impl AsRef<Path>, root_key: &RootKey) -> Result<Self> {
        Self::builder().open(store, root_key)
    }

    /// Creates a store in a new file at `store`.
    ///
    /// # Errors
    /// `InvalidParameter` if the file exists; `StoreUnavailable` if it cannot be written.
    pub fn create(store: impl AsRef<Path>, root_key: &RootKey) -> Result<Self> {
        Self::builder().create(store, root_key)
    }

    /// An engine whose keys live in memory and die with it: for tests and benchmarks.
    ///
    /// # Errors
    /// `Machine` if the system gives no random bytes.
    pub fn in_memory() -> Result<Self> {
        Self::builder().in_memory()
    }

    /// An engine in memory whose every byte, KEKs and ids included, follows from `seed` and the calls made: for tests
    /// and fuzzing. The same seed and the same calls give the same bytes for any number of threads and any tier. Its
    /// clock stands at 1970 unless the builder sets one.
    ///
    /// # Errors
    /// `InvalidParameter` if `KEYMILL_TIER` holds no tier's name.
    #[cfg(any(feature = "deterministic", fuzzing, test))]
    pub fn deterministic(seed: [u8; 32]) -> Result<Self> {
        Self::builder().deterministic(seed)
    }

    /// Settings beyond the defaults.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    /// Finds the KEK with this id or alias, whatever its state. With the handle, operations skip the lookup.
    ///
    /// ```
    /// use keymill::{CreateKey, Engine, NoAad};
    ///
    /// let engine = Engine::in_memory()?;
    /// engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
    /// let key = engine.key("alias/app")?;
    /// let page_keys = engine.advance_generate_data_keys(&key, 32, 4096, NoAad)?;
    /// assert_eq!(page_keys.get(17)?.key_id(), key.key_id());
    /// # Ok::<(), keymill::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`; the store's.
    pub fn key(&self, name: &str) -> Result<KeyHandle> {
        self.in_one_process(|shared| {
            let found = |ring: &Ring| {
                let id = ring.resolve(name)?.record.id;
                ring.cell(&id).map(|cell| KeyHandle::new(Arc::clone(cell)))
            };
            if let Some(handle) = found(&shared.ring.load()) {
                return Ok(handle);
            }
            shared.refresh_if_changed()?;
            found(&shared.ring.load()).ok_or_else(|| Error::key_not_found(name))
        })
    }

    /// The tier of the kernels in use.
    pub fn tier(&self) -> Tier {
        self.shared().tier
    }

    /// What and where the key store is, in words.
    pub fn describe_store(&self) -> String {
        self.shared().store.describe()
    }

    /// The files of the key store, which nothing else may write.
    #[cfg(feature = "server")]
    pub(crate) fn store_files(&self) -> Vec<std::path::PathBuf> {
        self.shared().store.files()
    }

    /// Bytes of memory that wait for the next batches. At most what
    /// [`EngineBuilder::recycled_bytes_max`] allows.
    pub fn recycled_bytes(&self) -> usize {
        self.shared().recycler().waiting_bytes()
    }

    /// How often the initial version of a key that rotates by itself wrapped or encrypted. Such use defeats the
    /// rotation: the `advance_` operations follow it. The first use of each key is logged as a warning.
    pub fn initial_version_uses(&self) -> u64 {
        self.shared().initial_version_uses.load(Ordering::Relaxed)
    }

    /// Tells engines apart.
    pub(crate) fn number(&self) -> u64 {
        self.shared().number
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }

    /// Reads the store and sets the engine up.
    fn start(store: Box<dyn KeyStore>, rng: Rng, tier: Tier, config: Config) -> Result<Self> {
        static ENGINES: AtomicU64 = AtomicU64::new(0);
        let shared = Arc::new(Shared {
            number: ENGINES.fetch_add(1, Ordering::Relaxed),
            store,
            ring: ArcSwap::from_pointee(Ring::default()),
            clients: ArcSwap::default(),
            rng,
            tier,
            config,
            home: os::generation(),
            forked_before: os::is_forked(),
            process: PerProcess::empty(),
            settled: AtomicU64::new(UNSETTLED),
            recycler: PerProcess::empty(),
            initial_version_uses: AtomicU64::new(0),
        });
        shared.refresh()?;
        if shared.config.due_work == DueWork::ByItself {
            // Never a deletion: one look at a clock is not enough.
            shared.run_due_quietly(Trust::Rotations);
        }
        let engine = Self(Arc::new(Handle { shared }));
        engine.process();
        Ok(engine)
    }

    /// Runs an operation on data keys, and again if the process was forked meanwhile: then parent and child would both
    /// hold its result.
    fn in_one_process<T>(&self, mut operation: impl FnMut(&Shared) -> Result<T>) -> Result<T> {
        loop {
            let generation = os::generation();
            if self.shared().settled.load(Ordering::Acquire) != generation.number() {
                self.settle(generation)?;
            }
            let done = operation(self.shared());
            if os::generation() == generation {
                return done;
            }
        }
    }

    /// The same of what needs nothing that was read of the store.
    #[cfg(any(feature = "server", test))]
    fn in_this_process<T>(&self, operation: impl Fn(&Shared) -> Result<T>) -> Result<T> {
        loop {
            let generation = os::generation();
            let done = operation(self.shared());
            if os::generation() == generation {
                return done;
            }
        }
    }

    /// This process's part, with its background threads running if the system gives them.
    fn process(&self) -> Current<Process> {
        let process = self.shared().process();
        if self.shared().config.background {
            process.watching.ensure(self.shared());
        }
        process
    }
}

impl Shared {
    fn process(&self) -> Current<Process> {
        self.process.get_or(|inherited| Process {
            refresh: Mutex::new(()),
            watching: Watching::default(),
            looks: Looks::begin(inherited.map(|process| &process.looks), self.monotonic_ms()),
            clocks: Clocks::default(),
            events: Events::default(),
        })
    }

    fn now(&self) -> UnixSeconds {
        let now = (self.config.clock)();
        now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }

    fn monotonic_ms(&self) -> u64 {
        (self.config.monotonic)()
    }

    /// Reads the store and replaces the ring and the clients. Returns what was read of keys.
    fn refresh(&self) -> Result<Vec<StoredKey>> {
        let begun = self.monotonic_ms();
        let done = self.read_store();
        self.note_look(begun, done.as_ref().err());
        done
    }

    fn read_store(&self) -> Result<Vec<StoredKey>> {
        let process = self.process();
        let _alone = process.refresh.lock().unwrap_or_else(PoisonError::into_inner);
        let image = self.store.load()?;
        let before = self.ring.load_full();
        let moment = StoreMoment { changes: image.changes, epoch: image.epoch };
        let ring = Ring::build(moment, &image.keys, &before, self.tier, self.number)?;
        let continues = ring.continues(&before);
        // Before the ring: by its number others decide that all is fresh.
        self.clients.store(Arc::new(ClientDirectory::new(image.clients)));
        // The cells first: whoever forks in between leaves its child a ring whose number says that it is old, and with
        // it cells that are newer, which the child publishes again.
        ring.publish(&before);
        self.ring.store(Arc::new(ring));
        if !continues {
            before.give_up_leases();
            log::warn!(
                "another file, or an older state, has taken the place of the key store ({}); it \
                 passed every check and is used from now on",
                self.store.describe()
            );
        }
        Ok(image.keys)
    }

    /// Where the memory of batches waits for the next ones.
    fn recycler(&self) -> Arc<Recycler> {
        let make = |_: Option<&Arc<Recycler>>| Recycler::new(self.config.recycled_bytes_max);
        Arc::clone(&self.recycler.get_or(make))
    }

    /// Looks at the store, and replaces the ring and the clients if it has changed since they were read.
    fn refresh_if_changed(&self) -> Result<()> {
        let begun = self.monotonic_ms();
        let changes = match self.store.changes() {
            Ok(changes) => changes,
            // Its file was replaced: reading everything is what accepts the new one.
            Err(error) if self.store.is_replaced() => {
                self.note_replaced(&error);
                return self.refresh().map(drop);
            }
            Err(error) => {
                self.note_look(begun, Some(&error));
                return Err(error);
            }
        };
        let ring = self.ring.load();
        if (changes, self.store.epoch()) == (ring.changes, ring.epoch) {
            self.note_look(begun, None);
            return Ok(());
        }
        self.refresh().map(drop)
    }

    /// A child has no workers of its parent's pools, so it works on the caller's thread.
    fn fan_out(&self) -> FanOut<'_> {
        match &self.config.pool {
            _ if os::generation() != self.home => FanOut::Caller,
            Some(pool) => FanOut::Own(pool),
            None if self.forked_before => FanOut::Caller,
            None => FanOut::Global,
        }
    }

    /// Gives the error of a single call the id of its request.
    fn name(&self, error: Error) -> Error {
        match self.new_request_id() {
            Ok(id) => error.with_request_id(id),
            Err(_) => error,
        }
    }

    fn new_request_id(&self) -> Result<RequestId> {
        let mut bytes = [0; 16];
        self.rng.fill(&mut bytes)?;
        Ok(RequestId::from_random(bytes))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut answers = true;
        // A child that never used the engine has nothing to end; what it inherited is abandoned.
        if let Some(process) = self.shared.process.get() {
            answers = process.watching.end(&process.looks);
            if answers {
                self.shared.return_leases();
            }
        }
        // Not left to the drop of `shared`: in a child the background thread of the parent holds it for ever.
        let last = self.shared.ring.swap(Arc::default());
        Ring::default().publish(&last);
        if answers {
            self.shared.store.close();
        } else {
            // Whoever asked the store now would wait as long as the look that hangs.
            log::warn!("the key store does not answer: it is not closed, and leases are lost");
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("store", &self.describe_store())
            .field("tier", &self.tier())
            .field("keys", &self.shared().ring.load().keys().count())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
const _: fn() = || {
    fn shared_between_threads<T: Send + Sync + Clone>() {}
    shared_between_threads::<Engine>();
};
