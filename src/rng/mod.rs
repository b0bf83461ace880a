//! Random bytes: batch seeds and per-thread pools, or a seeded stand-in for tests.
//!
//! Data keys come from ChaCha20 seeded by the operating system, never from KEK material. A large batch takes one fresh
//! seed from the operating system ([`Rng::fill_from_os`]); small ones and single calls draw from the thread's pool
//! ([`Rng::fill`]). ChaCha20 is no approved DRBG in the FIPS sense (SECURITY.md).

mod pool;

#[cfg(any(feature = "deterministic", fuzzing, test))]
use std::sync::atomic::{AtomicU64, Ordering};

use zeroize::Zeroize;

use crate::{
    cpu::Tier,
    error::{Error, ErrorKind, Result},
    kernel,
    limits::{IV_LEN, SALT_LEN},
    os::Moment,
    secret::Seed,
};

/// Where an engine's random bytes come from.
pub(crate) enum Rng {
    /// The operating system, stretched by ChaCha20.
    Os(Tier),
    /// Everything from one seed: draw *k* is stream *k*.
    #[cfg(any(feature = "deterministic", fuzzing, test))]
    Seeded { tier: Tier, seed: Seed, draws: AtomicU64 },
}

impl Rng {
    #[cfg(any(feature = "deterministic", fuzzing, test))]
    pub(crate) fn seeded(tier: Tier, seed: [u8; 32]) -> Self {
        Self::Seeded { tier, seed: Seed::new(seed), draws: AtomicU64::new(0) }
    }

    /// Whether the bytes follow from a seed.
    pub(crate) fn is_deterministic(&self) -> bool {
        !matches!(self, Self::Os(_))
    }

    /// Fills `out` from the thread's pool.
    ///
    /// # Errors
    /// `Machine` if the operating system gives no random bytes; `out` then holds nothing of use.
    pub(crate) fn fill(&self, out: &mut [u8]) -> Result<()> {
        self.fill_each(self.moment(), &mut [out])
    }

    /// What states that outlive a call are looked for with. A deterministic engine must not depend on threads or time.
    pub(crate) fn moment(&self) -> Moment {
        if self.is_deterministic() { Moment::fixed() } else { Moment::now() }
    }

    /// Fills several places from the thread's pool, at the cost of one where they are short. `moment` is now.
    ///
    /// # Errors
    /// As [`Rng::fill`].
    pub(crate) fn fill_each(&self, moment: Moment, out: &mut [&mut [u8]]) -> Result<()> {
        match self {
            Self::Os(tier) => pool::fill(*tier, moment, out),
            #[cfg(any(feature = "deterministic", fuzzing, test))]
            Self::Seeded { tier, seed, draws } => {
                for part in out {
                    let draw = draws.fetch_add(1, Ordering::Relaxed);
                    kernel::chacha_fill(*tier, seed, draw, 0, part);
                }
                Ok(())
            }
        }
    }

    /// Fills `out` from the operating system itself: long-lived key material, seeds of large batches.
    ///
    /// # Errors
    /// As [`Rng::fill`].
    pub(crate) fn fill_from_os(&self, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Os(_) => os_fill(out),
            #[cfg(any(feature = "deterministic", fuzzing, test))]
            Self::Seeded { .. } => self.fill(out),
        }
    }
}

fn os_fill(out: &mut [u8]) -> Result<()> {
    getrandom::fill(out).map_err(|error| {
        Error::new(ErrorKind::Machine, format!("The system gave no random bytes: {error}."))
    })
}

/// What a chunk of a batch draws from its stream of the batch seed.
///
/// | bytes of the stream | use |
/// |---|---|
/// | 0..12 | salt |
/// | 12..24 | first IV |
/// | 64.. | DEKs |
#[derive(Clone, Copy)]
pub(crate) struct ChunkStart {
    pub(crate) salt: [u8; SALT_LEN],
    pub(crate) iv: [u8; IV_LEN],
}

/// Where DEKs begin in a chunk's stream: at its second block.
const DEKS_AT: usize = 64;
const DEK_BLOCK: u64 = 1;

/// Fills the DEKs of chunk `chunk`, and draws what else it needs.
pub(crate) fn chunk(tier: Tier, seed: &Seed, chunk: u64, deks: &mut [u8]) -> ChunkStart {
    /// What the kernels make at once.
    const GROUP_LEN: usize = 1024;
    let mut group = [0; GROUP_LEN];
    let head = if deks.len() <= GROUP_LEN - DEKS_AT {
        // One call of the kernel for everything.
        let drawn = &mut group[..DEKS_AT + deks.len()];
        kernel::chacha_fill(tier, seed, chunk, 0, drawn);
        let (head, rest) = drawn.split_at_mut(DEKS_AT);
        deks.copy_from_slice(rest);
        rest.zeroize();
        &*head
    } else {
        kernel::chacha_fill(tier, seed, chunk, DEK_BLOCK, deks);
        let head = &mut group[..SALT_LEN + IV_LEN];
        kernel::chacha_fill(tier, seed, chunk, 0, head);
        &*head
    };
    let (salt, rest) = head.split_at(SALT_LEN);
    let salt = salt.try_into().expect("SALT_LEN");
    ChunkStart { salt, iv: rest[..IV_LEN].try_into().expect("IV_LEN") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_one_seed_share_nothing_and_follow_the_layout() {
        let seed = Seed::new([9; 32]);
        let mut stream = [0; 4096];
        for number in 0..2 {
            kernel::chacha_fill(Tier::PORTABLE, &seed, number, 0, &mut stream);
            for len in [1, 32, 959, 960, 961, 4032] {
                let mut deks = vec![0; len];
                let start = chunk(Tier::PORTABLE, &seed, number, &mut deks);
                assert_eq!((&start.salt[..], &start.iv[..]), (&stream[..12], &stream[12..24]));
                assert_eq!(deks, stream[64..64 + len], "{len}");
            }
        }
        let start = |number| chunk(Tier::PORTABLE, &seed, number, &mut [0]);
        assert_ne!((start(0).salt, start(0).iv), (start(1).salt, start(1).iv));
    }

    #[test]
    fn a_seeded_source_repeats_itself_and_never_within_itself() {
        let draw = |rng: &Rng| {
            let mut out = [0; 32];
            rng.fill(&mut out).unwrap();
            out
        };
        let (a, b) = (Rng::seeded(Tier::PORTABLE, [1; 32]), Rng::seeded(Tier::PORTABLE, [1; 32]));
        let first = draw(&a);
        assert_eq!(first, draw(&b));
        assert_ne!(first, draw(&a));
    }
}
