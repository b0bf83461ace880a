//! The thread that writes the audit log. Lines are kept until they are on disk in a file that is still in its place.
//!
//! So a file that is removed, replaced or cut takes no record with it that was made later: what it took is written
//! again into the next one. A record may then stand twice (its `request_id` tells), and never not at all.

use std::{
    io::{self, ErrorKind as Io},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use tokio::sync::oneshot;

use super::{
    AuditConfig, Entry, Line, Log,
    place::Taboo,
    sink::{Sink, Standing, whole_lines},
};
use crate::limits::{AUDIT_END_TIME, AUDIT_SYNC_INTERVAL};

/// The thread's part.
pub(super) struct Writer {
    log: Arc<Log>,
    config: AuditConfig,
    taboo: Taboo,
    /// `None` if it could not be opened again.
    sink: Option<Sink>,
    /// Lines that may have to be written, or written again. Each has a place.
    lines: Vec<u8>,
    /// Up to here they are written, if not yet on disk.
    written: usize,
    /// Whether what was written may have been lost: the disk refused it.
    is_doubtful: bool,
    /// Who waits for them.
    waiting: Vec<oneshot::Sender<bool>>,
    last_sync: Instant,
    last_look: Instant,
    /// When a rotation that failed is tried again.
    next_rotation: Instant,
    last_told: Option<Instant>,
}

/// Most lines that are written at once.
const LINES_TOGETHER: usize = 1024;
/// How long to wait before a file that could not be written is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// How often to look whether the file is in its place.
const LOOK_INTERVAL: Duration = Duration::from_millis(400);
/// How long to wait before a file that could not be renamed is tried again, and a failure told again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Times that a file is opened anew for one write: more often, somebody takes it away all the time.
const ATTEMPTS: usize = 4;
/// Memory that is kept for the next lines.
const BUFFER_KEPT: usize = 1 << 20;

impl Writer {
    pub(super) fn new(log: Arc<Log>, config: AuditConfig, taboo: Taboo, sink: Sink) -> Self {
        let now = Instant::now();
        Self {
            log,
            config,
            taboo,
            sink: Some(sink),
            lines: Vec::new(),
            written: 0,
            is_doubtful: false,
            waiting: Vec::new(),
            last_sync: now,
            last_look: now,
            next_rotation: now,
            last_told: None,
        }
    }

    pub(super) fn run(mut self, entries: &Receiver<Entry>) {
        loop {
            let failing = self.log.failing.load(Ordering::Acquire);
            let patience = match (failing, self.lines.is_empty()) {
                (true, _) => RETRY_INTERVAL,
                (false, true) => LOOK_INTERVAL,
                _ => AUDIT_SYNC_INTERVAL.saturating_sub(self.last_sync.elapsed()),
            };
            match entries.recv_timeout(patience.min(LOOK_INTERVAL)) {
                Ok(entry) => {
                    self.take(entry);
                    for entry in entries.try_iter().take(LINES_TOGETHER) {
                        self.take(entry);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let done = self.write(false);
            self.tell(done);
        }
        self.end();
    }

    /// Writes what is left, for a while, and that this is the end.
    fn end(mut self) {
        let deadline = Instant::now() + AUDIT_END_TIME;
        let mut done = self.write(true);
        while !done && Instant::now() < deadline {
            std::thread::sleep(RETRY_INTERVAL);
            done = self.write(true);
        }
        self.tell(done);
        if done && let Some(sink) = &mut self.sink {
            let mut line = Vec::new();
            Line::Event(super::Event::new("End", "server")).write(&mut line);
            let ended = sink.append(&line).result.and_then(|()| sink.sync());
            if let Err(error) = ended {
                let path = &self.config.path;
                tracing::warn!(?path, %error, "the audit log does not tell of the end");
            }
        }
    }

    fn take(&mut self, entry: Entry) {
        entry.line.write(&mut self.lines);
        self.waiting.extend(entry.written);
    }

    fn tell(&mut self, done: bool) {
        for waiting in self.waiting.drain(..) {
            let _ = waiting.send(done);
        }
    }

    /// Writes what is there, and brings it to the disk if that is due.
    fn write(&mut self, ended: bool) -> bool {
        let written = self.try_write(ended);
        let failed_before = self.log.failing.swap(written.is_err(), Ordering::AcqRel);
        let path = &self.config.path;
        match written {
            Err(error) => {
                if self.last_told.is_none_or(|told| told.elapsed() > PATIENCE) {
                    tracing::error!(
                        %error, ?path, "the audit log cannot be written; key operations are refused"
                    );
                    self.last_told = Some(Instant::now());
                }
                false
            }
            Ok(()) => {
                if failed_before {
                    tracing::info!(?path, "the audit log is written again");
                    self.last_told = None;
                }
                true
            }
        }
    }

    fn try_write(&mut self, ended: bool) -> io::Result<()> {
        for _ in 0..ATTEMPTS {
            self.look()?;
            self.rotate()?;
            self.append()?;
            let due = self.config.sync || ended || self.last_sync.elapsed() >= AUDIT_SYNC_INTERVAL;
            if !due {
                return Ok(());
            }
            if self.settle()? {
                self.last_sync = Instant::now();
                return Ok(());
            }
        }
        Err(io::Error::other("another program takes the file away all the time"))
    }

    /// Looks whether the file is in its place, and opens what is there now.
    fn look(&mut self) -> io::Result<()> {
        let asked = self.log.reopen.swap(false, Ordering::AcqRel);
        let failing = self.log.failing.load(Ordering::Acquire);
        if self.sink.is_some() && !asked && !failing && self.last_look.elapsed() < LOOK_INTERVAL {
            return Ok(());
        }
        self.last_look = Instant::now();
        let standing = self.sink.as_ref().map(|sink| sink.standing(&self.config.path));
        match standing {
            Some(Standing::Same) => Ok(()),
            Some(standing) => self.replace(standing, asked),
            None => self.open(),
        }
    }

    fn open(&mut self) -> io::Result<()> {
        let sink = Sink::open(&self.config.path, &self.taboo, Duration::ZERO)?;
        if self.config.sync && !sink.is_file() {
            return Err(io::Error::new(Io::InvalidInput, NO_SYNC));
        }
        self.sink = Some(sink);
        Ok(())
    }

    /// Leaves a file that is not in its place any more. What is lost with it is to be written again.
    fn replace(&mut self, standing: Standing, asked: bool) -> io::Result<()> {
        let kept = standing == Standing::Renamed
            && self.sink.as_ref().is_some_and(|sink| sink.sync().is_ok());
        if !kept {
            self.written = 0;
            self.is_doubtful = false;
        }
        let path = &self.config.path;
        self.log.reopened.fetch_add(1, Ordering::Relaxed);
        match standing {
            Standing::Cut => {
                tracing::warn!(
                    ?path,
                    "another program cut the audit log; the records of the last moment are \
                     written again"
                );
                if let Some(sink) = &mut self.sink {
                    sink.accept_cut();
                }
                return Ok(());
            }
            _ if asked => tracing::info!(?path, "the audit log is opened by its name again"),
            Standing::Removed => {
                tracing::warn!(?path, "the audit log was removed; a new one is begun");
            }
            _ => tracing::warn!(?path, "the audit log was renamed; a new one is begun"),
        }
        self.sink = None;
        self.open()
    }

    /// Gives a file that is full another name. If that cannot be, it grows on: no key depends on it.
    fn rotate(&mut self) -> io::Result<()> {
        let Some(sink) = &self.sink else { return Ok(()) };
        let more = self.lines.len() - self.written;
        if more == 0
            || Instant::now() < self.next_rotation
            || !sink.is_full(more, self.config.max_bytes)?
        {
            return Ok(());
        }
        // Whatever is settled is in its place, and whatever is not goes to the next file.
        if !self.settle()? {
            return Ok(());
        }
        let Some(sink) = &self.sink else { return Ok(()) };
        if let Err(error) = sink.rename() {
            self.next_rotation = Instant::now() + PATIENCE;
            tracing::warn!(
                path = ?self.config.path, %error,
                "the audit log is full and cannot be given another name; it grows on"
            );
            return Ok(());
        }
        self.sink = None;
        self.open()
    }

    fn append(&mut self) -> io::Result<()> {
        let Some(sink) = &mut self.sink else { return Err(Io::NotConnected.into()) };
        if self.is_doubtful {
            // The disk has to take something again before the same is written once more.
            sink.sync()?;
            self.written = 0;
            self.is_doubtful = false;
        }
        if self.written == self.lines.len() {
            return Ok(());
        }
        let appended = sink.append(&self.lines[self.written..]);
        self.written += appended.done;
        let goes_on = |error: &io::Error| error.kind() == Io::WouldBlock;
        if let Err(error) = &appended.result
            && !sink.is_file()
            && !goes_on(error)
        {
            // The next reader gets whole lines.
            self.written = whole_lines(&self.lines[..self.written]);
            self.sink = None;
        }
        appended.result
    }

    /// Lets go what is on disk and in its place. `false` if it is not, and has to be looked at again.
    fn settle(&mut self) -> io::Result<bool> {
        let Some(sink) = &self.sink else { return Ok(false) };
        if self.written == 0 {
            return Ok(true);
        }
        if let Err(error) = sink.sync() {
            // A second call may report success for pages that the first one lost.
            self.is_doubtful = true;
            return Err(error);
        }
        let standing = sink.standing(&self.config.path);
        if standing != Standing::Same {
            let asked = self.log.reopen.swap(false, Ordering::AcqRel);
            self.replace(standing, asked)?;
            return Ok(false);
        }
        let whole = whole_lines(&self.lines[..self.written]);
        let count = self.lines[..whole].iter().filter(|byte| **byte == b'\n').count();
        self.lines.drain(..whole);
        self.lines.shrink_to(BUFFER_KEPT);
        self.written -= whole;
        self.log.taken.fetch_sub(count, Ordering::AcqRel);
        Ok(true)
    }
}

/// Why a stream cannot be a log whose records are waited for.
pub(super) const NO_SYNC: &str = "records cannot be brought to a disk there, which answers are to \
                                  wait for; name a file, or do without sync";
