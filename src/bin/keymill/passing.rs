//! Files on their way: written beside their place under a passing name, and made to last.
//!
//! File systems differ: some cannot synchronise a directory, or a file. What is safe without is done without.

use std::{fs::File, io, path::Path};

use rustix::io::Errno;
use tempfile::NamedTempFile;

use crate::links::directory_of;

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

/// Whether the system or the file system does not know how to do what was asked.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::ROFS)
    )
}
