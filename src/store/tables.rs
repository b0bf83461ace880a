//! The tables of a store, and the check that its file holds them and nothing else.
//!
//! | table | a row for each | authenticated by |
//! |---|---|---|
//! | `meta` | store: id, change counter, row counts, deletions and erasures | MAC; the check value by its seal |
//! | `keys` | KEK | MAC; its `version_count` says which versions have to be there |
//! | `versions` | key version, material included | seal |
//! | `budgets` | key version: wraps granted | MAC |
//! | `aliases` | alias | MAC |
//! | `fingerprints` | material that was ever imported | MAC |
//! | `clients` | client of the server, public key included | MAC |
//!
//! Whoever can write the file could plant triggers, views and tables of SQLite's extensions that run inside our
//! statements, and `integrity_check` and `VACUUM` would feed them to SQLite's parsers. So the connection runs with
//! neither triggers nor views (`schema.rs`), and a file is refused whose schema is not ours letter for letter, before
//! anything runs that looks beyond the schema. That holds for names that begin with `sqlite_`, too: whoever writes the
//! file without SQLite can give any name.

use std::{fmt, path::Path};

use rusqlite::{Connection, Row, types::ValueRef};

use super::schema::Outcome;
use crate::error::{Error, ErrorKind};

/// The statements that make the tables, as SQLite keeps them in its schema.
pub(super) const TABLES: [(&str, &str); 7] = [
    (
        "meta",
        "CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), store_id BLOB NOT NULL, \
         check_value BLOB NOT NULL, changes INTEGER NOT NULL, keys INTEGER NOT NULL, \
         aliases INTEGER NOT NULL, fingerprints INTEGER NOT NULL, clients INTEGER NOT NULL, \
         deleted INTEGER NOT NULL, erased INTEGER NOT NULL, mac BLOB NOT NULL) STRICT",
    ),
    (
        "keys",
        "CREATE TABLE keys (id TEXT NOT NULL PRIMARY KEY, spec TEXT NOT NULL, \
         scheme TEXT NOT NULL, origin TEXT NOT NULL, description TEXT NOT NULL, \
         created INTEGER NOT NULL, state TEXT NOT NULL, deletion_due INTEGER, rotation INTEGER, \
         last_rotation INTEGER NOT NULL, version_count INTEGER NOT NULL, mac BLOB NOT NULL) STRICT",
    ),
    (
        "versions",
        "CREATE TABLE versions (id TEXT NOT NULL PRIMARY KEY, \
         key_id TEXT NOT NULL REFERENCES keys, ordinal INTEGER NOT NULL, \
         created INTEGER NOT NULL, sealed BLOB NOT NULL, UNIQUE (key_id, ordinal)) STRICT",
    ),
    (
        "budgets",
        "CREATE TABLE budgets (version_id TEXT NOT NULL PRIMARY KEY REFERENCES versions, \
         spent INTEGER NOT NULL, mac BLOB NOT NULL) STRICT",
    ),
    (
        "aliases",
        "CREATE TABLE aliases (alias TEXT NOT NULL PRIMARY KEY, \
         key_id TEXT NOT NULL REFERENCES keys, mac BLOB NOT NULL) STRICT",
    ),
    (
        "fingerprints",
        "CREATE TABLE fingerprints (fingerprint BLOB NOT NULL PRIMARY KEY, \
         mac BLOB NOT NULL) STRICT",
    ),
    (
        "clients",
        "CREATE TABLE clients (id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, \
         created INTEGER NOT NULL, state TEXT NOT NULL, permissions TEXT NOT NULL, \
         key_patterns TEXT NOT NULL, public_key BLOB NOT NULL, mac BLOB NOT NULL) STRICT",
    ),
];

/// The indexes that SQLite makes by itself for these tables: `sqlite_autoindex_<table>_<number>`.
const INDEXES: [(&str, u8); 6] = [
    ("keys", 1),
    ("versions", 2),
    ("budgets", 1),
    ("aliases", 1),
    ("fingerprints", 1),
    ("clients", 1),
];

