//! `keymill bench --server`: load on a server, and what it answers.
//!
//! Client and server mostly share a machine, so the client has to be cheap: `requests` are signed ahead (`client_key`)
//! and sent as bytes, `wire` reads no more of an answer than it needs, and one thread serves all connections. `loads`
//! are closed or open loops; `many` makes millions of keys; `process` reads what the server's process costs; `report`
//! prints. All jobs take turns in every round, as those without a server do: a machine that is slow for a while is slow
//! for all.

mod client_key;
mod loads;
mod many;
mod process;
mod report;
mod requests;
mod wire;

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::value_parser;
use rand_chacha::{ChaCha20Rng, rand_core::SeedableRng};

use self::{
    client_key::ClientKey,
    loads::{Late, Open, Pool, Schedule},
    process::Process,
    report::{Base, Figure, Rows},
    requests::{BATCH_ITEMS, Set, Signing, example_body},
    wire::Target,
};
use super::timing::shuffle;
use crate::failure::{Failure, Result, quoted};

#[derive(clap::Args)]
#[command(next_help_heading = "Load on a server")]
pub(crate) struct LoadArgs {
    /// Measure the server at ADDR, http://host:port or https://host:port, instead of this program
    #[arg(long, value_name = "ADDR")]
    server: Option<String>,

    /// The key file of a client, as `keymill client create` writes it
    #[arg(long, value_name = "FILE")]
    client_key: Option<PathBuf>,

    /// The file with the password of the key file
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,

    /// The KEK that data keys are asked for: an id or alias/NAME
    #[arg(long, value_name = "KEY")]
    key: Option<String>,

    /// CA of the server's certificate, PEM, for https
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,

    /// Connections [default: 64]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=16_384))]
    connections: Option<u16>,

    /// Data keys of the job `many`, in whole batches [default: 10 million]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=100_000_000))]
    keys: Option<u32>,

    /// The server's process, if it runs on this machine: adds its CPU time and memory
    #[arg(long, value_name = "PID", value_parser = value_parser!(u32).range(1..))]
    server_pid: Option<u32>,
}

pub(super) const NOTES: &str = r#"

Load on a server (--server), which `keymill serve` of this version answers. The client has to be
allowed generate, decrypt and random. Jobs, by turns in every round, after an answer of each
operation was checked in full and what was generated was decrypted again:
  random         GenerateRandom of one byte, closed loop on all connections
  generate       GenerateDataKey of 32 bytes with 16 bytes of AAD, the same way
  advance        AdvanceGenerateDataKey, the same way
  decrypt        Decrypt of what was generated, the same way
  verify         RSA signatures like those of the requests, checked by one core of this program
  batch          BatchGenerateDataKey of 4096 items on four connections; keys/s
  batch-decrypt  BatchDecrypt of what was generated, the same way
  half-load      generate at half of the rate that its round has just reached: requests are due one
                 by one, and a latency counts from when a request was due: no waiting is left out
  overload       generate at twice that rate, up to 512 at once: what is answered 200, what 429
  many           --keys data keys in batches: every item has to be good and every data key
                 different, one in 1000 is decrypted again. After the rounds, not in --seconds

Requests are signed before they are timed, 256 of an operation (8 batches) with AADs that differ,
and then repeat; they are signed again every 5 minutes. The protocol has no nonce: a server checks
each as if it came for the first time. The client is one thread. Its CPU time for a call stands in
the table, with --server-pid beside the server's: on one machine they share its cores.
The shares in `verify` are of the server's CPU time for a generate: the signature takes what it
takes this program, and all else but the data key is in a random, too. They need --server-pid.

A filter TERM is job=NAME, or a text to be found in a job's name. Half-load and overload need
generate, which is then measured, too.

Example:
  keymill serve --listen 127.0.0.1:8080 &
  keymill client create --name load --out load.json --password-file load.password \
      --keys alias/app --allow generate,decrypt,random
  keymill bench --server http://127.0.0.1:8080 --client-key load.json \
      --password-file load.password --key alias/app --server-pid $!

A JSON row is one figure; low and high bound the middle half of the rounds, ratio is the median of
the rounds' ratios, and what does not apply is null:
  {"job":"generate","figure":"calls_per_s","value":17012.3,"rounds":11,"low":16893.1,
   "high":17100.8,"ratio":0.9412,"ratio_to":"random"}"#;

/// What is asked for, with every part that it needs.
pub(super) struct Asked {
    signing: Arc<Signing>,
    connections: usize,
    keys: usize,
    server: Option<Process>,
}

