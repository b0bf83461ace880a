//! The row of the store itself: change counter, counts, and the verdict on a root key.

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    schema::{Outcome, corrupt},
    seal::{Fields, StoreId, StoreKeys},
};
use crate::rng::Rng;

/// The row of the store itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) changes: i64,
    pub(super) keys: i64,
    pub(super) aliases: i64,
    pub(super) fingerprints: i64,
    pub(super) clients: i64,
    /// Keys deleted over the store's life.
    pub(super) deleted: i64,
    /// How many of them had been when leftovers were last erased.
    pub(super) erased: i64,
}

impl Meta {
    fn fields(&self, store: &StoreId) -> Fields {
        Fields::new(store, "meta")
            .int(self.changes)
            .int(self.keys)
            .int(self.aliases)
            .int(self.fingerprints)
            .int(self.clients)
            .int(self.deleted)
            .int(self.erased)
    }

    pub(super) fn insert(&self, sqlite: &Connection, keys: &StoreKeys, rng: &Rng) -> Outcome<()> {
        sqlite.execute(
            "INSERT INTO meta VALUES (1, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                &keys.id.0[..],
                keys.check_value(rng)?,
                self.changes,
                self.keys,
                self.aliases,
                self.fingerprints,
                self.clients,
                self.deleted,
                self.erased,
                &keys.mac(&self.fields(&keys.id))[..],
            ],
        )?;
        Ok(())
    }

    /// Reads and verifies the row of an open store.
    pub(super) fn read(sqlite: &Connection, keys: &StoreKeys) -> Outcome<Self> {
        let stored = StoredMeta::read(sqlite)?;
        match stored.verdict(keys) {
            Verdict::Good if stored.id == keys.id => Ok(stored.meta),
            _ => Err(corrupt("meta", "the store")),
        }
    }

    /// Writes the row after a change of keys, aliases or clients.
    pub(super) fn changed(mut self, sqlite: &Connection, keys: &StoreKeys) -> Outcome<()> {
        self.changes = self.changes.wrapping_add(1);
        self.update(sqlite, keys)
    }

    /// Notes that leftovers of the first `deleted` deletions are erased. No change in the sense of the counter.
    pub(super) fn note_erased(
        mut self,
        sqlite: &Connection,
        keys: &StoreKeys,
        deleted: i64,
    ) -> Outcome<()> {
        self.erased = self.erased.max(deleted);
        self.update(sqlite, keys)
    }

    fn update(self, sqlite: &Connection, keys: &StoreKeys) -> Outcome<()> {
        let mac = keys.mac(&self.fields(&keys.id));
        let Self { changes, keys, aliases, fingerprints, clients, deleted, erased } = self;
        sqlite.execute(
            "UPDATE meta SET changes = ?1, keys = ?2, aliases = ?3, fingerprints = ?4, \
             clients = ?5, deleted = ?6, erased = ?7, mac = ?8",
            params![changes, keys, aliases, fingerprints, clients, deleted, erased, &mac[..]],
        )?;
        Ok(())
    }
}

/// The row of the store as it lies there, not verified.
pub(super) struct StoredMeta {
    pub(super) id: StoreId,
    check_value: Vec<u8>,
    pub(super) meta: Meta,
    mac: Vec<u8>,
}

/// What a root key says of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Good,
    /// The root key is right and the row is not.
    Damaged,
    WrongRootKey,
}

impl StoredMeta {
    pub(super) fn read(sqlite: &Connection) -> Outcome<Self> {
        let row = sqlite
            .query_row(
                "SELECT store_id, check_value, changes, keys, aliases, fingerprints, \
                 clients, deleted, erased, mac FROM meta WHERE one = 1",
                [],
                |row| {
                    Ok((
                        row.get::<_, Vec<u8>>(0)?,
                        row.get(1)?,
                        Meta {
                            changes: row.get(2)?,
                            keys: row.get(3)?,
                            aliases: row.get(4)?,
                            fingerprints: row.get(5)?,
                            clients: row.get(6)?,
                            deleted: row.get(7)?,
                            erased: row.get(8)?,
                        },
                        row.get(9)?,
                    ))
                },
            )
            .optional()?;
        let damaged = || corrupt("meta", "the store");
        let (id, check_value, meta, mac) = row.ok_or_else(damaged)?;
        let id = StoreId(id.try_into().map_err(|_| damaged())?);
        Ok(Self { id, check_value, meta, mac })
    }

    /// The check value is outside the MAC, so that one of the two still tells a damaged row from a wrong root key.
    pub(super) fn verdict(&self, keys: &StoreKeys) -> Verdict {
        let opens = keys.opens(&self.check_value);
        let verifies = keys.verifies(&self.meta.fields(&self.id), &self.mac);
        match (opens, verifies) {
            (true, true) => Verdict::Good,
            (false, false) => Verdict::WrongRootKey,
            _ => Verdict::Damaged,
        }
    }
}
