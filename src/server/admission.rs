//! How much work is let in: keys in progress, keys a second, bytes of bodies, and nothing once the server drains.
//!
//! The limits of keys count data keys, not requests: a request may be for one or for 65,536. Both are taken before any
//! key work; what is beyond them is answered 429, at the cost of a signature check at most.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::refusal::Refusal;
use crate::limits::SERVER_BYTES_HELD_MAX;

/// Counts the keys that are being worked on.
#[derive(Debug)]
pub(super) struct Admission {
    in_progress: AtomicU64,
    in_progress_max: u64,
    rate: Option<Mutex<Bucket>>,
    bytes: Arc<AtomicU64>,
    draining: AtomicBool,
}

/// Bytes of bodies or of responses, counted as long as they are held.
#[derive(Debug)]
pub(super) struct Held {
    all: Arc<AtomicU64>,
    own: u64,
}

impl Held {
    /// Counts further bytes.
    pub(super) fn add(&mut self, bytes: usize) {
        self.own += bytes as u64;
        self.all.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Whether there is room for more, of anybody's.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        match self.all.load(Ordering::Relaxed) <= SERVER_BYTES_HELD_MAX {
            true => Ok(()),
            false => Err(Refusal::throttled()),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

/// A token bucket that may be overdrawn: a batch of any size passes while there is anything in the bucket, and what
/// comes after it waits until the debt is paid. So a large batch is slowed down, not shut out.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    /// A second's worth at most.
    level: f64,
    at: std::time::Instant,
}

impl Bucket {
    fn take(&mut self, keys: u64, now: std::time::Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + elapsed * self.per_second).min(self.per_second.max(1.0));
        self.at = now;
        if self.level <= 0.0 {
            return false;
        }
        #[expect(clippy::cast_precision_loss, reason = "a batch has few keys")]
        let keys = keys as f64;
        self.level -= keys;
        true
    }
}

/// Keys that were let in. Gives their places back when dropped.
#[derive(Debug)]
pub(super) struct Admitted<'a> {
    admission: &'a Admission,
    keys: u64,
}

impl Admission {
    pub(super) fn new(in_progress_max: u64, per_second: Option<u32>) -> Self {
        let bucket = |per_second| {
            let per_second = f64::from(per_second);
            let at = std::time::Instant::now();
            Mutex::new(Bucket { per_second, level: per_second.max(1.0), at })
        };
        Self {
            in_progress: AtomicU64::new(0),
            in_progress_max,
            rate: per_second.map(bucket),
            bytes: Arc::default(),
            draining: AtomicBool::new(false),
        }
    }

    /// Refuses everything from now on.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    pub(super) fn in_progress(&self) -> u64 {
        self.in_progress.load(Ordering::Relaxed)
    }

    /// Whether a request has a chance at all: asked before its signature is checked.
    pub(super) fn look(&self) -> Result<(), Refusal> {
        if self.is_draining() {
            return Err(Refusal::unavailable());
        }
        if self.in_progress() >= self.in_progress_max {
            return Err(Refusal::throttled());
        }
        self.hold().check()
    }

    /// Begins to count bytes. They may pass the bound for a moment, but nothing new is let in then.
    pub(super) fn hold(&self) -> Held {
        Held { all: Arc::clone(&self.bytes), own: 0 }
    }

    /// Lets `keys` in, or none of them. More than the most in progress are let in when there are no others.
    pub(super) fn take(&self, keys: u64) -> Result<Admitted<'_>, Refusal> {
        let max = self.in_progress_max;
        let fits = |before: u64| {
            let after = before.saturating_add(keys);
            (before == 0 || after <= max).then_some(after)
        };
        let (order, failed) = (Ordering::AcqRel, Ordering::Relaxed);
        if self.in_progress.fetch_update(order, failed, fits).is_err() {
            return Err(Refusal::throttled());
        }
        let admitted = Admitted { admission: self, keys };
        match &self.rate {
            Some(bucket) => {
                let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
                match bucket.take(keys, std::time::Instant::now()) {
                    true => Ok(admitted),
                    false => Err(Refusal::throttled()),
                }
            }
            None => Ok(admitted),
        }
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        self.admission.in_progress.fetch_sub(self.keys, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn keys_in_progress_are_bounded_and_given_back() {
        let admission = Admission::new(10, None);
        let first = admission.take(6).unwrap();
        assert_eq!(admission.take(5).unwrap_err().status, 429);
        let second = admission.take(4).unwrap();
        assert_eq!(admission.look().unwrap_err().code, "Rejected.Throttling");
        drop((first, second));
        assert_eq!(admission.in_progress(), 0);
        // Alone, whatever its size.
        let large = admission.take(1000).unwrap();
        assert!(admission.take(1).is_err());
        drop(large);
        assert!(admission.take(1).is_ok());
    }

    #[test]
    fn a_bucket_can_be_overdrawn_once_and_is_paid_back() {
        let start = Instant::now();
        let mut bucket = Bucket { per_second: 10.0, level: 10.0, at: start };
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(bucket.take(35, start));
        assert!(!bucket.take(1, after(2)));
        assert!(bucket.take(1, after(3)));
        // A rest of any length saves a second's worth.
        assert!(bucket.take(10, after(1000)));
        assert!(!bucket.take(1, after(1000)));
    }

    #[test]
    fn bytes_count_as_long_as_they_are_held() {
        let admission = Admission::new(10, None);
        let mut body = admission.hold();
        body.add(usize::try_from(SERVER_BYTES_HELD_MAX).unwrap());
        admission.look().unwrap();
        let mut other = admission.hold();
        other.add(1);
        assert_eq!(body.check().unwrap_err().status, 429);
        assert_eq!(admission.look().unwrap_err().status, 429);
        drop(other);
        admission.look().unwrap();
    }

    #[test]
    fn a_draining_server_takes_nothing() {
        let admission = Admission::new(10, None);
        admission.drain();
        assert_eq!(admission.look().unwrap_err().status, 503);
    }
}
