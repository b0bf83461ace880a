//! The rounds: every job has its turn in each. Closed loops have theirs in several passes, in an order that is drawn
//! anew for each, so that a ratio is one of times that lie close to each other. Open loops come last, since they go by
//! what the round's `generate` has just reached.

use std::time::Duration;

use rand_chacha::{ChaCha20Rng, rand_core::SeedableRng};

use super::{
    Asked, BATCH_CONNECTIONS,
    jobs::{JOBS, Job, Plan},
    loads::{self, Late, Open, Pool, Schedule, Verified},
    process::Process,
    report::{Base, Figure, Rows},
    requests::{BATCH_ITEMS, Set, Signed, example_body},
};
use crate::{
    bench::timing::shuffle,
    failure::{Failure, Result},
    progress,
};

/// Under overload so many requests are in progress, and more wait in the client. Fewer than the 1024 files that most
/// systems let a process open.
const OVERLOAD_CONNECTIONS: usize = 512;
/// Parts of a turn of a closed loop.
const PASSES: u32 = 4;

/// The values of a job's figures, one for each round.
struct Values {
    job: Job,
    /// In order.
    figures: Vec<(Figure, Vec<f64>)>,
    passes: Passes,
    cost: Cost,
}

/// The passes of a round so far.
#[derive(Default)]
struct Passes {
    units: f64,
    took: Duration,
    /// Of `verify` alone.
    stalled: Duration,
}

/// CPU time in all rounds.
#[derive(Default)]
struct Cost {
    /// Calls, or keys of a batch.
    units: f64,
    server: Duration,
    client: Duration,
}

impl Values {
    fn new(job: Job) -> Self {
        Self { job, figures: Vec::new(), passes: Passes::default(), cost: Cost::default() }
    }

    fn add(&mut self, figure: Figure, value: f64) {
        match self.figures.iter_mut().find(|(known, _)| *known == figure) {
            Some((_, values)) => values.push(value),
            None => self.figures.push((figure, vec![value])),
        }
    }

    /// Adds a pass of a closed loop to its round.
    fn pass(&mut self, units: f64, took: Duration) {
        self.passes.units += units;
        self.passes.took += took;
    }

    /// Makes one value of a round's passes.
    fn end_passes(&mut self) {
        let Passes { units, took, stalled } = std::mem::take(&mut self.passes);
        let figure = match self.job {
            Job::Verify => Figure::PerSecond,
            Job::Batch | Job::BatchDecrypt => Figure::KeysPerSecond,
            _ => Figure::CallsPerSecond,
        };
        self.add(figure, units / took.as_secs_f64());
        if self.job == Job::Verify {
            self.add(Figure::Stalled, 100.0 * stalled.as_secs_f64() / took.as_secs_f64());
        }
    }

    fn of(&self, figure: Figure) -> &[f64] {
        let found = self.figures.iter().find(|(known, _)| *known == figure);
        found.map_or(&[], |(_, values)| values)
    }

    /// What the job is about, which is also what others are compared with.
    fn first(&self) -> &[f64] {
        self.figures.first().map_or(&[], |(_, values)| values)
    }

    fn server_micros(&self) -> f64 {
        self.cost.server.as_secs_f64() * 1e6 / self.cost.units.max(1.0)
    }

    fn client_micros(&self) -> f64 {
        self.cost.client.as_secs_f64() * 1e6 / self.cost.units.max(1.0)
    }
}

/// The requests of every operation.
pub(super) struct Sets {
    random: Set,
    generate: Set,
    decrypt: Set,
    advance: Set,
    pub(super) batch: Set,
    batch_decrypt: Set,
}

/// A run at work.
pub(super) struct Run {
    pub(super) asked: Asked,
    pool: Pool,
    pub(super) sets: Sets,
    /// Texts with signatures, for `verify`.
    signed: Vec<(String, Vec<u8>)>,
    values: Vec<Values>,
    plan: Plan,
}

