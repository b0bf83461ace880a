//! The audit log: one JSON line for each request, in a file, without a byte of any key.
//!
//! A request reserves its place in the queue before its key work begins, so that there is none whose record finds no
//! room. A thread writes; by default records are on disk (`fdatasync`) within a second, which is what a crash of the
//! machine can lose, and with `sync` an answer waits for that. When the file cannot be written, as on a full disk,
//! records are kept, nothing new is let in, and the thread tries until it can.
//!
//! Refusals before authentication can be had for nothing, and would fill the disk: of those, so many a second are
//! recorded, and the rest is counted in the next record.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use serde::Serialize;
use tokio::sync::oneshot;

use super::refusal::Refusal;
use crate::limits::{AUDIT_QUEUE_MAX, AUDIT_REFUSALS_PER_SECOND, AUDIT_SYNC_INTERVAL};

/// Where and how the audit log is written.
#[derive(Clone, Debug)]
pub struct AuditConfig {
    /// The file. Made with mode 0600 if it is not there, and appended to.
    pub path: PathBuf,
    /// Whether an answer waits until its record is on disk.
    pub sync: bool,
    /// Size at which the file is renamed, with the time behind its name, and begun anew. Old files are never removed.
    pub max_bytes: u64,
}

/// One line.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    /// RFC 3339, UTC.
    pub(super) time: String,
    pub(super) request_id: String,
    /// Who has signed, or claims to.
    pub(super) client_id: String,
    pub(super) authenticated: bool,
    pub(super) remote: String,
    pub(super) operation: &'static str,
    pub(super) status: u16,
    /// Items by code. A single operation has one item.
    pub(super) codes: BTreeMap<&'static str, u64>,
    /// Items by the id of the key that was used.
    pub(super) keys: BTreeMap<String, u64>,
    pub(super) duration_us: u64,
    /// Refusals before authentication that were not recorded since the last one that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) refusals_skipped: Option<u64>,
}

/// The time now, as records have it.
pub(super) fn time_now() -> String {
    humantime::format_rfc3339_micros(SystemTime::now()).to_string()
}

/// The audit log of a server, which may have none.
pub(super) struct Audit(Option<Arc<Log>>);

