//! The key of a client and the file that its SDK reads: JSON around a PKCS#12 (RFC 7292) with certificate and RSA key.
//!
//! The container is what the oldest of the SDKs can read: pbeWithSHA1And3-KeyTripleDES-CBC, a SHA-1 MAC, the
//! certificate before the key, and both under a name. The Go SDK reads no other encryption and no other order; the Java
//! SDK takes the first alias, which a key without a certificate has not. So the password protects the file less well
//! than it could, which is one more reason for the 144 bits of a password that is made here.
//!
//! The certificate carries the key and says nothing else; nobody checks its signature or its dates but the SDKs, some
//! of which present it to the server as that of a TLS client.

use std::time::{Duration, SystemTime};

use keymill::{ClientId, ErrorKind};
use p12_keystore::{
    Certificate, EncryptionAlgorithm, KeyStore, KeyStoreEntry, MacAlgorithm, PrivateKey,
    PrivateKeyChain,
};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, PKCS_RSA_SHA256, PublicKeyData, RsaKeySize,
};
use serde::Serialize;
use zeroize::{Zeroize, Zeroizing};

use super::new_file::NewFile;
use crate::failure::{Failure, Result, hint};

/// How long the certificate is valid. Nothing of ours asks for it.
const VALIDITY: Duration = Duration::from_secs(5 * 365 * 86_400);
/// Before now, for clients whose clock is slow.
const SLOW_CLOCK: Duration = Duration::from_secs(86_400);
/// Rounds of the key derivation, as Java's `keytool` takes them.
const ITERATIONS: u32 = 10_000;

/// A new RSA key of 2048 bits. Its encoding is wiped when it is dropped.
pub(super) struct KeyPair(rcgen::KeyPair);

impl KeyPair {
    pub(super) fn generate() -> Result<Self> {
        rcgen::KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)
            .map(Self)
            .map_err(|error| failed("make an RSA key", error))
    }

    /// The DER of its `SubjectPublicKeyInfo`.
    pub(super) fn public_key(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }

    /// The DER of a certificate that it signs itself.
    fn certificate(&self, id: &ClientId) -> Result<Vec<u8>> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, id.as_str());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + now.saturating_sub(SLOW_CLOCK);
        params.not_after = epoch + now + VALIDITY;
        let certificate = params.self_signed(&self.0);
        let certificate = certificate.map_err(|error| failed("make a certificate", error))?;
        Ok(certificate.der().to_vec())
    }

    /// Key and certificate under `password`. Copies that the crate makes of the key are left to its allocator; the
    /// process ends soon after.
    fn container(&self, id: &ClientId, password: &str) -> Result<Vec<u8>> {
        let fail = |error| failed("make a PKCS#12", error);
        let certificate = Certificate::from_der(&self.certificate(id)?).map_err(fail)?;
        let key = PrivateKey::from_der(self.0.serialized_der()).map_err(fail)?;
        let chain = PrivateKeyChain::new(id.as_str(), key, [certificate]);
        let mut store = KeyStore::new();
        store.add_entry(id.as_str(), KeyStoreEntry::PrivateKeyChain(chain));
        store
            .writer(password)
            .encryption_algorithm(EncryptionAlgorithm::PbeWithShaAnd3KeyTripleDesCbc)
            .encryption_iterations(ITERATIONS)
            .mac_algorithm(MacAlgorithm::HmacSha1)
            .mac_iterations(ITERATIONS)
            .write()
            .map_err(fail)
    }
}

impl Drop for KeyPair {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The JSON of the SDKs.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Document<'a> {
    key_id: &'a str,
    /// Base64 of the PKCS#12.
    private_key_data: &'a str,
}

/// Writes the key file and puts it in its place.
pub(super) fn write(file: NewFile, id: &ClientId, pair: &KeyPair, password: &str) -> Result<()> {
    let container = base64_simd::STANDARD.encode_to_string(pair.container(id, password)?);
    let document = Document { key_id: id.as_str(), private_key_data: &container };
    let json = serde_json::to_string(&document);
    let mut json = Zeroizing::new(json.map_err(|error| failed("write JSON", error))?);
    json.push('\n');
    file.finish(json.as_bytes())
}

fn failed(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::broke(format!("cannot {what}: {error}"), hint(ErrorKind::Machine))
}
