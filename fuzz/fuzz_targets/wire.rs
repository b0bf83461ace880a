//! Heads and bodies for the server, without sockets: whatever comes in, what goes out is the KMS's protocol.
//!
//! An input draws an operation, a body (bytes as they come, or a good message with some bytes changed), changes of the
//! head before and after it is signed, and who signs it. Signatures are made once for each head and kept, since one takes
//! as long as fifty requests; the date of heads is that of the start of the process, which is good for 15 minutes, and
//! is renewed with them.

#![no_main]

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, Instant, SystemTime},
};

use arbitrary::{Arbitrary, Result, Unstructured};
use aws_lc_rs::{
    digest,
    encoding::{AsDer, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::KeySize,
    signature::{KeyPair, RSA_PKCS1_SHA256, RsaKeyPair},
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Request, Response,
    header::{HeaderName, HeaderValue},
};
use keymill::{
    CreateClient, CreateKey, Engine, KeyPattern, Permissions, Scheme,
    server::{ServerConfig, Service, proto},
};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use tokio::runtime::Runtime;

fuzz_target!(
    init: LazyLock::force(&KMS),
    |asked: Asked| KMS.check(&asked)
);

static KMS: LazyLock<Kms> = LazyLock::new(Kms::new);

/// A service on a deterministic engine, with what a client of it needs.
struct Kms {
    service: Arc<Service>,
    runtime: Runtime,
    pair: RsaKeyPair,
    clients: [String; 3],
    /// A blob that opens, raw and self-describing, with the IV of the raw one.
    blobs: [(Vec<u8>, Vec<u8>); 2],
    version: String,
    signatures: Mutex<Signatures>,
}

/// Signatures by what they sign.
struct Signatures {
    of: HashMap<Vec<u8>, String>,
    date: String,
    since: Instant,
}

/// How long a date is used, well below the skew that is allowed.
const DATE_TIME: Duration = Duration::from_secs(300);
/// So that a long campaign does not fill the memory.
const SIGNATURES_MAX: usize = 50_000;

impl Signatures {
    fn new() -> Self {
        let date = httpdate::fmt_http_date(SystemTime::now());
        Self { of: HashMap::new(), date, since: Instant::now() }
    }
}

impl Kms {
    fn new() -> Self {
        // The server catches panics, and answers 500. Here every panic ends the process.
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            report(panic);
            std::process::abort();
        }));
        let engine = Engine::deterministic([7; 32]).expect("an engine");
        let create = |alias: &str, scheme| {
            let (alias, scheme) = (Some(alias.into()), Some(scheme));
            engine.create_key(&CreateKey { alias, scheme, ..CreateKey::default() }).expect(KEYS[0])
        };
        create(KEYS[0], Scheme::Derived);
        create(KEYS[1], Scheme::Direct);
        create(KEYS[2], Scheme::Derived);
        engine.disable_key(KEYS[2]).expect("a key");
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key pair");
        let public_key: PublicKeyX509Der<'_> = pair.public_key().as_der().expect("DER");
        let client = |allow: &str, keys: &str| {
            let request = CreateClient {
                name: "fuzz".into(),
                public_key: public_key.as_ref().to_vec(),
                permissions: Permissions::parse(allow).expect("permissions"),
                key_patterns: vec![KeyPattern::parse(keys).expect("a pattern")],
            };
            engine.create_client(&request).expect("a client").client_id.to_string()
        };
        let clients = [client("all", "*"), client("all", KEYS[0]), client("decrypt", "*")];
        let asked = keymill::GenerateDataKeyRequest::new(KEYS[0], 32);
        let raw = engine.generate_data_key(&asked).expect("a data key");
        let own = engine.advance_generate_data_key(&asked).expect("a data key");
        let blobs = [&raw, &own].map(|key| (key.ciphertext_blob().to_vec(), key.iv().to_vec()));
        let config = ServerConfig::new(([127, 0, 0, 1], 0).into());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Self {
            service: Arc::new(Service::new(engine, &config).expect("a service")),
            runtime: runtime.expect("a runtime"),
            pair,
            clients,
            version: raw.key_version_id().to_string(),
            blobs,
            signatures: Mutex::new(Signatures::new()),
        }
    }

    fn check(&self, asked: &Asked) {
        let (api, reads) = OPERATIONS[asked.operation];
        let body = self.body(asked, api);
        let (head, is_signed) = self.head(asked, api, &body);
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = asked.method.parse().expect("a method");
        *request.uri_mut() = asked.uri.parse().expect("a path");
        *request.headers_mut() = head;
        let response = self.runtime.block_on(self.service.answer(request));
        check_response(&response, reads, is_signed);
    }

    /// The body, and nothing of it that is not drawn or known beforehand.
    fn body(&self, asked: &Asked, api: &str) -> Vec<u8> {
        let Body { fields, items, cuts, raw } = &asked.body;
        if let Some(raw) = raw {
            return raw.clone();
        }
        let mut body = match api.strip_prefix("Batch") {
            None => self.message(api, fields),
            Some(api) => {
                let mut batch = Vec::new();
                for (reference, fields) in items {
                    let mut item = Vec::new();
                    put(&mut item, 1, &self.message(api, fields));
                    put(&mut item, 2, reference.as_bytes());
                    put(&mut batch, 1, &item);
                }
                batch
            }
        };
        for (place, bytes, len) in cuts {
            let from = usize::from(*place) % (body.len() + 1);
            let to = (from + usize::from(*len)).min(body.len());
            body.splice(from..to, bytes.iter().copied());
        }
        body
    }

    fn message(&self, api: &str, fields: &Fields) -> Vec<u8> {
        let Fields { key, number, aad, algorithm, padding, blob, iv } = fields;
        let key_id = KEYS[*key].to_owned();
        let (algorithm, padding_mode) = ((*algorithm).to_owned(), (*padding).to_owned());
        let aad = Bytes::from(aad.clone());
        let (known_blob, known_iv) = &self.blobs[usize::from(api == "AdvanceDecrypt")];
        let bytes = |given: &Option<Vec<u8>>, known: &[u8]| {
            Bytes::from(given.clone().unwrap_or_else(|| known.to_vec()))
        };
        let number_of_bytes = *number;
        match api {
            "GenerateDataKey" => {
                proto::GenerateDataKeyRequest { key_id, algorithm, number_of_bytes, aad }
                    .encode_to_vec()
            }
            "AdvanceGenerateDataKey" => {
                proto::AdvanceGenerateDataKeyRequest { key_id, number_of_bytes, aad }
                    .encode_to_vec()
            }
            "Encrypt" | "AdvanceEncrypt" => proto::EncryptRequest {
                key_id,
                plaintext: bytes(blob, b"text"),
                algorithm,
                aad,
                iv: bytes(iv, b""),
                padding_mode,
            }
            .encode_to_vec(),
            "Decrypt" | "AdvanceDecrypt" => proto::DecryptRequest {
                ciphertext_blob: bytes(blob, known_blob),
                key_id,
                algorithm,
                aad,
                iv: bytes(iv, known_iv),
                padding_mode,
            }
            .encode_to_vec(),
            _ => proto::GenerateRandomRequest { length: *number }.encode_to_vec(),
        }
    }

    /// The head, and whether what was signed is what is sent.
    fn head(&self, asked: &Asked, api: &str, body: &[u8]) -> (HeaderMap, bool) {
        let mut signatures = self.signatures.lock().expect("one thread");
        if signatures.since.elapsed() > DATE_TIME || signatures.of.len() > SIGNATURES_MAX {
            *signatures = Signatures::new();
        }
        let mut head = HeaderMap::new();
        for (name, value) in [
            ("accept", "application/x-protobuf"),
            ("date", &*signatures.date),
            ("x-kms-apiversion", "dkms-gcs-0.2"),
            ("x-kms-apiname", api),
            ("x-kms-signaturemethod", "RSA_PKCS1_SHA_256"),
            ("x-kms-acccesskeyid", &self.clients[asked.client]),
            ("content-type", "application/x-protobuf"),
            ("content-sha256", &sha256_hex(body)),
        ] {
            let value = HeaderValue::from_str(value).expect("plain ASCII");
            head.insert(HeaderName::from_static(name), value);
        }
        if asked.names_version {
            let value = HeaderValue::from_str(&self.version).expect("plain ASCII");
            head.insert("x-kms-migrationkeyversionid", value);
        }
        for change in &asked.before {
            change.apply(&mut head);
        }
        let signed = string_to_sign(asked.method, &head);
        let authorization = signatures.of.entry(signed.clone()).or_insert_with(|| {
            let mut signature = vec![0; self.pair.public_modulus_len()];
            let random = SystemRandom::new();
            self.pair
                .sign(&RSA_PKCS1_SHA256, &random, &signed, &mut signature)
                .expect("a signature");
            format!("Bearer {}", base64_simd::STANDARD.encode_to_string(signature))
        });
        let value = HeaderValue::from_str(authorization).expect("plain ASCII");
        if asked.is_signed {
            head.insert("authorization", value.clone());
        }
        for change in &asked.after {
            change.apply(&mut head);
        }
        // An authorization that was drawn is none of ours but by chance.
        let sent = head.get("authorization").map(|value| value.as_bytes().trim_ascii());
        let is_ours = sent == Some(value.as_bytes());
        let is_signed = is_ours && string_to_sign(asked.method, &head) == signed;
        (head, is_signed)
    }
}

