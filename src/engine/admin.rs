//! Operations on KEKs and aliases. Each is one transaction of the store, decided inside it by the rules of `keys/`,
//! and seen by this engine when it returns.

use zeroize::Zeroizing;

use super::{Engine, Shared};
use crate::{
    error::{Error, ErrorKind, Result},
    keys::{
        Alias, KeyId, KeyMetadata, KeyRecord, KeySpec, KeyState, KeyVersionId, Origin,
        RotationPeriod, StoredKey, UnixSeconds, VersionRecord, alias::AliasChange,
    },
    request::{CreateKey, ImportKey, check_description, check_scheme},
    secret::Material,
    store::{KeyChange, NewKey},
    wrap::Scheme,
};

/// Operations on KEKs.
impl Engine {
    /// Creates a KEK with random material.
    ///
    /// # Errors
    /// `InvalidParameter` (scheme `Derived` with another spec than AES_256, a malformed alias, a long description),
    /// `AliasAlreadyExists`. The store then has nothing new.
    pub fn create_key(&self, key: &CreateKey) -> Result<KeyMetadata> {
        let shared = self.shared();
        check_description(&key.description)?;
        let scheme = check_scheme(key.spec, key.scheme)?;
        let id = KeyId::generate(&shared.rng)?;
        let mut record = shared.new_record(id, key.spec, scheme, Origin::Generated);
        record.description.clone_from(&key.description);
        record.rotation = key.rotation_period;
        let material = shared.new_material(key.spec)?;
        self.add_key(record, material, key.alias.as_deref())
    }

    /// Imports a KEK. Material that was ever imported into this store is refused, even as another scheme or after its
    /// deletion: the bounds hold for material that is used nowhere else.
    ///
    /// # Errors
    /// As [`Engine::create_key`], and `InvalidKeyMaterial`.
    pub fn import_key(&self, key: &ImportKey<'_>) -> Result<KeyMetadata> {
        let shared = self.shared();
        check_description(&key.description)?;
        let material = Material::new(key.material)?;
        let spec = KeySpec::of_len(key.material.len()).expect("Material::new checked the length");
        let scheme = check_scheme(spec, key.scheme)?;
        let id = KeyId::generate(&shared.rng)?;
        let mut record = shared.new_record(id, spec, scheme, Origin::Imported);
        record.description.clone_from(&key.description);
        self.add_key(record, material, key.alias.as_deref())
    }

    /// Describes the KEK with this id or alias.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`; the store's.
    pub fn describe_key(&self, name: &str) -> Result<KeyMetadata> {
        self.process();
        let id = self.shared().find(name)?.record.id;
        self.shared().metadata_of(&self.shared().refresh()?, &id)
    }

    /// Describes every KEK, oldest first.
    ///
    /// # Errors
    /// The store's.
    pub fn list_keys(&self) -> Result<Vec<KeyMetadata>> {
        self.process();
        let stored = self.shared().refresh()?;
        let now = self.shared().now();
        Ok(stored.iter().map(|key| key.metadata(now)).collect())
    }

    /// Gives a KEK a new primary version. Everything wrapped before still opens; `generate_data_key` goes on with the
    /// initial version, the Advance operations with the new one.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`, `Rejected.Disabled`, `Rejected.PendingDeletion`; `UnsupportedOperation` for imported
    /// keys.
    pub fn rotate_key(&self, name: &str) -> Result<KeyMetadata> {
        self.process();
        let id = self.shared().find(name)?.record.id;
        self.shared().rotate_if(&id, |_| true)?;
        self.describe_key(id.as_str())
    }

    /// Enables a disabled KEK.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`; `Rejected.StateModifiedFailed` while its deletion is pending.
    pub fn enable_key(&self, name: &str) -> Result<KeyMetadata> {
        self.change(name, &mut KeyRecord::enable)
    }

    /// Disables a KEK: it neither wraps nor unwraps until it is enabled again. Its wrapping states are wiped.
    ///
    /// # Errors
    /// As [`Engine::enable_key`].
    pub fn disable_key(&self, name: &str) -> Result<KeyMetadata> {
        self.change(name, &mut KeyRecord::disable)
    }

