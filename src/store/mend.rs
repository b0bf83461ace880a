//! A store beside a log that does not belong to it, as after a backup was put back over `keys.db` alone.
//!
//! SQLite's log (`-wal`) says nothing of the file that it was written for: SQLite replays it into whatever file it lies
//! beside. So a restored store with the log of another state, or of another store, reads as damaged or as locked by
//! another root key, however often it is restored. A rollback journal (`-journal`) is worse: SQLite writes it into the
//! file. When a store fails its checks and something lies beside it, the file is checked alone, by all the checks that
//! there are; if it passes, the error names the log, and [`mend_store`] moves it aside. Nothing is ever deleted.
//!
//! A log that holds everything that happened to the restored store since cannot be told from that of a crash: with it
//! the store is in its later state, and every check says so rightly.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    checks::{self, Extent},
    meta::{Meta, StoredMeta},
    place::{COMPANIONS, with_suffix},
    root_key::RootKey,
    schema::{Failure, Gate, Open, Outcome, corrupt, is_alone, watch_forks},
    seal::StoreKeys,
};
use crate::{
    cpu::Tier,
    error::{Error, ErrorKind, Result},
    os::files,
};

/// A file that [`mend_store`] has moved.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MovedFile {
    /// Where it was.
    pub from: PathBuf,
    /// Where it is.
    pub to: PathBuf,
}

/// Moves the log of another state or another store away from a store that is sound without it, as after a backup was
/// put back over the store's file alone.
///
/// The log and what belongs to it stay in the directory, under names with the time. Empty if the store passes every
/// check as it is: then nothing was done. Writes that are in the log alone are lost to the store, so this is for a log
/// that does not fit, and for nothing else.
///
/// # Errors
/// `StoreUnavailable` if another process has the store open, or the directory cannot be written; the error of
/// `Engine::open` if the store does not pass its checks without its log either.
pub fn mend_store(path: impl AsRef<Path>, root_key: &RootKey) -> Result<Vec<MovedFile>> {
    let path = &checks::absolute(path.as_ref())?;
    checks::check_file(path)?;
    watch_forks()?;
    let _gate = Gate::enter(path)?;
    let explain = |failure: Failure| failure.explain(path);
    let first = match stale_journal(path) {
        Some(error) => error,
        None => match open_beside_log(path, root_key, Tier::PORTABLE) {
            Ok(_) => {
                close_cleanly(path);
                return Ok(Vec::new());
            }
            Err(failure) => explain(failure),
        },
    };
    if !is_sound_alone(path, root_key, Tier::PORTABLE) {
        return Err(first);
    }
    let moved = move_companions(path).map_err(explain)?;
    open_beside_log(path, root_key, Tier::PORTABLE).map_err(explain)?;
    close_cleanly(path);
    Ok(moved)
}

/// Leaves a store that is sound as every user of it does: without a log, if nobody else has it open.
fn close_cleanly(path: &Path) {
    if let Ok(open) = Open::file(path)
        && open.check_format(path).is_ok()
    {
        open.close_cleanly();
    }
}

/// Opens a store as [`checks::open_first`] does, and checks every record if a log lies beside it, of whose state the
/// head of the store says nothing. The caller is inside the [`Gate`].
pub(super) fn open_beside_log(
    path: &Path,
    root: &RootKey,
    tier: Tier,
) -> Outcome<(StoreKeys, Meta)> {
    if is_empty(&beside(path, "-wal")) {
        return checks::open_first(path, root, tier, Extent::Head);
    }
    let found = checks::open_first(path, root, tier, Extent::Whole)?;
    // The whole log of another store under the same root key is that store.
    let alone = Open::alone(path).and_then(|open| StoredMeta::read(&open.sqlite));
    if alone.is_ok_and(|alone| alone.id != found.0.id) {
        return Err(corrupt("meta", "the store"));
    }
    Ok(found)
}

