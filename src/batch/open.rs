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
    resolve::{Item, Summary, failed},
    result::RunRecord,
};
use crate::{
    error::{Error, Result},
    kernel::{self, Iv, KeyRef, Keys},
    keys::ring::KeyVersion,
    limits::{BLOCK_ITEMS, CHUNK_BYTES_MAX, CHUNK_ITEMS_MAX, IV_LEN, SALT_LEN, TAG_LEN},
    request::DecryptRequest,
    wrap::{
        Wrapper,
        blob::Parts,
        derived::{Derivation, DerivedKeys},
    },
};

/// What a decrypting batch does, decided in full.
pub(crate) struct OpenPlan<'a> {
    requests: &'a [DecryptRequest<'a>],
    /// In slot order: by length, and in request order within one.
    items: Vec<Item<'a>>,
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
        requests: &'a [DecryptRequest<'a>],
        mut items: Vec<Item<'a>>,
        summary: Summary,
    ) -> Result<Self> {
        check_output(summary.dek_len)?;
        if summary.len_differences != 0 {
            // Stable: items of one chunk stay together, and with them their salts.
            items.sort_by_key(Item::dek_len);
        }
        Ok(Self { requests, items, summary })
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
        fan_out.for_each(parts, &mut Opener::default(), |opener, chunk| {
            open_chunk(opener, self.requests, chunk);
        });

        let mut slots = Vec::new();
        if !refused.is_empty() || verdicts.contains(&false) || self.summary.len_differences != 0 {
            slots.resize(self.requests.len(), NO_SLOT);
            for ((item, verdict), slot) in self.items.iter().zip(&verdicts).zip(0..) {
                if *verdict {
                    slots[item.index()] = slot;
                } else {
                    refused.push(failed().with_index(item.index()));
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

/// Opens the blob of `request`, for which `item` was found, into `out`, `dek_len` bytes, zeros if it fails. Returns
/// whether it is right.
pub(crate) fn open_one(request: &DecryptRequest<'_>, item: &Item<'_>, out: &mut [u8]) -> bool {
    let (items, mut verdict) = (std::slice::from_ref(item), [false]);
    let chunk = OpenChunk { items, out, verdicts: &mut verdict };
    open_chunk(&mut Opener::default(), std::slice::from_ref(request), chunk);
    verdict[0]
}

/// Most keys that are derived at once: more would not stay in the cache between set-up and use.
const KEYS_AT_ONCE: usize = 64;

/// Memory of whoever opens chunks. Between chunks no key is in it.
struct Opener {
    derived: DerivedKeys,
    /// The version (by its address) and the salt of each derived key.
    known: [(usize, Salt); KEYS_AT_ONCE],
    count: usize,
    /// Where a salt may be found, by one of its bytes. Salts are random; what others send costs a derivation at most.
    places: [u8; 256],
}

type Salt = [u8; SALT_LEN];

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
    /// What has to be derived for the block, from the first on.
    fresh: [Option<Derivation<'a>>; KEYS_AT_ONCE],
}

const OF_VERSION: u8 = u8::MAX;
const _: () = assert!(KEYS_AT_ONCE < OF_VERSION as usize);

/// The first items of one length, whose parts are in a block.
struct Filled {
    count: usize,
    /// Whether one key opens all.
    one_key: bool,
}

/// Opens a chunk. What goes to the kernel by the block lies in this frame and holds no secret, so that the frames of
/// the kernels begin right below and can be overwritten from here.
#[inline(never)]
fn open_chunk(opener: &mut Opener, requests: &[DecryptRequest<'_>], chunk: OpenChunk<'_>) {
    let OpenChunk { items, mut out, mut verdicts } = chunk;
    let mut block = Block {
        ivs: [[0; IV_LEN]; BLOCK_ITEMS],
        aads: [&[]; BLOCK_ITEMS],
        sealed: [&[]; BLOCK_ITEMS],
        places: [OF_VERSION; BLOCK_ITEMS],
        fresh: [None; KEYS_AT_ONCE],
    };
    opener.forget();
    let mut rest = items;
    while let Some(first) = rest.first() {
        let Filled { count, one_key } = opener.fill(&mut block, requests, rest);
        let items = rest.split_off(..count).expect("no more than there are");
        let len = first.dek_len();
        let out = out.split_off_mut(..count * len).expect("lengths add up");
        let verdicts = verdicts.split_off_mut(..count).expect("one for each item");
        let derived = &opener.derived;
        let first_key = key_at(block.places[0], first.version, derived);
        let mut each;
        let keys = if one_key {
            Keys::One(first_key)
        } else {
            each = [first_key; BLOCK_ITEMS];
            let each = &mut each[..count];
            for ((each, item), place) in each.iter_mut().zip(items).zip(&block.places) {
                *each = key_at(*place, item.version, derived);
            }
            Keys::Each(each)
        };
        let (ivs, aads) = (&block.ivs[..count], &block.aads[..count]);
        let sealed = &block.sealed[..count];
        kernel::open_many(kernel::Open { keys, ivs, aads, sealed, len, out, verdicts });
    }
    zeroize_stack::<{ kernel::STACK_LEN }>();
    opener.forget();
}

/// The key of an item: its version's own, or the derived one at `place`.
fn key_at<'k>(place: u8, version: &'k KeyVersion, derived: &'k DerivedKeys) -> KeyRef<'k> {
    match &version.wrapper {
        Wrapper::Direct(key) => key.key(),
        Wrapper::Derived { .. } => derived.key(place.into()),
    }
}

impl Opener {
    /// Wipes the keys and keeps their memory.
    fn forget(&mut self) {
        self.derived.clear();
        self.count = 0;
    }

    /// Puts the parts of the first of `items`, which are one at least, into `block` and sets their keys up: so many of
    /// one length as a block has, or as [`KEYS_AT_ONCE`] keys open. Keys of earlier blocks are used again if they are
    /// all that is needed.
    #[inline]
    fn fill<'a>(
        &mut self,
        block: &mut Block<'a>,
        requests: &'a [DecryptRequest<'a>],
        items: &'a [Item<'a>],
    ) -> Filled {
        let (mut count, mut fresh_count, mut switches) = (0, 0, 0);
        let mut place = OF_VERSION;
        let mut last: Option<(&Arc<KeyVersion>, Salt)> = None;
        let len = items.first().map(Item::dek_len);
        for item in items.iter().take(BLOCK_ITEMS) {
            if Some(item.dek_len()) != len {
                break;
            }
            let request = &requests[item.index()];
            let Parts { salt, sealed } = item.cut(request);
            let version = item.version;
            let goes_on = last.is_some_and(|(of_last, salt_of_last)| {
                Arc::ptr_eq(of_last, version) && salt_of_last == salt
            });
            if !goes_on {
                match self.place_for(version, salt, &mut block.fresh, &mut fresh_count, count > 0) {
                    Some(found) => place = found,
                    None => break,
                }
                last = Some((version, salt));
                switches += 1;
            }
            block.ivs[count] = *item.iv(request);
            block.aads[count] = request.aad;
            block.sealed[count] = sealed;
            block.places[count] = place;
            count += 1;
        }
        if fresh_count > 0 {
            let fresh = &block.fresh[..fresh_count];
            self.derived.derive_many(fresh.iter().map(|one| one.expect("set above")));
        }
        Filled { count, one_key: switches == 1 }
    }

    /// The place of the key that a version has for `salt`, if it is there or can be derived with the `fresh` ones.
    /// `begun` is whether other items of the block have their keys already.
    #[inline]
    fn place_for<'a>(
        &mut self,
        version: &'a Arc<KeyVersion>,
        salt: Salt,
        fresh: &mut [Option<Derivation<'a>>; KEYS_AT_ONCE],
        fresh_count: &mut usize,
        begun: bool,
    ) -> Option<u8> {
        let Wrapper::Derived { root, .. } = &version.wrapper else { return Some(OF_VERSION) };
        let asked = (Arc::as_ptr(version) as usize, salt);
        let place = &mut self.places[usize::from(salt[0])];
        if self.known[..self.count].get(usize::from(*place)) == Some(&asked) {
            return Some(*place);
        }
        // Nothing can be added to the keys of earlier blocks: they make room, for the next block.
        if *fresh_count == KEYS_AT_ONCE || (*fresh_count == 0 && self.count > 0 && begun) {
            return None;
        }
        fresh[*fresh_count] = Some(Derivation { root, salt });
        self.known[*fresh_count] = asked;
        *place = u8::try_from(*fresh_count).expect("at most KEYS_AT_ONCE");
        *fresh_count += 1;
        self.count = *fresh_count;
        Some(*place)
    }
}
