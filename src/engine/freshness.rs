//! How long an engine goes on with what it last read of its store.
//!
//! Whoever disables a key or a client writes into the store, and every engine has to learn of it. So an engine whose
//! looks at the store fail goes on for a while only ([`EngineBuilder::stale_max`](super::EngineBuilder::stale_max)),
//! and then refuses every operation on data keys until a look succeeds. A look that does not end is one that failed:
//! the thread that looks may hang in a system call, so another one keeps the time. A file that was replaced is refused
//! at once: what was granted by it is void.
//!
//! Operations pay nothing for this. They compare `Shared::settled` at their entry anyhow; whoever finds that what was
//! read is too old unsettles it, and then they come by the slow way ([`Engine::settle`]) and are refused there.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use super::{Engine, Shared, UNSETTLED};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::date,
    limits::{LOOK_LOG_INTERVAL, LOOK_TIME_MAX, WATCH_INTERVAL},
    os::Generation,
};

/// How an engine stands to its store.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StoreHealth {
    /// Time since the store was last read, or found to be unchanged. Zero for engines in memory.
    pub age: Duration,
    /// Why the last look at the store failed, if it did.
    pub failure: Option<Error>,
    /// Since when looks have failed.
    pub failing_since: Option<SystemTime>,
    /// Whether the store is damaged, missing, replaced or under another root key, which does not pass by itself.
    pub is_grave: bool,
    /// Whether operations on data keys are refused.
    pub is_refusing: bool,
}

/// The looks of one process at its store.
#[derive(Default)]
pub(super) struct Looks {
    /// When the last good look began, by the monotonic clock.
    good_ms: AtomicU64,
    /// When a caller last looked for want of a thread that does.
    tried_ms: AtomicU64,
    /// Whether operations are refused. Changed under `trouble`.
    refusing: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
    /// Held by the caller who looks, where no thread does.
    turn: Mutex<()>,
}

/// Looks that fail.
#[derive(Clone)]
struct Trouble {
    since: SystemTime,
    since_ms: u64,
    error: Error,
    kind: Kind,
    told_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Looks end in an error.
    Fails,
    /// A look has not ended.
    Hangs,
    /// The store's file was replaced: nobody may go on with what was read before.
    Replaced,
}

impl Looks {
    /// Of a new process. What a child inherits is as old as its parent's last look.
    pub(super) fn begin(inherited: Option<&Self>, now_ms: u64) -> Self {
        // The parent's lock is not touched: whoever held it does not exist here.
        let good_ms = inherited.map_or(now_ms, |looks| looks.good_ms.load(Ordering::SeqCst));
        let refusing = inherited.is_some_and(|looks| looks.refusing.load(Ordering::SeqCst));
        Self {
            good_ms: AtomicU64::new(good_ms),
            refusing: AtomicBool::new(refusing),
            ..Self::default()
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.good_ms.load(Ordering::SeqCst))
    }

    /// Whether a look has been under way for too long.
    pub(super) fn hangs(&self) -> bool {
        self.trouble().as_ref().is_some_and(|trouble| trouble.kind == Kind::Hangs)
    }
}

impl Engine {
    /// How this engine stands to its store: whether it could be read, and how long ago.
    pub fn store_health(&self) -> StoreHealth {
        let (process, shared) = (self.process(), self.shared());
        if !shared.can_be_stale() {
            return StoreHealth {
                age: Duration::ZERO,
                failure: None,
                failing_since: None,
                is_grave: false,
                is_refusing: false,
            };
        }
        if !process.watching.is_watched() {
            shared.look_here();
        }
        let now_ms = shared.monotonic_ms();
        let age_ms = process.looks.age_ms(now_ms);
        let trouble = process.looks.trouble().clone();
        StoreHealth {
            age: Duration::from_millis(age_ms),
            is_grave: trouble.as_ref().is_some_and(Trouble::is_grave),
            is_refusing: process.looks.refusing.load(Ordering::SeqCst)
                || age_ms > shared.stale_max_ms(),
            failing_since: trouble.as_ref().map(|trouble| trouble.since),
            failure: trouble.map(|trouble| trouble.error),
        }
    }

