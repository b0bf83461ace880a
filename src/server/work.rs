//! What a body asks for, and the doing of it: single operations.
//!
//! Parameters that the engine knows are checked by the engine; here are those of the wire alone: negative lengths,
//! empty fields that mean absence, algorithms and padding modes by name.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, decode_key, skip_field},
};

use super::{
    api::{Api, generating},
    batch,
    encode::{self, DataKeyFields, DecryptedFields, EncryptedFields, RandomFields},
    proto::{self, AdvanceGenerateDataKeyRequest, BatchRequest, DecryptRequest, EncryptRequest},
    refusal::Refusal,
};
use crate::{
    batch::resolve::Reading,
    clients::Client,
    engine::Engine,
    keys::{Alias, KeyId, KeyVersionId},
    limits::{GENERATE_RANDOM_LEN_MAX, SERVER_BATCH_ITEMS_MAX, SERVER_REFUSED_ITEMS_PER_KEY},
    request::{self, ALGORITHM},
    request_id::RequestId,
    secret::SecretBytes,
    wrap::blob::Form,
};

/// What one request asks for.
pub(super) enum Work {
    Generate { advance: bool, request: Generate },
    Encrypt { advance: bool, request: EncryptRequest },
    Decrypt { advance: bool, request: DecryptRequest },
    Random { length: i32 },
    GenerateBatch { advance: bool, items: Vec<(Generate, String)> },
    DecryptBatch { advance: bool, items: Vec<(DecryptRequest, String)> },
}

/// Of both generating operations, whose messages have other numbers for the same fields.
#[derive(Default)]
pub(super) struct Generate {
    /// To be read as text.
    key_id: Bytes,
    algorithm: Bytes,
    number_of_bytes: i32,
    aad: Bytes,
}

/// `GenerateDataKeyRequest` as an item of a batch: its texts stay where they came, since an allocation for each costs
/// more than the data key.
#[derive(Clone, PartialEq, Message)]
struct GenerateItem {
    #[prost(bytes = "bytes", tag = "1")]
    key_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    algorithm: Bytes,
    #[prost(int32, tag = "3")]
    number_of_bytes: i32,
    #[prost(bytes = "bytes", tag = "4")]
    aad: Bytes,
}

/// The same of `AdvanceGenerateDataKeyRequest`.
#[derive(Clone, PartialEq, Message)]
struct AdvanceGenerateItem {
    #[prost(bytes = "bytes", tag = "1")]
    key_id: Bytes,
    #[prost(int32, tag = "2")]
    number_of_bytes: i32,
    #[prost(bytes = "bytes", tag = "3")]
    aad: Bytes,
}

impl From<GenerateItem> for Generate {
    fn from(item: GenerateItem) -> Self {
        let GenerateItem { key_id, algorithm, number_of_bytes, aad } = item;
        Self { key_id, algorithm, number_of_bytes, aad }
    }
}

impl From<AdvanceGenerateItem> for Generate {
    fn from(item: AdvanceGenerateItem) -> Self {
        let AdvanceGenerateItem { key_id, number_of_bytes, aad } = item;
        Self { key_id, algorithm: Bytes::new(), number_of_bytes, aad }
    }
}

impl From<proto::GenerateDataKeyRequest> for Generate {
    fn from(request: proto::GenerateDataKeyRequest) -> Self {
        let proto::GenerateDataKeyRequest { key_id, algorithm, number_of_bytes, aad } = request;
        Self { key_id: key_id.into(), algorithm: algorithm.into(), number_of_bytes, aad }
    }
}

impl From<AdvanceGenerateDataKeyRequest> for Generate {
    fn from(request: AdvanceGenerateDataKeyRequest) -> Self {
        let AdvanceGenerateDataKeyRequest { key_id, number_of_bytes, aad } = request;
        Self { key_id: key_id.into(), algorithm: Bytes::new(), number_of_bytes, aad }
    }
}

impl Generate {
    fn key_id(&self) -> Result<&str, Refusal> {
        std::str::from_utf8(&self.key_id).map_err(|_| Refusal::parameter("KeyId is not UTF-8."))
    }

    /// The engine's request.
    pub(super) fn check(&self) -> Result<request::GenerateDataKeyRequest<'_>, Refusal> {
        let key_id = self.key_id()?;
        check_key_id(key_id)?;
        check_algorithm(&self.algorithm)?;
        let number = u32::try_from(self.number_of_bytes).map_err(|_| {
            Refusal::parameter(format_args!("NumberOfBytes is {}.", self.number_of_bytes))
        })?;
        Ok(request::GenerateDataKeyRequest::new(key_id, number).aad(&self.aad))
    }
}

