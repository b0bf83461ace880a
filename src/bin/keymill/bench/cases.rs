//! What is measured: jobs, their shapes, and who does them. Data alone; the order is that of the output.

use keymill::Tier;

/// What a contender does with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Seal,
    Open,
    Fill,
    Setup,
    /// Named `job`: fill and seal.
    Whole,
}

impl Job {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Seal => "seal",
            Self::Open => "open",
            Self::Fill => "fill",
            Self::Setup => "setup",
            Self::Whole => "job",
        }
    }

    /// Who does the job on a CPU with these tiers.
    pub(super) fn contenders(self, tiers: &[Tier]) -> Vec<Contender> {
        let ours = tiers.iter().copied().map(Contender::Ours);
        let peers = [Contender::Ring, Contender::AesGcm, Contender::AwsLcRs];
        match self {
            // Other tiers fill by `rand_chacha` itself.
            Self::Fill => ours
                .filter(|ours| matches!(ours, Contender::Ours(tier) if tier.as_str() == "vaes512"))
                .chain([Contender::RandChacha])
                .collect(),
            _ => ours.chain(peers).collect(),
        }
    }

    /// Whom the others are compared with; the first is the one for tables with room for one.
    pub(super) fn baselines(self) -> &'static [Contender] {
        match self {
            Self::Seal | Self::Open | Self::Whole => &[Contender::Ring, Contender::AesGcm],
            Self::Fill => &[Contender::RandChacha],
            Self::Setup => &[Contender::AesGcm, Contender::Ring],
        }
    }
}

/// Who does a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contender {
    Ours(Tier),
    Ring,
    AesGcm,
    AwsLcRs,
    RandChacha,
}

impl Contender {
    /// The name in rows and tables.
    pub(super) fn name(self, job: Job) -> String {
        match self {
            // The one fill of our own is named after what it uses: it needs no VAES.
            Self::Ours(_) if job == Job::Fill => "keymill/avx512".into(),
            Self::Ours(tier) => format!("keymill/{tier}"),
            Self::Ring => "ring".into(),
            Self::AesGcm => "aes-gcm".into(),
            Self::AwsLcRs => "aws-lc-rs".into(),
            Self::RandChacha => "rand_chacha".into(),
        }
    }
}

/// A job in one shape. A number that does not apply is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) job: Job,
    /// Bytes of each data key.
    pub(super) dek_len: Option<usize>,
    /// Bytes of each AAD.
    pub(super) aad_len: Option<usize>,
    /// Different KEKs, in random order over the messages; in `setup` the keys to be made.
    pub(super) keks: Option<usize>,
    /// Messages of a call.
    pub(super) batch: Option<usize>,
    pub(super) threads: usize,
}

impl Case {
    /// 32-byte DEKs, 16 bytes of AAD, one KEK, 4,096 a batch.
    const SEALING: Self = Self {
        job: Job::Seal,
        dek_len: Some(32),
        aad_len: Some(16),
        keks: Some(1),
        batch: Some(4096),
        threads: 1,
    };

    /// The case of its job that is told first.
    fn headline(job: Job) -> Self {
        match job {
            Job::Seal | Job::Open | Job::Whole => Self { job, ..Self::SEALING },
            Job::Fill => Self { job, aad_len: None, keks: None, ..Self::SEALING },
            Job::Setup => {
                let keks = Some(KEKS);
                Self { job, dek_len: None, aad_len: None, keks, batch: None, threads: 1 }
            }
        }
    }

    pub(super) fn is_headline(&self) -> bool {
        *self == Self::headline(self.job)
    }

    /// The headline with one of its numbers changed at a time.
    fn variations(job: Job) -> Vec<Self> {
        let first = Self::headline(job);
        let lens = [16, 64, 256, 1024].map(|len| Self { dek_len: Some(len), ..first });
        let aads = [0, 100, 1024].map(|len| Self { aad_len: Some(len), ..first });
        let keks = |counts: &[usize]| -> Vec<_> {
            counts.iter().map(|count| Self { keks: Some(*count), ..first }).collect()
        };
        let batches = [16, 64, 256, 1024].map(|size| Self { batch: Some(size), ..first });
        match job {
            Job::Seal | Job::Open | Job::Whole => {
                [&lens[..], &aads, &keks(&[KEKS]), &batches].concat()
            }
            Job::Fill => lens.to_vec(),
            Job::Setup => keks(&[64, 1]),
        }
    }

    /// What a call makes, which times are divided by.
    pub(super) fn keys_a_call(&self) -> usize {
        self.batch.or(self.keks).expect("a case has either")
    }

    /// The case in words.
    pub(super) fn title(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(self.dek_len.map(|len| format!("{len}-byte DEKs")));
        parts.extend(self.aad_len.map(|len| format!("{len} bytes of AAD")));
        parts.extend(self.keks.map(|keks| match keks {
            1 => "1 KEK".to_owned(),
            keks => format!("{keks} KEKs"),
        }));
        parts.extend(self.batch.map(|batch| format!("batches of {batch}")));
        format!("{}: {}", self.job.as_str(), parts.join(", "))
    }
}

/// Every case, headlines first.
pub(super) fn all() -> Vec<Case> {
    const JOBS: [Job; 5] = [Job::Seal, Job::Open, Job::Fill, Job::Setup, Job::Whole];
    let headlines = JOBS.into_iter().map(Case::headline);
    headlines.chain(JOBS.into_iter().flat_map(Case::variations)).collect()
}

/// The many of "many KEKs".
const KEKS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headlines_come_first_and_no_case_comes_twice() {
        let all = all();
        assert!(all.is_sorted_by_key(|case| !case.is_headline()));
        assert_eq!(all.iter().filter(|case| case.is_headline()).count(), 5);
        for (i, case) in all.iter().enumerate() {
            assert!(!all[..i].contains(case), "{}", case.title());
        }
    }

    #[test]
    fn a_title_names_every_number() {
        assert_eq!(
            Case::headline(Job::Seal).title(),
            "seal: 32-byte DEKs, 16 bytes of AAD, 1 KEK, batches of 4096"
        );
        assert_eq!(Case::headline(Job::Setup).title(), "setup: 1024 KEKs");
    }
}
