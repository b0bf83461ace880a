//! The log of `keymill serve`: lines go through a bounded queue to a thread of its own, so that nobody ever waits for
//! standard error. A pipe that nobody drains stops no worker and no signal; what finds no room is dropped and counted,
//! and the log says how much as soon as it is read again.
//!
//! Everything that goes to standard error takes this way while the server runs: events of `tracing`, panics, and what
//! the program says itself. Not `tracing-appender`: it panics where it gets no thread, tells nobody what it dropped,
//! and brings a library of calendars.

use std::{
    fs::File,
    io::{self, ErrorKind as Io, IsTerminal, Write},
    os::fd::AsFd,
    panic,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    fmt::MakeWriter,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::standard;

/// Lines that wait. A line has some hundred bytes.
const LINES_MAX: usize = 8192;
/// Longest line that is kept whole.
const LINE_LEN_MAX: usize = 16 << 10;
/// How long to wait for a descriptor that was made non-blocking by somebody who shares it.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// How long the end of the program waits for what is left.
const END_TIME: Duration = Duration::from_secs(1);

/// The queue, once there is one.
static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Lines on their way to standard error.
struct Queue {
    lines: SyncSender<Entry>,
    dropped: AtomicU64,
}

enum Entry {
    Line(Vec<u8>),
    /// Told when everything before it is written.
    Flush(SyncSender<()>),
}

impl Queue {
    fn push(&self, line: &[u8]) {
        let line = Entry::Line(line[..line.len().min(LINE_LEN_MAX)].to_vec());
        if self.lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// How much is logged, and how it is written.
pub(crate) struct Logs {
    pub(crate) level: LevelFilter,
    pub(crate) as_json: bool,
}

impl Logs {
    /// Sends events of this program, warnings of others, and panics to standard error from here on.
    pub(crate) fn start(&self) {
        let no_thread = start_thread().err();
        let others = self.level.min(LevelFilter::WARN);
        let targets = Targets::new().with_target("keymill", self.level).with_default(others);
        let colours = io::stderr().is_terminal();
        let layer = tracing_subscriber::fmt::layer().with_writer(ToQueue).with_ansi(colours);
        let layer = if self.as_json { layer.json().boxed() } else { layer.boxed() };
        // The only subscriber of the program.
        let _ = tracing_subscriber::registry().with(layer.with_filter(targets)).try_init();
        panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            let payload = panic.payload();
            let why = payload.downcast_ref::<&str>().copied();
            let why = why.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
            let why = why.unwrap_or("(no text)");
            tracing::error!(place, why, "panicked");
        }));
        if let Some(error) = no_thread {
            let why = "the log has no thread; what standard error does not take at once is dropped";
            tracing::warn!(%error, "{why}");
        }
    }
}

fn start_thread() -> io::Result<()> {
    // A descriptor of its own: the lock of `io::stderr` would be held while the pipe is full.
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let (lines, waiting) = sync_channel(LINES_MAX);
    thread::Builder::new().name("keymill-log".into()).spawn(move || write(stderr, &waiting))?;
    // Called once.
    let _ = QUEUE.set(Queue { lines, dropped: AtomicU64::new(0) });
    Ok(())
}

/// Queues a text for standard error if a server logs. `false` if none does.
pub(crate) fn take(text: &str) -> bool {
    QUEUE.get().map(|queue| queue.push(text.as_bytes())).is_some()
}

/// Waits until everything is written, for a moment at most: the end of the program depends on no reader.
pub(crate) fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let deadline = Instant::now() + END_TIME;
    let (done, wait) = sync_channel(1);
    let mut entry = Entry::Flush(done);
    while let Err(error) = queue.lines.try_send(entry) {
        let (std::sync::mpsc::TrySendError::Full(back)
        | std::sync::mpsc::TrySendError::Disconnected(back)) = error;
        if Instant::now() > deadline {
            return;
        }
        entry = back;
        thread::sleep(RETRY_INTERVAL);
    }
    let _ = wait.recv_timeout(deadline.saturating_duration_since(Instant::now()));
}

/// The thread's part.
fn write(mut to: File, lines: &Receiver<Entry>) {
    /// How often to look for drops when nothing is logged.
    const LOOK_INTERVAL: Duration = Duration::from_secs(1);
    loop {
        match lines.recv_timeout(LOOK_INTERVAL) {
            Ok(Entry::Line(line)) => write_line(&mut to, &line),
            Ok(Entry::Flush(done)) => drop(done.try_send(())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let dropped = QUEUE.get().map_or(0, |queue| queue.dropped.swap(0, Ordering::Relaxed));
        if dropped > 0 {
            // By the same way as every line: there is room for it now.
            tracing::error!(dropped, "lines of this log were dropped, since nobody read it");
        }
    }
}

fn write_line(to: &mut File, mut line: &[u8]) {
    while !line.is_empty() {
        match to.write(line) {
            Ok(0) => return,
            Ok(written) => line = &line[written..],
            Err(error) if error.kind() == Io::Interrupted => {}
            Err(error) if error.kind() == Io::WouldBlock => thread::sleep(RETRY_INTERVAL),
            // Its reader has gone, or the disk is full: there is nobody to tell.
            Err(_) => return,
        }
    }
}

/// What `tracing` writes to: each event is one write.
struct ToQueue;

impl Write for ToQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match QUEUE.get() {
            Some(queue) => queue.push(line),
            None => tell_at_once(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a line where there is no thread that could wait for a reader: so nobody does, and what is dropped is counted.
fn tell_at_once(line: &[u8]) {
    static DROPPED: AtomicU64 = AtomicU64::new(0);
    if !standard::tell_at_once(line) {
        DROPPED.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let dropped = DROPPED.swap(0, Ordering::Relaxed);
    if dropped > 0 {
        let told =
            format!("keymill: {dropped} lines of this log were dropped, since nobody read it\n");
        standard::tell_at_once(told.as_bytes());
    }
}

impl MakeWriter<'_> for ToQueue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}
