//! Instruction-set tiers, and the switch that lowers the tier.
//!
//! A tier is chosen once, when an engine opens, and every key context remembers it. `KEYMILL_TIER` lowers the choice,
//! in any build; it never raises it. This version has kernels for [`Tier::Portable`] alone, so every request lands
//! there; the names of the wider tiers are known already, so that a setting made for them stays valid.

use std::fmt;

use crate::error::{Error, Result};

/// The environment variable that lowers the tier.
pub const TIER_VARIABLE: &str = "KEYMILL_TIER";

/// One instruction-set level of the kernels. More are to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// Any CPU: the `aes-gcm` and `rand_chacha` crates, which use AES-NI, PCLMULQDQ and AVX2 by themselves.
    Portable,
}

impl Tier {
    /// Names that `KEYMILL_TIER` accepts, best first.
    pub const NAMES: [&'static str; 4] = ["vaes512", "vaes256", "aesni", "portable"];

    /// The best tier of this CPU and build, lowered to what `KEYMILL_TIER` asks for.
    ///
    /// # Errors
    /// `InvalidParameter` if the variable holds no tier's name.
    pub fn detect() -> Result<Self> {
        match std::env::var(TIER_VARIABLE) {
            // Set to nothing counts as not set, as in a shell.
            Ok(name) if name.is_empty() => Ok(Self::Portable),
            Ok(name) => Self::Portable.lowered_to(&name),
            Err(std::env::VarError::NotPresent) => Ok(Self::Portable),
            Err(error) => Err(Error::invalid(format!("{TIER_VARIABLE}: {error}."))),
        }
    }

    fn lowered_to(self, name: &str) -> Result<Self> {
        if Self::NAMES.contains(&name) {
            Ok(self.min(Self::Portable))
        } else {
            Err(Error::invalid(format!(
                "{TIER_VARIABLE} is {name:?}; the tiers are {}.",
                Self::NAMES.join(", ")
            )))
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_lowers_and_never_raises() {
        for name in Tier::NAMES {
            assert_eq!(Tier::Portable.lowered_to(name).unwrap(), Tier::Portable);
        }
        let error = Tier::Portable.lowered_to("sse2").unwrap_err();
        assert!(error.message().contains("\"sse2\""), "{error}");
    }
}
