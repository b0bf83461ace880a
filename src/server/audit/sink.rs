//! What audit records are written to: a file of this server's own, or a stream that somebody reads.
//!
//! A file is only ever appended to. Nothing is remembered of its length that would matter if another program changed
//! it: a line that broke off is found by the last byte of the file, and closed by a newline before the next one.

use std::{
    fs::{self, File, TryLockError},
    io::{self, ErrorKind as Io, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use super::place::{Identity, Opened, Place, Taboo};
use crate::limits::AUDIT_STREAM_TIME;

/// How often a lock or a full stream is tried.
const TRY_INTERVAL: Duration = Duration::from_millis(10);

/// An open audit log.
pub(super) enum Sink {
    File(LogFile),
    Stream(Stream),
}

/// How far an append came.
pub(super) struct Appended {
    /// Bytes that need not be written again: whole lines for a file, any number of bytes for a stream that goes on.
    pub(super) done: usize,
    pub(super) result: io::Result<()>,
}

/// Whether the path still leads to what is open, and what is open still holds what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Same,
    /// It has another name now, or its directory has.
    Renamed,
    /// It has no name any more: what it holds is lost.
    Removed,
    /// It is shorter than it was: somebody cut it.
    Cut,
}

/// A file, locked where the file system has locks.
pub(super) struct LogFile {
    file: File,
    /// Where it is, without links. `None` if it came as a descriptor, whose file is renamed by nobody here.
    place: Option<PathBuf>,
    readable: bool,
    /// Whether the last line broke off, for a file that cannot be read.
    broken: bool,
    /// The least length that it had after the last append. Only ever compared: a shorter file was cut by somebody.
    len: u64,
}

/// A FIFO, a terminal, a device, a socket.
pub(super) struct Stream {
    out: Out,
    is_descriptor: bool,
}

enum Out {
    File(File),
    Socket(OwnedFd),
}

impl Sink {
    /// Opens what `path` leads to. Waits for a lock for `patience` at most, and for nothing else.
    pub(super) fn open(path: &Path, taboo: &Taboo, patience: Duration) -> io::Result<Self> {
        const ATTEMPTS: usize = 8;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let place = Place::find(path)?;
            match Self::open_place(place, path, taboo, patience) {
                // Somebody else was at work there: what is there now is looked at anew.
                Err(error)
                    if matches!(error.kind(), Io::Interrupted | Io::AlreadyExists)
                        && attempt < ATTEMPTS => {}
                opened => return opened,
            }
        }
    }

    fn open_place(
        place: Place,
        path: &Path,
        taboo: &Taboo,
        patience: Duration,
    ) -> io::Result<Self> {
        let is_descriptor = place.is_descriptor;
        let out = match place.open(taboo)? {
            Opened::File { file, readable, made } => {
                lock(&file, path, patience)?;
                if made {
                    sync_directory(&place.path)?;
                }
                let len = file.metadata()?.len();
                let place = (!is_descriptor).then_some(place.path);
                let sink = Self::File(LogFile { file, place, readable, broken: false, len });
                // Whoever held the lock before may have given the file another name since.
                return match sink.standing(path) {
                    Standing::Same => Ok(sink),
                    _ => Err(io::Error::new(Io::Interrupted, "the file is renamed all the time")),
                };
            }
            Opened::Stream(file) => Out::File(file),
            Opened::Socket(socket) => Out::Socket(socket),
        };
        Ok(Self::Stream(Stream { out, is_descriptor }))
    }

    /// Whether records can be brought to a disk.
    pub(super) fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// Appends lines, each with its newline.
    pub(super) fn append(&mut self, lines: &[u8]) -> Appended {
        match self {
            Self::File(file) => file.append(lines),
            Self::Stream(stream) => stream.append(lines),
        }
    }

    /// Brings what was appended to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        let Self::File(log) = self else { return Ok(()) };
        match log.file.sync_data() {
            Err(error) if cannot_sync(&error) => Ok(()),
            synced => synced,
        }
    }

    pub(super) fn standing(&self, path: &Path) -> Standing {
        let (file, by_name, len) = match self {
            Self::File(log) => (&log.file, log.place.is_some(), log.len),
            Self::Stream(Stream { out: Out::File(file), is_descriptor }) => {
                (file, !is_descriptor, 0)
            }
            Self::Stream(_) => return Standing::Same,
        };
        // A file system that cannot tell has lost the file.
        let Ok(open) = file.metadata() else { return Standing::Removed };
        if by_name {
            let there = fs::metadata(path).map(|there| Identity::of(&there));
            if there.ok() != Some(Identity::of(&open)) {
                let is_gone = self.is_file() && open.nlink() == 0;
                return if is_gone { Standing::Removed } else { Standing::Renamed };
            }
        }
        if self.is_file() && open.len() < len { Standing::Cut } else { Standing::Same }
    }

    /// Whether the file has grown to its size, if it is one that can be given another name.
    pub(super) fn is_full(&self, more: usize, max_bytes: u64) -> io::Result<bool> {
        match self {
            Self::File(log) if log.place.is_some() => {
                let len = log.file.metadata()?.len();
                Ok(len > 0 && len.saturating_add(more as u64) > max_bytes)
            }
            _ => Ok(false),
        }
    }

    /// Gives the file a name of its own, with the time behind it. Never one that is taken.
    pub(super) fn rename(&self) -> io::Result<()> {
        let Self::File(LogFile { place: Some(place), .. }) = self else { return Ok(()) };
        let time = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let mut name = place.clone().into_os_string();
        name.push(format!(".{}", time.replace(':', "-")));
        // An empty file of ours takes the name, and is then replaced: a rename alone would replace anything.
        let mut made = fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(&mut made, 0o600);
        made.write(true).create_new(true).open(&name)?;
        fs::rename(place, &name).inspect_err(|_| drop(fs::remove_file(&name)))?;
        sync_directory(place)
    }

    /// Takes a cut as it is.
    pub(super) fn accept_cut(&mut self) {
        if let Self::File(log) = self {
            log.len = log.file.metadata().map_or(0, |metadata| metadata.len());
        }
    }
}