/// What was done.
pub(super) struct Done {
    pub(super) body: Bytes,
    pub(super) request_id: RequestId,
    /// The version of a single operation on a key.
    pub(super) version: Option<KeyVersionId>,
    pub(super) tally: Tally,
}

/// What became of the items: for metrics and the audit log.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) keys: Vec<(KeyId, u64)>,
    pub(super) codes: Vec<(&'static str, u64)>,
    /// Some of the keys that refused items asked for.
    pub(super) asked: BTreeSet<String>,
}

impl Tally {
    /// Of a single operation.
    fn one(version: Option<KeyVersionId>) -> Self {
        let keys = version.map(|version| (version.key_id(), 1)).into_iter().collect();
        Self { keys, codes: vec![(super::metrics::OK, 1)], asked: BTreeSet::new() }
    }

    /// What it costs under the limits of keys.
    pub(super) fn cost(&self) -> u64 {
        let count = |ok| {
            let of = self.codes.iter().filter(|(code, _)| (*code == super::metrics::OK) == ok);
            of.map(|(_, count)| count).sum::<u64>()
        };
        cost(count(true), count(false))
    }
}

impl Work {
    /// Reads a body.
    pub(super) fn decode(api: Api, body: Bytes) -> Result<Self, Refusal> {
        Ok(match api {
            Api::Generate { advance: false, batch: false } => {
                let request = message::<proto::GenerateDataKeyRequest>(body)?.into();
                Self::Generate { advance: false, request }
            }
            Api::Generate { advance: true, batch: false } => {
                let request = message::<AdvanceGenerateDataKeyRequest>(body)?.into();
                Self::Generate { advance: true, request }
            }
            Api::Encrypt { advance } => Self::Encrypt { advance, request: message(body)? },
            Api::Decrypt { advance, batch: false } => {
                Self::Decrypt { advance, request: message(body)? }
            }
            Api::Random => {
                Self::Random { length: message::<proto::GenerateRandomRequest>(body)?.length }
            }
            Api::Generate { advance: false, batch: true } => {
                let items = items::<GenerateItem, _>(body)?;
                Self::GenerateBatch { advance: false, items }
            }
            Api::Generate { advance: true, batch: true } => {
                let items = items::<AdvanceGenerateItem, _>(body)?;
                Self::GenerateBatch { advance: true, items }
            }
            Api::Decrypt { advance, batch: true } => {
                Self::DecryptBatch { advance, items: items::<DecryptRequest, _>(body)? }
            }
        })
    }

    /// Data keys, blobs or messages to be worked on. Items that are refused at a glance count as refused.
    pub(super) fn cost(&self) -> u64 {
        match self {
            Self::GenerateBatch { items, .. } => {
                cost_of(items, |item| !item.key_id.is_empty() && item.number_of_bytes > 0)
            }
            Self::DecryptBatch { items, .. } => {
                cost_of(items, |item| !item.ciphertext_blob.is_empty())
            }
            _ => 1,
        }
    }

    /// The key that a single operation asks for.
    pub(super) fn asked(&self) -> Option<String> {
        let asked = match self {
            Self::Generate { request, .. } => request.asked(),
            Self::Encrypt { request, .. } => Some(&*request.key_id),
            Self::Decrypt { request, .. } => request.asked(),
            Self::Random { .. } | Self::GenerateBatch { .. } | Self::DecryptBatch { .. } => None,
        };
        asked.filter(|name| is_key_name(name)).map(str::to_owned)
    }

    /// Whether it needs no store and not much time, so that a thread that serves connections may do it.
    pub(super) fn is_at_hand(&self, engine: &Engine) -> bool {
        match self {
            Self::Generate { advance, request } => {
                request.key_id().is_ok_and(|key_id| engine.is_at_hand(key_id, *advance))
            }
            Self::Encrypt { advance, request } => engine.is_at_hand(&request.key_id, *advance),
            Self::Decrypt { advance, request } => {
                let blob: &[u8] = if *advance { &request.ciphertext_blob } else { &[] };
                engine.knows(text(&request.key_id), blob)
            }
            Self::Random { .. } => true,
            Self::GenerateBatch { .. } | Self::DecryptBatch { .. } => false,
        }
    }

