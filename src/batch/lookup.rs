//! From the name and length of a request to its group, while a batch is planned.

use std::{
    hash::{BuildHasher, Hash, Hasher},
    sync::Arc,
};

use foldhash::fast::RandomState;

use super::{name::Name, plan::Group};
use crate::{
    error::{Error, Result},
    kernel,
    keys::{
        access::{Access, Gate},
        ring::{Key, KeyVersion, Ring},
    },
    limits::AAD_LEN_MAX,
    request::{GenerateDataKeyRequest, Operation, check_number_of_bytes},
    wrap::blob::Form,
};

/// Names for which a lookup has room from the start: about 80 KiB, which an allocator has at hand.
const NAMES_EXPECTED_MAX: usize = 1700;

/// Finds the groups of names and lengths, in two steps: [`Lookup::ask`] tells them apart; [`Lookup::find_all`] then
/// looks for their keys, one straight after another, so that the core waits for many of them at once.
pub(super) struct Lookup<'r, 'a> {
    ring: &'r Ring,
    gate: Gate<'r>,
    operation: Operation,
    /// What was asked for first.
    first: Option<Asked<'a>>,
    /// Whatever was asked for, each once, in order. A batch of one name needs none.
    asked: Vec<Asked<'a>>,
    /// What was asked for last, and its number.
    last: Option<Asked<'a>>,
    last_number: u32,
    /// Names are chosen by callers.
    hasher: RandomState,
    /// Where each of `asked` is. A batch of one name needs none.
    places: Places,
    /// Room for so many, if any: growing costs more than looking up.
    names_expected: usize,
}

/// A name and a length.
#[derive(Clone, Copy)]
struct Asked<'a> {
    name: Name<'a>,
    number_of_bytes: u32,
}

impl<'a> Asked<'a> {
    #[inline]
    fn new(request: &GenerateDataKeyRequest<'a>) -> Self {
        let GenerateDataKeyRequest { key_id, number_of_bytes, .. } = *request;
        Self { name: Name::new(key_id), number_of_bytes }
    }
}

impl PartialEq for Asked<'_> {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.number_of_bytes == other.number_of_bytes && self.name == other.name
    }
}

impl Eq for Asked<'_> {}

impl Hash for Asked<'_> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Everything here is chosen by callers. Each part is a word of its own, with a multiplication under the
        // hasher's secret between it and the others: two parts in one word would let a caller cancel one by the other,
        // and then no seed keeps such names apart.
        let name = self.name.as_str();
        if let Some([first, last]) = self.name.whole_ends() {
            state.write_u64(first);
            state.write_u64(last);
            state.write_u64((name.len() as u64) << 32 | u64::from(self.number_of_bytes));
        } else {
            // All of it: names that differ in their middle alone must not be made to collide.
            state.write(name.as_bytes());
            state.write_u32(self.number_of_bytes);
        }
    }
}

impl<'r, 'a> Lookup<'r, 'a> {
    pub(super) fn new(
        ring: &'r Ring,
        access: &'r dyn Access,
        operation: Operation,
        item_count: usize,
    ) -> Self {
        Self {
            ring,
            gate: Gate::new(access),
            operation,
            first: None,
            asked: Vec::new(),
            last: None,
            last_number: 0,
            hasher: RandomState::default(),
            places: Places::default(),
            names_expected: item_count.min(NAMES_EXPECTED_MAX),
        }
    }

