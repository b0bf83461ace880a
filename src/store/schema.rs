//! The SQLite file: its settings, its format, and what SQLite's errors mean to us.
//!
//! Says nothing about what is in the rows (`rows.rs`), about when connections exist and forks (`sqlite.rs`). Which
//! tables there are, and that there is nothing else, is `tables.rs`.

use std::{
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{
        RwLockReadGuard, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use rusqlite::{
    Connection, OpenFlags, TransactionBehavior, config::DbConfig, ffi::ErrorCode, limits::Limit,
};

use super::{
    permissions,
    seal::FORMAT,
    tables::{self, TABLES},
};
use crate::{
    error::{Error, ErrorKind},
    os::{self, Current, PerProcess, Quiesce},
};

/// `PRAGMA application_id` of our files: "kMIL".
pub(super) const APPLICATION_ID: i32 = 0x6b4d_494c;
/// How often, and how many times, to look whether another process's transaction is over: for ten seconds.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
const BUSY_TRIES: i32 = 5000;
/// Most bytes of a value or row: far more than any of ours has. A longer one is no record of ours.
const VALUE_LEN_MAX: i32 = 1 << 20;
/// Most bytes of a statement, those of the schema included.
const SQL_LEN_MAX: i32 = 64 << 10;
/// Deepest expression.
const EXPR_DEPTH_MAX: i32 = 100;

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
                "The store cannot be opened; its file, what lies beside it and its directory have \
                 to be writable.",
            ),
            Some(Code::OutOfMemory) => (ErrorKind::Machine, "SQLite is out of memory."),
            // Corruption as SQLite sees it, tables that are not ours, values of another type than we wrote.
            _ => (ErrorKind::StoreCorrupt, "The file is damaged."),
        };
        let refused = matches!(
            error.sqlite_error_code(),
            Some(Code::ReadOnly | Code::CannotOpen | Code::PermissionDenied)
        );
        let named = match permissions::unwritable(path) {
            Some(place) if refused => format!(" This process may not write {}.", place.display()),
            _ => String::new(),
        };
        Error::new(kind, format!("{why}{named} ({}: {error})", path.display()))
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

/// Sees to it that forks respect the gate, even before the first store is registered.
pub(super) fn watch_forks() -> Result<(), Error> {
    struct Nobody;
    impl Quiesce for Nobody {
        fn before_fork(&self) {}
    }
    os::quiesce_before_fork(Weak::<Nobody>::new())
}

/// Whether this is the only use of SQLite by stores of this process. The caller is inside the [`Gate`].
pub(super) fn is_alone() -> bool {
    sqlite().uses.load(Ordering::SeqCst) == 1
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

/// The address of a file that SQLite is to believe nobody changes. Bytes that mean something in an address are escaped,
/// and so is every byte that is no ASCII.
fn immutable_uri(path: &Path) -> String {
    use std::fmt::Write;
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            let _ = write!(uri, "%{byte:02x}");
        }
    }
    uri + "?immutable=1"
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
        Self::guarded(sqlite, in_use)
    }

    /// Opens the file as if nothing lay beside it: without its log, without locks, for reading alone. What is read is
    /// wrong if somebody writes meanwhile, so whoever asks has to verify it.
    ///
    /// The caller is inside the [`Gate`].
    pub(super) fn alone(path: &Path) -> Outcome<Self> {
        let in_use = Use::begin();
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_URI;
        let sqlite = Connection::open_with_flags(immutable_uri(path), flags)?;
        Self::guarded(sqlite, in_use)
    }

    /// Opens the file so that nobody else can while this connection lives. `None` if somebody has it open.
    ///
    /// Reads no more than the first page. The log is left as it is, and one that makes no sense is no failure. The
    /// caller is inside the [`Gate`].
    pub(super) fn exclusively(path: &Path) -> Outcome<Option<Self>> {
        let in_use = Use::begin();
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let sqlite = Connection::open_with_flags(path, flags)?;
        sqlite.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        sqlite.busy_timeout(Duration::ZERO)?;
        // Every connection to a store in WAL mode holds a shared lock of the file from its first look on. With this
        // setting, made before the first look, ours is exclusive and stays.
        sqlite.execute_batch("PRAGMA locking_mode = EXCLUSIVE")?;
        let locked = sqlite.execute_batch("BEGIN EXCLUSIVE; COMMIT");
        match locked.as_ref().map_err(rusqlite::Error::sqlite_error_code) {
            Err(Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)) => Ok(None),
            _ => Ok(Some(Self { sqlite, _use: in_use })),
        }
    }

    /// Settings under which a file may be read that somebody else wrote.
    fn guarded(sqlite: Connection, in_use: Use) -> Outcome<Self> {
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
        // The schema is parsed before anybody can look at it.
        for (limit, most) in [
            (Limit::SQLITE_LIMIT_LENGTH, VALUE_LEN_MAX),
            (Limit::SQLITE_LIMIT_SQL_LENGTH, SQL_LEN_MAX),
            (Limit::SQLITE_LIMIT_EXPR_DEPTH, EXPR_DEPTH_MAX),
        ] {
            sqlite.set_limit(limit, most)?;
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

    /// Checks that the file is a store of our format, with our tables and nothing else. Reads only.
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
        tables::check(&self.sqlite, path)
    }

    /// Checks that the file can be written.
    pub(super) fn check_writable(&self, path: &Path) -> Outcome<()> {
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
    pub(super) fn erase_leftovers(&self, path: &Path) -> Outcome<bool> {
        // VACUUM runs the statements of the schema, whoever wrote them since the store was opened.
        tables::check(&self.sqlite, path)?;
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
