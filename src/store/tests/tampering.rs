//! Whoever writes into the file without the root key is found out: every byte of every column is changed, rows are
//! swapped and removed, and loading has to refuse.
//!
//! Restoring an older copy of the file, or of single rows, is not found out (SECURITY.md).

use rusqlite::{Connection, types::Value};

use super::helpers::*;
use crate::{
    error::ErrorKind,
    keys::{Alias, KeySpec, KeyState, Origin, RotationPeriod, alias::AliasChange},
    store::{ClientChange, KeyChange, KeyStore, LeaseRequest, SqliteStore, tables::TABLES},
};

/// A store with rows of every kind, two versions, and optional columns both set and empty.
fn rich() -> (Scratch, SqliteStore) {
    let (scratch, store) = Scratch::new();
    let one = new_key(KeySpec::Aes256, Origin::Generated, Some("alias/one"));
    let id = one.record.id;
    store.create(&one).unwrap();
    store.create(&new_key(KeySpec::Aes256, Origin::Imported, Some("alias/two"))).unwrap();
    store.create(&new_key(KeySpec::Aes128, Origin::Imported, None)).unwrap();
    let mut version = Some(new_version(&id, 1, 32));
    let add = &mut |record: &crate::keys::KeyRecord| {
        let mut record = record.clone();
        record.rotation = Some(RotationPeriod::parse("30d").unwrap());
        record.state = KeyState::PendingDeletion { due: 99_999 };
        record.version_count = 2;
        Ok(KeyChange::Save(record, version.take()))
    };
    store.change(&id, add).unwrap();
    lease(&store, &one.version.id, 9);
    store.create_client(&new_client("one")).unwrap();
    let mut two = new_client("two");
    two.enabled = false;
    store.create_client(&two).unwrap();
    (scratch, store)
}

fn columns(raw: &Connection, table: &str) -> Vec<String> {
    let statement = format!("SELECT name FROM pragma_table_info('{table}')");
    let mut statement = raw.prepare(&statement).unwrap();
    statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
}

/// Everything that a value may be turned into.
fn variants(value: &Value) -> Vec<Value> {
    let flips = |bytes: &[u8]| -> Vec<Vec<u8>> {
        let flipped = (0..bytes.len()).map(|at| {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1;
            flipped
        });
        let cut = bytes.split_last().map(|(_, rest)| rest.to_vec());
        flipped.chain(cut).chain([[bytes, b"x"].concat()]).collect()
    };
    match value {
        Value::Null => vec![Value::Integer(0), Value::Integer(1)],
        Value::Integer(number) => {
            let bits = (0..64).map(|bit| Value::Integer(number ^ (1 << bit)));
            bits.chain([Value::Null]).collect()
        }
        Value::Text(text) => flips(text.as_bytes())
            .into_iter()
            // Bytes that are no text can't be bound as text; the blob of them is cast below.
            .map(|bytes| match String::from_utf8(bytes) {
                Ok(text) => Value::Text(text),
                Err(error) => Value::Blob(error.into_bytes()),
            })
            .collect(),
        Value::Blob(bytes) => flips(bytes).into_iter().map(Value::Blob).collect(),
        Value::Real(_) => unreachable!("no such column"),
    }
}

/// Changes every value of `table` in every way and calls `check` on the changed store. Returns how many there were.
fn each_edit(scratch: &Scratch, table: &str, mut check: impl FnMut(&str)) -> usize {
    let raw = scratch.raw();
    let mut edits = 0;
    let rows: i64 =
        raw.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap();
    for column in columns(&raw, table) {
        for row in 0..rows {
            let (rowid, value): (i64, Value) = raw
                .query_row(
                    &format!(
                        "SELECT rowid, {column} FROM {table} ORDER BY rowid LIMIT 1 OFFSET {row}"
                    ),
                    [],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )
                .unwrap();
            // SQL's integer primary key is the rowid itself.
            let restore_from = |now: &Value| match (column.as_str(), now) {
                ("one", Value::Integer(now)) => *now,
                _ => rowid,
            };
            for variant in variants(&value) {
                let is_text = matches!(value, Value::Text(_));
                let place = if is_text { "CAST(?1 AS TEXT)" } else { "?1" };
                let update = format!("UPDATE {table} SET {column} = {place} WHERE rowid = ?2");
                // Refused by SQLite itself: NULL in a NOT NULL column, two rows of one ordinal.
                if raw.execute(&update, (&variant, rowid)).is_err() {
                    continue;
                }
                edits += 1;
                check(&format!("{table}.{column} {value:?} -> {variant:?}"));
                let restored = raw.execute(&update, (&value, restore_from(&variant))).unwrap();
                assert_eq!(restored, 1);
            }
        }
    }
    edits
}

