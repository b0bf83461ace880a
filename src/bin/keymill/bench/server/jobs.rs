//! What there is to measure, what a filter picks of it, and how a run is parted into rounds and turns.

use std::time::Duration;

use crate::failure::{Failure, Result, quoted};

/// What is measured, in the order of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
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

pub(super) const JOBS: [Job; 10] = [
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

impl Job {
    pub(super) fn as_str(self) -> &'static str {
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

    /// Its part of a round. Percentiles need many calls, and overload has to last for a while.
    fn weight(self) -> u32 {
        match self {
            Self::Verify => 1,
            Self::HalfLoad => 6,
            Self::Overload => 8,
            Self::Many => 0,
            _ => 2,
        }
    }

    /// Open loops come by the peak of the round's `generate`, which then has to be there.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::HalfLoad | Self::Overload)
    }

    /// What its first figure is a ratio to.
    pub(super) fn base(self) -> Option<Self> {
        match self {
            Self::Generate | Self::Advance | Self::Decrypt => Some(Self::Random),
            Self::Batch | Self::Overload => Some(Self::Generate),
            Self::BatchDecrypt => Some(Self::Decrypt),
            _ => None,
        }
    }
}

/// The jobs that fit every term, with what they need.
pub(super) fn pick(terms: &[String]) -> Result<Vec<Job>> {
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
pub(super) struct Plan {
    pub(super) rounds: u32,
    /// The turn of a job of weight 1.
    turn: Duration,
}

/// A turn of a job of weight 1, if there is time for more than the least rounds.
const TURN: Duration = Duration::from_millis(225);
/// The least that has a median and a middle half.
const ROUNDS_MIN: u32 = 3;

impl Plan {
    pub(super) fn new(jobs: &[Job], time: Duration) -> Self {
        let weights = jobs.iter().map(|job| job.weight()).sum::<u32>().max(1);
        let rounds = time.as_millis() / (TURN * weights).as_millis();
        // An odd number, so that the median is one of them.
        let rounds = u32::try_from(rounds).unwrap_or(ROUNDS_MIN).max(ROUNDS_MIN) | 1;
        Self { rounds, turn: time / (rounds * weights) }
    }

    /// How long a turn of `job` is.
    pub(super) fn turn(&self, job: Job) -> Duration {
        self.turn * job.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(terms: &[&str]) -> Vec<Job> {
        pick(&terms.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn terms_pick_jobs_and_what_they_need() {
        assert_eq!(picked(&[]), JOBS);
        assert_eq!(picked(&["job=batch"]), [Job::Batch]);
        assert_eq!(picked(&["batch"]), [Job::Batch, Job::BatchDecrypt]);
        assert_eq!(picked(&["load", "job=many"])[..2], [Job::Generate, Job::HalfLoad]);
        for bad in ["", "speed", "job=", "job=bat", "batch=16"] {
            assert!(pick(&["random".into(), bad.into()]).is_err(), "{bad}");
        }
    }

    #[test]
    fn rounds_are_odd_and_fill_the_time() {
        for (jobs, seconds, least) in [(&JOBS[..], 60, 9), (&JOBS, 1, 3), (&JOBS[9..], 60, 3)] {
            let time = Duration::from_secs(seconds);
            let plan = Plan::new(jobs, time);
            assert!(plan.rounds >= least && plan.rounds % 2 == 1, "{}", plan.rounds);
            let round: Duration = jobs.iter().map(|job| plan.turn(*job)).sum();
            assert!(round * plan.rounds <= time);
        }
    }
}
