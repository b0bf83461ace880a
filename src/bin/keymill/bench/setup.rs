//! The job `setup`: KEKs derived from one key, a salt for each, and set up for AES-256-GCM.
//!
//! Keys that a call replaces are dropped within the measured time, and wiped by those who wipe.

use std::time::Instant;

use aes_gcm::Aes256Gcm;
use keymill::{
    kernels::{self, KeySet, Place, Root},
    limits::{IV_LEN, SALT_LEN, TAG_LEN},
};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    cases::{Case, Contender},
    must_be_right,
    peers::{Aead, AwsLcRs, Ring, Salt, Xaes},
    timing::{self, Times, Work},
};
use crate::failure::Result;

const ROOT: [u8; 32] = [4; 32];

/// Checks the contenders of a case, then times them.
pub(super) fn measure(
    case: &Case,
    contenders: &[Contender],
    deadline: Instant,
) -> Result<Vec<Times>> {
    let mut bytes = vec![0; case.keks.expect("keys to be made") * SALT_LEN];
    ChaCha20Rng::from_seed([5; 32]).fill_bytes(&mut bytes);
    let salts = bytes.as_chunks().0;
    let xaes = Xaes::new(&ROOT);
    let works = contenders.iter().map(|contender| work(*contender, &xaes, salts));
    let mut works = works.collect::<Result<Vec<_>>>()?;

    let mut reference = Memory::default();
    work(Contender::AesGcm, &xaes, salts)?(&mut reference);
    let right = seal_by_each(&reference.aes_gcm);
    let mut memory = Memory::default();
    for (contender, work) in contenders.iter().zip(&mut works) {
        work(&mut memory);
        let made = match contender {
            Contender::Ours(_) => memory.ours.as_ref().map(|keys| seal_by_ours(keys, salts.len())),
            Contender::Ring => Some(seal_by_each(&memory.ring)),
            Contender::AwsLcRs => Some(seal_by_each(&memory.aws_lc_rs)),
            _ => Some(seal_by_each(&memory.aes_gcm)),
        };
        must_be_right(made.as_ref() == Some(&right), case, *contender)?;
        memory.ours = None;
    }
    Ok(timing::measure(&mut works, &mut memory, case.keys_a_call(), deadline))
}

/// The keys of each library.
#[derive(Default)]
struct Memory {
    ours: Option<KeySet>,
    aes_gcm: Vec<Aes256Gcm>,
    ring: Vec<Ring>,
    aws_lc_rs: Vec<AwsLcRs>,
}

fn work<'a>(contender: Contender, xaes: &'a Xaes, salts: &'a [Salt]) -> Result<Work<'a, Memory>> {
    Ok(match contender {
        Contender::Ours(tier) => {
            let root = Root::new(tier, &ROOT)?;
            Box::new(move |memory| match &mut memory.ours {
                Some(keys) => keys.derive_again(&root, salts),
                none => *none = Some(KeySet::derive(&root, salts)),
            })
        }
        Contender::Ring => Box::new(|memory| derive_each(&mut memory.ring, xaes, salts)),
        Contender::AwsLcRs => Box::new(|memory| derive_each(&mut memory.aws_lc_rs, xaes, salts)),
        _ => Box::new(|memory| derive_each(&mut memory.aes_gcm, xaes, salts)),
    })
}

fn derive_each<P: Aead>(keys: &mut Vec<P>, xaes: &Xaes, salts: &[Salt]) {
    // Keeps its memory.
    keys.clear();
    keys.extend(salts.iter().map(|salt| P::new(&xaes.derive(salt))));
}

/// A message of which every key makes another one.
const PROBE: [u8; 32] = [6; 32];
const PROBE_IV: [u8; IV_LEN] = [7; IV_LEN];
const SEALED_LEN: usize = PROBE.len() + TAG_LEN;

fn seal_by_each<P: Aead>(keys: &[P]) -> Vec<u8> {
    let mut out = vec![0; keys.len() * SEALED_LEN];
    for (key, out) in keys.iter().zip(out.chunks_exact_mut(SEALED_LEN)) {
        key.seal(&PROBE_IV, &[], &PROBE, out);
    }
    out
}

fn seal_by_ours(keys: &KeySet, count: usize) -> Vec<u8> {
    let mut out = vec![0; count * SEALED_LEN];
    let (ivs, aads) = (vec![PROBE_IV; count], vec![&[][..]; count]);
    let place = Place { stride: SEALED_LEN, offset: 0 };
    let probes = PROBE.repeat(count);
    kernels::seal_many(&keys.each(0..count), &ivs, &aads, PROBE.len(), &probes, &mut out, place);
    out
}
