//! The audit log: one JSON line for each request, without a byte of any key, and one for each thing that the server did
//! by itself.
//!
//! A request reserves its place in the queue before its key work begins, so that there is none whose record finds no
//! room. A thread writes; by default records are on disk (`fdatasync`) within a second, which is what a crash of the
//! machine can lose, and with `sync` an answer waits for that. When the log cannot be written, as on a full disk,
//! records are kept, nothing new is let in, and the thread tries until it can.
//!
//! Refusals before authentication can be had for nothing, and would fill the disk: of those, so many a second are
//! recorded, and the rest is counted in the next record.
//!
//! This file has the queue, `writer` the thread, `sink` what is written to, `place` what a path leads to.

mod place;
mod sink;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use serde::Serialize;
use serde_json::{Map, Value, ser::Formatter};
use tokio::sync::oneshot;

pub(super) use place::Taboo;

use super::refusal::Refusal;
use crate::limits::{AUDIT_END_TIME, AUDIT_LOCK_TIME, AUDIT_QUEUE_MAX, AUDIT_REFUSALS_PER_SECOND};
use sink::Sink;
use writer::{NO_SYNC, Writer};

/// Where and how the audit log is written.
#[derive(Clone, Debug)]
pub struct AuditConfig {
    /// The file: made with mode 0600 if it is not there, appended to, locked, and never cut. A FIFO, a terminal or an
    /// open descriptor such as `/dev/stdout` is written as a stream, without locks, `sync` and rotation.
    pub path: PathBuf,
    /// Whether an answer waits until its record is on disk.
    pub sync: bool,
    /// Size at which the file is renamed, with the time behind its name, and begun anew. Old files are never removed.
    /// Where it cannot be renamed it grows on.
    pub max_bytes: u64,
}

/// The line of a request.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    /// RFC 3339, UTC.
    pub(super) time: String,
    pub(super) request_id: String,
    /// Who has signed, or claims to. Empty if that is no client's id: strangers write no text of theirs here.
    pub(super) client_id: String,
    pub(super) authenticated: bool,
    pub(super) remote: String,
    pub(super) operation: &'static str,
    pub(super) status: u16,
    /// Items by code. A single operation has one item.
    pub(super) codes: BTreeMap<&'static str, u64>,
    /// Items by the id of the key that was used.
    pub(super) keys: BTreeMap<String, u64>,
    /// Some of the keys that were asked for and refused, as they were named.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub(super) requested: BTreeSet<String>,
    pub(super) duration_us: u64,
    /// Refusals before authentication that were not recorded since the last one that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) refusals_skipped: Option<u64>,
}

/// The line of what a server does by itself.
#[derive(Debug, Serialize)]
pub(super) struct Event {
    time: String,
    operation: &'static str,
    /// Who does it.
    by: &'static str,
    #[serde(flatten)]
    facts: Map<String, Value>,
}

impl Event {
    pub(super) fn new(operation: &'static str, by: &'static str) -> Self {
        Self { time: time_now(), operation, by, facts: Map::new() }
    }

    /// The same, of that time.
    pub(super) fn at(mut self, time: SystemTime) -> Self {
        self.time = time_text(time);
        self
    }

