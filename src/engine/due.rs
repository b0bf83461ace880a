//! Due work: rotations and deletions whose time has come, and the events by which they are told.

use std::sync::Arc;

use super::{
    Engine, Shared,
    events::{DueEvent, DueEventKind},
};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::{KeyId, KeyRecord, UnixSeconds, date, ring::Key, system_time},
    limits::{CLOCK_SLACK, DELETION_OVERDUE_MAX},
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

/// How far the clock is trusted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// It was looked at once: what is due is rotated, and nothing deleted.
    Rotations,
    /// It was watched for long: what is due is deleted, too, unless the dates are in doubt.
    Observed,
    /// Somebody asks for due work.
    Asked,
    /// Somebody says that it is right.
    Right,
}

impl Engine {
    /// Executes every rotation and deletion that is due by the engine's clock; dates are checked again inside each
    /// transaction.
    ///
    /// Engines do so by themselves every minute, and rotations also when they open. A deletion cannot be undone and a
    /// clock may be wrong, so by itself an engine deletes only after it has seen its clock agree with the system's
    /// steady clock for 24 hours; until then it warns. Called by hand, this deletes at once, unless the date is in
    /// doubt: it is overdue by more than 366 days, or within 7 days of the key's newest version. That is reported as
    /// failed, and [`Engine::run_due_by_this_clock`] is what says that the clock is right.
    ///
    /// # Errors
    /// The store's, if it could not be read. What failed for single keys is in the report.
    pub fn run_due(&self) -> Result<DueReport> {
        self.process();
        self.shared().run_due(Trust::Asked)
    }

    /// As [`Engine::run_due`], with every deletion whose date has passed, however much in doubt: for whoever has
    /// checked the clock.
    ///
    /// # Errors
    /// As there.
    pub fn run_due_by_this_clock(&self) -> Result<DueReport> {
        self.process();
        self.shared().run_due(Trust::Right)
    }
}

impl Shared {
    fn run_due(&self, trust: Trust) -> Result<DueReport> {
        self.refresh_if_changed()?;
        let now = self.now();
        let mut report = DueReport::default();
        let ring = self.ring.load_full();
        let mut keys: Vec<_> = ring.keys().collect();
        // In a fixed order, since what is made depends on it in the deterministic mode.
        keys.sort_unstable_by_key(|key| key.record.id);
        self.warn_of_the_future(&keys, now);
        for key in keys {
            let id = key.record.id;
            let done = if key.record.deletion_date().is_some() {
                let done = self.delete_if_trusted(&key.record, now, trust);
                done.map(|done| done.then(|| report.deleted.push(id)))
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
    pub(super) fn run_due_quietly(&self, trust: Trust) {
        if let Err(error) = self.run_due(trust) {
            log::warn!("due work failed: {error}");
        }
    }

    /// Deletes a key if that is due and the clock is trusted enough, and warns otherwise, once.
    fn delete_if_trusted(
        &self,
        record: &KeyRecord,
        now: UnixSeconds,
        trust: Trust,
    ) -> Result<bool> {
        let id = record.id;
        let due = record.deletion_due(now);
        let doubt = record.deletion_doubt(now).filter(|_| trust != Trust::Right);
        if let Some(doubt) = doubt {
            if due && trust == Trust::Asked {
                let detail = format!("Key {id} is kept: {doubt}. Check the clock first.");
                return Err(Error::new(ErrorKind::StateModifiedFailed, detail));
            }
            if self.process().clocks.is_new(id) {
                log::warn!(
                    "key {id} is kept: {doubt}; check the clock, then cancel the deletion or run \
                     due work and say that the clock is right"
                );
            }
            return Ok(false);
        }
        if !due {
            return Ok(false);
        }
        if trust != Trust::Rotations {
            return self.delete_due(&id, now);
        }
        if self.process().clocks.is_new(id) {
            let since = record.deletion_date().map(system_time).map(date).unwrap_or_default();
            let left = self.observation_left().as_secs();
            let then = date(system_time(now.saturating_add(left)));
            log::warn!(
                "key {id} is to be deleted since {since}: an engine that runs until {then} deletes \
                 it then, if its clock keeps going steadily; due work that is run by hand deletes \
                 it now"
            );
        }
        Ok(false)
    }

    /// Says once that keys are dated ahead of the clock.
    fn warn_of_the_future(&self, keys: &[&Arc<Key>], now: UnixSeconds) {
        let ahead = keys.iter().filter(|key| key.record.is_of_the_future(now));
        let (count, newest) = (ahead.clone().count(), ahead.max_by_key(|k| k.record.last_rotation));
        if let Some(newest) = newest
            && self.process().clocks.is_new_future()
        {
            let [then, now] = [newest.record.last_rotation, now].map(|t| date(system_time(t)));
            log::warn!(
                "the clock says {now}, but keys are dated later ({count} of them, such as {}, of \
                 {then}): they were dated by a wrong clock, or this one is behind; those that \
                 rotate by themselves are due now",
                newest.record.id
            );
        }
    }

    /// Says that the clock by which a deletion was scheduled fits the dates of the store badly, if it does.
    pub(super) fn warn_of_the_clock(&self, id: &KeyId, now: UnixSeconds) {
        let ring = self.ring.load();
        let dates = |key: &Arc<Key>| key.record.last_rotation.max(key.record.created);
        let Some(newest) = ring.keys().map(dates).max() else { return };
        let [newest_date, now_date] = [newest, now].map(|time| date(system_time(time)));
        if newest > now.saturating_add(CLOCK_SLACK.as_secs()) {
            log::warn!(
                "the deletion of key {id} is dated by a clock that says {now_date}, but the store \
                 has keys of {newest_date}; if the clock is wrong, cancel the deletion"
            );
        } else if now > newest.saturating_add(DELETION_OVERDUE_MAX.as_secs()) {
            log::warn!(
                "the deletion of key {id} is dated by a clock that says {now_date}, while the \
                 newest key of the store is of {newest_date}; if the clock is wrong, cancel the \
                 deletion"
            );
        }
    }

    /// Rotates the key if that is due, and tells of it.
    pub(super) fn rotate_due(&self, id: &KeyId, now: UnixSeconds) -> Result<bool> {
        match self.rotate_if(id, |record| record.rotation_due(now)) {
            Ok(Some((key_version_id, before))) => {
                let due = before.next_rotation(now);
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
