//! Files on their way: written beside their place under a passing name, made to last, and put where they belong.
//!
//! File systems differ: some cannot synchronise a directory, some have no hard links, some cannot rename without
//! replacing. What is safe without those is done without them.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::io::Errno;
use tempfile::{NamedTempFile, PersistError};

use crate::{
    failure::{Failure, Result},
    interrupt::{self, Unfinished},
    links::{self, Led, directory_of},
};

/// An empty file, mode 0600, beside `path`.
pub(crate) fn passing_file(path: &Path) -> io::Result<NamedTempFile> {
    let directory = directory_of(path);
    tempfile::Builder::new().prefix(".keymill-").suffix(".part").tempfile_in(directory)
}

/// Whether the last part of `path` can be no file's.
pub(crate) fn names_no_file(path: &Path) -> bool {
    // The last part of a path that ends in a slash is that of a directory.
    path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

/// Has the system write what it holds of `file`, if it can do so for this one.
pub(crate) fn synchronise(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if is_unsupported(&error) => Ok(()),
        done => done,
    }
}

/// The name, too, shall survive a power failure. Some file systems cannot synchronise a directory, and what the file
/// holds is safe by now.
pub(crate) fn synchronise_directory_of(path: &Path) {
    let _ = File::open(directory_of(path)).and_then(|directory| directory.sync_all());
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::ROFS)
    )
}

/// A file of a name that is free, and not yet in its place. Dropped before it is finished, it is gone.
pub(crate) struct NewFile {
    unfinished: NamedTempFile,
    option: &'static str,
    path: PathBuf,
}

impl NewFile {
    /// Finds out whether a file can be put at `path`, which `option` names and where nothing may be.
    pub(crate) fn begin(option: &'static str, path: &Path) -> Result<Self> {
        let fail = |error: io::Error| Failure::file("cannot write", path, &error);
        if names_no_file(path) {
            let message = format!("{option} {path:?} names no file");
            return Err(Failure::refused(message, "name a file"));
        }
        match path.symlink_metadata() {
            Ok(_) => return Err(taken(option, path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail(error)),
        }
        let Led::Path(end) = links::follow(path).map_err(fail)? else {
            return Err(Failure::refused(
                format!("{option} {path:?} leads through a link that somebody else has put there"),
                "name a file in a directory of your own",
            ));
        };
        let unfinished = passing_file(&end).map_err(|error| fail(error.kind().into()))?;
        interrupt::watch(Unfinished::Beside(unfinished.path().to_owned()));
        Ok(Self { unfinished, option, path: path.to_owned() })
    }

    /// Writes the file and puts it in its place, unless there is something by now.
    pub(crate) fn finish(mut self, bytes: &[u8]) -> Result<()> {
        let Self { unfinished, option, path } = &mut self;
        unfinished
            .write_all(bytes)
            .and_then(|()| synchronise(unfinished.as_file()))
            .map_err(|error| Failure::file("cannot write", path, &error))?;
        let (option, path) = (*option, path.clone());
        put(self.unfinished, &path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => taken(option, &path),
            _ => Failure::file("cannot write", &path, &error),
        })?;
        synchronise_directory_of(&path);
        Ok(())
    }
}

/// Puts a file at `path` without replacing anything.
fn put(unfinished: NamedTempFile, path: &Path) -> io::Result<()> {
    let PersistError { error, file } = match unfinished.persist_noclobber(path) {
        Ok(_) => return Ok(()),
        Err(refused) => refused,
    };
    // It was a link at last, and this file system has none. A name that was made for this is ours to replace.
    if !is_unsupported(&error) && Errno::from_io_error(&error) != Some(Errno::PERM) {
        return Err(error);
    }
    drop(File::options().write(true).create_new(true).mode(0o600).open(path)?);
    file.persist(path).map(drop).map_err(|refused| {
        let _ = fs::remove_file(path);
        refused.error
    })
}

fn taken(option: &str, path: &Path) -> Failure {
    Failure::refused(
        format!("{option} {path:?} exists already, and is never overwritten"),
        "name a file that does not exist",
    )
}