#[test]
fn every_edit_of_every_column_is_refused() {
    let (scratch, store) = rich();
    let before = contents(&store);
    for (table, _) in TABLES {
        let edits = each_edit(&scratch, table, |edit| {
            let error = store.load().err().unwrap_or_else(|| panic!("went unseen: {edit}"));
            assert_eq!(error.kind(), ErrorKind::StoreCorrupt, "{edit}: {error}");
            assert!(
                error.message().contains(table) || edit.contains(".key_id "),
                "{edit}: {error}"
            );
        });
        assert!(edits > 60, "{table}: {edits}");
    }
    assert_eq!(contents(&store), before);
}

#[test]
fn edited_rows_are_refused_by_the_calls_that_use_them() {
    let (scratch, store) = rich();
    let raw = scratch.raw();
    let image = store.load().unwrap();
    let key = image.keys.iter().find(|key| key.versions.len() == 2).unwrap();
    let (id, version) = (key.record.id, key.versions[0].id);
    let refused = |edit: &str, undo: &str, call: &dyn Fn() -> ErrorKind| {
        assert!(raw.execute(edit, []).unwrap() > 0);
        assert_eq!(call(), ErrorKind::StoreCorrupt, "{edit}");
        raw.execute(undo, []).unwrap();
    };
    let request = LeaseRequest { need: 1, surplus: 0 };
    refused(
        "UPDATE budgets SET spent = spent - 1",
        "UPDATE budgets SET spent = spent + 1",
        &|| kind(store.lease(&version, request)),
    );
    refused(
        "UPDATE budgets SET spent = spent - 1",
        "UPDATE budgets SET spent = spent + 1",
        &|| kind(store.give_back(&version, 1)),
    );
    refused(
        "UPDATE keys SET created = created + 1",
        "UPDATE keys SET created = created - 1",
        &|| kind(store.change(&id, &mut |_| unreachable!())),
    );
    let alias = Alias::parse("alias/one").unwrap();
    refused(
        "UPDATE aliases SET mac = CAST(mac || 'x' AS BLOB)",
        "UPDATE aliases SET mac = substr(mac, 1, 32)",
        &|| kind(store.change_alias(&alias, AliasChange::Delete)),
    );
    refused(
        "UPDATE meta SET changes = changes + 1",
        "UPDATE meta SET changes = changes - 1",
        &|| kind(store.changes()),
    );
    refused(
        "UPDATE meta SET changes = changes + 1",
        "UPDATE meta SET changes = changes - 1",
        &|| kind(store.create(&direct())),
    );
    let client = image.clients[0].client_id;
    for edit in ["permissions = 'all'", "state = 'Enabled', name = name || 'x'"] {
        let image = store.load().unwrap();
        refused(
            &format!("UPDATE clients SET {edit}"),
            "UPDATE clients SET permissions = 'generate,decrypt', name = rtrim(name, 'x'), \
             state = iif(name LIKE 'two%', 'Disabled', 'Enabled')",
            &|| kind(store.change_client(&client, &mut |_| unreachable!())),
        );
        assert_eq!(store.load().unwrap().clients, image.clients);
    }
    refused(
        "UPDATE meta SET clients = clients + 1",
        "UPDATE meta SET clients = clients - 1",
        &|| kind(store.change_client(&client, &mut |_| Ok(ClientChange::Delete))),
    );
    lease(&store, &version, 1);
    raw.execute("DELETE FROM budgets", []).unwrap();
    assert_eq!(kind(store.lease(&version, request)), ErrorKind::StoreCorrupt);
}

#[test]
fn an_edited_meta_row_is_told_from_a_wrong_root_key() {
    let (scratch, store) = rich();
    drop(store);
    each_edit(&scratch, "meta", |edit| {
        let error = scratch.open().err().unwrap_or_else(|| panic!("went unseen: {edit}"));
        let expected = match edit.split(' ').next().unwrap() {
            // Another store id means other keys: nothing opens, as with a wrong root key. Of another length it is
            // damage.
            "meta.store_id" => [ErrorKind::WrongRootKey, ErrorKind::StoreCorrupt],
            _ => [ErrorKind::StoreCorrupt; 2],
        };
        assert!(expected.contains(&error.kind()), "{edit}: {error}");
    });
    scratch.open().unwrap().load().unwrap();
}

