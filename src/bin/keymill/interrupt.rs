//! Ctrl-C, SIGTERM and SIGHUP during a streaming command: stop, leave no unfinished file, say so, exit 2.
//!
//! The flag stops a run at its next window, so that it ends in order and returns its leases. A run that is blocked
//! (standard input from a terminal, a pipe that nobody reads) never gets there: after a short while the handler's thread
//! removes the unfinished file and ends the process itself.

use std::{
    fs, mem,
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use crate::failure::{Failure, Result, say};

/// How long a run may take to come to its next window.
const GRACE: Duration = Duration::from_millis(500);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// The unfinished file. Held while the file is being renamed, so that the handler removes it before or never.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Catches the signals from here on.
pub(crate) fn install() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            return;
        }
        thread::sleep(GRACE);
        let mut unfinished = unfinished();
        if let Some(path) = unfinished.take() {
            let _ = fs::remove_file(path);
        }
        say(MESSAGE);
        // Still holding the lock: nothing is renamed between the removal and the end.
        process::exit(2);
    })
    .map_err(|error| {
        Failure::broke(format!("cannot catch signals: {error}"), "try again, or report it")
    })
}

/// Fails once a signal has come.
pub(crate) fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(Failure::broke(MESSAGE, "run the command again"));
    }
    Ok(())
}

/// The unfinished file of this run, to be removed when it is interrupted.
pub(crate) fn watch(path: &Path) {
    *unfinished() = Some(path.to_owned());
}

/// Runs `rename`, which completes the unfinished file, unless a signal has come.
pub(crate) fn complete<T>(rename: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut unfinished = unfinished();
    check()?;
    let done = rename()?;
    mem::take(&mut *unfinished);
    Ok(done)
}

fn unfinished() -> MutexGuard<'static, Option<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

const MESSAGE: &str = "interrupted; the output is incomplete, and no --out file was left";