impl LoadArgs {
    /// `None` without `--server`.
    pub(super) fn asked(&self) -> Result<Option<Asked>> {
        let Some(url) = &self.server else {
            return self.must_be_empty();
        };
        let needed = |option: &str| {
            Failure::refused(
                format!("--server needs {option}"),
                "give --client-key FILE, --password-file FILE and --key KEY; `--help` has an \
                 example",
            )
        };
        let file = self.client_key.as_ref().ok_or_else(|| needed("--client-key FILE"))?;
        let password = self.password_file.as_ref();
        let password = password.ok_or_else(|| needed("--password-file FILE"))?;
        let key = self.key.clone().ok_or_else(|| needed("--key KEY"))?;
        let target = Target::parse(url, self.ca.as_deref())?;
        let client = ClientKey::read(file, password)?;
        Ok(Some(Asked {
            signing: Arc::new(Signing { target, client, key }),
            connections: self.connections.unwrap_or(64).into(),
            keys: self.keys.unwrap_or(10_000_000) as usize,
            server: self.server_pid.map(Process::of).transpose()?,
        }))
    }

    /// Options that mean nothing by themselves are mistakes.
    fn must_be_empty(&self) -> Result<Option<Asked>> {
        let given = [
            ("--client-key", self.client_key.is_some()),
            ("--password-file", self.password_file.is_some()),
            ("--key", self.key.is_some()),
            ("--ca", self.ca.is_some()),
            ("--connections", self.connections.is_some()),
            ("--keys", self.keys.is_some()),
            ("--server-pid", self.server_pid.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            None => Ok(None),
            Some((option, _)) => Err(Failure::refused(
                format!("{option} needs --server ADDR"),
                "name the server, or leave the option out to measure this program",
            )),
        }
    }
}

/// What is measured, in the order of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Random,
    Generate,
    Advance,
    Decrypt,
    Verify,
    Batch,
    BatchDecrypt,
    HalfLoad,
    Overload,
    Many,
}

const JOBS: [Job; 10] = [
    Job::Random,
    Job::Generate,
    Job::Advance,
    Job::Decrypt,
    Job::Verify,
    Job::Batch,
    Job::BatchDecrypt,
    Job::HalfLoad,
    Job::Overload,
    Job::Many,
];

/// The default length of the rounds together.
const TIME: Duration = Duration::from_secs(60);
/// A turn of a job of weight 1, if there is time for more than the least rounds.
const TURN: f64 = 0.45;
/// The least that has a median and a middle half.
const ROUNDS_MIN: usize = 3;
/// So many connections keep batches coming: one is worked on while the answer to another is read.
const BATCH_CONNECTIONS: usize = 4;
/// Under overload so many requests are in progress, and more wait in the client. Fewer than the 1024 files that most
/// systems let a process open.
const OVERLOAD_CONNECTIONS: usize = 512;

impl Job {
    fn as_str(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Generate => "generate",
            Self::Advance => "advance",
            Self::Decrypt => "decrypt",
            Self::Verify => "verify",
            Self::Batch => "batch",
            Self::BatchDecrypt => "batch-decrypt",
            Self::HalfLoad => "half-load",
            Self::Overload => "overload",
            Self::Many => "many",
        }
    }

    /// Its part of a round.
    fn weight(self) -> f64 {
        match self {
            Self::Verify => 0.5,
            Self::HalfLoad => 3.0,
            Self::Overload => 4.0,
            Self::Many => 0.0,
            _ => 1.0,
        }
    }

    /// Open loops come by the peak of the round's `generate`, which then has to be there.
    fn is_open(self) -> bool {
        matches!(self, Self::HalfLoad | Self::Overload)
    }

    /// What its first figure is a ratio to.
    fn base(self) -> Option<Self> {
        match self {
            Self::Generate | Self::Advance | Self::Decrypt => Some(Self::Random),
            Self::Batch | Self::Overload => Some(Self::Generate),
            Self::BatchDecrypt => Some(Self::Decrypt),
            _ => None,
        }
    }
}

/// The jobs that fit every term, with what they need.
fn pick(terms: &[String]) -> Result<Vec<Job>> {
    let fits = |job: Job, term: &str| match term.split_once('=') {
        Some(("job", name)) => job.as_str() == name,
        Some(_) => false,
        None => !term.is_empty() && job.as_str().contains(term),
    };
    let picked = |job: Job| terms.is_empty() || terms.iter().any(|term| fits(job, term));
    if let Some(term) = terms.iter().find(|term| !JOBS.iter().any(|job| fits(*job, term))) {
        let names = JOBS.map(Job::as_str).join("|");
        return Err(Failure::refused(
            format!("nothing to measure fits --filter {}", quoted(term)),
            format!("with --server there is job={names}"),
        ));
    }
    let needs_peak = JOBS.into_iter().any(|job| job.is_open() && picked(job));
    let all = JOBS.into_iter();
    Ok(all.filter(|job| picked(*job) || (needs_peak && *job == Job::Generate)).collect())
}

/// How a run is parted.
struct Plan {
    rounds: usize,
    /// The turn of a job of weight 1.
    turn: Duration,
}

impl Plan {
    #[expect(clippy::cast_possible_truncation, reason = "there are few rounds")]
    fn new(jobs: &[Job], time: Duration) -> Self {
        let weights: f64 = jobs.iter().map(|job| job.weight()).sum();
        let rounds = (time.as_secs_f64() / (weights * TURN).max(TURN)) as usize;
        // An odd number, so that the median is one of them.
        let rounds = rounds.max(ROUNDS_MIN) | 1;
        Self { rounds, turn: time.div_f64(rounds as f64 * weights.max(0.5)) }
    }
}

