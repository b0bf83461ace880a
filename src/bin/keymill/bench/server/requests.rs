//! Requests that are signed ahead: a set for each operation, sent again and again.
//!
//! Signing costs more than everything else that a client does, so it happens outside of what is timed. The protocol has
//! no nonce: a signed request is good for 15 minutes however often it is sent. Sets are made of answers that were
//! checked in full: what `Decrypt` gets was generated a moment before, and has to come back as the data key.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use keymill::server::proto::{
    AdvanceGenerateDataKeyRequest, BatchRequest, BatchResponse, DecryptRequest, DecryptResponse,
    GenerateDataKeyRequest, GenerateDataKeyResponse, GenerateRandomRequest, GenerateRandomResponse,
    Item,
};
use prost::Message;

use super::{
    client_key::ClientKey,
    wire::{Connection, Target, refused},
};
use crate::failure::{Failure, Result};

/// Distinct requests of a set: so many AADs, and so many signatures.
const REQUESTS: usize = 256;
/// The same of batches.
const BATCHES: usize = 8;
/// Items of a batch.
pub(super) const BATCH_ITEMS: usize = 4096;
/// Bytes of a data key, and of its AAD.
const DEK_LEN: i32 = 32;
const AAD_LEN: usize = 16;
/// When a set is signed again: far from the 15 minutes that a server accepts.
const AGE_MAX: Duration = Duration::from_secs(300);

/// Signs, and knows what for.
pub(super) struct Signing {
    pub(super) target: Target,
    pub(super) client: ClientKey,
    /// The KEK by its id or alias.
    pub(super) key: String,
}

/// Requests as they go over the wire.
pub(super) type Signed = Arc<Vec<Vec<u8>>>;

/// The requests of one operation.
pub(super) struct Set {
    operation: &'static str,
    bodies: Vec<Vec<u8>>,
    signed: Signed,
    made: Instant,
}

/// A data key that was generated, with what it takes to decrypt it.
pub(super) struct Generated {
    pub(super) decrypt: DecryptRequest,
    pub(super) plaintext: Bytes,
}

impl Set {
    fn new(signing: &Signing, operation: &'static str, bodies: Vec<Vec<u8>>) -> Result<Self> {
        let signed = sign(signing, operation, &bodies)?;
        Ok(Self { operation, bodies, signed, made: Instant::now() })
    }

    /// The requests, none of them old.
    pub(super) fn fresh(&mut self, signing: &Signing) -> Result<Signed> {
        if self.made.elapsed() > AGE_MAX {
            self.signed = sign(signing, self.operation, &self.bodies)?;
            self.made = Instant::now();
        }
        Ok(Arc::clone(&self.signed))
    }

    /// `GenerateRandom` of one byte.
    pub(super) async fn random(signing: &Signing, connection: &mut Connection) -> Result<Self> {
        let body = GenerateRandomRequest { length: 1 }.encode_to_vec();
        let set = Self::new(signing, "GenerateRandom", vec![body])?;
        let answer: GenerateRandomResponse = connection.call(&set.signed[0]).await?.message()?;
        must_be_right(answer.random.len() == 1, set.operation)?;
        Ok(set)
    }

    /// `GenerateDataKey` and what `Decrypt` makes of its answers.
    pub(super) async fn generate_and_decrypt(
        signing: &Signing,
        connection: &mut Connection,
    ) -> Result<(Self, Self)> {
        let aads: Vec<_> = (0..REQUESTS as u64).map(|index| aad(0, index)).collect();
        let body = |aad: &Bytes| generate_request(signing, aad.clone()).encode_to_vec();
        let generate = Self::new(signing, "GenerateDataKey", aads.iter().map(body).collect())?;
        let made = generate.call_all(&aads, connection).await?;
        let decrypt = Self::decrypt(signing, "Decrypt", &made, connection).await?;
        Ok((generate, decrypt))
    }

    /// `AdvanceGenerateDataKey`.
    pub(super) async fn advance(signing: &Signing, connection: &mut Connection) -> Result<Self> {
        let aads: Vec<_> = (0..REQUESTS as u64).map(|index| aad(1, index)).collect();
        let body = |aad: &Bytes| {
            let (key_id, aad) = (signing.key.clone(), aad.clone());
            AdvanceGenerateDataKeyRequest { key_id, number_of_bytes: DEK_LEN, aad }.encode_to_vec()
        };
        let bodies = aads.iter().map(body).collect();
        let advance = Self::new(signing, "AdvanceGenerateDataKey", bodies)?;
        let made = advance.call_all(&aads[..1], connection).await?;
        Self::decrypt(signing, "AdvanceDecrypt", &made, connection).await?;
        Ok(advance)
    }

    /// Data keys of the first of its requests, which have these AADs.
    async fn call_all(
        &self,
        aads: &[Bytes],
        connection: &mut Connection,
    ) -> Result<Vec<Generated>> {
        let mut made = Vec::new();
        for (request, aad) in self.signed.iter().zip(aads) {
            let answer = connection.call(request).await?.message()?;
            made.push(Generated::of(answer, aad.clone())?);
        }
        Ok(made)
    }

    /// Decrypts what was generated, all of it, before it becomes a set.
    async fn decrypt(
        signing: &Signing,
        operation: &'static str,
        made: &[Generated],
        connection: &mut Connection,
    ) -> Result<Self> {
        let bodies = made.iter().map(|made| made.decrypt.encode_to_vec()).collect();
        let set = Self::new(signing, operation, bodies)?;
        for (request, made) in set.signed.iter().zip(made) {
            let answer: DecryptResponse = connection.call(request).await?.message()?;
            must_be_right(answer.plaintext == made.plaintext, operation)?;
        }
        Ok(set)
    }

