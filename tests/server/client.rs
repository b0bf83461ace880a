//! A client that signs, the service that it asks, and what it checks of every answer.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use aws_lc_rs::{
    digest,
    rand::SystemRandom,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderName, HeaderValue},
};
use keymill::{
    ClientId, CreateClient, CreateKey, Engine, KeyPattern, Permissions, Scheme,
    server::{ServerConfig, Service, proto},
};
use prost::Message;
use rcgen::{KeyPair, PKCS_RSA_SHA256, PublicKeyData, RsaKeySize};

pub(crate) const CLIENT: &str = "x-kms-acccesskeyid";
pub(crate) const API_NAME: &str = "x-kms-apiname";
pub(crate) const VERSION: &str = "x-kms-migrationkeyversionid";
pub(crate) const BODY_HASH: &str = "content-sha256";

/// The key pair of a client.
pub(crate) struct Signer {
    pair: RsaKeyPair,
    public_key: Vec<u8>,
}

impl Signer {
    fn new() -> Self {
        let pair = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        let public_key = pair.subject_public_key_info();
        Self { pair: RsaKeyPair::from_pkcs8(pair.serialized_der()).unwrap(), public_key }
    }

    fn sign(&self, message: &[u8]) -> String {
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature).unwrap();
        base64_simd::STANDARD.encode_to_string(signature)
    }
}

pub(crate) static SIGNER: LazyLock<Signer> = LazyLock::new(Signer::new);
pub(crate) static OTHER_SIGNER: LazyLock<Signer> = LazyLock::new(Signer::new);

pub(crate) fn now_plus(seconds: i64) -> String {
    let by = Duration::from_secs(seconds.unsigned_abs());
    let now = SystemTime::now();
    httpdate::fmt_http_date(if seconds < 0 { now - by } else { now + by })
}

pub(crate) fn sha256_hex(body: &[u8]) -> String {
    let hash = digest::digest(&digest::SHA256, body);
    hash.as_ref().iter().map(|byte| format!("{byte:02X}")).collect()
}

/// A request that can be bent before it is signed, and after.
#[derive(Clone)]
pub(crate) struct Draft {
    pub(crate) method: Method,
    pub(crate) uri: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Draft {
    pub(crate) fn new(client: &str, api: &str, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let mut draft = Self {
            method: Method::POST,
            uri: "/".into(),
            headers: HeaderMap::new(),
            body: body.clone(),
        };
        for (name, value) in [
            ("accept", "application/x-protobuf"),
            ("host", "127.0.0.1:18481"),
            ("date", &now_plus(0)),
            ("x-kms-apiversion", "dkms-gcs-0.2"),
            (API_NAME, api),
            ("x-kms-signaturemethod", "RSA_PKCS1_SHA_256"),
            (CLIENT, client),
            ("content-type", "application/x-protobuf"),
            ("content-length", &body.len().to_string()),
            (BODY_HASH, &sha256_hex(&body)),
        ] {
            draft.set(name, value);
        }
        draft
    }

    /// Sets a header in the place of any that it had.
    pub(crate) fn set(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        self.headers.insert(name, HeaderValue::from_bytes(value.as_ref()).unwrap());
        self
    }

    pub(crate) fn add(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        self.headers.append(name, HeaderValue::from_bytes(value.as_ref()).unwrap());
        self
    }

    pub(crate) fn remove(&mut self, name: &str) -> &mut Self {
        self.headers.remove(name);
        self
    }

    /// What the KMS has clients sign. A header that is not there counts as empty.
    pub(crate) fn string_to_sign(&self) -> Vec<u8> {
        let value = |name: &str| self.headers.get(name).map_or(&b""[..], HeaderValue::as_bytes);
        let mut lines: Vec<Vec<u8>> = vec![
            self.method.as_str().into(),
            value(BODY_HASH).trim_ascii().into(),
            value(CONTENT_TYPE.as_str()).trim_ascii().into(),
            value(DATE.as_str()).trim_ascii().into(),
        ];
        let mut kms: Vec<_> =
            self.headers.iter().filter(|(name, _)| name.as_str().starts_with("x-kms-")).collect();
        kms.sort_by_key(|(name, _)| name.as_str());
        for (name, value) in kms {
            lines.push([name.as_str().as_bytes(), b":", value.as_bytes().trim_ascii()].concat());
        }
        lines.push(b"/".into());
        lines.join(&b'\n')
    }

    pub(crate) fn sign_by(&mut self, signer: &Signer) -> &mut Self {
        let signature = signer.sign(&self.string_to_sign());
        self.set(AUTHORIZATION.as_str(), format!("Bearer {signature}"))
    }

    pub(crate) fn sign(&mut self) -> &mut Self {
        self.sign_by(&SIGNER)
    }

    pub(crate) fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.parse().unwrap();
        *request.headers_mut() = self.headers.clone();
        request
    }

    /// As HTTP/1.1 has it.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{} {} HTTP/1.1\r\n", self.method, self.uri).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(name.as_str().as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value.as_bytes());
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// An answer of which everything was checked that holds for every one.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    #[track_caller]
    pub(crate) fn of(response: Response<Bytes>) -> Self {
        let (parts, body) = response.into_parts();
        let answer = Self { status: parts.status.as_u16(), headers: parts.headers, body };
        assert_eq!(answer.headers[CONTENT_TYPE], "application/x-protobuf", "{answer:?}");
        if parts.status != StatusCode::OK {
            assert!(parts.status.is_client_error() || parts.status.is_server_error());
            let error = answer.error();
            assert_eq!(error.status_code, i32::from(answer.status));
            assert!(!error.error_code.is_empty() && !error.error_message.is_empty());
            assert_uuid(&error.request_id);
            assert!(!answer.headers.contains_key(VERSION));
        }
        answer
    }

