//! What a pool is told: which keys it makes, and how many.

use std::time::Duration;

use crate::{
    error::{Error, Result},
    limits::{
        KEY_POOL_AGE_DEFAULT, KEY_POOL_CAPACITY_DEFAULT, KEY_POOL_CAPACITY_MAX,
        KEY_POOL_MAGAZINE_ITEMS,
    },
    request::{Operation, check_aad, check_number_of_bytes},
};

/// What a [`KeyPool`](super::KeyPool) makes, and how much of it.
#[derive(Clone, Debug)]
#[must_use]
pub struct KeyPoolConfig {
    pub(super) operation: Operation,
    pub(super) number_of_bytes: u32,
    pub(super) aad: Vec<u8>,
    pub(super) capacity: usize,
    pub(super) low_watermark: Option<usize>,
    pub(super) max_age: Duration,
}

impl KeyPoolConfig {
    /// Keys of this length, made by this operation, without AAD: at most 1,024 of them, five minutes old at most.
    pub fn new(operation: Operation, number_of_bytes: u32) -> Self {
        Self {
            operation,
            number_of_bytes,
            aad: Vec::new(),
            capacity: KEY_POOL_CAPACITY_DEFAULT,
            low_watermark: None,
            max_age: KEY_POOL_AGE_DEFAULT,
        }
    }

    /// The AAD of all keys, at most 8192 bytes.
    pub fn aad(mut self, aad: &[u8]) -> Self {
        self.aad = aad.to_vec();
        self
    }

    /// Most keys that wait: 1 to 1,048,576. Each takes about 300 bytes.
    pub fn capacity(mut self, keys: usize) -> Self {
        self.capacity = keys;
        self
    }

    /// The pool is refilled when fewer keys than this are left: three tenths of the capacity unless set.
    pub fn low_watermark(mut self, keys: usize) -> Self {
        self.low_watermark = Some(keys);
        self
    }

    /// The age at which a key that nobody took is dropped, by a clock of a few milliseconds' resolution.
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = age;
        self
    }

    pub(super) fn watermark(&self) -> usize {
        self.low_watermark.unwrap_or(self.capacity * 3 / 10).max(1)
    }

    /// Keys of a magazine: a thread takes so many before it looks into the queue again.
    pub(super) fn magazine(&self) -> usize {
        (self.capacity / 32).clamp(1, KEY_POOL_MAGAZINE_ITEMS)
    }

    pub(super) fn max_age_ms(&self) -> u64 {
        // An age below a millisecond is one.
        u64::try_from(self.max_age.as_millis()).unwrap_or(u64::MAX).max(1)
    }

    pub(super) fn check(&self) -> Result<()> {
        check_number_of_bytes(self.number_of_bytes)?;
        check_aad(&self.aad)?;
        let capacity = self.capacity;
        if !(1..=KEY_POOL_CAPACITY_MAX).contains(&capacity) {
            return Err(Error::invalid(format!(
                "The pool's capacity {capacity} is outside 1 to {KEY_POOL_CAPACITY_MAX}."
            )));
        }
        if let Some(low) = self.low_watermark.filter(|low| *low > capacity) {
            return Err(Error::invalid(format!(
                "The pool's low watermark {low} is above its capacity {capacity}."
            )));
        }
        if self.max_age.is_zero() {
            return Err(Error::invalid("The pool's maximum age is zero: no key could be taken."));
        }
        Ok(())
    }
}
