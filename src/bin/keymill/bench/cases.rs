//! What is measured: jobs, their shapes, and who does them. Data alone; the order is that of the output.

use std::thread;

use keymill::{Tier, limits::BATCH_ITEMS_MAX};

/// What a contender does with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Seal,
    Open,
    Fill,
    Setup,
    /// Named `job`: fill and seal.
    Whole,
    /// The engine's batch call, by a handle. From here on the jobs are the engine's.
    Batch,
    BatchStrings,
    BatchMixed,
    BatchTenants,
    BatchLarge,
    Decrypt,
    PoolTake,
    Single,
}

impl Job {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Seal => "seal",
            Self::Open => "open",
            Self::Fill => "fill",
            Self::Setup => "setup",
            Self::Whole => "job",
            Self::Batch => "batch",
            Self::BatchStrings => "batch-strings",
            Self::BatchMixed => "batch-mixed",
            Self::BatchTenants => "batch-tenants",
            Self::BatchLarge => "batch-large",
            Self::Decrypt => "decrypt",
            Self::PoolTake => "pool-take",
            Self::Single => "single",
        }
    }

    /// Whether the engine does it, and not the kernels alone.
    pub(super) fn is_of_engine(self) -> bool {
        !matches!(self, Self::Seal | Self::Open | Self::Fill | Self::Setup | Self::Whole)
    }

    /// Whom the others are compared with; the first is the one for tables with room for one.
    pub(super) fn baselines(self) -> &'static [Contender] {
        match self {
            Self::Seal | Self::Open | Self::Whole => &[Contender::Ring, Contender::AesGcm],
            Self::Fill => &[Contender::RandChacha],
            Self::Setup => &[Contender::AesGcm, Contender::Ring],
            _ => &[Contender::RingLoop, Contender::IdiomaticLoop, Contender::Kernels],
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
    /// The engine on the best tier.
    Engine,
    /// What a careful user writes over `ring` in the engine's place.
    RingLoop,
    /// What most would write over `aes-gcm`: a `Vec` for each field.
    IdiomaticLoop,
    /// What the engine cannot be faster than: its kernels on arrays that are there.
    Kernels,
}

