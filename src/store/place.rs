//! Files that appear whole or not at all, readable by their owner alone.
//!
//! A file is written under a passing name beside its place, made durable, and then linked to its place, which fails
//! if something is there. So a crash leaves at most a file with a passing name, never half a file in its place.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind as Io, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use crate::{cpu::Tier, rng::Rng};

/// What SQLite may put beside a database file.
pub(super) const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// `path` with `suffix` appended to its last component.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A file on its way to its place, removed when dropped before [`Draft::publish`].
pub(super) struct Draft {
    place: PathBuf,
    passing: PathBuf,
}

impl Draft {
    /// Makes an empty file beside `place`, of mode 0600.
    ///
    /// # Errors
    /// Those of the file system, `AlreadyExists` if there is something at `place`.
    pub(super) fn new(place: &Path) -> io::Result<Self> {
        if place.symlink_metadata().is_ok() {
            return Err(Io::AlreadyExists.into());
        }
        let mut number = [0; 8];
        Rng::Os(Tier::PORTABLE).fill_from_os(&mut number).map_err(io::Error::other)?;
        let passing = with_suffix(place, &format!(".{:016x}.new", u64::from_be_bytes(number)));
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&passing)?;
        Ok(Self { place: place.to_owned(), passing })
    }

    /// Where to write.
    pub(super) fn path(&self) -> &Path {
        &self.passing
    }

    /// Writes the whole content.
    pub(super) fn write(&self, content: &[u8]) -> io::Result<()> {
        OpenOptions::new().write(true).open(&self.passing)?.write_all(content)
    }

    /// Puts the file in its place, durably.
    ///
    /// # Errors
    /// `AlreadyExists` if there is something by now; others of the file system. There is then nothing new at the place.
    pub(super) fn publish(self) -> io::Result<()> {
        File::open(&self.passing)?.sync_all()?;
        fs::hard_link(&self.passing, &self.place)?;
        // From here on the file is complete and in its place; its passing name goes with `self`.
        let place = self.place.clone();
        drop(self);
        let synced = sync_directory(&place);
        if synced.is_err() {
            let _ = fs::remove_file(&place);
        }
        synced
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.passing);
        for companion in COMPANIONS {
            let _ = fs::remove_file(with_suffix(&self.passing, companion));
        }
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("file");
        let draft = Draft::new(&place).unwrap();
        draft.write(b"half").unwrap();
        assert!(!place.exists());
        drop(draft);
        assert_eq!(names(home.path()), [""; 0]);

        let (one, two) = (Draft::new(&place).unwrap(), Draft::new(&place).unwrap());
        one.write(b"one").unwrap();
        two.write(b"two").unwrap();
        one.publish().unwrap();
        assert_eq!(two.publish().unwrap_err().kind(), Io::AlreadyExists);
        assert_eq!(names(home.path()), ["file"]);
        assert_eq!(fs::read(&place).unwrap(), b"one");
        assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Draft::new(&place).is_err_and(|error| error.kind() == Io::AlreadyExists));
    }
}
