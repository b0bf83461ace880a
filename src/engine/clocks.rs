//! The wall clock, and how far it can be trusted.
//!
//! A wall clock may be set to any date at any moment, by hand, by a faulty server of time or by a machine that starts
//! without a battery. What can be undone follows it; a deletion cannot. So an engine deletes a key by itself only after
//! it has watched both clocks, the wall clock and the one that goes steadily, for a day in which they agreed.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::Shared;
use crate::{
    keys::{KeyId, UnixSeconds, date, system_time},
    limits::{CLOCK_JUMP_MAX, DELETION_OBSERVATION},
};

/// What one process has seen of the clocks.
#[derive(Default)]
pub(super) struct Clocks(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    /// The last look at both clocks: seconds since 1970, and milliseconds.
    last: Option<(UnixSeconds, u64)>,
    /// Since when they have agreed, by the steady one.
    steady_since_ms: u64,
    /// Keys of which a warning was given.
    warned: HashSet<KeyId>,
    warned_of_the_future: bool,
}

impl Clocks {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is the first time that something is to be said of this key.
    pub(super) fn is_new(&self, key: KeyId) -> bool {
        self.seen().warned.insert(key)
    }

    /// Whether it is the first time that something is to be said of dates in the future.
    pub(super) fn is_new_future(&self) -> bool {
        !std::mem::replace(&mut self.seen().warned_of_the_future, true)
    }
}

impl Shared {
    /// Looks at both clocks.
    pub(super) fn observe_clocks(&self) {
        let (wall, steady) = (self.now(), self.monotonic_ms());
        let process = self.process();
        let mut seen = process.clocks.seen();
        let Some((wall_before, steady_before)) = seen.last.replace((wall, steady)) else {
            seen.steady_since_ms = steady;
            return;
        };
        let passed = steady.saturating_sub(steady_before) / 1000;
        // Clocks are steered by parts in a thousand at most.
        let tolerance = CLOCK_JUMP_MAX.as_secs() + passed / 100;
        if wall.abs_diff(wall_before.saturating_add(passed)) <= tolerance {
            return;
        }
        seen.steady_since_ms = steady;
        drop(seen);
        let [from, to] = [wall_before, wall].map(|time| date(system_time(time)));
        log::warn!(
            "the clock was set from {from} to {to} within {passed} seconds; keys whose deletion is \
             due are kept for another {} hours",
            DELETION_OBSERVATION.as_secs() / 3600
        );
    }

    /// How long the clocks have to agree yet before this engine deletes by itself.
    pub(super) fn observation_left(&self) -> Duration {
        let steady = self.monotonic_ms();
        let process = self.process();
        let seen = process.clocks.seen();
        let agreed = match seen.last {
            Some(_) => Duration::from_millis(steady.saturating_sub(seen.steady_since_ms)),
            None => Duration::ZERO,
        };
        DELETION_OBSERVATION.saturating_sub(agreed)
    }
}
