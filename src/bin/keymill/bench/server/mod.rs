//! `keymill bench --server`: load on a server, and what it answers.
//!
//! Client and server mostly share a machine, so the client has to be cheap: `requests` are signed ahead (`client_key`)
//! and sent as bytes, `wire` reads no more of an answer than it needs, and one thread serves all connections. `jobs`
//! says what there is to measure; in `rounds` jobs take turns, as those without a server do: a machine that is slow for
//! a while is slow for all. `loads` are closed or open loops; `many` makes millions of keys; `process` reads what the
//! server's process costs; `report` prints.

mod client_key;
mod jobs;
mod loads;
mod many;
mod process;
mod report;
mod requests;
mod rounds;
mod wire;

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::value_parser;

use self::{
    client_key::ClientKey,
    jobs::{Job, Plan, pick},
    process::Process,
    report::Rows,
    requests::Signing,
    rounds::Run,
    wire::Target,
};
use crate::{
    failure::{Failure, Result},
    identity::Named,
};

/// The default length of the rounds together.
const TIME: Duration = Duration::from_secs(60);
/// So many connections keep batches coming: some are worked on while others are sent or read.
const BATCH_CONNECTIONS: usize = 4;

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

    /// Certificate chain to show a server that asks for one (mutual TLS), PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

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
  verify         RSA signatures like those of the requests, checked by one core of this program as
                 the server rests. Where a check takes half a millisecond, the machine stalled: some
                 thousandths of such time are enough to make the latencies of half-load its own
  batch          BatchGenerateDataKey of 4096 items on four connections; keys/s
  batch-decrypt  BatchDecrypt of what was generated, the same way
  half-load      generate at half of the rate that its round has just reached: requests are due
                 one by one, and a latency counts from when a request was due, so waiting counts.
                 A client that was late itself had no CPU, and the latencies are the machine's
  overload       generate at twice that rate, up to 512 at once: what is answered 200 and 429
  many           --keys data keys in batches: every item has to be good and every data key
                 different, one in 1000 is decrypted again. After the rounds and their --seconds

Requests are signed before they are timed, 256 of an operation (8 batches) with AADs that differ,
and then repeat; they are signed again every 5 minutes. The protocol has no nonce: a server checks
each as if it came for the first time. The client is one thread. Its CPU time for a call
stands in the table, with --server-pid beside the server's: on one machine they share its cores.
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
        let files = [
            ("--client-key", Some(file)),
            ("--password-file", Some(password)),
            ("--ca", self.ca.as_ref()),
            ("--tls-cert", self.tls_cert.as_ref()),
            ("--tls-key", self.tls_key.as_ref()),
        ];
        for (option, path) in files {
            if let Some(path) = path {
                let file = Named::file(option, path);
                Named::standard_output().spares(&file, "which would be damaged")?;
            }
        }
        let shown = self.tls_cert.as_deref().zip(self.tls_key.as_deref());
        let target = Target::parse(url, self.ca.as_deref(), shown)?;
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
            ("--tls-cert", self.tls_cert.is_some()),
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
