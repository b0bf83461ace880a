//! **keymill** is a data-key engine. It takes thousands of `GenerateDataKey` requests in one call, makes a random data
//! key for each, wraps it under a versioned key-encryption key (KEK) with AES-GCM, and hands everything back in request
//! order.
//!
//! It is for storage systems that encrypt every object, page or volume with a key of its own and want those keys
//! without a network round trip for each, with the semantics of a cloud KMS.
//!
//! ```
//! use keymill::{CreateKey, DecryptRequest, Engine, GenerateDataKeyRequest};
//!
//! let engine = Engine::in_memory()?; // Engine::open(path, &root_key) for keys that last
//! engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
//!
//! let paths: Vec<String> = (0..10_000).map(|n| format!("/photos/{n}.jpg")).collect();
//! let requests: Vec<_> = (paths.iter())
//!     .map(|path| GenerateDataKeyRequest::new("alias/app", 32).aad(path.as_bytes()))
//!     .collect();
//! let batch = engine.advance_generate_data_key_batch(&requests)?;
//! let key = batch.get(4711).expect("this request was good");
//! let request = DecryptRequest::new(key.ciphertext_blob()).aad(b"/photos/4711.jpg");
//! assert_eq!(engine.advance_decrypt(&request)?.plaintext().expose(), key.plaintext().unwrap());
//! # Ok::<(), keymill::Error>(())
//! ```
//!
//! # The pieces
//! - [`Engine`]: the operations. `generate_data_key` and `decrypt` know the initial version of a key, raw blobs and a
//!   separate IV; their `advance_` twins follow rotation and use blobs that describe themselves. Each is a single call
//!   and a batch. `encrypt` and `advance_encrypt` do the same with a text of the caller's of up to 3 MiB
//!   ([`EncryptRequest`], [`Encrypted`]).
//! - [`DataKeyBatch`], [`DecryptedBatch`]: results in request order. A bad item has its own [`Error`], and the others
//!   succeed.
//! - [`KeyHandle`]: a KEK found once ([`Engine::key`]). [`Engine::generate_data_keys`] makes many data keys of one KEK
//!   and one length with it, [`Engine::generate_data_keys_into`] in memory that is there,
//!   [`Engine::stream_data_keys`] more than fit in memory, [`Engine::generate_data_key_into`] one in the caller's
//!   buffers.
//! - [`KeyPool`]: data keys made ahead of need, handed out at once.
//! - [`Client`]: who may use the engine through a server, known by a public key ([`Engine::create_client`]).
//! - [`Scheme`]: how a KEK wraps. `Derived` (XAES-256-GCM) has no practical bound; `Direct` is plain AES-GCM, whose
//!   bound of 2^32 wraps a version is counted durably and enforced.
//! - [`RootKey`]: opens the store, one SQLite file in which every KEK is sealed and every other row authenticated.
//! - [`limits`]: every length and cap.
//!
//! # What it is not
//! No FIPS-validated module, no HSM, no access control between the callers of one engine (whoever holds an [`Engine`]
//! may use all its keys), no backup or replication of the store.
//!
//! # Threat model in short
//! The store's file is worthless without the root key, and edits to it are refused; **restoring an older copy of it is
//! not detected**. Wrapped keys reveal nothing but their length, and open under their KEK and AAD alone; neither scheme
//! commits to the key. Data keys are random bytes of ChaCha20 seeded by the operating system. A forked child shares no
//! key and no IV with its parent. Secrets are wiped when they are dropped; views of plaintext do not print.
//! `SECURITY.md` in the repository is the long form.
//!
//! # Features
//! | feature | default | brings |
//! |---|---|---|
//! | `cli` | yes | the `keymill` program and the crates it needs |
//! | `arrow` | yes | `--format arrow` of the program: Arrow IPC streams |
//! | `bench` | yes | `keymill bench`, and the libraries that it compares with |
//! | `server` | yes | [`server`]: the KMS's wire protocol on HTTP, and with `cli` the commands `serve` and `client` |
//! | `deterministic` | no | `Engine::deterministic`: an in-memory engine whose every byte follows from a seed |
//!
//! `default-features = false` is the bare library. The kernels are those of the best [`Tier`] that the CPU has; the
//! environment variable `KEYMILL_TIER` and [`EngineBuilder::tier`] lower it. A Unix system is needed.

mod batch;
mod clients;
mod cpu;
mod engine;
mod error;
mod kernel;
#[cfg(any(feature = "bench", fuzzing))]
#[doc(hidden)]
pub mod kernels;
mod keys;
pub mod limits;
mod memory;
mod os;
mod pool;
mod request;
mod request_id;
mod rng;
mod secret;
#[cfg(feature = "server")]
pub mod server;
mod store;
mod wrap;

pub use batch::{
    data_key::DataKey,
    helpers::parallelism,
    result::{DataKeyBatch, DataKeyRef, Decrypted, DecryptedBatch, DecryptedRef},
};
pub use clients::{Client, ClientId, KeyPattern, Permission, Permissions};
pub use cpu::{TIER_VARIABLE, Tier};
pub use engine::{
    DataKeyBuffers, DataKeyStream, DueEvent, DueEventKind, DueReport, DueTotals, DueWork,
    Encrypted, Engine, EngineBuilder, StoreHealth, WrittenDataKey,
};
pub use error::{Error, ErrorKind, Fault, Result};
pub use keys::{
    Alias, KeyHandle, KeyId, KeyMetadata, KeySpec, KeyState, KeyVersionId, KeyVersionMetadata,
    Origin, RotationPeriod, TextForm,
};
#[cfg(feature = "cli")]
#[doc(hidden)]
pub use os::standard;
pub use pool::{KeyPool, KeyPoolConfig, KeyPoolMetrics};
pub use request::{
    CreateKey, DecryptRequest, EncryptRequest, GenerateDataKeyRequest, ImportKey, Operation,
    aads::{AadSource, NoAad, SameAad},
    clients::{CreateClient, UpdateClient},
};
pub use request_id::RequestId;
pub use secret::SecretBytes;
pub use store::{MovedFile, RootKey, check_store_path, mend_store};
pub use wrap::Scheme;

/// The code of the README, compiled and run by the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
