//! Who has signed a head: the clients of the store with their public keys, parsed once.
//!
//! RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 section 8.2) by AWS-LC. Everything here is public. There is no memory of
//! signatures: an honest client may send the same request twice within a second, and the protocol has no nonce.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwap;
use aws_lc_rs::signature::{ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256};

use super::{head::Head, refusal::Refusal};
use crate::{
    clients::{Client, ClientDirectory, ClientId},
    engine::Engine,
};

/// The clients that may sign.
pub(super) struct Signers(ArcSwap<Known>);

/// What a directory holds, with its keys as far as they were needed.
struct Known {
    directory: Arc<ClientDirectory>,
    signers: HashMap<ClientId, Arc<Signer>>,
}

struct Signer {
    client: Arc<Client>,
    /// `None` inside if the key of the store is none.
    key: OnceLock<Option<ParsedPublicKey>>,
}

impl Signers {
    pub(super) fn new(engine: &Engine) -> Self {
        let known = Known::new(engine.client_directory(), &HashMap::new());
        Self(ArcSwap::from_pointee(known))
    }

    /// The client that has signed `head`. One that is disabled is as unknown as one that was never there.
    pub(super) fn verify(&self, engine: &Engine, head: &Head) -> Result<Arc<Client>, Refusal> {
        let unknown = || Refusal::unknown_client(&head.client);
        let id = ClientId::parse(&head.client).ok_or_else(unknown)?;
        let signer = self.find(engine, &id).ok_or_else(unknown)?;
        let key = signer.key().ok_or_else(Refusal::internal)?;
        match key.verify_sig(&head.signed, &head.signature) {
            Ok(()) => Ok(Arc::clone(&signer.client)),
            Err(_) => Err(Refusal::signature()),
        }
    }

    fn find(&self, engine: &Engine, id: &ClientId) -> Option<Arc<Signer>> {
        let directory = engine.client_directory();
        directory.active(id)?;
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
            let kept = before.get(&id).filter(|signer| signer.client == *client).cloned();
            let new = || Arc::new(Signer { client: Arc::clone(client), key: OnceLock::new() });
            (id, kept.unwrap_or_else(new))
        };
        let signers = directory.iter().map(signer).collect();
        Self { directory, signers }
    }
}

impl Signer {
    fn key(&self) -> Option<&ParsedPublicKey> {
        let parse = || {
            let key = ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &self.client.public_key);
            let id = self.client.client_id;
            key.inspect_err(|_| tracing::error!(client = %id, "the public key is no RSA key")).ok()
        };
        self.key.get_or_init(parse).as_ref()
    }
}
