//! Where a path leads: its links followed by hand, one by one, so that each can be looked at.
//!
//! Two kinds of link are not simply followed. Those in `/proc/self/fd` (and so `/dev/stdout` and `/dev/fd/3`) are open
//! descriptors under a name: the open file itself is meant, with its place and its append mode, and not whatever has
//! its name. And in a directory where everybody may put links (sticky and writable by all, such as `/tmp`) a stranger's
//! is refused, as Linux does by `fs.protected_symlinks`: it would choose what this user overwrites.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, Metadata},
    io,
    os::{fd::RawFd, unix::fs::MetadataExt},
    path::{Component, Path, PathBuf},
};

/// As many as Linux follows.
const LINKS_MAX: usize = 40;

/// What a path leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Led {
    /// A name without links before it or in its place. Nothing may be there.
    Path(PathBuf),
    /// An open descriptor of this process.
    Descriptor(RawFd),
    /// One of another process.
    OfAnother(PathBuf),
    /// A link that a stranger has put where everybody may.
    Strangers(PathBuf),
}

/// Follows `path` to its end.
///
/// # Errors
/// If a directory on the way is not there or cannot be searched, or if there are too many links.
pub(crate) fn follow(path: &Path) -> io::Result<Led> {
    let mut rest: VecDeque<OsString> = parts(path).collect();
    let mut at = PathBuf::new();
    let mut links = 0;
    while let Some(part) = rest.pop_front() {
        let next = at.join(&part);
        let found = match fs::symlink_metadata(&next) {
            Ok(found) => found,
            // The last part may be missing.
            Err(error) if error.kind() == io::ErrorKind::NotFound && rest.is_empty() => {
                let directory = fs::canonicalize(directory_of(&next))?;
                return Ok(descriptor(&directory, &part, &next).unwrap_or(Led::Path(next)));
            }
            Err(error) => return Err(error),
        };
        if !found.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(io::Error::other("too many symbolic links"));
        }
        let directory = fs::canonicalize(directory_of(&next))?;
        if rest.is_empty()
            && let Some(led) = descriptor(&directory, &part, &next)
        {
            return Ok(led);
        }
        if is_strangers(&found, &fs::metadata(&directory)?) {
            return Ok(Led::Strangers(next));
        }
        let target = fs::read_link(&next)?;
        for part in parts(&target).rev() {
            rest.push_front(part);
        }
        if target.is_absolute() {
            at = PathBuf::new();
        }
    }
    Ok(Led::Path(at))
}

/// The parts of a path, `/` and `..` among them.
fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    parts.map(|part| part.as_os_str().to_owned())
}

/// The descriptor that the link `name` in `directory` stands for, if it does.
fn descriptor(directory: &Path, name: &OsString, link: &Path) -> Option<Led> {
    let of_process = directory.strip_prefix("/proc").ok()?;
    let mut parts = of_process.iter();
    let process = parts.next()?;
    if parts.next_back()? != "fd" {
        return None;
    }
    let number = name.to_str()?.parse().ok()?;
    let own = fs::read_link("/proc/self").is_ok_and(|own| own.as_os_str() == process);
    Some(if own { Led::Descriptor(number) } else { Led::OfAnother(link.to_owned()) })
}

/// Whether somebody else than this user and the owner of the directory has put `found` where everybody may.
pub(crate) fn is_strangers(found: &Metadata, directory: &Metadata) -> bool {
    const STICKY_FOR_ALL: u32 = 0o1002;
    let open = directory.mode() & STICKY_FOR_ALL == STICKY_FOR_ALL;
    let user = rustix::process::geteuid().as_raw();
    open && found.uid() != user && found.uid() != directory.uid()
}

/// The directory that holds `path`.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_to_their_end_or_to_what_is_missing_there() {
        let scratch = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(scratch.path()).unwrap();
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join("dir/file"), "").unwrap();
        symlink("dir", root.join("to-dir")).unwrap();
        symlink("to-dir/file", root.join("to-file")).unwrap();
        symlink(root.join("dir/none"), root.join("to-none")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        for (path, end) in [
            ("dir/file", "dir/file"),
            ("to-dir/./file", "dir/file"),
            ("to-file", "dir/file"),
            ("to-none", "dir/none"),
            ("to-dir/new", "dir/new"),
        ] {
            assert_eq!(follow(&root.join(path)).unwrap(), Led::Path(root.join(end)), "{path}");
        }
        let up = follow(&root.join("to-dir/../to-file")).unwrap();
        assert_eq!(up, Led::Path(root.join("dir/../dir/file")));
        assert!(follow(&root.join("loop")).is_err());
        assert!(follow(&root.join("none/file")).is_err());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn names_of_open_descriptors_are_descriptors() {
        for name in ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/thread-self/fd/1"] {
            assert_eq!(follow(Path::new(name)).unwrap(), Led::Descriptor(1), "{name}");
        }
        let scratch = tempfile::tempdir().unwrap();
        let link = scratch.path().join("link");
        symlink("/dev/stdin", &link).unwrap();
        assert_eq!(follow(&link).unwrap(), Led::Descriptor(0));
        assert_eq!(follow(Path::new("/dev/fd/987")).unwrap(), Led::Descriptor(987));
    }
}
