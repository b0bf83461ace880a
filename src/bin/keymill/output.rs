//! Where rows go, decided before any work: a file that appears when it is complete, or a stream.
//!
//! | `--out` leads to | rows |
//! |---|---|
//! | nothing, or a regular file | are written beside it and replace it when they are complete |
//! | nothing given, `-`, an open descriptor under any name | go to that descriptor as they come, after what is there |
//! | a pipe, a terminal, another character device | go there as they come; a FIFO without a reader is waited for |
//! | a file that is a mount point | are written in its place, since nothing can be renamed over it |
//! | a directory, socket, block device, read-only file, a stranger's link in `/tmp` | are refused |
//!
//! A file is written beside its place, with mode 0600 since it may hold plaintext keys, synchronised, and then renamed:
//! neither a crash nor an interruption leaves something that looks complete.

use std::{
    fs::{self, File, Metadata},
    io::{self, IsTerminal, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{Access, access},
    io::Errno,
};
use tempfile::NamedTempFile;

use crate::{
    failure::{Failure, Result, say},
    interrupt::{self, Unfinished},
    links::{self, Led, directory_of, is_strangers},
    passing::{names_no_file, passing_file, synchronise, synchronise_directory_of},
    standard::{self, Direction},
    warnings::warn,
};

/// The name that means standard input or standard output.
pub(crate) const DASH: &str = "-";

/// How often a FIFO is asked whether it has a reader.
const LOOK_FOR_READER: Duration = Duration::from_millis(50);

/// An open output.
pub(crate) enum Output {
    /// Standard output, another open descriptor, a pipe or a device; with its name for messages.
    Stream { file: File, name: String },
    /// A mount point.
    InPlace(InPlace),
    /// A regular file, not yet in its place.
    Beside { unfinished: NamedTempFile, path: PathBuf },
}

impl Output {
    /// Opens what `--out` names; `-` and `None` are standard output.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path.filter(|path| *path != Path::new(DASH)) else {
            return Self::stdout();
        };
        let fail = |error: io::Error| Failure::file("cannot write", path, &error);
        if names_no_file(path) {
            return Err(match fs::metadata(path) {
                Ok(found) if found.is_dir() => is_directory(path),
                _ => Failure::refused(format!("--out {path:?} names no file"), "name a file"),
            });
        }
        match links::follow(path).map_err(fail)? {
            Led::Descriptor(number) => Self::descriptor(path, number),
            Led::OfAnother(link) => {
                let file = File::options().append(true).open(link).map_err(fail)?;
                Ok(Self::Stream { file, name: format!("{path:?}") })
            }
            Led::Strangers(link) => Err(strangers(path, &link)),
            Led::Path(end) => match fs::symlink_metadata(&end) {
                Ok(found) if found.is_file() => Self::over(path, end, &found),
                Ok(found) => Self::stream(path, &end, &found),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Self::beside(path, end),
                Err(error) => Err(fail(error)),
            },
        }
    }

    /// Standard output.
    pub(crate) fn stdout() -> Result<Self> {
        Ok(Self::Stream { file: standard::output()?, name: "standard output".into() })
    }

    /// An open descriptor: its own place and append mode, which opening its file once more would not have.
    fn descriptor(path: &Path, number: i32) -> Result<Self> {
        let name = format!("{path:?}");
        let file = match number {
            1 => standard::output()?,
            _ => keymill::standard::duplicate(number)
                .map_err(|error| Failure::file("cannot write", path, &error))?
                .into(),
        };
        standard::must_be_open_for(Direction::Out, &file, &name)?;
        Ok(Self::Stream { file, name })
    }

    /// What is there and is no regular file.
    fn stream(path: &Path, end: &Path, found: &Metadata) -> Result<Self> {
        let fail = |error: io::Error| Failure::file("cannot write", path, &error);
        let kind = found.file_type();
        if kind.is_dir() {
            return Err(is_directory(path));
        }
        if kind.is_socket() || kind.is_block_device() {
            let what = if kind.is_socket() { "a socket" } else { "a block device" };
            return Err(Failure::refused(
                format!("--out {path:?} is {what}, which rows are not written to"),
                "name a file, or lead standard output to a program that writes there",
            ));
        }
        if is_strangers(found, &fs::metadata(directory_of(end)).map_err(fail)?) {
            return Err(strangers(path, end));
        }
        let name = format!("{path:?}");
        if !kind.is_fifo() {
            let file = File::options().write(true).open(end).map_err(fail)?;
            return Ok(Self::Stream { file, name });
        }
        // Opened without waiting, so that what is waited for can be told, and an interruption is heeded.
        let mut told = 0;
        loop {
            let opened = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(end);
            match opened {
                Ok(file) => return Ok(Self::Stream { file, name }),
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NXIO) => {}
                Err(error) => return Err(fail(error)),
            }
            interrupt::check()?;
            told += 1;
            if told == 20 {
                say(format_args!("waiting for a program that reads the FIFO {path:?}"));
            }
            thread::sleep(LOOK_FOR_READER);
        }
    }

    /// A regular file that is to be replaced. What would keep it from that is found out here and not by the rename,
    /// which comes after all the work.
    fn over(path: &Path, end: PathBuf, found: &Metadata) -> Result<Self> {
        let directory = fs::metadata(directory_of(&end))
            .map_err(|error| Failure::file("cannot write", path, &error))?;
        let user = rustix::process::geteuid();
        let mine = [found.uid(), directory.uid()].contains(&user.as_raw());
        if directory.mode() & 0o1000 != 0 && !mine && !user.is_root() {
            return Err(Failure::refused(
                format!("--out {path:?} belongs to somebody else, in a directory of others"),
                "name another file",
            ));
        }
        if found.mode() & 0o222 == 0 || access(&end, Access::WRITE_OK) == Err(Errno::ACCESS) {
            return Err(Failure::refused(
                format!("--out {path:?} is read-only"),
                "name another file, or make it writable or remove it first",
            ));
        }
        if is_mount_point(&end) {
            return Ok(Self::InPlace(InPlace::open(path, &end)?));
        }
        Self::beside(path, end)
    }

    fn beside(path: &Path, end: PathBuf) -> Result<Self> {
        let unfinished = passing_file(&end)
            // Without the name of the passing file, which says nothing to a reader.
            .map_err(|error| Failure::file("cannot write", path, &error.kind().into()))?;
        interrupt::watch(Unfinished::Beside(unfinished.path().to_owned()));
        Ok(Self::Beside { unfinished, path: end })
    }

    /// Whether rows appear on a terminal.
    pub(crate) fn is_terminal(&self) -> bool {
        match self {
            Self::Stream { file, .. } => file.is_terminal(),
            Self::InPlace(_) | Self::Beside { .. } => false,
        }
    }

    /// Writes whole rows.
    pub(crate) fn write(&mut self, rows: &[u8]) -> Result<()> {
        match self {
            Self::Stream { file, name } => {
                standard::write_all(file, rows).map_err(|error| Failure::output(name, &error))
            }
            Self::InPlace(file) => file.write(rows),
            Self::Beside { unfinished, path } => unfinished
                .write_all(rows)
                .map_err(|error| Failure::file("cannot write", path, &error)),
        }
    }

    /// Completes the output. Dropped without this, a file is removed, and a mount point is empty.
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Stream { .. } => Ok(()),
            Self::InPlace(file) => file.finish(),
            Self::Beside { unfinished, path } => {
                let fail = |error: &io::Error| Failure::file("cannot complete", &path, error);
                synchronise(unfinished.as_file()).map_err(|error| fail(&error))?;
                interrupt::complete(|| {
                    unfinished.persist(&path).map_err(|error| fail(&error.error))
                })?;
                synchronise_directory_of(&path);
                Ok(())
            }
        }
    }
}