    /// `BatchGenerateDataKey` and what `BatchDecrypt` makes of its answers.
    pub(super) async fn batches(
        signing: &Signing,
        connection: &mut Connection,
    ) -> Result<(Self, Self)> {
        let mut bodies = Vec::new();
        for batch in 0..BATCHES {
            bodies.push(batch_body(signing, batch));
        }
        let generate = Self::new(signing, "BatchGenerateDataKey", bodies)?;
        let mut made = Vec::new();
        for (batch, request) in generate.signed.iter().enumerate() {
            let answer = connection.call(request).await?.message()?;
            made.push(generated_batch(answer, batch)?);
        }
        let bodies = made.iter().map(|made| decrypt_body(made)).collect();
        let decrypt = Self::new(signing, "BatchDecrypt", bodies)?;
        for (request, made) in decrypt.signed.iter().zip(&made) {
            check_opened(connection.call(request).await?.message()?, made)?;
        }
        Ok((generate, decrypt))
    }

    pub(super) fn len(&self) -> usize {
        self.bodies.len()
    }
}

fn sign(signing: &Signing, operation: &str, bodies: &[Vec<u8>]) -> Result<Signed> {
    let request = |body: &Vec<u8>| signing.client.request(&signing.target.host, operation, body);
    bodies.iter().map(request).collect::<Result<_>>().map(Arc::new)
}

/// An AAD that no other request of the run has.
fn aad(batch: u64, index: u64) -> Bytes {
    let mut aad = [0; AAD_LEN];
    aad[..8].copy_from_slice(&batch.to_be_bytes());
    aad[8..].copy_from_slice(&index.to_be_bytes());
    Bytes::copy_from_slice(&aad)
}

/// Of an item of a batch. The first numbers belong to single requests.
fn batch_aad(batch: usize, index: usize) -> Bytes {
    aad(2 + batch as u64, index as u64)
}

fn generate_request(signing: &Signing, aad: Bytes) -> GenerateDataKeyRequest {
    GenerateDataKeyRequest {
        key_id: signing.key.clone(),
        algorithm: String::new(),
        number_of_bytes: DEK_LEN,
        aad,
    }
}

/// The bytes that a `GenerateDataKey` is signed for, as an example of a single request.
pub(super) fn example_body(signing: &Signing, index: usize) -> Vec<u8> {
    generate_request(signing, aad(0, index as u64)).encode_to_vec()
}

fn batch_body(signing: &Signing, batch: usize) -> Vec<u8> {
    let item = |index| {
        let request = Some(generate_request(signing, batch_aad(batch, index)));
        Item { request, reference: String::new() }
    };
    BatchRequest { items: (0..BATCH_ITEMS).map(item).collect() }.encode_to_vec()
}

/// The data keys of an answer to the batch of this number. Every item has to be there and good.
pub(super) fn generated_batch(
    answer: BatchResponse<GenerateDataKeyResponse>,
    batch: usize,
) -> Result<Vec<Generated>> {
    must_be_right(answer.results.len() == BATCH_ITEMS, "BatchGenerateDataKey")?;
    let mut made = Vec::with_capacity(BATCH_ITEMS);
    for (index, result) in answer.results.into_iter().enumerate() {
        match (result.response, result.error) {
            (Some(response), None) => {
                made.push(Generated::of(response, batch_aad(batch, index))?);
            }
            (None, Some(error)) => {
                return Err(refused(u16::try_from(error.status_code).unwrap_or(500), &error));
            }
            _ => must_be_right(false, "BatchGenerateDataKey")?,
        }
    }
    Ok(made)
}

/// A request that decrypts all of `made`.
fn decrypt_body(made: &[Generated]) -> Vec<u8> {
    let item =
        |made: &Generated| Item { request: Some(made.decrypt.clone()), reference: String::new() };
    BatchRequest { items: made.iter().map(item).collect() }.encode_to_vec()
}

/// Decrypts `made` in one batch and compares.
pub(super) async fn open_again(
    signing: &Signing,
    made: &[Generated],
    connection: &mut Connection,
) -> Result<()> {
    let host = &signing.target.host;
    let request = signing.client.request(host, "BatchDecrypt", &decrypt_body(made))?;
    check_opened(connection.call(&request).await?.message()?, made)
}

fn check_opened(answer: BatchResponse<DecryptResponse>, made: &[Generated]) -> Result<()> {
    let same =
        |(result, made): (keymill::server::proto::ItemResult<DecryptResponse>, &Generated)| {
            result.error.is_none()
                && result.response.is_some_and(|response| response.plaintext == made.plaintext)
        };
    let all = answer.results.len() == made.len();
    must_be_right(all && answer.results.into_iter().zip(made).all(same), "BatchDecrypt")
}

impl Generated {
    fn of(response: GenerateDataKeyResponse, aad: Bytes) -> Result<Self> {
        let right = response.plaintext.len() == 32
            && response.iv.len() == 12
            && !response.key_id.is_empty()
            && !response.request_id.is_empty()
            && response.algorithm == "AES_GCM";
        must_be_right(right, "GenerateDataKey")?;
        let decrypt = DecryptRequest {
            ciphertext_blob: response.ciphertext_blob,
            key_id: response.key_id,
            algorithm: response.algorithm,
            aad,
            iv: response.iv,
            padding_mode: String::new(),
        };
        Ok(Self { decrypt, plaintext: response.plaintext })
    }
}

/// Refuses to time an operation that answers something wrong.
fn must_be_right(right: bool, operation: &str) -> Result<()> {
    if right {
        return Ok(());
    }
    Err(Failure::broke(
        format!("{operation} answered something that is not right"),
        "report this as a bug, with the versions of server and client",
    ))
}
