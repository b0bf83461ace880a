//! Files: who this process is to them, moves that replace nothing, and directories on the disk.
//!
//! Not every file system has hard links, renames that refuse to replace, or directories that can be synchronised. Each
//! of the functions falls back as far as its promise holds, and no further.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

/// The user whose rights this process has.
pub(crate) fn effective_user() -> u32 {
    // SAFETY: the call has no arguments and always succeeds.
    unsafe { libc::geteuid() }
}

/// The groups whose rights this process has.
pub(crate) fn groups() -> Vec<u32> {
    // SAFETY: the call has no arguments and always succeeds.
    let mut groups = vec![unsafe { libc::getegid() }];
    // SAFETY: with a length of 0 the call counts and writes nothing.
    let count = unsafe { libc::getgroups(0, std::ptr::null_mut()) };
    let mut others = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: `others` has room for the `count` ids that it is asked for.
    let filled = unsafe { libc::getgroups(count.max(0), others.as_mut_ptr()) };
    // Refused if there are more by now: then this process has its first group alone.
    others.truncate(usize::try_from(filled).unwrap_or(0));
    groups.append(&mut others);
    groups
}

/// Whether this process may write to what is at `path`; to a directory, whether it may make files there.
pub(crate) fn may_write(path: &Path) -> bool {
    let Ok(text) = CString::new(path.as_os_str().as_bytes()) else { return false };
    let search = if path.is_dir() { libc::X_OK } else { 0 };
    let mode = libc::R_OK | libc::W_OK | search;
    // SAFETY: the string ends in a zero byte and outlives the call.
    unsafe { libc::faccessat(libc::AT_FDCWD, text.as_ptr(), mode, libc::AT_EACCESS) == 0 }
}

/// Moves a file to a place where nothing is.
///
/// # Errors
/// `AlreadyExists` if there is something; others of the file system. Nothing has been replaced, and nothing is new at
/// the place.
pub(crate) fn move_new(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => {
            // The file is in its place; a second name does no harm.
            let _ = fs::remove_file(from);
            return Ok(());
        }
        Err(error) if !lacks(&error, &NO_LINKS) => return Err(error),
        Err(_) => {}
    }
    match rename_new(from, to) {
        Err(error) if lacks(&error, &NO_EXCLUSIVE_RENAME) => rename_over_own(from, to),
        done => done,
    }
}

/// What file systems without hard links answer.
const NO_LINKS: [i32; 4] = [libc::EPERM, libc::EOPNOTSUPP, libc::ENOSYS, libc::EMLINK];
/// What systems without an exclusive rename answer; some sandboxes refuse what they do not know by EPERM.
const NO_EXCLUSIVE_RENAME: [i32; 4] = [libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::EPERM];
/// What file systems answer that cannot synchronise a directory, or need not.
const NO_DIRECTORY_SYNC: [i32; 6] =
    [libc::EINVAL, libc::EOPNOTSUPP, libc::ENOSYS, libc::EROFS, libc::EBADF, libc::EISDIR];

fn lacks(error: &io::Error, codes: &[i32]) -> bool {
    // ENOTSUP is another number than EOPNOTSUPP on some systems.
    error.raw_os_error().is_some_and(|code| codes.contains(&code) || code == libc::ENOTSUP)
}

#[cfg(target_os = "linux")]
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (from, to) = (text(from)?, text(to)?);
    // SAFETY: both strings end in a zero byte and outlive the call.
    let refused = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    if refused == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn rename_new(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::ENOSYS))
}

/// Takes the place by an empty file of our own, and then renames over it. A crash in between leaves the empty file.
fn rename_over_own(from: &Path, to: &Path) -> io::Result<()> {
    let own = OpenOptions::new().write(true).create_new(true).open(to)?;
    let renamed = fs::rename(from, to);
    if renamed.is_err() {
        let same = |found: fs::Metadata, own: fs::Metadata| {
            (found.dev(), found.ino(), found.len()) == (own.dev(), own.ino(), 0)
        };
        if let (Ok(found), Ok(own)) = (fs::symlink_metadata(to), own.metadata())
            && same(found, own)
        {
            let _ = fs::remove_file(to);
        }
    }
    renamed
}

/// Brings the names in a directory to the disk, as far as its file system does that.
///
/// # Errors
/// Those of a disk that fails or is full, and of a directory that is gone. A file system that cannot synchronise
/// directories is no failure: there is nothing better to do on it, and SQLite holds it in the same way.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let opened = match File::open(directory) {
        // A directory that we may write and not read.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(()),
        opened => opened,
    };
    match opened.and_then(|directory| directory.sync_all()) {
        Err(error) if lacks(&error, &NO_DIRECTORY_SYNC) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way of moving, whatever the file system offers.
    #[test]
    fn a_move_replaces_nothing_whichever_way_it_takes() {
        type Move = fn(&Path, &Path) -> io::Result<()>;
        for way in [move_new as Move, rename_new, rename_over_own] {
            let home = tempfile::tempdir().unwrap();
            let [from, to, link] = ["from", "to", "link"].map(|name| home.path().join(name));
            fs::write(&from, b"new").unwrap();
            way(&from, &to).unwrap();
            assert!(!from.exists());
            assert_eq!(fs::read(&to).unwrap(), b"new");

            fs::write(&from, b"newer").unwrap();
            std::os::unix::fs::symlink(home.path().join("absent"), &link).unwrap();
            for taken in [&to, &link] {
                let error = way(&from, taken).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
                assert_eq!(fs::read(&from).unwrap(), b"newer");
            }
            assert_eq!(fs::read(&to).unwrap(), b"new");

            fs::remove_file(&from).unwrap();
            assert!(way(&from, &home.path().join("other")).is_err());
            assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2, "nothing is left behind");
        }
    }

    #[test]
    fn what_a_file_system_lacks_is_told_from_what_it_fails_at() {
        let is = |code, codes: &[i32]| lacks(&io::Error::from_raw_os_error(code), codes);
        for codes in [&NO_LINKS[..], &NO_EXCLUSIVE_RENAME, &NO_DIRECTORY_SYNC] {
            for code in codes {
                assert!(is(*code, codes));
            }
            for code in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EEXIST, libc::EACCES] {
                assert!(!is(code, codes));
            }
        }
        let home = tempfile::tempdir().unwrap();
        sync_directory(home.path()).unwrap();
        assert!(sync_directory(&home.path().join("absent")).is_err());
    }

    #[test]
    fn this_process_is_in_its_own_group() {
        let home = tempfile::tempdir().unwrap();
        let made = fs::metadata(home.path()).unwrap();
        assert_eq!(made.uid(), effective_user());
        assert!(groups().contains(&made.gid()));
    }
}
