//! The two operations that encrypt a text of the caller's: with the keys, versions, budgets and blobs of data keys.
//!
//! # IVs and salts
//! No IV serves twice under one key, whoever chose it:
//!
//! | key | IV | how |
//! |---|---|---|
//! | `Direct` | drawn | under the version itself; counts as one wrap |
//! | `Direct` | the caller's | refused |
//! | `Derived` | drawn, short text | under the version's wrapping state, as a data key |
//! | `Derived` | drawn, long text | under a salt of its own |
//! | `Derived` | the caller's | under a salt of its own |
//!
//! Under a salt that is in use already, whoever may encrypt but not decrypt could encrypt a known text with the IV of a
//! stored blob: the two would share their key stream, and the known text would give away the other one.
//!
//! # Bounds
//! What is left are probabilities. That AES is a permutation and no random function shows with at most σ²/2^129 for σ
//! blocks under one key:
//! - A salt of a wrapping state has up to 2^20 texts of at most 1024 bytes, 2^26 blocks: 2^-76. A salt of its own has
//!   one text: less.
//! - A `Direct` version has up to 2^32 texts. If all of them have 3 MiB, these are 2^50 blocks: 2^-29. The bound counts
//!   texts and not blocks, so `Derived` is for such amounts.
//!
//! Texts with one IV of the caller's are kept apart by their salts alone, 96 random bits: of 2^32 of them under one
//! version two have one salt with 2^-33, which is what SP 800-38D section 8.3 allows to random IVs. Nobody counts them.

use bytes::Bytes;

use super::{Engine, Shared, single::Plaintext};
use crate::{
    batch::data_key::About,
    error::{Error, Result},
    keys::{
        KeyId, KeyVersionId,
        access::{Access, Everything},
        ring::{Key, KeyVersion},
    },
    limits::{IV_LEN, SALT_LEN, SHARED_SALT_LEN_MAX},
    request::{ALGORITHM, EncryptRequest},
    request_id::RequestId,
    wrap::{
        Scheme, Wrapper,
        blob::{Form, Layout},
        derived::XaesKey,
    },
};

/// Operations that encrypt.
impl Engine {
    /// Encrypts a text under the key's **initial** version. Store the blob, the IV, the AAD and the key id;
    /// [`Engine::decrypt`] gives the text back. To follow a key's rotation, use [`Engine::advance_encrypt`].
    ///
    /// 1 byte to 3 MiB. Larger amounts are for data keys: encrypt them yourself under a key of
    /// [`Engine::generate_data_key`]. The blob is as long as the text and 16 to 79 bytes more; the text is not copied.
    ///
    /// An IV of the caller's is used under a key of scheme `Derived` alone, and with a fresh salt: the same request
    /// twice gives two different blobs. Give no more than 2^32 texts one IV under one key version. An encryption under
    /// a `Direct` version counts as one of its 2^32 wraps, however long the text is; for very many texts of megabytes,
    /// take a key of scheme `Derived`.
    ///
    /// ```
    /// use keymill::{CreateKey, DecryptRequest, EncryptRequest, Engine};
    ///
    /// let engine = Engine::in_memory()?;
    /// engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
    ///
    /// let made = engine.encrypt(&EncryptRequest::new("alias/app", b"a password").aad(b"user 1"))?;
    /// let request = DecryptRequest::new(made.ciphertext_blob())
    ///     .key_id("alias/app")
    ///     .iv(made.iv())
    ///     .aad(b"user 1");
    /// assert_eq!(engine.decrypt(&request)?.plaintext().expose(), b"a password");
    /// # Ok::<(), keymill::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidParameter` (a length, an algorithm, an IV of other than 12 bytes, any IV under a `Direct` key),
    /// `Forbidden.KeyNotFound`, `Rejected.Disabled`, `Rejected.PendingDeletion`; `Rejected.LimitExceeded` when a
    /// `Direct` version has spent its 2^32 wraps. The store or the machine may fail.
    pub fn encrypt(&self, request: &EncryptRequest<'_>) -> Result<Encrypted> {
        self.encrypt_as(&Everything, request, Form::Raw)
    }

    /// Encrypts a text under the key's **primary** version, into a blob that describes itself: store the blob and the
    /// AAD. [`Engine::advance_decrypt`] gives the text back. Otherwise as [`Engine::encrypt`].
    ///
    /// # Errors
    /// As [`Engine::encrypt`].
    pub fn advance_encrypt(&self, request: &EncryptRequest<'_>) -> Result<Encrypted> {
        self.encrypt_as(&Everything, request, Form::SelfDescribing)
    }