    /// The slow way into an operation: lets it in if this process's part is there and what was read of the store is
    /// fresh enough, and the next ones at no cost as long as a thread watches over that.
    ///
    /// # Errors
    /// `ServiceUnavailableTemporary` if it is not fresh.
    #[cold]
    pub(super) fn settle(&self, generation: Generation) -> Result<()> {
        let (process, shared) = (self.process(), self.shared());
        if !shared.can_be_stale() {
            shared.settled.store(generation.number(), Ordering::Release);
            return Ok(());
        }
        if !process.watching.is_watched() {
            shared.look_here();
            return shared.check_fresh();
        }
        // First settled, then checked: whoever refuses from here on unsettles it after this.
        shared.settled.store(generation.number(), Ordering::SeqCst);
        shared.check_fresh().inspect_err(|_| shared.unsettle())
    }
}

impl Shared {
    pub(super) fn can_be_stale(&self) -> bool {
        self.config.background && self.store.is_shared()
    }

    fn stale_max_ms(&self) -> u64 {
        u64::try_from(self.config.stale_max.as_millis()).unwrap_or(u64::MAX)
    }

    fn unsettle(&self) {
        self.settled.store(UNSETTLED, Ordering::SeqCst);
    }

    /// # Errors
    /// `ServiceUnavailableTemporary` if operations are refused.
    fn check_fresh(&self) -> Result<()> {
        let process = self.process();
        let looks = &process.looks;
        let age_ms = looks.age_ms(self.monotonic_ms());
        if !looks.refusing.load(Ordering::SeqCst) && age_ms <= self.stale_max_ms() {
            return Ok(());
        }
        let trouble = looks.trouble();
        let detail = match &*trouble {
            Some(Trouble { since, error, kind: Kind::Replaced, .. }) => format!(
                "Nothing is done with the key store since {}: {}",
                date(*since),
                error.message()
            ),
            Some(Trouble { since, error, .. }) => format!(
                "The key store could not be read since {}, and keys or clients may have been \
                 disabled meanwhile; operations go on once it can be read. {}",
                date(*since),
                error.message()
            ),
            None => format!(
                "The key store was last read {} seconds ago; operations go on once it is read \
                 again.",
                age_ms / 1000
            ),
        };
        Err(Error::new(ErrorKind::StoreUnavailable, detail))
    }

    /// Looks at the store on the caller's thread, if none does and the last look was long ago. One caller does so for
    /// all, who go on meanwhile with what was read.
    fn look_here(&self) {
        let process = self.process();
        let looks = &process.looks;
        let Ok(_turn) = looks.turn.try_lock() else { return };
        let now_ms = self.monotonic_ms();
        let since = |ms: u64| Duration::from_millis(now_ms.saturating_sub(ms));
        let tried_ms = looks.tried_ms.load(Ordering::Relaxed);
        if since(tried_ms.max(looks.good_ms.load(Ordering::SeqCst))) >= WATCH_INTERVAL
            || looks.refusing.load(Ordering::SeqCst)
        {
            looks.tried_ms.store(now_ms, Ordering::Relaxed);
            // Noted.
            let _ = self.refresh_if_changed();
        }
    }

    /// Notes how a look ended that began at `begun_ms`.
    pub(super) fn note_look(&self, begun_ms: u64, failure: Option<&Error>) {
        if !self.can_be_stale() {
            return;
        }
        let process = self.process();
        let looks = &process.looks;
        if let Some(error) = failure {
            let replaced = self.store.is_replaced();
            self.note_trouble(error, if replaced { Kind::Replaced } else { Kind::Fails });
            self.keep_time();
            return;
        }
        looks.good_ms.fetch_max(begun_ms, Ordering::SeqCst);
        let mut trouble = looks.trouble();
        // The bound counts for this look, too: one that took longer than it is old when it ends.
        if looks.age_ms(self.monotonic_ms()) > self.stale_max_ms() {
            return;
        }
        looks.refusing.store(false, Ordering::SeqCst);
        let over = trouble.take();
        drop(trouble);
        if let Some(over) = over {
            let seconds = self.monotonic_ms().saturating_sub(over.since_ms) / 1000;
            log::warn!("the key store can be read again, after {seconds} seconds");
        }
    }

