//! Rows of a load, as a table for people and JSON Lines for programs. A row is one figure of one job.

use std::{fmt::Write, thread};

use serde::Serialize;

use crate::{
    bench::timing::Times,
    failure::{Failure, Result},
    info, print,
};

/// What a row's value counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Figure {
    CallsPerSecond,
    KeysPerSecond,
    ServerMicros,
    ClientMicros,
    PerSecond,
    CallsPerVerification,
    ShareOfSignature,
    ShareOfTransport,
    ShareOfKey,
    Offered,
    Median,
    P99,
    P999,
    Lateness,
    Stalled,
    RefusedPerSecond,
    MemoryBefore,
    MemoryAfter,
    Keys,
    Different,
    OpenedAgain,
    MemoryAtStart,
    MemoryAtTenth,
    MemoryAtEnd,
}

impl Figure {
    /// Its name in JSON, and in the table.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::CallsPerSecond => ("calls_per_s", "calls/s"),
            Self::KeysPerSecond => ("keys_per_s", "keys/s"),
            Self::ServerMicros => ("server_us", "us of the server's CPU"),
            Self::ClientMicros => ("client_us", "us of the client's CPU"),
            Self::PerSecond => ("verifications_per_s", "verifications/s of a core"),
            Self::CallsPerVerification => ("calls_per_verification", "calls of generate for one"),
            Self::ShareOfSignature => ("signature_percent", "% of a generate: signature"),
            Self::ShareOfTransport => ("transport_percent", "% of a generate: HTTP and the rest"),
            Self::ShareOfKey => ("key_percent", "% of a generate: the data key"),
            Self::Offered => ("offered_per_s", "calls/s that were due"),
            Self::Median => ("p50_us", "us, p50"),
            Self::P99 => ("p99_us", "us, p99"),
            Self::P999 => ("p999_us", "us, p99.9"),
            Self::Lateness => ("lateness_p99_us", "us, p99, that the client was late"),
            Self::Stalled => ("stalled_percent", "% of the time the machine stalled"),
            Self::RefusedPerSecond => ("refused_per_s", "calls/s answered 429"),
            Self::MemoryBefore => ("server_mib_before", "MiB of the server before"),
            Self::MemoryAfter => ("server_mib_after", "MiB of the server after"),
            Self::Keys => ("keys", "data keys, every item good"),
            Self::Different => ("different", "of them different"),
            Self::OpenedAgain => ("opened_again", "of them opened again, and the same"),
            Self::MemoryAtStart => ("server_mib_start", "MiB of the server at the start"),
            Self::MemoryAtTenth => ("server_mib_tenth", "MiB of the server after a tenth"),
            Self::MemoryAtEnd => ("server_mib_end", "MiB of the server at the end"),
        }
    }
}

/// A row of `--json`. Members keep this order.
#[derive(Serialize)]
struct Row {
    job: &'static str,
    figure: &'static str,
    value: f64,
    rounds: usize,
    low: Option<f64>,
    high: Option<f64>,
    ratio: Option<f64>,
    ratio_to: Option<&'static str>,
    #[serde(skip)]
    title: &'static str,
}

/// The rows so far, in order.
#[derive(Default)]
pub(super) struct Rows(Vec<Row>);

/// What a figure is a ratio to: the same rounds of something else.
pub(super) struct Base<'a> {
    pub(super) name: &'static str,
    pub(super) rounds: &'a [f64],
}

impl Rows {
    /// A figure that there is one of.
    pub(super) fn one(&mut self, job: &'static str, figure: Figure, value: f64) {
        let (figure, title) = figure.names();
        let value = rounded(value);
        let (low, high, ratio, ratio_to) = (None, None, None, None);
        self.0.push(Row { job, figure, value, rounds: 1, low, high, ratio, ratio_to, title });
    }

    /// A figure with a value for each round. The ratio is the median of the rounds' ratios: what slows a round slows
    /// both.
    pub(super) fn of_rounds(
        &mut self,
        job: &'static str,
        figure: Figure,
        values: &[f64],
        base: Option<Base<'_>>,
    ) {
        let (figure, title) = figure.names();
        let Times { median, low, high, rounds } = Times::of(values.to_vec());
        let base = base.filter(|base| base.rounds.len() == values.len());
        let ratio = base.as_ref().map(|base| {
            let ratios = values.iter().zip(base.rounds).map(|(value, base)| value / base);
            (Times::of(ratios.collect()).median * 1e4).round() / 1e4
        });
        self.0.push(Row {
            job,
            figure,
            value: rounded(median),
            rounds,
            low: Some(rounded(low)),
            high: Some(rounded(high)),
            ratio,
            ratio_to: base.map(|base| base.name),
            title,
        });
    }

    /// Prints all rows, and forgets them.
    pub(super) fn print(&mut self, json: bool) -> Result<()> {
        let rows = std::mem::take(&mut self.0);
        let mut out = String::new();
        let mut job = "";
        for row in &rows {
            if json {
                out += &serde_json::to_string(row).map_err(|error| {
                    Failure::broke(format!("cannot write JSON: {error}"), "report this as a bug")
                })?;
                out.push('\n');
                continue;
            }
            let name = if job == row.job { "" } else { row.job };
            job = row.job;
            let half = match (row.low, row.high) {
                (Some(low), Some(high)) => format!("{}-{}", number(low), number(high)),
                _ => String::new(),
            };
            let ratio = match (row.ratio, row.ratio_to) {
                (Some(ratio), Some(to)) => format!("  {ratio:.3} x {to}"),
                _ => String::new(),
            };
            let (title, value) = (row.title, number(row.value));
            let line = format!("{name:<14}{title:<36}{value:>12}  {half:>19}{ratio}");
            let _ = writeln!(out, "{}", line.trim_end());
        }
        print::text(&out)
    }
}

/// What stands above the table.
pub(super) fn print_head(url: &str, connections: usize) -> Result<()> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let (cpu, version) = (info::cpu_name(), env!("CARGO_PKG_VERSION"));
    let empty = "";
    print::text(&format!(
        "keymill {version} asks {url} on {connections} connections\n\
         {cpu}, {threads} threads for server and client, if they share it\n\
         Median of the rounds, the middle half of them, and the median of their ratios.\n\n\
         {empty:<50}{:>12}  {:>19}  ratio\n",
        "figure", "middle half",
    ))
}

/// As many digits as say something.
fn number(value: f64) -> String {
    match value {
        1000.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Thousandths say enough.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
