//! The SQLite file: its tables, its settings, and what SQLite's errors mean to us.
//!
//! Says nothing about what is in the rows (`rows.rs`), about when connections exist and forks (`sqlite.rs`).
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
//! Whoever can write the file could plant triggers and views that run inside our statements, so the connection runs
//! with neither, and a file whose schema is not letter for letter ours is refused.

use std::{
    path::Path,
    sync::{
        RwLockReadGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, TransactionBehavior, config::DbConfig, ffi::ErrorCode};

use super::seal::FORMAT;
use crate::{
    error::{Error, ErrorKind},
    os::{self, Current, PerProcess},
};

/// `PRAGMA application_id` of our files: "kMIL".
pub(super) const APPLICATION_ID: i32 = 0x6b4d_494c;
/// How often, and how many times, to look whether another process's transaction is over: for ten seconds.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
const BUSY_TRIES: i32 = 5000;

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

/// An error on its way out of a transaction.
pub(super) enum Failure {
    /// Of SQLite, to be told in our words by [`Failure::explain`].
    Sqlite(rusqlite::Error),
    /// Ours.
    Told(Error),
}

pub(super) type Outcome<T> = Result<T, Failure>;

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Told(error)
    }
}

impl Failure {
    /// The public error. The only place where an SQLite error gets a kind.
    pub(super) fn explain(self, path: &Path) -> Error {
        let error = match self {
            Self::Told(error) => return error,
            Self::Sqlite(error) => error,
        };
        use ErrorCode as Code;
        let (kind, why) = match error.sqlite_error_code() {
            Some(Code::NotADatabase) => (ErrorKind::StoreCorrupt, "The file is no keymill store."),
            Some(Code::ReadOnly) => (ErrorKind::StoreUnavailable, "The store is read-only."),
            Some(Code::DiskFull) => (ErrorKind::StoreUnavailable, "The disk is full."),
            Some(Code::SystemIoFailure) => {
                (ErrorKind::StoreUnavailable, "The file system failed or refused to write.")
            }
            Some(Code::DatabaseBusy | Code::DatabaseLocked | Code::FileLockingProtocolFailed) => {
                (ErrorKind::StoreUnavailable, "Another process kept the store locked for too long.")
            }
            Some(Code::CannotOpen | Code::PermissionDenied) => (
                ErrorKind::StoreUnavailable,
                "The store cannot be opened; its file and its directory have to be writable.",
            ),
            Some(Code::OutOfMemory) => (ErrorKind::Machine, "SQLite is out of memory."),
            // Corruption as SQLite sees it, tables that are not ours, values of another type than we wrote.
            _ => (ErrorKind::StoreCorrupt, "The file is damaged."),
        };
        Error::new(kind, format!("{why} ({}: {error})", path.display()))
    }
}

/// The error of a record that is not as we wrote it.
pub(super) fn corrupt(table: &str, id: impl std::fmt::Display) -> Failure {
    let detail = format!("The record of {id} in table {table} was edited, swapped or damaged.");
    Failure::Told(Error::new(ErrorKind::StoreCorrupt, detail))
}

/// SQLite as this process knows it.
#[derive(Default)]
struct Sqlite {
    /// Connections that are open, and calls that are under way.
    uses: AtomicUsize,
    /// Whether the process was cloned, without the handlers of `fork`, from one where SQLite was in use.
    inherited: AtomicBool,
}

static SQLITE: PerProcess<Sqlite> = PerProcess::empty();

fn sqlite() -> Current<Sqlite> {
    SQLITE.get_or(|inherited| {
        let poisoned = inherited.is_some_and(|sqlite| {
            sqlite.uses.load(Ordering::SeqCst) > 0 || sqlite.inherited.load(Ordering::SeqCst)
        });
        Sqlite { uses: AtomicUsize::new(0), inherited: AtomicBool::new(poisoned) }
    })
}

/// A use of SQLite: the fork gate, and a mark by which a clone made meanwhile, without the handlers of `fork`, knows
/// that its copy of SQLite is good for nothing.
pub(super) struct Gate {
    // Dropped in this order. Whoever waits at the gate is not counted: a fork may happen while it waits.
    _use: Use,
    _gate: RwLockReadGuard<'static, ()>,
}

impl Gate {
    /// # Errors
    /// `StoreUnavailable` in a process whose SQLite was inherited in use: its locks, its table of open files and its
    /// mutexes belong to the parent.
    pub(super) fn enter(path: &Path) -> Result<Self, Error> {
        // Before the gate, which nothing opens again in such a process if it was being closed.
        if sqlite().inherited.load(Ordering::SeqCst) {
            let detail = format!(
                "This process was cloned without the handlers of fork() while a store was open, so \
                 it cannot use stores. Use fork(), or close every store before the clone. ({})",
                path.display()
            );
            return Err(Error::new(ErrorKind::StoreUnavailable, detail));
        }
        let gate = os::fork_gate();
        Ok(Self { _use: Use::begin(), _gate: gate })
    }
}

struct Use(Current<Sqlite>);

impl Use {
    fn begin() -> Self {
        let sqlite = sqlite();
        sqlite.uses.fetch_add(1, Ordering::SeqCst);
        Self(sqlite)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.uses.fetch_sub(1, Ordering::SeqCst);
    }
}

