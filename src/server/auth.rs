//! Who has signed a head: the clients of the store with their public keys, parsed once.
//!
//! RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 section 8.2) by AWS-LC. Everything here is public. There is no memory of
//! signatures: an honest client may send the same request twice within a second, and the protocol has no nonce.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use aws_lc_rs::signature::{ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256};

use super::{admission::Account, head::Head, refusal::Refusal};
use crate::{
    clients::{Client, ClientDirectory, ClientId},
    engine::Engine,
    limits::SERVER_DISABLED_TOLD_TIME,
    os,
};

/// The clients that may sign.
pub(super) struct Signers(ArcSwap<Known>);

/// What a directory holds, with its keys as far as they were needed.
struct Known {
    directory: Arc<ClientDirectory>,
    signers: HashMap<ClientId, Arc<Signer>>,
}

pub(super) struct Signer {
    pub(super) client: Arc<Client>,
    /// Kept as long as there is a client of this id.
    pub(super) account: Arc<Account>,
    /// When the log last told that it is disabled, and still asks; 0 for never.
    told_ms: AtomicU64,
    /// `None` inside if the key of the store is none.
    key: OnceLock<Option<ParsedPublicKey>>,
}

impl Signers {
    pub(super) fn new(engine: &Engine) -> Self {
        let known = Known::new(engine.client_directory(), &HashMap::new());
        Self(ArcSwap::from_pointee(known))
    }

    /// The client that `head` claims to be of. One that is disabled is as unknown as one that was never there, but
    /// `disabled` is called for it.
    pub(super) fn claimed(
        &self,
        engine: &Engine,
        head: &Head,
        disabled: impl FnOnce(),
    ) -> Result<Arc<Signer>, Refusal> {
        let unknown = || Refusal::unknown_client(&head.client);
        let id = ClientId::parse(&head.client).ok_or_else(unknown)?;
        let signer = self.find(engine, &id).ok_or_else(unknown)?;
        if engine.client_directory().active(&id).is_none() {
            disabled();
            signer.tell_disabled(head);
            return Err(unknown());
        }
        Ok(signer)
    }

    fn find(&self, engine: &Engine, id: &ClientId) -> Option<Arc<Signer>> {
        let directory = engine.client_directory();
        let known = self.0.load();
        if Arc::ptr_eq(&known.directory, &directory) {
            return known.signers.get(id).cloned();
        }
        let newer = Arc::new(Known::new(directory, &known.signers));
        self.0.store(Arc::clone(&newer));
        newer.signers.get(id).cloned()
    }
}

impl Known {
    /// Keys that are parsed already stay so.
    fn new(directory: Arc<ClientDirectory>, before: &HashMap<ClientId, Arc<Signer>>) -> Self {
        let signer = |client: &Arc<Client>| {
            let id = client.client_id;
            let known = before.get(&id);
            let kept = known.filter(|signer| signer.client == *client).cloned();
            let new = || {
                Arc::new(Signer {
                    client: Arc::clone(client),
                    account: known.map(|signer| Arc::clone(&signer.account)).unwrap_or_default(),
                    told_ms: AtomicU64::new(0),
                    key: OnceLock::new(),
                })
            };
            (id, kept.unwrap_or_else(new))
        };
        let signers = directory.iter().map(signer).collect();
        Self { directory, signers }
    }
}

impl Signer {
    /// Whether the client has signed `head`.
    pub(super) fn verify(&self, head: &Head) -> Result<(), Refusal> {
        let key = self.key().ok_or_else(Refusal::internal)?;
        key.verify_sig(&head.signed, &head.signature).map_err(|_| Refusal::signature())
    }

    /// Tells the log, now and then, that this disabled client still sends requests. Only of requests that it has
    /// signed: others could send any number in its name.
    fn tell_disabled(&self, head: &Head) {
        let now = os::coarse_ms().max(1);
        let told = self.told_ms.load(Ordering::Relaxed);
        let pause = os::millis(SERVER_DISABLED_TOLD_TIME);
        if told != 0 && now.saturating_sub(told) < pause || self.verify(head).is_err() {
            return;
        }
        let (order, failed) = (Ordering::Relaxed, Ordering::Relaxed);
        if self.told_ms.compare_exchange(told, now, order, failed).is_ok() {
            let client = self.client.client_id;
            tracing::warn!(%client, "a client that is disabled still sends requests");
        }
    }

    fn key(&self) -> Option<&ParsedPublicKey> {
        let parse = || {
            let key = ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &self.client.public_key);
            let id = self.client.client_id;
            key.inspect_err(|_| tracing::error!(client = %id, "the public key is no RSA key")).ok()
        };
        self.key.get_or_init(parse).as_ref()
    }
}