/// What holds for every response. `reads` checks the body of one that is no refusal.
fn check_response(response: &Response<Bytes>, reads: fn(&Bytes), is_signed: bool) {
    let (status, body) = (response.status().as_u16(), response.body());
    assert_eq!(response.headers()["content-type"], "application/x-protobuf");
    if status == 200 {
        assert!(is_signed, "this was signed by nobody");
        return reads(body);
    }
    let error = proto::Error::decode(body.clone()).expect("a message");
    assert_eq!(error.status_code, i32::from(status));
    assert!((400..600).contains(&status) && !error.error_code.is_empty());
    assert_eq!(error.request_id.len(), 36);
    assert!(body.len() < 2000, "{error:?}");
    assert!(error.encode_to_vec() == *body);
    // Nothing here is broken or full: a 500 is a blob that does not open.
    assert_ne!(status, 503, "{error:?}");
    if status == 500 {
        assert!(is_signed && error.error_message.starts_with("Internal Failure."), "{error:?}");
    }
}

/// Checks that a body is what prost writes of it.
fn reads<M: Message + Default>(body: &Bytes) {
    let message = M::decode(body.clone()).expect("a message");
    assert!(message.encode_to_vec() == *body, "prost writes another body");
}

type Operation = (&'static str, fn(&Bytes));

const OPERATIONS: [Operation; 11] = [
    ("GenerateDataKey", reads::<proto::GenerateDataKeyResponse>),
    ("AdvanceGenerateDataKey", reads::<proto::GenerateDataKeyResponse>),
    ("Encrypt", reads::<proto::EncryptResponse>),
    ("AdvanceEncrypt", reads::<proto::EncryptResponse>),
    ("Decrypt", reads::<proto::DecryptResponse>),
    ("AdvanceDecrypt", reads::<proto::DecryptResponse>),
    ("GenerateRandom", reads::<proto::GenerateRandomResponse>),
    ("BatchGenerateDataKey", reads::<proto::BatchResponse<proto::GenerateDataKeyResponse>>),
    ("BatchAdvanceGenerateDataKey", reads::<proto::BatchResponse<proto::GenerateDataKeyResponse>>),
    ("BatchDecrypt", reads::<proto::BatchResponse<proto::DecryptResponse>>),
    ("BatchAdvanceDecrypt", reads::<proto::BatchResponse<proto::DecryptResponse>>),
];

/// Two that work, one that is disabled, one that is not there, and none.
const KEYS: [&str; 5] = ["alias/derived", "alias/direct", "alias/disabled", "alias/none", ""];

/// Headers that are changed.
const NAMES: [&str; 12] = [
    "content-type",
    "date",
    "x-kms-apiversion",
    "x-kms-apiname",
    "x-kms-signaturemethod",
    "x-kms-acccesskeyid",
    "content-sha256",
    "authorization",
    "x-kms-migrationkeyversionid",
    "x-kms-extra",
    "content-length",
    "accept",
];

/// An input.
#[derive(Debug)]
struct Asked {
    operation: usize,
    client: usize,
    is_signed: bool,
    names_version: bool,
    method: &'static str,
    uri: &'static str,
    before: Vec<Change>,
    after: Vec<Change>,
    body: Body,
}

#[derive(Debug)]
struct Body {
    fields: Fields,
    items: Vec<(String, Fields)>,
    /// Places where bytes take the place of others, and of how many.
    cuts: Vec<(u16, Vec<u8>, u8)>,
    /// In the place of all that.
    raw: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Fields {
    key: usize,
    number: i32,
    aad: Vec<u8>,
    algorithm: &'static str,
    padding: &'static str,
    /// Or the text to encrypt. `None` is a good one.
    blob: Option<Vec<u8>>,
    iv: Option<Vec<u8>>,
}

/// What happens to a header.
#[derive(Debug)]
struct Change {
    name: &'static str,
    kind: u8,
    value: Vec<u8>,
}

impl Change {
    fn apply(&self, head: &mut HeaderMap) {
        let name = HeaderName::from_static(self.name);
        let value = HeaderValue::from_bytes(&self.value);
        match (self.kind, value) {
            (0, _) => drop(head.remove(name)),
            (1, Ok(value)) => drop(head.append(name, value)),
            (2, _) => {
                // Spaces around it, which HTTP/2 leaves there.
                let old = head.get(&name).map_or(&b""[..], HeaderValue::as_bytes);
                let spaced = [b" ", old, b"\t "].concat();
                head.insert(name, HeaderValue::from_bytes(&spaced).expect("it was one"));
            }
            (_, Ok(value)) => drop(head.insert(name, value)),
            (_, Err(_)) => {}
        }
    }
}

impl Arbitrary<'_> for Asked {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        Ok(Self {
            operation: u.choose_index(OPERATIONS.len())?,
            client: if u.ratio(1, 4)? { u.choose_index(3)? } else { 0 },
            is_signed: !u.ratio(1, 16)?,
            names_version: u.ratio(1, 4)?,
            method: if u.ratio(1, 64)? { "GET" } else { "POST" },
            uri: if u.ratio(1, 64)? { "/a" } else { "/" },
            before: changes(u)?,
            after: changes(u)?,
            body: u.arbitrary()?,
        })
    }
}