impl Run {
    /// Connects and signs, and checks an answer of every operation.
    pub(super) async fn begin(asked: Asked, plan: Plan) -> Result<Self> {
        let signing = &*asked.signing;
        let mut connection = signing.target.connect().await?;
        let connection = &mut connection;
        let random = Set::random(signing, connection).await?;
        let (generate, decrypt) = Set::generate_and_decrypt(signing, connection).await?;
        let advance = Set::advance(signing, connection).await?;
        let (batch, batch_decrypt) = Set::batches(signing, connection).await?;
        let mut signed = Vec::new();
        for index in 0..generate.len() {
            let body = example_body(signing, index);
            let text = signing.client.string_to_sign("GenerateDataKey", &body);
            let signature = signing.client.sign(text.as_bytes())?;
            signed.push((text, signature));
        }
        let sets = Sets { random, generate, decrypt, advance, batch, batch_decrypt };
        Ok(Self { asked, pool: Pool::default(), sets, signed, values: Vec::new(), plan })
    }

    pub(super) async fn rounds(&mut self, jobs: &[Job]) -> Result<()> {
        let (mut closed, open): (Vec<_>, Vec<_>) =
            jobs.iter().copied().filter(|job| *job != Job::Many).partition(|job| !job.is_open());
        self.values = closed.iter().chain(&open).copied().map(Values::new).collect();
        let mut rng = ChaCha20Rng::from_seed([0; 32]);
        // Untimed: connections, and whatever the server sets up for its first requests.
        self.pool_of(self.asked.connections).await?;
        for job in &closed {
            self.turn(*job, self.plan.turn(*job) / PASSES).await?;
        }
        self.values = closed.iter().chain(&open).copied().map(Values::new).collect();
        let progress = progress::steps(self.plan.rounds.into(), "rounds");
        for _ in 0..self.plan.rounds {
            for _ in 0..PASSES {
                shuffle(&mut closed, &mut rng);
                for job in &closed {
                    self.turn(*job, self.plan.turn(*job) / PASSES).await?;
                }
            }
            closed.iter().for_each(|job| self.values_of(*job).end_passes());
            for job in &open {
                self.turn(*job, self.plan.turn(*job)).await?;
            }
            progress.inc(1);
        }
        progress.finish_and_clear();
        Ok(())
    }

    /// Grows the pool to so many connections.
    async fn pool_of(&mut self, count: usize) -> Result<()> {
        let first = self.sets.random.fresh(&self.asked.signing)?;
        self.pool.grow(count, &self.asked.signing.target, &first[0]).await
    }

    /// One turn of a job, and what it comes to.
    async fn turn(&mut self, job: Job, time: Duration) -> Result<()> {
        if job == Job::Verify {
            let key = self.asked.signing.client.public_key()?;
            let Verified { count, took, stalled } = loads::verify(&key, &self.signed, time)?;
            let values = self.values_of(job);
            values.pass(count, took);
            values.passes.stalled += stalled;
            return Ok(());
        }
        let set = match job {
            Job::Random => &mut self.sets.random,
            Job::Advance => &mut self.sets.advance,
            Job::Decrypt => &mut self.sets.decrypt,
            Job::Batch => &mut self.sets.batch,
            Job::BatchDecrypt => &mut self.sets.batch_decrypt,
            _ => &mut self.sets.generate,
        };
        let requests = set.fresh(&self.asked.signing)?;
        if job.is_open() {
            return self.open_turn(job, &requests, time).await;
        }
        let all = self.asked.connections;
        let (count, keys) = match job {
            Job::Batch | Job::BatchDecrypt => (BATCH_CONNECTIONS.min(all), BATCH_ITEMS as f64),
            _ => (all, 1.0),
        };
        let before = self.cpu()?;
        let closed = self.pool.closed(count, &requests, time).await?;
        let after = self.cpu()?;
        let units = closed.calls as f64 * keys;
        let values = self.values_of(job);
        values.pass(units, closed.took);
        values.cost.units += units;
        values.cost.server += after.0.saturating_sub(before.0);
        values.cost.client += after.1.saturating_sub(before.1);
        Ok(())
    }

