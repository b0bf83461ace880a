//! Instruction-set tiers: what this CPU has, tokens that prove it, and the switch that lowers the tier.
//!
//! A [`Tier`] other than [`Tier::PORTABLE`] comes from detection alone, so having one proves that the CPU has every
//! feature of its list. Inside, the proof is a token with a private field for each tier: the call of a kernel needs
//! one, and every key context keeps its own. Detection runs once. `KEYMILL_TIER` lowers the choice, in any build;
//! nothing raises it.
//!
//! A CPU (or emulator) may have VAES without VPCLMULQDQ, or AVX-512 without VAES: a tier is there if all of its
//! features are, and a missing one leads to the next tier below.

use std::fmt;

use crate::error::{Error, Result};

/// The environment variable that lowers the tier.
pub const TIER_VARIABLE: &str = "KEYMILL_TIER";

/// One instruction-set level of the kernels that this CPU has.
///
/// Ordered: a wider tier is greater. All tiers give the same bytes; they differ in speed.
///
/// | name | features of the CPU | messages in a register |
/// |---|---|---|
/// | `vaes512` | AVX-512 F, BW and VL, VAES, VPCLMULQDQ | 4 |
/// | `vaes256` | AVX2, VAES, VPCLMULQDQ | 2 |
/// | `aesni` | AES-NI, PCLMULQDQ, SSE4.1, SSSE3 | 1 |
/// | `portable` | any: the crates `aes-gcm` and `rand_chacha`, which use AES-NI, PCLMULQDQ and AVX2 by themselves | - |
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tier(Level);

/// What stands behind a [`Tier`]: the token that its kernels want.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Wide(Wide),
}

/// The tiers with kernels of our own. They share one layout of key contexts.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Wide {
    AesNi(AesNi),
    Vaes256(Vaes256),
    Vaes512(Vaes512),
}

