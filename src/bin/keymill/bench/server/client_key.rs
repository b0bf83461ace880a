//! A client's key file, and requests that are signed with it.
//!
//! The file is the one that `keymill client create` writes and the SDKs read: JSON around a PKCS#12. A signed request
//! is kept as the bytes that go over the wire, so that sending it again costs a copy.

use std::{path::Path, time::SystemTime};

use aws_lc_rs::{
    digest,
    rand::SystemRandom,
    signature::{
        KeyPair, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use base64_simd::STANDARD;
use p12_keystore::Pkcs12Archive;
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::{
    failure::{Failure, Result},
    forms::BYTE_ORDER_MARK,
    input::Input,
};

/// The JSON of the SDKs.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    key_id: String,
    /// Base64 of the PKCS#12.
    private_key_data: String,
}

/// Signs requests.
pub(super) struct ClientKey {
    id: String,
    pair: RsaKeyPair,
    random: SystemRandom,
}

/// More than a key file has.
const FILE_LEN_MAX: usize = 64 << 10;
/// The type of every body.
const MEDIA_TYPE: &str = "application/x-protobuf";

impl ClientKey {
    pub(super) fn read(file: &Path, password_file: &Path) -> Result<Self> {
        let read = |option: &str, path: &Path| Input::open(option, path)?.all(FILE_LEN_MAX);
        let no_key_file = || {
            Failure::refused(
                format!("--client-key {file:?} is no client's key file"),
                "name a file that `keymill client create` wrote, or the KMS's console",
            )
        };
        let (json, password) =
            (read("--client-key", file)?, read("--password-file", password_file)?);
        let password = password.strip_suffix(b"\n").unwrap_or(&password);
        let password = password.strip_suffix(b"\r").unwrap_or(password);
        // One that is no text opens nothing, and is told so below.
        let password = std::str::from_utf8(password).unwrap_or_default();
        let json = json.strip_prefix(&BYTE_ORDER_MARK).unwrap_or(&json);
        let document: Document = serde_json::from_slice(json).map_err(|_| no_key_file())?;
        let container = STANDARD.decode_to_vec(&*Zeroizing::new(document.private_key_data));
        let container = Zeroizing::new(container.map_err(|_| no_key_file())?);
        let archive = Pkcs12Archive::from_pkcs12(&container, password).map_err(|_| {
            Failure::refused(
                format!("the password in {password_file:?} does not open {file:?}"),
                "name the password file that was made with the key file; a line end at its end \
                 does not count",
            )
        })?;
        let key = archive.keys.first().ok_or_else(no_key_file)?;
        let pair = RsaKeyPair::from_pkcs8(key.key.as_der()).map_err(|_| no_key_file())?;
        Ok(Self { id: document.key_id, pair, random: SystemRandom::new() })
    }

    pub(super) fn sign(&self, text: &[u8]) -> Result<Vec<u8>> {
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair.sign(&RSA_PKCS1_SHA256, &self.random, text, &mut signature).map_err(|_| {
            Failure::broke("cannot sign with the client's key", "make another client")
        })?;
        Ok(signature)
    }

    /// The key that a server checks signatures with.
    pub(super) fn public_key(&self) -> Result<ParsedPublicKey> {
        ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, self.pair.public_key().as_ref()).map_err(
            |_| Failure::broke("the client's public key cannot be read", "make another client"),
        )
    }

    /// What is signed for an operation with this body, now.
    pub(super) fn string_to_sign(&self, operation: &str, body: &[u8]) -> String {
        self.signed_part(operation, body).string_to_sign()
    }

    /// The bytes of a request to `host`.
    pub(super) fn request(&self, host: &str, operation: &str, body: &[u8]) -> Result<Vec<u8>> {
        let part = self.signed_part(operation, body);
        let signature = self.sign(part.string_to_sign().as_bytes())?;
        let SignedPart { hash, date, client, operation } = part;
        let mut request = format!(
            "POST / HTTP/1.1\r\n\
             host: {host}\r\n\
             accept: {MEDIA_TYPE}\r\n\
             date: {date}\r\n\
             x-kms-apiversion: {VERSION}\r\n\
             x-kms-apiname: {operation}\r\n\
             x-kms-signaturemethod: {METHOD}\r\n\
             x-kms-acccesskeyid: {client}\r\n\
             content-type: {MEDIA_TYPE}\r\n\
             content-length: {}\r\n\
             content-sha256: {hash}\r\n\
             authorization: Bearer {}\r\n\r\n",
            body.len(),
            STANDARD.encode_to_string(signature),
        )
        .into_bytes();
        request.extend_from_slice(body);
        Ok(request)
    }

    fn signed_part<'a>(&'a self, operation: &'a str, body: &[u8]) -> SignedPart<'a> {
        let hash = digest::digest(&digest::SHA256, body);
        let hash = hash.as_ref().iter().map(|byte| format!("{byte:02X}")).collect();
        let date = httpdate::fmt_http_date(SystemTime::now());
        SignedPart { hash, date, client: &self.id, operation }
    }
}

const VERSION: &str = "dkms-gcs-0.2";
const METHOD: &str = "RSA_PKCS1_SHA_256";

/// What a signature is about, besides what never changes.
struct SignedPart<'a> {
    /// SHA-256 of the body in hex, upper case.
    hash: String,
    date: String,
    client: &'a str,
    operation: &'a str,
}

impl SignedPart<'_> {
    fn string_to_sign(&self) -> String {
        let Self { hash, date, client, operation } = self;
        format!(
            "POST\n{hash}\n{MEDIA_TYPE}\n{date}\nx-kms-acccesskeyid:{client}\n\
             x-kms-apiname:{operation}\nx-kms-apiversion:{VERSION}\n\
             x-kms-signaturemethod:{METHOD}\n/"
        )
    }
}
