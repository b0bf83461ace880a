//! Decrypting a batch: planning (pure) and the work, fanned out.
//!
//! Items stay in request order, unless their lengths differ. Salts that differ are set up together, up to 64 at once;
//! a salt that serves many items of a chunk is derived once for all of them, wherever they stand. An item whose tag is
//! wrong has its output zeroed and does not disturb its neighbours.

use std::sync::Arc;

use zeroize::zeroize_stack;

use super::{
    NO_SLOT, check_output,
    fan_out::{FanOut, in_parts},
    result::RunRecord,
};
use crate::{
    error::{Error, ErrorKind, Result},
    kernel::{self, Iv, KeyRef, Keys},
    keys::{
        KeyState, KeyVersionId,
        ring::{Key, KeyVersion, Ring},
    },
    limits::{
        BLOCK_ITEMS, CHUNK_BYTES_MAX, CHUNK_ITEMS_MAX, IV_LEN, NUMBER_OF_BYTES_MAX, SALT_LEN,
        TAG_LEN,
    },
    request::{DecryptRequest, check_aad},
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
    index: u32,
    pub(crate) version: &'a Arc<KeyVersion>,
    salt: [u8; SALT_LEN],
    iv: Iv,
    aad: &'a [u8],
    /// Ciphertext and tag.
    sealed: &'a [u8],
}

impl Item<'_> {
    /// Bytes of the data key.
    pub(crate) fn dek_len(&self) -> usize {
        self.sealed.len() - TAG_LEN
    }

    /// Whether one key opens both.
    fn shares_key(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.version, other.version) && self.salt == other.salt
    }

    /// The key that opens this item: the version's own, or the derived one at `place`.
    fn key<'k>(&'k self, place: u8, derived: &'k DerivedKeys) -> KeyRef<'k> {
        match &self.version.wrapper {
            Wrapper::Direct(key) => key.key(),
            Wrapper::Derived { .. } => derived.key(place.into()),
        }
    }

    /// The version, by its address, and the salt.
    fn place(&self) -> (usize, [u8; SALT_LEN]) {
        (Arc::as_ptr(self.version) as usize, self.salt)
    }

    /// Opens this item alone into `out`, `dek_len` bytes, zeros if it fails. Returns whether it is right.
    pub(crate) fn open(&self, out: &mut [u8]) -> bool {
        let mut verdict = [false];
        let chunk = OpenChunk { items: std::slice::from_ref(self), out, verdicts: &mut verdict };
        open_chunk(&mut Opener::default(), chunk);
        verdict[0]
    }
}

/// Finds the keys of requests in one ring. Remembers the last: equal names mostly come one after the other.
pub(crate) struct Resolver<'a> {
    ring: &'a Ring,
    reading: Reading,
    last_named: Option<(&'a str, &'a Arc<Key>)>,
    last_described: Option<(&'a Arc<Key>, &'a Arc<KeyVersion>)>,
    missed: bool,
    summary: Summary,
}

/// What the items of a batch have in common, noted when they are found: a further pass over them would cost more.
#[derive(Clone, Copy, Default)]
pub(crate) struct Summary {
    /// Bytes of all data keys.
    dek_len: usize,
    /// Bytes of all AADs.
    aads_len: usize,
    /// Bits in which a length differs from the first one.
    len_differences: usize,
    several_versions: bool,
}

