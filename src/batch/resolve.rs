//! Finding the keys of a decrypting batch's requests: which version opens a blob, and how long its data key is (or the
//! caller's text, which is a data key to all that follows).
//!
//! What is found of a request is kept small, and nothing of its blob is read but a head that may describe it: the rest
//! is read where it is opened, so that it comes to the caches once. Public: everything here.
//!
//! Whatever is remembered of a key was permitted to the caller: permission is asked for where a key is found, and a
//! refusal leaves nothing behind.

use std::sync::Arc;

use super::name::Name;
use crate::{
    error::{Error, ErrorKind, Result},
    kernel::Iv,
    keys::{
        KeyState, KeyVersionId,
        access::{Access, Gate},
        ring::{Key, KeyVersion, Ring},
    },
    limits::{AAD_LEN_MAX, IV_LEN, KEY_VERSION_ID_LEN, PLAINTEXT_LEN_MAX},
    request::{DecryptRequest, check_aad},
    wrap::blob::{self, Form, Parts},
};

/// Which of the two decrypting operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// `decrypt`: every blob is raw.
    Raw,
    /// `advance_decrypt`: self-describing blobs describe themselves.
    Advance,
}

/// One blob that can be opened: what was found for its request, which has the rest.
#[derive(Clone, Copy)]
pub(crate) struct Item<'a> {
    pub(crate) version: &'a Arc<KeyVersion>,
    /// The index of the request, with [`DESCRIBED`] on top if its blob is self-describing.
    place: u32,
    dek_len: u32,
}

/// The one bit that indexes leave free.
const DESCRIBED: u32 = 1 << 31;

// A batch has one for each request, between the pass that finds them and the one that opens them.
const _: () = assert!(size_of::<Item<'_>>() <= 16);

impl<'a> Item<'a> {
    #[inline]
    fn new(version: &'a Arc<KeyVersion>, index: u32, form: Form, dek_len: usize) -> Self {
        let dek_len = u32::try_from(dek_len).expect("at most PLAINTEXT_LEN_MAX");
        let place = match form {
            Form::Raw => index,
            Form::SelfDescribing => index | DESCRIBED,
        };
        Self { version, place, dek_len }
    }

    /// The same for another request.
    #[inline]
    fn at(self, index: u32) -> Self {
        Self { place: self.place & DESCRIBED | index, ..self }
    }

    /// Of the request.
    #[inline]
    pub(crate) fn index(&self) -> usize {
        (self.place & !DESCRIBED) as usize
    }

    #[inline]
    fn form(&self) -> Form {
        if self.place & DESCRIBED == 0 { Form::Raw } else { Form::SelfDescribing }
    }

    /// Bytes of the data key.
    #[inline]
    pub(crate) fn dek_len(&self) -> usize {
        self.dek_len as usize
    }

    /// The blob of the item's request, cut.
    #[inline]
    pub(super) fn cut<'r>(&self, request: &DecryptRequest<'r>) -> Parts<'r> {
        blob::cut(request.ciphertext_blob, self.form(), self.version.wrapper.scheme())
            .expect("long enough when it was found")
    }

    /// The IV of the item's request.
    #[inline]
    pub(super) fn iv<'r>(&self, request: &DecryptRequest<'r>) -> &'r Iv {
        match self.form() {
            Form::Raw => request.iv.and_then(|iv| iv.try_into().ok()),
            Form::SelfDescribing => blob::iv(request.ciphertext_blob),
        }
        .expect("there when it was found")
    }
}

/// A key and its version.
type Found<'a> = (&'a Arc<Key>, &'a Arc<KeyVersion>);

/// Finds the keys of requests in one ring. Remembers the last: equal ones mostly come one after the other.
pub(crate) struct Resolver<'a> {
    ring: &'a Ring,
    gate: Gate<'a>,
    reading: Reading,
    last: Option<Last<'a>>,
    last_named: Option<(Name<'a>, &'a Arc<Key>)>,
    last_described: Option<Found<'a>>,
    missed: bool,
    summary: Summary,
}

