//! One data key now: the four generating operations as single calls.
//!
//! Not batches of one: the same functions on the caller's thread, without planning. The random bytes come from the
//! thread's pool and the wrapping key from its wrapping state; there is no lock, no system call but for the reseeding
//! of both once a second, and no allocation but for the two results.

use std::sync::{Arc, atomic::Ordering};

use zeroize::Zeroize;

use super::{Engine, Shared, wraps};
use crate::{
    batch::data_key::{About, DataKey},
    error::{Error, Result},
    kernel::{self, Keys},
    keys::{
        KeyHandle, KeyVersionId,
        access::{Access, Everything, Gate},
        ring::{Key, KeyVersion},
    },
    limits::{IV_LEN, SALT_LEN},
    request::{GenerateDataKeyRequest, Operation, check_aad},
    request_id::RequestId,
    secret::SecretBytes,
    wrap::{
        Wrapper,
        blob::{Form, Layout},
    },
};

/// How often an operation starts over because a key rotated under it.
pub(super) const ATTEMPTS: usize = 3;

/// Where [`Engine::generate_data_key_into`] writes a data key.
#[derive(Debug)]
pub struct DataKeyBuffers<'a> {
    /// The data key. Its length is NumberOfBytes, 1 to 1024.
    pub plaintext: &'a mut [u8],
    /// The IV.
    pub iv: &'a mut [u8; IV_LEN],
    /// The wrapped data key, at the beginning: at most 79 bytes more than the data key.
    pub ciphertext_blob: &'a mut [u8],
}

/// What was written into [`DataKeyBuffers`], beside the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WrittenDataKey {
    /// The key version that wraps.
    pub key_version_id: KeyVersionId,
    /// Bytes of the blob.
    pub blob_len: usize,
    /// The id of the request.
    pub request_id: RequestId,
}

/// Operations on data keys.
impl Engine {
    /// Generates a data key and wraps it under the key's **initial** version. Store the blob, the IV, the AAD and the
    /// key id. To follow a key's rotation, use [`Engine::advance_generate_data_key`].
    ///
    /// # Errors
    /// `InvalidParameter`, `Forbidden.KeyNotFound`, `Rejected.Disabled`, `Rejected.PendingDeletion`;
    /// `Rejected.LimitExceeded` when a `Direct` version has spent its 2^32 wraps. The store or the machine may fail.
    pub fn generate_data_key(&self, request: &GenerateDataKeyRequest<'_>) -> Result<DataKey> {
        self.generate_one_as(&Everything, request, Operation::GenerateDataKey)
    }

