//! `--filter`: which rows are measured. A row is a case and one of its contenders.

use keymill::Tier;

use super::cases::{Case, Contender};
use crate::failure::{Failure, Result, quoted};

/// A row's members by which it can be picked.
const MEMBERS: [&str; 7] = ["job", "contender", "dek_len", "aad_len", "keks", "batch", "threads"];

/// All terms of a run. None picks everything.
pub(super) struct Filter<'a>(Vec<Term<'a>>);

struct Term<'a> {
    /// One of [`MEMBERS`], or `None` for a text to be found in job or contender.
    member: Option<&'a str>,
    value: &'a str,
}

impl<'a> Filter<'a> {
    pub(super) fn parse(terms: &'a [String]) -> Result<Self> {
        terms.iter().map(|term| Term::parse(term)).collect::<Result<_>>().map(Self)
    }

    /// The cases that have a picked row, each with the contenders of those rows.
    ///
    /// Refused if there is none: a benchmark that measures nothing is a mistake.
    pub(super) fn pick(
        &self,
        cases: &[Case],
        tiers: &[Tier],
    ) -> Result<Vec<(Case, Vec<Contender>)>> {
        let picked = |case: &Case| {
            let mut contenders = case.contenders(tiers);
            contenders.retain(|contender| self.picks(case, *contender));
            (*case, contenders)
        };
        let picked: Vec<_> =
            cases.iter().map(picked).filter(|(_, contenders)| !contenders.is_empty()).collect();
        if picked.is_empty() {
            let terms: Vec<_> = self.0.iter().map(|term| quoted(&term.to_string())).collect();
            return Err(Failure::refused(
                format!("nothing to measure fits --filter {}", terms.join(" --filter ")),
                format!("there is, though not in every combination: {}", offer(cases, tiers)),
            ));
        }
        Ok(picked)
    }

    fn picks(&self, case: &Case, contender: Contender) -> bool {
        // Of the terms of each member, one has to fit.
        self.0.iter().all(|term| {
            let mut same = self.0.iter().filter(|other| other.member == term.member);
            same.any(|term| term.fits(case, contender))
        })
    }
}

impl<'a> Term<'a> {
    fn parse(term: &'a str) -> Result<Self> {
        let (member, value) = match term.split_once('=') {
            Some((member, value)) => (Some(member.trim()), value.trim()),
            None => (None, term.trim()),
        };
        if value.is_empty() || member.is_some_and(|member| !MEMBERS.contains(&member)) {
            return Err(Failure::refused(
                format!("--filter {} is no term", quoted(term)),
                format!("write a text, or member=value; members are {}", MEMBERS.join(", ")),
            ));
        }
        Ok(Self { member, value })
    }

    fn fits(&self, case: &Case, contender: Contender) -> bool {
        let Some(member) = self.member else {
            return ["job", "contender"]
                .iter()
                .any(|member| value_of(member, case, contender).contains(self.value));
        };
        let value = value_of(member, case, contender);
        let family = || value.strip_prefix(self.value).is_some_and(|rest| rest.starts_with('/'));
        value == self.value || (member == "contender" && family())
    }
}

impl std::fmt::Display for Term<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.member {
            Some(member) => write!(f, "{member}={}", self.value),
            None => f.write_str(self.value),
        }
    }
}

/// The member as its JSON, without quotes.
fn value_of(member: &str, case: &Case, contender: Contender) -> String {
    let number = |number: Option<usize>| number.map_or("null".into(), |number| number.to_string());
    match member {
        "job" => case.job.as_str().into(),
        "contender" => contender.name(case.job),
        "dek_len" => number(case.dek_len),
        "aad_len" => number(case.aad_len),
        "keks" => number(case.keks),
        "batch" => number(case.batch),
        "threads" => case.threads.to_string(),
        _ => unreachable!("terms were checked against MEMBERS"),
    }
}

/// Every member with its values.
fn offer(cases: &[Case], tiers: &[Tier]) -> String {
    let of_member = |member: &&str| {
        let mut values: Vec<String> = Vec::new();
        for case in cases {
            for contender in case.contenders(tiers) {
                let value = value_of(member, case, contender);
                if value != "null" && !values.contains(&value) {
                    values.push(value);
                }
            }
        }
        // Numbers in order; names stay as they come.
        values.sort_by_key(|value| value.parse::<usize>().ok());
        format!("{member}={}", values.join("|"))
    };
    MEMBERS.iter().map(of_member).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cases::{self, Job};

    fn picked(terms: &[&str]) -> Vec<(Case, Vec<Contender>)> {
        let terms: Vec<_> = terms.iter().map(ToString::to_string).collect();
        Filter::parse(&terms).unwrap().pick(&cases::all(), &[Tier::PORTABLE]).unwrap()
    }

    #[test]
    fn no_term_picks_everything() {
        assert_eq!(picked(&[]).len(), cases::all().len());
    }

    #[test]
    fn terms_of_one_member_add_rows_and_others_take_away() {
        let rows = picked(&["job=seal", "job=open", "batch=16", "contender=ring"]);
        let jobs: Vec<_> = rows.iter().map(|(case, _)| case.job).collect();
        assert_eq!(jobs, [Job::Seal, Job::Open]);
        assert!(rows.iter().all(|(_, contenders)| *contenders == [Contender::Ring]));
        let jobs: Vec<_> = picked(&["dek_len=null"]).iter().map(|(case, _)| case.job).collect();
        assert_eq!(jobs, [Job::Setup, Job::BatchMixed, Job::Setup, Job::Setup]);
    }

    #[test]
    fn a_contender_is_named_in_full_or_by_its_family() {
        for (terms, contenders) in [
            (["job=seal", "contender=keymill"], vec![Contender::Ours(Tier::PORTABLE)]),
            (["job=seal", "contender=keymill/portable"], vec![Contender::Ours(Tier::PORTABLE)]),
            (["job=seal", "aes"], vec![Contender::AesGcm]),
        ] {
            assert!(picked(&terms).iter().all(|(_, picked)| *picked == contenders), "{terms:?}");
        }
        let ours = picked(&["contender=keymill", "threads=1"]);
        assert!(ours.iter().all(|(_, picked)| picked.iter().all(|one| one.is_keymill())));
        assert!(picked(&["contender=ring"]).iter().all(|(_, picked)| *picked == [Contender::Ring]));
        let terms = ["contender=aes".to_string()];
        let nothing = Filter::parse(&terms).unwrap().pick(&cases::all(), &[Tier::PORTABLE]);
        assert!(nothing.is_err(), "no contender has that name, nor is it before a slash");
    }

    #[test]
    fn what_is_no_term_is_refused() {
        for term in ["", "=", "job=", "=seal", "rounds=3", "Job=seal"] {
            assert!(Filter::parse(&[term.to_string()]).is_err(), "{term:?}");
        }
    }
}
