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

/// A contender who times its turn itself, because something has to be done first that does not count: returns what the
/// turn took and how many keys it made.
pub(super) type Turn<'a> = Box<dyn FnMut() -> (Duration, usize) + 'a>;

/// Shares what is left of the run's time among the cases that are left, by their weights.
pub(super) struct Clock {
    end: Instant,
    weight_left: u32,
}

impl Clock {
    /// For cases that weigh `weight` together.
    pub(super) fn new(total: Duration, weight: u32) -> Self {
        Self { end: Instant::now() + total, weight_left: weight }
    }

    /// When the next case, which weighs `weight`, should be done, its preparation included.
    pub(super) fn next_case(&mut self, weight: u32) -> Instant {
        let now = Instant::now();
        let share = self.end.saturating_duration_since(now) / self.weight_left.max(1) * weight;
        self.weight_left = self.weight_left.saturating_sub(weight);
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
    pub(super) fn of(mut rounds: Vec<f64>) -> Self {
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
    take_turns(works.len(), deadline, |i| {
        // Untimed: brings the contender's code and data back after the others' turns.
        call(&mut works[i], memory, 1);
        let took = call(&mut works[i], memory, calls[i]);
        ns_per_key(took, f64::from(calls[i]) * keys_a_call as f64)
    })
}

/// As [`measure`], for those who time themselves.
pub(super) fn measure_turns(turns: &mut [Turn<'_>], deadline: Instant) -> Vec<Times> {
    take_turns(turns.len(), deadline, |i| {
        let (took, keys) = turns[i]();
        ns_per_key(took, keys as f64)
    })
}

fn ns_per_key(took: Duration, keys: f64) -> f64 {
    took.as_secs_f64() * 1e9 / keys
}

/// Rounds until `deadline`. In each, every contender has a turn: `turn` says what it took of the one at an index.
fn take_turns(count: usize, deadline: Instant, mut turn: impl FnMut(usize) -> f64) -> Vec<Times> {
    let mut rounds = vec![Vec::new(); count];
    let mut order: Vec<_> = (0..count).collect();
    let mut rng = ChaCha20Rng::from_seed([0; 32]);
    for round in 1.. {
        shuffle(&mut order, &mut rng);
        for &i in &order {
            rounds[i].push(turn(i));
        }
        if round >= ROUNDS_MIN && round % 2 == 1 && Instant::now() >= deadline {
            break;
        }
    }
    rounds.into_iter().map(Times::of).collect()
}

/// Fisher and Yates.
pub(super) fn shuffle<T>(order: &mut [T], rng: &mut ChaCha20Rng) {
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
    fn whoever_times_itself_is_believed() {
        let turn = || (Duration::from_micros(3), 100);
        let times = measure_turns(&mut [Box::new(turn)], Instant::now());
        assert!((times[0].median - 30.0).abs() < 1e-9 && times[0].rounds == ROUNDS_MIN);
    }

    #[test]
    fn cases_share_the_time_that_is_left() {
        let mut clock = Clock::new(Duration::from_secs(1000), 10);
        let share = clock.next_case(1) - Instant::now();
        assert!(share > Duration::from_secs(90) && share <= Duration::from_secs(100));
        let share = clock.next_case(9) - Instant::now();
        assert!(share > Duration::from_secs(990), "all that is left");
        let mut clock = Clock::new(Duration::ZERO, 1);
        assert!(clock.next_case(1) <= Instant::now(), "a run that is late goes on");
        clock.next_case(1);
    }
}