/// Tools that add tables of their own to the databases that they copy, watch or mend, by how the names begin.
const TOOLS: [(&str, &str); 10] = [
    ("_litestream_", "Litestream"),
    ("crsql_", "cr-sqlite"),
    ("__crsql_", "cr-sqlite"),
    ("__marmot_", "Marmot"),
    ("sym_", "SymmetricDS"),
    ("cloudsync_", "SQLite Sync"),
    ("_electric_", "ElectricSQL"),
    ("ps_", "PowerSync"),
    ("sqlite_stat", "SQLite's ANALYZE"),
    ("lost_and_found", "SQLite's .recover"),
];

/// More of what is foreign is counted and not named.
const NAMED_MAX: usize = 4;
/// A command that removes more than this is none that anybody reads.
const REMOVED_MAX: usize = 64;

/// A row of the schema, read as whatever it is.
struct Entry {
    kind: String,
    name: String,
    table: String,
    root: Option<i64>,
    sql: Option<String>,
}

impl Entry {
    /// Values of another type than SQLite writes become text that is none of ours.
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let text = |at| -> rusqlite::Result<Option<String>> {
            Ok(match row.get_ref(at)? {
                ValueRef::Null => None,
                ValueRef::Text(text) => Some(String::from_utf8_lossy(text).into_owned()),
                other => Some(format!("a value of type {}", other.data_type())),
            })
        };
        let said = |at| Ok::<_, rusqlite::Error>(text(at)?.unwrap_or_else(|| "NULL".to_owned()));
        let root = match row.get_ref(3)? {
            ValueRef::Integer(root) => Some(root),
            _ => None,
        };
        Ok(Self { kind: said(0)?, name: said(1)?, table: said(2)?, root, sql: text(4)? })
    }

    /// Which of our tables or their indexes this is by its name.
    fn is_named_as_ours(&self) -> bool {
        let table = TABLES.iter().any(|(name, _)| *name == self.name);
        table && self.kind == "table" || self.index().is_some()
    }

    /// The table whose index this is by its name.
    fn index(&self) -> Option<&'static str> {
        let (table, number) = self.name.strip_prefix("sqlite_autoindex_")?.rsplit_once('_')?;
        INDEXES
            .iter()
            .find(|(of, count)| *of == table && (1..=*count).any(|n| n.to_string() == number))
            .filter(|_| self.kind == "index")
            .map(|(of, _)| *of)
    }

    /// Whether this is a table or an index as we make it.
    fn is_ours(&self) -> bool {
        match self.index() {
            Some(table) => self.table == table && self.sql.is_none(),
            None => {
                let made = (self.name.as_str(), self.sql.as_deref().unwrap_or_default());
                self.kind == "table" && self.table == self.name && TABLES.contains(&made)
            }
        }
    }

    fn tool(&self) -> Option<&'static str> {
        let made = |(prefix, _): &&(&str, &str)| self.name.starts_with(prefix);
        TOOLS.iter().find(made).map(|(_, tool)| *tool)
    }

    /// Whether a shell and SQL take the name as it is.
    fn is_plain(&self) -> bool {
        self.name.len() <= 64 && self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind.as_str() {
            kind @ ("table" | "index" | "view" | "trigger") => kind,
            _ => "an object",
        };
        let name: String = self.name.chars().take(64).collect();
        // A name that is a word is printed as it is; anything else in quotes, with control characters escaped.
        if self.is_plain() { write!(f, "{kind} {name}") } else { write!(f, "{kind} {name:?}") }
    }
}

/// Checks that the file holds our tables and nothing else. Reads the schema only.
///
/// Run before anything that looks beyond the schema, on every connection that will run it.
pub(super) fn check(sqlite: &Connection, path: &Path) -> Outcome<()> {
    // An index on the schema itself could hide rows of it.
    let mut statement = sqlite.prepare(
        "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_schema NOT INDEXED ORDER BY rowid",
    )?;
    let entries = statement.query_map([], Entry::read)?.collect::<Result<Vec<_>, _>>()?;
    match fault(&entries, path) {
        None => Ok(()),
        Some(why) => Err(Error::new(ErrorKind::StoreCorrupt, why).into()),
    }
}

