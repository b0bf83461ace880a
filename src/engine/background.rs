//! The background thread of an engine, and due work.
//!
//! The thread looks for changes by other processes more often than once a second, and executes due rotations and
//! deletions every minute. It belongs to one process; a forked child starts its own.

use std::{
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam::channel::{self, RecvTimeoutError, Sender};

use super::{DueWork, Engine, Shared};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::KeyId,
    limits::{RUN_DUE_INTERVAL, WATCH_INTERVAL},
    store::KeyChange,
};

/// What [`Engine::run_due`] did.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct DueReport {
    /// Keys that got a new primary version.
    pub rotated: Vec<KeyId>,
    /// Keys that were deleted, with all their material.
    pub deleted: Vec<KeyId>,
    /// Keys whose due work failed, and why; it stays due.
    pub failed: Vec<(KeyId, Error)>,
}

impl Engine {
    /// Executes every rotation and deletion that is due by the engine's clock. Engines do so by themselves when they
    /// open and every minute; dates are checked again inside each transaction.
    ///
    /// # Errors
    /// The store's, if it could not be read. What failed for single keys is in the report.
    pub fn run_due(&self) -> Result<DueReport> {
        self.process();
        self.shared().run_due()
    }
}

impl Shared {
    fn run_due(&self) -> Result<DueReport> {
        self.refresh_if_changed()?;
        let now = self.now();
        let mut report = DueReport::default();
        let ring = self.ring.load_full();
        let mut keys: Vec<_> = ring.keys().collect();
        // In a fixed order, since what is made depends on it in the deterministic mode.
        keys.sort_unstable_by_key(|key| key.record.id);
        for key in keys {
            let id = key.record.id;
            if key.record.deletion_due(now) {
                match self.delete_due(&id, now) {
                    Ok(true) => report.deleted.push(id),
                    Ok(false) => {}
                    Err(error) => report.failed.push((id, error)),
                }
            } else if key.record.rotation_due(now) {
                match self.rotate_if(&id, |record| record.rotation_due(now)) {
                    Ok(true) => report.rotated.push(id),
                    Ok(false) => {}
                    Err(error) => report.failed.push((id, error)),
                }
            }
        }
        if !report.deleted.is_empty() {
            self.refresh()?;
        }
        Ok(report)
    }

    /// Due work at a moment when nobody asked for it: what fails is logged, and stays due.
    pub(super) fn run_due_quietly(&self) {
        match self.run_due() {
            Ok(report) => {
                for (key, error) in report.failed {
                    log::warn!("key {key}: due work failed: {error}");
                }
            }
            Err(error) => log::warn!("due work failed: {error}"),
        }
    }

    fn delete_due(&self, id: &KeyId, now: u64) -> Result<bool> {
        let mut deleted = false;
        let done = self.store.change(id, &mut |record| {
            deleted = record.deletion_due(now);
            Ok(if deleted { KeyChange::Delete } else { KeyChange::Keep })
        });
        match done {
            Ok(()) => Ok(deleted),
            // Another process was faster.
            Err(error) if error.kind() == ErrorKind::KeyNotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

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