/// The values of a job's figures, one for each round.
struct Values {
    job: Job,
    /// In order.
    figures: Vec<(Figure, Vec<f64>)>,
    cost: Cost,
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
        Self { job, figures: Vec::new(), cost: Cost::default() }
    }

    fn add(&mut self, figure: Figure, value: f64) {
        match self.figures.iter_mut().find(|(known, _)| *known == figure) {
            Some((_, values)) => values.push(value),
            None => self.figures.push((figure, vec![value])),
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
struct Sets {
    random: Set,
    generate: Set,
    decrypt: Set,
    advance: Set,
    batch: Set,
    batch_decrypt: Set,
}

/// A run at work.
struct Run {
    asked: Asked,
    pool: Pool,
    sets: Sets,
    /// Texts with signatures, for `verify`.
    signed: Vec<(String, Vec<u8>)>,
    values: Vec<Values>,
    plan: Plan,
}

pub(super) fn run(asked: Asked, json: bool, terms: &[String], seconds: Option<u16>) -> Result<()> {
    let jobs = pick(terms)?;
    let time = seconds.map_or(TIME, |seconds| Duration::from_secs(seconds.into()));
    process::wake_in_time();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Failure::broke(format!("cannot wait for sockets: {error}"), "try again")
    })?;
    runtime.block_on(async {
        let mut run = Run::begin(asked, Plan::new(&jobs, time)).await?;
        if !json {
            report::print_head(&run.asked.signing.target.url, run.asked.connections)?;
        }
        let mut rows = Rows::default();
        if jobs != [Job::Many] {
            run.rounds(&jobs).await?;
            run.rows(&mut rows);
            rows.print(json)?;
        }
        if jobs.contains(&Job::Many) {
            let Run { asked: Asked { signing, keys, server, .. }, sets, .. } = &mut run;
            many::measure(signing, &mut sets.batch, *keys, server.as_ref(), &mut rows).await?;
            rows.print(json)?;
        }
        Ok(())
    })
}

impl Run {
    /// Connects and signs, and checks an answer of every operation.
    async fn begin(asked: Asked, plan: Plan) -> Result<Self> {
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

    async fn rounds(&mut self, jobs: &[Job]) -> Result<()> {
        let (mut closed, open): (Vec<_>, Vec<_>) =
            jobs.iter().copied().filter(|job| *job != Job::Many).partition(|job| !job.is_open());
        self.values = closed.iter().chain(&open).copied().map(Values::new).collect();
        let mut rng = ChaCha20Rng::from_seed([0; 32]);
        // Untimed: connections, and whatever the server sets up for its first requests.
        self.pool_of(self.asked.connections).await?;
        for job in &closed {
            self.turn(*job, self.plan.turn / 4).await?;
        }
        self.values = closed.iter().chain(&open).copied().map(Values::new).collect();
        for _ in 0..self.plan.rounds {
            shuffle(&mut closed, &mut rng);
            for job in closed.iter().chain(&open) {
                self.turn(*job, self.plan.turn.mul_f64(job.weight())).await?;
            }
        }
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
            let per_second = loads::verify(&key, &self.signed, time)?;
            self.values_of(job).add(Figure::PerSecond, per_second);
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
        let (figure, count, keys) = match job {
            Job::Batch | Job::BatchDecrypt => {
                let count = BATCH_CONNECTIONS.min(self.asked.connections);
                (Figure::KeysPerSecond, count, BATCH_ITEMS as f64)
            }
            _ => (Figure::CallsPerSecond, self.asked.connections, 1.0),
        };
        let before = self.cpu()?;
        let closed = self.pool.closed(count, &requests, time).await?;
        let after = self.cpu()?;
        let units = closed.calls as f64 * keys;
        let values = self.values_of(job);
        values.add(figure, units / closed.took.as_secs_f64());
        values.cost.units += units;
        values.cost.server += after.0.saturating_sub(before.0);
        values.cost.client += after.1.saturating_sub(before.1);
        Ok(())
    }

    async fn open_turn(
        &mut self,
        job: Job,
        requests: &requests::Signed,
        time: Duration,
    ) -> Result<()> {
        let peak = self.values_of(Job::Generate).first().last().copied();
        let peak = peak.expect("`generate` had its turn before");
        let connections = self.asked.connections;
        let (per_second, count, late) = match job {
            Job::Overload => (2.0 * peak, OVERLOAD_CONNECTIONS.max(connections), Late::Drop),
            _ => (peak / 2.0, connections, Late::Send),
        };
        self.pool_of(count).await?;
        let before = self.memory()?;
        let open = self.pool.open(count, requests, Schedule { per_second, time, late }).await?;
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
    fn rows(&self, rows: &mut Rows) {
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