/// What is wrong with a schema.
fn fault(entries: &[Entry], path: &Path) -> Option<String> {
    let shown = path.display();
    let foreign: Vec<_> = entries.iter().filter(|entry| !entry.is_named_as_ours()).collect();
    if !foreign.is_empty() {
        return Some(foreign_fault(&foreign, path));
    }
    if let Some(changed) = entries.iter().find(|entry| !entry.is_ours()) {
        return Some(format!("The {changed} of {shown} is not as keymill made it."));
    }
    let count = |name: &str| entries.iter().filter(|entry| entry.name == name).count();
    let indexes = INDEXES.iter().flat_map(|(table, count)| {
        (1..=*count).map(move |number| format!("sqlite_autoindex_{table}_{number}"))
    });
    let mut names = TABLES.iter().map(|(name, _)| (*name).to_owned()).chain(indexes);
    if let Some(name) = names.find(|name| count(name) != 1) {
        let many = if count(&name) == 0 { "missing from" } else { "more than once in" };
        return Some(format!("The table or index {name} is {many} {shown}."));
    }
    // Page 1 is the schema's own, and two tables in one page would be one table.
    let mut roots: Vec<_> = entries.iter().map(|entry| entry.root.unwrap_or_default()).collect();
    roots.sort_unstable();
    let distinct = roots.windows(2).all(|pair| pair[0] < pair[1]);
    (!distinct || roots.first().is_none_or(|first| *first < 2))
        .then(|| format!("Tables of {shown} share their place in the file."))
}

/// Names what is foreign, who may have made it, and how it goes.
fn foreign_fault(foreign: &[&Entry], path: &Path) -> String {
    let named: Vec<_> = foreign.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    let more = match foreign.len() - named.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let mut tools: Vec<_> = foreign.iter().filter_map(|entry| entry.tool()).collect();
    tools.sort_unstable();
    tools.dedup();
    let (made, first) = if tools.is_empty() {
        ("not keymill's".to_owned(), "If a tool of yours made that, stop the tool".to_owned())
    } else {
        let tools = tools.join(" and ");
        (format!("made by {tools}, not by keymill"), format!("Keep {tools} away from this file"))
    };
    let found = format!("{} holds {}{more}, {made}.", path.display(), named.join(", "));
    match removal(foreign, path) {
        Some(command) => format!("{found} {first}, and run: {command}"),
        None => format!("{found} {first}, and restore the file from a backup."),
    }
}

/// The command that removes what is foreign, if every name is a plain word.
fn removal(foreign: &[&Entry], path: &Path) -> Option<String> {
    if foreign.len() > REMOVED_MAX {
        return None;
    }
    let path = path.to_str().filter(|path| !path.chars().any(char::is_control))?;
    let is_virtual = |entry: &Entry| {
        entry.sql.as_deref().is_some_and(|sql| sql.trim_start().starts_with("CREATE VIRTUAL"))
    };
    let goes_with_another = |entry: &Entry| {
        foreign.iter().any(|other| {
            let shadow = is_virtual(other)
                && entry.name.strip_prefix(&other.name).is_some_and(|rest| rest.starts_with('_'));
            let of_table = other.kind == "table"
                && other.name == entry.table
                && (entry.kind == "index" || entry.kind == "trigger");
            shadow || of_table
        })
    };
    let mut drops = String::new();
    for entry in foreign.iter().filter(|entry| !goes_with_another(entry)) {
        // The counter of AUTOINCREMENT goes by VACUUM, once no table has one.
        if entry.name == "sqlite_sequence" {
            continue;
        }
        let kind =
            ["table", "view", "trigger", "index"].into_iter().find(|kind| *kind == entry.kind)?;
        if !entry.is_plain() {
            return None;
        }
        drops += &format!("DROP {} {}; ", kind.to_uppercase(), entry.name);
    }
    let path = path.replace('\'', "'\\''");
    Some(format!("sqlite3 '{path}' '{drops}VACUUM;'"))
}