struct Log {
    sync: bool,
    queue: Mutex<Option<Sender<Entry>>>,
    /// Places taken: reserved, queued, or written and not yet on disk.
    taken: AtomicUsize,
    failing: AtomicBool,
    reopen: AtomicBool,
    refusals: Mutex<Refusals>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// Refusals before authentication of the present second.
struct Refusals {
    since: Instant,
    recorded: u32,
    skipped: u64,
}

struct Entry {
    record: Record,
    written: Option<oneshot::Sender<bool>>,
}

/// A place in the queue. Given back when dropped without a record.
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
        let (written, wait) = match log.sync {
            true => oneshot::channel(),
            false => return log.send(Entry { record, written: None }, Written(None)),
        };
        log.send(Entry { record, written: Some(written) }, Written(Some(wait)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(log) = self.0.take() {
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

    /// Opens the file and starts the thread.
    pub(super) fn open(config: &AuditConfig) -> io::Result<Self> {
        let file = OpenFile::open(&config.path)?;
        let (queue, entries) = unbounded();
        let log = Arc::new(Log {
            sync: config.sync,
            queue: Mutex::new(Some(queue)),
            taken: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            reopen: AtomicBool::new(false),
            refusals: Mutex::new(Refusals { since: Instant::now(), recorded: 0, skipped: 0 }),
            writer: Mutex::new(None),
        });
        let writer = Writer {
            log: Arc::clone(&log),
            path: config.path.clone(),
            max_bytes: config.max_bytes,
            file: Some(file),
            pending: Vec::new(),
            waiting: Vec::new(),
            unsynced: 0,
            last_sync: Instant::now(),
        };
        let run = move || writer.run(&entries);
        let thread = thread::Builder::new().name("keymill-audit".into()).spawn(run)?;
        *log.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
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

    /// Writes what is queued, and ends.
    pub(super) fn close(&self) {
        let Some(log) = &self.0 else { return };
        drop(log.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        let writer = log.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            let _ = writer.join();
        }
    }
}

/// The file as it stands.
struct OpenFile {
    file: File,
    /// Up to here it holds whole lines.
    len: u64,
}

impl OpenFile {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { file, len })
    }

    /// Appends whole lines, or nothing.
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let written = self.file.write_all(lines);
        match written {
            Ok(()) => self.len += lines.len() as u64,
            // A part of a line may be there.
            Err(_) => self.file.set_len(self.len)?,
        }
        written
    }
}

/// The thread's part.
struct Writer {
    log: Arc<Log>,
    path: PathBuf,
    max_bytes: u64,
    /// `None` if it could not be opened again.
    file: Option<OpenFile>,
    /// Lines that are not in the file yet.
    pending: Vec<u8>,
    /// Who waits for them.
    waiting: Vec<oneshot::Sender<bool>>,
    /// Records that are not on disk yet; their places are taken.
    unsynced: usize,
    last_sync: Instant,
}

/// Most lines that are written at once.
const LINES_TOGETHER: usize = 1024;
/// How long to wait before a file that could not be written is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How often to look whether the file is to be opened again.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);

impl Writer {
    fn run(mut self, entries: &Receiver<Entry>) {
        loop {
            let failing = self.log.failing.load(Ordering::Acquire);
            let patience = match (failing, self.unsynced) {
                (true, _) => RETRY_INTERVAL,
                (false, 0) => IDLE_INTERVAL,
                _ => AUDIT_SYNC_INTERVAL.saturating_sub(self.last_sync.elapsed()),
            };
            let ended = match entries.recv_timeout(patience) {
                Ok(entry) => {
                    self.take(entry);
                    for entry in entries.try_iter().take(LINES_TOGETHER) {
                        self.take(entry);
                    }
                    false
                }
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => true,
            };
            let done = self.write(ended);
            self.tell(done);
            if ended {
                return;
            }
        }
    }

    fn take(&mut self, entry: Entry) {
        serde_json::to_writer(&mut self.pending, &entry.record).expect("a record is plain JSON");
        self.pending.push(b'\n');
        self.waiting.extend(entry.written);
        self.unsynced += 1;
    }

    /// Writes what is pending, and brings it to the disk if that is due.
    fn write(&mut self, ended: bool) -> bool {
        let written = self.write_lines().and_then(|()| {
            let due = self.log.sync || ended || self.last_sync.elapsed() >= AUDIT_SYNC_INTERVAL;
            if due && self.unsynced > 0 {
                if let Some(open) = &self.file {
                    open.file.sync_data()?;
                }
                self.log.taken.fetch_sub(std::mem::take(&mut self.unsynced), Ordering::AcqRel);
            }
            if due {
                self.last_sync = Instant::now();
            }
            Ok(())
        });
        let failed_before = self.log.failing.swap(written.is_err(), Ordering::AcqRel);
        let path = self.path.display();
        match (&written, failed_before) {
            (Err(error), false) => tracing::error!(
                %error, %path, "the audit log cannot be written; key operations are refused"
            ),
            (Ok(()), true) => tracing::info!(%path, "the audit log is written again"),
            _ => {}
        }
        written.is_ok()
    }

    fn write_lines(&mut self) -> io::Result<()> {
        if self.log.reopen.swap(false, Ordering::AcqRel)
            && let Some(open) = self.file.take()
        {
            open.file.sync_data()?;
        }
        let mut open = match self.file.take() {
            Some(open) => open,
            None => OpenFile::open(&self.path)?,
        };
        let full = open.len > 0 && open.len + self.pending.len() as u64 > self.max_bytes;
        if full && !self.pending.is_empty() {
            open.file.sync_data()?;
            self.rename()?;
            open = OpenFile::open(&self.path)?;
        }
        let appended = open.append(&self.pending);
        if appended.is_ok() {
            self.pending.clear();
        }
        self.file = Some(open);
        appended
    }

