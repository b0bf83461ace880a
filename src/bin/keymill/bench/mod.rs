//! `keymill bench`: the kernels of every tier, and the engine around them, beside the loops that one would write over
//! other libraries.
//!
//! One process, one run, the same job for each contender. `cases` says what is measured and `filter` picks from it.
//! `sealing`, `fill` and `setup` hold the jobs of the kernels, `engine` (batches), `decrypting`, `pool` and `single`
//! those of the engine; each checks its contenders' results before it times them. `peers` is what a careful user writes
//! over the other libraries, and `loops` what stands in the engine's place; `timing` lets contenders take turns;
//! `report` prints. No key store is touched, and nothing that is made here is kept. `server` measures something else: a
//! server, from outside.

mod cases;
mod decrypting;
mod engine;
mod fill;
mod filter;
mod loops;
mod peers;
mod pool;
mod report;
mod sealing;
#[cfg(feature = "server")]
mod server;
mod setup;
mod single;
mod timing;

use std::time::Duration;

use clap::value_parser;
use keymill::Tier;

use self::{
    cases::{Case, Contender, Job},
    filter::Filter,
    report::Report,
    timing::{Clock, Times},
};
use crate::failure::{Failure, Result};

#[derive(clap::Args)]
#[command(after_help = notes())]
pub(crate) struct Args {
    /// Print JSON Lines, one object for each case and contender
    #[arg(long)]
    json: bool,

    /// Measure only the rows that fit TERM; may be repeated (see below)
    #[arg(long, value_name = "TERM")]
    filter: Vec<String>,

    /// Measure for about N seconds in all, but each case for three rounds at least [default: about 60
    /// for everything, and in proportion for a part]
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = value_parser!(u16).range(1..=3600))]
    seconds: Option<u16>,

    #[cfg(feature = "server")]
    #[command(flatten)]
    server: server::LoadArgs,
}

const EXAMPLES: &str = r#"Jobs of the kernels, on one thread, AES-256, memory reused:
  seal   wrap given data keys (DEKs) under given IVs; the KEKs are set up
  open   unwrap them
  fill   make the random bytes of a batch of DEKs
  setup  derive KEKs (XAES-256-GCM) and set them up; ns_per_key counts KEKs. Libraries without the
         bare AES block derive by the crate `aes`
  job    random DEKs and IVs, and seal

Jobs of the engine, in memory, scheme derived; each AAD is different:
  batch          DEKs of one key by its handle, into a DataKeyBatch that is used again
  batch-strings  the same from request structs, each with an alias of its own memory
  batch-mixed    requests for 64 KEKs, DEKs of 16, 32 or 64 bytes, AADs of 0 to 64, in random order
  batch-tenants  requests for 1024 KEKs in random order
  batch-large    as batch, a million DEKs a call; ns_per_key is to be compared with that of batch
  decrypt        unwrap blobs of one batch; keks=16384: blobs whose salts all differ, so that a key
                 has to be derived for each, by ring-loop too
  pool-take      one DEK out of a full KeyPool; ring-loop makes one, as in single. Dropped untimed
  single         one DEK a call, by alias, returned and dropped; threads: so many at once

Contenders are the tiers of this CPU (keymill/vaes512 and so on; KEYMILL_TIER leaves the wider ones
out) and loops over ring, aes-gcm and aws-lc-rs, with rand_chacha for random bytes. Those of the
engine's jobs are keymill, the engine on the best tier; ring-loop, one loop over ring that writes
into arrays, under keys that it need not look up; idiomatic-loop, over aes-gcm with a Vec for each
field; and kernels, the bare kernels on arrays. Loops have one thread.
In each case contenders first have to give the right bytes. Then they take turns, round by round,
so that a machine that slows down for a while slows all of them. A figure is the median of the
rounds; the middle half is where half of them lie; spread is its width, the widest of a line.
"vs ring" is how many times as fast as ring.

A filter TERM is member=value, with the members of the JSON rows (job, contender, dek_len, aad_len,
keks, batch, threads), or a text to be found in job or contender. Terms of different members must
all fit; of those of one member, one must. contender=keymill is every keymill/... and the engine.

Examples:
  keymill bench
  keymill bench --filter job=seal --filter dek_len=32 --filter aad_len=16
  keymill bench --filter job=setup --filter contender=keymill --filter contender=aes-gcm
  keymill bench --filter job=batch --filter job=single --filter threads=1
  keymill bench --seconds 20 --json > bench.jsonl

A JSON row; members that do not apply are null, ns_low and ns_high bound the middle half:
  {"job":"seal","contender":"ring","dek_len":32,"aad_len":16,"keks":1,"batch":4096,"threads":1,
   "ns_per_key":84.1,"rounds":121,"ns_low":83.9,"ns_high":84.6}"#;

/// All that stands behind the options.
fn notes() -> String {
    #[cfg(feature = "server")]
    return [EXAMPLES, server::NOTES].concat();
    #[cfg(not(feature = "server"))]
    EXAMPLES.to_owned()
}

/// The default length of a run, for each case of weight 1: about 60 seconds for all.
const CASE: Duration = Duration::from_millis(850);

pub(crate) fn run(args: &Args) -> Result<()> {
    #[cfg(feature = "server")]
    if let Some(asked) = args.server.asked()? {
        return server::run(asked, args.json, &args.filter, args.seconds);
    }
    let widest = Tier::detect()?;
    let tiers: Vec<_> = Tier::available().iter().copied().filter(|tier| *tier <= widest).collect();
    let picked = Filter::parse(&args.filter)?.pick(&cases::all(), &tiers)?;

    let weight = picked.iter().map(|(case, _)| case.weight()).sum();
    let total = args.seconds.map_or(CASE * weight, |seconds| Duration::from_secs(seconds.into()));
    let mut clock = Clock::new(total, weight);
    let mut report = Report::new(args.json);
    for (case, contenders) in &picked {
        let times = measure(case, contenders, &mut clock)?;
        report.add(case, contenders, &times)?;
    }
    report.end()
}

/// The times of each contender, in order.
fn measure(case: &Case, contenders: &[Contender], clock: &mut Clock) -> Result<Vec<Times>> {
    let deadline = clock.next_case(case.weight());
    match case.job {
        Job::Seal | Job::Open | Job::Whole => sealing::measure(case, contenders, deadline),
        Job::Fill => fill::measure(case, contenders, deadline),
        Job::Setup => setup::measure(case, contenders, deadline),
        Job::Batch | Job::BatchStrings | Job::BatchMixed | Job::BatchTenants | Job::BatchLarge => {
            engine::measure(case, contenders, deadline)
        }
        Job::Decrypt => decrypting::measure(case, contenders, deadline),
        Job::PoolTake => pool::measure(case, contenders, deadline),
        Job::Single => single::measure(case, contenders, deadline),
    }
}

/// Refuses to time a contender whose result is not `right`.
fn must_be_right(right: bool, case: &Case, contender: Contender) -> Result<()> {
    if right {
        return Ok(());
    }
    Err(Failure::broke(
        format!("{}: {} gave wrong bytes", case.title(), contender.name(case.job)),
        "report this as a bug, with the output of `keymill info`",
    ))
}
