//! The schemes by which a key version wraps data keys, on top of the kernel: `direct`, `derived`, wrapping states, and
//! the layouts of blobs.

pub(crate) mod blob;
pub(crate) mod derived;
pub(crate) mod state;

use std::fmt;

use crate::{
    cpu::Tier,
    error::{Error, Result},
    kernel::GcmKey,
    secret::Material,
};
use derived::XaesKey;
use state::StateSlots;

/// How a KEK wraps data keys. Fixed when the KEK is created; `Algorithm` is `AES_GCM` for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// XAES-256-GCM: AES-256-GCM under a key derived from the key version and a random salt. AES-256 alone; no
    /// practical bound on the number of wraps.
    Derived,
    /// AES-GCM under the key version itself, as plain AES-GCM opens it. At most 2^32 wraps a version, enforced.
    Direct,
}

impl Scheme {
    /// `derived` or `direct`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Derived => "derived",
            Self::Direct => "direct",
        }
    }

    /// Reads what [`Scheme::as_str`] writes.
    ///
    /// # Errors
    /// `InvalidParameter` for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "derived" => Ok(Self::Derived),
            "direct" => Ok(Self::Direct),
            _ => Err(Error::invalid(format!(
                "Scheme {text:?} is neither \"derived\" nor \"direct\"."
            ))),
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The material of a key version, set up for its scheme, in locked pages.
pub(crate) enum Wrapper {
    Direct(GcmKey),
    Derived { root: XaesKey, states: StateSlots },
}

impl Wrapper {
    /// Sets `material` up.
    ///
    /// # Errors
    /// `InvalidParameter` for `Derived` with material of other than 32 bytes.
    pub(crate) fn new(tier: Tier, scheme: Scheme, material: &Material) -> Result<Self> {
        match scheme {
            Scheme::Direct => Ok(Self::Direct(GcmKey::new(tier, material.expose())?)),
            Scheme::Derived => {
                let material: &[u8; 32] = material
                    .expose()
                    .try_into()
                    .map_err(|_| Error::invalid("Scheme \"derived\" needs an AES_256 key."))?;
                let root = XaesKey::new(tier, material)?;
                Ok(Self::Derived { root, states: StateSlots::default() })
            }
        }
    }

    pub(crate) fn scheme(&self) -> Scheme {
        match self {
            Self::Direct(_) => Scheme::Direct,
            Self::Derived { .. } => Scheme::Derived,
        }
    }
}

/// The IV after `iv`: a 96-bit big-endian integer, modulo 2^96.
pub(crate) fn iv_plus(iv: &[u8; 12], add: u64) -> [u8; 12] {
    let mut wide = [0; 16];
    wide[4..].copy_from_slice(iv);
    let sum = u128::from_be_bytes(wide).wrapping_add(u128::from(add));
    sum.to_be_bytes()[4..].try_into().expect("16 - 4 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ivs_carry_at_every_word_and_wrap_at_2_96() {
        let mut iv = [0; 12];
        iv[8..].fill(0xff);
        assert_eq!(iv_plus(&iv, 1), [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        iv[4..].fill(0xff);
        assert_eq!(iv_plus(&iv, 1), [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(iv_plus(&[0xff; 12], 3), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn derived_wants_aes_256() {
        for len in [16, 24] {
            let material = Material::new(&vec![1; len]).unwrap();
            assert!(Wrapper::new(Tier::PORTABLE, Scheme::Derived, &material).is_err());
            assert!(Wrapper::new(Tier::PORTABLE, Scheme::Direct, &material).is_ok());
        }
    }
}
