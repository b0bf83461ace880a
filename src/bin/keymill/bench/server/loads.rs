//! Load: closed, where each connection asks again as soon as it has an answer, and open, where requests come when they
//! are due, whether or not others are answered.
//!
//! A closed loop finds the most that a server does. It says nothing of waiting: a server that stops for a second is
//! asked nothing in that second. In an open loop the arrivals of that second are late by all of it, and count so: a
//! latency is the time from when a request was due to its answer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aws_lc_rs::signature::ParsedPublicKey;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    requests::Signed,
    wire::{Connection, Target},
};
use crate::failure::{Failure, Result};

/// Connections that are kept from one load to the next.
#[derive(Default)]
pub(super) struct Pool(Vec<Connection>);

/// What a closed loop did.
pub(super) struct Closed {
    pub(super) calls: u64,
    pub(super) took: Duration,
}

/// When requests of an open loop are due.
#[derive(Clone, Copy)]
pub(super) struct Schedule {
    /// From one to the next.
    pub(super) interval: Duration,
    pub(super) time: Duration,
    pub(super) late: Late,
}

/// What becomes of requests that were not sent by the end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Late {
    /// They are sent, and their latencies count.
    Send,
    /// They are left out: under overload there is no end to them.
    Drop,
}

/// What an open loop did.
#[derive(Default)]
pub(super) struct Open {
    /// Answered 200 before the end, if late ones are dropped; in all otherwise.
    pub(super) done: u64,
    /// Answered 429.
    pub(super) refused: u64,
    /// Of those that are done, sorted.
    pub(super) latencies: Vec<Duration>,
    /// How late requests were announced, the latest hundredth left out: for want of a CPU, which says how far the
    /// machine is to be believed.
    pub(super) lateness: Duration,
}

impl Pool {
    /// Makes it `count` connections at least. `first` is what a new one is asked, since a server ends those that are
    /// asked nothing.
    pub(super) async fn grow(&mut self, count: usize, target: &Target, first: &[u8]) -> Result<()> {
        while self.0.len() < count {
            let mut connection = target.connect().await?;
            connection.call(first).await?.ok()?;
            self.0.push(connection);
        }
        Ok(())
    }

    /// Lets those beyond `count` go.
    pub(super) fn shrink(&mut self, count: usize) {
        self.0.truncate(count);
    }

    fn take(&mut self, count: usize) -> Vec<Connection> {
        self.0.split_off(self.0.len().saturating_sub(count))
    }

    /// Calls on `count` connections for `time`, each as fast as it is answered.
    pub(super) async fn closed(
        &mut self,
        count: usize,
        requests: &Signed,
        time: Duration,
    ) -> Result<Closed> {
        let start = Instant::now();
        let end = start + time;
        let mut tasks = JoinSet::new();
        for (place, mut connection) in self.take(count).into_iter().enumerate() {
            let requests = Arc::clone(requests);
            tasks.spawn(async move {
                let mut calls = 0;
                // Apart from each other, so that not all send the same.
                let turn = requests.iter().cycle().skip(place * requests.len() / count);
                for request in turn {
                    connection.call(request).await?.ok()?;
                    calls += 1;
                    if Instant::now() >= end {
                        break;
                    }
                }
                Ok::<_, Failure>((connection, calls))
            });
        }
        let mut calls = 0;
        while let Some(ended) = tasks.join_next().await {
            let (connection, its) = ended.expect("tasks do not panic and are not aborted")?;
            self.0.push(connection);
            calls += its;
        }
        Ok(Closed { calls, took: start.elapsed() })
    }

    /// Calls on `count` connections when requests are due. One that is due when no connection is free waits for one.
    pub(super) async fn open(
        &mut self,
        count: usize,
        requests: &Signed,
        schedule: Schedule,
    ) -> Result<Open> {
        let total = schedule.due_by(schedule.time);
        let due = Arc::new(Semaphore::new(0));
        let next = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let end = start + schedule.time;
        let mut tasks = JoinSet::new();
        for mut connection in self.take(count) {
            let (requests, due, next) = (Arc::clone(requests), Arc::clone(&due), Arc::clone(&next));
            tasks.spawn(async move {
                let mut open = Open::default();
                loop {
                    due.acquire().await.expect("nobody closes it").forget();
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= total {
                        return Ok::<_, Failure>((connection, open));
                    }
                    if schedule.late == Late::Drop && Instant::now() >= end {
                        continue;
                    }
                    let was_due = start + schedule.offset(number);
                    let request = &requests[number % requests.len()];
                    let answer = connection.call(request).await?;
                    let now = Instant::now();
                    if answer.status == 429 {
                        open.refused += 1;
                        continue;
                    }
                    answer.ok()?;
                    if schedule.late == Late::Send || now < end {
                        open.done += 1;
                        open.latencies.push(now.saturating_duration_since(was_due));
                    }
                }
            });
        }
        let arrivals = {
            let due = Arc::clone(&due);
            thread::spawn(move || schedule.announce(start, total, &due, count))
        };
        let mut all = Open::default();
        while let Some(ended) = tasks.join_next().await {
            let (connection, open) = ended.expect("tasks do not panic and are not aborted")?;
            self.0.push(connection);
            all.done += open.done;
            all.refused += open.refused;
            all.latencies.extend(open.latencies);
        }
        let mut late = arrivals.join().expect("it does not panic");
        late.sort_unstable();
        all.lateness = percentile(&late, 990);
        all.latencies.sort_unstable();
        Ok(all)
    }
}

