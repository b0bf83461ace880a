//! Files that appear whole or not at all, readable by their owner alone.
//!
//! A file is written under a passing name beside its place, made durable, and then moved to its place, which fails if
//! something is there. So a crash leaves at most a file with a passing name, never half a file in its place.
//!
//! SQLite opens paths up to a length of its own, and puts files with longer names beside them: [`check_length`] says so
//! before anything is made, and a passing name is never what makes a path too long.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind as Io, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Component, Path, PathBuf},
};

use crate::{cpu::Tier, os::files, rng::Rng};

/// What SQLite may put beside a database file.
pub(super) const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// `path` with `suffix` appended to its last component.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Most bytes of a component of a path, on every file system that is in use.
const COMPONENT_LEN_MAX: usize = 255;
/// What a companion's name is longer than the file's.
const COMPANION_LEN: usize = 8;
/// Most bytes of the path of a store: SQLite's `MAX_PATHNAME` (os_unix.c), less the name of a companion.
const STORE_PATH_LEN_MAX: usize = 512 - COMPANION_LEN;

/// Checks that SQLite can open a store at an absolute path, whether or not anything is there yet.
///
/// # Errors
/// A sentence that says how long it may be.
pub(super) fn check_length(path: &Path) -> Result<(), String> {
    let too_long = |what: &str, len: usize, most: usize| {
        let shown = path.display();
        Err(format!(
            "{what} has {len} bytes; it may have {most}: choose a shorter place than {shown}."
        ))
    };
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        let (what, most) = if path.file_name() == Some(name) {
            ("The name of the store's file", COMPONENT_LEN_MAX - COMPANION_LEN)
        } else {
            ("A name in the path of the store", COMPONENT_LEN_MAX)
        };
        if name.len() > most {
            return too_long(what, name.len(), most);
        }
    }
    // SQLite follows links before it measures.
    let len = resolved(path).as_os_str().len();
    if len > STORE_PATH_LEN_MAX {
        return too_long("The path of the store", len, STORE_PATH_LEN_MAX);
    }
    Ok(())
}

/// Where `path` leads: as much of it as there is, without links, and the rest as it is.
fn resolved(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = fs::canonicalize(ancestor) {
            let rest = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        }
    }
    path.to_owned()
}

/// A name beside `place` that nobody has: that of `place` with random digits behind it, or, where that would be too
/// long, one that is no longer than it.
fn passing_name(place: &Path) -> io::Result<PathBuf> {
    let mut random = [0; 8];
    Rng::Os(Tier::PORTABLE).fill_from_os(&mut random).map_err(io::Error::other)?;
    let digits = format!("{:016x}", u64::from_be_bytes(random));
    let long = with_suffix(place, &format!(".{digits}.new"));
    let name_len = long.file_name().map_or(0, |name| name.len());
    if name_len + COMPANION_LEN <= COMPONENT_LEN_MAX
        && resolved(&long).as_os_str().len() <= STORE_PATH_LEN_MAX
    {
        return Ok(long);
    }
    let len = place.file_name().map_or(0, |name| name.len()).min(1 + digits.len());
    let hidden = format!(".{digits}");
    // A name of a few characters is all digits, so that there are some to choose from.
    let name = if len < 4 { &digits[..len] } else { &hidden[..len] };
    Ok(place.with_file_name(name))
}

/// So often a passing name is drawn: short ones may be in use.
const PASSING_NAMES_MAX: usize = 64;

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
        for _ in 0..PASSING_NAMES_MAX {
            let passing = passing_name(place)?;
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&passing) {
                Ok(_) => return Ok(Self { place: place.to_owned(), passing }),
                Err(error) if error.kind() == Io::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("every passing name beside it is in use"))
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
        files::move_new(&self.passing, &self.place)?;
        // From here on the file is complete and in its place.
        let synced = files::sync_directory(self.place.parent().unwrap_or(Path::new("")));
        if synced.is_err() {
            let _ = fs::remove_file(&self.place);
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A file whose path has `len` bytes in a directory of its own.
    fn place_of_len(home: &Path, len: usize, name: &str) -> PathBuf {
        let mut directory = home.to_owned();
        loop {
            let rest = len - directory.as_os_str().len() - 1 - name.len();
            if rest == 0 {
                break;
            }
            // A slash and at least one letter; never one byte that would be left over.
            let part = if rest <= 100 { rest - 1 } else { 60 };
            directory.push("d".repeat(part));
        }
        fs::create_dir_all(&directory).unwrap();
        directory.join(name)
    }

    #[test]
    fn whatever_sqlite_can_open_can_be_made_and_the_rest_is_told_before() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path().canonicalize().unwrap();
        let longest = "n".repeat(COMPONENT_LEN_MAX - COMPANION_LEN);
        for name in ["k", "kdb", "keys.db", "a-rather-long-name.db", &longest] {
            // SQLite's own locks would stay held in the child of another test's fork.
            let _gate = crate::os::fork_gate();
            for len in [480, 483, 484, 490, 503, 504] {
                let place = place_of_len(&home, len, name);
                check_length(&place).unwrap();
                let draft = Draft::new(&place).unwrap();
                assert!(draft.path().as_os_str().len() <= STORE_PATH_LEN_MAX, "{len} {name}");
                let sqlite = rusqlite::Connection::open(draft.path()).unwrap();
                sqlite.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE a (b)").unwrap();
                drop(sqlite);
                draft.publish().unwrap();
                let sqlite = rusqlite::Connection::open(&place).unwrap();
                sqlite.execute_batch("INSERT INTO a VALUES (1)").unwrap();
                drop(sqlite);
                assert_eq!(names(place.parent().unwrap()), [name], "{len}");
                fs::remove_file(&place).unwrap();
            }
            let place = place_of_len(&home, 505, name);
            assert!(check_length(&place).unwrap_err().contains("505 bytes; it may have 504"));
            assert!(
                rusqlite::Connection::open(&place).is_err(),
                "SQLite takes longer paths by now"
            );
        }
        let long = |len| home.join("x".repeat(len));
        assert!(check_length(&long(248)).unwrap_err().contains("248 bytes; it may have 247"));
        assert!(check_length(&long(256).join("keys.db")).unwrap_err().contains("it may have 255"));
        // A short path that leads to a long one is long, and the other way round.
        let link = home.join("link");
        let far = place_of_len(&home, 520, "keys.db");
        std::os::unix::fs::symlink(far.parent().unwrap(), &link).unwrap();
        assert!(check_length(&link.join("keys.db")).is_err());
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&home, far.with_file_name("back")).unwrap();
        check_length(&far.with_file_name("back").join("keys.db")).unwrap();
    }

    #[test]
    fn a_passing_name_that_is_in_use_is_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let place = place_of_len(&home.path().canonicalize().unwrap(), 504, "k");
        let taken: Vec<_> =
            "0123456789abcde".chars().map(|c| place.with_file_name(c.to_string())).collect();
        taken.iter().for_each(|taken| fs::write(taken, b"theirs").unwrap());
        for _ in 0..8 {
            if let Ok(draft) = Draft::new(&place) {
                assert_eq!(draft.path(), place.with_file_name("f"));
            }
        }
        assert!(taken.iter().all(|taken| fs::read(taken).unwrap() == b"theirs"));
    }

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
