//! The job `fill`: the random bytes of a batch of DEKs, in bulk.

use std::time::Instant;

use keymill::{Tier, kernels};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    cases::{Case, Contender},
    must_be_right,
    timing::{self, Times, Work},
};
use crate::failure::Result;

const SEED: [u8; 32] = [3; 32];
const BLOCK_LEN: usize = 64;

/// Checks the contenders of a case, then times them.
pub(super) fn measure(
    case: &Case,
    contenders: &[Contender],
    deadline: Instant,
) -> Result<Vec<Times>> {
    let number = |number: Option<usize>| number.expect("a fill has DEKs and a batch");
    let len = number(case.dek_len) * number(case.batch);
    // Two calls: the second goes on where the first ended.
    let mut right = vec![0; 2 * len];
    ChaCha20Rng::from_seed(SEED).fill_bytes(&mut right);

    let mut works: Vec<_> = contenders.iter().map(|contender| work(*contender)).collect();
    let mut memory = vec![0; len];
    for (contender, work) in contenders.iter().zip(&mut works) {
        for right in right.chunks_exact(len) {
            memory.fill(0);
            work(&mut memory);
            must_be_right(memory == right, case, *contender)?;
        }
    }
    Ok(timing::measure(&mut works, &mut memory, case.keys_a_call(), deadline))
}

fn work(contender: Contender) -> Work<'static, Vec<u8>> {
    match contender {
        Contender::Ours(tier) => ours(tier),
        _ => {
            let mut rng = ChaCha20Rng::from_seed(SEED);
            Box::new(move |memory| rng.fill_bytes(memory))
        }
    }
}

fn ours(tier: Tier) -> Work<'static, Vec<u8>> {
    let mut block = 0;
    Box::new(move |memory| {
        kernels::chacha_fill(tier, &SEED, 0, block, memory);
        block += memory.len().div_ceil(BLOCK_LEN) as u64;
    })
}