    /// Schedules a KEK's deletion in `days` days, 7 to 366. Until then it neither wraps nor unwraps, and the deletion
    /// can be cancelled; then its material is removed from the store for good.
    ///
    /// # Errors
    /// `InvalidParameter` for other days; as [`Engine::enable_key`].
    pub fn schedule_key_deletion(&self, name: &str, days: u32) -> Result<KeyMetadata> {
        let now = self.shared().now();
        let changed = self.change(name, &mut |record| record.schedule_deletion(now, days))?;
        self.shared().warn_of_the_clock(&changed.key_id, now);
        Ok(changed)
    }

    /// Cancels a scheduled deletion; the KEK is enabled afterwards. A deletion that is due can still be cancelled
    /// until it is executed.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`, also when the deletion was executed; `Rejected.StateModifiedFailed` if none is pending.
    pub fn cancel_key_deletion(&self, name: &str) -> Result<KeyMetadata> {
        self.change(name, &mut KeyRecord::cancel_deletion)
    }

    /// Lets a KEK rotate by itself every `period`, counted from its last rotation, or never. A rotation that is due
    /// already is executed at once.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`, `Rejected.PendingDeletion`; `UnsupportedOperation` for imported keys.
    pub fn set_rotation(&self, name: &str, period: Option<RotationPeriod>) -> Result<KeyMetadata> {
        let changed = self.change(name, &mut |record| record.set_rotation(period))?;
        let now = self.shared().now();
        if self.shared().rotate_due(&changed.key_id, now)? {
            return self.describe_key(changed.key_id.as_str());
        }
        Ok(changed)
    }

    /// Creates an alias of the KEK with this id or alias.
    ///
    /// # Errors
    /// `InvalidParameter` for a malformed alias; `AliasAlreadyExists`; `Forbidden.KeyNotFound`;
    /// `Rejected.StateModifiedFailed` while the KEK's deletion is pending.
    pub fn create_alias(&self, alias: &str, key: &str) -> Result<()> {
        self.change_alias(alias, |shared| Ok(AliasChange::Create(shared.find(key)?.record.id)))
    }

    /// Points an alias to the KEK with this id or alias.
    ///
    /// # Errors
    /// `Forbidden.AliasNotFound`; `Forbidden.KeyNotFound`; `Rejected.PendingDeletion`.
    pub fn update_alias(&self, alias: &str, key: &str) -> Result<()> {
        self.change_alias(alias, |shared| Ok(AliasChange::Update(shared.find(key)?.record.id)))
    }

    /// Removes an alias.
    ///
    /// # Errors
    /// `Forbidden.AliasNotFound`.
    pub fn delete_alias(&self, alias: &str) -> Result<()> {
        self.change_alias(alias, |_| Ok(AliasChange::Delete))
    }

    /// Every alias with its KEK, sorted by alias.
    ///
    /// # Errors
    /// The store's.
    pub fn list_aliases(&self) -> Result<Vec<(Alias, KeyId)>> {
        self.process();
        self.shared().refresh_if_changed()?;
        let ring = self.shared().ring.load();
        let mut aliases: Vec<_> = ring.aliases().map(|(alias, key)| (alias.clone(), key)).collect();
        aliases.sort_unstable();
        Ok(aliases)
    }

    fn add_key(
        &self,
        record: KeyRecord,
        material: Material,
        alias: Option<&str>,
    ) -> Result<KeyMetadata> {
        self.process();
        let shared = self.shared();
        let alias = alias.map(Alias::parse).transpose()?;
        let version = shared.new_version(&record, 0, record.created, material)?;
        let key = NewKey { record, version, alias };
        shared.store.create(&key)?;
        // It exists now: what fails from here on is for later calls to meet.
        if let Err(error) = shared.refresh() {
            log::warn!("key {} was created, but the store cannot be read: {error}", key.record.id);
        }
        let NewKey { record, version, alias } = key;
        let versions = vec![version];
        Ok(StoredKey { record, versions, aliases: alias.into_iter().collect() }
            .metadata(shared.now()))
    }