fn changes(u: &mut Unstructured<'_>) -> Result<Vec<Change>> {
    let count = if u.ratio(3, 4)? { 0 } else { u.int_in_range(1..=2)? };
    (0..count)
        .map(|_| {
            let (name, kind) = (*u.choose(&NAMES)?, u.int_in_range(0..=3)?);
            Ok(Change { name, kind, value: u.arbitrary()? })
        })
        .collect()
}

impl Arbitrary<'_> for Body {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        let fields = u.arbitrary()?;
        let cut_count = if u.ratio(1, 2)? { 0 } else { u.int_in_range(1..=3)? };
        let cuts = (0..cut_count).map(|_| u.arbitrary()).collect::<Result<_>>()?;
        let item_count = u.int_in_range(0..=5)?;
        let items =
            (0..item_count).map(|_| Ok((u.arbitrary()?, u.arbitrary()?))).collect::<Result<_>>()?;
        let raw = if u.ratio(1, 8)? { Some(u.bytes(u.len())?.to_vec()) } else { None };
        Ok(Self { fields, items, cuts, raw })
    }
}

impl Arbitrary<'_> for Fields {
    fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        let number = match u.int_in_range(0..=3_u8)? {
            0 => u.arbitrary()?,
            1 => u.int_in_range(0..=1025)?,
            _ => 32,
        };
        Ok(Self {
            key: if u.arbitrary()? { 0 } else { u.choose_index(KEYS.len())? },
            number,
            aad: if u.ratio(1, 32)? { vec![7; 8193] } else { some(u)?.unwrap_or_default() },
            algorithm: u.choose(&["", "AES_GCM", "", "AES_GCM", "AES_CBC"])?,
            padding: u.choose(&["", "", "NO_PADDING", "PKCS7_PADDING", "?"])?,
            blob: some(u)?,
            iv: some(u)?,
        })
    }
}