    /// Notes that the store's file was replaced, if that is what an operation has met.
    pub(super) fn note_replaced(&self, error: &Error) {
        if self.can_be_stale() && self.store.is_replaced() && !self.is_refusing() {
            self.note_trouble(error, Kind::Replaced);
            self.keep_time();
        }
    }

    fn is_refusing(&self) -> bool {
        self.process().looks.refusing.load(Ordering::SeqCst)
    }

    fn note_trouble(&self, error: &Error, kind: Kind) {
        let process = self.process();
        let mut trouble = process.looks.trouble();
        let now_ms = self.monotonic_ms();
        let message = match &mut *trouble {
            Some(known) => {
                // What is new is told at once.
                let news = known.error.kind() != error.kind() || known.kind != kind;
                known.error = error.clone();
                known.kind = kind;
                if !news {
                    return;
                }
                known.told_ms = now_ms;
                format!("the key store still cannot be read: {error}")
            }
            None => {
                *trouble = Some(Trouble {
                    since: (self.config.clock)(),
                    since_ms: now_ms,
                    error: error.clone(),
                    kind,
                    told_ms: now_ms,
                });
                let seconds = self.config.stale_max.as_secs();
                match kind {
                    Kind::Replaced => format!("the key store cannot be used: {error}"),
                    _ => format!(
                        "the key store cannot be read: {error}; operations go on with what was \
                         read before, for at most {seconds} seconds"
                    ),
                }
            }
        };
        // A logger may be anybody's code, and ask the engine something.
        drop(trouble);
        log::warn!("{message}");
    }

    /// What has to be done as time goes by: sees that a look hangs, refuses operations once what was read is too old,
    /// and says again that the store cannot be read. Returns how long to wait until the next time, at most.
    pub(super) fn keep_time(&self) -> Duration {
        if !self.can_be_stale() {
            return WATCH_INTERVAL;
        }
        let process = self.process();
        let looks = &process.looks;
        let now_ms = self.monotonic_ms();
        let age_ms = looks.age_ms(now_ms);
        let known = looks.trouble().is_some();
        if !known && Duration::from_millis(age_ms) > LOOK_TIME_MAX {
            let detail = format!("A look at it has not ended for {} seconds.", age_ms / 1000);
            self.note_trouble(&Error::new(ErrorKind::StoreUnavailable, detail), Kind::Hangs);
        }
        let mut trouble = looks.trouble();
        let replaced = trouble.as_ref().is_some_and(|trouble| trouble.kind == Kind::Replaced);
        let begins = (replaced || age_ms > self.stale_max_ms())
            && !looks.refusing.swap(true, Ordering::SeqCst);
        let refuses = looks.refusing.load(Ordering::SeqCst);
        if refuses {
            self.unsettle();
        }
        if begins {
            // Keys that were made ahead of need are not handed out either.
            self.ring.load().outdate();
        }
        let again = trouble.as_mut().and_then(|trouble| trouble.again(now_ms));
        drop(trouble);
        if begins {
            log::error!(
                "operations on data keys are refused until the key store can be read: it was last \
                 read {} seconds ago",
                age_ms / 1000
            );
        }
        if let Some(again) = again {
            let so = match refuses {
                true => "operations on data keys are refused",
                false => "operations go on with what was read before",
            };
            log::warn!("{again}; {so}");
        }
        let left_ms = self.stale_max_ms().saturating_sub(age_ms).saturating_add(1);
        WATCH_INTERVAL.min(Duration::from_millis(left_ms.max(10)))
    }
}

impl Trouble {
    /// What is said of it again, if it is time to.
    fn again(&mut self, now_ms: u64) -> Option<String> {
        if Duration::from_millis(now_ms.saturating_sub(self.told_ms)) < LOOK_LOG_INTERVAL {
            return None;
        }
        self.told_ms = now_ms;
        Some(format!("the key store cannot be read since {}: {}", date(self.since), self.error))
    }

    /// Whether it does not pass by itself.
    fn is_grave(&self) -> bool {
        use ErrorKind::{StoreCorrupt, StoreMissing, WrongRootKey};
        self.kind == Kind::Replaced
            || matches!(self.error.kind(), StoreCorrupt | StoreMissing | WrongRootKey)
    }
}
