//! Connections that fail: which failures are none, what caused the others, and how many of them the log is told.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt, io,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::limits::SERVER_FAILURES_LOGGED_PER_SECOND;

/// An error with what caused it, each once.
pub(super) struct Causes<'a>(pub(super) &'a (dyn Error + 'static));

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = String::new();
        for error in chain(self.0) {
            let text = error.to_string();
            // Many print their cause themselves.
            if last.contains(&text) {
                continue;
            }
            if !last.is_empty() {
                f.write_str(": ")?;
            }
            f.write_str(&text)?;
            last = text;
        }
        Ok(())
    }
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source())
}

/// Whether a peer has merely gone, as clients and health checks do when they need a connection no more.
pub(super) fn is_peer_gone(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|error| {
        let by_hyper = error.downcast_ref::<hyper::Error>();
        let by_system = error.downcast_ref::<io::Error>().map(io::Error::kind);
        by_hyper.is_some_and(|error| error.is_canceled() || error.is_closed() || error.is_timeout())
            || by_system.is_some_and(|kind| {
                matches!(
                    kind,
                    io::ErrorKind::BrokenPipe
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::NotConnected
                        | io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::Interrupted
                )
            })
    })
}

/// Lets so many events of each kind through each second, and counts the others: a flood of one kind hides no other.
#[derive(Debug, Default)]
pub(super) struct Quota(Mutex<BTreeMap<&'static str, Second>>);

#[derive(Debug, Default)]
struct Second {
    began: Option<Instant>,
    count: u32,
    skipped: u64,
}

impl Second {
    fn is_over(&self, now: Instant) -> bool {
        self.began
            .is_none_or(|began| now.saturating_duration_since(began) >= Duration::from_secs(1))
    }
}

impl Quota {
    /// Whether this event may be logged, and how many of its kind were not since the last one that was. `kind` is one
    /// of ours, of which there are few.
    pub(super) fn take(&self, kind: &'static str) -> Option<u64> {
        self.take_at(kind, Instant::now())
    }

    fn take_at(&self, kind: &'static str, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let second = kinds.entry(kind).or_default();
        if second.is_over(now) {
            (second.began, second.count) = (Some(now), 0);
        }
        if second.count >= SERVER_FAILURES_LOGGED_PER_SECOND {
            second.skipped += 1;
            return None;
        }
        second.count += 1;
        Some(std::mem::take(&mut second.skipped))
    }

    /// How many were not logged, once their second is over: so that the last of them are told of, too.
    pub(super) fn rest(&self) -> Option<u64> {
        self.rest_at(Instant::now())
    }

    fn rest_at(&self, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over = kinds.values_mut().filter(|second| second.is_over(now));
        let skipped = over.map(|second| std::mem::take(&mut second.skipped)).sum();
        (skipped > 0).then_some(skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_failures_is_counted_and_not_logged() {
        let quota = Quota::default();
        let start = Instant::now();
        let max = SERVER_FAILURES_LOGGED_PER_SECOND;
        let logged = (0..max + 7).filter(|_| quota.take_at("a", start).is_some()).count();
        assert_eq!(logged, max as usize);
        assert_eq!(quota.rest_at(start), None);
        assert_eq!(quota.take_at("b", start), Some(0), "another kind is told all the same");
        let later = start + Duration::from_secs(1);
        assert_eq!(quota.take_at("a", later), Some(7));
        assert_eq!(quota.rest_at(later), None);
        assert_eq!((0..max).filter_map(|_| quota.take_at("a", later)).sum::<u64>(), 0);
        assert_eq!(quota.rest_at(later + Duration::from_secs(1)), Some(1));
    }

    #[test]
    fn causes_are_told_once_each() {
        #[derive(Debug)]
        struct Outer(io::Error);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("http2 error")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }
        let reset = Outer(io::Error::from(io::ErrorKind::ConnectionReset));
        assert_eq!(Causes(&reset).to_string(), "http2 error: connection reset");
        assert!(is_peer_gone(&reset));
        let twice = io::Error::other(Outer(io::Error::other("too many")));
        assert_eq!(Causes(&twice).to_string(), "http2 error: too many");
        assert!(!is_peer_gone(&twice));
    }
}
