//! Threads that serve connections, each with a runtime of its own: a connection stays on one thread.
//!
//! On one runtime of many threads every request wakes another thread somewhere, which costs more than an idle core
//! gains: here nobody is woken but the thread whose socket has something (PERF.md, "The server").

use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::{runtime, sync::oneshot};

/// Threads of one runtime for work that may wait.
const BLOCKING_THREADS_MAX: usize = 64;

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
    pub(super) fn start(count: usize) -> io::Result<Self> {
        let workers = (0..count).map(|_| Worker::start()).collect::<io::Result<_>>()?;
        Ok(Self { workers, next: AtomicUsize::new(0) })
    }

    /// The runtime of the thread whose turn it is.
    pub(super) fn next(&self) -> &runtime::Handle {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &self.workers[turn % self.workers.len()].runtime
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
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name("keymill-work")
            .build()?;
        let handle = runtime.handle().clone();
        let (alive, ended) = oneshot::channel();
        let run = move || {
            let _ = runtime.block_on(ended);
            // Whatever still works is beyond the time that it had.
            runtime.shutdown_timeout(END_TIME);
        };
        let thread = thread::Builder::new().name("keymill-serve".into()).spawn(run)?;
        Ok(Self { runtime: handle, alive, thread })
    }
}