/// A request for which an item was found.
#[derive(Clone, Copy)]
struct Last<'a> {
    named: Option<Name<'a>>,
    blob_len: usize,
    item: Item<'a>,
}

impl Last<'_> {
    /// Whether `request` leads to the same version and length, by the way that most take. `reading` is that of both.
    #[inline]
    fn is_like(&self, request: &DecryptRequest<'_>, reading: Reading) -> bool {
        let Self { named, blob_len, item } = self;
        let says_the_same = match item.form() {
            Form::Raw => {
                let named = match (*named, request.key_id) {
                    (Some(last), Some(name)) => last == Name::new(name),
                    _ => false,
                };
                // A raw blob may be a self-describing one to the other reading.
                named
                    && reading == Reading::Raw
                    && request.algorithm.is_none()
                    && request.iv.is_some_and(|iv| iv.len() == IV_LEN)
            }
            Form::SelfDescribing => {
                request.key_id.is_none()
                    && blob::head(request.ciphertext_blob) == Some(item.version.id.as_bytes())
            }
        };
        says_the_same
            && request.ciphertext_blob.len() == *blob_len
            && request.aad.len() <= AAD_LEN_MAX
    }
}

/// What the items of a batch have in common, noted when they are found: a further pass over them would cost more.
#[derive(Clone, Copy, Default)]
pub(crate) struct Summary {
    /// Bytes of all data keys.
    pub(super) dek_len: usize,
    /// Bytes of all AADs.
    pub(super) aads_len: usize,
    /// Bits in which a length differs from the first one.
    pub(super) len_differences: usize,
    pub(super) several_versions: bool,
}

impl<'a> Resolver<'a> {
    pub(crate) fn new(ring: &'a Ring, access: &'a dyn Access, reading: Reading) -> Self {
        Self {
            ring,
            gate: Gate::new(access),
            reading,
            last: None,
            last_named: None,
            last_described: None,
            missed: false,
            summary: Summary::default(),
        }
    }

    /// Whether the last request named a key or a version that the ring does not have, so that a newer one may know
    /// more.
    pub(crate) fn take_missed(&mut self) -> bool {
        std::mem::take(&mut self.missed)
    }

    /// Finds the key version of a request and the length of its data key, and adds them to `items`.
    ///
    /// # Errors
    /// `DecryptFailed` for whatever only says that the blob is wrong; `NoPermission`; the request's and the key's own
    /// errors otherwise.
    #[inline(always)]
    pub(crate) fn resolve(
        &mut self,
        request: &DecryptRequest<'a>,
        index: usize,
        items: &mut Vec<Item<'a>>,
    ) -> Result<()> {
        let index = u32::try_from(index).expect("a batch has fewer than 2^31 items");
        let item = match &self.last {
            Some(last) if last.is_like(request, self.reading) => last.item.at(index),
            _ => self.find(request, index, items.first())?,
        };
        self.summary.dek_len += item.dek_len();
        self.summary.aads_len += request.aad.len();
        items.push(item);
        Ok(())
    }

