//! The request types. They borrow what the caller has, and are validated once, when an operation begins.

pub(crate) mod aads;
pub(crate) mod clients;

use crate::{
    error::{Error, Result, Shortened},
    keys::{KeySpec, RotationPeriod},
    limits::{
        AAD_LEN_MAX, DESCRIPTION_LEN_MAX, IV_LEN, NUMBER_OF_BYTES_MAX, NUMBER_OF_BYTES_MIN,
        PLAINTEXT_LEN_MAX, PLAINTEXT_LEN_MIN,
    },
    wrap::{Scheme, blob::Form},
};

/// The four operations that generate data keys, for calls that do any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Wraps under the key's initial version, for ever the same, into raw blobs with the IV beside them.
    GenerateDataKey,
    /// The same, and the data key is wiped as soon as it is wrapped.
    GenerateDataKeyWithoutPlaintext,
    /// Wraps under the key's primary version, into blobs that describe themselves.
    AdvanceGenerateDataKey,
    /// The same, and the data key is wiped as soon as it is wrapped.
    AdvanceGenerateDataKeyWithoutPlaintext,
}

impl Operation {
    /// The operation's name in the KMS.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GenerateDataKey => "GenerateDataKey",
            Self::GenerateDataKeyWithoutPlaintext => "GenerateDataKeyWithoutPlaintext",
            Self::AdvanceGenerateDataKey => "AdvanceGenerateDataKey",
            Self::AdvanceGenerateDataKeyWithoutPlaintext => {
                "AdvanceGenerateDataKeyWithoutPlaintext"
            }
        }
    }

    /// Whether data keys are returned.
    pub fn returns_plaintext(self) -> bool {
        matches!(self, Self::GenerateDataKey | Self::AdvanceGenerateDataKey)
    }

    /// Raw blobs are wrapped under the initial version, self-describing ones under the primary one.
    pub(crate) fn form(self) -> Form {
        match self {
            Self::GenerateDataKey | Self::GenerateDataKeyWithoutPlaintext => Form::Raw,
            _ => Form::SelfDescribing,
        }
    }
}

/// The only algorithm, as requests and results name it.
pub(crate) const ALGORITHM: &str = "AES_GCM";

/// One data key to generate. All four generating operations take it.
///
/// ```
/// use keymill::GenerateDataKeyRequest;
/// let request = GenerateDataKeyRequest::new("alias/app", 32).aad(b"/photos/1.jpg");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateDataKeyRequest<'a> {
    /// The key that wraps: an id or an `alias/...`.
    pub key_id: &'a str,
    /// Length of the data key: 1 to 1024 bytes.
    pub number_of_bytes: u32,
    /// Additional authenticated data, at most 8192 bytes. Public; whoever decrypts has to bring the same bytes.
    pub aad: &'a [u8],
}

impl<'a> GenerateDataKeyRequest<'a> {
    /// A request without AAD.
    pub const fn new(key_id: &'a str, number_of_bytes: u32) -> Self {
        Self { key_id, number_of_bytes, aad: &[] }
    }

    /// The same request with this AAD.
    #[must_use]
    pub const fn aad(mut self, aad: &'a [u8]) -> Self {
        self.aad = aad;
        self
    }

    /// The length of the data key, if the lengths are within their limits.
    pub(crate) fn check(&self) -> Result<usize> {
        check_aad(self.aad)?;
        check_number_of_bytes(self.number_of_bytes)
    }
}

/// The length of a data key, if it is within its limits.
pub(crate) fn check_number_of_bytes(number: u32) -> Result<usize> {
    match usize::try_from(number) {
        Ok(len @ NUMBER_OF_BYTES_MIN..=NUMBER_OF_BYTES_MAX) => Ok(len),
        _ => Err(Error::invalid(format!(
            "NumberOfBytes {number} is outside {NUMBER_OF_BYTES_MIN} to {NUMBER_OF_BYTES_MAX}."
        ))),
    }
}

/// One blob to decrypt.
///
/// `advance_decrypt` needs the AAD alone for a self-describing blob, and `key_id` and `iv` for a raw one; `decrypt`
/// reads every blob as a raw one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecryptRequest<'a> {
    /// The wrapped data key, or the encrypted text.
    pub ciphertext_blob: &'a [u8],
    /// The key that wrapped it: an id or an `alias/...`.
    pub key_id: Option<&'a str>,
    /// The 12-byte IV that came with a raw blob.
    pub iv: Option<&'a [u8]>,
    /// The AAD of the generating or encrypting request.
    pub aad: &'a [u8],
    /// `AES_GCM`, which is also meant when nothing or nothing but `""` is given.
    pub algorithm: Option<&'a str>,
    /// Names the key version of a raw blob for `decrypt` when there is no `key_id` (the KMS's
    /// `x-kms-migrationkeyversionid`).
    pub key_version_id: Option<&'a str>,
}

