//! Standard input, output and error as bare descriptors, and how any descriptor is read and written.
//!
//! Not the standard library's own streams: their buffers would keep a copy of the rows that passed, they take a closed
//! or a wrongly opened descriptor for an end or a success, and whoever else holds a descriptor may have made it
//! non-blocking, which is no error. Messages are the exception from every rule: what cannot be told is not told, and
//! changes nothing.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use keymill::standard::was_closed_at_start;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl},
    io::Errno,
};

use crate::failure::{Failure, Result};

/// How long a message waits for a reader of standard error that reads nothing.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most bytes of a write to standard error: what POSIX lets a pipe take without blocking once it is ready.
const MESSAGE_LEN_MAX: usize = 512;

static MUTE: AtomicBool = AtomicBool::new(false);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    In,
    Out,
}

/// Standard input.
pub(crate) fn input() -> Result<File> {
    let closed = was_closed_at_start(0);
    let found = io::stdin().as_fd().try_clone_to_owned();
    stream("standard input", Direction::In, closed, found)
}

/// Standard output.
pub(crate) fn output() -> Result<File> {
    let closed = was_closed_at_start(1);
    let found = io::stdout().as_fd().try_clone_to_owned();
    stream("standard output", Direction::Out, closed, found)
}

fn stream(
    name: &str,
    direction: Direction,
    closed: bool,
    found: io::Result<OwnedFd>,
) -> Result<File> {
    if closed {
        return Err(Failure::broke(
            format!("{name} is closed"),
            "lead it to a file or another program, or to /dev/null",
        ));
    }
    let found = found.map_err(|error| {
        Failure::broke(format!("cannot use {name}: {error}"), "raise the limit of open files")
    })?;
    must_be_open_for(direction, &found, name)?;
    Ok(found.into())
}

/// Refuses a descriptor that was opened for the other direction, which the first read or write would find out.
pub(crate) fn must_be_open_for(direction: Direction, file: &impl AsFd, name: &str) -> Result<()> {
    let mode = fcntl_getfl(file).map_or(OFlags::RDWR, |flags| flags & OFlags::ACCMODE);
    let why = match (direction, mode) {
        (Direction::In, OFlags::WRONLY) => "for writing only",
        (Direction::Out, OFlags::RDONLY) => "for reading only",
        _ => return Ok(()),
    };
    Err(Failure::broke(
        format!("{name} is open {why}"),
        "open it the other way round, as in `<FILE` for input and `>FILE` for output",
    ))
}

/// Writes all of `bytes`, waiting where the descriptor does not.
pub(crate) fn write_all(mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) => wait_after(error, file.as_fd(), PollFlags::OUT)?,
        }
    }
    Ok(())
}

/// Reads once, waiting where the descriptor does not. No bytes are the end.
pub(crate) fn read(mut file: &File, out: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(out) {
            Ok(read) => return Ok(read),
            Err(error) => wait_after(error, file.as_fd(), PollFlags::IN)?,
        }
    }
}

/// Waits, if `error` says that there is something to wait for. A signal that ends the run does so from its own thread.
fn wait_after(error: io::Error, file: BorrowedFd<'_>, ready: PollFlags) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => match poll(&mut [PollFd::new(&file, ready)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        },
        _ => Err(error),
    }
}

/// Says nothing from here on: standard error leads where a message would do harm.
pub(crate) fn mute() {
    MUTE.store(true, Ordering::Relaxed);
}

/// Writes a message to standard error, if it is there, and if somebody reads it in time.
pub(crate) fn tell(message: &str) {
    tell_within(message.as_bytes(), PATIENCE);
}

/// Writes what standard error takes at once, and nothing more. Returns whether that was all.
#[cfg(feature = "server")]
pub(crate) fn tell_at_once(message: &[u8]) -> bool {
    tell_within(message, Duration::ZERO)
}

/// Returns whether all was written.
fn tell_within(message: &[u8], patience: Duration) -> bool {
    if MUTE.load(Ordering::Relaxed) {
        return true;
    }
    let stderr = io::stderr();
    let mut last = Instant::now();
    let mut rest = message;
    while !rest.is_empty() {
        let left = patience.saturating_sub(last.elapsed());
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], timeout.as_ref()) {
            Ok(1..) => {}
            Err(Errno::INTR) if !left.is_zero() => continue,
            _ => return false,
        }
        match rustix::io::write(&stderr, &rest[..rest.len().min(MESSAGE_LEN_MAX)]) {
            Ok(0) => return false,
            Ok(written) => {
                rest = &rest[written..];
                last = Instant::now();
            }
            Err(Errno::INTR | Errno::AGAIN) if !left.is_zero() => {}
            Err(_) => return false,
        }
    }
    true
}
