//! Compares `chacha_fill` of one tier with `rand_chacha`, which defines it: seed, stream, block and length are drawn,
//! the block often close to where a counter of 32 or 64 bits carries.
//!
//! The portable tier *is* `rand_chacha`; there, this target only proves that block and stream arrive.

#![no_main]

use std::sync::LazyLock;

use arbitrary::{Arbitrary, Result, Unstructured};
use keymill::{Tier, kernels::chacha_fill};
use libfuzzer_sys::fuzz_target;
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

static TIER: LazyLock<Tier> = LazyLock::new(|| Tier::detect().expect("KEYMILL_TIER names a tier"));

fuzz_target!(
    init: eprintln!("fill_diff: tier {}", *TIER),
    |fill: Fill| check(&fill)
);

fn check(fill: &Fill) {
    let Fill { seed, stream, block, len, lead } = fill;
    let mut expected = vec![0; *len];
    let mut rng = ChaCha20Rng::from_seed(*seed);
    rng.set_stream(*stream);
    rng.set_word_pos(u128::from(*block) * WORDS_PER_BLOCK);
    rng.fill_bytes(&mut expected);

    // Ends where its allocation ends, so that AddressSanitizer sees a write beyond it.
    let mut memory = vec![FILLER; lead + len].into_boxed_slice();
    chacha_fill(*TIER, seed, *stream, *block, &mut memory[*lead..]);
    assert!(memory[..*lead].iter().all(|byte| *byte == FILLER), "written before the output");
    let got = &memory[*lead..];
    // Whole slices first: libFuzzer traces every comparison in a loop.
    if got != expected {
        let byte = got.iter().zip(&expected).position(|(got, expected)| got != expected);
        panic!("differs from byte {byte:?} on");
    }
}

/// One call.
#[derive(Debug)]
struct Fill {
    seed: [u8; 32],
    stream: u64,
    block: u64,
    len: usize,
    /// Bytes between an aligned address and the output.
    lead: usize,
}

impl Arbitrary<'_> for Fill {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        // The counter first: a short input reaches everything but the seed.
        let base = *u.choose(&[0, 1 << 32, 0, 1 << 31, 1 << 63, u64::MAX])?;
        let block = if u.ratio(1, 4)? {
            u.arbitrary()?
        } else {
            // The last blocks before `base`, and a few after it.
            base.wrapping_add(8).wrapping_sub(u.int_in_range(0..=100)?)
        };
        let len = if u.ratio(1, 2)? {
            // Around whole numbers of blocks, up to two groups of sixteen.
            let blocks = usize::from(u.int_in_range(0..=33_u8)?);
            (64 * blocks + usize::from(u.int_in_range(0..=4_u8)?)).saturating_sub(2)
        } else {
            usize::from(u.int_in_range(0..=5000_u16)?)
        };
        let lead = usize::from(*u.choose(&[0_u8, 0, 1, 4, 8, 12, 15, 16, 31, 33])?);
        Ok(Self { block, len, lead, stream: u.arbitrary()?, seed: u.arbitrary()? })
    }
}

const WORDS_PER_BLOCK: u128 = 16;

const FILLER: u8 = 0xa5;
