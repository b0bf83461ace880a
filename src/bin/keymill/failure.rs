//! Why a command ends early: the exit code, a sentence that names the value, and a hint at what to do next.
//!
//! The library says what went wrong; hints and exit codes are decided here.

use std::{fmt::Display, io, path::Path, process::ExitCode};

use keymill::{Error, ErrorKind, Fault};

use crate::{print::printable, standard};

/// Alias of `std::result::Result` with a [`Failure`].
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// The end of a command that could not do all it was asked for.
#[derive(Debug)]
pub(crate) struct Failure {
    status: Status,
    message: String,
    hint: String,
}

/// Which of the exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Status {
    /// 0, and no message: whoever read the output has had enough of it, as in `keymill key list | head -1`.
    ReaderGone,
    /// 1: wrong arguments, or at least one refused item.
    Refused,
    /// 2: the key store, a file or the machine failed.
    Broke,
}

impl Status {
    /// The status of a command that ends with `error`.
    pub(crate) fn of(error: &Error) -> Self {
        match error.fault() {
            Fault::Caller | Fault::Key => Self::Refused,
            _ => Self::Broke,
        }
    }
}

impl Failure {
    pub(crate) fn new(status: Status, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status, message: message.into(), hint: hint.into() }
    }

    pub(crate) fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(Status::Refused, message, hint)
    }

    pub(crate) fn broke(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(Status::Broke, message, hint)
    }

    /// A file that cannot be used. `what` is the attempt, such as `cannot read`.
    pub(crate) fn file(what: &str, path: &Path, error: &io::Error) -> Self {
        Self::broke(format!("{what} {path:?}: {error}"), io_hint(error))
    }

    /// A failed write to standard output, or to another stream of this name.
    pub(crate) fn output(name: &str, error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::new(Status::ReaderGone, "", "");
        }
        Self::broke(format!("cannot write to {name}: {error}"), io_hint(error))
    }

    /// Prints the message and returns the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if self.status != Status::ReaderGone {
            say(&self.message);
            to_stderr(&format!("hint: {}\n", self.hint));
        }
        match self.status {
            Status::ReaderGone => ExitCode::SUCCESS,
            Status::Refused => ExitCode::from(1),
            Status::Broke => ExitCode::from(2),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(Status::of(&error), error.to_string(), hint(error.kind()))
    }
}

/// Prints one line about this program to standard error. (`eprintln!` panics when standard error is closed.)
pub(crate) fn say(message: impl Display) {
    to_stderr(&format!("keymill: {message}\n"));
}

/// Writes whole lines to standard error, or to the log of a server, which waits for nobody. Whatever a message quotes
/// (arguments, variables, paths, what a file holds), the terminal gets no command from it.
fn to_stderr(lines: &str) {
    let lines = &lines.split('\n').map(printable).collect::<Vec<_>>().join("\n");
    #[cfg(feature = "server")]
    if crate::logs::take(lines) {
        return;
    }
    // Standard error may be closed; the exit code still says what happened.
    standard::tell(lines);
}

/// `text` in quotes, with control characters escaped, cut to a length that fits a message.
pub(crate) fn quoted(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{:?} (cut)", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// What to do next about an error of the library.
pub(crate) fn hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidParameter => "correct the value; `--help` says what is allowed",
        ErrorKind::KeyNotFound => {
            "`keymill key list` shows the keys; `keymill key create --alias alias/NAME` makes one, \
             and so does `keymill generate --key alias/NAME --create`"
        }
        ErrorKind::AliasNotFound => {
            "`keymill alias list` shows the aliases; `keymill alias create` makes one"
        }
        ErrorKind::AliasAlreadyExists => {
            "choose another alias, or point this one elsewhere with `keymill alias update`"
        }
        ErrorKind::Disabled => "`keymill key enable KEY` enables the key again",
        ErrorKind::PendingDeletion => {
            "`keymill key cancel-deletion KEY` brings the key back while there is time"
        }
        ErrorKind::StateModifiedFailed => "`keymill key show KEY` shows the key's state",
        ErrorKind::LimitExceeded => {
            "a direct key wraps 2^32 data keys per version: `keymill key rotate KEY` and then \
             `generate --advance`, or a new key"
        }
        ErrorKind::ClientNotFound => {
            "`keymill client list` shows the clients; `keymill client create` makes one"
        }
        ErrorKind::UnsupportedOperation => "`keymill key show KEY` shows what kind of key it is",
        ErrorKind::InvalidKeyMaterial => {
            "material is 16, 24 or 32 raw bytes, not hex or base64 text, and new to this store"
        }
        ErrorKind::DecryptFailed => {
            "KeyId, Iv, CiphertextBlob and Aad must be exactly what `generate` wrote, and the key \
             store the same"
        }
        ErrorKind::WrongRootKey => {
            "put back the root.key that was made with this keys.db, or choose another --home"
        }
        ErrorKind::StoreCorrupt => {
            "make sure that --home is the directory you mean; do what the message says, or else \
             stop what uses the store, restore keys.db from a backup and run `keymill mend`"
        }
        ErrorKind::StoreMissing => {
            "`keymill init` makes a key store; --home DIR or KEYMILL_HOME choose another place"
        }
        ErrorKind::StoreUnavailable => {
            "check the free disk space, and owner and mode of keys.db and its directory; if \
             another program holds the store, try again"
        }
        _ => "check memory, disk space and permissions of this machine, then try again",
    }
}

fn io_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "check the path; the directory must exist",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "check the permissions, or choose another place"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some disk space, or choose another place"
        }
        io::ErrorKind::InvalidFilename => {
            "the path, or a name in it, is longer than the system allows: choose a shorter one"
        }
        io::ErrorKind::FileTooLarge => {
            "a limit of the file system, or of this process (`ulimit -f`), was met"
        }
        io::ErrorKind::IsADirectory => "name a file, not a directory",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "a file lies where a directory should be; choose another place"
        }
        _ => "check the path and the disk, then try again",
    }
}
