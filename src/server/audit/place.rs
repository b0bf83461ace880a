//! What an audit log's path leads to, and whether a log may be written there: decided here, once, for every kind.
//!
//! | there is | it means |
//! |---|---|
//! | nothing | a file of mode 0600 is made |
//! | a file | appended to, synced, locked, rotated, if it passes `check_owner` |
//! | a FIFO, a terminal, `/dev/null` | lines are written as they come: nothing to sync, lock or rotate |
//! | an open descriptor (`/dev/stdout`, `/proc/self/fd/3`) | what it is, without rotation: no name to give away |
//! | a directory, a block device, a socket with a name | refused |
//! | a symbolic link | followed, unless a stranger made it in a directory where everybody can, such as `/tmp` |
//!
//! Files are compared by device and inode, never by name. A file is looked at before it is opened: to open and close a
//! key store would take SQLite's locks away.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, ErrorKind as Io},
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Component, Path, PathBuf},
};

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// Files that must not be written to, with what they are.
#[derive(Clone, Debug, Default)]
pub(in crate::server) struct Taboo(Vec<(PathBuf, &'static str)>);

impl Taboo {
    pub(in crate::server) fn add(&mut self, path: &Path, what: &'static str) {
        self.0.push((path.to_owned(), what));
    }

    /// Looked up at each use: links and names may lead elsewhere by now.
    fn check(&self, found: &Metadata) -> io::Result<()> {
        let found_id = Identity::of(found);
        let same = |metadata: &Metadata| Identity::of(metadata) == found_id;
        for (path, what) in &self.0 {
            if fs::metadata(path).is_ok_and(|metadata| same(&metadata)) {
                return Err(refused(format!("it is {what}, {path:?}; name another file")));
            }
        }
        let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
        let stderr = stderr.and_then(|stderr| stderr.metadata());
        if found.is_file() && stderr.is_ok_and(|stderr| same(&stderr)) {
            return Err(refused("it is the file that standard error goes to; name another one"));
        }
        Ok(())
    }
}

/// A path that was followed to its end.
pub(super) struct Place {
    /// Without links.
    pub(super) path: PathBuf,
    /// Whether it is a descriptor of a process, under any name.
    pub(super) is_descriptor: bool,
    found: Option<Metadata>,
}

/// What was opened.
pub(super) enum Opened {
    File {
        file: File,
        readable: bool,
        made: bool,
    },
    Stream(File),
    /// A socket that this process was started with.
    Socket(std::os::fd::OwnedFd),
}

const LINKS_MAX: usize = 40;

impl Place {
    pub(super) fn find(path: &Path) -> io::Result<Self> {
        let mut done = PathBuf::from("/");
        let mut rest = names(&std::path::absolute(path)?);
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            if name == ".." {
                done.pop();
                continue;
            }
            let next = done.join(&name);
            if is_descriptors(&done) && rest.is_empty() {
                let found = Some(fs::metadata(&next)?);
                return Ok(Self { path: next, is_descriptor: true, found });
            }
            match next.symlink_metadata() {
                Ok(link) if link.is_symlink() => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(io::Error::from_raw_os_error(libc::ELOOP));
                    }
                    check_link(&next, &link, &done.metadata()?)?;
                    let target = fs::read_link(&next)?;
                    if target.is_absolute() {
                        done = PathBuf::from("/");
                    }
                    for name in names(&target).into_iter().rev() {
                        rest.push_front(name);
                    }
                }
                Ok(found) if rest.is_empty() => {
                    return Ok(Self { path: next, is_descriptor: false, found: Some(found) });
                }
                Ok(_) => done = next,
                Err(error) if error.kind() == Io::NotFound && rest.is_empty() => {
                    return Ok(Self { path: next, is_descriptor: false, found: None });
                }
                Err(error) if error.kind() == Io::NotFound => {
                    return Err(io::Error::new(
                        Io::NotFound,
                        format!("there is no directory {next:?}; make it first"),
                    ));
                }
                Err(error) => return Err(error),
            }
        }
        Err(refused("it is a directory; name a file in it"))
    }

    /// Opens what is there, or makes a file. Never waits.
    pub(super) fn open(&self, taboo: &Taboo) -> io::Result<Opened> {
        let Some(found) = &self.found else {
            let file = appending().read(true).create_new(true).mode(0o600).open(&self.path)?;
            return Ok(Opened::File { file, readable: true, made: true });
        };
        taboo.check(found)?;
        let kind = found.file_type();
        let opened = if kind.is_file() {
            if !self.is_descriptor {
                self.check_owner(found)?;
            }
            self.open_file()?
        } else if kind.is_fifo() || kind.is_char_device() {
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            let stream = OpenOptions::new().write(true).custom_flags(flags).open(&self.path);
            match stream {
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                    return Err(io::Error::new(
                        Io::NotConnected,
                        "no process reads this FIFO; start its reader first",
                    ));
                }
                stream => Opened::Stream(stream?),
            }
        } else if kind.is_socket() && self.is_descriptor {
            Opened::Socket(self.inherited(found)?)
        } else if kind.is_dir() {
            return Err(refused("it is a directory; name a file in it"));
        } else if kind.is_socket() {
            return Err(refused("it is a socket; name a file or a FIFO"));
        } else {
            return Err(refused("it is a block device; name a file or a FIFO"));
        };
        let same = |file: &File| {
            file.metadata().is_ok_and(|metadata| Identity::of(&metadata) == Identity::of(found))
        };
        match &opened {
            Opened::File { file, .. } | Opened::Stream(file) if !same(file) => {
                Err(io::Error::new(Io::Interrupted, "another file was put there meanwhile"))
            }
            _ => Ok(opened),
        }
    }

    fn open_file(&self) -> io::Result<Opened> {
        let flags = if self.is_descriptor { 0 } else { libc::O_NOFOLLOW };
        // Without waiting: it may be a FIFO by now.
        let flags = flags | libc::O_NONBLOCK;
        match appending().read(true).custom_flags(flags).open(&self.path) {
            Ok(file) => Ok(Opened::File { file, readable: true, made: false }),
            // A log that its writer may not read is still a log.
            Err(error) if error.kind() == Io::PermissionDenied => {
                let file = appending().custom_flags(flags).open(&self.path)?;
                Ok(Opened::File { file, readable: false, made: false })
            }
            Err(error) => Err(error),
        }
    }

    /// A socket has no name under which it could be opened: a copy of the descriptor is taken.
    fn inherited(&self, found: &Metadata) -> io::Result<std::os::fd::OwnedFd> {
        let (stdout, stderr) = (io::stdout(), io::stderr());
        for descriptor in [stdout.as_fd(), stderr.as_fd()] {
            let copy = descriptor.try_clone_to_owned()?;
            let file = File::from(copy.try_clone()?);
            if Identity::of(&file.metadata()?) == Identity::of(found) {
                return Ok(copy);
            }
        }
        Err(refused("it is a socket, and neither standard output nor standard error"))
    }

    /// A file in which a stranger could write what he likes is no audit log: it belongs to this user, to root, or to
    /// the owner of its directory, and others cannot write it.
    fn check_owner(&self, found: &Metadata) -> io::Result<()> {
        let directory = self.path.parent().map(fs::metadata).transpose()?;
        let of_directory = directory.map_or(found.uid(), |directory| directory.uid());
        let owners = [rustix::process::geteuid().as_raw(), 0, of_directory];
        if !owners.contains(&found.uid()) {
            let owner = found.uid();
            return Err(denied(format!(
                "it belongs to user {owner}, who is neither this one nor root nor the owner of the \
                 directory; name another file, or give it to this user with chown"
            )));
        }
        if found.mode() & 0o002 != 0 {
            return Err(denied("everybody can write it; take that away with chmod o-w"));
        }
        Ok(())
    }
}

fn appending() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.append(true);
    options
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

/// Whether a directory holds the open descriptors of a process.
fn is_descriptors(directory: &Path) -> bool {
    directory == Path::new("/dev/fd")
        || directory.starts_with("/proc") && directory.file_name().is_some_and(|name| name == "fd")
}

/// The rule of Linux's `protected_symlinks`, which may be off.
fn check_link(path: &Path, link: &Metadata, directory: &Metadata) -> io::Result<()> {
    let is_shared = directory.mode() & 0o1000 != 0 && directory.mode() & 0o022 != 0;
    let owners = [rustix::process::geteuid().as_raw(), directory.uid()];
    if is_shared && !owners.contains(&link.uid()) {
        let owner = link.uid();
        return Err(denied(format!(
            "{path:?} is a symbolic link that user {owner} made where everybody can; it is not \
             followed"
        )));
    }
    Ok(())
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::new(Io::InvalidInput, why.into())
}

fn denied(why: impl Into<String>) -> io::Error {
    io::Error::new(Io::PermissionDenied, why.into())
}
