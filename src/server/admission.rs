//! How much work is let in, and whose: keys in progress, keys a second, bytes of bodies and of unsent answers, and
//! nothing once the server drains.
//!
//! Each client has an account. A client that is alone may use everything. As soon as another one asks, each of those
//! that were there lately is sure of its share, whatever the others hold or owe; what is free beyond that goes to
//! whoever asks first. So a client that comes later is let in at once, for which the limits may be passed for a moment:
//! keys in progress up to twice, and by one batch; bytes by half.
//!
//! The limits of keys count data keys, not requests: a request may be for one or for 65,536. Items that are refused
//! count as a key for 16 of them. What is beyond a limit is answered 429, at the cost of a signature check at most.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{
    rate::{Bucket, Rate},
    refusal::{Limit, Refusal},
};
use crate::{
    limits::{SERVER_BYTES_HELD_MAX, SERVER_CLIENT_ACTIVE_TIME, SERVER_TURN_TIME},
    os,
};

/// Counts the keys that are being worked on.
#[derive(Debug)]
pub(super) struct Admission {
    in_progress: AtomicU64,
    in_progress_max: u64,
    rate: Option<Rate>,
    ledger: Arc<Ledger>,
    /// Whether somebody has a turn.
    has_turn: AtomicBool,
    turn: Mutex<Option<Turn>>,
    draining: AtomicBool,
}

/// A client whose batch is larger than its share waits for its share to be free. Meanwhile others get no more than
/// theirs, or small requests would keep it out for ever.
#[derive(Debug)]
struct Turn {
    account: Weak<Account>,
    asked_ms: u64,
}

/// What one client has and owes. As long as the client exists.
#[derive(Debug, Default)]
pub(super) struct Account {
    keys: AtomicU64,
    bytes: AtomicU64,
    /// When it last asked for anything.
    asked_ms: AtomicU64,
    is_listed: AtomicBool,
    pub(super) bucket: Mutex<Option<Bucket>>,
}

impl Account {
    fn is_active(&self, now_ms: u64) -> bool {
        let active_ms = os::millis(SERVER_CLIENT_ACTIVE_TIME);
        self.keys.load(Ordering::Relaxed) > 0
            || self.bytes.load(Ordering::Relaxed) > 0
            || now_ms.saturating_sub(self.asked_ms.load(Ordering::Relaxed)) < active_ms
    }
}

/// The bytes that are held, and the clients that were there lately.
#[derive(Debug, Default)]
struct Ledger {
    bytes: AtomicU64,
    active: Mutex<Vec<Weak<Account>>>,
}

impl Ledger {
    /// Notes that a client asks for something.
    fn note(&self, account: &Arc<Account>, now_ms: u64) {
        account.asked_ms.store(now_ms, Ordering::Relaxed);
        if !account.is_listed.load(Ordering::Relaxed)
            && !account.is_listed.swap(true, Ordering::AcqRel)
        {
            lock(&self.active).push(Arc::downgrade(account));
        }
    }

