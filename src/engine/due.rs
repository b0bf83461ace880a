//! Due work: rotations and deletions whose time has come, and the events by which they are told.

use super::{
    Engine, Shared,
    events::{DueEvent, DueEventKind},
};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::{KeyId, UnixSeconds, system_time},
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
            let done = if key.record.deletion_due(now) {
                self.delete_due(&id, now).map(|done| done.then(|| report.deleted.push(id)))
            } else if key.record.rotation_due(now) {
                self.rotate_due(&id, now).map(|done| done.then(|| report.rotated.push(id)))
            } else {
                Ok(None)
            };
            if let Err(error) = done {
                report.failed.push((id, error));
            }
        }
        if !report.deleted.is_empty() {
            self.refresh()?;
        }
        Ok(report)
    }

    /// Due work at a moment when nobody asked for it: what fails is logged, and stays due.
    pub(super) fn run_due_quietly(&self) {
        if let Err(error) = self.run_due() {
            log::warn!("due work failed: {error}");
        }
    }

    /// Rotates the key if that is due, and tells of it.
    pub(super) fn rotate_due(&self, id: &KeyId, now: UnixSeconds) -> Result<bool> {
        match self.rotate_if(id, |record| record.rotation_due(now)) {
            Ok(Some((key_version_id, before))) => {
                let due = before.next_rotation();
                self.tell(*id, due, DueEventKind::Rotated { key_version_id });
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) if error.kind() == ErrorKind::KeyNotFound => Ok(false),
            Err(error) => {
                let kind = DueEventKind::RotationFailed { error: error.clone() };
                self.tell(*id, None, kind);
                Err(error)
            }
        }
    }

    fn delete_due(&self, id: &KeyId, now: UnixSeconds) -> Result<bool> {
        let mut due = None;
        let done = self.store.change(id, &mut |record| {
            due = record.deletion_due(now).then(|| record.deletion_date()).flatten();
            Ok(if due.is_some() { KeyChange::Delete } else { KeyChange::Keep })
        });
        match done {
            Ok(()) if due.is_some() => {
                self.tell(*id, due, DueEventKind::Deleted);
                Ok(true)
            }
            Ok(()) => Ok(false),
            // Another process was faster.
            Err(error) if error.kind() == ErrorKind::KeyNotFound => Ok(false),
            Err(error) => {
                self.tell(*id, due, DueEventKind::DeletionFailed { error: error.clone() });
                Err(error)
            }
        }
    }

    /// Tells of something that the engine did by itself.
    pub(super) fn tell(&self, key_id: KeyId, due: Option<UnixSeconds>, kind: DueEventKind) {
        let (time, due) = ((self.config.clock)(), due.map(system_time));
        self.process().events.tell(DueEvent { time, key_id, due, kind });
    }
}
