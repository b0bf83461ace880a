//! The same job by different hands: a data key of 32 bytes wrapped with 16 bytes of AAD, for each of many requests.

use aes_gcm::{Aes256Gcm, KeyInit, aead::Aead, aead::Payload};
use keymill::{CreateKey, DataKeyBatch, Engine, GenerateDataKeyRequest};
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};

/// Bytes of each data key.
const DEK_LEN: usize = NUMBER_OF_BYTES as usize;
/// Bytes of each AAD.
pub(crate) const AAD_LEN: usize = 16;
const NUMBER_OF_BYTES: u32 = 32;
const KEY: &str = "alias/bench";

/// AADs, all different.
pub(crate) fn aads(count: usize) -> Vec<[u8; AAD_LEN]> {
    (0..count as u128).map(u128::to_be_bytes).collect()
}

/// What the idiomatic loop returns for each request.
pub(crate) struct Made {
    #[expect(dead_code, reason = "made and kept as by a caller, read by nobody")]
    pub(crate) iv: Vec<u8>,
    #[expect(dead_code, reason = "made and kept as by a caller, read by nobody")]
    pub(crate) plaintext: Vec<u8>,
    #[expect(dead_code, reason = "made and kept as by a caller, read by nobody")]
    pub(crate) blob: Vec<u8>,
}

/// The loop that one writes over the same crates: a cipher object reused, a generator reused, a `Vec` per field.
pub(crate) struct IdiomaticLoop {
    cipher: Aes256Gcm,
    rng: ChaCha20Rng,
}

impl IdiomaticLoop {
    pub(crate) fn new() -> Self {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).expect("random bytes");
        let mut rng = ChaCha20Rng::from_seed(seed);
        let mut key = [0; 32];
        rng.fill_bytes(&mut key);
        Self { cipher: Aes256Gcm::new(&key.into()), rng }
    }

    pub(crate) fn make(&mut self, aads: &[[u8; AAD_LEN]]) -> Vec<Made> {
        let mut make = |aad: &[u8; AAD_LEN]| {
            let mut plaintext = vec![0; DEK_LEN];
            self.rng.fill_bytes(&mut plaintext);
            let mut iv = vec![0; 12];
            self.rng.fill_bytes(&mut iv);
            let nonce = iv.as_slice().try_into().expect("12 bytes");
            let blob = self.cipher.encrypt(nonce, Payload { msg: &plaintext, aad });
            Made { iv, plaintext, blob: blob.expect("short messages") }
        };
        aads.iter().map(&mut make).collect()
    }
}

/// The batch call.
pub(crate) struct Batch {
    engine: Engine,
}

impl Batch {
    /// On the caller's thread alone if `threads` is 1.
    pub(crate) fn new(threads: usize) -> Self {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let engine = Engine::builder().thread_pool(pool.into()).in_memory().expect("in memory");
        let key = CreateKey { alias: Some(KEY.into()), ..CreateKey::default() };
        engine.create_key(&key).expect("a new key");
        Self { engine }
    }

    /// Request structs included, as a caller has to make them.
    pub(crate) fn make(&self, aads: &[[u8; AAD_LEN]]) -> DataKeyBatch {
        let request = |aad| GenerateDataKeyRequest::new(KEY, NUMBER_OF_BYTES).aad(aad);
        let requests: Vec<_> = aads.iter().map(|aad| request(aad)).collect();
        self.engine.generate_data_key_batch(&requests).expect("a small batch")
    }

    /// One call for each request.
    pub(crate) fn make_singly(&self, aads: &[[u8; AAD_LEN]]) -> Vec<keymill::DataKey> {
        let request = |aad| GenerateDataKeyRequest::new(KEY, NUMBER_OF_BYTES).aad(aad);
        aads.iter().map(|aad| self.engine.generate_data_key(&request(aad)).expect("made")).collect()
    }
}
