//! The rows of keys and of what hangs on them: reading with verification, writing with MAC or seal.
//!
//! A MAC covers the columns as SQLite returned them, before anything is parsed, so an edit that would parse to the
//! same value is refused, too. Transactions and connections are `sqlite.rs`, the store's own row is `meta.rs`,
//! clients are `client_rows.rs`.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    Grant, LeaseRequest, NewKey, grant,
    schema::{Failure, Outcome, corrupt},
    seal::{Fields, MAC_LEN, StoreId, StoreKeys},
};
use crate::{
    error::{Error, ErrorKind},
    keys::{
        Alias, KeyId, KeyRecord, KeySpec, KeyState, KeyVersionId, Origin, RotationPeriod,
        VersionRecord,
    },
    rng::Rng,
    wrap::Scheme,
};

/// A row of `keys` as it lies there.
struct RawKey {
    id: String,
    spec: String,
    scheme: String,
    origin: String,
    description: String,
    created: i64,
    state: String,
    deletion_due: Option<i64>,
    rotation: Option<i64>,
    last_rotation: i64,
    version_count: i64,
}

const KEY_COLUMNS: &str = "id, spec, scheme, origin, description, created, state, deletion_due, \
                           rotation, last_rotation, version_count, mac";

impl RawKey {
    fn of(record: &KeyRecord) -> Self {
        let deletion_due = match record.state {
            KeyState::PendingDeletion { due } => Some(due.cast_signed()),
            KeyState::Enabled | KeyState::Disabled => None,
        };
        Self {
            id: record.id.as_str().to_owned(),
            spec: record.spec.as_str().to_owned(),
            scheme: record.scheme.as_str().to_owned(),
            origin: record.origin.as_str().to_owned(),
            description: record.description.clone(),
            created: record.created.cast_signed(),
            state: record.state.as_str().to_owned(),
            deletion_due,
            rotation: record.rotation.map(|period| period.as_secs().cast_signed()),
            last_rotation: record.last_rotation.cast_signed(),
            version_count: record.version_count.into(),
        }
    }

    fn read(row: &Row<'_>) -> rusqlite::Result<(Self, Vec<u8>)> {
        let raw = Self {
            id: row.get(0)?,
            spec: row.get(1)?,
            scheme: row.get(2)?,
            origin: row.get(3)?,
            description: row.get(4)?,
            created: row.get(5)?,
            state: row.get(6)?,
            deletion_due: row.get(7)?,
            rotation: row.get(8)?,
            last_rotation: row.get(9)?,
            version_count: row.get(10)?,
        };
        Ok((raw, row.get(11)?))
    }

    fn fields(&self, store: &StoreId) -> Fields {
        Fields::new(store, "keys")
            .text(&self.id)
            .text(&self.spec)
            .text(&self.scheme)
            .text(&self.origin)
            .text(&self.description)
            .int(self.created)
            .text(&self.state)
            .optional_int(self.deletion_due)
            .optional_int(self.rotation)
            .int(self.last_rotation)
            .int(self.version_count)
    }

    /// The record, if the row means one. The MAC has been verified: anything else was never written.
    fn parse(self) -> Option<KeyRecord> {
        let state = match (self.state.as_str(), self.deletion_due) {
            ("Enabled", None) => KeyState::Enabled,
            ("Disabled", None) => KeyState::Disabled,
            ("PendingDeletion", Some(due)) => {
                KeyState::PendingDeletion { due: due.cast_unsigned() }
            }
            _ => return None,
        };
        let rotation = match self.rotation {
            Some(seconds) => {
                let period = std::time::Duration::from_secs(seconds.cast_unsigned());
                Some(RotationPeriod::new(period).ok()?)
            }
            None => None,
        };
        Some(KeyRecord {
            id: KeyId::parse(&self.id)?,
            spec: KeySpec::parse(&self.spec).ok()?,
            scheme: Scheme::parse(&self.scheme).ok()?,
            origin: [Origin::Generated, Origin::Imported]
                .into_iter()
                .find(|origin| origin.as_str() == self.origin)?,
            description: self.description,
            created: self.created.cast_unsigned(),
            state,
            rotation,
            last_rotation: self.last_rotation.cast_unsigned(),
            version_count: self.version_count.try_into().ok()?,
        })
    }
}

fn verified_key(raw: RawKey, mac: &[u8], keys: &StoreKeys) -> Outcome<KeyRecord> {
    let id = raw.id.clone();
    if !keys.verifies(&raw.fields(&keys.id), mac) {
        return Err(corrupt("keys", printable(&id)));
    }
    raw.parse().ok_or_else(|| corrupt("keys", printable(&id)))
}

