//! Whatever is in the file beside our tables, and whoever wrote it, is named and refused before SQLite is asked to
//! check or to rewrite the file.
//!
//! Planted through the schema itself, as somebody would who writes the file without SQLite's rules.

use super::helpers::*;
use crate::error::ErrorKind;
use crate::store::{KeyChange, KeyStore, SqliteStore, mend_store, tables::TABLES};

/// Makes a store, runs `plant` on it, and returns what opening says.
fn refusal(plant: &str) -> String {
    let (scratch, store) = Scratch::new();
    store.create(&direct()).unwrap();
    drop(store);
    let planted = format!("PRAGMA writable_schema = ON; {plant}; PRAGMA writable_schema = RESET");
    scratch.plant(&planted).unwrap_or_else(|error| panic!("{plant}: {error}"));
    let error = scratch.open().err().unwrap_or_else(|| panic!("opened with {plant}"));
    assert_eq!(error.kind(), ErrorKind::StoreCorrupt, "{plant}: {error}");
    assert!(error.message().contains(&scratch.path.display().to_string()), "{error}");
    assert!(mend_store(&scratch.path, &root()).is_err(), "{plant}");
    error.message()
}

fn insert(kind: &str, name: &str, table: &str, root: &str, sql: &str) -> String {
    format!("INSERT INTO sqlite_schema VALUES ({kind}, {name}, {table}, {root}, {sql})")
}

#[test]
fn whatever_is_not_ours_is_refused_under_any_name() {
    for (plant, named) in [
        ("CREATE TABLE extra (a)", "table extra"),
        ("CREATE VIEW extra AS SELECT 1", "view extra"),
        ("CREATE INDEX extra ON keys (spec)", "index extra"),
        ("CREATE TRIGGER extra AFTER INSERT ON keys BEGIN SELECT 1; END", "trigger extra"),
        ("CREATE TABLE \"a\u{1b}b'\" (a)", "table \"a\\u{1b}b'\""),
        ("ANALYZE", "table sqlite_stat1"),
        ("CREATE TABLE a (b INTEGER PRIMARY KEY AUTOINCREMENT)", "table sqlite_sequence"),
        ("CREATE TABLE lost_and_found (a)", "table lost_and_found, made by SQLite's .recover"),
    ] {
        assert!(refusal(plant).contains(named), "{named}: {}", refusal(plant));
    }
    // Names that SQLite keeps for itself are only given by those who write around it.
    for (kind, sql) in [
        ("view", "CREATE VIEW sqlite_x AS SELECT 1"),
        ("trigger", "CREATE TRIGGER sqlite_x AFTER INSERT ON keys BEGIN SELECT 1; END"),
        ("table", "CREATE VIRTUAL TABLE sqlite_x USING fts5(a)"),
        ("table", "CREATE VIRTUAL TABLE sqlite_x USING rtree(a, b, c)"),
        ("index", "CREATE INDEX sqlite_x ON sqlite_master (type, name, tbl_name, rootpage, sql)"),
        ("index", "CREATE INDEX sqlite_x ON keys (spec)"),
    ] {
        let table = match kind {
            "trigger" => "keys",
            "index" if sql.contains("master") => "sqlite_master",
            "index" => "keys",
            _ => "sqlite_x",
        };
        let root = if kind == "index" { "2" } else { "0" };
        let quoted = |text: &str| format!("'{text}'");
        let plant = insert(&quoted(kind), "'sqlite_x'", &quoted(table), root, &quoted(sql));
        // What SQLite itself finds wrong with the schema is refused as well, in its words.
        let told = refusal(&plant);
        assert!(told.contains(&format!("{kind} sqlite_x")) || told.contains("malformed"), "{told}");
    }
}

