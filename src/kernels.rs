//! The kernels as `keymill bench`, `benches/` and `fuzz/` reach them: thin faces, and nothing else.
//!
//! Hidden and without promises: a program that seals with IVs of its own choosing belongs to another library. Present
//! with the feature `bench` and under `cfg(fuzzing)`. Lengths that do not fit each other panic.

use crate::{
    cpu::Tier,
    error::Result,
    kernel::{self, GcmKey, GcmKeys, KeyRef, Keys},
    wrap::derived::{Derivation, DerivedKeys, XaesKey},
};

/// One key of 16, 24 or 32 bytes, set up.
pub struct Key(GcmKey);

impl Key {
    pub fn new(tier: Tier, material: &[u8]) -> Result<Self> {
        GcmKey::new(tier, material).map(Self)
    }

    pub fn for_all(&self) -> Selection<'_> {
        Selection(Choice::One(self.0.key()))
    }
}

/// AES-256 keys, set up together.
pub struct KeySet(Set);

enum Set {
    Given(GcmKeys),
    Derived(DerivedKeys),
}

impl KeySet {
    pub fn set_up(tier: Tier, materials: &[[u8; 32]]) -> Self {
        let mut keys = GcmKeys::new();
        keys.set_up_many(tier, materials);
        Self(Set::Given(keys))
    }

    /// One key for each salt.
    pub fn derive(root: &Root, salts: &[[u8; 12]]) -> Self {
        let mut keys = Self(Set::Derived(DerivedKeys::new()));
        keys.derive_again(root, salts);
        keys
    }

    /// As [`KeySet::derive`], in the memory of keys that were derived before.
    pub fn derive_again(&mut self, root: &Root, salts: &[[u8; 12]]) {
        let Set::Derived(keys) = &mut self.0 else { panic!("these keys were given") };
        let derivation = |salt: &[u8; 12]| Derivation { root: &root.0, salt: *salt };
        keys.derive_many(salts.iter().map(derivation));
    }

    fn key(&self, index: usize) -> KeyRef<'_> {
        match &self.0 {
            Set::Given(keys) => keys.key(index),
            Set::Derived(keys) => keys.key(index),
        }
    }

    /// The key at `index`, for every message.
    pub fn for_all(&self, index: usize) -> Selection<'_> {
        Selection(Choice::One(self.key(index)))
    }

    /// A key for each message, by its index.
    pub fn each(&self, indices: impl IntoIterator<Item = usize>) -> Selection<'_> {
        Selection(Choice::Each(indices.into_iter().map(|index| self.key(index)).collect()))
    }
}

/// A key of which others are derived (XAES-256-GCM).
pub struct Root(XaesKey);

impl Root {
    pub fn new(tier: Tier, material: &[u8; 32]) -> Result<Self> {
        XaesKey::new(tier, material).map(Self)
    }
}

/// Which key is whose.
pub struct Selection<'a>(Choice<'a>);

enum Choice<'a> {
    One(KeyRef<'a>),
    Each(Vec<KeyRef<'a>>),
}

impl<'a> Selection<'a> {
    /// A key for each message, of any lengths.
    pub fn each(keys: impl IntoIterator<Item = &'a Key>) -> Self {
        Self(Choice::Each(keys.into_iter().map(|key| key.0.key()).collect()))
    }

    fn keys(&self) -> Keys<'_> {
        match &self.0 {
            Choice::One(key) => Keys::One(*key),
            Choice::Each(keys) => Keys::Each(keys),
        }
    }
}

/// Where sealed messages go: message *i* at `i * stride + offset`.
#[derive(Clone, Copy)]
pub struct Place {
    pub stride: usize,
    pub offset: usize,
}

pub fn seal_many(
    keys: &Selection<'_>,
    ivs: &[[u8; 12]],
    aads: &[&[u8]],
    len: usize,
    plaintexts: &[u8],
    out: &mut [u8],
    Place { stride, offset }: Place,
) {
    let keys = keys.keys();
    kernel::seal_many(kernel::Seal { keys, ivs, aads, len, plaintexts, out, stride, offset });
}

pub fn open_many(
    keys: &Selection<'_>,
    ivs: &[[u8; 12]],
    aads: &[&[u8]],
    sealed: &[&[u8]],
    len: usize,
    out: &mut [u8],
    verdicts: &mut [bool],
) {
    kernel::open_many(kernel::Open { keys: keys.keys(), ivs, aads, sealed, len, out, verdicts });
}

pub fn chacha_fill(tier: Tier, seed: &[u8; 32], stream: u64, block: u64, out: &mut [u8]) {
    kernel::chacha_fill(tier, seed, stream, block, out);
}