fn some(u: &mut Unstructured<'_>) -> Result<Option<Vec<u8>>> {
    if u.ratio(1, 4)? { u.arbitrary().map(Some) } else { Ok(None) }
}

/// A field of bytes.
fn put(message: &mut Vec<u8>, tag: u32, value: &[u8]) {
    prost::encoding::encode_key(tag, prost::encoding::WireType::LengthDelimited, message);
    prost::encoding::encode_varint(value.len() as u64, message);
    message.extend_from_slice(value);
}

fn sha256_hex(body: &[u8]) -> String {
    let hash = digest::digest(&digest::SHA256, body);
    hash.as_ref().iter().map(|byte| format!("{byte:02X}")).collect()
}

/// What the KMS has clients sign, of a head that may lack something.
fn string_to_sign(method: &str, head: &HeaderMap) -> Vec<u8> {
    let value = |name: &str| head.get(name).map_or(&b""[..], |value| value.as_bytes().trim_ascii());
    let mut lines = vec![method.as_bytes().to_vec()];
    lines.extend(["content-sha256", "content-type", "date"].map(|name| value(name).to_vec()));
    let mut kms: Vec<_> =
        head.iter().filter(|(name, _)| name.as_str().starts_with("x-kms-")).collect();
    kms.sort_by_key(|(name, _)| name.as_str());
    for (name, value) in kms {
        lines.push([name.as_str().as_bytes(), b":", value.as_bytes().trim_ascii()].concat());
    }
    lines.push(b"/".to_vec());
    lines.join(&b'\n')
}
