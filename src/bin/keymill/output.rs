//! Where rows go: standard output, or a file that appears only when it is complete.
//!
//! A file is written beside its place, with mode 0600 since it may hold plaintext keys, synchronised, and then renamed:
//! neither a crash nor an interruption leaves something that looks complete. Devices and pipes cannot be renamed
//! over (`--out /dev/null` as root would replace the device), so these are written directly.

use std::{
    fs::{self, File},
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use crate::{
    failure::{Failure, Result},
    interrupt,
};

/// The name that means standard input or standard output.
pub(crate) const DASH: &str = "-";

/// An open output.
pub(crate) enum Output {
    /// Not the standard library's own: its line buffer would keep a copy of the rows that passed it.
    Stdout(File),
    /// A pipe or a device.
    Direct { file: File, path: PathBuf },
    /// A regular file, not yet in its place.
    File { unfinished: NamedTempFile, path: PathBuf },
}

impl Output {
    /// Opens `path`; `-` and `None` are standard output.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path.filter(|path| *path != Path::new(DASH)) else {
            let stdout = io::stdout().as_fd().try_clone_to_owned();
            return Ok(Self::Stdout(stdout.map_err(|error| Failure::stdout(&error))?.into()));
        };
        let fail = |error: io::Error| Failure::file("cannot write", path, &error);
        let path = match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                return Err(Failure::refused(
                    format!("--out {path:?} is a directory"),
                    "name a file in it, or `-` for standard output",
                ));
            }
            Ok(found) if !found.is_file() => {
                let file = File::options().write(true).open(path).map_err(fail)?;
                return Ok(Self::Direct { file, path: path.to_owned() });
            }
            // A symbolic link stays; the file that it names is replaced.
            Ok(_) => fs::canonicalize(path).map_err(fail)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(error) => return Err(fail(error)),
        };
        // Seen here and not by the rename, which comes after all the work.
        if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(Failure::refused(format!("--out {path:?} names no file"), "name a file"));
        }
        let unfinished = tempfile::Builder::new()
            .prefix(".keymill-")
            .suffix(".part")
            .tempfile_in(directory_of(&path))
            // Without the name of the temporary file, which says nothing to a reader.
            .map_err(|error| fail(error.kind().into()))?;
        interrupt::watch(unfinished.path());
        Ok(Self::File { unfinished, path })
    }

    /// Whether rows appear on a terminal.
    pub(crate) fn is_terminal(&self) -> bool {
        match self {
            Self::Stdout(file) | Self::Direct { file, .. } => file.is_terminal(),
            Self::File { .. } => false,
        }
    }

    /// Writes whole rows.
    pub(crate) fn write(&mut self, rows: &[u8]) -> Result<()> {
        match self {
            Self::Stdout(file) => file.write_all(rows).map_err(|error| Failure::stdout(&error)),
            Self::Direct { file, path } => file.write_all(rows).map_err(|error| {
                if error.kind() == io::ErrorKind::BrokenPipe {
                    return Failure::stdout(&error);
                }
                Failure::file("cannot write", path, &error)
            }),
            Self::File { unfinished, path } => unfinished
                .write_all(rows)
                .map_err(|error| Failure::file("cannot write", path, &error)),
        }
    }

    /// Completes the output. Dropped without this, a file is removed.
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Stdout(_) | Self::Direct { .. } => Ok(()),
            Self::File { unfinished, path } => {
                let fail = |error: &io::Error| Failure::file("cannot complete", &path, error);
                unfinished.as_file().sync_all().map_err(|error| fail(&error))?;
                interrupt::complete(|| {
                    unfinished.persist(&path).map_err(|error| fail(&error.error))
                })?;
                // The name, too, shall survive a power failure. Some file systems cannot synchronise a directory, and
                // the rows are safe by now.
                let _ = File::open(directory_of(&path)).and_then(|directory| directory.sync_all());
                Ok(())
            }
        }
    }
}

/// The directory that holds `path`.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
