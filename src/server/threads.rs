//! Threads for work that may wait: large batches, and what needs the store.
//!
//! Those of tokio panic if the system gives no first one, and leave the work in their queue. Here the caller does the
//! work then, which keeps its connections waiting for a moment, and every later piece of work asks the system again.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use tokio::sync::oneshot;

/// Most threads at once. What comes then waits for one.
const THREADS_MAX: usize = 64;
/// How long a thread waits for work before it ends.
const IDLE_TIME: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Threads that are made when there is work, and end some time after the last of it.
#[derive(Default)]
pub(super) struct Threads(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Told of every job, and of the end.
    woken: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Threads that wait, or were woken and have not begun.
    idle: usize,
    ended: bool,
    /// Whether the last thread that was wanted was not given.
    refused: bool,
}

impl Threads {
    /// Does `work` on a thread that may wait, or on this one if there is none. `None` if it panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, done) = oneshot::channel();
        let job = move || {
            // Nobody waits for it after the end of a runtime.
            let _ = sender.send(catch_unwind(AssertUnwindSafe(work)).ok());
        };
        if let Some(job) = self.0.give(Box::new(job)) {
            job();
        }
        done.await.ok().flatten()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.0.state().ended = true;
        self.0.woken.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the job to a thread. It comes back if there is none at all.
    fn give(self: &Arc<Self>, job: Job) -> Option<Job> {
        let mut state = self.state();
        if state.idle <= state.jobs.len() && state.threads < THREADS_MAX {
            let shared = Arc::clone(self);
            let run = move || shared.work();
            let spawned = thread::Builder::new().name("keymill-work".into()).spawn(run);
            let refused = std::mem::replace(&mut state.refused, spawned.is_err());
            match spawned {
                Ok(_) => state.threads += 1,
                Err(error) if !refused => {
                    tracing::warn!(%error, threads = state.threads, "no further thread for work");
                }
                Err(_) => {}
            }
        }
        if state.threads == 0 {
            return Some(job);
        }
        state.jobs.push_back(job);
        drop(state);
        self.woken.notify_one();
        None
    }

    /// The life of a thread.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state();
                continue;
            }
            if state.ended {
                break;
            }
            state.idle += 1;
            let (woken, waited) = self
                .woken
                .wait_timeout_while(state, IDLE_TIME, |state| state.jobs.is_empty() && !state.ended)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn work_is_done_elsewhere_and_its_panics_stay_there() {
        let threads = Threads::default();
        let here = thread::current().id();
        assert_ne!(block_on(threads.run(|| thread::current().id())), Some(here));
        assert_eq!(block_on(threads.run(|| -> u8 { panic!("of the test") })), None);
        // A thread that waits is used again. One counts as waiting a moment after it has answered.
        let rest = || loop {
            let state = threads.0.state();
            if state.idle == state.threads {
                break state.threads;
            }
            drop(state);
            thread::yield_now();
        };
        let before = rest();
        for number in 0..1000 {
            assert_eq!(block_on(threads.run(move || number)), Some(number));
            assert_eq!(rest(), before);
        }
    }

    #[test]
    fn more_work_than_threads_waits_for_one() {
        let threads = Arc::new(Threads::default());
        let sum = block_on(async {
            let mut all = tokio::task::JoinSet::new();
            for number in 0..4 * THREADS_MAX {
                let threads = Arc::clone(&threads);
                let slow = move || {
                    thread::sleep(Duration::from_millis(5));
                    number
                };
                all.spawn(async move { threads.run(slow).await.unwrap() });
            }
            all.join_all().await.into_iter().sum::<usize>()
        });
        assert_eq!(sum, (0..4 * THREADS_MAX).sum::<usize>());
        assert!(threads.0.state().threads <= THREADS_MAX);
    }
}
