//! The background threads of an engine.
//!
//! One looks for changes by other processes more often than once a second, and executes due rotations and deletions
//! (`due.rs`) every minute. The other one keeps the time (`freshness.rs`), since the first may hang in a look. They
//! belong to one process; a forked child starts its own. Where the system gives no threads, callers look themselves,
//! and the threads are tried again.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam::channel::{self, RecvTimeoutError, Sender};

use super::{DueWork, Shared, due::Trust, freshness::Looks};
use crate::{
    limits::{RUN_DUE_INTERVAL, WATCH_INTERVAL, WATCHER_RETRY_INTERVAL},
    os,
};

/// The threads of one process, if there are any.
#[derive(Default)]
pub(super) struct Watching {
    threads: Mutex<Option<[Watcher; 2]>>,
    watched: AtomicBool,
    ended: AtomicBool,
    /// When it was last tried to start them, in milliseconds of the coarse clock, and one more.
    tried_ms: AtomicU64,
}

impl Watching {
    /// Whether the threads run.
    pub(super) fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Acquire)
    }

    /// Starts the threads unless they run, or were refused a moment ago.
    pub(super) fn ensure(&self, shared: &Arc<Shared>) {
        if self.is_watched() {
            return;
        }
        let now = os::coarse_ms();
        let tried = self.tried_ms.load(Ordering::Relaxed);
        let pause = Duration::from_millis(now.saturating_sub(tried.saturating_sub(1)));
        if tried > 0 && pause < WATCHER_RETRY_INTERVAL {
            return;
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.is_some() || self.ended.load(Ordering::Relaxed) {
            return;
        }
        self.tried_ms.store(now + 1, Ordering::Relaxed);
        match watch(shared).and_then(|looks| Ok([looks, keep_time(shared)?])) {
            Ok(both) => {
                if tried > 0 {
                    log::info!("the background threads run now");
                }
                *threads = Some(both);
                self.watched.store(true, Ordering::Release);
            }
            Err(error) if tried == 0 => log::warn!(
                "the system gave no background thread: {error}; callers look at the store \
                 themselves, and due work waits"
            ),
            Err(_) => {}
        }
    }

    /// Ends the threads and waits for them. `false` if one hangs in a look and was left alone.
    pub(super) fn end(&self, looks: &Looks) -> bool {
        let threads = {
            let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            self.ended.store(true, Ordering::Relaxed);
            self.watched.store(false, Ordering::Release);
            threads.take()
        };
        let Some([looker, keeper]) = threads else { return true };
        drop(looker.stop);
        // It ends at once unless it is in the middle of something.
        while !looker.thread.is_finished() && !looks.hangs() {
            thread::sleep(Duration::from_millis(1));
        }
        drop(keeper.stop);
        let ended = looker.thread.is_finished();
        let threads = ended.then_some(looker.thread).into_iter().chain([keeper.thread]);
        if threads.map(JoinHandle::join).any(|joined| joined.is_err()) {
            log::warn!("a background thread panicked");
        }
        ended
    }
}

/// A background thread.
struct Watcher {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Watcher {
    /// Starts a thread that does `work` again and again, each time after the pause that it returns, `first` at first.
    fn start(
        name: &str,
        first: Duration,
        mut work: impl FnMut() -> Duration + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = channel::bounded::<()>(0);
        let run = move || {
            let mut pause = first;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                pause = work();
            }
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(Self { stop, thread })
    }
}

/// The thread that looks.
fn watch(shared: &Arc<Shared>) -> io::Result<Watcher> {
    let shared = Arc::clone(shared);
    // A child does not know how old what it inherited is.
    let first = if os::generation() == shared.home { WATCH_INTERVAL } else { Duration::ZERO };
    // By the engine's clock, so that a clock that is set forward finds what is due by it.
    let mut due_at = shared.now().saturating_add(RUN_DUE_INTERVAL.as_secs());
    Watcher::start("keymill-watch", first, move || {
        // Noted there.
        let _ = shared.refresh_if_changed();
        shared.observe_clocks();
        let now = shared.now();
        let soon = now.saturating_add(RUN_DUE_INTERVAL.as_secs());
        if shared.config.due_work == DueWork::ByItself && now >= due_at {
            let observed = shared.observation_left().is_zero();
            shared.run_due_quietly(if observed { Trust::Observed } else { Trust::Rotations });
            due_at = soon;
        }
        // A clock that was set back.
        due_at = due_at.min(soon);
        WATCH_INTERVAL
    })
}

/// The thread that keeps the time.
fn keep_time(shared: &Arc<Shared>) -> io::Result<Watcher> {
    let shared = Arc::clone(shared);
    Watcher::start("keymill-time", WATCH_INTERVAL, move || shared.keep_time())
}

const _: () = assert!(WATCH_INTERVAL.as_nanos() <= Duration::from_millis(500).as_nanos());