    /// Asks for the first of `requests`, which gets number 0, and counts how many from the start on have its name and
    /// length. An AAD that is too long ends them: parameters are checked before the key, as the KMS seems to do.
    pub(super) fn ask_first(&mut self, requests: &[GenerateDataKeyRequest<'a>]) -> usize {
        let usable = |request: &&GenerateDataKeyRequest<'_>| request.aad.len() <= AAD_LEN_MAX;
        self.first = requests.first().filter(usable).map(Asked::new);
        self.last = self.first;
        let alike = |request| usable(&request) && Some(Asked::new(request)) == self.first;
        requests.iter().position(|request| !alike(request)).unwrap_or(requests.len())
    }

    /// The number of a request's name and length: 0 for the first, and so on.
    #[inline]
    pub(super) fn ask(&mut self, request: &GenerateDataKeyRequest<'a>) -> u32 {
        let asked = Asked::new(request);
        if self.last != Some(asked) {
            let hash = self.hasher.hash_one(asked);
            let known = &self.asked[..];
            let place = self.places.find(hash, |place| known[place as usize] == asked);
            self.last_number = match place {
                Some(place) => place,
                None => self.add(asked, hash),
            };
            self.last = Some(asked);
        }
        self.last_number
    }

    /// Numbers what is not in the list.
    #[cold]
    #[inline(never)]
    fn add(&mut self, asked: Asked<'a>, hash: u64) -> u32 {
        let Self { first, asked: known, hasher, places, .. } = self;
        if known.is_empty() {
            let Some(first) = *first else {
                *first = Some(asked);
                return 0;
            };
            // Until now there was one name, and the list was not needed.
            known.reserve(self.names_expected);
            *places = Places::new(self.names_expected);
            known.push(first);
            places.insert(hasher.hash_one(first), 0);
            if first == asked {
                return 0;
            }
        }
        let number = number(known.len());
        places.make_room(known.len(), known.iter().map(|known| hasher.hash_one(known)));
        places.insert(hash, number);
        known.push(asked);
        number
    }

    /// What each name and length leads to, in the order of their numbers: a group, in the order of these. Nothing for
    /// one name that leads to a group.
    pub(super) fn find_all(self, groups: &mut Vec<Group>) -> Vec<Result<u32>> {
        let Self { ring, gate, asked, hasher, .. } = self;
        let form = self.operation.form();
        let group = |(key, version, dek_len): (&Arc<Key>, &KeyVersion, _)| {
            Group::new(Arc::clone(key), version.id, form, dek_len)
        };
        let version_of = |key: &'r Arc<Key>| &**key.version_for(form == Form::SelfDescribing);
        if asked.is_empty() {
            let resolve = |asked: Asked<'_>| ring.resolve(asked.name.as_str());
            let found = self.first.map(|asked| usable(&asked, resolve(asked), gate));
            return match found {
                None => Vec::new(),
                Some(Ok((key, dek_len))) => {
                    groups.push(group((key, version_of(key), dek_len)));
                    Vec::new()
                }
                Some(Err(error)) => vec![Err(error)],
            };
        }
        // Step by step for all of them: what a step finds is in the cache when the next one reads it.
        let resolve =
            |asked: &Asked<'_>| ring.resolve(asked.name.as_str()).inspect(|key| key.prefetch());
        let keys: Vec<Option<&Arc<Key>>> = asked.iter().map(resolve).collect();
        let mut wanted: Vec<(&Arc<Key>, &KeyVersion, usize)> = Vec::with_capacity(asked.len());
        // Where each of `wanted` is: two names may mean one key.
        let mut places = Places::new(asked.len());
        let find = |(asked, key)| {
            let (key, dek_len) = usable(asked, key, gate)?;
            let hash = hasher.hash_one((Arc::as_ptr(key), dek_len));
            let is = |place: u32| {
                let (other, _, len) = wanted[place as usize];
                Arc::ptr_eq(other, key) && len == dek_len
            };
            if let Some(known) = places.find(hash, is) {
                return Ok(known);
            }
            let number = number(wanted.len());
            places.insert(hash, number);
            let version = version_of(key);
            kernel::prefetch(&version.id);
            wanted.push((key, version, dek_len));
            Ok(number)
        };
        let found = asked.iter().zip(keys).map(find).collect();
        // Last: to count a reference is to wait for everything before it.
        groups.extend(wanted.into_iter().map(group));
        found
    }
}

/// # Errors
/// Why nothing can be generated for what was asked for, if `key` is the key of the name.
fn usable<'r>(
    asked: &Asked<'_>,
    key: Option<&'r Arc<Key>>,
    gate: Gate<'_>,
) -> Result<(&'r Arc<Key>, usize)> {
    let dek_len = check_number_of_bytes(asked.number_of_bytes)?;
    let key = key.ok_or_else(|| Error::key_not_found(asked.name.as_str()))?;
    gate.check(key, Some(asked.name.as_str()))?;
    key.record.check_usable()?;
    Ok((key, dek_len))
}

/// There are no more names and no more groups than items.
fn number(count: usize) -> u32 {
    u32::try_from(count).expect("no more than items")
}

/// Finds places in a list by hash: open addressing, a word for each place, so that what is looked for is in the first
/// cache and what is found is nowhere twice.
#[derive(Default)]
struct Places {
    /// One more than a place, 0 where there is none. At most half are taken; a power of two, once there are any.
    slots: Vec<u32>,
}

