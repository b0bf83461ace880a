//! The threads that help with large batches: rayon's, if the system gives them.
//!
//! Rayon makes its global pool when somebody first asks for it, and panics then and ever after if the system gives no
//! thread, as in a container with a limit of processes. So the pool is made here, where a failure means that the caller
//! works alone. Rayon never tries again to make its global pool; a pool of our own takes its place then, once there are
//! threads.

use std::{
    error::Error,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// How long the caller works alone before the system is asked for threads again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

const UNKNOWN: u8 = 0;
const GLOBAL: u8 = 1;
const FAILED: u8 = 2;

/// What became of rayon's global pool.
static GLOBAL_POOL: AtomicU8 = AtomicU8::new(UNKNOWN);
/// Instead of the global pool, if that has failed.
static OWN: OnceLock<ThreadPool> = OnceLock::new();
/// When the system was last asked. Held while it is.
static ASKED: Mutex<Option<Instant>> = Mutex::new(None);

/// Whose threads help.
pub(crate) enum Helpers {
    /// The present thread's pool, or rayon's global one.
    Present,
    /// Ours.
    Own(&'static ThreadPool),
    /// Nobody.
    None,
}

/// Whose threads help the present thread.
#[inline]
pub(crate) fn pool() -> Helpers {
    // A thread of a pool is helped by its pool.
    if GLOBAL_POOL.load(Ordering::Acquire) == GLOBAL || rayon::current_thread_index().is_some() {
        return Helpers::Present;
    }
    match OWN.get() {
        Some(pool) => Helpers::Own(pool),
        None => start(),
    }
}

/// How many threads the pool has; 1, the caller's, if there is none.
pub(crate) fn thread_count() -> usize {
    match pool() {
        Helpers::Present => rayon::current_num_threads(),
        Helpers::Own(pool) => pool.current_num_threads(),
        Helpers::None => 1,
    }
}

/// How many threads of rayon's global pool, or of the pool of the present thread, there are to share work among. Starts
/// the global pool if it has not been started, and returns 1 if the system gives no threads for it: then rayon itself
/// would panic.
pub fn parallelism() -> usize {
    match pool() {
        Helpers::Present => rayon::current_num_threads(),
        Helpers::Own(_) | Helpers::None => 1,
    }
}

#[cold]
fn start() -> Helpers {
    // Whoever does not get the lock need not wait: somebody asks already.
    let mut asked = match ASKED.try_lock() {
        Ok(asked) => asked,
        Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(std::sync::TryLockError::WouldBlock)
            if GLOBAL_POOL.load(Ordering::Acquire) == FAILED =>
        {
            return Helpers::None;
        }
        // The first pool, which is there in a moment.
        Err(std::sync::TryLockError::WouldBlock) => {
            ASKED.lock().unwrap_or_else(PoisonError::into_inner)
        }
    };
    if GLOBAL_POOL.load(Ordering::Acquire) == UNKNOWN {
        // Without a cause of the system's, it was made before by somebody else.
        let failed = ThreadPoolBuilder::new().build_global().err();
        let failed = failed.filter(|error| error.source().is_some());
        let state = if failed.is_some() { FAILED } else { GLOBAL };
        GLOBAL_POOL.store(state, Ordering::Release);
        if let Some(error) = failed {
            log::warn!("the system gives no threads for large batches, which take longer: {error}");
            *asked = Some(Instant::now());
            return Helpers::None;
        }
    }
    if GLOBAL_POOL.load(Ordering::Acquire) == GLOBAL {
        return Helpers::Present;
    }
    if let Some(pool) = OWN.get() {
        return Helpers::Own(pool);
    }
    if asked.is_some_and(|asked| asked.elapsed() < RETRY_INTERVAL) {
        return Helpers::None;
    }
    *asked = Some(Instant::now());
    match ThreadPoolBuilder::new().build() {
        Ok(pool) => {
            log::info!("the system gives threads for large batches again");
            Helpers::Own(OWN.get_or_init(|| pool))
        }
        Err(_) => Helpers::None,
    }
}
