//! Time: contenders take turns round by round, and the median of the rounds counts.
//!
//! A shared machine is slow for a while and then fast again. Turns of half a millisecond make such a while hit every
//! contender alike, so that ratios stay what they are. The order of a round is drawn anew each time: with a fixed one,
//! whatever interrupts in step with the rounds would always interrupt the same contender.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

/// A contender at work: one call does the whole batch, in the memory that all contenders of a case share.
pub(super) type Work<'a, M> = Box<dyn FnMut(&mut M) + 'a>;

/// Shares what is left of the run's time among the cases that are left.
pub(super) struct Clock {
    end: Instant,
    cases_left: u32,
}

impl Clock {
    pub(super) fn new(total: Duration, case_count: u32) -> Self {
        Self { end: Instant::now() + total, cases_left: case_count }
    }

    /// When the next case should be done, its preparation included.
    pub(super) fn next_case(&mut self) -> Instant {
        let now = Instant::now();
        let share = self.end.saturating_duration_since(now) / self.cases_left.max(1);
        self.cases_left = self.cases_left.saturating_sub(1);
        now + share
    }
}

/// Nanoseconds for a key: the median of the rounds and the middle half of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) rounds: usize,
}

impl Times {
    /// Of an odd number of rounds, so that the median is one of them.
    fn of(mut rounds: Vec<f64>) -> Self {
        rounds.sort_by(f64::total_cmp);
        let at = |part: usize| rounds[(rounds.len() - 1) * part / 4];
        Self { median: at(2), low: at(1), high: at(3), rounds: rounds.len() }
    }
}

/// Times every one of `works` until `deadline`; a call makes `keys_a_call` keys.
pub(super) fn measure<M>(
    works: &mut [Work<'_, M>],
    memory: &mut M,
    keys_a_call: usize,
    deadline: Instant,
) -> Vec<Times> {
    let calls: Vec<_> = works.iter_mut().map(|work| calls_a_turn(work, memory)).collect();
    let mut rounds = vec![Vec::new(); works.len()];
    let mut order: Vec<_> = (0..works.len()).collect();
    let mut rng = ChaCha20Rng::from_seed([0; 32]);
    for round in 1.. {
        shuffle(&mut order, &mut rng);
        for &i in &order {
            // Untimed: brings the contender's code and data back after the others' turns.
            call(&mut works[i], memory, 1);
            let ns = call(&mut works[i], memory, calls[i]).as_secs_f64() * 1e9;
            rounds[i].push(ns / (f64::from(calls[i]) * keys_a_call as f64));
        }
        if round >= ROUNDS_MIN && round % 2 == 1 && Instant::now() >= deadline {
            break;
        }
    }
    rounds.into_iter().map(Times::of).collect()
}

/// Fisher and Yates.
fn shuffle(order: &mut [usize], rng: &mut ChaCha20Rng) {
    for end in (1..order.len()).rev() {
        order.swap(end, rng.next_u32() as usize % (end + 1));
    }
}

fn call<M>(work: &mut Work<'_, M>, memory: &mut M, calls: u32) -> Duration {
    let start = Instant::now();
    for _ in 0..calls {
        work(memory);
        black_box(&mut *memory);
    }
    start.elapsed()
}

/// How many calls make a turn that is long enough to measure.
fn calls_a_turn<M>(work: &mut Work<'_, M>, memory: &mut M) -> u32 {
    call(work, memory, 1);
    let mut calls = 1;
    loop {
        let took = call(work, memory, calls);
        if took >= TURN / 8 {
            let a_call = took.as_nanos() / u128::from(calls);
            return u32::try_from(TURN.as_nanos().div_ceil(a_call.max(1))).expect("short turns");
        }
        calls *= 2;
    }
}

/// The length of a turn, if a call is not longer.
const TURN: Duration = Duration::from_micros(500);
/// The least that has a median and a middle half.
const ROUNDS_MIN: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_middle_half() {
        let times = Times::of(vec![9.0, 1.0, 5.0, 3.0, 7.0]);
        assert_eq!(
            (times.low, times.median, times.high, times.rounds),
            (3.0, 5.0, 7.0, 5),
            "of 1, 3, 5, 7, 9"
        );
    }

    #[test]
    fn every_contender_has_the_same_odd_number_of_rounds() {
        let mut works: [Work<'_, u64>; 2] = [Box::new(|n| *n += 1), Box::new(|n| *n += 2)];
        let times = measure(&mut works, &mut 0, 1, Instant::now());
        assert!(times.iter().all(|times| times.rounds == ROUNDS_MIN));
        assert!(times.iter().all(|times| times.low <= times.median && times.median <= times.high));
    }

    #[test]
    fn cases_share_the_time_that_is_left() {
        let mut clock = Clock::new(Duration::from_secs(1000), 10);
        let share = clock.next_case() - Instant::now();
        assert!(share > Duration::from_secs(90) && share <= Duration::from_secs(100));
        let mut clock = Clock::new(Duration::ZERO, 1);
        assert!(clock.next_case() <= Instant::now(), "a run that is late goes on");
        clock.next_case();
    }
}