    fn change(
        &self,
        name: &str,
        change: &mut dyn FnMut(&mut KeyRecord) -> Result<()>,
    ) -> Result<KeyMetadata> {
        self.process();
        let shared = self.shared();
        let id = shared.find(name)?.record.id;
        shared.store.change(&id, &mut |record| {
            let mut changed = record.clone();
            change(&mut changed)?;
            let same = changed == *record;
            Ok(if same { KeyChange::Keep } else { KeyChange::Save(changed, None) })
        })?;
        shared.metadata_of(&shared.refresh()?, &id)
    }

    fn change_alias(
        &self,
        alias: &str,
        change: impl Fn(&Shared) -> Result<AliasChange>,
    ) -> Result<()> {
        self.process();
        let shared = self.shared();
        let alias = Alias::parse(alias)?;
        shared.store.change_alias(&alias, change(shared)?)?;
        shared.refresh().map(drop)
    }
}

impl Shared {
    fn metadata_of(&self, stored: &[StoredKey], id: &KeyId) -> Result<KeyMetadata> {
        let found = stored.iter().find(|key| key.record.id == *id);
        let found = found.ok_or_else(|| Error::key_not_found(id.as_str()))?;
        Ok(found.metadata(self.now()))
    }

    /// Gives a key a new primary version if `wanted` says so of what the store holds. Returns the version, and the
    /// record as it was before.
    ///
    /// # Errors
    /// As [`Engine::rotate_key`]; only if `wanted`.
    pub(super) fn rotate_if(
        &self,
        id: &KeyId,
        wanted: impl Fn(&KeyRecord) -> bool,
    ) -> Result<Option<(KeyVersionId, KeyRecord)>> {
        let mut rotated = None;
        // Outside the transaction: the clock is the caller's code, and may wait for whoever waits for the store.
        let now = self.now();
        self.store.change(id, &mut |record| {
            if !wanted(record) {
                return Ok(KeyChange::Keep);
            }
            record.check_rotatable()?;
            let material = self.new_material(record.spec)?;
            let version = self.new_version(record, record.version_count, now, material)?;
            rotated = Some((version.id, record.clone()));
            let mut record = record.clone();
            record.last_rotation = version.created;
            record.version_count = record.version_count.checked_add(1).ok_or_else(|| {
                Error::new(ErrorKind::LimitExceeded, format!("Key {id} has too many versions."))
            })?;
            Ok(KeyChange::Save(record, Some(version)))
        })?;
        // It is done now: what fails from here on is for later looks to meet.
        if rotated.is_some()
            && let Err(error) = self.refresh()
        {
            log::warn!("key {id} has a new version, but the store cannot be read: {error}");
        }
        Ok(rotated)
    }

    fn new_record(&self, id: KeyId, spec: KeySpec, scheme: Scheme, origin: Origin) -> KeyRecord {
        let now = self.now();
        KeyRecord {
            id,
            spec,
            scheme,
            origin,
            description: String::new(),
            created: now,
            state: KeyState::Enabled,
            rotation: None,
            last_rotation: now,
            version_count: 1,
        }
    }

    fn new_material(&self, spec: KeySpec) -> Result<Material> {
        let mut bytes = Zeroizing::new([0; 32]);
        let bytes = &mut bytes[..spec.material_len()];
        self.rng.fill_from_os(bytes)?;
        Material::new(bytes)
    }

    fn new_version(
        &self,
        record: &KeyRecord,
        ordinal: u32,
        created: UnixSeconds,
        material: Material,
    ) -> Result<VersionRecord> {
        Ok(VersionRecord {
            id: KeyVersionId::generate(&record.id, &self.rng)?,
            ordinal,
            created,
            material,
            spent: match record.scheme {
                Scheme::Direct => self.config.initial_spent,
                Scheme::Derived => 0,
            },
        })
    }
}
