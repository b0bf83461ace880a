//! Criterion: the batch call at sizes 1 to 65,536 beside the idiomatic loop over the same crates.
//!
//! ```text
//! cargo bench --bench batch
//! ```
//! For ratios that a noisy machine does not spoil, `cargo bench --bench ratios` interleaves the contenders.

mod contenders;

use contenders::{Batch, IdiomaticLoop, aads};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn batch_sizes(criterion: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (one, all) = (Batch::new(1), Batch::new(threads));
    let mut idiomatic = IdiomaticLoop::new();
    let mut group = criterion.benchmark_group("generate_32B_aad16");
    for size in [1, 16, 256, 1024, 4096, 16_384, 65_536] {
        let aads = aads(size);
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("batch/1-thread", size), |b| {
            b.iter(|| one.make(&aads));
        });
        group.bench_function(BenchmarkId::new(format!("batch/{threads}-threads"), size), |b| {
            b.iter(|| all.make(&aads));
        });
        group.bench_function(BenchmarkId::new("single-calls", size), |b| {
            b.iter(|| one.make_singly(&aads));
        });
        group.bench_function(BenchmarkId::new("idiomatic-loop", size), |b| {
            b.iter(|| idiomatic.make(&aads));
        });
    }
    group.finish();
}

criterion_group!(benches, batch_sizes);
criterion_main!(benches);