    /// How many clients share, one at least. Forgets those that have gone.
    fn active_count(&self, now_ms: u64) -> u64 {
        let mut active = lock(&self.active);
        active.retain(|account| match account.upgrade() {
            Some(account) if account.is_active(now_ms) => true,
            Some(account) => {
                account.is_listed.store(false, Ordering::Release);
                false
            }
            None => false,
        });
        active.len().max(1) as u64
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of bodies or of responses, counted as long as they are held.
#[derive(Debug)]
pub(super) struct Held {
    ledger: Arc<Ledger>,
    account: Option<Arc<Account>>,
    own: u64,
}

impl Held {
    /// Counts further bytes.
    pub(super) fn add(&mut self, bytes: usize) {
        self.own += bytes as u64;
        self.ledger.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(account) = &self.account {
            account.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Whether there is room for more: of anybody's, or in the client's share.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        if self.ledger.bytes.load(Ordering::Relaxed) <= SERVER_BYTES_HELD_MAX {
            return Ok(());
        }
        let Some(account) = &self.account else { return Err(Refusal::throttled(Limit::Bytes, 1)) };
        let share = SERVER_BYTES_HELD_MAX / 2 / self.ledger.active_count(os::coarse_ms());
        match account.bytes.load(Ordering::Relaxed) <= share {
            true => Ok(()),
            false => Err(Refusal::throttled(Limit::Bytes, 1)),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.ledger.bytes.fetch_sub(self.own, Ordering::Relaxed);
        if let Some(account) = &self.account {
            account.bytes.fetch_sub(self.own, Ordering::Relaxed);
        }
    }
}

/// Keys that were let in. Gives their places back when dropped.
#[derive(Debug)]
pub(super) struct Admitted<'a> {
    admission: &'a Admission,
    account: &'a Account,
    keys: u64,
}

impl Admitted<'_> {
    /// Gives back what was paid beyond `cost` for items that were refused in the end.
    pub(super) fn settle(&self, cost: u64) {
        if let Some(rate) = &self.admission.rate {
            rate.give_back(self.account, self.keys.saturating_sub(cost));
        }
    }
}

impl Admission {
    pub(super) fn new(in_progress_max: u64, per_second: Option<u32>) -> Self {
        Self {
            in_progress: AtomicU64::new(0),
            in_progress_max,
            rate: per_second.map(Rate::new),
            ledger: Arc::default(),
            has_turn: AtomicBool::new(false),
            turn: Mutex::new(None),
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

    /// Whether a request has a chance at all, before anything of it is read.
    pub(super) fn look(&self) -> Result<(), Refusal> {
        if self.is_draining() {
            return Err(Refusal::unavailable());
        }
        if self.in_progress_max == 0 {
            return Err(Refusal::throttled(Limit::KeysInProgress, 1));
        }
        Ok(())
    }

    /// Whether a request of this client has a chance. Asked before its signature is checked, so the client may be
    /// another one than it says: nothing is charged, and what is refused here the client itself would be refused, too.
    pub(super) fn look_at(&self, account: &Arc<Account>) -> Result<(), Refusal> {
        let own = account.keys.load(Ordering::Relaxed);
        if own > 0
            && self.in_progress() >= self.in_progress_max
            && own >= self.in_progress_max / self.ledger.active_count(os::coarse_ms())
        {
            return Err(Refusal::throttled(Limit::KeysInProgress, 1));
        }
        self.hold(Some(account)).check()
    }

    /// Begins to count bytes, of a client once one is known.
    pub(super) fn hold(&self, account: Option<&Arc<Account>>) -> Held {
        Held { ledger: Arc::clone(&self.ledger), account: account.cloned(), own: 0 }
    }

    /// Lets `keys` of a client in, or none of them.
    pub(super) fn take<'a>(
        &'a self,
        account: &'a Arc<Account>,
        keys: u64,
    ) -> Result<Admitted<'a>, Refusal> {
        let now_ms = os::coarse_ms();
        self.ledger.note(account, now_ms);
        if let Some(rate) = &self.rate {
            rate.check_size(keys)?;
        }
        if !self.enter(account, keys, now_ms) {
            return Err(Refusal::throttled(Limit::KeysInProgress, 1));
        }
        let admitted = Admitted { admission: self, account, keys };
        if let Some(rate) = &self.rate {
            let active_count = || self.ledger.active_count(now_ms);
            rate.pay(account, keys, std::time::Instant::now(), active_count)?;
        }
        Ok(admitted)
    }

    fn enter(&self, account: &Arc<Account>, keys: u64, now_ms: u64) -> bool {
        let max = self.in_progress_max;
        let fits = |before: u64| {
            let after = before.saturating_add(keys);
            (after <= max).then_some(after)
        };
        let (order, failed) = (Ordering::AcqRel, Ordering::Relaxed);
        if !self.has_turn.load(Ordering::Relaxed)
            && self.in_progress.fetch_update(order, failed, fits).is_ok()
        {
            account.keys.fetch_add(keys, Ordering::Relaxed);
            return true;
        }
        let mut turn = lock(&self.turn);
        let turn_ms = os::millis(SERVER_TURN_TIME);
        let is_mine = |turn: &Turn| std::ptr::eq(turn.account.as_ptr(), Arc::as_ptr(account));
        turn.take_if(|turn| {
            is_mine(turn)
                || turn.account.strong_count() == 0
                || now_ms.saturating_sub(turn.asked_ms) > turn_ms
        });
        let own = account.keys.load(Ordering::Relaxed);
        let share = max / self.ledger.active_count(now_ms);
        let all = self.in_progress();
        let enters = own.saturating_add(keys) <= share
            || turn.is_none()
                && (all.saturating_add(keys) <= max || own == 0 && all + share <= max);
        if enters {
            // Still under the lock: two requests of one client at once do not both find its share free.
            account.keys.fetch_add(keys, Ordering::Relaxed);
            self.in_progress.fetch_add(keys, order);
        } else if own == 0 && turn.is_none() {
            *turn = Some(Turn { account: Arc::downgrade(account), asked_ms: now_ms });
        }
        self.has_turn.store(turn.is_some(), Ordering::Relaxed);
        enters
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        self.account.keys.fetch_sub(self.keys, Ordering::Relaxed);
        self.admission.in_progress.fetch_sub(self.keys, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> Arc<Account> {
        Arc::default()
    }

    #[test]
    fn keys_in_progress_are_bounded_and_given_back() {
        let (admission, one) = (Admission::new(10, None), client());
        let first = admission.take(&one, 6).unwrap();
        assert_eq!(admission.take(&one, 5).unwrap_err().status, 429);
        let second = admission.take(&one, 4).unwrap();
        assert_eq!(admission.look_at(&one).unwrap_err().code, "Rejected.Throttling");
        drop((first, second));
        assert_eq!(admission.in_progress(), 0);
        // Alone, whatever its size.
        let large = admission.take(&one, 1000).unwrap();
        assert!(admission.take(&one, 1).is_err());
        drop(large);
        assert!(admission.take(&one, 1).is_ok());
    }

    #[test]
    fn a_client_that_comes_later_has_its_share_of_keys_in_progress() {
        let admission = Admission::new(100, None);
        let (early, late) = (client(), client());
        let all = admission.take(&early, 100).unwrap();
        admission.look_at(&late).unwrap();
        let share = admission.take(&late, 50).unwrap();
        // Who has more than a share gets no more, and nobody gets more than the limit for it.
        assert!(admission.take(&early, 1).is_err());
        assert!(admission.take(&late, 1).is_err());
        drop((all, share));
        assert_eq!(admission.in_progress(), 0);
        // What nobody uses is there for everybody.
        assert!(admission.take(&late, 90).is_ok());
    }

    #[test]
    fn batches_larger_than_a_share_take_turns() {
        let admission = Admission::new(100, None);
        let (one, other) = (client(), client());
        let batch = admission.take(&one, 1000).unwrap();
        assert!(admission.take(&other, 1000).is_err());
        drop(batch);
        assert!(admission.take(&one, 1000).is_err(), "it is the other's turn");
        let batch = admission.take(&other, 1000).unwrap();
        assert!(admission.take(&one, 1000).is_err());
        // Small ones need no turn.
        assert!(admission.take(&one, 50).is_ok());
        drop(batch);
        assert!(admission.take(&one, 1000).is_ok());
    }

    #[test]
    fn bytes_count_as_long_as_they_are_held_and_each_client_has_a_share() {
        let admission = Admission::new(10, None);
        let (one, other) = (client(), client());
        for account in [&one, &other] {
            drop(admission.take(account, 1).unwrap());
        }
        let mut body = admission.hold(Some(&one));
        body.add(usize::try_from(SERVER_BYTES_HELD_MAX).unwrap());
        admission.look_at(&one).unwrap();
        body.add(1);
        assert_eq!(body.check().unwrap_err().status, 429);
        assert_eq!(admission.look_at(&one).unwrap_err().status, 429);
        let mut share = admission.hold(Some(&other));
        share.add(usize::try_from(SERVER_BYTES_HELD_MAX / 4).unwrap());
        share.check().unwrap();
        share.add(1);
        assert_eq!(share.check().unwrap_err().status, 429);
        drop(body);
        share.check().unwrap();
    }

    #[test]
    fn accounts_of_clients_that_are_gone_are_forgotten() {
        let admission = Admission::new(10, None);
        for _ in 0..100 {
            drop(admission.take(&client(), 1).unwrap());
        }
        assert_eq!(admission.ledger.active_count(os::coarse_ms()), 1);
        assert!(lock(&admission.ledger.active).is_empty());
    }

    #[test]
    fn a_draining_server_takes_nothing() {
        let admission = Admission::new(10, None);
        admission.drain();
        assert_eq!(admission.look().unwrap_err().status, 503);
    }
}