/// Every key, in no order.
pub(super) fn read_keys(sqlite: &Connection, keys: &StoreKeys) -> Outcome<Vec<KeyRecord>> {
    let mut statement = sqlite.prepare(&format!("SELECT {KEY_COLUMNS} FROM keys"))?;
    statement
        .query_map([], RawKey::read)?
        .map(|row| {
            let (raw, mac) = row?;
            verified_key(raw, &mac, keys)
        })
        .collect()
}

pub(super) fn read_key(
    sqlite: &Connection,
    keys: &StoreKeys,
    id: &KeyId,
) -> Outcome<Option<KeyRecord>> {
    let statement = format!("SELECT {KEY_COLUMNS} FROM keys WHERE id = ?1");
    let row = sqlite.query_row(&statement, [id.as_str()], RawKey::read).optional()?;
    row.map(|(raw, mac)| verified_key(raw, &mac, keys)).transpose()
}

pub(super) fn insert_key(sqlite: &Connection, keys: &StoreKeys, record: &KeyRecord) -> Outcome<()> {
    write_key(
        sqlite,
        keys,
        record,
        "INSERT INTO keys VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12)",
    )
}

pub(super) fn update_key(sqlite: &Connection, keys: &StoreKeys, record: &KeyRecord) -> Outcome<()> {
    let statement = "UPDATE keys SET spec = ?2, scheme = ?3, origin = ?4, description = ?5, \
                     created = ?6, state = ?7, deletion_due = ?8, rotation = ?9, \
                     last_rotation = ?10, version_count = ?11, mac = ?12 WHERE id = ?1";
    write_key(sqlite, keys, record, statement)
}

fn write_key(
    sqlite: &Connection,
    keys: &StoreKeys,
    record: &KeyRecord,
    statement: &str,
) -> Outcome<()> {
    let raw = RawKey::of(record);
    let mac = keys.mac(&raw.fields(&keys.id));
    let written = sqlite.execute(
        statement,
        params![
            raw.id,
            raw.spec,
            raw.scheme,
            raw.origin,
            raw.description,
            raw.created,
            raw.state,
            raw.deletion_due,
            raw.rotation,
            raw.last_rotation,
            raw.version_count,
            &mac[..],
        ],
    )?;
    assert_eq!(written, 1);
    Ok(())
}

/// Removes a key and all that hangs on it. Returns how many aliases went with it.
pub(super) fn delete_key(sqlite: &Connection, id: &KeyId) -> Outcome<usize> {
    let id = [id.as_str()];
    sqlite.execute(
        "DELETE FROM budgets WHERE version_id IN (SELECT id FROM versions WHERE key_id = ?1)",
        id,
    )?;
    sqlite.execute("DELETE FROM versions WHERE key_id = ?1", id)?;
    let aliases = sqlite.execute("DELETE FROM aliases WHERE key_id = ?1", id)?;
    sqlite.execute("DELETE FROM keys WHERE id = ?1", id)?;
    Ok(aliases)
}

/// What a version's seal is bound to.
fn version_fields(
    store: &StoreId,
    key: &KeyRecord,
    version: &str,
    ordinal: i64,
    created: i64,
) -> Fields {
    Fields::new(store, "versions")
        .text(version)
        .text(key.id.as_str())
        .int(ordinal)
        .int(created)
        .text(key.spec.as_str())
        .text(key.scheme.as_str())
        .text(key.origin.as_str())
}

/// Adds a version of `key`, sealed, and its budget.
pub(super) fn insert_version(
    sqlite: &Connection,
    keys: &StoreKeys,
    key: &KeyRecord,
    version: &VersionRecord,
    rng: &Rng,
) -> Outcome<()> {
    assert!(version.id.key_id() == key.id && version.ordinal < key.version_count);
    assert_eq!(version.material.expose().len(), key.spec.material_len());
    let (id, ordinal) = (version.id.as_str(), i64::from(version.ordinal));
    let created = version.created.cast_signed();
    let aad = version_fields(&keys.id, key, id, ordinal, created);
    let sealed = keys.seal(&aad, &version.material, rng)?;
    sqlite.execute(
        "INSERT INTO versions VALUES (?1, ?2, ?3, ?4, ?5)",
        params![id, key.id.as_str(), ordinal, created, sealed],
    )?;
    let spent = version.spent.cast_signed();
    sqlite.execute(
        "INSERT INTO budgets VALUES (?1, ?2, ?3)",
        params![id, spent, &budget_mac(keys, id, spent)[..]],
    )?;
    Ok(())
}

