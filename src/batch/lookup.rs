//! From the name and length of a request to its group, while a batch is planned.

use std::{
    collections::HashMap,
    hash::{Hash, Hasher},
    sync::Arc,
};

use foldhash::fast::RandomState;

use super::{
    name::Name,
    plan::{Group, add_group},
};
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
#[derive(Clone, Copy, PartialEq, Eq)]
struct Asked<'a> {
    name: Name<'a>,
    number_of_bytes: u32,
}

impl Hash for Asked<'_> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        let name = self.name.as_str();
        if let Some([first, last]) = self.name.whole_ends() {
            // Two words, which a folded multiplication takes at once. Length and number are small and leave most of the
            // second one to the name.
            let small = (name.len() as u64) << 56 ^ u64::from(self.number_of_bytes) << 40;
            state.write_u64(first);
            state.write_u64(last ^ small);
        } else {
            // All of it: names that differ in their middle alone must not be made to collide.
            state.write_u32(self.number_of_bytes);
            state.write(name.as_bytes());
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
        let GenerateDataKeyRequest { key_id, number_of_bytes, .. } = *request;
        let asked = Asked { name: Name::new(key_id), number_of_bytes };
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
        let name = asked.name.as_str();
        let key = self.ring.resolve(name).ok_or_else(|| Error::key_not_found(name))?;
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
