//! Decrypting a batch: planning (pure) and the work, fanned out.
//!
//! Items are grouped by length, key version and salt, so that a salt that serves many items is derived once in a
//! chunk, and distinct salts are set up together. An item whose tag is wrong has its output zeroed and does not disturb
//! its neighbours.

use std::sync::Arc;

use zeroize::zeroize_stack;

use super::{NO_SLOT, Slots, check_output, result::RunRecord, run::FanOut};
use crate::{
    error::{Error, ErrorKind, Result},
    kernel::{self, Iv, KeyRef, Keys},
    keys::{
        KeyVersionId,
        ring::{Key, KeyVersion, Ring},
    },
    limits::{CHUNK_BYTES_MAX, CHUNK_ITEMS_MAX, NUMBER_OF_BYTES_MAX, SALT_LEN},
    request::{DecryptRequest, check_aad},
    secret::SecretArena,
    wrap::{
        Wrapper,
        blob::{self, Form},
        derived::{Derivation, DerivedKeys},
    },
};

/// Which of the two decrypting operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// `decrypt`: every blob is raw.
    Raw,
    /// `advance_decrypt`: self-describing blobs describe themselves.
    Advance,
}

/// One blob, ready to be opened.
pub(crate) struct Item<'a> {
    index: usize,
    pub(crate) version: &'a Arc<KeyVersion>,
    salt: [u8; SALT_LEN],
    iv: Iv,
    aad: &'a [u8],
    sealed: &'a [u8],
    pub(crate) dek_len: usize,
}

impl Item<'_> {
    /// Opens this item alone into `out`, `dek_len` bytes, zeros if it fails. Returns whether it is right.
    pub(crate) fn open(&self, out: &mut [u8]) -> bool {
        let mut verdict = [false];
        let chunk = OpenChunk { items: std::slice::from_ref(self), out, verdicts: &mut verdict };
        open_chunk(chunk);
        zeroize_stack::<{ kernel::STACK_LEN }>();
        verdict[0]
    }
}

/// Finds the key version of a request and cuts its blob.
///
/// # Errors
/// `DecryptFailed` for whatever only says that the blob is wrong; the request's and the key's own errors otherwise.
pub(crate) fn resolve<'a>(
    request: &DecryptRequest<'a>,
    index: usize,
    ring: &'a Ring,
    reading: Reading,
) -> Result<Item<'a>> {
    check_aad(request.aad)?;
    let named = request.key_id.map(|name| find_key(ring, name)).transpose()?;
    let described = match reading {
        Reading::Raw => None,
        Reading::Advance => describe(request, ring),
    };
    let (form, key, version, iv) = match described {
        Some((key, version, iv)) => {
            if let Some(named) = named.filter(|named| named.record.id != key.record.id) {
                return Err(Error::invalid(format!(
                    "KeyId names {}, but the blob was wrapped by {}.",
                    named.record.id, key.record.id
                )));
            }
            (Form::SelfDescribing, key, version, iv)
        }
        None => {
            let (key, version) = raw_version(request, named, ring, reading)?;
            (Form::Raw, key, version, request.check_raw()?)
        }
    };
    key.record.check_usable()?;
    let parts = blob::cut(request.ciphertext_blob, form, version.wrapper.scheme())
        .filter(|parts| parts.dek_len() <= NUMBER_OF_BYTES_MAX)
        .ok_or_else(failed)?;
    Ok(Item {
        index,
        version,
        salt: parts.salt,
        iv,
        aad: request.aad,
        sealed: parts.sealed,
        dek_len: parts.dek_len(),
    })
}

/// The one error of every cryptographic failure.
pub(crate) fn failed() -> Error {
    Error::plain(ErrorKind::DecryptFailed)
}

fn find_key<'a>(ring: &'a Ring, name: &str) -> Result<&'a Arc<Key>> {
    ring.resolve(name).ok_or_else(|| Error::key_not_found(name))
}

type Described<'a> = (&'a Arc<Key>, &'a Arc<KeyVersion>, Iv);

/// What a self-describing blob says of itself; `None` for any other blob.
fn describe<'a>(request: &DecryptRequest<'_>, ring: &'a Ring) -> Option<Described<'a>> {
    let (id, iv) = head(request)?;
    let (key, version) = ring.version(&id)?;
    Some((key, version, iv))
}