    /// As [`Engine::generate_data_key`], for a data key that someone else will ask for by `decrypt`: it is wiped as
    /// soon as it is wrapped.
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`].
    pub fn generate_data_key_without_plaintext(
        &self,
        request: &GenerateDataKeyRequest<'_>,
    ) -> Result<DataKey> {
        self.generate_one_as(&Everything, request, Operation::GenerateDataKeyWithoutPlaintext)
    }

    /// Generates a data key and wraps it under the key's **primary** version, in a blob that describes itself: store
    /// the blob and the AAD.
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`].
    pub fn advance_generate_data_key(
        &self,
        request: &GenerateDataKeyRequest<'_>,
    ) -> Result<DataKey> {
        self.generate_one_as(&Everything, request, Operation::AdvanceGenerateDataKey)
    }

    /// As [`Engine::advance_generate_data_key`], with the data key wiped as soon as it is wrapped.
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`].
    pub fn advance_generate_data_key_without_plaintext(
        &self,
        request: &GenerateDataKeyRequest<'_>,
    ) -> Result<DataKey> {
        self.generate_one_as(
            &Everything,
            request,
            Operation::AdvanceGenerateDataKeyWithoutPlaintext,
        )
    }

    /// Generates a data key into memory of the caller's, by any of the four operations. Allocates nothing.
    ///
    /// `buffers.plaintext.len()` is NumberOfBytes. Of the operations without plaintext it holds zeros afterwards.
    ///
    /// ```
    /// use keymill::{CreateKey, DataKeyBuffers, DecryptRequest, Engine, Operation};
    ///
    /// let engine = Engine::in_memory()?;
    /// engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
    /// let key = engine.key("alias/app")?;
    /// let (mut dek, mut iv, mut blob) = ([0; 32], [0; 12], [0; 32 + 79]);
    /// let buffers = DataKeyBuffers { plaintext: &mut dek, iv: &mut iv, ciphertext_blob: &mut blob };
    /// let operation = Operation::AdvanceGenerateDataKey;
    /// let written = engine.generate_data_key_into(&key, operation, b"/a.jpg", buffers)?;
    /// let request = DecryptRequest::new(&blob[..written.blob_len]).aad(b"/a.jpg");
    /// assert_eq!(engine.advance_decrypt(&request)?.plaintext().expose(), dek);
    /// # Ok::<(), keymill::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Engine::generate_data_key`], and `InvalidParameter` if the blob's buffer is too short or the handle is of
    /// another engine. The data key's buffer then holds zeros.
    pub fn generate_data_key_into(
        &self,
        key: &KeyHandle,
        operation: Operation,
        aad: &[u8],
        buffers: DataKeyBuffers<'_>,
    ) -> Result<WrittenDataKey> {
        let DataKeyBuffers { plaintext, iv, ciphertext_blob } = buffers;
        let written = self.in_one_process(|shared| {
            let cell = key.of_engine(shared.number)?;
            let key = cell.load()?;
            let request = Request { operation, aad, dek_len: plaintext.len() };
            request.check()?;
            shared.with_version(&key, operation.form(), |version| {
                let layout = request.layout(version);
                let needed = layout.len();
                let given = ciphertext_blob.len();
                let blob = ciphertext_blob.get_mut(..needed).ok_or_else(|| {
                    Error::invalid(format!(
                        "The blob has {needed} bytes, but its buffer has {given}."
                    ))
                })?;
                let mut about = About::EMPTY;
                shared.make_one(version, &request, plaintext, &mut about, blob)?;
                let About { key_version_id, iv: made, request_id } = about;
                *iv = made;
                Ok(WrittenDataKey { key_version_id, blob_len: needed, request_id })
            })
        });
        if written.is_err() || !operation.returns_plaintext() {
            plaintext.zeroize();
        }
        written.map_err(|error| self.shared().name(error))
    }

    /// Any of the four operations, for a caller who has this access.
    pub(crate) fn generate_one_as(
        &self,
        access: &dyn Access,
        request: &GenerateDataKeyRequest<'_>,
        operation: Operation,
    ) -> Result<DataKey> {
        self.in_one_process(|shared| {
            let dek_len = request.check()?;
            let wanted = Request { operation, aad: request.aad, dek_len };
            shared.with_key(access, request.key_id, |key| shared.new_data_key(key, &wanted))
        })
        .map_err(|error| self.shared().name(error))
    }

    /// As the single calls, by a handle.
    pub(crate) fn generate_by_handle(
        &self,
        key: &KeyHandle,
        number_of_bytes: u32,
        aad: &[u8],
        operation: Operation,
    ) -> Result<DataKey> {
        self.in_one_process(|shared| {
            let cell = key.of_engine(shared.number)?;
            let dek_len = crate::request::check_number_of_bytes(number_of_bytes)?;
            check_aad(aad)?;
            shared.new_data_key(&*cell.load()?, &Request { operation, aad, dek_len })
        })
        .map_err(|error| self.shared().name(error))
    }
}

/// A request whose key is found.
struct Request<'a> {
    operation: Operation,
    aad: &'a [u8],
    dek_len: usize,
}

/// What is wrapped.
pub(super) enum Plaintext<'a> {
    /// A data key, which is drawn first.
    Drawn(&'a mut [u8]),
    /// The caller's.
    Given(&'a [u8]),
}

impl Request<'_> {
    fn check(&self) -> Result<()> {
        check_aad(self.aad)?;
        let number = u32::try_from(self.dek_len).unwrap_or(u32::MAX);
        crate::request::check_number_of_bytes(number).map(drop)
    }

    fn layout(&self, version: &KeyVersion) -> Layout {
        let form = self.operation.form();
        Layout { form, scheme: version.wrapper.scheme(), dek_len: self.dek_len }
    }
}

impl Shared {
    /// A data key in memory of its own.
    fn new_data_key(&self, key: &Arc<Key>, request: &Request<'_>) -> Result<DataKey> {
        self.with_version(key, request.operation.form(), |version| {
            let returned = request.operation.returns_plaintext().then_some(request.dek_len);
            let blob_len = request.layout(version).len();
            DataKey::make(returned, blob_len, |about, plaintext, blob| match plaintext {
                Some(dek) => self.make_one(version, request, dek, about, blob),
                None => {
                    let mut dek = SecretBytes::EMPTY;
                    dek.set_len_in_place(request.dek_len);
                    let dek = dek.expose_mut().expect("no view");
                    self.make_one(version, request, dek, about, blob)
                }
            })
        })
    }

    /// Draws a data key into `dek` and wraps it.
    fn make_one(
        &self,
        version: &KeyVersion,
        request: &Request<'_>,
        dek: &mut [u8],
        about: &mut About,
        blob: &mut [u8],
    ) -> Result<()> {
        let layout = request.layout(version);
        self.seal_one(version, layout, request.aad, Plaintext::Drawn(dek), about, blob)
    }

    /// Runs `make` with the key of this name, which `access` permits. A name that is missing is looked up in the store
    /// once.
    pub(super) fn with_key<T>(
        &self,
        access: &dyn Access,
        name: &str,
        make: impl FnOnce(&Arc<Key>) -> Result<T>,
    ) -> Result<T> {
        let ring = self.ring.load();
        let found;
        let key = match ring.resolve(name) {
            Some(key) => key,
            None => {
                found = self.find(name)?;
                &found
            }
        };
        Gate::new(access).check(key, Some(name))?;
        make(key)
    }

