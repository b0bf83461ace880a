//! The rows of the server's clients: reading with verification, writing with MAC. As `rows.rs`, for one table.
//!
//! Permissions are kept as their names with commas between them, key patterns one a line: neither holds the other's
//! separator.

use std::time::SystemTime;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    rows::printable,
    schema::{Outcome, corrupt},
    seal::{Fields, StoreId, StoreKeys},
};
use crate::{
    clients::{Client, ClientId, KeyPattern, Permissions},
    keys::system_time,
};

const ENABLED: &str = "Enabled";
const DISABLED: &str = "Disabled";

/// A row of `clients` as it lies there.
struct RawClient {
    id: String,
    name: String,
    created: i64,
    state: String,
    permissions: String,
    key_patterns: String,
    public_key: Vec<u8>,
}

const COLUMNS: &str = "id, name, created, state, permissions, key_patterns, public_key, mac";

impl RawClient {
    fn of(client: &Client) -> Self {
        let created = client.creation_date.duration_since(SystemTime::UNIX_EPOCH);
        let patterns: Vec<_> = client.key_patterns.iter().map(KeyPattern::as_str).collect();
        Self {
            id: client.client_id.as_str().to_owned(),
            name: client.name.clone(),
            created: created.map_or(0, |since| since.as_secs()).cast_signed(),
            state: if client.enabled { ENABLED } else { DISABLED }.to_owned(),
            permissions: client.permissions.to_string(),
            key_patterns: patterns.join("\n"),
            public_key: client.public_key.clone(),
        }
    }

    fn read(row: &Row<'_>) -> rusqlite::Result<(Self, Vec<u8>)> {
        let raw = Self {
            id: row.get(0)?,
            name: row.get(1)?,
            created: row.get(2)?,
            state: row.get(3)?,
            permissions: row.get(4)?,
            key_patterns: row.get(5)?,
            public_key: row.get(6)?,
        };
        Ok((raw, row.get(7)?))
    }

    fn fields(&self, store: &StoreId) -> Fields {
        Fields::new(store, "clients")
            .text(&self.id)
            .text(&self.name)
            .int(self.created)
            .text(&self.state)
            .text(&self.permissions)
            .text(&self.key_patterns)
            .bytes(&self.public_key)
    }

    /// The client, if the row means one. The MAC has been verified: anything else was never written.
    fn parse(self) -> Option<Client> {
        let patterns = self.key_patterns.lines().map(|line| KeyPattern::parse(line).ok());
        let client = Client {
            client_id: ClientId::parse(&self.id)?,
            enabled: match self.state.as_str() {
                ENABLED => true,
                DISABLED => false,
                _ => return None,
            },
            permissions: Permissions::parse(&self.permissions).ok()?,
            key_patterns: patterns.collect::<Option<_>>()?,
            name: self.name,
            creation_date: system_time(self.created.cast_unsigned()),
            public_key: self.public_key,
        };
        client.check().is_ok().then_some(client)
    }
}

fn verified_client(raw: RawClient, mac: &[u8], keys: &StoreKeys) -> Outcome<Client> {
    let id = printable(&raw.id);
    if !keys.verifies(&raw.fields(&keys.id), mac) {
        return Err(corrupt("clients", id));
    }
    raw.parse().ok_or_else(|| corrupt("clients", id))
}

/// Every client, in no order.
pub(super) fn read_clients(sqlite: &Connection, keys: &StoreKeys) -> Outcome<Vec<Client>> {
    let mut statement = sqlite.prepare(&format!("SELECT {COLUMNS} FROM clients"))?;
    statement
        .query_map([], RawClient::read)?
        .map(|row| {
            let (raw, mac) = row?;
            verified_client(raw, &mac, keys)
        })
        .collect()
}

pub(super) fn read_client(
    sqlite: &Connection,
    keys: &StoreKeys,
    id: &ClientId,
) -> Outcome<Option<Client>> {
    let statement = format!("SELECT {COLUMNS} FROM clients WHERE id = ?1");
    let row = sqlite.query_row(&statement, [id.as_str()], RawClient::read).optional()?;
    row.map(|(raw, mac)| verified_client(raw, &mac, keys)).transpose()
}

pub(super) fn insert_client(sqlite: &Connection, keys: &StoreKeys, client: &Client) -> Outcome<()> {
    write_client(sqlite, keys, client, "INSERT INTO clients VALUES (?1,?2,?3,?4,?5,?6,?7,?8)")
}

pub(super) fn update_client(sqlite: &Connection, keys: &StoreKeys, client: &Client) -> Outcome<()> {
    let statement = "UPDATE clients SET name = ?2, created = ?3, state = ?4, permissions = ?5, \
                     key_patterns = ?6, public_key = ?7, mac = ?8 WHERE id = ?1";
    write_client(sqlite, keys, client, statement)
}

fn write_client(
    sqlite: &Connection,
    keys: &StoreKeys,
    client: &Client,
    statement: &str,
) -> Outcome<()> {
    let raw = RawClient::of(client);
    let mac = keys.mac(&raw.fields(&keys.id));
    let written = sqlite.execute(
        statement,
        params![
            raw.id,
            raw.name,
            raw.created,
            raw.state,
            raw.permissions,
            raw.key_patterns,
            raw.public_key,
            &mac[..],
        ],
    )?;
    assert_eq!(written, 1);
    Ok(())
}

pub(super) fn delete_client(sqlite: &Connection, id: &ClientId) -> Outcome<()> {
    sqlite.execute("DELETE FROM clients WHERE id = ?1", [id.as_str()])?;
    Ok(())
}
