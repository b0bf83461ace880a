//! `DataKey`, the owned data key: in memory of its own, or a view that shares its batch's.
//!
//! One in memory of its own is one allocation: what is public, the data key and the blob lie together, unless they are
//! long. It is moved as a pointer, so that the key itself never moves.

use bytes::Bytes;

use crate::{
    keys::{KeyId, KeyVersionId},
    limits::{BLOB_HEAD_LEN, IV_LEN, SALT_LEN, TAG_LEN},
    request::ALGORITHM,
    request_id::RequestId,
    secret::{HELD_LEN_MAX, SecretBytes},
};

/// A data key, owned: the result of a single call or of a pool, or an owned view of a batch. As large as a pointer.
pub struct DataKey(Box<Kind>);

/// Boxed as a whole: a pointer is all that is moved when a key goes from hand to hand.
enum Kind {
    Own(OwnDataKey),
    View(View),
}

#[derive(Clone)]
struct View {
    about: About,
    plaintext: Option<SecretBytes>,
    blob: Bytes,
}

/// What is short and public.
#[derive(Clone, Copy)]
pub(crate) struct About {
    pub(crate) key_version_id: KeyVersionId,
    pub(crate) iv: [u8; IV_LEN],
    pub(crate) request_id: RequestId,
}

/// A data key in memory of its own.
struct OwnDataKey {
    about: About,
    plaintext: Option<SecretBytes>,
    blob: Blob,
}

enum Blob {
    Short { len: u8, bytes: [u8; SHORT_BLOB_MAX] },
    Long(Vec<u8>),
}

/// The longest blob of a data key that is held in place.
const SHORT_BLOB_MAX: usize = BLOB_HEAD_LEN + SALT_LEN + HELD_LEN_MAX + TAG_LEN;

impl Kind {
    /// A data key of no bytes, whose lengths are set where it lies. A constant: what is put together on the stack is
    /// copied from there piece by piece.
    const EMPTY: Self = Self::Own(OwnDataKey {
        about: About::EMPTY,
        plaintext: Some(SecretBytes::EMPTY),
        blob: Blob::Short { len: 0, bytes: [0; SHORT_BLOB_MAX] },
    });
}

impl About {
    pub(crate) const EMPTY: Self =
        Self { key_version_id: KeyVersionId::ZERO, iv: [0; IV_LEN], request_id: RequestId::NIL };
}

impl OwnDataKey {
    /// Makes room for zeros of these lengths. `None` for a key that is not returned.
    fn set_lens(&mut self, dek_len: Option<usize>, blob_len: usize) {
        match (dek_len, &mut self.plaintext) {
            (Some(len), Some(plaintext)) => plaintext.set_len_in_place(len),
            (_, plaintext) => *plaintext = None,
        }
        match (u8::try_from(blob_len), &mut self.blob) {
            (Ok(short), Blob::Short { len, .. }) if blob_len <= SHORT_BLOB_MAX => *len = short,
            (_, blob) => *blob = Blob::Long(vec![0; blob_len]),
        }
    }

    /// What is to be written: the data key, if it is returned, and the blob.
    fn parts(&mut self) -> (&mut About, Option<&mut [u8]>, &mut [u8]) {
        let plaintext = self.plaintext.as_mut().and_then(SecretBytes::expose_mut);
        let blob = match &mut self.blob {
            Blob::Short { len, bytes } => &mut bytes[..usize::from(*len)],
            Blob::Long(bytes) => bytes,
        };
        (&mut self.about, plaintext, blob)
    }

    /// Fills both with copies of the same lengths.
    fn copy_from(&mut self, plaintext: Option<&[u8]>, blob: &[u8]) {
        let (_, own_plaintext, own_blob) = self.parts();
        if let (Some(own), Some(given)) = (own_plaintext, plaintext) {
            own.copy_from_slice(given);
        }
        own_blob.copy_from_slice(blob);
    }