    /// Does it, for `client`. `version` is that of the migration header.
    pub(super) fn run(
        &self,
        engine: &Engine,
        client: &Client,
        version: Option<&str>,
    ) -> Result<Done, Refusal> {
        match *self {
            Self::Generate { advance, ref request } => generate(engine, client, advance, request),
            Self::Encrypt { advance, ref request } => encrypt(engine, client, advance, request),
            Self::Decrypt { advance, ref request } => {
                decrypt(engine, client, advance, request, version)
            }
            Self::Random { length } => random(engine, length),
            Self::GenerateBatch { advance, ref items } => {
                batch::generate(engine, client, advance, items)
            }
            Self::DecryptBatch { advance, ref items } => {
                batch::decrypt(engine, client, advance, items)
            }
        }
    }
}

/// Whose key an item asks for, if it says so.
pub(super) trait Asks {
    fn asked(&self) -> Option<&str>;
}

impl Asks for Generate {
    fn asked(&self) -> Option<&str> {
        self.key_id().ok()
    }
}

impl Asks for DecryptRequest {
    fn asked(&self) -> Option<&str> {
        text(&self.key_id)
    }
}

/// Whether this can be the name of a key: other texts of callers are not written down.
pub(super) fn is_key_name(name: &str) -> bool {
    KeyId::parse(name).is_some() || Alias::parse(name).is_ok()
}

fn cost(done: u64, refused: u64) -> u64 {
    done + refused.div_ceil(SERVER_REFUSED_ITEMS_PER_KEY)
}

fn cost_of<I>(items: &[(I, String)], is_good: impl Fn(&I) -> bool) -> u64 {
    let good = items.iter().filter(|(item, _)| is_good(item)).count() as u64;
    cost(good, items.len() as u64 - good)
}

fn message<M: Message + Default>(body: Bytes) -> Result<M, Refusal> {
    M::decode(body).map_err(malformed)
}

fn malformed(error: DecodeError) -> Refusal {
    Refusal::parameter(format_args!("The body is no message of this operation: {error}."))
}

fn items<M, R>(body: Bytes) -> Result<Vec<(R, String)>, Refusal>
where
    M: Message + Default + Into<R>,
    R: Default,
{
    check_item_count(&body)?;
    let BatchRequest::<M> { items } = message(body)?;
    let item =
        |item: proto::Item<M>| (item.request.map(Into::into).unwrap_or_default(), item.reference);
    Ok(items.into_iter().map(item).collect())
}

/// Counts the items of a batch before there is anything in memory for them: two bytes of a body are an item.
fn check_item_count(mut body: &[u8]) -> Result<(), Refusal> {
    let mut count = 0;
    let mut skip = || {
        while !body.is_empty() {
            let (tag, wire_type) = decode_key(&mut body)?;
            count += usize::from(tag == 1);
            if count > SERVER_BATCH_ITEMS_MAX {
                break;
            }
            skip_field(wire_type, tag, &mut body, DecodeContext::default())?;
        }
        Ok(())
    };
    skip().map_err(malformed)?;
    if count > SERVER_BATCH_ITEMS_MAX {
        return Err(Refusal::parameter(format_args!(
            "The batch has more than {SERVER_BATCH_ITEMS_MAX} items."
        )));
    }
    Ok(())
}

fn check_key_id(key_id: &str) -> Result<(), Refusal> {
    if key_id.is_empty() { Err(Refusal::parameter("KeyId is missing.")) } else { Ok(()) }
}

fn check_algorithm(algorithm: &[u8]) -> Result<(), Refusal> {
    if algorithm.is_empty() || algorithm == ALGORITHM.as_bytes() {
        return Ok(());
    }
    let algorithm = String::from_utf8_lossy(algorithm);
    let algorithm = crate::error::Shortened(&algorithm);
    Err(Refusal::parameter(format_args!("Algorithm {algorithm:?} is not {ALGORITHM}.")))
}

/// Padding is for algorithms that need it. The KMS's two modes may be named all the same.
pub(super) fn check_padding(mode: &str) -> Result<(), Refusal> {
    if matches!(mode, "" | "PKCS7_PADDING" | "NO_PADDING") {
        return Ok(());
    }
    let mode = crate::error::Shortened(mode);
    Err(Refusal::parameter(format_args!("PaddingMode {mode:?} is unknown.")))
}