    pub(crate) fn error(&self) -> proto::Error {
        let error = proto::Error::decode(self.body.clone()).unwrap();
        assert_eq!(error.encode_to_vec(), self.body);
        error
    }

    /// Checks that it was done, and that the body is what prost would have written.
    #[track_caller]
    pub(crate) fn done<M: Message + Default>(&self) -> M {
        assert_eq!(self.status, 200, "{:?}", self.error());
        let message = M::decode(self.body.clone()).unwrap();
        assert!(message.encode_to_vec() == self.body, "prost writes another body");
        message
    }

    #[track_caller]
    pub(crate) fn refused(&self, status: u16, code: &str, message: &str) {
        assert_ne!(self.status, 200, "this had to be refused: {code} {message}");
        let error = self.error();
        assert_eq!(
            (self.status, &*error.error_code, &*error.error_message),
            (status, code, message)
        );
    }

    /// Status and code alone.
    #[track_caller]
    pub(crate) fn refused_with(&self, status: u16, code: &str) {
        assert_ne!(self.status, 200, "this had to be refused: {code}");
        let error = self.error();
        assert_eq!((self.status, &*error.error_code), (status, code), "{error:?}");
    }
}

#[track_caller]
pub(crate) fn assert_uuid(text: &str) {
    let id = uuid::Uuid::try_parse(text).unwrap();
    assert_eq!(id.hyphenated().to_string(), text);
}

/// A service with keys `alias/derived` and `alias/direct`, and a client that may do everything.
pub(crate) struct Kms {
    pub(crate) engine: Engine,
    pub(crate) service: Arc<Service>,
    pub(crate) client: ClientId,
}

pub(crate) fn config() -> ServerConfig {
    ServerConfig::new(([127, 0, 0, 1], 0).into())
}

pub(crate) fn create_client(
    engine: &Engine,
    signer: &Signer,
    allow: &str,
    keys: &[&str],
) -> ClientId {
    let request = CreateClient {
        name: "test".into(),
        public_key: signer.public_key.clone(),
        permissions: Permissions::parse(allow).unwrap(),
        key_patterns: keys.iter().map(|text| KeyPattern::parse(text).unwrap()).collect(),
    };
    engine.create_client(&request).unwrap().client_id
}

pub(crate) fn create_key(engine: &Engine, alias: &str, scheme: Scheme) -> String {
    let key = CreateKey { alias: Some(alias.into()), scheme: Some(scheme), ..CreateKey::default() };
    engine.create_key(&key).unwrap().key_id.to_string()
}

pub(crate) fn engine() -> (Engine, ClientId) {
    let engine = Engine::in_memory().unwrap();
    let client = fill(&engine);
    (engine, client)
}

/// Makes the keys of the tests, and a client that may use them.
pub(crate) fn fill(engine: &Engine) -> ClientId {
    create_key(engine, "alias/derived", Scheme::Derived);
    create_key(engine, "alias/direct", Scheme::Direct);
    create_client(engine, &SIGNER, "all", &["*"])
}

impl Kms {
    pub(crate) fn new() -> Self {
        Self::with(&config())
    }

    pub(crate) fn with(config: &ServerConfig) -> Self {
        let (engine, client) = engine();
        let service = Arc::new(Service::new(engine.clone(), config).unwrap());
        Self { engine, service, client }
    }

    pub(crate) fn draft(&self, api: &str, message: &impl Message) -> Draft {
        Draft::new(self.client.as_str(), api, message.encode_to_vec())
    }

    /// Asks for something as `client`, properly signed.
    pub(crate) async fn ask_as(
        &self,
        client: &ClientId,
        api: &str,
        message: &impl Message,
    ) -> Answer {
        let mut draft = Draft::new(client.as_str(), api, message.encode_to_vec());
        self.send(draft.sign()).await
    }

    pub(crate) async fn ask(&self, api: &str, message: &impl Message) -> Answer {
        self.ask_as(&self.client, api, message).await
    }

    pub(crate) async fn ask_bytes(&self, api: &str, body: impl Into<Bytes>) -> Answer {
        self.send(Draft::new(self.client.as_str(), api, body).sign()).await
    }

    pub(crate) async fn send(&self, draft: &Draft) -> Answer {
        Answer::of(self.service.answer(draft.request()).await)
    }

    /// Wraps that were ever granted to the key of scheme direct: 0 as long as nothing was done with it.
    pub(crate) fn wraps_granted(&self) -> u64 {
        self.engine.describe_key("alias/direct").unwrap().initial_version().wraps_granted
    }
}

pub(crate) fn generate(key: &str, number_of_bytes: i32) -> proto::GenerateDataKeyRequest {
    proto::GenerateDataKeyRequest { key_id: key.into(), number_of_bytes, ..Default::default() }
}

pub(crate) fn advance_generate(
    key: &str,
    number_of_bytes: i32,
) -> proto::AdvanceGenerateDataKeyRequest {
    let key_id = key.into();
    proto::AdvanceGenerateDataKeyRequest { key_id, number_of_bytes, ..Default::default() }
}

/// A batch of requests, with their indexes as references.
pub(crate) fn batch<M: Message + Default>(
    requests: impl IntoIterator<Item = M>,
) -> proto::BatchRequest<M> {
    let item = |(index, request): (usize, M)| proto::Item {
        request: Some(request),
        reference: index.to_string(),
    };
    proto::BatchRequest { items: requests.into_iter().enumerate().map(item).collect() }
}