/// A file that is a mount point, as `docker run -v ./keys.jsonl:/keys.jsonl` makes it. What it held is kept until the
/// first row; if the run does not end, it is empty: part of the rows would look like all.
pub(crate) struct InPlace {
    file: File,
    path: PathBuf,
    begun: bool,
    done: bool,
}

impl InPlace {
    fn open(path: &Path, end: &Path) -> Result<Self> {
        let fail = |error: io::Error| Failure::file("cannot write", path, &error);
        let file = File::options().write(true).open(end).map_err(fail)?;
        let mode = file.metadata().map_err(fail)?.mode();
        let private =
            mode & 0o077 == 0 || file.set_permissions(PermissionsExt::from_mode(0o600)).is_ok();
        warn(format_args!(
            "--out {path:?} is a mount point, over which nothing can be renamed: rows are written \
             into it as they come{}",
            if private { "" } else { ", and others than its owner may access it" },
        ));
        interrupt::watch(Unfinished::InPlace(file.try_clone().map_err(fail)?));
        Ok(Self { file, path: path.to_owned(), begun: false, done: false })
    }

    fn write(&mut self, rows: &[u8]) -> Result<()> {
        self.begin()
            .and_then(|()| standard::write_all(&self.file, rows))
            .map_err(|error| Failure::file("cannot write", &self.path, &error))
    }

    fn begin(&mut self) -> io::Result<()> {
        if !self.begun {
            self.file.set_len(0)?;
            self.begun = true;
            interrupt::begun();
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        let done = self.begin().and_then(|()| synchronise(&self.file));
        done.map_err(|error| Failure::file("cannot complete", &self.path, &error))?;
        self.done = true;
        interrupt::complete(|| Ok(()))
    }
}

impl Drop for InPlace {
    fn drop(&mut self) {
        if self.begun && !self.done {
            let _ = self.file.set_len(0);
        }
    }
}

fn is_directory(path: &Path) -> Failure {
    Failure::refused(
        format!("--out {path:?} is a directory"),
        "name a file in it, or `-` for standard output",
    )
}

fn strangers(path: &Path, link: &Path) -> Failure {
    Failure::refused(
        format!(
            "--out {path:?} leads through {link:?}, which somebody else has put where everybody may"
        ),
        "name a file in a directory of your own",
    )
}

/// Whether nothing can be renamed over `path`. Where the kernel does not tell (before Linux 5.8), the rename will.
#[cfg(target_os = "linux")]
fn is_mount_point(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

    statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .is_ok_and(|about| about.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(not(target_os = "linux"))]
fn is_mount_point(_: &Path) -> bool {
    false
}