    /// Gives the full file a name of its own.
    fn rename(&self) -> io::Result<()> {
        let time = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{}", time.replace(':', "-")));
        std::fs::rename(&self.path, name)?;
        let directory = self.path.parent().filter(|parent| *parent != Path::new(""));
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn tell(&mut self, done: bool) {
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64) -> Record {
        Record {
            time: time_now(),
            request_id: format!("request {number}"),
            client_id: "KAAP.\n\"".into(),
            authenticated: true,
            remote: "127.0.0.1:1".into(),
            operation: "Decrypt",
            status: 200,
            codes: [("OK", 1)].into(),
            keys: [("key-a".into(), number)].into(),
            duration_us: 1,
            refusals_skipped: None,
        }
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn open(path: &Path, sync: bool, max_bytes: u64) -> Audit {
        Audit::open(&AuditConfig { path: path.to_owned(), sync, max_bytes }).unwrap()
    }

    #[test]
    fn records_are_lines_in_order_and_rotate_by_size() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("audit.jsonl");
        let audit = open(&path, false, 20_000);
        for number in 0..1000 {
            audit.reserve().unwrap().fill(record(number));
            if number % 50 == 0 {
                thread::sleep(Duration::from_millis(2));
            }
        }
        audit.close();
        let mut files: Vec<_> =
            std::fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        // The present file sorts first.
        files.rotate_left(1);
        assert!(files.len() > 5, "{files:?}");
        let all: Vec<_> = files.iter().flat_map(|file| lines(file)).collect();
        let numbers: Vec<_> = all.iter().map(|line| line["keys"]["key-a"].as_u64()).collect();
        assert_eq!(numbers, (0..1000).map(Some).collect::<Vec<_>>());
        assert_eq!(all[0]["client_id"], "KAAP.\n\"");
    }

    #[test]
    fn with_sync_a_record_is_there_when_its_answer_goes_out() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("audit.jsonl");
        let audit = open(&path, true, u64::MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for number in 0..20 {
            let written = audit.reserve().unwrap().fill(record(number));
            assert!(runtime.block_on(written.wait()));
            assert_eq!(lines(&path).len() as u64, number + 1);
        }
        audit.close();
    }

    /// `/dev/full` is a disk that is always full.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_stops_operations_and_loses_no_record() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("audit.jsonl");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let audit = open(&path, true, u64::MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(!runtime.block_on(audit.reserve().unwrap().fill(record(1)).wait()));
        assert!(audit.is_failing());
        assert_eq!(audit.reserve().err().map(|refusal| refusal.status), Some(503));
        std::fs::remove_file(&path).unwrap();
        audit.reopen();
        let deadline = Instant::now() + Duration::from_secs(10);
        while audit.is_failing() {
            assert!(Instant::now() < deadline, "not written again");
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(lines(&path).len(), 1);
        audit.close();
    }

    #[test]
    fn refusals_before_authentication_cannot_fill_the_disk() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("audit.jsonl");
        let audit = open(&path, false, u64::MAX);
        let refuse =
            || audit.record_refusal(|skipped| Record { refusals_skipped: skipped, ..record(0) });
        let recorded = (0..10_000).filter(|_| refuse()).count();
        assert!(recorded < 10_000 / 2, "{recorded}");
        thread::sleep(Duration::from_millis(1100));
        assert!(refuse());
        audit.close();
        let told: u64 =
            lines(&path).iter().filter_map(|line| line["refusals_skipped"].as_u64()).sum();
        assert_eq!(told + lines(&path).len() as u64, 10_001);
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let home = tempfile::tempdir().unwrap();
        let audit = open(&home.path().join("audit.jsonl"), false, u64::MAX);
        let slots: Vec<_> = (0..AUDIT_QUEUE_MAX).map(|_| audit.reserve().unwrap()).collect();
        assert!(audit.reserve().is_err());
        drop(slots);
        assert!(audit.reserve().is_ok());
        audit.close();
    }
}