/// SQLite's own handler looks every 100 ms, and nobody queues for its lock: beside two processes that write without
/// pause it gave up after ten seconds.
fn wait_for_others(tries: i32) -> bool {
    thread::sleep(BUSY_PAUSE);
    tries < BUSY_TRIES
}

/// An open connection. Field order: the connection closes before the use of SQLite ends.
pub(super) struct Open {
    pub(super) sqlite: Connection,
    _use: Use,
}

impl Open {
    /// Opens the file, which has to exist, for reading and writing. Nothing is read or written yet.
    ///
    /// The caller is inside the [`Gate`]. `path` has to be absolute: SQLite would read one that begins with `file:` as
    /// a URI.
    pub(super) fn file(path: &Path) -> Outcome<Self> {
        assert!(path.is_absolute());
        let in_use = Use::begin();
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut sqlite = Connection::open_with_flags(path, flags)?;
        sqlite.busy_handler(Some(wait_for_others))?;
        for (setting, on) in [
            // Closing is quick, and leaves alone what it was not asked to change.
            (DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true),
            (DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false),
            (DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false),
            (DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false),
            (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
        ] {
            sqlite.set_db_config(setting, on)?;
        }
        // Deleted content is overwritten with zeros; nothing is kept in temporary files.
        sqlite.execute_batch(
            "PRAGMA synchronous = FULL; PRAGMA secure_delete = ON; PRAGMA temp_store = MEMORY; \
             PRAGMA foreign_keys = ON; PRAGMA cell_size_check = ON;",
        )?;
        Ok(Self { sqlite, _use: in_use })
    }

    /// Makes our tables in an empty database, and runs `fill` in the same transaction.
    pub(super) fn make_tables(
        &mut self,
        fill: impl FnOnce(&Connection) -> Outcome<()>,
    ) -> Outcome<()> {
        let transaction = self.sqlite.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for (_, statement) in TABLES {
            transaction.execute_batch(statement)?;
        }
        fill(&transaction)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", FORMAT)?;
        transaction.commit()?;
        // Kept in the file from now on.
        let mode: String =
            self.sqlite.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
        if mode != "wal" {
            let detail = "The file system does not support SQLite's write-ahead log.";
            return Err(Error::new(ErrorKind::StoreUnavailable, detail).into());
        }
        self.sqlite.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
        Ok(())
    }

    /// Checks that the file is a store of our format that can be written. Reads only.
    pub(super) fn check_format(&self, path: &Path) -> Outcome<()> {
        let pragma = |name| self.sqlite.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
        let (application, format) = (pragma("application_id")?, pragma("user_version")?);
        if application != APPLICATION_ID {
            let detail = format!("The file {} is no keymill store.", path.display());
            return Err(Error::new(ErrorKind::StoreCorrupt, detail).into());
        }
        if u32::try_from(format) != Ok(FORMAT) {
            let detail = format!(
                "The file {} has format {format}; this version of keymill reads format {FORMAT}.",
                path.display()
            );
            return Err(Error::new(ErrorKind::StoreCorrupt, detail).into());
        }
        let mut statement = self.sqlite.prepare(
            "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\' \
             ORDER BY rowid",
        )?;
        let schema = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?
            .collect::<Result<Vec<_>, _>>()?;
        let ours = |(found, table): (&(String, String), &(&str, &str))| {
            (found.0.as_str(), found.1.as_str()) == *table
        };
        if schema.len() != TABLES.len() || !schema.iter().zip(&TABLES).all(ours) {
            let detail = format!("The tables of {} are not as they were made.", path.display());
            return Err(Error::new(ErrorKind::StoreCorrupt, detail).into());
        }
        if self.sqlite.is_readonly("main")? {
            let detail = format!("The store is read-only. ({})", path.display());
            return Err(Error::new(ErrorKind::StoreUnavailable, detail).into());
        }
        Ok(())
    }

    /// Checks that the file is sound: an index that hides a row would hide it from our checks, too.
    pub(super) fn check_soundness(&self) -> Outcome<()> {
        let verdict: String =
            self.sqlite.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        if verdict == "ok" {
            return Ok(());
        }
        Err(Error::new(ErrorKind::StoreCorrupt, format!("The file is damaged: {verdict}.")).into())
    }

    /// Rewrites the file without what deleted rows left in unused parts of pages, then cuts the log.
    ///
    /// `secure_delete` overwrites a row where it lies. When SQLite rebuilds a page (`rebuildPage`), the place where a
    /// row lay before may stay as it was: SQLite 3.40 left 1 of 6,700 deleted rows readable in an experiment.
    ///
    /// `false` if a reader is in the way.
    pub(super) fn erase_leftovers(&self) -> rusqlite::Result<bool> {
        self.sqlite.execute_batch("VACUUM")?;
        let busy: i64 =
            self.sqlite.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
        Ok(busy == 0)
    }

    /// Closes for good: the log goes into the file and is removed, if this is the last connection.
    pub(super) fn close_cleanly(self) {
        let _ = self.sqlite.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false);
        drop(self);
    }
}
