//! Output: tables for people, JSON Lines for programs. Both print a case as soon as it is measured.
//!
//! The headlines have a table each, with a line for a contender; each other case is one line of its job's table.

use std::{fmt::Write, thread};

use serde::Serialize;

use super::{
    cases::{Case, Contender, Job},
    timing::Times,
};
use crate::{
    failure::{Failure, Result},
    info, print,
};

pub(super) struct Report {
    json: bool,
    /// Whose table of lines is open, with its columns.
    open: Option<(Job, Vec<Contender>)>,
    begun: bool,
}

/// A row of `--json`. Members keep this order.
#[derive(Serialize)]
struct Row {
    job: &'static str,
    contender: String,
    dek_len: Option<usize>,
    aad_len: Option<usize>,
    keks: Option<usize>,
    batch: Option<usize>,
    threads: usize,
    ns_per_key: f64,
    rounds: usize,
    ns_low: f64,
    ns_high: f64,
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        Self { json, open: None, begun: false }
    }

    /// Prints a case.
    pub(super) fn add(
        &mut self,
        case: &Case,
        contenders: &[Contender],
        times: &[Times],
    ) -> Result<()> {
        let mut out = String::new();
        if self.json {
            for (contender, times) in contenders.iter().zip(times) {
                let row = Row::new(case, *contender, *times);
                let row = serde_json::to_string(&row).map_err(|error| {
                    Failure::broke(format!("cannot write JSON: {error}"), "report this as a bug")
                })?;
                out += &row;
                out.push('\n');
            }
            return print::text(&out);
        }
        if !self.begun {
            let threads = thread::available_parallelism().map_or(1, usize::from);
            let cpu = info::cpu_name();
            let version = env!("CARGO_PKG_VERSION");
            out += &format!(
                "keymill {version} on {cpu}, {threads} threads. One is used, but where a table \
                 says more.\n\
                 ns/key: median of the rounds, and the middle half of them.\n"
            );
            self.begun = true;
        }
        if case.is_headline() {
            self.open = None;
            out += &headline(case, contenders, times);
        } else {
            let columns = (case.job, contenders.to_vec());
            if self.open.as_ref() != Some(&columns) {
                out += &lines_head(case, contenders);
                self.open = Some(columns);
            }
            out += &line(case, contenders, times);
        }
        print::text(&out)
    }

    /// Prints what explains the tables.
    pub(super) fn end(&self) -> Result<()> {
        if self.json {
            return Ok(());
        }
        print::text(
            "\n\"vs ring\" is how many times as fast as ring; best is the best keymill. --json has \
             all numbers; --help\nsays what the jobs and the contenders are.\n",
        )
    }
}

impl Row {
    fn new(case: &Case, contender: Contender, times: Times) -> Self {
        // Thousandths of a nanosecond say enough.
        let rounded = |ns: f64| (ns * 1e3).round() / 1e3;
        Self {
            job: case.job.as_str(),
            contender: contender.name(case.job),
            dek_len: case.dek_len,
            aad_len: case.aad_len,
            keks: case.keks,
            batch: case.batch,
            threads: case.threads,
            ns_per_key: rounded(times.median),
            rounds: times.rounds,
            ns_low: rounded(times.low),
            ns_high: rounded(times.high),
        }
    }
}

/// The time of one contender, if it was measured.
fn time_of(contender: Contender, contenders: &[Contender], times: &[Times]) -> Option<f64> {
    let at = contenders.iter().position(|one| *one == contender)?;
    Some(times[at].median)
}

