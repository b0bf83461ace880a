//! The job `decrypt`: a batch of raw blobs unwrapped by the engine, beside a loop over `ring`.
//!
//! With one KEK the blobs come from one call of the engine, so that many of them share a salt, and `ring-loop` opens
//! what it sealed itself under one key. With as many as there are blobs each blob has a salt of its own: it was sealed
//! by the kernels under a key derived for it, which the engine, and the loop too, then have to derive again.

use std::time::Instant;

use keymill::{
    DataKeyBatch, DecryptRequest, DecryptedBatch, Engine,
    kernels::{self, KeySet, Place, Root},
    limits::{IV_LEN, SALT_LEN, TAG_LEN},
};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

use super::{
    cases::{Case, Contender},
    engine::{self, AAD_LEN, DEK_LEN, NUMBER_OF_BYTES, alias},
    loops::RingLoop,
    must_be_right,
    peers::{Aead, Iv, Ring, Salt, Xaes},
    sealing::Memory as Arrays,
    timing::{self, Times, Work},
};
use crate::failure::Result;

/// Bytes of a blob of the scheme `derived`.
const BLOB_LEN: usize = SALT_LEN + DEK_LEN + TAG_LEN;

/// Checks the contenders of a case, then times them.
pub(super) fn measure(
    case: &Case,
    contenders: &[Contender],
    deadline: Instant,
) -> Result<Vec<Times>> {
    let count = case.batch.expect("blobs to be opened");
    let kek = engine::keks(1)[0];
    let engine = engine::engine(case.threads, &[kek])?;
    let aads = engine::different_aads(count);
    let aads = aads.as_chunks::<AAD_LEN>().0;
    let salts_differ = case.keks == case.batch;
    let blobs = match salts_differ {
        true => Blobs::each_of_its_salt(&engine, &kek, aads)?,
        false => Blobs::of_one_call(&engine, aads)?,
    };
    let names: Vec<_> = (0..count).map(|_| alias(0)).collect();
    let requests: Vec<_> = (blobs.ivs.iter().zip(blobs.bytes.as_chunks::<BLOB_LEN>().0))
        .zip(aads.iter().zip(&names))
        .map(|((iv, blob), (aad, name))| DecryptRequest::new(blob).key_id(name).iv(iv).aad(aad))
        .collect();

    let mut each = RingLoop::new(&[kek])?;
    let mut of_loop = Arrays::of(count, count * DEK_LEN);
    each.make(DEK_LEN, aads, &mut of_loop);
    let xaes = Xaes::new(&kek);
    let work = |contender: &Contender| -> Work<'_, Memory> {
        match contender {
            Contender::Engine => Box::new(|Memory { opened, .. }| {
                // First, so that its memory serves again.
                *opened = None;
                *opened = Some(engine.decrypt_batch(&requests).expect("a batch within its limits"));
            }),
            _ if salts_differ => Box::new(|memory| blobs.derive_and_open(&xaes, aads, memory)),
            _ => Box::new(|memory| each.open(aads, &of_loop, &mut memory.deks)),
        }
    };
    let mut works: Vec<_> = contenders.iter().map(work).collect();
    let mut memory = Memory { opened: None, deks: vec![[0; DEK_LEN]; count] };
    for (contender, work) in contenders.iter().zip(&mut works) {
        work(&mut memory);
        let right = match (contender, salts_differ) {
            (Contender::Engine, _) => memory.opened.as_ref().is_some_and(|all| blobs.are_in(all)),
            (_, true) => memory.deks.as_flattened() == blobs.deks,
            (_, false) => memory.deks.as_flattened() == of_loop.deks,
        };
        must_be_right(right, case, *contender)?;
    }
    Ok(timing::measure(&mut works, &mut memory, case.keys_a_call(), deadline))
}

/// What contenders write.
struct Memory {
    opened: Option<DecryptedBatch>,
    deks: Vec<[u8; DEK_LEN]>,
}

/// What the engine opens, and what it has to find.
struct Blobs {
    ivs: Vec<Iv>,
    bytes: Vec<u8>,
    deks: Vec<u8>,
}

impl Blobs {
    fn of_one_call(engine: &Engine, aads: &[[u8; AAD_LEN]]) -> Result<Self> {
        let key = engine.key(&alias(0))?;
        let batch: DataKeyBatch =
            engine.generate_data_keys(&key, NUMBER_OF_BYTES, aads.len(), aads)?;
        let mut blobs = Self { ivs: Vec::new(), bytes: Vec::new(), deks: Vec::new() };
        for made in batch.iter() {
            let made = made.map_err(keymill::Error::clone)?;
            blobs.ivs.push(*made.iv());
            blobs.bytes.extend_from_slice(made.ciphertext_blob());
            blobs.deks.extend_from_slice(made.plaintext().expect("asked for"));
        }
        Ok(blobs)
    }

    fn each_of_its_salt(engine: &Engine, kek: &[u8; 32], aads: &[[u8; AAD_LEN]]) -> Result<Self> {
        let count = aads.len();
        let mut rng = ChaCha20Rng::from_seed([10; 32]);
        let mut bytes = |len: usize| {
            let mut bytes = vec![0; len];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        let salts: Vec<Salt> = bytes(count * SALT_LEN).as_chunks().0.to_vec();
        let ivs: Vec<Iv> = bytes(count * IV_LEN).as_chunks().0.to_vec();
        let (deks, mut blobs) = (bytes(count * DEK_LEN), vec![0; count * BLOB_LEN]);
        let keys = KeySet::derive(&Root::new(engine.tier(), kek)?, &salts);
        let aads: Vec<_> = aads.iter().map(|aad| &aad[..]).collect();
        let place = Place { stride: BLOB_LEN, offset: SALT_LEN };
        kernels::seal_many(&keys.each(0..count), &ivs, &aads, DEK_LEN, &deks, &mut blobs, place);
        for (blob, salt) in blobs.chunks_exact_mut(BLOB_LEN).zip(&salts) {
            blob[..SALT_LEN].copy_from_slice(salt);
        }
        Ok(Self { ivs, bytes: blobs, deks })
    }

    /// What the engine does for blobs whose salts differ, by a careful user.
    fn derive_and_open(&self, xaes: &Xaes, aads: &[[u8; AAD_LEN]], memory: &mut Memory) {
        let blobs = self.bytes.as_chunks::<BLOB_LEN>().0.iter().zip(&self.ivs);
        for ((blob, iv), (aad, dek)) in blobs.zip(aads.iter().zip(&mut memory.deks)) {
            let (salt, sealed) = blob.split_first_chunk().expect("a blob begins with its salt");
            assert!(Ring::new(&xaes.derive(salt)).open(iv, aad, sealed, dek), "it did not open");
        }
    }

    fn are_in(&self, opened: &DecryptedBatch) -> bool {
        let deks = self.deks.chunks_exact(DEK_LEN);
        opened.len() == deks.len()
            && opened
                .iter()
                .zip(deks)
                .all(|(opened, dek)| opened.is_ok_and(|opened| opened.plaintext() == dek))
    }
}