    /// Finds the version that wraps in this form, and takes the wrap that a `Direct` one needs, before `make` does the
    /// work.
    pub(super) fn with_version<T>(
        &self,
        key: &Arc<Key>,
        form: Form,
        make: impl FnOnce(&KeyVersion) -> Result<T>,
    ) -> Result<T> {
        key.record.check_usable()?;
        let version = version_of(key, form);
        if form == Form::Raw {
            self.note_initial_use(key, 1);
        }
        match version.wrapper {
            Wrapper::Derived { .. } => make(version),
            Wrapper::Direct(_) => {
                let taken = self.take_one_wrap(Arc::clone(key), Arc::clone(version), form)?;
                make(&taken)
            }
        }
    }

    /// Wraps one plaintext under the version, or its wrapping state. What is public goes into `about`.
    pub(super) fn seal_one(
        &self,
        version: &KeyVersion,
        layout: Layout,
        aad: &[u8],
        plaintext: Plaintext<'_>,
        about: &mut About,
        blob: &mut [u8],
    ) -> Result<()> {
        let (mut id, iv) = ([0; 16], &mut about.iv);
        let (drawn, given) = match plaintext {
            Plaintext::Drawn(drawn) => (drawn, None),
            Plaintext::Given(given) => (&mut [][..], Some(given)),
        };
        let at = layout.ciphertext_at();
        let moment = self.rng.moment();
        match &version.wrapper {
            Wrapper::Direct(key) => {
                self.rng.fill_each(moment, &mut [&mut id, iv, drawn])?;
                kernel::seal_and_wipe(kernel::Seal {
                    keys: Keys::One(key.key()),
                    ivs: std::slice::from_ref(iv),
                    aads: &[aad],
                    len: layout.dek_len,
                    plaintexts: given.unwrap_or(drawn),
                    stride: layout.len(),
                    out: blob,
                    offset: at,
                });
                layout.write_head(blob, version.id.as_bytes(), iv, &[0; SALT_LEN]);
            }
            Wrapper::Derived { root, states } => {
                let mut state = states.take(root, &self.rng, moment, 1)?;
                self.rng.fill_each(moment, &mut [&mut id, drawn])?;
                *iv = state.seal(aad, given.unwrap_or(drawn), &mut blob[at..])?;
                layout.write_head(blob, version.id.as_bytes(), iv, state.salt());
                states.put_back(state, moment);
            }
        }
        about.key_version_id = version.id;
        about.request_id = RequestId::from_random(id);
        Ok(())
    }

    /// Takes one wrap, of the new primary version if an Advance operation found the old one spent and the key rotates.
    fn take_one_wrap(
        &self,
        mut key: Arc<Key>,
        mut version: Arc<KeyVersion>,
        form: Form,
    ) -> Result<Arc<KeyVersion>> {
        for _ in 0..ATTEMPTS {
            if self.take_wraps(&key, &version, 1)? == 1 {
                return Ok(version);
            }
            match self.successor(&key, &version, form) {
                Some((new_key, new_version)) => (key, version) = (new_key, new_version),
                None => break,
            }
        }
        Err(wraps::spent(&version))
    }

    /// The key's version for blobs of this form in the present ring, if it is not `version`.
    pub(super) fn successor(
        &self,
        key: &Key,
        version: &Arc<KeyVersion>,
        form: Form,
    ) -> Option<(Arc<Key>, Arc<KeyVersion>)> {
        let ring = self.ring.load();
        let key = ring.resolve(key.record.id.as_str())?;
        let now = version_of(key, form);
        (now.id != version.id).then(|| (Arc::clone(key), Arc::clone(now)))
    }

    /// The key with this name; a name that is missing is looked up in the store once.
    pub(super) fn find(&self, name: &str) -> Result<Arc<Key>> {
        if let Some(key) = self.ring.load().resolve(name) {
            return Ok(Arc::clone(key));
        }
        self.refresh_if_changed()?;
        self.ring.load().resolve(name).cloned().ok_or_else(|| Error::key_not_found(name))
    }

    /// Counts, and warns once a key, that the initial version of a rotating key is used.
    pub(super) fn note_initial_use(&self, key: &Key, count: usize) {
        if key.record.rotation.is_none() || count == 0 {
            return;
        }
        self.initial_version_uses.fetch_add(count as u64, Ordering::Relaxed);
        if !key.warned.swap(true, Ordering::Relaxed) {
            log::warn!(
                "key {} rotates by itself, but GenerateDataKey and Encrypt go on with its initial \
                 version; AdvanceGenerateDataKey and AdvanceEncrypt follow the rotation",
                key.record.id
            );
        }
    }
}

fn version_of(key: &Key, form: Form) -> &Arc<KeyVersion> {
    key.version_for(form == Form::SelfDescribing)
}
