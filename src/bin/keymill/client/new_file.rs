//! Files of a name that is free: the key of a client and its password replace nothing.
//!
//! Some file systems have no hard links and cannot rename without replacing. There a name is taken first, empty, and
//! what was made for this alone is replaced.

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
    links::{self, Led},
    passing::{is_unsupported, names_no_file, passing_file, synchronise, synchronise_directory_of},
};

/// A file of a name that is free, and not yet in its place. Dropped before it is finished, it is gone.
pub(super) struct NewFile {
    unfinished: NamedTempFile,
    option: &'static str,
    path: PathBuf,
}

impl NewFile {
    /// Finds out whether a file can be put at `path`, which `option` names and where nothing may be.
    pub(super) fn begin(option: &'static str, path: &Path) -> Result<Self> {
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
    pub(super) fn finish(mut self, bytes: &[u8]) -> Result<()> {
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
