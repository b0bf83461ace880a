//! Request ids: lower-case UUIDs, one random base a batch, the item's index added into its last 48 bits.
//!
//! An id is a label for logs and support, not a secret.

use std::fmt;

use uuid::{Builder, Uuid};

/// The id of one request, or of one item of a batch: a version 4 UUID when it stands alone.
///
/// `Display` prints the 36 lower-case characters that the KMS prints.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId(Uuid);

impl RequestId {
    /// No request's.
    pub(crate) const NIL: Self = Self(Uuid::nil());

    /// Makes the id from 16 random bytes.
    pub(crate) fn from_random(bytes: [u8; 16]) -> Self {
        Self(Builder::from_random_bytes(bytes).into_uuid())
    }

    /// The id of item `index` of the batch whose base this is: distinct for distinct indexes, since the addition is
    /// modulo 2^48 and a batch holds fewer items than that.
    pub(crate) fn item(self, index: usize) -> Self {
        const LAST_48: u128 = (1 << 48) - 1;
        let base = self.0.as_u128();
        let last = (base & LAST_48).wrapping_add(index as u128) & LAST_48;
        Self(Uuid::from_u128(base & !LAST_48 | last))
    }

    /// Room for the text of an id.
    #[cfg(feature = "server")]
    pub(crate) const TEXT: [u8; 36] = [0; 36];

    /// Writes what `Display` prints into `text`.
    #[cfg(feature = "server")]
    pub(crate) fn encode(self, text: &mut [u8; 36]) -> &str {
        self.0.hyphenated().encode_lower(text)
    }

    /// The 16 bytes of the id.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.hyphenated(), f)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_of_a_batch_differ_even_across_the_48_bit_carry() {
        let base = RequestId::from_random([0xff; 16]);
        assert_eq!(base.to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(base.item(0), base);
        assert_eq!(base.item(1).to_string(), "ffffffff-ffff-4fff-bfff-000000000000");
        assert_eq!(base.item(2).to_string(), "ffffffff-ffff-4fff-bfff-000000000001");
    }
}
