//! Reads and verifies a whole store, in one transaction of its caller.

use rusqlite::Connection;

use super::{
    StoreImage, client_rows,
    meta::Meta,
    rows,
    schema::{Outcome, corrupt},
    seal::StoreKeys,
};
use crate::{
    error::{Error, ErrorKind},
    keys::StoredKey,
};

/// Reads and verifies everything.
pub(super) fn load(sqlite: &Connection, keys: &StoreKeys) -> Outcome<StoreImage> {
    let meta = Meta::read(sqlite, keys)?;
    let mut stored = Vec::new();
    for record in rows::read_keys(sqlite, keys)? {
        let versions = rows::read_versions(sqlite, keys, &record)?;
        stored.push(StoredKey { record, versions, aliases: Vec::new() });
    }
    stored.sort_by_key(|key| key.record.id);
    let aliases = rows::read_aliases(sqlite, keys)?;
    let alias_count = aliases.len();
    for (alias, id) in aliases {
        let at = stored
            .binary_search_by_key(&id, |key| key.record.id)
            .map_err(|_| corrupt("aliases", &alias))?;
        stored[at].aliases.push(alias);
    }
    let mut clients = client_rows::read_clients(sqlite, keys)?;
    // Rows that nothing asked for, or that are gone without a trace.
    let version_count = stored.iter().map(|key| key.versions.len()).sum::<usize>();
    for (table, found, expected) in [
        ("keys", as_count(stored.len()), meta.keys),
        ("aliases", as_count(alias_count), meta.aliases),
        ("fingerprints", rows::check_fingerprints(sqlite, keys)?, meta.fingerprints),
        ("clients", as_count(clients.len()), meta.clients),
        ("versions", rows::count(sqlite, "versions")?, as_count(version_count)),
        ("budgets", rows::count(sqlite, "budgets")?, as_count(version_count)),
    ] {
        if found != expected {
            let detail = format!("Table {table} has {found} records; there have to be {expected}.");
            return Err(Error::new(ErrorKind::StoreCorrupt, detail).into());
        }
    }
    stored.sort_by_key(|key| (key.record.created, key.record.id));
    clients.sort_by_key(|client| (client.creation_date, client.client_id));
    Ok(StoreImage { epoch: 0, changes: meta.changes.cast_unsigned(), keys: stored, clients })
}

fn as_count(len: usize) -> i64 {
    i64::try_from(len).expect("no collection is that long")
}