#[test]
fn swapped_and_removed_rows_are_refused() {
    let (scratch, store) = rich();
    let before = contents(&store);
    // Both by rowid: versions 1 and 4 are of one key, 1 and 2 of two keys with the same spec.
    let swap = |table: &str, columns: &[&str], one: i64, two: i64| {
        let sets: Vec<_> = columns
            .iter()
            .map(|column| {
                format!("{column} = (SELECT {column} FROM temp.copy WHERE place = {table}.rowid)")
            })
            .collect();
        let sets = sets.join(", ");
        format!(
            "DROP TABLE IF EXISTS temp.copy; CREATE TEMP TABLE copy AS SELECT *, \
             CASE rowid WHEN {one} THEN {two} ELSE {one} END AS place FROM {table} \
             WHERE rowid IN ({one}, {two}); UPDATE {table} SET {sets} WHERE rowid IN ({one}, {two})"
        )
    };
    for attack in [
        swap("versions", &["sealed"], 1, 4),
        swap("versions", &["sealed"], 1, 2),
        swap("versions", &["sealed", "created"], 1, 4),
        swap("budgets", &["spent"], 1, 2),
        swap("budgets", &["spent", "mac"], 1, 2),
        swap("aliases", &["key_id"], 1, 2),
        swap("aliases", &["key_id", "mac"], 1, 2),
        swap("keys", &["mac"], 1, 2),
        swap("keys", &["state", "deletion_due", "rotation", "version_count", "mac"], 1, 2),
        swap("fingerprints", &["mac"], 1, 2),
        swap("clients", &["mac"], 1, 2),
        swap("clients", &["state"], 1, 2),
        swap("clients", &["name", "created", "state", "permissions", "mac"], 1, 2),
        "UPDATE clients SET public_key = x'00' WHERE rowid = 1".to_owned(),
        "UPDATE clients SET key_patterns = '*' WHERE rowid = 1".to_owned(),
        "DELETE FROM clients WHERE rowid = 2".to_owned(),
        "INSERT INTO clients SELECT id || 'x', name, created, state, permissions, key_patterns, \
         public_key, mac FROM clients LIMIT 1"
            .to_owned(),
        // Ordinals of one key, by way of a third.
        "UPDATE versions SET ordinal = 9 WHERE rowid = 4; \
         UPDATE versions SET ordinal = 1 WHERE rowid = 1; \
         UPDATE versions SET ordinal = 0 WHERE rowid = 4"
            .to_owned(),
        "DELETE FROM versions WHERE rowid = 4".to_owned(),
        "DELETE FROM budgets WHERE version_id = (SELECT id FROM versions WHERE rowid = 4); \
         DELETE FROM versions WHERE rowid = 4"
            .to_owned(),
        "DELETE FROM versions WHERE rowid = 1".to_owned(),
        "DELETE FROM versions WHERE rowid = 3".to_owned(),
        "DELETE FROM budgets WHERE rowid = 1".to_owned(),
        "DELETE FROM aliases WHERE rowid = 1".to_owned(),
        "DELETE FROM fingerprints WHERE rowid = 1".to_owned(),
        "DELETE FROM keys WHERE rowid = 3".to_owned(),
        "DELETE FROM budgets WHERE rowid = 3; DELETE FROM versions WHERE rowid = 3; \
         DELETE FROM keys WHERE rowid = 3"
            .to_owned(),
        "DELETE FROM meta".to_owned(),
        "INSERT INTO versions SELECT id || 'x', key_id, 7, created, sealed FROM versions LIMIT 1"
            .to_owned(),
        "INSERT INTO versions SELECT id || 'x', 'nobody', 0, created, sealed FROM versions LIMIT 1"
            .to_owned(),
        "INSERT INTO budgets SELECT version_id || 'x', spent, mac FROM budgets LIMIT 1".to_owned(),
        "INSERT INTO aliases SELECT 'alias/new', key_id, mac FROM aliases LIMIT 1".to_owned(),
        "INSERT INTO fingerprints SELECT x'00', mac FROM fingerprints LIMIT 1".to_owned(),
        "DELETE FROM keys".to_owned(),
    ] {
        let raw = scratch.raw();
        for (table, _) in TABLES {
            let save =
                format!("CREATE TEMP TABLE saved_{table} AS SELECT rowid AS place, * FROM {table}");
            raw.execute_batch(&save).unwrap();
        }
        raw.execute_batch(&attack).unwrap_or_else(|error| panic!("{attack}: {error}"));
        assert!(raw.total_changes() > 0, "{attack}");
        match store.load() {
            Ok(_) => panic!("went unseen: {attack}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::StoreCorrupt, "{attack}: {error}"),
        }
        for (table, _) in TABLES {
            let columns = columns(&raw, table).join(", ");
            let place = if table == "meta" { "" } else { "rowid, " };
            let from = if table == "meta" { "" } else { "place, " };
            raw.execute_batch(&format!(
                "DELETE FROM {table}; \
                 INSERT INTO {table} ({place}{columns}) SELECT {from}{columns} FROM saved_{table}"
            ))
            .unwrap();
        }
        assert_eq!(contents(&store), before, "{attack}");
    }
}

#[test]
fn a_schema_that_is_not_ours_is_refused() {
    for attack in [
        "CREATE TRIGGER t AFTER UPDATE ON budgets BEGIN UPDATE budgets SET spent = 0; END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE extra (a)",
        "DROP TABLE fingerprints",
        "PRAGMA application_id = 7",
        "PRAGMA user_version = 1",
        "PRAGMA user_version = 3",
    ] {
        let (scratch, store) = Scratch::new();
        drop(store);
        scratch.raw().execute_batch(attack).unwrap();
        assert_eq!(kind(scratch.open()), ErrorKind::StoreCorrupt, "{attack}");
    }
}
