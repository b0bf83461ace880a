//! Key ids and key version ids.
//!
//! `key-` and 21 of `[a-z0-9]`; a version id is its key's id, `-`, and 10 more. Public values, chosen at random.

use std::{borrow::Borrow, fmt};

use crate::{
    error::Result,
    limits::{KEY_ID_LEN, KEY_VERSION_ID_LEN},
    rng::Rng,
};

const PREFIX: &[u8] = b"key-";
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// The id of a KEK: `key-` and 21 of `[a-z0-9]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; KEY_ID_LEN]);

/// The id of one version of a KEK: the key's id, `-`, and 10 of `[a-z0-9]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyVersionId([u8; KEY_VERSION_ID_LEN]);

/// So that a map of ids is asked with the bytes of a blob. The derived hash is that of the bytes.
impl Borrow<[u8; KEY_VERSION_ID_LEN]> for KeyVersionId {
    fn borrow(&self) -> &[u8; KEY_VERSION_ID_LEN] {
        &self.0
    }
}

impl KeyId {
    /// Makes a new id.
    pub(crate) fn generate(rng: &Rng) -> Result<Self> {
        let mut id = [0; KEY_ID_LEN];
        id[..PREFIX.len()].copy_from_slice(PREFIX);
        fill_alphabet(rng, &mut id[PREFIX.len()..])?;
        Ok(Self(id))
    }

    /// Reads an id. `None` if `text` has not the form of one.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; KEY_ID_LEN] = text.as_bytes().try_into().ok()?;
        let well_formed =
            bytes.starts_with(PREFIX) && bytes[PREFIX.len()..].iter().all(|b| ALPHABET.contains(b));
        well_formed.then_some(Self(bytes))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("ids are ASCII")
    }
}

impl KeyVersionId {
    /// Stands where an id is going to be written.
    pub(crate) const ZERO: Self = Self([b'0'; KEY_VERSION_ID_LEN]);

    /// Makes a new version id of `key`.
    pub(crate) fn generate(key: &KeyId, rng: &Rng) -> Result<Self> {
        let mut id = [b'-'; KEY_VERSION_ID_LEN];
        id[..KEY_ID_LEN].copy_from_slice(&key.0);
        fill_alphabet(rng, &mut id[KEY_ID_LEN + 1..])?;
        Ok(Self(id))
    }

    /// Reads a version id. `None` if `text` has not the form of one.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; KEY_VERSION_ID_LEN] = text.as_bytes().try_into().ok()?;
        let (key, rest) = text.split_at_checked(KEY_ID_LEN)?;
        let tail = rest.strip_prefix('-')?;
        (KeyId::parse(key).is_some() && tail.bytes().all(|b| ALPHABET.contains(&b)))
            .then_some(Self(bytes))
    }

    /// Reads a version id from its place in a blob. `None` if the bytes have not the form of one.
    pub(crate) fn from_bytes(bytes: &[u8; KEY_VERSION_ID_LEN]) -> Option<Self> {
        Self::parse(std::str::from_utf8(bytes).ok()?)
    }

    /// The id as it stands in a blob.
    pub(crate) fn as_bytes(&self) -> &[u8; KEY_VERSION_ID_LEN] {
        &self.0
    }

    /// The id of the key that this is a version of.
    pub fn key_id(&self) -> KeyId {
        KeyId(self.0[..KEY_ID_LEN].try_into().expect("a version id begins with a key id"))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("ids are ASCII")
    }
}

/// Fills `out` with characters of the alphabet, each equally likely.
fn fill_alphabet(rng: &Rng, out: &mut [u8]) -> Result<()> {
    // The largest multiple of 36 below 256: bytes from there on are drawn again.
    const FAIR: u8 = 252;
    for place in out {
        let mut byte = [u8::MAX];
        while byte[0] >= FAIR {
            rng.fill(&mut byte)?;
        }
        *place = ALPHABET[usize::from(byte[0] % 36)];
    }
    Ok(())
}

macro_rules! print_as_text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }
    )*};
}
print_as_text!(KeyId, KeyVersionId);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Tier;

    #[test]
    fn generated_ids_are_read_again() {
        let rng = Rng::Os(Tier::PORTABLE);
        for _ in 0..200 {
            let key = KeyId::generate(&rng).unwrap();
            let version = KeyVersionId::generate(&key, &rng).unwrap();
            assert_eq!(KeyId::parse(key.as_str()), Some(key));
            assert_eq!(KeyVersionId::parse(version.as_str()), Some(version));
            assert_eq!(KeyVersionId::from_bytes(version.as_bytes()), Some(version));
            assert_eq!(version.key_id(), key);
        }
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "key-",
            "key-hzz62f1cb66fa42qopd9",
            "key-hzz62f1cb66fa42qopd9S",
            "KEY-hzz62f1cb66fa42qopd9s",
        ] {
            assert_eq!(KeyId::parse(text), None, "{text}");
        }
        for text in [
            "key-hzz62f1cb66fa42qopd9s-17kedvabc",
            "key-hzz62f1cb66fa42qopd9s_17kedvabcd",
            "é".repeat(18).as_str(),
        ] {
            assert_eq!(KeyVersionId::parse(text), None, "{text}");
        }
        assert_eq!(KeyVersionId::from_bytes(&[0xff; KEY_VERSION_ID_LEN]), None);
    }
}