/// Every version of `key` in ordinal order, opened, with its budget; none missing.
pub(super) fn read_versions(
    sqlite: &Connection,
    keys: &StoreKeys,
    key: &KeyRecord,
) -> Outcome<Vec<VersionRecord>> {
    let mut statement = sqlite.prepare(
        "SELECT versions.id, ordinal, created, sealed, spent, mac FROM versions \
         LEFT JOIN budgets ON version_id = versions.id WHERE key_id = ?1 ORDER BY ordinal",
    )?;
    let mut rows = statement.query([key.id.as_str()])?;
    let mut versions = Vec::new();
    while let Some(row) = rows.next()? {
        let (id, ordinal, created): (String, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let sealed: Vec<u8> = row.get(3)?;
        let damaged = || corrupt("versions", printable(&id));
        let aad = version_fields(&keys.id, key, &id, ordinal, created);
        let version_id = KeyVersionId::parse(&id).ok_or_else(damaged)?;
        let material = keys.open(&aad, &sealed, key.spec.material_len()).ok_or_else(damaged)?;
        let (Some(spent), Some(mac)) =
            (row.get::<_, Option<i64>>(4)?, row.get::<_, Option<Vec<u8>>>(5)?)
        else {
            return Err(corrupt("budgets", printable(&id)));
        };
        versions.push(VersionRecord {
            id: version_id,
            ordinal: ordinal.try_into().map_err(|_| damaged())?,
            created: created.cast_unsigned(),
            material,
            spent: verified_budget(keys, &id, spent, &mac)?,
        });
    }
    let complete = versions.iter().map(|version| version.ordinal).eq(0..key.version_count);
    if !complete || versions.is_empty() {
        return Err(corrupt("versions", format_args!("a version of {}", key.id)));
    }
    Ok(versions)
}

fn budget_mac(keys: &StoreKeys, version: &str, spent: i64) -> [u8; MAC_LEN] {
    keys.mac(&budget_fields(&keys.id, version, spent))
}

fn budget_fields(store: &StoreId, version: &str, spent: i64) -> Fields {
    Fields::new(store, "budgets").text(version).int(spent)
}

fn verified_budget(keys: &StoreKeys, version: &str, spent: i64, mac: &[u8]) -> Outcome<u64> {
    if keys.verifies(&budget_fields(&keys.id, version, spent), mac) {
        Ok(spent.cast_unsigned())
    } else {
        Err(corrupt("budgets", printable(version)))
    }
}

/// Changes the budget of a version by what `decide` makes of the wraps spent.
fn change_budget<T>(
    sqlite: &Connection,
    keys: &StoreKeys,
    version: &KeyVersionId,
    decide: impl FnOnce(u64) -> (u64, T),
) -> Outcome<T> {
    let id = version.as_str();
    let row = sqlite
        .query_row("SELECT spent, mac FROM budgets WHERE version_id = ?1", [id], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?))
        })
        .optional()?;
    let Some((spent, mac)) = row else {
        let there = sqlite
            .query_row("SELECT 1 FROM versions WHERE id = ?1", [id], |_| Ok(()))
            .optional()?;
        return Err(match there {
            Some(()) => corrupt("budgets", id),
            None => Error::key_not_found(id).into(),
        });
    };
    let before = verified_budget(keys, id, spent, &mac)?;
    let (after, answer) = decide(before);
    if after != before {
        let after = after.cast_signed();
        let written = sqlite.execute(
            "UPDATE budgets SET spent = ?2, mac = ?3 WHERE version_id = ?1",
            params![id, after, &budget_mac(keys, id, after)[..]],
        )?;
        // Nothing is granted that was not counted, whatever became of the table since it was checked.
        if written != 1 {
            return Err(corrupt("budgets", id));
        }
    }
    Ok(answer)
}

pub(super) fn lease(
    sqlite: &Connection,
    keys: &StoreKeys,
    version: &KeyVersionId,
    request: LeaseRequest,
) -> Outcome<Grant> {
    change_budget(sqlite, keys, version, |spent| {
        let grant = grant(spent, request);
        (grant.spent, grant)
    })
}

pub(super) fn give_back(
    sqlite: &Connection,
    keys: &StoreKeys,
    version: &KeyVersionId,
    unused: u64,
) -> Outcome<()> {
    change_budget(sqlite, keys, version, |spent| (spent.saturating_sub(unused), ()))
}

fn alias_fields(store: &StoreId, alias: &str, key: &str) -> Fields {
    Fields::new(store, "aliases").text(alias).text(key)
}

