//! Ratios of the batch call to the idiomatic loop, for PERF.md.
//!
//! ```text
//! cargo bench --bench ratios
//! cargo bench --bench ratios -- 4096      # these batch sizes only
//! ```
//! In one process and one run, the contenders take turns round by round, each round long enough to measure; medians
//! over all rounds are printed, with the middle half as the spread. So a machine that slows down for a while slows all
//! of them.

mod contenders;

use std::time::Instant;

use contenders::{Batch, IdiomaticLoop, aads};

const SIZES: [usize; 11] = [1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16_384, 65_536];
const ROUNDS: usize = 41;
/// Keys that each contender makes in a round, at least.
const KEYS_A_ROUND: usize = 16_384;
/// Calls that each contender makes in a round, at least.
const CALLS_A_ROUND: usize = 4;

fn main() {
    // `cargo test --benches` runs every bench once, to see that it works.
    let rounds = if std::env::args().any(|argument| argument == "--bench") { ROUNDS } else { 1 };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (one, all) = (Batch::new(1), Batch::new(threads));
    let mut idiomatic = IdiomaticLoop::new();

    println!(
        "ns per key: median of {rounds} interleaved rounds (middle half); ratio = loop / batch"
    );
    println!(
        "| batch size | batch, 1 thread | batch, {threads} threads | single calls | idiomatic loop | ratio, 1 thread |"
    );
    println!("|---|---|---|---|---|---|");
    let asked: Vec<usize> = std::env::args()
        .filter_map(|argument| argument.parse().ok())
        .filter(|size| *size > 0)
        .collect();
    for size in if asked.is_empty() { SIZES.to_vec() } else { asked } {
        let aads = aads(size);
        let mut times = [const { Vec::new() }; 4];
        for _ in 0..rounds {
            times[0].push(ns_per_key(size, || drop(one.make(&aads))));
            times[1].push(ns_per_key(size, || drop(all.make(&aads))));
            times[2].push(ns_per_key(size, || drop(one.make_singly(&aads))));
            times[3].push(ns_per_key(size, || drop(idiomatic.make(&aads))));
        }
        let [one, all, single, idiomatic] = times.map(Spread::of);
        let ratio = idiomatic.median / one.median;
        println!("| {size} | {one} | {all} | {single} | {idiomatic} | {ratio:.2} |");
    }
}

fn ns_per_key(size: usize, mut make: impl FnMut()) -> f64 {
    let calls = KEYS_A_ROUND.div_ceil(size).max(CALLS_A_ROUND);
    // Untimed: wakes the workers and brings the contender's code and memory back after the others' turns.
    make();
    let start = Instant::now();
    for _ in 0..calls {
        make();
    }
    start.elapsed().as_secs_f64() * 1e9 / (calls * size) as f64
}

struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

impl Spread {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |part: usize| times[(times.len() - 1) * part / 4];
        Self { median: at(2), low: at(1), high: at(3) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} ({:.0}-{:.0})", self.median, self.low, self.high)
    }
}