/// The table of one case, with a line for each contender.
fn headline(case: &Case, contenders: &[Contender], times: &[Times]) -> String {
    let mut out = format!("\n{}\n", case.title());
    let baselines: Vec<_> = case
        .job
        .baselines()
        .iter()
        .filter_map(|baseline| {
            let time = time_of(*baseline, contenders, times)?;
            Some((format!("vs {}", baseline.name(case.job)), time))
        })
        .collect();
    out += &format!("  {:<16}  {:>9}  {:>17}", "", "ns/key", "middle half");
    for (name, _) in &baselines {
        out += &format!("  {name:>17}");
    }
    out.push('\n');
    for (contender, times) in contenders.iter().zip(times) {
        let half = format!("{:.1}-{:.1}", times.low, times.high);
        let name = contender.name(case.job);
        out += &format!("  {name:<16}  {:>9.1}  {half:>17}", times.median);
        for (_, baseline) in &baselines {
            out += &format!("  {:>16.2}x", baseline / times.median);
        }
        out.push('\n');
    }
    out
}

/// The head of the lines of a job.
fn lines_head(case: &Case, contenders: &[Contender]) -> String {
    let mut out = format!("\n{}, other shapes: ns/key\n ", case.job.as_str());
    for (name, _) in numbers(case) {
        let width = number_width(name);
        let _ = write!(out, "{name:>width$}");
    }
    for contender in contenders {
        let (name, width) = column(*contender, case.job);
        let _ = write!(out, "{name:>width$}");
    }
    if let Some(baseline) = compared_with(case, contenders) {
        let _ = write!(out, "  {}", versus(baseline, case.job));
    }
    out + "  spread\n"
}

/// The name and width of a contender's column.
fn column(contender: Contender, job: Job) -> (String, usize) {
    let name = contender.name(job).trim_start_matches("keymill/").to_owned();
    let width = name.len().max("9999.9".len()) + 2;
    (name, width)
}

/// One case as a line.
fn line(case: &Case, contenders: &[Contender], times: &[Times]) -> String {
    let mut out = String::from(" ");
    for (name, number) in numbers(case) {
        let width = number_width(name);
        let _ = write!(out, "{number:>width$}");
    }
    for (contender, times) in contenders.iter().zip(times) {
        let (_, width) = column(*contender, case.job);
        let _ = write!(out, "{:>width$.1}", times.median);
    }
    if let Some(baseline) = compared_with(case, contenders)
        && let Some(time) = time_of(baseline, contenders, times)
        && let Some(best) = best_of_ours(contenders, times)
    {
        let width = versus(baseline, case.job).len();
        let _ = write!(out, "  {:>width$}", format!("{:.2}x", time / best));
    }
    let spread = times.iter().map(|times| (times.high - times.low) / times.median);
    let _ = writeln!(out, "{:>7.0}%", 100.0 * spread.fold(0.0, f64::max));
    out
}

/// The numbers that apply to a case, with the names of their columns.
fn numbers(case: &Case) -> impl Iterator<Item = (&'static str, usize)> {
    // The kernels have one thread, always.
    let threads = case.job.is_of_engine().then_some(case.threads);
    let all = [
        ("DEK", case.dek_len),
        ("AAD", case.aad_len),
        ("KEKs", case.keks),
        ("batch", case.batch),
        ("threads", threads),
    ];
    all.into_iter().filter_map(|(name, number)| Some((name, number?)))
}

fn number_width(name: &str) -> usize {
    (name.len() + 1).max("65536".len() + 1)
}

/// The head of the column that compares with a baseline. The engine is there once, the kernels in every tier.
fn versus(baseline: Contender, job: Job) -> String {
    let best = if job.is_of_engine() { "" } else { "best " };
    format!("{best}vs {}", baseline.name(job))
}

/// Whom the best keymill contender is compared with, if both were measured.
fn compared_with(case: &Case, contenders: &[Contender]) -> Option<Contender> {
    contenders.iter().find(|one| one.is_keymill())?;
    case.job.baselines().iter().copied().find(|one| contenders.contains(one))
}

/// The time of the best keymill contender, if one was measured.
fn best_of_ours(contenders: &[Contender], times: &[Times]) -> Option<f64> {
    let ours = contenders.iter().zip(times);
    let ours = ours.filter(|(contender, _)| contender.is_keymill());
    ours.map(|(_, times)| times.median).min_by(f64::total_cmp)
}
