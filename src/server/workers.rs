//! Threads that serve connections, each with a runtime of its own: a connection stays on one thread.
//!
//! On one runtime of many threads every request wakes another thread somewhere, which costs more than an idle core
//! gains: here nobody is woken but the thread whose socket has something (PERF.md, "The server").

use std::{
    io,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::{runtime, sync::oneshot};

/// How long a thread waits for work elsewhere when it ends.
const END_TIME: Duration = Duration::from_secs(1);

/// The threads of a server. They end when this is ended or dropped.
pub(super) struct Workers {
    workers: Vec<Worker>,
    next: AtomicUsize,
}

struct Worker {
    runtime: runtime::Handle,
    /// Dropped, it ends the thread.
    alive: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Workers {
    /// As many as the system gives, `count` at most: a limit of processes makes a server slower, but does not end it.
    pub(super) fn start(count: usize) -> Self {
        let mut workers = Vec::new();
        while workers.len() < count {
            match Worker::start() {
                Ok(worker) => workers.push(worker),
                Err(error) => {
                    let started = workers.len();
                    tracing::warn!(%error, wanted = count, started, "fewer threads than asked for");
                    break;
                }
            }
        }
        Self { workers, next: AtomicUsize::new(0) }
    }

    /// The runtime of the thread whose turn it is; the caller's if there is no other thread.
    pub(super) fn next(&self) -> runtime::Handle {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        match turn.checked_rem(self.workers.len()) {
            Some(turn) => self.workers[turn].runtime.clone(),
            None => runtime::Handle::current(),
        }
    }

    /// Ends the threads. Blocks.
    pub(super) fn end(self) {
        for Worker { alive, thread, .. } in self.workers {
            drop(alive);
            let _ = thread.join();
        }
    }
}

impl Worker {
    fn start() -> io::Result<Self> {
        let (alive, ended) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        // The thread makes its runtime: one that is dropped because there is no thread for it would panic here.
        let run = move || {
            let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(tell.send(Err(error))),
            };
            let _ = tell.send(Ok(runtime.handle().clone()));
            let _ = runtime.block_on(ended);
            // Whatever still works is beyond the time that it had.
            runtime.shutdown_timeout(END_TIME);
        };
        let thread = thread::Builder::new().name("keymill-serve".into()).spawn(run)?;
        let runtime = told.recv().map_err(io::Error::other)??;
        Ok(Self { runtime, alive, thread })
    }
}