fn generate(
    engine: &Engine,
    client: &Client,
    advance: bool,
    request: &Generate,
) -> Result<Done, Refusal> {
    let key = engine.generate_one_as(client, &request.check()?, generating(advance))?;
    let (version, request_id) = (key.key_version_id(), key.request_id());
    let body = encode::body(&DataKeyFields {
        key_id: key.key_id().as_str(),
        iv: key.iv(),
        plaintext: key.plaintext().map_or(&[], SecretBytes::expose),
        ciphertext_blob: key.ciphertext_blob(),
        request_id: &request_id.to_string(),
        algorithm: key.algorithm(),
        key_version_id: if advance { version.as_str() } else { "" },
    });
    Ok(Done { body, request_id, version: Some(version), tally: Tally::one(Some(version)) })
}

fn encrypt(
    engine: &Engine,
    client: &Client,
    advance: bool,
    request: &EncryptRequest,
) -> Result<Done, Refusal> {
    check_key_id(&request.key_id)?;
    check_padding(&request.padding_mode)?;
    let asked = request::EncryptRequest {
        key_id: &request.key_id,
        plaintext: &request.plaintext,
        aad: &request.aad,
        iv: bytes(&request.iv),
        algorithm: text(&request.algorithm),
    };
    let made = engine.encrypt_as(client, &asked, form(advance))?;
    let (version, request_id) = (made.key_version_id(), made.request_id());
    let body = encode::body(&EncryptedFields {
        key_id: made.key_id().as_str(),
        ciphertext_blob: made.ciphertext_blob(),
        iv: made.iv(),
        request_id: &request_id.to_string(),
        algorithm: made.algorithm(),
        key_version_id: if advance { version.as_str() } else { "" },
    });
    Ok(Done { body, request_id, version: Some(version), tally: Tally::one(Some(version)) })
}

/// The engine's request.
pub(super) fn decrypting(request: &DecryptRequest) -> Result<request::DecryptRequest<'_>, Refusal> {
    check_padding(&request.padding_mode)?;
    if request.ciphertext_blob.is_empty() {
        return Err(Refusal::parameter("CiphertextBlob is missing."));
    }
    Ok(request::DecryptRequest {
        ciphertext_blob: &request.ciphertext_blob,
        key_id: text(&request.key_id),
        iv: bytes(&request.iv),
        aad: &request.aad,
        algorithm: text(&request.algorithm),
        key_version_id: None,
    })
}

fn decrypt(
    engine: &Engine,
    client: &Client,
    advance: bool,
    request: &DecryptRequest,
    version: Option<&str>,
) -> Result<Done, Refusal> {
    let mut asked = decrypting(request)?;
    asked.key_version_id = version;
    let made = engine.decrypt_one_as(client, &asked, reading(advance))?;
    let (version, request_id) = (made.key_version_id(), made.request_id());
    let body = encode::body(&DecryptedFields {
        key_id: made.key_id().as_str(),
        plaintext: made.plaintext().expose(),
        request_id: &request_id.to_string(),
        algorithm: made.algorithm(),
        key_version_id: if advance { version.as_str() } else { "" },
    });
    Ok(Done { body, request_id, version: Some(version), tally: Tally::one(Some(version)) })
}

fn random(engine: &Engine, length: i32) -> Result<Done, Refusal> {
    let mut bytes = zeroize::Zeroizing::new([0; GENERATE_RANDOM_LEN_MAX]);
    let asked = usize::try_from(length).ok().and_then(|len| bytes.get_mut(..len));
    let out = asked.filter(|out| !out.is_empty()).ok_or_else(|| {
        Refusal::parameter(format_args!(
            "Length {length} is outside 1 to {GENERATE_RANDOM_LEN_MAX}."
        ))
    })?;
    let request_id = engine.generate_random(out)?;
    let body = encode::body(&RandomFields { random: out, request_id: &request_id.to_string() });
    Ok(Done { body, request_id, version: None, tally: Tally::one(None) })
}

fn form(advance: bool) -> Form {
    if advance { Form::SelfDescribing } else { Form::Raw }
}

pub(super) fn reading(advance: bool) -> Reading {
    if advance { Reading::Advance } else { Reading::Raw }
}

/// `None` for what is empty, which is how the wire says that it is absent.
fn text(value: &str) -> Option<&str> {
    Some(value).filter(|value| !value.is_empty())
}

/// The same for bytes.
fn bytes(value: &[u8]) -> Option<&[u8]> {
    Some(value).filter(|value| !value.is_empty())
}