impl<'a> Resolver<'a> {
    pub(crate) fn new(ring: &'a Ring, reading: Reading) -> Self {
        Self {
            ring,
            reading,
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

    /// Finds the key version of a request, cuts its blob, and adds it to `items`.
    ///
    /// # Errors
    /// `DecryptFailed` for whatever only says that the blob is wrong; the request's and the key's own errors otherwise.
    #[inline(always)]
    pub(crate) fn resolve(
        &mut self,
        request: &DecryptRequest<'a>,
        index: usize,
        items: &mut Vec<Item<'a>>,
    ) -> Result<()> {
        check_aad(request.aad)?;
        let named = request.key_id.map(|name| self.named(name)).transpose();
        let described = match self.reading {
            Reading::Raw => None,
            Reading::Advance => self.described(request),
        };
        let named = named?;
        let (form, key, version, iv) = match described {
            Some((key, version, iv)) => {
                if let Some(named) = named.filter(|named| named.record.id != key.record.id) {
                    return Err(names_another(named, key));
                }
                (Form::SelfDescribing, key, version, iv)
            }
            None => {
                let (key, version) = self.raw_version(request, named)?;
                (Form::Raw, key, version, request.check_raw()?)
            }
        };
        if key.record.state != KeyState::Enabled {
            key.record.check_usable()?;
        }
        let parts = blob::cut(request.ciphertext_blob, form, version.wrapper.scheme())
            .filter(|parts| parts.dek_len() <= NUMBER_OF_BYTES_MAX)
            .ok_or_else(failed)?;
        let dek_len = parts.dek_len();
        self.summary.dek_len += dek_len;
        self.summary.aads_len += request.aad.len();
        if let Some(first) = items.first() {
            self.summary.len_differences |= dek_len ^ first.dek_len();
            self.summary.several_versions |= !Arc::ptr_eq(version, first.version);
        }
        items.push(Item {
            index: u32::try_from(index).expect("a batch has fewer than 2^32 items"),
            version,
            salt: parts.salt,
            iv,
            aad: request.aad,
            sealed: parts.sealed,
        });
        Ok(())
    }

    pub(crate) fn summary(&self) -> Summary {
        self.summary
    }

    #[inline]
    fn named(&mut self, name: &'a str) -> Result<&'a Arc<Key>> {
        if let Some((last, key)) = self.last_named
            && (std::ptr::eq(last, name) || last == name)
        {
            return Ok(key);
        }
        let key = self.ring.resolve(name);
        self.missed |= key.is_none();
        let key = key.ok_or_else(|| Error::key_not_found(name))?;
        self.last_named = Some((name, key));
        Ok(key)
    }

    /// What a self-describing blob says of itself; `None` for any other blob.
    fn described(&mut self, request: &DecryptRequest<'_>) -> Option<Described<'a>> {
        let (id, iv) = blob::head(request.ciphertext_blob)?;
        if let Some((key, version)) = self.last_described
            && version.id.as_bytes() == &id
        {
            return Some((key, version, iv));
        }
        let found = self.ring.version_by_bytes(&id);
        self.missed |= found.is_none() && KeyVersionId::from_bytes(&id).is_some();
        let (key, version) = found?;
        self.last_described = Some((key, version));
        Some((key, version, iv))
    }

    /// The version under which a raw blob is to be opened.
    #[inline]
    fn raw_version(
        &mut self,
        request: &DecryptRequest<'_>,
        named: Option<&'a Arc<Key>>,
    ) -> Result<(&'a Arc<Key>, &'a Arc<KeyVersion>)> {
        if let Some(key) = named {
            return Ok((key, key.initial()));
        }
        match (self.reading, request.key_version_id) {
            (Reading::Raw, Some(name)) => {
                let id = KeyVersionId::parse(name).ok_or_else(|| Error::key_not_found(name))?;
                let known = self.ring.version_by_bytes(id.as_bytes());
                self.missed |= known.is_none();
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

type Described<'a> = (&'a Arc<Key>, &'a Arc<KeyVersion>, Iv);

/// What a decrypting batch does, decided in full.
pub(crate) struct OpenPlan<'a> {
    /// In slot order: by length, and in request order within one.
    items: Vec<Item<'a>>,
    item_count: usize,
    summary: Summary,
}

/// What a decrypting batch leads to, beside the data keys.
pub(crate) struct Opened {
    /// Empty if every item is in the slot of its index.
    pub(crate) slots: Vec<u32>,
    pub(crate) runs: Vec<RunRecord>,
    pub(crate) refused: Vec<Error>,
}

impl<'a> OpenPlan<'a> {
    /// Orders the items by their lengths.
    ///
    /// # Errors
    /// `LimitExceeded` if the results are larger than one call may return.
    pub(crate) fn new(
        mut items: Vec<Item<'a>>,
        item_count: usize,
        summary: Summary,
    ) -> Result<Self> {
        check_output(summary.dek_len)?;
        if summary.len_differences != 0 {
            // Stable: items of one chunk stay together, and with them their salts.
            items.sort_by_key(Item::dek_len);
        }
        Ok(Self { items, item_count, summary })
    }

    /// Bytes of all data keys.
    pub(crate) fn dek_len(&self) -> usize {
        self.summary.dek_len
    }

    /// Opens everything into `deks`. `refused` are the items that the plan does not hold; those that fail are added.
    pub(crate) fn run(
        &self,
        fan_out: FanOut<'_>,
        deks: &mut [u8],
        mut refused: Vec<Error>,
    ) -> Opened {
        let mut verdicts = vec![false; self.items.len()];
        let chunk_items = self.chunk_items();
        let one_len = self.summary.len_differences == 0;
        let helpers = fan_out.helpers(self.items.len(), self.items.len() / CHUNK_ITEMS_MAX);
        let (mut out, mut verdicts_left) = (deks, &mut verdicts[..]);
        let parts = in_parts(&self.items, 1 + helpers).map(|items| {
            let all = items.len() == self.items.len();
            let len = if all { out.len() } else { items.iter().map(Item::dek_len).sum() };
            let rest = OpenChunk {
                items,
                out: out.split_off_mut(..len).expect("the items' lengths add up"),
                verdicts: verdicts_left.split_off_mut(..items.len()).expect("one for each item"),
            };
            OpenPart { rest, chunk_items, one_len }
        });
        fan_out.for_each(parts, &mut Opener::default(), open_chunk);

        let mut slots = Vec::new();
        if !refused.is_empty() || verdicts.contains(&false) || self.summary.len_differences != 0 {
            slots.resize(self.item_count, NO_SLOT);
            for ((item, verdict), slot) in self.items.iter().zip(&verdicts).zip(0..) {
                if *verdict {
                    slots[item.index as usize] = slot;
                } else {
                    refused.push(failed().with_index(item.index as usize));
                }
            }
        }
        refused.sort_unstable_by_key(Error::index);
        Opened { slots, runs: self.runs(), refused }
    }

    /// Items of a chunk: as many as are allowed, or as their bytes allow on average.
    fn chunk_items(&self) -> usize {
        let Summary { dek_len, aads_len, .. } = self.summary;
        let item_len = (2 * dek_len + aads_len) / self.items.len().max(1) + TAG_LEN;
        (CHUNK_BYTES_MAX / item_len).clamp(1, CHUNK_ITEMS_MAX)
    }

    fn runs(&self) -> Vec<RunRecord> {
        let Summary { len_differences, several_versions, .. } = self.summary;
        if let Some(first) =
            self.items.first().filter(|_| len_differences == 0 && !several_versions)
        {
            let (version, dek_len) = (first.version.id, first.dek_len());
            let (first_slot, blob_len, dek_at, blob_at) = (0, 0, 0, 0);
            return vec![RunRecord { first_slot, version, dek_len, blob_len, dek_at, blob_at }];
        }
        let mut runs: Vec<RunRecord> = Vec::new();
        let (mut dek_at, mut first_slot) = (0, 0);
        let same = |a: &Item<'_>, b: &Item<'_>| {
            Arc::ptr_eq(a.version, b.version) && a.dek_len() == b.dek_len()
        };
        for run in self.items.chunk_by(same) {
            let (version, dek_len) = (run[0].version.id, run[0].dek_len());
            runs.push(RunRecord { first_slot, version, dek_len, blob_len: 0, dek_at, blob_at: 0 });
            first_slot += run.len();
            dek_at += run.len() * dek_len;
        }
        runs
    }
}

struct OpenChunk<'a> {
    items: &'a [Item<'a>],
    out: &'a mut [u8],
    verdicts: &'a mut [bool],
}

/// Items whose chunks are cut when they are asked for.
struct OpenPart<'a> {
    rest: OpenChunk<'a>,
    chunk_items: usize,
    /// Whether all data keys have one length, so that nobody need add them up.
    one_len: bool,
}

impl<'a> Iterator for OpenPart<'a> {
    type Item = OpenChunk<'a>;

    fn next(&mut self) -> Option<OpenChunk<'a>> {
        let OpenChunk { items, out, verdicts } = &mut self.rest;
        let first_len = items.first()?.dek_len();
        let items = items.split_off(..self.chunk_items.min(items.len()))?;
        let len = match self.one_len {
            true => items.len() * first_len,
            false => items.iter().map(Item::dek_len).sum(),
        };
        Some(OpenChunk {
            items,
            out: out.split_off_mut(..len).expect("the items' lengths add up"),
            verdicts: verdicts.split_off_mut(..items.len()).expect("one for each item"),
        })
    }
}

/// Most keys that are derived at once: more would not stay in the cache between set-up and use.
const KEYS_AT_ONCE: usize = 64;

/// Memory of whoever opens chunks. Between chunks no key is in it.
struct Opener {
    derived: DerivedKeys,
    /// The version (by its address) and the salt of each derived key.
    known: [(usize, [u8; SALT_LEN]); KEYS_AT_ONCE],
    count: usize,
    /// Where a salt may be found, by one of its bytes. Salts are random; what others send costs a derivation at most.
    places: [u8; 256],
}

impl Default for Opener {
    fn default() -> Self {
        Self {
            derived: DerivedKeys::new(),
            known: [(0, [0; SALT_LEN]); KEYS_AT_ONCE],
            count: 0,
            places: [0; 256],
        }
    }
}

/// Items that go to the kernel in one call, and what goes with them.
struct Block<'a> {
    ivs: [Iv; BLOCK_ITEMS],
    aads: [&'a [u8]; BLOCK_ITEMS],
    sealed: [&'a [u8]; BLOCK_ITEMS],
    /// The derived key of each item; [`OF_VERSION`] for those that the version itself opens.
    places: [u8; BLOCK_ITEMS],
}

const OF_VERSION: u8 = u8::MAX;
const _: () = assert!(KEYS_AT_ONCE < OF_VERSION as usize);

/// Opens a chunk. What goes to the kernel by the block lies in this frame and holds no secret, so that the frames of
/// the kernels begin right below and can be overwritten from here.
#[inline(never)]
fn open_chunk(opener: &mut Opener, chunk: OpenChunk<'_>) {
    let OpenChunk { items, mut out, mut verdicts } = chunk;
    let mut block = Block {
        ivs: [[0; IV_LEN]; BLOCK_ITEMS],
        aads: [&[]; BLOCK_ITEMS],
        sealed: [&[]; BLOCK_ITEMS],
        places: [OF_VERSION; BLOCK_ITEMS],
    };
    opener.forget();
    for run in items.chunk_by(|a, b| a.dek_len() == b.dek_len()) {
        let mut run = run;
        while let Some(first) = run.first() {
            let count = opener.set_up(run, &mut block.places);
            let items = run.split_off(..count).expect("no more than there are");
            let out = out.split_off_mut(..count * first.dek_len()).expect("lengths add up");
            let verdicts = verdicts.split_off_mut(..count).expect("one for each item");
            let (ivs, aads) = (&mut block.ivs[..count], &mut block.aads[..count]);
            let sealed = &mut block.sealed[..count];
            for (i, item) in items.iter().enumerate() {
                (ivs[i], aads[i], sealed[i]) = (item.iv, item.aad, item.sealed);
            }
            let place = block.places[0];
            let derived = &opener.derived;
            let mut each;
            let uniform = place != OF_VERSION || items.iter().all(|item| item.shares_key(first));
            let keys = if uniform && block.places[..count].iter().all(|other| *other == place) {
                Keys::One(first.key(place, derived))
            } else {
                each = [first.key(place, derived); BLOCK_ITEMS];
                let each = &mut each[..count];
                for ((each, item), place) in each.iter_mut().zip(items).zip(&block.places) {
                    *each = item.key(*place, derived);
                }
                Keys::Each(each)
            };
            let len = first.dek_len();
            kernel::open_many(kernel::Open { keys, ivs, aads, sealed, len, out, verdicts });
        }
    }
    zeroize_stack::<{ kernel::STACK_LEN }>();
    opener.forget();
}

impl Opener {
    /// Wipes the keys and keeps their memory.
    fn forget(&mut self) {
        self.derived.clear();
        self.count = 0;
    }

    /// The place of the key that opens `item`, if it is there or about to be.
    fn place_of(&self, item: &Item<'_>) -> Option<u8> {
        let place = self.places[usize::from(item.salt[0])];
        let known = self.known[..self.count].get(usize::from(place))?;
        (*known == item.place()).then_some(place)
    }

    /// Sets up the keys of the first of `items`, which are one at least, and says of how many: a block, or so many as
    /// [`KEYS_AT_ONCE`] keys open. Keys of earlier blocks are used again if they are all that is needed.
    fn set_up(&mut self, items: &[Item<'_>], places: &mut [u8; BLOCK_ITEMS]) -> usize {
        let mut fresh: [Option<Derivation<'_>>; KEYS_AT_ONCE] = [None; KEYS_AT_ONCE];
        let mut fresh_count = 0;
        let mut count = 0;
        let mut last: Option<(&Item<'_>, u8)> = None;
        for (item, place) in items.iter().zip(&mut places[..]) {
            *place = match (&item.version.wrapper, last) {
                (Wrapper::Direct(_), _) => OF_VERSION,
                (_, Some((last, place))) if last.shares_key(item) => place,
                (Wrapper::Derived { root, .. }, _) => match self.place_of(item) {
                    Some(known) => known,
                    None if fresh_count == KEYS_AT_ONCE => break,
                    // Nothing can be added to the keys of earlier blocks: they make room, for the next block.
                    None if fresh_count == 0 && self.count > 0 && count > 0 => break,
                    None => {
                        fresh[fresh_count] = Some(Derivation { root, salt: item.salt });
                        self.known[fresh_count] = item.place();
                        let place = u8::try_from(fresh_count).expect("at most KEYS_AT_ONCE");
                        self.places[usize::from(item.salt[0])] = place;
                        fresh_count += 1;
                        self.count = fresh_count;
                        place
                    }
                },
            };
            last = Some((item, *place));
            count += 1;
        }
        if fresh_count > 0 {
            let fresh = &fresh[..fresh_count];
            self.derived.derive_many(fresh.iter().map(|one| one.expect("set above")));
        }
        count
    }
}