    fn blob(&self) -> &[u8] {
        match &self.blob {
            Blob::Short { len, bytes } => &bytes[..usize::from(*len)],
            Blob::Long(bytes) => bytes,
        }
    }
}

impl DataKey {
    /// Zeros of these lengths in memory of their own, written by `write`: what is public, the data key if it is
    /// returned (`dek_len` is its length then), and the blob.
    pub(crate) fn make<E>(
        dek_len: Option<usize>,
        blob_len: usize,
        write: impl FnOnce(&mut About, Option<&mut [u8]>, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut made = Box::new(Kind::EMPTY);
        if let Kind::Own(own) = &mut *made {
            own.set_lens(dek_len, blob_len);
            let (about, plaintext, blob) = own.parts();
            write(about, plaintext, blob)?;
        }
        Ok(Self(made))
    }

    /// A copy in memory of its own.
    pub(crate) fn copy(about: About, plaintext: Option<&[u8]>, blob: &[u8]) -> Self {
        let mut made = Box::new(Kind::EMPTY);
        if let Kind::Own(own) = &mut *made {
            own.set_lens(plaintext.map(<[u8]>::len), blob.len());
            own.about = about;
            own.copy_from(plaintext, blob);
        }
        Self(made)
    }

    pub(crate) fn view(about: About, plaintext: Option<SecretBytes>, blob: Bytes) -> Self {
        Self(Box::new(Kind::View(View { about, plaintext, blob })))
    }

    fn about(&self) -> &About {
        match &*self.0 {
            Kind::Own(key) => &key.about,
            Kind::View(view) => &view.about,
        }
    }

    /// The KEK's id, also if the request named an alias.
    pub fn key_id(&self) -> KeyId {
        self.about().key_version_id.key_id()
    }

    /// The key version that wraps.
    pub fn key_version_id(&self) -> KeyVersionId {
        self.about().key_version_id
    }

    /// The IV, which `decrypt` needs.
    pub fn iv(&self) -> &[u8; IV_LEN] {
        &self.about().iv
    }

    /// The data key; `None` from the operations without plaintext.
    pub fn plaintext(&self) -> Option<&SecretBytes> {
        match &*self.0 {
            Kind::Own(key) => key.plaintext.as_ref(),
            Kind::View(view) => view.plaintext.as_ref(),
        }
    }

    /// The wrapped data key.
    pub fn ciphertext_blob(&self) -> &[u8] {
        match &*self.0 {
            Kind::Own(key) => key.blob(),
            Kind::View(view) => &view.blob,
        }
    }

    /// The wrapped data key as `Bytes`: of a view it shares the batch's memory, otherwise it is a copy.
    pub fn ciphertext_bytes(&self) -> Bytes {
        match &*self.0 {
            Kind::Own(key) => Bytes::copy_from_slice(key.blob()),
            Kind::View(view) => view.blob.clone(),
        }
    }

    /// `AES_GCM`.
    pub fn algorithm(&self) -> &'static str {
        ALGORITHM
    }

    /// The id of the request.
    pub fn request_id(&self) -> RequestId {
        self.about().request_id
    }

    /// A copy in memory of its own, so that a key kept for long does not keep its batch.
    #[must_use]
    pub fn detach(&self) -> Self {
        let plaintext = self.plaintext().map(SecretBytes::expose);
        Self::copy(*self.about(), plaintext, self.ciphertext_blob())
    }
}

impl Clone for DataKey {
    /// A view of a view, or a copy of what is in memory of its own.
    fn clone(&self) -> Self {
        match &*self.0 {
            Kind::Own(_) => self.detach(),
            Kind::View(view) => Self(Box::new(Kind::View(view.clone()))),
        }
    }
}

impl std::fmt::Debug for DataKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataKey")
            .field("key_version_id", &self.key_version_id())
            .field("plaintext", &self.plaintext())
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}