    /// Either of the two, by the form of its blobs, for a caller who has this access.
    pub(crate) fn encrypt_as(
        &self,
        access: &dyn Access,
        request: &EncryptRequest<'_>,
        form: Form,
    ) -> Result<Encrypted> {
        self.in_one_process(|shared| {
            let iv = request.check()?;
            shared.with_key(access, request.key_id, |key| {
                check_iv_allowed(key, iv)?;
                shared.with_version(key, form, |version| shared.encrypt(version, request, iv, form))
            })
        })
        .map_err(|error| self.shared().name(error))
    }
}

/// # Errors
/// `InvalidParameter` for an IV that the key must not be used with, before a wrap is taken for it.
fn check_iv_allowed(key: &Key, iv: Option<&[u8; IV_LEN]>) -> Result<()> {
    if iv.is_some() && key.record.scheme == Scheme::Direct {
        return Err(Error::invalid(format!(
            "Key {} is of scheme \"direct\", which draws every Iv itself; leave Iv out.",
            key.record.id
        )));
    }
    Ok(())
}

impl Shared {
    fn encrypt(
        &self,
        version: &KeyVersion,
        request: &EncryptRequest<'_>,
        iv: Option<&[u8; IV_LEN]>,
        form: Form,
    ) -> Result<Encrypted> {
        let EncryptRequest { plaintext, aad, .. } = *request;
        let layout = Layout { form, scheme: version.wrapper.scheme(), dek_len: plaintext.len() };
        let mut blob = vec![0; layout.len()];
        let mut about = About::EMPTY;
        match &version.wrapper {
            Wrapper::Derived { root, .. }
                if iv.is_some() || plaintext.len() > SHARED_SALT_LEN_MAX =>
            {
                let (nonce, request_id) = self.new_nonce(iv)?;
                about = About { key_version_id: version.id, iv: iv_of(&nonce), request_id };
                seal_alone(root, version.id, layout, &nonce, request, &mut blob);
            }
            _ => {
                let text = Plaintext::Given(plaintext);
                self.seal_one(version, layout, aad, text, &mut about, &mut blob)?;
            }
        }
        Ok(Encrypted { about, blob })
    }

    /// A fresh salt and the IV, fresh as well unless there is one; and a request id.
    fn new_nonce(&self, iv: Option<&[u8; IV_LEN]>) -> Result<(Nonce, RequestId)> {
        let (mut id, mut nonce) = ([0; 16], [0; SALT_LEN + IV_LEN]);
        self.rng.fill_each(self.rng.moment(), &mut [&mut id, &mut nonce])?;
        if let Some(iv) = iv {
            nonce[SALT_LEN..].copy_from_slice(iv);
        }
        Ok((nonce, RequestId::from_random(id)))
    }
}

/// Salt and IV.
type Nonce = [u8; SALT_LEN + IV_LEN];

fn iv_of(nonce: &Nonce) -> [u8; IV_LEN] {
    *nonce.last_chunk().expect("an IV comes last in it")
}

/// Seals under a key that is derived for this text alone, and wiped with whatever was left on the stack.
fn seal_alone(
    root: &XaesKey,
    version: KeyVersionId,
    layout: Layout,
    nonce: &Nonce,
    request: &EncryptRequest<'_>,
    blob: &mut [u8],
) {
    let salt = nonce.first_chunk().expect("a salt comes first in it");
    layout.write_head(blob, version.as_bytes(), &iv_of(nonce), salt);
    root.seal(nonce, request.aad, request.plaintext, &mut blob[layout.ciphertext_at()..]);
}

/// An encrypted text.
#[derive(Clone)]
pub struct Encrypted {
    about: About,
    blob: Vec<u8>,
}

impl Encrypted {
    /// The KEK's id, also if the request named an alias.
    pub fn key_id(&self) -> KeyId {
        self.about.key_version_id.key_id()
    }

    /// The key version that encrypted.
    pub fn key_version_id(&self) -> KeyVersionId {
        self.about.key_version_id
    }

    /// The IV, which `decrypt` needs.
    pub fn iv(&self) -> &[u8; IV_LEN] {
        &self.about.iv
    }

    /// The encrypted text.
    pub fn ciphertext_blob(&self) -> &[u8] {
        &self.blob
    }

    /// The encrypted text alone, without a copy.
    pub fn into_ciphertext_blob(self) -> Vec<u8> {
        self.blob
    }

    /// As [`Encrypted::into_ciphertext_blob`], as `Bytes`.
    pub fn into_ciphertext_bytes(self) -> Bytes {
        self.blob.into()
    }

    /// `AES_GCM`.
    pub fn algorithm(&self) -> &'static str {
        ALGORITHM
    }

    /// The id of the request.
    pub fn request_id(&self) -> RequestId {
        self.about.request_id
    }
}

impl std::fmt::Debug for Encrypted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encrypted")
            .field("key_version_id", &self.key_version_id())
            .field("blob_len", &self.blob.len())
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}