impl Places {
    fn new(expected: usize) -> Self {
        Self { slots: vec![0; (2 * expected).next_power_of_two()] }
    }

    #[inline]
    fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        let last = self.slots.len().checked_sub(1)?;
        let mut slot = self.start(hash);
        loop {
            let place = self.slots[slot & last].checked_sub(1)?;
            if is(place) {
                return Some(place);
            }
            slot += 1;
        }
    }

    /// Takes in a place that is not there, for which there must be room.
    fn insert(&mut self, hash: u64, place: u32) {
        let mut slot = self.start(hash);
        while self.slots[slot] != 0 {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = place + 1;
    }

    /// Makes room for one more than the `count` places 0, 1, ..., which have these hashes.
    fn make_room(&mut self, count: usize, hashes: impl Iterator<Item = u64>) {
        if 2 * count < self.slots.len() {
            return;
        }
        *self = Self::new(self.slots.len());
        for (hash, place) in hashes.zip(0..) {
            self.insert(hash, place);
        }
    }

    #[inline]
    fn start(&self, hash: u64) -> usize {
        let last = self.slots.len() - 1;
        usize::try_from(hash & last as u64).expect("below a length")
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, collections::HashSet};

    use super::*;

    /// Keeps the words that are hashed.
    #[derive(Default)]
    struct Words(Vec<u64>);

    impl Hasher for Words {
        fn write(&mut self, bytes: &[u8]) {
            self.0.extend(bytes.iter().map(|byte| u64::from(*byte)));
        }

        fn write_u32(&mut self, word: u32) {
            self.0.push(word.into());
        }

        fn write_u64(&mut self, word: u64) {
            self.0.push(word);
        }

        fn finish(&self) -> u64 {
            unreachable!("the words are looked at")
        }
    }

    /// Names of `len` bytes, and numbers made of the same three bytes, for `len` up to 16 and beyond: what a caller
    /// would send whose number takes back what it has changed in the name, at any place of it.
    fn cancelling(len: usize, at: usize) -> Vec<(String, u32)> {
        let mut all = Vec::new();
        for bits in 0..1_u32 << 15 {
            let [one, two, three] =
                [0, 5, 10].map(|shift| u8::try_from(bits >> shift & 31).unwrap());
            let mut name = vec![b'a'; len];
            for (byte, change) in name[at..].iter_mut().zip([one, two, three]) {
                *byte ^= change;
            }
            let number = u32::from_le_bytes([one, two, three, 0]);
            all.push((String::from_utf8(name).unwrap(), number));
        }
        all
    }

    #[test]
    fn no_part_of_a_name_and_no_number_cancel_each_other() {
        for (len, at) in [(3, 0), (8, 5), (13, 10), (13, 5), (16, 8), (16, 13), (17, 14), (40, 20)]
        {
            let family = cancelling(len, at);
            let asked = |(name, number): &(String, u32)| {
                let mut words = Words::default();
                Asked { name: Name::new(name), number_of_bytes: *number }.hash(&mut words);
                words.0
            };
            let words: HashSet<Vec<u64>> = family.iter().map(asked).collect();
            assert_eq!(words.len(), family.len(), "{len} {at}");

            // What it costs to take them all in, whatever the seed.
            let (hasher, compared) = (RandomState::default(), Cell::new(0));
            let mut places = Places::new(family.len());
            for (place, (name, number)) in (0..).zip(&family) {
                let hash =
                    hasher.hash_one(Asked { name: Name::new(name), number_of_bytes: *number });
                let is = |_| {
                    compared.set(compared.get() + 1);
                    false
                };
                assert_eq!(places.find(hash, is), None);
                places.insert(hash, place);
            }
            // Half of the places are free, so that a search meets another name or two.
            let compared = compared.get();
            assert!(compared < 4 * family.len(), "{len} {at}: {compared} comparisons");
        }
    }

    #[test]
    fn places_are_found_in_spite_of_equal_hashes_and_growth() {
        let hash = |place: u32| u64::from(place / 5) * 0x1_0000_0001;
        let mut places = Places::new(1);
        for place in 0..1000 {
            assert_eq!(places.find(hash(place), |found| found == place), None);
            places.make_room(place as usize, (0..place).map(hash));
            places.insert(hash(place), place);
        }
        for place in 0..1000 {
            assert_eq!(places.find(hash(place), |found| found == place), Some(place));
        }
        assert!(places.slots.contains(&0), "a search for what is missing must end");
    }
}
