//! A store in memory, for tests, benchmarks and the deterministic mode. It dies with its process.
//!
//! A forked child has a copy, so it could grant the same wraps as its parent: the store refuses every call there. The
//! child's engine goes on with the `Derived` keys of its inherited ring.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{ClientChange, Grant, KeyChange, KeyStore, LeaseRequest, NewKey, StoreImage, grant};
use crate::{
    clients::{self, Client, ClientId},
    error::{Error, ErrorKind, Result},
    keys::{
        Alias, KeyId, KeyRecord, KeyVersionId, Origin, StoredKey, VersionRecord, alias::AliasChange,
    },
    os::{self, Generation},
    secret::Material,
};
use subtle::ConstantTimeEq;

pub(crate) struct MemoryStore {
    home: Generation,
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    changes: u64,
    keys: BTreeMap<KeyId, (KeyRecord, Vec<VersionRecord>)>,
    aliases: BTreeMap<Alias, KeyId>,
    imported: Vec<Material>,
    clients: BTreeMap<ClientId, Client>,
}

impl MemoryStore {
    pub(crate) fn new() -> Self {
        Self { home: os::generation(), contents: Mutex::default() }
    }

    fn lock(&self) -> Result<MutexGuard<'_, Contents>> {
        if self.home != os::generation() {
            return Err(Error::new(
                ErrorKind::StoreUnavailable,
                "A store in memory cannot be used by a forked child; use a store in a file.",
            ));
        }
        Ok(self.contents.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn copy(version: &VersionRecord) -> Result<VersionRecord> {
    Ok(VersionRecord {
        id: version.id,
        ordinal: version.ordinal,
        created: version.created,
        material: Material::new(version.material.expose())?,
        spent: version.spent,
    })
}

impl Contents {
    fn version(&mut self, id: &KeyVersionId) -> Result<&mut VersionRecord> {
        self.keys
            .get_mut(&id.key_id())
            .and_then(|(_, versions)| versions.iter_mut().find(|version| version.id == *id))
            .ok_or_else(|| Error::key_not_found(id.as_str()))
    }
}

impl KeyStore for MemoryStore {
    fn load(&self) -> Result<StoreImage> {
        let contents = self.lock()?;
        let stored = |(record, versions): &(KeyRecord, Vec<VersionRecord>)| {
            Ok(StoredKey {
                record: record.clone(),
                versions: versions.iter().map(copy).collect::<Result<_>>()?,
                aliases: contents
                    .aliases
                    .iter()
                    .filter(|(_, key)| **key == record.id)
                    .map(|(alias, _)| alias.clone())
                    .collect(),
            })
        };
        let mut keys = contents.keys.values().map(stored).collect::<Result<Vec<_>>>()?;
        keys.sort_by_key(|key| (key.record.created, key.record.id));
        let mut clients: Vec<_> = contents.clients.values().cloned().collect();
        clients.sort_by_key(|client| (client.creation_date, client.client_id));
        Ok(StoreImage { epoch: 0, changes: contents.changes, keys, clients })
    }

    fn changes(&self) -> Result<u64> {
        Ok(self.lock()?.changes)
    }

    fn create(&self, key: &NewKey) -> Result<()> {
        let mut contents = self.lock()?;
        let NewKey { record, version, alias } = key;
        if let Some(alias) = alias {
            AliasChange::Create(record.id).check(
                alias,
                contents.aliases.get(alias).copied(),
                Some(record),
            )?;
        }
        if record.origin == Origin::Imported {
            let material = version.material.expose();
            if contents.imported.iter().any(|known| known.expose().ct_eq(material).into()) {
                return Err(super::imported_before());
            }
            contents.imported.push(Material::new(material)?);
        }
        if let Some(alias) = alias {
            contents.aliases.insert(alias.clone(), record.id);
        }
        contents.keys.insert(record.id, (record.clone(), vec![copy(version)?]));
        contents.changes += 1;
        Ok(())
    }

    fn change(
        &self,
        key: &KeyId,
        decide: &mut dyn FnMut(&KeyRecord) -> Result<KeyChange>,
    ) -> Result<()> {
        let mut contents = self.lock()?;
        let (record, versions) =
            contents.keys.get_mut(key).ok_or_else(|| Error::key_not_found(key.as_str()))?;
        match decide(record)? {
            KeyChange::Keep => return Ok(()),
            KeyChange::Save(changed, version) => {
                *record = changed;
                versions.extend(version);
            }
            KeyChange::Delete => {
                contents.keys.remove(key);
                contents.aliases.retain(|_, named| named != key);
            }
        }
        contents.changes += 1;
        Ok(())
    }

    fn change_alias(&self, alias: &Alias, change: AliasChange) -> Result<()> {
        let mut contents = self.lock()?;
        let target =
            change.target().and_then(|key| contents.keys.get(&key)).map(|(record, _)| record);
        change.check(alias, contents.aliases.get(alias).copied(), target)?;
        match change.target() {
            Some(key) => contents.aliases.insert(alias.clone(), key),
            None => contents.aliases.remove(alias),
        };
        contents.changes += 1;
        Ok(())
    }

    fn create_client(&self, client: &Client) -> Result<()> {
        let mut contents = self.lock()?;
        if contents.clients.contains_key(&client.client_id) {
            return Err(super::client_known(&client.client_id));
        }
        contents.clients.insert(client.client_id, client.clone());
        contents.changes += 1;
        Ok(())
    }

    fn change_client(
        &self,
        id: &ClientId,
        decide: &mut dyn FnMut(&Client) -> Result<ClientChange>,
    ) -> Result<()> {
        let mut contents = self.lock()?;
        let client = contents.clients.get_mut(id).ok_or_else(|| clients::not_found(id))?;
        match decide(client)? {
            ClientChange::Keep => return Ok(()),
            ClientChange::Save(changed) => {
                assert_eq!(changed.client_id, *id);
                *client = changed;
            }
            ClientChange::Delete => {
                contents.clients.remove(id);
            }
        }
        contents.changes += 1;
        Ok(())
    }

    fn lease(&self, version: &KeyVersionId, request: LeaseRequest) -> Result<Grant> {
        let mut contents = self.lock()?;
        let version = contents.version(version)?;
        let grant = grant(version.spent, request);
        version.spent = grant.spent;
        Ok(grant)
    }

    fn give_back(&self, version: &KeyVersionId, unused: u64) -> Result<()> {
        let mut contents = self.lock()?;
        let version = contents.version(version)?;
        version.spent = version.spent.saturating_sub(unused);
        Ok(())
    }

    fn describe(&self) -> String {
        "in memory".to_owned()
    }
}
