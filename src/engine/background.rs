//! The background thread of an engine.
//!
//! The thread looks for changes by other processes more often than once a second, and executes due rotations and
//! deletions (`due.rs`) every minute. It belongs to one process; a forked child starts its own.

use std::{
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam::channel::{self, RecvTimeoutError, Sender};

use super::{DueWork, Shared};
use crate::{
    error::Result,
    limits::{RUN_DUE_INTERVAL, WATCH_INTERVAL},
};

/// The background thread.
pub(super) struct Watcher {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Watcher {
    /// Starts the thread. Without one (the system may refuse) the engine works on, but learns of changes by others
    /// only when it asks for a key that it does not know.
    pub(super) fn start(shared: &Arc<Shared>) -> Option<Self> {
        let (stop, stopped) = channel::bounded::<()>(0);
        let shared = Arc::clone(shared);
        // By the engine's clock, so that a clock that is set forward finds what is due by it.
        let mut due_at = shared.now().saturating_add(RUN_DUE_INTERVAL.as_secs());
        let watch = move || {
            let mut failing = false;
            while stopped.recv_timeout(WATCH_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                note(&mut failing, shared.refresh_if_changed());
                let now = shared.now();
                let soon = now.saturating_add(RUN_DUE_INTERVAL.as_secs());
                if shared.config.due_work == DueWork::ByItself && now >= due_at {
                    shared.run_due_quietly();
                    due_at = soon;
                }
                // A clock that was set back.
                due_at = due_at.min(soon);
            }
        };
        match thread::Builder::new().name("keymill-watch".into()).spawn(watch) {
            Ok(thread) => Some(Self { stop, thread }),
            Err(error) => {
                log::warn!("no background thread: {error}");
                None
            }
        }
    }

    /// Ends the thread and waits for it.
    pub(super) fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            log::warn!("the background thread panicked");
        }
    }
}

/// Logs the first of a row of failures.
fn note(failing: &mut bool, result: Result<()>) {
    match result {
        Ok(()) => *failing = false,
        Err(error) => {
            if !*failing {
                log::warn!("the store cannot be read: {error}");
            }
            *failing = true;
        }
    }
}

const _: () = assert!(WATCH_INTERVAL.as_nanos() <= Duration::from_millis(500).as_nanos());
