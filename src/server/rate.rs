//! Keys a second, for all and for each client.
//!
//! Two buckets of tokens: one of the whole server, and one of each client that is filled by its share of the rate. A
//! client that is alone draws on the first. With others there it may draw on either: its own is its share, which nobody
//! takes from it, and the first holds what others leave over.
//!
//! A bucket may be overdrawn: a batch passes while there is anything in the bucket, and what comes after it waits until
//! the debt is paid. So a batch that is larger than the rate is slowed down, not shut out; one that would take more
//! than [`SERVER_DEBT_TIME`] to pay is refused for good.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use super::{
    admission::Account,
    refusal::{Limit, Refusal},
};
use crate::limits::SERVER_DEBT_TIME;

#[derive(Debug)]
pub(super) struct Rate {
    per_second: f64,
    all: Mutex<Bucket>,
}

#[derive(Debug)]
pub(super) struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    /// Adds what has come since the last time. A second's worth at most is saved.
    fn fill(&mut self, per_second: f64, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + elapsed * per_second).min(per_second.max(1.0));
        self.at = self.at.max(now);
    }

    /// Seconds until there is something in it.
    fn wait(&self, per_second: f64) -> f64 {
        (-self.level).max(0.0) / per_second
    }
}

#[expect(clippy::cast_precision_loss, reason = "a batch has few keys, and a server few clients")]
fn float(count: u64) -> f64 {
    count as f64
}

impl Rate {
    pub(super) fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second);
        let all = Mutex::new(Bucket { level: per_second.max(1.0), at: Instant::now() });
        Self { per_second, all }
    }

    /// Refuses a batch that no waiting makes possible.
    pub(super) fn check_size(&self, keys: u64) -> Result<(), Refusal> {
        let max = self.per_second * SERVER_DEBT_TIME.as_secs_f64();
        if keys <= 1 || float(keys) <= max {
            return Ok(());
        }
        Err(Refusal::parameter(format_args!(
            "The batch has {keys} items; this server makes {} keys a second and takes batches of \
             {max} items at most.",
            self.per_second
        )))
    }

    /// Takes `keys` out, or tells when to come again.
    pub(super) fn pay(
        &self,
        account: &Account,
        keys: u64,
        now: Instant,
        active_count: impl FnOnce() -> u64,
    ) -> Result<(), Refusal> {
        let keys = float(keys);
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let active = active_count().max(1);
        let share = self.per_second / float(active);
        let mut own = account.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let own = own.get_or_insert(Bucket { level: share.max(1.0), at: now });
        all.fill(self.per_second, now);
        own.fill(share, now);
        let from_all = all.level > 0.0;
        if !from_all && (active == 1 || own.level <= 0.0) {
            let mut wait = all.wait(self.per_second);
            if active > 1 {
                wait = wait.min(own.wait(share));
            }
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "some seconds"
            )]
            let seconds = wait.ceil().max(1.0) as u32;
            return Err(Refusal::throttled(Limit::KeysPerSecond, seconds));
        }
        let debt_max = self.per_second * SERVER_DEBT_TIME.as_secs_f64();
        all.level = (all.level - keys).max(-debt_max.max(1.0));
        own.level = match (active, from_all) {
            // Whoever is alone owes what all owe.
            (1, _) => all.level,
            // What others leave over costs nobody more than the share that it has.
            (_, true) => (own.level - keys).max(own.level.min(0.0)),
            (_, false) => own.level - keys,
        };
        Ok(())
    }

    /// Puts back what was paid too much.
    pub(super) fn give_back(&self, account: &Account, keys: u64) {
        if keys == 0 {
            return;
        }
        let cap = self.per_second.max(1.0);
        let give = |bucket: &mut Bucket| bucket.level = (bucket.level + float(keys)).min(cap);
        give(&mut self.all.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(own) = &mut *account.bucket.lock().unwrap_or_else(PoisonError::into_inner) {
            give(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_bucket_can_be_overdrawn_once_and_is_paid_back() {
        let (rate, account, start) = (Rate::new(10), Account::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let pay = |keys, now| rate.pay(&account, keys, now, || 1).is_ok();
        assert!(pay(35, start));
        assert!(!pay(1, after(2)));
        assert!(pay(1, after(3)));
        // A rest of any length saves a second's worth.
        assert!(pay(10, after(1000)));
        assert!(!pay(1, after(1000)));
    }

    #[test]
    fn a_client_in_debt_keeps_no_other_out_and_everything_together_is_the_rate() {
        let (rate, start) = (Rate::new(100), Instant::now());
        let (greedy, modest) = (Account::default(), Account::default());
        rate.pay(&greedy, 3000, start, || 1).unwrap();
        let refusal = rate.pay(&greedy, 1, start, || 1).unwrap_err();
        assert_eq!(refusal.throttled.map(|(_, seconds)| seconds), Some(29));
        let (mut of_greedy, mut of_modest) = (0, 0);
        for tick in 1..=20_000 {
            let now = start + Duration::from_millis(10 * tick);
            of_greedy += u64::from(rate.pay(&greedy, 1, now, || 2).is_ok());
            of_modest += u64::from(rate.pay(&modest, 1, now, || 2).is_ok());
            if tick == 100 {
                assert!(of_modest >= 50, "{of_modest} keys in the first second");
            }
        }
        // 200 seconds of 100 keys, and a burst.
        assert!(of_modest >= 9_900, "{of_modest}");
        assert!(of_greedy + of_modest <= 20_300, "{of_greedy} and {of_modest}");
    }

    #[test]
    fn what_others_leave_over_is_used() {
        let (rate, start) = (Rate::new(100), Instant::now());
        let (busy, idle) = (Account::default(), Account::default());
        let mut of_busy = 0;
        for tick in 0..10_000_u64 {
            let now = start + Duration::from_millis(10 * tick);
            of_busy += u64::from(rate.pay(&busy, 1, now, || 2).is_ok());
            if tick % 100 == 0 {
                rate.pay(&idle, 1, now, || 2).unwrap();
            }
        }
        assert!(of_busy >= 9_700, "{of_busy} of 9,900");
    }

    #[test]
    fn a_batch_beyond_all_patience_is_refused_and_refused_items_are_given_back() {
        let (rate, account, start) = (Rate::new(100), Account::default(), Instant::now());
        assert_eq!(rate.check_size(6001).unwrap_err().status, 400);
        rate.check_size(6000).unwrap();
        rate.pay(&account, 6000, start, || 1).unwrap();
        rate.give_back(&account, 6000 - 375);
        assert!(rate.pay(&account, 1, start + Duration::from_secs(3), || 1).is_ok());
    }
}