/// Declares a token and the features that it proves. The kernels of the tier enable the same features, in the same
/// order; `tests/house.rs` compares the lists.
#[cfg(target_arch = "x86_64")]
macro_rules! token {
    ($(#[$doc:meta])* $name:ident: $features:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) struct $name(());

        impl $name {
            fn proven_by(has: &impl Fn(&str) -> bool) -> Option<Self> {
                $features.split(',').all(has).then_some(Self(()))
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
token! {
    /// Proves what the tier `aesni` needs.
    AesNi: "aes,pclmulqdq,sse4.1,ssse3"
}
#[cfg(target_arch = "x86_64")]
token! {
    /// Proves what the tier `vaes256` needs, and that `aesni` is there too.
    Vaes256: "aes,avx2,pclmulqdq,vaes,vpclmulqdq"
}
#[cfg(target_arch = "x86_64")]
token! {
    /// Proves what the tier `vaes512` needs, and that `vaes256` and `aesni` are there too.
    Vaes512: "aes,avx2,avx512bw,avx512f,avx512vl,pclmulqdq,vaes,vpclmulqdq"
}

#[cfg(target_arch = "x86_64")]
impl Vaes256 {
    /// The tier below, for what is left after the full registers.
    pub(crate) fn narrower(self) -> AesNi {
        AesNi(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Vaes512 {
    /// The tier below, for what is left after the full registers.
    pub(crate) fn narrower(self) -> Vaes256 {
        Vaes256(())
    }
}

/// Whether this CPU, and the system under it, has a feature of the lists above.
#[cfg(target_arch = "x86_64")]
fn cpu_has(feature: &str) -> bool {
    use std::arch::is_x86_feature_detected as has;
    match feature {
        "aes" => has!("aes"),
        "avx2" => has!("avx2"),
        "avx512bw" => has!("avx512bw"),
        "avx512f" => has!("avx512f"),
        "avx512vl" => has!("avx512vl"),
        "pclmulqdq" => has!("pclmulqdq"),
        "sse4.1" => has!("sse4.1"),
        "ssse3" => has!("ssse3"),
        "vaes" => has!("vaes"),
        "vpclmulqdq" => has!("vpclmulqdq"),
        _ => false,
    }
}

/// The tiers of a CPU with the features that `has` tells, best first.
#[cfg(target_arch = "x86_64")]
fn tiers_with(has: impl Fn(&str) -> bool) -> Vec<Tier> {
    let mut tiers = vec![Tier::PORTABLE];
    // Upwards, and only as far as every tier is there: a wider one hands what is left over to the next narrower one.
    if let Some(token) = AesNi::proven_by(&has) {
        tiers.insert(0, Tier(Level::Wide(Wide::AesNi(token))));
        if let Some(token) = Vaes256::proven_by(&has) {
            tiers.insert(0, Tier(Level::Wide(Wide::Vaes256(token))));
            if let Some(token) = Vaes512::proven_by(&has) {
                tiers.insert(0, Tier(Level::Wide(Wide::Vaes512(token))));
            }
        }
    }
    tiers
}

impl Tier {
    /// The tier of any CPU.
    pub const PORTABLE: Self = Self(Level::Portable);

    /// Names of all tiers, which `KEYMILL_TIER` accepts, best first.
    pub const NAMES: [&'static str; 4] = ["vaes512", "vaes256", "aesni", "portable"];

    /// The tiers of this CPU, best first; the last is [`Tier::PORTABLE`].
    pub fn available() -> &'static [Self] {
        static AVAILABLE: std::sync::LazyLock<Vec<Tier>> = std::sync::LazyLock::new(|| {
            #[cfg(target_arch = "x86_64")]
            return tiers_with(cpu_has);
            #[cfg(not(target_arch = "x86_64"))]
            return vec![Tier::PORTABLE];
        });
        &AVAILABLE
    }

    /// The best tier of this CPU, lowered to what `KEYMILL_TIER` asks for.
    ///
    /// # Errors
    /// `InvalidParameter` if the variable holds no tier's name.
    pub fn detect() -> Result<Self> {
        match std::env::var(TIER_VARIABLE) {
            // Set to nothing counts as not set, as in a shell.
            Ok(name) if name.is_empty() => Ok(Self::available()[0]),
            Ok(name) => Self::at_most(&name).map_err(|_| {
                let (name, tiers) = (crate::error::Shortened(&name), Self::NAMES.join(", "));
                Error::invalid(format!("{TIER_VARIABLE} is {name:?}; tiers are {tiers}."))
            }),
            Err(std::env::VarError::NotPresent) => Ok(Self::available()[0]),
            Err(error) => Err(Error::invalid(format!("{TIER_VARIABLE}: {error}."))),
        }
    }

    /// The best tier of this CPU that is no wider than the one named `name`.
    ///
    /// # Errors
    /// `InvalidParameter` if there is no tier of that name.
    pub fn at_most(name: &str) -> Result<Self> {
        best_at_most(Self::available(), name)
    }

    /// The name, one of [`Tier::NAMES`].
    pub fn as_str(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Wide(Wide::AesNi(_)) => "aesni",
            #[cfg(target_arch = "x86_64")]
            Level::Wide(Wide::Vaes256(_)) => "vaes256",
            #[cfg(target_arch = "x86_64")]
            Level::Wide(Wide::Vaes512(_)) => "vaes512",
        }
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }
}

fn best_at_most(available: &[Tier], name: &str) -> Result<Tier> {
    let place = |name: &str| Tier::NAMES.iter().position(|known| *known == name);
    let Some(asked) = place(name) else {
        return Err(Error::invalid(format!(
            "{TIER_VARIABLE} is {name:?}; the tiers are {}.",
            Tier::NAMES.join(", ")
        )));
    };
    let found = available.iter().find(|tier| place(tier.as_str()) >= Some(asked));
    Ok(found.copied().unwrap_or(Tier::PORTABLE))
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tier({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_tier_comes_first_and_the_portable_one_last() {
        let available = Tier::available();
        assert!(available.is_sorted_by(|wider, narrower| wider > narrower), "{available:?}");
        assert_eq!(available.last(), Some(&Tier::PORTABLE));
        let names: Vec<_> = available.iter().map(|tier| tier.as_str()).collect();
        assert!(names.iter().all(|name| Tier::NAMES.contains(name)));
    }

    #[test]
    fn a_name_lowers_and_never_raises() {
        let portable = [Tier::PORTABLE];
        for name in Tier::NAMES {
            assert_eq!(best_at_most(&portable, name).unwrap(), Tier::PORTABLE);
        }
        for (i, tier) in Tier::available().iter().enumerate() {
            assert_eq!(Tier::at_most(tier.as_str()).unwrap(), *tier);
            let lower = best_at_most(&Tier::available()[i..], "vaes512").unwrap();
            assert_eq!(lower, *tier, "a wider name does not raise");
        }
        for name in ["sse2", "", "AESNI", "vaes512 "] {
            let error = Tier::at_most(name).unwrap_err();
            assert!(error.message().contains(&format!("{name:?}")), "{error}");
        }
    }

    /// Every set of features lands on the widest tier whose every feature is in it.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_tier_needs_its_every_feature() {
        const ALL: [&str; 10] = [
            "aes",
            "avx2",
            "avx512bw",
            "avx512f",
            "avx512vl",
            "pclmulqdq",
            "sse4.1",
            "ssse3",
            "vaes",
            "vpclmulqdq",
        ];
        let best = |set: &[&str]| tiers_with(|feature| set.contains(&feature))[0].as_str();
        assert_eq!(best(&ALL), "vaes512");
        let without = |missing: &[&str]| {
            let set: Vec<_> = ALL.into_iter().filter(|f| !missing.contains(f)).collect();
            best(&set)
        };
        for missing in ["avx512bw", "avx512f", "avx512vl"] {
            assert_eq!(without(&[missing]), "vaes256", "{missing}");
        }
        // AVX-512 without VAES; VAES without VPCLMULQDQ, as qemu's `max` has it.
        for missing in ["vaes", "vpclmulqdq", "avx2"] {
            assert_eq!(without(&[missing]), "aesni", "{missing}");
        }
        for missing in ["aes", "pclmulqdq", "sse4.1", "ssse3"] {
            assert_eq!(without(&[missing]), "portable", "{missing}");
        }
        assert_eq!(best(&["aes", "pclmulqdq", "sse4.1"]), "portable");
        assert_eq!(best(&[]), "portable");
    }
}