fn verified_alias(keys: &StoreKeys, alias: &str, key: &str, mac: &[u8]) -> Outcome<(Alias, KeyId)> {
    let damaged = || corrupt("aliases", printable(alias));
    if !keys.verifies(&alias_fields(&keys.id, alias, key), mac) {
        return Err(damaged());
    }
    Ok((Alias::parse(alias).map_err(|_| damaged())?, KeyId::parse(key).ok_or_else(damaged)?))
}

/// Every alias, sorted.
pub(super) fn read_aliases(sqlite: &Connection, keys: &StoreKeys) -> Outcome<Vec<(Alias, KeyId)>> {
    let mut statement = sqlite.prepare("SELECT alias, key_id, mac FROM aliases ORDER BY alias")?;
    let mut rows = statement.query([])?;
    let mut aliases = Vec::new();
    while let Some(row) = rows.next()? {
        let (alias, key): (String, String) = (row.get(0)?, row.get(1)?);
        aliases.push(verified_alias(keys, &alias, &key, &row.get::<_, Vec<u8>>(2)?)?);
    }
    Ok(aliases)
}

/// The key that an alias names.
pub(super) fn read_alias(
    sqlite: &Connection,
    keys: &StoreKeys,
    alias: &Alias,
) -> Outcome<Option<KeyId>> {
    let row = sqlite
        .query_row("SELECT key_id, mac FROM aliases WHERE alias = ?1", [alias.as_str()], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?))
        })
        .optional()?;
    row.map(|(key, mac)| Ok(verified_alias(keys, alias.as_str(), &key, &mac)?.1)).transpose()
}

pub(super) fn write_alias(
    sqlite: &Connection,
    keys: &StoreKeys,
    alias: &Alias,
    key: &KeyId,
) -> Outcome<()> {
    let mac = keys.mac(&alias_fields(&keys.id, alias.as_str(), key.as_str()));
    sqlite.execute(
        "INSERT OR REPLACE INTO aliases VALUES (?1, ?2, ?3)",
        params![alias.as_str(), key.as_str(), &mac[..]],
    )?;
    Ok(())
}

pub(super) fn delete_alias(sqlite: &Connection, alias: &Alias) -> Outcome<()> {
    sqlite.execute("DELETE FROM aliases WHERE alias = ?1", [alias.as_str()])?;
    Ok(())
}

fn fingerprint_fields(store: &StoreId, fingerprint: &[u8]) -> Fields {
    Fields::new(store, "fingerprints").bytes(fingerprint)
}

/// Remembers the material of an imported key.
///
/// # Errors
/// `InvalidKeyMaterial` if it was ever imported before.
pub(super) fn remember_import(sqlite: &Connection, keys: &StoreKeys, key: &NewKey) -> Outcome<()> {
    let fingerprint = keys.fingerprint(&key.version.material);
    let mac = keys.mac(&fingerprint_fields(&keys.id, &fingerprint));
    let new = sqlite.execute(
        "INSERT OR IGNORE INTO fingerprints VALUES (?1, ?2)",
        params![&fingerprint[..], &mac[..]],
    )?;
    if new == 1 { Ok(()) } else { Err(Failure::Told(super::imported_before())) }
}

/// Verifies every fingerprint and returns their number.
pub(super) fn check_fingerprints(sqlite: &Connection, keys: &StoreKeys) -> Outcome<i64> {
    let mut statement = sqlite.prepare("SELECT fingerprint, mac FROM fingerprints")?;
    let mut rows = statement.query([])?;
    let mut count = 0;
    while let Some(row) = rows.next()? {
        let (fingerprint, mac): (Vec<u8>, Vec<u8>) = (row.get(0)?, row.get(1)?);
        if !keys.verifies(&fingerprint_fields(&keys.id, &fingerprint), &mac) {
            return Err(corrupt("fingerprints", "an imported key"));
        }
        count += 1;
    }
    Ok(count)
}

/// How many rows a table has.
pub(super) fn count(sqlite: &Connection, table: &str) -> Outcome<i64> {
    let statement = format!("SELECT count(*) FROM {table}");
    Ok(sqlite.query_row(&statement, [], |row| row.get(0))?)
}

/// An id from a row that may hold anything, cut to what fits a message.
pub(super) fn printable(id: &str) -> String {
    format!("{:?}", crate::error::Shortened(id))
}

/// The refusal of a key that is in the store already.
pub(super) fn known(id: &KeyId) -> Failure {
    Failure::Told(Error::new(ErrorKind::InvalidParameter, format!("Key {id} exists already.")))
}