impl<'a> DecryptRequest<'a> {
    /// A request with nothing but a blob.
    pub const fn new(ciphertext_blob: &'a [u8]) -> Self {
        Self {
            ciphertext_blob,
            key_id: None,
            iv: None,
            aad: &[],
            algorithm: None,
            key_version_id: None,
        }
    }

    /// The same request with this key id or alias.
    #[must_use]
    pub const fn key_id(mut self, key_id: &'a str) -> Self {
        self.key_id = Some(key_id);
        self
    }

    /// The same request with this IV.
    #[must_use]
    pub const fn iv(mut self, iv: &'a [u8]) -> Self {
        self.iv = Some(iv);
        self
    }

    /// The same request with this AAD.
    #[must_use]
    pub const fn aad(mut self, aad: &'a [u8]) -> Self {
        self.aad = aad;
        self
    }

    /// Checks what a raw blob needs beside its key, and returns the IV.
    #[inline]
    pub(crate) fn check_raw(&self) -> Result<&'a [u8; IV_LEN]> {
        check_algorithm(self.algorithm)?;
        check_iv(self.iv.ok_or_else(|| Error::invalid("Iv is missing."))?)
    }
}

/// One text of the caller's to encrypt. `encrypt` and `advance_encrypt` take it.
///
/// ```
/// use keymill::EncryptRequest;
/// let request = EncryptRequest::new("alias/app", b"a password").aad(b"user 1");
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EncryptRequest<'a> {
    /// The key that encrypts: an id or an `alias/...`.
    pub key_id: &'a str,
    /// What to encrypt: 1 byte to 3 MiB.
    pub plaintext: &'a [u8],
    /// Additional authenticated data, at most 8192 bytes. Public; whoever decrypts has to bring the same bytes.
    pub aad: &'a [u8],
    /// A 12-byte IV to use under a key of scheme `Derived`. One is drawn if there is none, which is what to do unless
    /// something that cannot be changed insists.
    pub iv: Option<&'a [u8]>,
    /// `AES_GCM`, which is also meant when nothing or nothing but `""` is given.
    pub algorithm: Option<&'a str>,
}

impl<'a> EncryptRequest<'a> {
    /// A request without AAD.
    pub const fn new(key_id: &'a str, plaintext: &'a [u8]) -> Self {
        Self { key_id, plaintext, aad: &[], iv: None, algorithm: None }
    }

    /// The same request with this AAD.
    #[must_use]
    pub const fn aad(mut self, aad: &'a [u8]) -> Self {
        self.aad = aad;
        self
    }

    /// The same request with this IV.
    #[must_use]
    pub const fn iv(mut self, iv: &'a [u8]) -> Self {
        self.iv = Some(iv);
        self
    }

    /// Checks everything that does not depend on the key, and returns the caller's IV.
    pub(crate) fn check(&self) -> Result<Option<&'a [u8; IV_LEN]>> {
        let len = self.plaintext.len();
        if !(PLAINTEXT_LEN_MIN..=PLAINTEXT_LEN_MAX).contains(&len) {
            return Err(Error::invalid(format!(
                "Plaintext has {len} bytes, outside {PLAINTEXT_LEN_MIN} to {PLAINTEXT_LEN_MAX}."
            )));
        }
        check_aad(self.aad)?;
        check_algorithm(self.algorithm)?;
        self.iv.map(check_iv).transpose()
    }
}

impl std::fmt::Debug for EncryptRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncryptRequest")
            .field("key_id", &self.key_id)
            .field("plaintext_len", &self.plaintext.len())
            .field("aad", &self.aad)
            .field("iv", &self.iv)
            .field("algorithm", &self.algorithm)
            .finish()
    }
}

fn check_algorithm(algorithm: Option<&str>) -> Result<()> {
    match algorithm {
        None | Some("" | ALGORITHM) => Ok(()),
        Some(other) => {
            let other = Shortened(other);
            Err(Error::invalid(format!("Algorithm {other:?} is not {ALGORITHM}.")))
        }
    }
}

