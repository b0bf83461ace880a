//! Which file a connection has open, and whether its path still leads there.
//!
//! A file is known by device, inode and, where the file system keeps one, its birth: an inode number is used again once
//! its file is gone. Nothing here opens a file: closing a descriptor of it would drop the locks that SQLite holds.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{place::with_suffix, schema::Open};
use crate::error::{Error, ErrorKind};

/// A file, whatever its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
    born: Option<SystemTime>,
}

/// Which file a piece of work may be done with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The one that was accepted.
    Accepted,
    /// Also one that took its place, if it passes every check and the work, which reads everything.
    AnyGood,
}

/// What lies at a path where a file was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Same,
    Other,
    /// Nobody can tell at the moment.
    Unknown,
}

impl FileId {
    /// The file that `path` leads to.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub(super) fn at(path: &Path) -> Result<Self, Error> {
        Self::look(path).map_err(|error| {
            let detail = format!("{} cannot be read: {error}.", path.display());
            Error::new(ErrorKind::StoreUnavailable, detail)
        })
    }

    fn look(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino(), born: metadata.created().ok() })
    }

    fn found_at(self, path: &Path) -> Found {
        match Self::look(path) {
            Ok(id) if id == self => Found::Same,
            Ok(_) => Found::Other,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Found::Other,
                _ => Found::Unknown,
            },
        }
    }
}

/// An open connection and the files that it was opened on.
pub(super) struct Held {
    pub(super) open: Open,
    pub(super) file: FileId,
    /// The write-ahead log, once SQLite has opened it. Nobody removes it while a connection is open.
    log: Option<FileId>,
    log_path: PathBuf,
}

impl Held {
    pub(super) fn new(open: Open, file: FileId, path: &Path) -> Self {
        // SQLite keeps the log beside the file itself, not beside a link to it.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Self { open, file, log: None, log_path: with_suffix(&path, "-wal") }
    }

    /// Whether the store is at `path` still, file and log. Where the file system cannot tell at the moment, it is taken
    /// to be: what is done next meets the same trouble.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        self.file.found_at(path) != Found::Other
            && self.log.is_none_or(|log| log.found_at(&self.log_path) != Found::Other)
    }

    /// Notes the log that SQLite has opened by now.
    pub(super) fn note_log(&mut self) {
        if self.log.is_none() {
            self.log = FileId::look(&self.log_path).ok();
        }
    }
}

/// The refusal of whatever is asked of a file that is not the one that was opened.
pub(super) fn replaced(path: &Path) -> Error {
    let detail = format!(
        "{} was replaced or removed while it was in use, or its log was; nothing is done until the \
         file that is there passes every check.",
        path.display()
    );
    Error::new(ErrorKind::StoreUnavailable, detail)
}