/// Under overload, arrivals are announced together: their times do not count, and waking for each would take time away
/// from the server.
const TOGETHER: Duration = Duration::from_millis(1);
/// Arrivals that are closer than this are announced together: a sleep has to be worth it.
const CLOSEST: Duration = Duration::from_micros(30);

impl Schedule {
    /// How many are due after `elapsed`. The first is due at once.
    fn due_by(&self, elapsed: Duration) -> usize {
        let due = elapsed.as_nanos() / self.interval.as_nanos().max(1);
        usize::try_from(due).expect("a turn is short") + 1
    }

    /// When the request of this number is due, from the start.
    fn offset(&self, number: usize) -> Duration {
        self.interval.mul_f64(number as f64)
    }

    /// Adds a permit for each request once it is due, and in the end one for each of `tasks` to end by. Returns how
    /// late each was.
    fn announce(
        &self,
        start: Instant,
        total: usize,
        due: &Semaphore,
        tasks: usize,
    ) -> Vec<Duration> {
        let pause = if self.late == Late::Drop { TOGETHER } else { CLOSEST };
        let (mut announced, mut late) = (0, Vec::with_capacity(total));
        while announced < total {
            let elapsed = start.elapsed();
            let by_now = self.due_by(elapsed).min(total);
            due.add_permits(by_now - announced);
            late.extend(
                (announced..by_now).map(|number| elapsed.saturating_sub(self.offset(number))),
            );
            announced = by_now;
            thread::sleep(self.offset(announced).saturating_sub(start.elapsed()).max(pause));
        }
        due.add_permits(tasks);
        late
    }
}

impl Open {
    /// The latency that so many of a thousand requests did not exceed.
    pub(super) fn percentile(&self, per_mille: usize) -> Duration {
        percentile(&self.latencies, per_mille)
    }
}

fn percentile(sorted: &[Duration], per_mille: usize) -> Duration {
    let place = (sorted.len() * per_mille).div_ceil(1000).saturating_sub(1);
    sorted.get(place).copied().unwrap_or_default()
}

/// What a thread did that only checks signatures.
pub(super) struct Verified {
    pub(super) count: f64,
    pub(super) took: Duration,
    /// The part of it in which nothing happened: this thread never waits, so the machine was doing something else.
    pub(super) stalled: Duration,
}

/// A check of a signature that takes so long was interrupted.
const STALL: Duration = Duration::from_micros(500);

/// Checks signatures on this thread for `time`.
pub(super) fn verify(
    key: &ParsedPublicKey,
    signed: &[(String, Vec<u8>)],
    time: Duration,
) -> Result<Verified> {
    let start = Instant::now();
    let (mut count, mut stalled, mut last) = (0_u32, Duration::ZERO, start);
    for (text, signature) in signed.iter().cycle() {
        key.verify_sig(text.as_bytes(), signature).map_err(|_| {
            Failure::broke("a signature of the client's key is not good", "report this as a bug")
        })?;
        count += 1;
        let now = Instant::now();
        let one = now - last;
        last = now;
        if one >= STALL {
            stalled += one;
        }
        if now - start >= time {
            break;
        }
    }
    Ok(Verified { count: count.into(), took: last - start, stalled })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_and_of_many() {
        let open = |count: u64| {
            let latencies = (1..=count).map(Duration::from_micros).collect();
            Open { latencies, ..Open::default() }
        };
        let micros = |open: &Open, per_mille| open.percentile(per_mille).as_micros();
        assert_eq!(micros(&open(1000), 500), 500);
        assert_eq!(micros(&open(1000), 990), 990);
        assert_eq!(micros(&open(1000), 999), 999);
        assert_eq!(micros(&open(1), 999), 1);
        assert_eq!(micros(&open(0), 500), 0);
    }

    #[test]
    fn every_request_that_is_due_is_announced_and_every_task_ends() {
        let (time, interval) = (Duration::from_millis(20), Duration::from_micros(200));
        for late in [Late::Send, Late::Drop] {
            let due = Semaphore::new(0);
            let start = Instant::now();
            let lateness = Schedule { interval, time, late }.announce(start, 100, &due, 3);
            assert_eq!(lateness.len(), 100);
            assert_eq!(due.available_permits(), 103);
            assert!(start.elapsed() >= Duration::from_micros(19_800), "not before it is due");
        }
    }
}
