//! Ctrl-C, SIGTERM and SIGHUP during a streaming command: stop, leave no unfinished file, say so, exit 2.
//!
//! The flag stops a run at its next window, so that it ends in order and returns its leases. A run that is blocked
//! (standard input from a terminal, a pipe that nobody reads) never gets there: after a short while the handler's
//! thread removes the unfinished file and ends the process itself.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use keymill::ErrorKind;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
    iterator::Signals,
};

use crate::failure::{Failure, Result, hint};

/// How long a run may take to come to its next window.
const GRACE: Duration = Duration::from_millis(500);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// The same, of a process that got no thread to wait for signals.
static MARKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
/// The unfinished files. Held while they are being renamed, so that the handler removes them before or never.
static UNFINISHED: Mutex<Vec<Unfinished>> = Mutex::new(Vec::new());

/// A file that must not be taken for a complete one.
pub(crate) enum Unfinished {
    /// Under a passing name beside its place.
    Beside(PathBuf),
    /// In its place, and still as it was before this run.
    InPlace(File),
    /// In its place, with rows of this run.
    Begun(File),
}

/// Catches the signals from here on, save those that this process was told to ignore: SIGHUP by `nohup`, SIGINT by a
/// shell that started it in the background.
pub(crate) fn install() -> Result<()> {
    let ignored = ignored_signals();
    let caught = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| {
        // Bit n - 1 is signal n.
        ignored >> (signal - 1) & 1 == 0
    });
    let fail = |error: io::Error| {
        Failure::broke(format!("cannot catch signals: {error}"), hint(ErrorKind::Machine))
    };
    // Where a limit of a file's size is met, the write shall fail, and not end the process with the file left behind.
    flag::register(libc::SIGXFSZ, Arc::new(AtomicBool::new(false))).map_err(fail)?;
    let caught: Vec<_> = caught.collect();
    // The thread first: once signals are caught, somebody has to wait for them.
    let (sender, given) = mpsc::channel::<Signals>();
    let wait = move || {
        if let Ok(mut signals) = given.recv()
            && signals.forever().next().is_some()
        {
            interrupted();
        }
    };
    let name = "keymill-signals".into();
    if thread::Builder::new().name(name).spawn(wait).is_err() {
        return mark(&caught).map_err(fail);
    }
    // The thread has not ended: it waits for this.
    let _ = sender.send(Signals::new(&caught).map_err(fail)?);
    Ok(())
}

/// Without a thread: the first signal is marked, which the run sees between two pieces of work, and the second one ends
/// the process as if nobody had caught it.
fn mark(signals: &[i32]) -> io::Result<()> {
    let marked = MARKED.get_or_init(Arc::default);
    for signal in signals {
        flag::register_conditional_default(*signal, Arc::clone(marked))?;
        flag::register(*signal, Arc::clone(marked))?;
    }
    Ok(())
}

/// The mask of signals that are ignored. The standard library cannot ask for it; where there is no /proc, none is.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Ends the process if the run does not end in time by itself.
fn interrupted() -> ! {
    INTERRUPTED.store(true, Ordering::Relaxed);
    thread::sleep(GRACE);
    let mut unfinished = unfinished();
    for file in unfinished.drain(..) {
        let _ = match file {
            Unfinished::Beside(path) => fs::remove_file(path),
            Unfinished::Begun(file) => file.set_len(0),
            Unfinished::InPlace(_) => Ok(()),
        };
    }
    let _ = failure().report();
    // Still holding the lock: nothing is renamed between the removal and the end.
    process::exit(2);
}

/// Fails once a signal has come.
pub(crate) fn check() -> Result<()> {
    let is_marked = || MARKED.get().is_some_and(|marked| marked.load(Ordering::Relaxed));
    if INTERRUPTED.load(Ordering::Relaxed) || is_marked() {
        return Err(failure());
    }
    Ok(())
}

/// A file of this run, to be taken away when it is interrupted.
pub(crate) fn watch(file: Unfinished) {
    unfinished().push(file);
}

/// From here on, what is watched in its place has rows of this run.
pub(crate) fn begun() {
    for file in unfinished().iter_mut() {
        if let Unfinished::InPlace(open) = file
            && let Ok(open) = open.try_clone()
        {
            *file = Unfinished::Begun(open);
        }
    }
}

/// Runs `rename`, which completes the unfinished files, unless a signal has come.
pub(crate) fn complete<T>(rename: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut unfinished = unfinished();
    check()?;
    let done = rename()?;
    unfinished.clear();
    Ok(done)
}

fn unfinished() -> MutexGuard<'static, Vec<Unfinished>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure() -> Failure {
    Failure::broke(
        "interrupted; the output is incomplete, and no --out file was written",
        "run the command again",
    )
}
