//! What a KEK is: id, alias, spec, origin, versions, state, rotation, budget; and `ring`, the immutable snapshot.
//!
//! Everything here is a fact or a pure rule; nothing reads a store or a clock.

pub(crate) mod access;
pub(crate) mod alias;
pub(crate) mod budget;
mod doubt;
pub(crate) mod handle;
pub(crate) mod id;
pub(crate) mod ring;
pub(crate) mod rotation;
pub(crate) mod state;
pub(crate) mod text_form;

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use crate::{
    error::{Error, Result},
    secret::Material,
    wrap::Scheme,
};
pub use alias::Alias;
pub use handle::KeyHandle;
pub use id::{KeyId, KeyVersionId};
pub use rotation::RotationPeriod;
pub use state::KeyState;
pub use text_form::TextForm;

/// Seconds since 1970, as the store keeps times.
pub(crate) type UnixSeconds = u64;

/// The public form of a stored time.
pub(crate) fn system_time(seconds: UnixSeconds) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// A time as people read it, in UTC. What is before 1970 or after 9999 is told as the nearest date between.
pub(crate) fn date(time: SystemTime) -> String {
    const LAST: UnixSeconds = 253_402_300_799;
    let time = time.clamp(SystemTime::UNIX_EPOCH, system_time(LAST));
    humantime::format_rfc3339_seconds(time).to_string()
}

/// The length of a KEK's material.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeySpec {
    /// 32 bytes.
    Aes256,
    /// 24 bytes.
    Aes192,
    /// 16 bytes.
    Aes128,
}

impl KeySpec {
    /// Bytes of the material.
    pub fn material_len(self) -> usize {
        match self {
            Self::Aes256 => 32,
            Self::Aes192 => 24,
            Self::Aes128 => 16,
        }
    }

    /// The spec of material of `len` bytes.
    pub(crate) fn of_len(len: usize) -> Option<Self> {
        [Self::Aes256, Self::Aes192, Self::Aes128]
            .into_iter()
            .find(|spec| spec.material_len() == len)
    }

    /// The scheme of keys of this spec when none is asked for: `Derived` where it exists.
    pub fn default_scheme(self) -> Scheme {
        match self {
            Self::Aes256 => Scheme::Derived,
            Self::Aes192 | Self::Aes128 => Scheme::Direct,
        }
    }

    /// `AES_256`, `AES_192` or `AES_128`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aes256 => "AES_256",
            Self::Aes192 => "AES_192",
            Self::Aes128 => "AES_128",
        }
    }

    /// Reads what [`KeySpec::as_str`] writes, with or without the KMS's `Aliyun_` in front.
    ///
    /// # Errors
    /// `InvalidParameter` for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        [Self::Aes256, Self::Aes192, Self::Aes128]
            .into_iter()
            .find(|spec| spec.as_str() == text.strip_prefix("Aliyun_").unwrap_or(text))
            .ok_or_else(|| {
                Error::invalid(format!("KeySpec {text:?} is none of AES_256, AES_192, AES_128."))
            })
    }
}

impl fmt::Display for KeySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where a KEK's material came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Made by this engine.
    Generated,
    /// Brought by the caller. Does not rotate.
    Imported,
}

impl Origin {
    /// `generated` or `imported`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Generated => "generated",
            Self::Imported => "imported",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Everything about a KEK but its material, its versions' budgets and its aliases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyRecord {
    pub(crate) id: KeyId,
    pub(crate) spec: KeySpec,
    pub(crate) scheme: Scheme,
    pub(crate) origin: Origin,
    pub(crate) description: String,
    pub(crate) created: UnixSeconds,
    pub(crate) state: KeyState,
    pub(crate) rotation: Option<RotationPeriod>,
    /// When the primary version was made.
    pub(crate) last_rotation: UnixSeconds,
    /// Versions have the ordinals `0..version_count`; 0 is the initial one, the last is the primary one.
    pub(crate) version_count: u32,
}

/// One version of a KEK.
#[derive(Debug)]
pub(crate) struct VersionRecord {
    pub(crate) id: KeyVersionId,
    pub(crate) ordinal: u32,
    pub(crate) created: UnixSeconds,
    pub(crate) material: Material,
    /// Wraps granted so far, of a `Direct` version.
    pub(crate) spent: u64,
}

/// What the store holds of one key.
#[derive(Debug)]
pub(crate) struct StoredKey {
    pub(crate) record: KeyRecord,
    /// In ordinal order, none missing.
    pub(crate) versions: Vec<VersionRecord>,
    pub(crate) aliases: Vec<Alias>,
}

/// A description of a KEK, as `describe_key` and `list_keys` return it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KeyMetadata {
    /// Its id.
    pub key_id: KeyId,
    /// Its aliases, sorted.
    pub aliases: Vec<Alias>,
    /// The length of its material.
    pub spec: KeySpec,
    /// How it wraps.
    pub scheme: Scheme,
    /// Where its material came from.
    pub origin: Origin,
    /// What its owner wrote about it.
    pub description: String,
    /// When it was made.
    pub creation_date: SystemTime,
    /// Its state.
    pub state: KeyState,
    /// How often it rotates by itself, if it does.
    pub rotation_period: Option<RotationPeriod>,
    /// When it rotates next, if it does and its state allows it. Now, if its last rotation is dated more than a day
    /// ahead of the engine's clock: such a date is wrong, and the key is due.
    pub next_rotation_date: Option<SystemTime>,
    /// Its versions, the initial one first, the primary one last.
    pub versions: Vec<KeyVersionMetadata>,
}

/// A description of one version of a KEK.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KeyVersionMetadata {
    /// Its id.
    pub key_version_id: KeyVersionId,
    /// When it was made.
    pub creation_date: SystemTime,
    /// Wraps that the store has granted, of `Direct` versions; unused leases of running engines count as granted.
    pub wraps_granted: u64,
}

impl KeyMetadata {
    /// The version that `generate_data_key` wraps under.
    pub fn initial_version(&self) -> &KeyVersionMetadata {
        self.versions.first().expect("a key has at least one version")
    }

    /// The version that `advance_generate_data_key` wraps under.
    pub fn primary_version(&self) -> &KeyVersionMetadata {
        self.versions.last().expect("a key has at least one version")
    }
}

impl StoredKey {
    /// A description of the key, as of `now`.
    pub(crate) fn metadata(&self, now: UnixSeconds) -> KeyMetadata {
        let record = &self.record;
        KeyMetadata {
            key_id: record.id,
            aliases: self.aliases.clone(),
            spec: record.spec,
            scheme: record.scheme,
            origin: record.origin,
            description: record.description.clone(),
            creation_date: system_time(record.created),
            state: record.state,
            rotation_period: record.rotation,
            next_rotation_date: record.next_rotation(now).map(system_time),
            versions: self
                .versions
                .iter()
                .map(|version| KeyVersionMetadata {
                    key_version_id: version.id,
                    creation_date: system_time(version.created),
                    wraps_granted: version.spent,
                })
                .collect(),
        }
    }
}
