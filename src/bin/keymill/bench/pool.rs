//! The job `pool-take`: one data key out of a pool that has made it beforehand, beside the call that makes one.
//!
//! A turn begins with a full pool, which nobody's time contains, and takes all that is in it. Results go into memory
//! that is there and are dropped after the turn, for both contenders alike: who takes a key from a pool keeps it.

use std::{
    hint::black_box,
    thread,
    time::{Duration, Instant},
};

use keymill::{DataKey, KeyPool, KeyPoolConfig, Operation};

use super::{
    cases::{Case, Contender},
    engine::{self, DEK_LEN, NUMBER_OF_BYTES, alias},
    loops::{RingLoop, all_open},
    must_be_right,
    single::{of_engine, of_ring_loop},
    timing::{self, Times, Turn},
};
use crate::failure::Result;

/// Keys of a full pool, and of a turn.
const CAPACITY: usize = 8192;
/// One for all: a pool's keys are made before anyone knows for what.
const AAD: &[u8; engine::AAD_LEN] = b"pool of data key";

/// Checks the contenders of a case, then times them.
pub(super) fn measure(
    case: &Case,
    contenders: &[Contender],
    deadline: Instant,
) -> Result<Vec<Times>> {
    let kek = engine::keks(1)[0];
    let engine = engine::engine(case.threads, &[kek])?;
    let handle = engine.key(&alias(0))?;
    let config = KeyPoolConfig::new(Operation::GenerateDataKey, NUMBER_OF_BYTES);
    // Refilled between turns, not during one: what is measured is a pool that is stocked.
    let config = config.aad(AAD).capacity(CAPACITY).low_watermark(1);
    let pool = KeyPool::new(&engine, &handle, config)?;

    let mut turns: Vec<Turn<'_>> = Vec::new();
    for contender in contenders {
        let right = if *contender == Contender::Engine {
            wait_until_full(&pool);
            let taken: Vec<_> = (0..CAPACITY).map(|_| take_one(&pool)).collect();
            turns.push(taking(|| wait_until_full(&pool), || take_one(&pool)));
            all_open(taken.iter().map(|key| of_engine(key, &kek, AAD)))
        } else {
            let mut each = RingLoop::new(&[kek])?;
            let made: Vec<_> = (0..CAPACITY).map(|_| each.make_one(DEK_LEN, AAD)).collect();
            turns.push(taking(|| (), move || each.make_one(DEK_LEN, AAD)));
            all_open(made.iter().map(|made| of_ring_loop(made, &kek, AAD)))
        };
        must_be_right(right, case, *contender)?;
    }
    Ok(timing::measure_turns(&mut turns, deadline))
}

fn take_one(pool: &KeyPool) -> DataKey {
    pool.take().expect("a pool without keys makes one")
}

/// A turn: untimed preparation, then as many keys as a full pool has.
fn taking<'a, K: 'a>(mut prepare: impl FnMut() + 'a, mut take: impl FnMut() -> K + 'a) -> Turn<'a> {
    let mut taken = Vec::with_capacity(CAPACITY);
    Box::new(move || {
        prepare();
        let start = Instant::now();
        for _ in 0..CAPACITY {
            taken.push(take());
        }
        let took = start.elapsed();
        black_box(&mut taken).clear();
        (took, CAPACITY)
    })
}

fn wait_until_full(pool: &KeyPool) {
    while pool.metrics().depth < CAPACITY {
        thread::sleep(Duration::from_micros(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cases::Job;

    #[test]
    fn both_contenders_take_their_turns() {
        let case = Case {
            job: Job::PoolTake,
            dek_len: Some(DEK_LEN),
            aad_len: Some(engine::AAD_LEN),
            keks: Some(1),
            batch: Some(1),
            threads: 1,
        };
        let contenders = case.contenders(&[]);
        let times = measure(&case, &contenders, Instant::now()).unwrap();
        assert_eq!(times.len(), 2);
    }
}