#[test]
fn rows_of_the_schema_that_sqlite_never_writes_are_refused() {
    let huge = format!("'CREATE TABLE huge (a /* {} */)'", "x".repeat(2 << 20));
    for plant in [
        insert("NULL", "NULL", "NULL", "NULL", "NULL"),
        insert("x'00'", "x'01'", "7", "0.5", "NULL"),
        insert("'table'", "'keys'", "'keys'", "3", "NULL"),
        insert("'index'", "'sqlite_autoindex_keys_2'", "'keys'", "3", "NULL"),
        insert("'index'", "'sqlite_autoindex_meta_1'", "'meta'", "3", "NULL"),
        insert("'table'", "'huge'", "'huge'", "0", &huge),
        "UPDATE sqlite_schema SET rootpage = 1 WHERE name = 'aliases'".to_owned(),
        "UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema WHERE name = \
         'clients') WHERE name = 'aliases'"
            .to_owned(),
        "UPDATE sqlite_schema SET sql = sql || ' ' WHERE name = 'aliases'".to_owned(),
        "UPDATE sqlite_schema SET sql = replace(sql, 'STRICT', '') WHERE name = 'aliases'"
            .to_owned(),
        "DELETE FROM sqlite_schema WHERE name = 'sqlite_autoindex_clients_1'".to_owned(),
        "DELETE FROM sqlite_schema WHERE name = 'clients'".to_owned(),
        "DROP TABLE clients".to_owned(),
        "ALTER TABLE aliases ADD COLUMN more TEXT".to_owned(),
    ] {
        refusal(&plant);
    }
}

/// A replication tool's tables are named, and the command that is offered mends the store.
#[test]
fn tables_of_tools_are_named_and_go_by_the_command_that_is_told() {
    let litestream = "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER);\
                      CREATE TABLE _litestream_lock (id INTEGER)";
    for (plant, tool) in [
        (litestream, Some("Litestream")),
        ("CREATE TABLE keys__x (a); CREATE TABLE crsql_site_id (a)", Some("cr-sqlite")),
        ("ANALYZE", Some("ANALYZE")),
        (
            "CREATE TABLE a (b INTEGER PRIMARY KEY AUTOINCREMENT, c UNIQUE); \
             CREATE INDEX d ON a (c); \
             CREATE TRIGGER e AFTER INSERT ON keys BEGIN SELECT 1; END; \
             CREATE VIEW f AS SELECT 1",
            None,
        ),
    ] {
        let (scratch, store) = Scratch::new();
        store.create(&direct()).unwrap();
        let before = contents(&store);
        drop(store);
        scratch.plant(plant).unwrap();
        let told = scratch.open().err().unwrap().message();
        assert!(tool.is_none_or(|tool| told.contains(tool)), "{told}");
        let (_, command) = told.split_once("run: ").unwrap_or_else(|| panic!("{told}"));
        let prefix = format!("sqlite3 '{}' '", scratch.path.display());
        let sql = command.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix('\''));
        scratch.plant(sql.unwrap_or_else(|| panic!("{command}"))).unwrap();
        assert_eq!(contents(&scratch.open().unwrap()), before);
    }
}

/// Another process may plant something long after a store was opened: VACUUM would run it.
#[test]
fn the_schema_is_compared_again_before_the_file_is_rewritten() {
    let (scratch, store) = Scratch::new();
    let key = direct();
    store.create(&key).unwrap();
    let counts = || -> (i64, i64) {
        scratch.ask("SELECT deleted, erased FROM meta", |row| Ok((row.get(0)?, row.get(1)?)))
    };
    scratch.plant("CREATE TABLE _litestream_seq (a)").unwrap();
    store.change(&key.record.id, &mut |_| Ok(KeyChange::Delete)).unwrap();
    assert_eq!(counts(), (1, 0), "the file was rewritten with a foreign table in it");
    scratch.plant("DROP TABLE _litestream_seq").unwrap();
    store.create(&direct()).unwrap();
    assert_eq!(counts(), (1, 1));
}

/// So that the check knows what SQLite makes by itself, in this version and the next.
#[test]
fn a_new_store_has_our_tables_and_their_indexes() {
    let (scratch, store) = Scratch::new();
    drop(store);
    let count: i64 = scratch.ask("SELECT count(*) FROM sqlite_schema", |row| row.get(0));
    assert_eq!(count, TABLES.len() as i64 + 7);
    drop(SqliteStore::open(&scratch.path, &root(), tier()).unwrap());
}
