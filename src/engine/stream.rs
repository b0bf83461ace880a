//! A stream of data keys: windows in order, in bounded memory, while the next ones are being made.
//!
//! One thread makes windows and puts them into a short channel; whoever reads takes them out. Where the
//! system gives no thread, the reader makes each window when it asks for it. Each window is a batch
//! call of its own, which sees the key as it is then: one that is rotated, disabled or deleted meanwhile takes effect
//! with the next window that is made.

use std::{
    panic,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam::channel::{self, Receiver, TryRecvError};

use super::Engine;
use crate::{
    batch::result::DataKeyBatch,
    error::{Error, ErrorKind, Result},
    keys::KeyHandle,
    limits::{
        BLOB_LEN_MAX, IV_LEN, NUMBER_OF_BYTES_MAX, STREAM_WINDOW_BYTES, STREAM_WINDOW_ITEMS,
        STREAM_WINDOWS_AHEAD,
    },
    os::{self, Generation},
    request::{Operation, aads::AadSource, check_number_of_bytes},
};

/// Data keys of one key and one length, window by window. Made by [`Engine::stream_data_keys`].
///
/// An iterator of batches, in order, that together have as many items as were asked for. After an error there is
/// nothing more. A panic of the source of AADs goes on in whoever reads. Dropping a stream early ends the thread that
/// makes the windows, and waits for the one that is being made.
#[must_use]
pub struct DataKeyStream {
    made: Option<Source>,
    home: Generation,
}

/// Where the windows come from.
enum Source {
    Thread(Receiver<Result<DataKeyBatch>>, JoinHandle<()>),
    /// The reader's thread makes them, since the system gave none. A lock that is never taken: it lets the stream be
    /// shared.
    Reader(Mutex<Windows>),
}

/// Makes the next window, if there is one.
type Windows = Box<dyn FnMut() -> Option<Result<DataKeyBatch>> + Send>;

impl Engine {
    /// Generates `count` data keys of one length for one key, by any of the four operations, in windows of at most
    /// 16,384 keys and about 4 MiB. Any number of keys takes the memory of a few windows. `aads` is as in
    /// [`Engine::generate_data_keys`], and owned, since another thread reads it.
    ///
    /// ```
    /// use keymill::{CreateKey, Engine, NoAad, Operation};
    ///
    /// let engine = Engine::in_memory()?;
    /// engine.create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })?;
    /// let key = engine.key("alias/app")?;
    /// let operation = Operation::AdvanceGenerateDataKeyWithoutPlaintext;
    /// let mut count = 0;
    /// for window in engine.stream_data_keys(&key, operation, 32, 100_000, NoAad)? {
    ///     count += window?.len();
    /// }
    /// assert_eq!(count, 100_000);
    /// # Ok::<(), keymill::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidParameter` for a length outside its limits, `aads` that are fewer than `count`, a handle of another
    /// engine. What a window meets comes with the window.
    pub fn stream_data_keys(
        &self,
        key: &KeyHandle,
        operation: Operation,
        number_of_bytes: u32,
        count: u64,
        aads: impl AadSource + Send + 'static,
    ) -> Result<DataKeyStream> {
        key.of_engine(self.shared().number)?;
        let dek_len = check_number_of_bytes(number_of_bytes)?;
        if let Some(given) = aads.count().filter(|given| (*given as u64) < count) {
            return Err(Error::invalid(format!(
                "There are AADs for {given} data keys, but {count} are asked for."
            )));
        }
        let item_len = 2 * dek_len + IV_LEN + (BLOB_LEN_MAX - NUMBER_OF_BYTES_MAX);
        let window = (STREAM_WINDOW_BYTES / item_len).clamp(1, STREAM_WINDOW_ITEMS) as u64;
        let (engine, key) = (self.clone(), key.clone());
        let mut first = 0;
        let windows: Windows = Box::new(move || {
            let len = window.min(count - first);
            if len == 0 {
                return None;
            }
            let batch = engine.make_window(&key, operation, number_of_bytes, first, len, &aads);
            first = if batch.is_ok() { first + len } else { count };
            Some(batch)
        });
        // Before there is a thread: a child must not take its windows for its own.
        let home = os::generation();
        Ok(DataKeyStream { made: Some(Source::start(windows)), home })
    }

    fn make_window(
        &self,
        key: &KeyHandle,
        operation: Operation,
        number_of_bytes: u32,
        first: u64,
        len: u64,
        aads: &dyn AadSource,
    ) -> Result<DataKeyBatch> {
        let index = |number: u64| usize::try_from(number).map_err(|_| too_many());
        let (first, len) = (index(first)?, index(len)?);
        let mut batch = DataKeyBatch::default();
        let from = Shifted { first, aads };
        self.generate_data_keys_into(&mut batch, operation, key, number_of_bytes, len, from)?;
        Ok(batch)
    }
}

impl Source {
    /// Windows made ahead by a thread, or by the reader if there is none.
    fn start(windows: Windows) -> Self {
        let (sender, made) = channel::bounded(STREAM_WINDOWS_AHEAD);
        // What a thread that cannot be made is given is lost, so it is left where both reach it.
        let shared = Arc::new(Mutex::new(Some(windows)));
        let given = Arc::clone(&shared);
        let taken = |shared: &Mutex<Option<Windows>>| {
            shared.lock().unwrap_or_else(PoisonError::into_inner).take()
        };
        let make = move || {
            let Some(mut windows) = taken(&given) else { return };
            while let Some(batch) = windows() {
                let failed = batch.is_err();
                // Nobody is there any more.
                if sender.send(batch).is_err() || failed {
                    return;
                }
            }
        };
        match thread::Builder::new().name("keymill-stream".into()).spawn(make) {
            Ok(thread) => Self::Thread(made, thread),
            Err(error) => {
                log::warn!("a stream of data keys has no thread of its own: {error}");
                Self::Reader(Mutex::new(taken(&shared).expect("no thread has taken it")))
            }
        }
    }
}

fn too_many() -> Error {
    Error::invalid("The stream has more data keys than this machine can count.")
}

/// The AADs of a window.
struct Shifted<'a> {
    first: usize,
    aads: &'a dyn AadSource,
}

