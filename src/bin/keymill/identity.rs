//! Files by what they are and not by their names: device and inode decide whether two are one.
//!
//! A path, a link, a hard link, a bind mount, another spelling where case does not count, `/dev/stdin` and a descriptor
//! that a shell has opened can all be the same file. What does not exist yet is its directory and its name there.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

use crate::{
    failure::{Failure, Result},
    links::{self, Led, directory_of},
    output::DASH,
};

/// A file, or the place of one.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    File(FileId),
    /// Nothing yet, but a name in a directory.
    Free {
        directory: FileId,
        name: OsString,
    },
    /// Nothing that reading or writing could spoil: a terminal, an anonymous pipe, a path that leads nowhere.
    Nowhere,
}

/// Device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(about: &Metadata) -> Self {
        Self { device: about.dev(), inode: about.ino() }
    }
}

impl Place {
    /// What `path` leads to.
    pub(crate) fn of(path: &Path) -> Self {
        match fs::metadata(path) {
            Ok(about) => Self::of_existing(&about),
            Err(_) => match links::follow(path) {
                Ok(Led::Path(path)) => Self::free(&path).unwrap_or(Self::Nowhere),
                _ => Self::Nowhere,
            },
        }
    }

    /// What a descriptor has open.
    pub(crate) fn of_open(open: &impl AsFd) -> Self {
        let about = open.as_fd().try_clone_to_owned().and_then(|file| File::from(file).metadata());
        about.map_or(Self::Nowhere, |about| Self::of_existing(&about))
    }

    fn of_existing(about: &Metadata) -> Self {
        let kind = about.file_type();
        // A terminal may well be both input and output, and so may a socket.
        if kind.is_file() || kind.is_block_device() || kind.is_fifo() {
            Self::File(FileId::of(about))
        } else {
            Self::Nowhere
        }
    }

    fn free(path: &Path) -> Option<Self> {
        let directory = FileId::of(&fs::metadata(directory_of(path)).ok()?);
        Some(Self::Free { directory, name: path.file_name()?.to_owned() })
    }

    /// Whether both are one file, or would be. In some directories case does not count, so it never does here.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one), Self::File(other)) => one == other,
            (
                Self::Free { directory, name },
                Self::Free { directory: other_directory, name: other_name },
            ) => directory == other_directory && same_name(name, other_name),
            _ => false,
        }
    }
}

fn same_name(one: &OsStr, other: &OsStr) -> bool {
    one.eq_ignore_ascii_case(other)
}

/// A file of a command, and what the command's user calls it.
#[derive(Debug)]
pub(crate) struct Named {
    called: String,
    place: Place,
}

impl Named {
    /// The file that `option` names.
    pub(crate) fn file(option: &str, path: &Path) -> Self {
        Self { called: format!("{option} {path:?}"), place: Place::of(path) }
    }

    /// The input that `option` names; `-` is standard input.
    pub(crate) fn input(option: &str, path: &Path) -> Self {
        if path == Path::new(DASH) {
            let place = Place::of_open(&io::stdin());
            return Self { called: "standard input".into(), place };
        }
        Self::file(option, path)
    }

    /// The output that `option` names; `-` and `None` are standard output.
    pub(crate) fn output(option: &str, path: Option<&Path>) -> Self {
        match path {
            Some(path) if path != Path::new(DASH) => Self::file(option, path),
            _ => Self::standard_output(),
        }
    }

    pub(crate) fn standard_output() -> Self {
        Self { called: "standard output".into(), place: Place::of_open(&io::stdout()) }
    }

    pub(crate) fn standard_error() -> Self {
        Self { called: "standard error".into(), place: Place::of_open(&io::stderr()) }
    }

    pub(crate) fn called(&self) -> &str {
        &self.called
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Refuses to write where `other` is; `lost` says what would be lost, as the end of a sentence.
    pub(crate) fn spares(&self, other: &Self, lost: &str) -> Result<()> {
        if !self.place.is(&other.place) {
            return Ok(());
        }
        Err(Failure::refused(
            format!("{} and {} are the same file, {lost}", self.called, other.called),
            "name two files",
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_the_same_under_every_name() {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        fs::write(path("file"), "").unwrap();
        fs::write(path("other"), "").unwrap();
        symlink("file", path("link")).unwrap();
        symlink("new", path("to-new")).unwrap();
        fs::hard_link(path("file"), path("hard")).unwrap();
        fs::create_dir(path("dir")).unwrap();
        let file = Place::of(&path("file"));
        for name in ["link", "hard", "./file", "dir/../file"] {
            assert!(file.is(&Place::of(&path(name))), "{name}");
        }
        assert!(file.is(&Place::of_open(&File::open(path("hard")).unwrap())));
        assert!(!file.is(&Place::of(&path("other"))));
        let new = Place::of(&path("new"));
        for name in ["to-new", "NEW", "dir/../new"] {
            assert!(new.is(&Place::of(&path(name))), "{name}");
        }
        for name in ["newer", "dir/new", "file", "none/new"] {
            assert!(!new.is(&Place::of(&path(name))), "{name}");
        }
        let null = || Place::of(Path::new("/dev/null"));
        assert!(!null().is(&null()));
    }
}