    /// Finds a request by its name, or by what its blob says. `first` is the first item of the batch, if there is one.
    #[inline(never)]
    fn find(
        &mut self,
        request: &DecryptRequest<'a>,
        index: u32,
        first: Option<&Item<'a>>,
    ) -> Result<Item<'a>> {
        check_aad(request.aad)?;
        let named = request.key_id.map(|name| self.named(name)).transpose();
        let described = match self.reading {
            Reading::Raw => Ok(None),
            Reading::Advance => self.described(request),
        };
        // Both keys are permitted from here on, so that a message may name either.
        let (named, described) = (named?, described?);
        let (form, key, version) = match described {
            Some((key, version)) => {
                if let Some(named) = named.filter(|named| named.record.id != key.record.id) {
                    return Err(names_another(named, key));
                }
                (Form::SelfDescribing, key, version)
            }
            None => {
                let (key, version) = self.raw_version(request, named)?;
                request.check_raw()?;
                (Form::Raw, key, version)
            }
        };
        if key.record.state != KeyState::Enabled {
            key.record.check_usable()?;
        }
        let dek_len = blob::dek_len(request.ciphertext_blob, form, version.wrapper.scheme())
            .filter(|len| *len <= PLAINTEXT_LEN_MAX)
            .ok_or_else(failed)?;
        // Requests like this one add no further differences.
        if let Some(first) = first {
            self.summary.len_differences |= dek_len ^ first.dek_len();
            self.summary.several_versions |= !Arc::ptr_eq(version, first.version);
        }
        let item = Item::new(version, index, form, dek_len);
        let (named, blob_len) = (request.key_id.map(Name::new), request.ciphertext_blob.len());
        self.last = Some(Last { named, blob_len, item });
        Ok(item)
    }

    pub(crate) fn summary(&self) -> Summary {
        self.summary
    }

    #[inline]
    fn named(&mut self, name: &'a str) -> Result<&'a Arc<Key>> {
        let name = Name::new(name);
        match self.last_named {
            Some((last, key)) if last == name => Ok(key),
            _ => self.look_up(name),
        }
    }

    #[inline(never)]
    fn look_up(&mut self, name: Name<'a>) -> Result<&'a Arc<Key>> {
        let key = self.ring.resolve(name.as_str());
        self.missed |= key.is_none();
        let key = key.ok_or_else(|| Error::key_not_found(name.as_str()))?;
        self.gate.check(key, Some(name.as_str()))?;
        self.last_named = Some((name, key));
        Ok(key)
    }

    /// What a self-describing blob says of itself; `None` for any other blob.
    #[inline]
    fn described(&mut self, request: &DecryptRequest<'_>) -> Result<Option<Found<'a>>> {
        let Some(id) = blob::head(request.ciphertext_blob) else { return Ok(None) };
        match self.last_described {
            Some(last) if last.1.id.as_bytes() == id => Ok(Some(last)),
            _ => self.look_up_version(id, request.key_id),
        }
    }

    #[inline(never)]
    fn look_up_version(
        &mut self,
        id: &[u8; KEY_VERSION_ID_LEN],
        named: Option<&str>,
    ) -> Result<Option<Found<'a>>> {
        let found = self.ring.version_by_bytes(id);
        self.missed |= found.is_none() && KeyVersionId::from_bytes(id).is_some();
        if let Some((key, _)) = found {
            self.gate.check(key, named)?;
            self.last_described = found;
        }
        Ok(found)
    }

    /// The version under which a raw blob is to be opened.
    #[inline]
    fn raw_version(
        &mut self,
        request: &DecryptRequest<'_>,
        named: Option<&'a Arc<Key>>,
    ) -> Result<Found<'a>> {
        if let Some(key) = named {
            return Ok((key, key.initial()));
        }
        match (self.reading, request.key_version_id) {
            (Reading::Raw, Some(name)) => {
                let id = KeyVersionId::parse(name).ok_or_else(|| Error::key_not_found(name))?;
                let known = self.ring.version_by_bytes(id.as_bytes());
                self.missed |= known.is_none();
                let (key, version) = known.ok_or_else(|| Error::key_not_found(name))?;
                self.gate.check(key, None)?;
                Ok((key, version))
            }
            // The caller takes the blob for a self-describing one, and it is cut or damaged: a wrong blob.
            (Reading::Advance, _)
                if request.iv.is_none() || blob::claims_head(request.ciphertext_blob) =>
            {
                Err(failed())
            }
            _ => Err(Error::invalid("KeyId is missing, and the blob does not describe itself.")),
        }
    }
}

#[cold]
fn names_another(named: &Key, key: &Key) -> Error {
    let (named, key) = (named.record.id, key.record.id);
    Error::invalid(format!("KeyId names {named}, but the blob was wrapped by {key}."))
}

/// The one error of every cryptographic failure.
pub(crate) fn failed() -> Error {
    Error::plain(ErrorKind::DecryptFailed)
}