fn check_iv(iv: &[u8]) -> Result<&[u8; IV_LEN]> {
    iv.try_into()
        .map_err(|_| Error::invalid(format!("Iv has {} bytes; AES_GCM needs 12.", iv.len())))
}

pub(crate) fn check_aad(aad: &[u8]) -> Result<()> {
    if aad.len() > AAD_LEN_MAX { Err(aad_too_long(aad.len())) } else { Ok(()) }
}

#[cold]
pub(crate) fn aad_too_long(len: usize) -> Error {
    Error::invalid(format!("Aad has {len} bytes; at most {AAD_LEN_MAX} are allowed."))
}

/// A KEK to create.
///
/// ```
/// use keymill::CreateKey;
/// let key = CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() };
/// ```
#[derive(Clone, Debug)]
pub struct CreateKey {
    /// Length of the material.
    pub spec: KeySpec,
    /// How it wraps; the spec's default scheme if `None`.
    pub scheme: Option<Scheme>,
    /// A first alias.
    pub alias: Option<String>,
    /// Free text, at most 8192 bytes.
    pub description: String,
    /// How often it rotates by itself.
    pub rotation_period: Option<RotationPeriod>,
}

impl Default for CreateKey {
    fn default() -> Self {
        Self {
            spec: KeySpec::Aes256,
            scheme: None,
            alias: None,
            description: String::new(),
            rotation_period: None,
        }
    }
}

/// A KEK to import: raw material of 16, 24 or 32 bytes, which decides the spec.
#[derive(Clone)]
pub struct ImportKey<'a> {
    /// The material. The caller wipes it afterwards.
    pub material: &'a [u8],
    /// How it wraps; the spec's default scheme if `None`.
    pub scheme: Option<Scheme>,
    /// A first alias.
    pub alias: Option<String>,
    /// Free text, at most 8192 bytes.
    pub description: String,
}

impl<'a> ImportKey<'a> {
    /// Material with the defaults for everything else.
    pub const fn new(material: &'a [u8]) -> Self {
        Self { material, scheme: None, alias: None, description: String::new() }
    }
}

impl std::fmt::Debug for ImportKey<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImportKey")
            .field("material_len", &self.material.len())
            .field("scheme", &self.scheme)
            .field("alias", &self.alias)
            .finish_non_exhaustive()
    }
}

pub(crate) fn check_description(description: &str) -> Result<()> {
    if description.len() > DESCRIPTION_LEN_MAX {
        return Err(Error::invalid(format!(
            "Description has {} bytes; at most {DESCRIPTION_LEN_MAX} are allowed.",
            description.len()
        )));
    }
    Ok(())
}

/// The scheme of a new key.
///
/// # Errors
/// `InvalidParameter` for `Derived` with another spec than AES_256.
pub(crate) fn check_scheme(spec: KeySpec, scheme: Option<Scheme>) -> Result<Scheme> {
    match scheme.unwrap_or(spec.default_scheme()) {
        Scheme::Derived if spec != KeySpec::Aes256 => {
            Err(Error::invalid(format!("Scheme \"derived\" needs AES_256; the key is {spec}.")))
        }
        scheme => Ok(scheme),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_at_and_beyond_their_limits() {
        let aad = vec![0; AAD_LEN_MAX + 1];
        for (bytes, aad_len, good) in [
            (0, 0, false),
            (1, 0, true),
            (1024, AAD_LEN_MAX, true),
            (1025, 0, false),
            (u32::MAX, 0, false),
            (32, AAD_LEN_MAX + 1, false),
        ] {
            let request = GenerateDataKeyRequest::new("k", bytes).aad(&aad[..aad_len]);
            assert_eq!(request.check().is_ok(), good, "{bytes} {aad_len}");
        }
    }

    /// A batch makes one message an item, and all its items may share one long algorithm.
    #[test]
    fn a_long_algorithm_makes_no_long_message() {
        let long = "x".repeat(1 << 20);
        let request = DecryptRequest { algorithm: Some(&long), ..DecryptRequest::new(b"") };
        assert!(request.check_raw().unwrap_err().message().len() < 400);
    }

    #[test]
    fn a_text_to_encrypt_does_not_print() {
        let text = format!("{:?}", EncryptRequest::new("k", &[0x41; 32]));
        assert!(text.contains("plaintext_len: 32") && !text.contains("65"), "{text}");
    }

    #[test]
    fn imported_material_does_not_print() {
        let text = format!("{:?}", ImportKey::new(&[0x41; 32]));
        assert!(text.contains("material_len: 32") && !text.contains("65"), "{text}");
    }
}
