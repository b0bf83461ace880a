//! keymill

mod batch;
mod cpu;
mod engine;
mod error;
mod kernel;
mod keys;
pub mod limits;
mod os;
mod request;
mod request_id;
mod rng;
mod secret;
mod store;
mod wrap;

pub use batch::result::{
    DataKey, DataKeyBatch, DataKeyRef, Decrypted, DecryptedBatch, DecryptedRef,
};
pub use cpu::{TIER_VARIABLE, Tier};
pub use engine::{DueReport, Engine, EngineBuilder};
pub use error::{Error, ErrorKind, Fault, Result};
pub use keys::{
    Alias, KeyId, KeyMetadata, KeySpec, KeyState, KeyVersionId, KeyVersionMetadata, Origin,
    RotationPeriod,
};
pub use request::{CreateKey, DecryptRequest, GenerateDataKeyRequest, ImportKey};
pub use request_id::RequestId;
pub use secret::SecretBytes;
pub use store::RootKey;
pub use wrap::Scheme;
