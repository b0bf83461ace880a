//! Sharing a batch's chunks among threads.

use std::sync::{Mutex, PoisonError};

use super::helpers::{self, Helpers};
use crate::limits::FAN_OUT_ITEMS_MIN;

/// Where a batch's chunks run.
#[derive(Clone, Copy)]
pub(crate) enum FanOut<'a> {
    /// On the caller's thread.
    Caller,
    /// On rayon's global pool.
    Global,
    /// On this pool.
    Own(&'a rayon::ThreadPool),
}

impl FanOut<'_> {
    /// How many threads of the pool help the caller with `job_count` jobs that stand for `item_count` items.
    pub(crate) fn helpers(self, item_count: usize, job_count: usize) -> usize {
        if item_count < FAN_OUT_ITEMS_MIN {
            return 0;
        }
        let threads = match self {
            Self::Caller => 1,
            Self::Global => helpers::thread_count(),
            Self::Own(pool) => pool.current_num_threads(),
        };
        threads.min(job_count).saturating_sub(1)
    }

    /// Does `work` for each of the jobs in `parts`, on the caller's thread with `own` and on those of as many helpers
    /// as there are further parts. Each helper makes a `W` of its own.
    ///
    /// Everybody begins with a part of their own and then helps with the others. So a batch that is made again in the
    /// same memory finds most of it in the caches of those who work on it: where two cores share no cache, memory that
    /// changes hands costs more than the work itself. And while the pool's threads wake up, the caller works: there may
    /// be little left for them. But a pool whose threads are all busy with something else delays the batch: it returns
    /// when its helpers have begun and found nothing, since what they borrow is the caller's.
    pub(crate) fn for_each<I: Iterator + Send, W: Default>(
        self,
        mut parts: impl Iterator<Item = I>,
        own: &mut W,
        work: impl Fn(&mut W, I::Item) + Sync,
    ) {
        let Some(first) = parts.next() else { return };
        let Some(second) = parts.next() else {
            first.for_each(|job| work(own, job));
            return;
        };
        let parts: Vec<_> = [first, second].into_iter().chain(parts).map(Mutex::new).collect();
        let next = |part: &Mutex<I>| part.lock().unwrap_or_else(PoisonError::into_inner).next();
        let drain = |begin: usize, worker: &mut W| {
            let (after, before) = (&parts[begin..], &parts[..begin]);
            for part in after.iter().chain(before) {
                while let Some(job) = next(part) {
                    work(worker, job);
                }
            }
        };
        let help = |begin| drain(begin, &mut W::default());
        match self {
            Self::Own(pool) => pool.in_place_scope(|scope| {
                with_help(scope, parts.len(), &help);
                drain(0, own);
            }),
            Self::Global | Self::Caller => match helpers::pool() {
                Helpers::Present => rayon::in_place_scope(|scope| {
                    with_help(scope, parts.len(), &help);
                    drain(0, own);
                }),
                Helpers::Own(pool) => pool.in_place_scope(|scope| {
                    with_help(scope, parts.len(), &help);
                    drain(0, own);
                }),
                Helpers::None => drain(0, own),
            },
        }
    }
}

/// Does `work` with each part but the first on a thread of the scope's pool.
fn with_help<'s>(scope: &rayon::Scope<'s>, parts: usize, work: &'s (dyn Fn(usize) + Sync)) {
    for begin in 1..parts {
        scope.spawn(move |_| work(begin));
    }
}

/// Cuts `items` into `count` parts of about one length.
pub(crate) fn in_parts<T>(items: &[T], count: usize) -> impl Iterator<Item = &[T]> {
    items.chunks(items.len().div_ceil(count).max(1))
}
