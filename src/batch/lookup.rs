//! From the name and length of a request to its group, while a batch is planned.

use std::{
    collections::HashMap,
    hash::{Hash, Hasher},
    sync::Arc,
};

use foldhash::fast::RandomState;

use super::plan::{Group, add_group};
use crate::{
    error::{Error, Result},
    keys::ring::Ring,
    request::{GenerateDataKeyRequest, Operation, check_number_of_bytes},
    wrap::blob::Form,
};

/// Names for which a lookup has room from the start: about 80 KiB, which an allocator has at hand.
const NAMES_EXPECTED_MAX: usize = 1700;

/// Finds the group of a name and a length.
pub(super) struct Lookup<'r, 'a> {
    ring: &'r Ring,
    operation: Operation,
    /// What was asked for last, and what it led to.
    last: Option<(Asked<'a>, Result<u32>)>,
    /// Whether the last is in `known`: it comes there when another one follows, so that a batch of one name needs no
    /// map.
    last_is_known: bool,
    known: HashMap<Asked<'a>, Result<u32>, RandomState>,
    /// Room for so many, if any: growing costs more than looking up.
    names_expected: usize,
    /// Groups by version and length, but for the first: two names may mean one key.
    of_version: HashMap<(usize, usize), u32, RandomState>,
}

/// A name and a length.
#[derive(Clone, Copy)]
struct Asked<'a> {
    name: &'a str,
    number_of_bytes: u32,
    /// The first and the last eight bytes of the name: all of most names, so that comparing and hashing them calls no
    /// function and touches no other memory.
    ends: [u64; 2],
}

impl<'a> Asked<'a> {
    /// Names up to this length are their two ends.
    const ENDS_LEN: usize = 16;

    #[inline]
    fn new(name: &'a str, number_of_bytes: u32) -> Self {
        let bytes = name.as_bytes();
        let ends = match (bytes.first_chunk(), bytes.last_chunk()) {
            (Some(first), Some(last)) => [*first, *last].map(u64::from_ne_bytes),
            _ => {
                let mut short = [0; 8];
                short[..bytes.len()].copy_from_slice(bytes);
                [u64::from_ne_bytes(short), 0]
            }
        };
        Self { name, number_of_bytes, ends }
    }
}

impl PartialEq for Asked<'_> {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.ends == other.ends
            && self.number_of_bytes == other.number_of_bytes
            && self.name.len() == other.name.len()
            && (self.name.len() <= Self::ENDS_LEN
                // The same text at the same place needs no comparison of bytes.
                || std::ptr::eq(self.name, other.name)
                || self.name == other.name)
    }
}

impl Eq for Asked<'_> {}

impl Hash for Asked<'_> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        if self.name.len() <= Self::ENDS_LEN {
            // Two words, which a folded multiplication takes at once. Length and number are small and leave most of the
            // second one to the name.
            let small = (self.name.len() as u64) << 56 ^ u64::from(self.number_of_bytes) << 40;
            state.write_u64(self.ends[0]);
            state.write_u64(self.ends[1] ^ small);
        } else {
            // All of it: names that differ in their middle alone must not be made to collide.
            state.write_u32(self.number_of_bytes);
            state.write(self.name.as_bytes());
        }
    }
}

impl<'r, 'a> Lookup<'r, 'a> {
    pub(super) fn new(ring: &'r Ring, operation: Operation, item_count: usize) -> Self {
        let (known, of_version) = (HashMap::default(), HashMap::default());
        let names_expected = item_count.min(NAMES_EXPECTED_MAX);
        Self {
            ring,
            operation,
            last: None,
            last_is_known: false,
            known,
            names_expected,
            of_version,
        }
    }

    #[inline]
    pub(super) fn group(
        &mut self,
        groups: &mut Vec<Group>,
        request: &GenerateDataKeyRequest<'a>,
    ) -> Result<u32> {
        let asked = Asked::new(request.key_id, request.number_of_bytes);
        if let Some((last, found)) = &self.last
            && *last == asked
        {
            return found.clone();
        }
        self.look_up(groups, asked)
    }

    fn look_up(&mut self, groups: &mut Vec<Group>, asked: Asked<'a>) -> Result<u32> {
        if let Some((last, found)) = self.last.take().filter(|_| !self.last_is_known) {
            if self.known.capacity() == 0 {
                self.known.reserve(self.names_expected);
            }
            self.known.insert(last, found);
        }
        let known = self.known.get(&asked).cloned();
        self.last_is_known = known.is_some();
        let found = known.unwrap_or_else(|| self.find(groups, asked));
        self.last = Some((asked, found.clone()));
        found
    }

    fn find(&mut self, groups: &mut Vec<Group>, asked: Asked<'a>) -> Result<u32> {
        let dek_len = check_number_of_bytes(asked.number_of_bytes)?;
        let key = self.ring.resolve(asked.name).ok_or_else(|| Error::key_not_found(asked.name))?;
        key.record.check_usable()?;
        let version = key.version_for(self.operation.form() == Form::SelfDescribing);
        let operation = self.operation;
        // A batch of one group needs no map.
        let Some(first) = groups.first() else {
            return Ok(add_group(groups, key, operation, dek_len));
        };
        if Arc::ptr_eq(first.version(), version) && first.layout.dek_len == dek_len {
            return Ok(0);
        }
        if self.of_version.capacity() == 0 {
            self.of_version.reserve(self.names_expected);
        }
        let place = (Arc::as_ptr(version) as usize, dek_len);
        let add = || add_group(groups, key, operation, dek_len);
        Ok(*self.of_version.entry(place).or_insert_with(add))
    }
}