fn head(request: &DecryptRequest<'_>) -> Option<(KeyVersionId, Iv)> {
    let (id, iv) = blob::head(request.ciphertext_blob)?;
    Some((KeyVersionId::from_bytes(&id)?, iv))
}

/// Whether the request names a key or a version that `ring` does not have, so that a newer one may know more.
pub(crate) fn wants_newer_ring(
    request: &DecryptRequest<'_>,
    ring: &Ring,
    reading: Reading,
) -> bool {
    let unknown = |id: &KeyVersionId| ring.version(id).is_none();
    request.key_id.is_some_and(|name| ring.resolve(name).is_none())
        || match reading {
            Reading::Advance => head(request).is_some_and(|(id, _)| unknown(&id)),
            Reading::Raw => {
                let named = request.key_version_id.filter(|_| request.key_id.is_none());
                named.and_then(KeyVersionId::parse).is_some_and(|id| unknown(&id))
            }
        }
}

/// The version under which a raw blob is to be opened.
fn raw_version<'a>(
    request: &DecryptRequest<'_>,
    named: Option<&'a Arc<Key>>,
    ring: &'a Ring,
    reading: Reading,
) -> Result<(&'a Arc<Key>, &'a Arc<KeyVersion>)> {
    if let Some(key) = named {
        return Ok((key, key.initial()));
    }
    match (reading, request.key_version_id) {
        (Reading::Raw, Some(name)) => {
            let known = KeyVersionId::parse(name).and_then(|id| ring.version(&id));
            let (key, version) = known.ok_or_else(|| Error::key_not_found(name))?;
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

/// What a decrypting batch does, decided in full.
pub(crate) struct OpenPlan<'a> {
    /// In slot order: grouped by length, version and salt.
    items: Vec<Item<'a>>,
    item_count: usize,
    dek_len: usize,
}

impl<'a> OpenPlan<'a> {
    /// Groups the items.
    ///
    /// # Errors
    /// `LimitExceeded` if the results are larger than one call may return.
    pub(crate) fn new(mut items: Vec<Item<'a>>, item_count: usize) -> Result<Self> {
        let dek_len = items.iter().map(|item| item.dek_len).sum();
        check_output(dek_len)?;
        items.sort_unstable_by_key(|item| {
            (item.dek_len, Arc::as_ptr(item.version) as usize, item.salt, item.index)
        });
        Ok(Self { items, item_count, dek_len })
    }

    /// Opens everything. `refused` are the items that the plan does not hold; those that fail are added.
    ///
    /// # Errors
    /// `Machine` if there is no memory for the result.
    pub(crate) fn run(
        &self,
        fan_out: FanOut<'_>,
        mut refused: Vec<Error>,
    ) -> Result<(SecretArena, Slots, Vec<RunRecord>, Vec<Error>)> {
        let mut arena = SecretArena::zeroed(self.dek_len)?;
        let mut verdicts = vec![false; self.items.len()];
        let work = self.cut(arena.as_mut_slice(), &mut verdicts);
        fan_out.for_each(self.items.len(), work, |chunk| {
            open_chunk(chunk);
            zeroize_stack::<{ kernel::STACK_LEN }>();
        });

        let mut map = vec![NO_SLOT; self.item_count];
        for ((item, verdict), slot) in self.items.iter().zip(&verdicts).zip(0..) {
            if *verdict {
                map[item.index] = slot;
            } else {
                refused.push(failed().with_index(item.index));
            }
        }
        refused.sort_unstable_by_key(Error::index);
        Ok((arena, Slots::Map(map), self.runs(), refused))
    }

    fn runs(&self) -> Vec<RunRecord> {
        let mut runs: Vec<RunRecord> = Vec::new();
        let mut dek_at = 0;
        for (slot, item) in self.items.iter().enumerate() {
            let (version, dek_len) = (item.version.id, item.dek_len);
            if !runs.last().is_some_and(|run| run.version == version && run.dek_len == dek_len) {
                let first_slot = slot;
                runs.push(RunRecord {
                    first_slot,
                    version,
                    dek_len,
                    blob_len: 0,
                    dek_at,
                    blob_at: 0,
                });
            }
            dek_at += dek_len;
        }
        runs
    }

    fn cut<'b>(
        &'b self,
        mut out: &'b mut [u8],
        mut verdicts: &'b mut [bool],
    ) -> Vec<OpenChunk<'b>> {
        let mut chunks = Vec::new();
        let mut items = &self.items[..];
        while !items.is_empty() {
            let mut bytes = 0;
            let fits = |item: &&Item<'_>| {
                bytes += item.sealed.len() + item.dek_len + item.aad.len();
                bytes <= CHUNK_BYTES_MAX
            };
            let count = items.iter().take(CHUNK_ITEMS_MAX).take_while(fits).count().max(1);
            let taken = items.split_off(..count).expect("count is within");
            let len = taken.iter().map(|item| item.dek_len).sum();
            chunks.push(OpenChunk {
                items: taken,
                out: out.split_off_mut(..len).expect("the items' lengths add up"),
                verdicts: verdicts.split_off_mut(..count).expect("one for each item"),
            });
        }
        chunks
    }
}