impl LogFile {
    fn append(&mut self, lines: &[u8]) -> Appended {
        let (mut done, mut written) = (0, 0);
        let result = self.close_line().and_then(|()| {
            while written < lines.len() {
                let result = match (&self.file).write(&lines[written..]) {
                    Ok(0) => Err(Io::WriteZero.into()),
                    Err(error) if error.kind() == Io::Interrupted => Ok(0),
                    result => result,
                };
                match result {
                    Ok(bytes) => written += bytes,
                    Err(error) => {
                        // What broke off stays, is closed by a newline, and is written again whole.
                        done = whole_lines(&lines[..written]);
                        self.broken = done < written;
                        return Err(error);
                    }
                }
            }
            done = written;
            Ok(())
        });
        // At least: if it is less now, the file was cut, and perhaps before this append.
        self.len += written as u64;
        if let Ok(metadata) = self.file.metadata() {
            self.len = self.len.max(metadata.len());
        }
        Appended { done, result }
    }

    /// Ends a line that broke off, whoever wrote it.
    fn close_line(&mut self) -> io::Result<()> {
        let mut is_broken = self.broken;
        if self.readable {
            let len = self.file.metadata()?.len();
            let mut last = [b'\n'];
            // Nothing is read if the file was cut since.
            let _ = self.file.read_at(&mut last, len.saturating_sub(1))?;
            is_broken = last != [b'\n'];
        }
        if is_broken {
            self.file.write_all(b"\n")?;
            self.broken = false;
        }
        Ok(())
    }
}

impl Stream {
    /// Writes as far as the reader lets it, and waits for it a while. After `WouldBlock` it goes on where it was.
    fn append(&mut self, bytes: &[u8]) -> Appended {
        let mut done = 0;
        let mut since = Instant::now();
        while done < bytes.len() {
            match self.write(&bytes[done..]) {
                Ok(0) => return Appended { done, result: Err(Io::WriteZero.into()) },
                Ok(written) => {
                    done += written;
                    since = Instant::now();
                }
                Err(error) if error.kind() == Io::Interrupted => {}
                Err(error) if error.kind() == Io::WouldBlock => {
                    if since.elapsed() > AUDIT_STREAM_TIME {
                        let why = "its reader does not read";
                        return Appended { done, result: Err(io::Error::new(Io::WouldBlock, why)) };
                    }
                    thread::sleep(TRY_INTERVAL);
                }
                Err(error) => return Appended { done, result: Err(error) },
            }
        }
        Appended { done, result: Ok(()) }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match &self.out {
            Out::File(file) => { file }.write(bytes),
            // The descriptor is shared with whoever started this process: its mode is not changed.
            Out::Socket(socket) => {
                use rustix::net::{SendFlags, send};
                Ok(send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
            }
        }
    }
}

/// Bytes of the lines that are whole.
pub(super) fn whole_lines(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1)
}

/// One server writes a log: of two, each would rename the file under the other.
fn lock(file: &File, path: &Path, patience: Duration) -> io::Result<()> {
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if since.elapsed() < patience => {
                thread::sleep(TRY_INTERVAL);
            }
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(
                    Io::ResourceBusy,
                    "another process has locked it, such as a server that writes it, or one that \
                     has not ended yet; give each server a file of its own",
                ));
            }
            // A file system without locks.
            Err(TryLockError::Error(error)) => {
                tracing::warn!(
                    ?path, %error, "the audit log cannot be locked; let no other server write it"
                );
                return Ok(());
            }
        }
    }
}

/// Makes a new name durable, where directories can be synced.
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| *parent != Path::new(""));
    match File::open(directory.unwrap_or(Path::new("."))).and_then(|open| open.sync_all()) {
        Err(error) if cannot_sync(&error) || error.kind() == Io::PermissionDenied => Ok(()),
        synced => synced,
    }
}

/// Whether there is nothing that could be synced.
fn cannot_sync(error: &io::Error) -> bool {
    let unsupported = [libc::EINVAL, libc::ENOTSUP, libc::ENOSYS, libc::EROFS];
    error.raw_os_error().is_some_and(|code| unsupported.contains(&code))
}