impl AadSource for Shifted<'_> {
    fn count(&self) -> Option<usize> {
        None
    }

    fn aad(&self, index: usize) -> &[u8] {
        self.aads.aad(self.first + index)
    }

    fn copy_to<'a>(&'a self, first: usize, out: &mut [&'a [u8]]) {
        self.aads.copy_to(self.first + first, out);
    }

    fn measure(&self, items: std::ops::Range<usize>) -> (usize, usize) {
        self.aads.measure(self.first + items.start..self.first + items.end)
    }
}

impl Iterator for DataKeyStream {
    type Item = Result<DataKeyBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let made = self.made.as_mut()?;
        if os::generation() != self.home {
            // The thread does not exist here, and what it made is the parent's.
            self.abandon();
            return Some(Err(Error::new(
                ErrorKind::Machine,
                "The stream belongs to the process that this one was forked from.",
            )));
        }
        let window = match made {
            Source::Thread(made, _) => receive(made),
            Source::Reader(windows) => windows.get_mut().unwrap_or_else(PoisonError::into_inner)(),
        };
        // A child that was forked meanwhile must not get what its parent gets.
        if os::generation() != self.home {
            return self.next();
        }
        if !matches!(window, Some(Ok(_)))
            && let Err(panic) = self.end()
        {
            // Otherwise the stream would seem to have had all its keys.
            panic::resume_unwind(panic);
        }
        window
    }
}

impl DataKeyStream {
    fn abandon(&mut self) {
        std::mem::forget(self.made.take());
    }

    /// Ends the thread and waits for it.
    ///
    /// # Errors
    /// Its panic, which a source of AADs can cause.
    fn end(&mut self) -> thread::Result<()> {
        let Some(Source::Thread(made, thread)) = self.made.take() else { return Ok(()) };
        // First, so that the thread's next window finds nobody.
        drop(made);
        while !thread.is_finished() && help() {}
        thread.join()
    }
}

/// The next window, if there is one.
fn receive(made: &Receiver<Result<DataKeyBatch>>) -> Option<Result<DataKeyBatch>> {
    loop {
        match made.try_recv() {
            Ok(window) => return Some(window),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) if help() => {}
            Err(TryRecvError::Empty) => return made.recv().ok(),
        }
    }
}

/// Does a bit of what waits for a thread of the present thread's pool, or naps; `false` on a thread of no pool. If all
/// threads of a pool were to wait for windows, nobody would do what the making of these waits for.
fn help() -> bool {
    const NAP: Duration = Duration::from_micros(100);
    match rayon::yield_now() {
        None => return false,
        Some(rayon::Yield::Executed) => {}
        Some(rayon::Yield::Idle) => thread::sleep(NAP),
    }
    true
}

impl Drop for DataKeyStream {
    fn drop(&mut self) {
        if os::generation() != self.home {
            self.abandon();
        } else if self.end().is_err() {
            log::error!("the thread of a stream of data keys panicked");
        }
    }
}

impl std::fmt::Debug for DataKeyStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataKeyStream").field("ended", &self.made.is_none()).finish()
    }
}