/// The error of a store that failed its checks when it was opened: a better one, if it is sound without what lies
/// beside it. The caller is inside the [`Gate`].
pub(super) fn explain(path: &Path, error: Error, root: &RootKey, tier: Tier) -> Error {
    let failed = matches!(error.kind(), ErrorKind::StoreCorrupt | ErrorKind::WrongRootKey);
    let log = beside(path, "-wal");
    if !failed || is_empty(&log) || !is_sound_alone(path, root, tier) {
        return error;
    }
    let detail = format!(
        "The store {} is sound without its log {}, and not with it: the log is that of another \
         state or of another store, as when a backup was put back over the store alone. Stop what \
         uses the store and run `keymill mend`, which moves the log aside; or put back both.",
        path.display(),
        log.display()
    );
    Error::new(ErrorKind::StoreCorrupt, detail)
}

/// The refusal of a store that SQLite would write a foreign journal into as soon as it opens it.
///
/// A store in WAL mode never has one. One that another program has put into another mode may.
pub(super) fn stale_journal(path: &Path) -> Option<Error> {
    let journal = beside(path, "-journal");
    if is_empty(&journal) || !is_in_wal_mode(path) {
        return None;
    }
    let detail = format!(
        "{} is the journal of another state or of another store, and SQLite would write it into \
         {}. Run `keymill mend`, which moves it aside.",
        journal.display(),
        path.display()
    );
    Some(Error::new(ErrorKind::StoreCorrupt, detail))
}

/// Reads the two bytes of the file's head that say so (bytes 18 and 19 of the file format).
fn is_in_wal_mode(path: &Path) -> bool {
    let Ok(mut file) = File::open(path) else { return false };
    let mut head = [0; 20];
    let read = file.read_exact(&mut head);
    if !is_alone() {
        // To close it would drop the locks that another connection of this process holds on it.
        std::mem::forget(file);
    }
    read.is_ok() && head[18..] == [2, 2]
}

/// Where SQLite puts what belongs to the file: beside the file itself, not beside a link to it.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    with_suffix(&fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()), suffix)
}

fn is_empty(path: &Path) -> bool {
    fs::metadata(path).map_or(true, |metadata| metadata.len() == 0)
}

/// Whether the file passes every check by itself.
fn is_sound_alone(path: &Path, root: &RootKey, tier: Tier) -> bool {
    let check = || -> Outcome<()> {
        let open = Open::alone(path)?;
        checks::verify(&open, path, root, tier, Extent::Whole)?;
        Ok(())
    };
    check().is_ok()
}

/// Moves everything that SQLite may have put beside the store to names with the time, while nobody has it open.
fn move_companions(path: &Path) -> Outcome<Vec<MovedFile>> {
    let mut moved = Vec::new();
    let time: String = rusqlite::Connection::open_in_memory()?.query_row(
        "SELECT strftime('%Y%m%dT%H%M%SZ', 'now')",
        [],
        |row| row.get(0),
    )?;
    let mut take = |suffix: &str| -> Result<()> {
        let from = beside(path, suffix);
        if from.symlink_metadata().is_err() {
            return Ok(());
        }
        let to = with_suffix(&from, &format!(".{time}"));
        files::move_new(&from, &to).map_err(|error| {
            let (from, to) = (from.display(), to.display());
            let detail = format!("{from} could not be moved to {to}: {error}.");
            Error::new(ErrorKind::StoreUnavailable, detail)
        })?;
        moved.push(MovedFile { from, to });
        Ok(())
    };
    let [log, index, journal] = COMPANIONS;
    // Before the store is opened even for a lock: SQLite would write it into the store first.
    if stale_journal(path).is_some() {
        take(journal)?;
    }
    let Some(_alone) = Open::exclusively(path)? else {
        let detail = format!(
            "Another process has the store {} open; stop it first, then try again.",
            path.display()
        );
        return Err(Error::new(ErrorKind::StoreUnavailable, detail).into());
    };
    take(log)?;
    take(index)?;
    if let Some(directory) = beside(path, "").parent() {
        files::sync_directory(directory).map_err(|error| {
            let detail = format!("{} could not be synchronised: {error}.", directory.display());
            Error::new(ErrorKind::StoreUnavailable, detail)
        })?;
    }
    Ok(moved)
}
