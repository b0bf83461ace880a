//! What an engine did by itself, told once to whoever asks: rotations and deletions that were due, and what failed of
//! them. Each is logged and counted, and kept in a bounded queue until [`Engine::take_due_events`] takes it.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use super::Engine;
use crate::{
    error::Error,
    keys::{KeyId, KeyVersionId, date},
    limits::DUE_EVENTS_MAX,
};

/// A rotation or a deletion that an engine carried out because it was due, or could not carry out.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DueEvent {
    /// When it happened, by the engine's clock.
    pub time: SystemTime,
    /// The key.
    pub key_id: KeyId,
    /// Since when it was due. `None` for a rotation after 2^31 wraps, which has no date.
    pub due: Option<SystemTime>,
    /// What happened.
    pub kind: DueEventKind,
}

/// What a [`DueEvent`] tells of.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DueEventKind {
    /// The key has a new primary version.
    Rotated {
        /// The new version.
        key_version_id: KeyVersionId,
    },
    /// The key is gone, with all its material.
    Deleted,
    /// The rotation failed, and stays due.
    RotationFailed {
        /// Why.
        error: Error,
    },
    /// The deletion failed, and stays due.
    DeletionFailed {
        /// Why.
        error: Error,
    },
}

/// How much an engine did by itself since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DueTotals {
    /// Keys that got a new primary version.
    pub rotations: u64,
    /// Keys that were deleted.
    pub deletions: u64,
    /// Attempts that failed.
    pub failures: u64,
}

/// Events of one process, until somebody takes them.
#[derive(Default)]
pub(super) struct Events {
    queue: Mutex<VecDeque<DueEvent>>,
    rotations: AtomicU64,
    deletions: AtomicU64,
    failures: AtomicU64,
}

impl Engine {
    /// Takes what this engine has done by itself since this was last called, oldest first: due rotations and deletions,
    /// whether carried out when it opened, since then, by [`Engine::set_rotation`] or by [`Engine::run_due`]; new
    /// versions after 2^31 wraps; and what failed of these. Clones share one queue, so each event is told once.
    ///
    /// At most 65,536 events wait; beyond that the oldest are dropped. All of them are logged in any case, at level
    /// info or, if they failed, warn.
    pub fn take_due_events(&self) -> Vec<DueEvent> {
        self.process().events.take()
    }

    /// What this engine has done by itself since it was opened, or, in a forked child, since then.
    pub fn due_totals(&self) -> DueTotals {
        self.process().events.totals()
    }
}

impl Events {
    /// Logs, counts and keeps an event.
    pub(super) fn tell(&self, event: DueEvent) {
        let DueEvent { key_id, due, kind, .. } = &event;
        let since = due.map(date).map(|date| format!(" (due since {date})"));
        let since = since.unwrap_or_default();
        let count = match kind {
            DueEventKind::Rotated { key_version_id } if due.is_none() => {
                log::info!(
                    "rotated {key_id} after 2^31 wraps: its primary version is {key_version_id}"
                );
                &self.rotations
            }
            DueEventKind::Rotated { key_version_id } => {
                log::info!("rotated {key_id}{since}: its primary version is {key_version_id}");
                &self.rotations
            }
            DueEventKind::Deleted => {
                log::info!("deleted {key_id} with all its material{since}");
                &self.deletions
            }
            DueEventKind::RotationFailed { error } => {
                log::warn!("key {key_id}: its rotation failed{since}: {error}");
                &self.failures
            }
            DueEventKind::DeletionFailed { error } => {
                log::warn!("key {key_id}: its deletion failed{since}: {error}");
                &self.failures
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() == DUE_EVENTS_MAX {
            queue.pop_front();
        }
        queue.push_back(event);
    }

    fn take(&self) -> Vec<DueEvent> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *queue).into()
    }

    fn totals(&self) -> DueTotals {
        DueTotals {
            rotations: self.rotations.load(Ordering::Relaxed),
            deletions: self.deletions.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }
}