    /// The same, with one more member.
    pub(super) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Line {
    Request(Record),
    Event(Event),
}

impl Line {
    /// Appends itself and a newline.
    fn write(&self, lines: &mut Vec<u8>) {
        let mut to = serde_json::Serializer::with_formatter(&mut *lines, Ascii);
        self.serialize(&mut to).expect("a record is plain JSON");
        lines.push(b'\n');
    }
}

/// JSON in ASCII: whatever a text is, it commands no terminal that shows the log.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // Of ASCII, serde_json has escaped all but this one.
        if fragment.bytes().all(|byte| byte.is_ascii() && byte != 0x7f) {
            return writer.write_all(fragment.as_bytes());
        }
        for char in fragment.chars() {
            if char.is_ascii() && char != '\x7f' {
                writer.write_all(&[char as u8])?;
                continue;
            }
            for unit in char.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

/// The time now, as records have it.
pub(super) fn time_now() -> String {
    time_text(SystemTime::now())
}

pub(super) fn time_text(time: SystemTime) -> String {
    humantime::format_rfc3339_micros(time).to_string()
}

/// The audit log of a server, which may have none.
pub(super) struct Audit(Option<Arc<Log>>);

struct Log {
    path: PathBuf,
    sync: bool,
    queue: Mutex<Option<Sender<Entry>>>,
    /// Places taken: reserved, queued, or written and not yet on disk.
    taken: AtomicUsize,
    failing: AtomicBool,
    reopen: AtomicBool,
    /// Times that the file was gone from its place, or cut.
    reopened: AtomicU64,
    /// Records of requests that were ended in the midst of their work.
    ended: AtomicU64,
    /// Records that were not written when the log was closed.
    lost: AtomicU64,
    refusals: Mutex<Refusals>,
    /// Closed by the thread when it ends.
    writer: Mutex<Option<Receiver<()>>>,
}

/// Refusals before authentication of the present second.
struct Refusals {
    since: Instant,
    recorded: u32,
    skipped: u64,
}

struct Entry {
    line: Line,
    written: Option<oneshot::Sender<bool>>,
}

/// A place in the queue. Given back when dropped without a record, which is then counted as lost: its request was ended
/// in the midst of its work.
pub(super) struct Slot(Option<Arc<Log>>);

/// Tells whether a record is on disk, if that is to be waited for.
pub(super) struct Written(Option<oneshot::Receiver<bool>>);

impl Written {
    /// Waits until the record is on disk. `false` if it cannot be written now.
    pub(super) async fn wait(self) -> bool {
        match self.0 {
            Some(written) => written.await.unwrap_or(false),
            None => true,
        }
    }
}

impl Slot {
    pub(super) fn fill(mut self, record: Record) -> Written {
        let Some(log) = self.0.take() else { return Written(None) };
        let line = Line::Request(record);
        let (written, wait) = match log.sync {
            true => oneshot::channel(),
            false => return log.send(Entry { line, written: None }, Written(None)),
        };
        log.send(Entry { line, written: Some(written) }, Written(Some(wait)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(log) = self.0.take() {
            log.ended.fetch_add(1, Ordering::AcqRel);
            log.taken.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Log {
    /// Queues an entry, whose place is taken.
    fn send(&self, entry: Entry, wait: Written) -> Written {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        match &*queue {
            Some(queue) => drop(queue.send(entry)),
            // Closed: whoever waits is told by the end of the channel.
            None => drop(entry),
        }
        wait
    }
}

impl Audit {
    /// No audit log.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Opens the log, writes `first` into it, so that what cannot be written is told now and not at the first request,
    /// and starts the thread.
    ///
    /// # Errors
    /// Of the file, with its name.
    pub(super) fn open(config: &AuditConfig, taboo: Taboo, first: Event) -> io::Result<Self> {
        Self::try_open(config, taboo, first).map_err(|error| {
            let path = &config.path;
            io::Error::new(
                error.kind(),
                format!("the audit log {path:?} cannot be written: {error}"),
            )
        })
    }

    fn try_open(config: &AuditConfig, taboo: Taboo, first: Event) -> io::Result<Self> {
        let mut sink = Sink::open(&config.path, &taboo, AUDIT_LOCK_TIME)?;
        if config.sync && !sink.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, NO_SYNC));
        }
        let mut line = Vec::new();
        Line::Event(first).write(&mut line);
        sink.append(&line).result?;
        sink.sync()?;
        let (queue, entries) = unbounded();
        let (ended, writer) = bounded(0);
        let log = Arc::new(Log {
            path: config.path.clone(),
            sync: config.sync,
            queue: Mutex::new(Some(queue)),
            taken: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            reopen: AtomicBool::new(false),
            reopened: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            refusals: Mutex::new(Refusals { since: Instant::now(), recorded: 0, skipped: 0 }),
            writer: Mutex::new(Some(writer)),
        });
        let writer = Writer::new(Arc::clone(&log), config.clone(), taboo, sink);
        let run = move || {
            let _ended: Sender<()> = ended;
            writer.run(&entries);
        };
        thread::Builder::new().name("keymill-audit".into()).spawn(run)?;
        Ok(Self(Some(log)))
    }

    /// Whether there is none.
    pub(super) fn is_off(&self) -> bool {
        self.0.is_none()
    }

    /// Whether the file cannot be written.
    pub(super) fn is_failing(&self) -> bool {
        self.0.as_ref().is_some_and(|log| log.failing.load(Ordering::Acquire))
    }

    /// Reserves the place of a request's record.
    ///
    /// # Errors
    /// `ServiceUnavailableTemporary` while the file cannot be written, or the writer is too far behind.
    pub(super) fn reserve(&self) -> Result<Slot, Refusal> {
        let Some(log) = &self.0 else { return Ok(Slot(None)) };
        if log.failing.load(Ordering::Acquire) {
            return Err(Refusal::unavailable());
        }
        let room = |taken| (taken < AUDIT_QUEUE_MAX).then_some(taken + 1);
        match log.taken.fetch_update(Ordering::AcqRel, Ordering::Relaxed, room) {
            Ok(_) => Ok(Slot(Some(Arc::clone(log)))),
            Err(_) => Err(Refusal::unavailable()),
        }
    }

    /// Records a request that was refused before a place was reserved for it, if there is room and it is not one of too
    /// many. Returns whether it was.
    pub(super) fn record_refusal(&self, record: impl FnOnce(Option<u64>) -> Record) -> bool {
        let Some(log) = &self.0 else { return true };
        let skipped = {
            let mut refusals = log.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            if refusals.since.elapsed() >= Duration::from_secs(1) {
                (refusals.since, refusals.recorded) = (Instant::now(), 0);
            }
            let Some(slot) = Some(())
                .filter(|()| refusals.recorded < AUDIT_REFUSALS_PER_SECOND)
                .and_then(|()| self.reserve().ok())
            else {
                refusals.skipped += 1;
                return false;
            };
            refusals.recorded += 1;
            let skipped = std::mem::take(&mut refusals.skipped);
            (slot, (skipped > 0).then_some(skipped))
        };
        let (slot, skipped) = skipped;
        drop(slot.fill(record(skipped)));
        true
    }

    /// Opens the file by its name again, which somebody may have given to another one.
    pub(super) fn reopen(&self) {
        if let Some(log) = &self.0 {
            log.reopen.store(true, Ordering::Release);
        }
    }

    /// Times that the file was gone from its place, or cut by another program.
    pub(super) fn reopened(&self) -> u64 {
        self.0.as_ref().map_or(0, |log| log.reopened.load(Ordering::Relaxed))
    }

    /// Records what the server did by itself. Nothing can refuse that it has a place.
    pub(super) fn tell(&self, event: Event) {
        if let Some(log) = &self.0 {
            log.taken.fetch_add(1, Ordering::AcqRel);
            log.send(Entry { line: Line::Event(event), written: None }, Written(None));
        }
    }

    /// Writes what is queued, and ends, in bounded time. Returns the number of records that are lost.
    pub(super) fn close(&self) -> u64 {
        /// A disk that does not answer is not waited for any longer.
        const GRACE: Duration = Duration::from_secs(1);
        let Some(log) = &self.0 else { return 0 };
        drop(log.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        let writer = log.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(writer) = writer else { return self.lost() };
        // Nothing is ever sent.
        let _ = writer.recv_timeout(AUDIT_END_TIME + GRACE);
        let lost = log.taken.load(Ordering::Acquire) as u64 + log.ended.load(Ordering::Acquire);
        log.lost.store(lost, Ordering::Release);
        if lost > 0 {
            tracing::error!(path = ?log.path, lost, "records of the audit log are lost");
        }
        lost
    }

    /// Records that were lost when the log was closed.
    pub(super) fn lost(&self) -> u64 {
        self.0.as_ref().map_or(0, |log| log.lost.load(Ordering::Acquire))
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.close();
    }
}