    async fn open_turn(&mut self, job: Job, requests: &Signed, time: Duration) -> Result<()> {
        let peak = self.values_of(Job::Generate).first().last().copied();
        let peak = peak.expect("`generate` had its turn before");
        let connections = self.asked.connections;
        let (per_second, count, late) = match job {
            Job::Overload => (2.0 * peak, OVERLOAD_CONNECTIONS.max(connections), Late::Drop),
            _ => (peak / 2.0, connections, Late::Send),
        };
        self.pool_of(count).await?;
        let interval = Duration::from_secs_f64(1.0 / per_second);
        let schedule = Schedule { interval, time, late };
        let before = self.memory()?;
        let open = self.pool.open(count, requests, schedule).await?;
        let after = self.memory()?;
        let values = self.values_of(job);
        let seconds = time.as_secs_f64();
        let Open { done, refused, .. } = open;
        if job == Job::Overload {
            values.add(Figure::CallsPerSecond, done as f64 / seconds);
            values.add(Figure::Offered, per_second);
            values.add(Figure::RefusedPerSecond, refused as f64 / seconds);
            for (figure, mib) in [(Figure::MemoryBefore, before), (Figure::MemoryAfter, after)] {
                if let Some(mib) = mib {
                    values.add(figure, mib);
                }
            }
            self.pool.shrink(connections);
            return Ok(());
        }
        if refused > 0 {
            return Err(Failure::refused(
                format!("{refused} calls of half the load were answered 429"),
                "the server has a limit: give its --keys-per-second more room",
            ));
        }
        let micros = |per_mille| open.percentile(per_mille).as_secs_f64() * 1e6;
        values.add(Figure::Median, micros(500));
        values.add(Figure::P99, micros(990));
        values.add(Figure::P999, micros(999));
        values.add(Figure::Lateness, open.lateness.as_secs_f64() * 1e6);
        values.add(Figure::Offered, per_second);
        Ok(())
    }

    fn values_of(&mut self, job: Job) -> &mut Values {
        let found = self.values.iter_mut().find(|values| values.job == job);
        found.expect("every job of a round has its values")
    }

    /// CPU time so far of the server, if it is known, and of this process.
    fn cpu(&self) -> Result<(Duration, Duration)> {
        let server = self.asked.server.as_ref().map(Process::cpu).transpose()?;
        Ok((server.unwrap_or_default(), Process::this().cpu()?))
    }

    fn memory(&self) -> Result<Option<f64>> {
        self.asked.server.as_ref().map(Process::resident_mib).transpose()
    }

    /// The rows of all rounds.
    pub(super) fn rows(&self, rows: &mut Rows) {
        let find = |job: Job| self.values.iter().find(|values| values.job == job);
        for job in JOBS {
            let Some(values) = find(job) else { continue };
            let name = job.as_str();
            for (index, (figure, rounds)) in values.figures.iter().enumerate() {
                let base = match (index, figure) {
                    (0, _) => {
                        job.base().and_then(find).map(|base| (base.job.as_str(), base.first()))
                    }
                    (_, Figure::P99 | Figure::P999) => Some(("p50", values.of(Figure::Median))),
                    _ => None,
                };
                let base = base.map(|(name, rounds)| Base { name, rounds });
                rows.of_rounds(name, *figure, rounds, base);
            }
            if values.cost.units > 0.0 {
                if self.asked.server.is_some() {
                    rows.one(name, Figure::ServerMicros, values.server_micros());
                }
                rows.one(name, Figure::ClientMicros, values.client_micros());
            }
            if job == Job::Verify {
                self.parts(values, find(Job::Generate), find(Job::Random), rows);
            }
        }
    }

    /// Where the time of a `generate` goes on the server: the signature takes what it takes this program; a `random`
    /// has all the rest but the data key.
    fn parts(
        &self,
        verify: &Values,
        generate: Option<&Values>,
        random: Option<&Values>,
        rows: &mut Rows,
    ) {
        let (Some(generate), Some(random)) = (generate, random) else { return };
        let pairs = generate.first().iter().zip(verify.first());
        let ratios: Vec<_> = pairs.map(|(calls, verifications)| calls / verifications).collect();
        rows.of_rounds(verify.job.as_str(), Figure::CallsPerVerification, &ratios, None);
        if self.asked.server.is_none() {
            return;
        }
        let mut micros: Vec<_> = verify.first().iter().map(|per_second| 1e6 / per_second).collect();
        micros.sort_by(f64::total_cmp);
        let signature = micros[micros.len() / 2];
        let (all, without_key) = (generate.server_micros(), random.server_micros());
        let percent = |micros: f64| 100.0 * micros / all.max(f64::MIN_POSITIVE);
        for (figure, micros) in [
            (Figure::ShareOfSignature, signature),
            (Figure::ShareOfTransport, without_key - signature),
            (Figure::ShareOfKey, all - without_key),
        ] {
            rows.one(verify.job.as_str(), figure, percent(micros));
        }
    }
}