struct OpenChunk<'a> {
    items: &'a [Item<'a>],
    out: &'a mut [u8],
    verdicts: &'a mut [bool],
}

/// In a frame of its own, so that the whole of it can be overwritten afterwards.
#[inline(never)]
fn open_chunk(chunk: OpenChunk<'_>) {
    let OpenChunk { items, mut out, mut verdicts } = chunk;
    let mut opening = Opening { derived: DerivedKeys::new(), key_of: Vec::new() };
    for run in items.chunk_by(|a, b| a.dek_len == b.dek_len) {
        let mut run = run;
        while !run.is_empty() {
            opening.set_up(run);
            let block = run.split_off(..opening.key_of.len()).expect("no more keys than items");
            opening.open(
                block,
                out.split_off_mut(..block.len() * block[0].dek_len).expect("lengths add up"),
                verdicts.split_off_mut(..block.len()).expect("one for each item"),
            );
        }
    }
}

/// Most keys that are derived at once: more would not stay in the cache between set-up and use.
const KEYS_AT_ONCE: usize = 64;

/// The keys of the first items of a run, as many as [`KEYS_AT_ONCE`] derived keys open.
struct Opening<'a> {
    derived: DerivedKeys,
    key_of: Vec<KeyOf<'a>>,
}

/// The key of one item.
#[derive(Clone, Copy)]
enum KeyOf<'a> {
    Version(KeyRef<'a>),
    Derived(usize),
}

impl<'a> Opening<'a> {
    fn set_up(&mut self, items: &[Item<'a>]) {
        let mut derivations = Vec::with_capacity(items.len().min(KEYS_AT_ONCE));
        self.key_of.clear();
        let mut last: Option<&Item<'_>> = None;
        for item in items {
            match &item.version.wrapper {
                Wrapper::Direct(key) => self.key_of.push(KeyOf::Version(key.key())),
                Wrapper::Derived { root, .. } => {
                    let same = last.is_some_and(|last| {
                        Arc::ptr_eq(last.version, item.version) && last.salt == item.salt
                    });
                    if !same {
                        if derivations.len() == KEYS_AT_ONCE {
                            break;
                        }
                        derivations.push(Derivation { root, salt: item.salt });
                    }
                    self.key_of.push(KeyOf::Derived(derivations.len() - 1));
                }
            }
            last = Some(item);
        }
        self.derived.derive_many(&derivations);
    }

    fn open(&self, items: &[Item<'_>], out: &mut [u8], verdicts: &mut [bool]) {
        let key = |key: &KeyOf<'a>| match *key {
            KeyOf::Version(key) => key,
            KeyOf::Derived(at) => self.derived.key(at),
        };
        kernel::open_many(kernel::Open {
            keys: Keys::Each(&self.key_of.iter().map(key).collect::<Vec<_>>()),
            ivs: &items.iter().map(|item| item.iv).collect::<Vec<_>>(),
            aads: &items.iter().map(|item| item.aad).collect::<Vec<_>>(),
            sealed: &items.iter().map(|item| item.sealed).collect::<Vec<_>>(),
            len: items[0].dek_len,
            out,
            verdicts,
        });
    }
}