impl Contender {
    pub(super) fn is_keymill(self) -> bool {
        matches!(self, Self::Ours(_) | Self::Engine)
    }

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
            Self::Engine => "keymill".into(),
            Self::RingLoop => "ring-loop".into(),
            Self::IdiomaticLoop => "idiomatic-loop".into(),
            Self::Kernels => "kernels".into(),
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
    /// Different KEKs, in random order over the messages; in `setup` the keys to be made, in `decrypt` those that are
    /// derived of one.
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
            Job::Batch | Job::BatchStrings => Self { job, ..Self::SEALING },
            Job::BatchMixed => {
                let (keks, batch) = (Some(64), Some(MANY));
                Self { job, dek_len: None, aad_len: None, keks, batch, threads: 1 }
            }
            Job::BatchTenants => Self { job, keks: Some(KEKS), batch: Some(MANY), ..Self::SEALING },
            Job::BatchLarge => Self { job, batch: Some(BATCH_ITEMS_MAX), ..Self::SEALING },
            Job::Decrypt => Self { job, batch: Some(MANY), ..Self::SEALING },
            Job::PoolTake | Job::Single => Self { job, batch: Some(1), ..Self::SEALING },
        }
    }

    pub(super) fn is_headline(&self) -> bool {
        *self == Self::headline(self.job)
    }

    /// The headline with one of its numbers changed at a time; the batch call's threads also at several sizes.
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
            Job::Batch => {
                let sizes = |sizes: &[usize], threads| -> Vec<_> {
                    sizes.iter().map(|size| Self { batch: Some(*size), threads, ..first }).collect()
                };
                let alone = sizes(&[1, 16, 64, 256, 1024, MANY, 65_536], 1);
                [alone, sizes(&[4096, 8192, MANY, 65_536], many_threads())].concat()
            }
            Job::Decrypt => keks(&[MANY]),
            Job::Single => vec![Self { threads: many_threads(), ..first }],
            Job::BatchStrings
            | Job::BatchMixed
            | Job::BatchTenants
            | Job::BatchLarge
            | Job::PoolTake => Vec::new(),
        }
    }

    /// Who does it on a CPU with these tiers.
    pub(super) fn contenders(&self, tiers: &[Tier]) -> Vec<Contender> {
        use Contender::{AesGcm, AwsLcRs, Engine, IdiomaticLoop, Kernels, RandChacha, Ring};
        use Contender::{Ours, RingLoop};
        let ours = tiers.iter().copied().map(Ours);
        match self.job {
            // Other tiers fill by `rand_chacha` itself.
            Job::Fill => ours
                .filter(|ours| matches!(ours, Ours(tier) if tier.as_str() == "vaes512"))
                .chain([RandChacha])
                .collect(),
            job if !job.is_of_engine() => ours.chain([Ring, AesGcm, AwsLcRs]).collect(),
            // The loops have one thread.
            _ if self.threads > 1 => vec![Engine],
            Job::Batch if self.is_headline() => vec![Engine, RingLoop, IdiomaticLoop, Kernels],
            Job::Batch => vec![Engine, RingLoop, Kernels],
            Job::Single => vec![Engine, RingLoop, IdiomaticLoop],
            // To be compared with `batch`: a second copy of a hundred megabytes would say no more.
            Job::BatchLarge => vec![Engine],
            _ => vec![Engine, RingLoop],
        }
    }

    /// The part of the run's time that a case should have, its preparation included.
    pub(super) fn weight(&self) -> u32 {
        match self.job {
            // An engine needs a second to import a thousand keys, as each import reads them all; and a million data
            // keys leave room for few rounds.
            Job::BatchTenants | Job::BatchLarge => 2,
            _ => 1,
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
        parts.extend(self.batch.map(|batch| match batch {
            1 => "one by one".to_owned(),
            batch => format!("batches of {batch}"),
        }));
        if self.threads > 1 {
            parts.push(format!("{} threads", self.threads));
        }
        format!("{}: {}", self.job.as_str(), parts.join(", "))
    }
}

/// Every case, headlines first.
pub(super) fn all() -> Vec<Case> {
    const JOBS: [Job; 13] = [
        Job::Seal,
        Job::Open,
        Job::Fill,
        Job::Setup,
        Job::Whole,
        Job::Batch,
        Job::BatchStrings,
        Job::BatchMixed,
        Job::BatchTenants,
        Job::BatchLarge,
        Job::Decrypt,
        Job::PoolTake,
        Job::Single,
    ];
    let headlines = JOBS.into_iter().map(Case::headline);
    headlines.chain(JOBS.into_iter().flat_map(Case::variations)).collect()
}

/// The threads of cases with more than one: those of the machine.
fn many_threads() -> usize {
    thread::available_parallelism().map_or(2, |threads| threads.get().max(2))
}

/// The many of "many KEKs".
const KEKS: usize = 1024;
/// The many of "many items".
const MANY: usize = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headlines_come_first_and_no_case_comes_twice() {
        let all = all();
        assert!(all.is_sorted_by_key(|case| !case.is_headline()));
        assert_eq!(all.iter().filter(|case| case.is_headline()).count(), 13);
        let kernels_first = |headline| {
            let cases = all.iter().filter(|case| case.is_headline() == headline);
            cases.is_sorted_by_key(|case| case.job.is_of_engine())
        };
        assert!(kernels_first(true) && kernels_first(false));
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
        let single = Case { threads: 2, ..Case::headline(Job::Single) };
        assert_eq!(
            single.title(),
            "single: 32-byte DEKs, 16 bytes of AAD, 1 KEK, one by one, 2 threads"
        );
    }
}
