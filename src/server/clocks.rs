//! The clocks of a connection: what it has to do in time, so that no client holds one, or an answer, for nothing.
//!
//! - Its first head has a few seconds, and so has every later one from its first byte on.
//! - Its first authenticated request has to come in time.
//! - Nothing to do for long ends it.
//! - An answer has to leave: something of it every few seconds, and a moderate number of bytes over a longer window.
//!   What counts is what the peer has confirmed, not what lies in our socket. Over HTTP/2, where one answer can wait
//!   while others go, each has to have its turn, too. A client that reads slowly and steadily is never ended.
//!
//! Whether an answer is sent shows in its memory: it is let go when the last of it is in the socket.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{admission::Held, places::Seat, service::Watch, traffic::Traffic};
use crate::limits::{
    SERVER_ANSWER_BYTES_PER_SECOND, SERVER_ANSWER_PIECE_LEN, SERVER_ANSWER_WINDOW,
    SERVER_FIRST_REQUEST_TIME,
};

/// The times that a server's configuration gives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) idle: Duration,
    pub(super) head: Duration,
    pub(super) stall: Duration,
}

/// What the clocks of a connection go by.
pub(super) struct Clocks {
    began: Instant,
    seat: Seat,
    authenticated: AtomicBool,
    is_http2: AtomicBool,
    /// Heads that came whole.
    pub(super) heads: AtomicU64,
    /// Requests whose answer is not made yet.
    in_progress: AtomicUsize,
    answers: Mutex<Answers>,
}

struct Answers {
    /// Those not yet sent, by number.
    unsent: BTreeMap<u64, State>,
    next: u64,
    /// When there was last anything to do.
    last: Instant,
}

/// How far an answer has come.
struct State {
    made: Instant,
    /// Bytes given to HTTP/2; all of them at once otherwise.
    given: u64,
    in_turns: bool,
    /// At the last look at which anything had changed: `given`, when, and what had left the connection.
    seen: Option<(u64, Instant, u64)>,
    /// Most answers that waited with it since.
    rivals: u64,
}

/// What was seen of a connection's traffic at earlier looks.
pub(super) struct Observed {
    left: u64,
    /// When that had last changed.
    moved: Instant,
    /// Since when a rate is measured, what had left by then, and the oldest answer then.
    window: (Instant, u64, u64),
    /// A head that has begun: how many came before it, and since when.
    head: Option<(u64, Instant)>,
}

impl Observed {
    pub(super) fn new(began: Instant) -> Self {
        Self { left: 0, moved: began, window: (began, 0, u64::MAX), head: None }
    }
}

/// Why a connection is to end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// As HTTP ends connections: what is in progress goes on. It has nothing to do, or asked for nothing good.
    Gently,
    /// At once.
    Stalled(&'static str),
}

impl Clocks {
    pub(super) fn new(began: Instant, seat: Seat) -> Self {
        let answers = Answers { unsent: BTreeMap::new(), next: 0, last: Instant::now() };
        Self {
            began,
            seat,
            authenticated: AtomicBool::new(false),
            is_http2: AtomicBool::new(false),
            heads: AtomicU64::new(0),
            in_progress: AtomicUsize::new(0),
            answers: Mutex::new(answers),
        }
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_proven(&self) -> bool {
        self.seat.is_proven()
    }

    /// Whether there is nothing in progress and nothing unsent.
    pub(super) fn may_leave(&self) -> bool {
        self.in_progress.load(Ordering::Acquire) == 0 && self.answers().unsent.is_empty()
    }

    /// Whether the connection is to end.
    pub(super) fn look(
        &self,
        now: Instant,
        traffic: &Traffic,
        times: &Times,
        observed: &mut Observed,
    ) -> Option<End> {
        if !self.authenticated.load(Ordering::Relaxed)
            && now.saturating_duration_since(self.began) > SERVER_FIRST_REQUEST_TIME
        {
            // Refusals are answers, too, and none is to be lost.
            return Some(End::Gently);
        }
        let at_work = self.in_progress.load(Ordering::Acquire) != 0;
        if self.head_is_late(now, traffic, times, at_work, observed) {
            return Some(End::Stalled("a head did not end in time"));
        }
        let mut answers = self.answers();
        if answers.unsent.is_empty() {
            self.seat.rests((!at_work).then_some(answers.last));
            let is_idle = !at_work && now.saturating_duration_since(answers.last) > times.idle;
            return is_idle.then_some(End::Gently);
        }
        answers.look(now, traffic.left(), times, observed).map(End::Stalled)
    }

    /// Over HTTP/2 a head is one frame or a few, between which nothing else may come; idleness ends what is not.
    fn head_is_late(
        &self,
        now: Instant,
        traffic: &Traffic,
        times: &Times,
        at_work: bool,
        observed: &mut Observed,
    ) -> bool {
        let is_http2 = self.is_http2.load(Ordering::Relaxed);
        if at_work || is_http2 || !traffic.reading.load(Ordering::Relaxed) {
            observed.head = None;
            return false;
        }
        let heads = self.heads.load(Ordering::Relaxed);
        match observed.head {
            Some((before, since)) if before == heads => {
                now.saturating_duration_since(since) > times.head
            }
            _ => {
                observed.head = Some((heads, now));
                false
            }
        }
    }

    /// The same bytes, which count as unsent until they are let go.
    pub(super) fn track(
        self: &Arc<Self>,
        bytes: Bytes,
        mut held: Held,
        in_turns: bool,
    ) -> (Bytes, Unsent) {
        held.add(bytes.len());
        let now = Instant::now();
        let mut answers = self.answers();
        let number = answers.next;
        answers.next += 1;
        let state = State { made: now, given: 0, in_turns, seen: None, rivals: 0 };
        answers.unsent.insert(number, state);
        answers.last = now;
        drop(answers);
        let unsent = Unsent { number, clocks: Arc::clone(self) };
        (Bytes::from_owner(Tracked { bytes, _held: held, unsent: unsent.clone() }), unsent)
    }
}

impl Answers {
    /// Whether answers leave. `left` is what has left the connection.
    fn look(
        &mut self,
        now: Instant,
        left: u64,
        times: &Times,
        observed: &mut Observed,
    ) -> Option<&'static str> {
        let since = |then: Instant| now.saturating_duration_since(then);
        if left != observed.left {
            (observed.left, observed.moved) = (left, now);
        }
        let (oldest, made) = self.unsent.first_key_value().map(|(n, state)| (*n, state.made))?;
        if since(observed.moved.max(made)) > times.stall {
            return Some("nothing of an answer left in time");
        }
        let (start, before, of) = observed.window;
        if of != oldest {
            observed.window = (now, left, oldest);
        } else if since(start) >= SERVER_ANSWER_WINDOW {
            if left - before < SERVER_ANSWER_BYTES_PER_SECOND * since(start).as_secs() {
                return Some("an answer was read too slowly");
            }
            observed.window = (now, left, oldest);
        }
        let rivals = self.unsent.len() as u64;
        for state in self.unsent.values_mut().filter(|state| state.in_turns) {
            if state.is_passed_over(now, left, rivals, times) {
                return Some("an answer was not read, though others were");
            }
        }
        None
    }
}

impl State {
    /// Whether others had their turns many times, and this one had none.
    fn is_passed_over(&mut self, now: Instant, left: u64, rivals: u64, times: &Times) -> bool {
        /// Turns of all others in which it could have had its own.
        const TURNS: u64 = 4;
        /// Stall times after which it is nobody's turn any more.
        const STALLS: u32 = 6;
        match self.seen {
            Some((given, at, left_then)) if given == self.given => {
                self.rivals = self.rivals.max(rivals);
                let waited = now.saturating_duration_since(at);
                let turns = TURNS * self.rivals * SERVER_ANSWER_PIECE_LEN as u64;
                waited > times.stall
                    && (left.saturating_sub(left_then) >= turns || waited > times.stall * STALLS)
            }
            _ => {
                self.seen = Some((self.given, now, left));
                self.rivals = rivals;
                false
            }
        }
    }
}

impl Watch for Clocks {
    fn authenticated(&self) {
        self.authenticated.store(true, Ordering::Relaxed);
    }

    fn received(&self) {
        self.seat.prove();
    }
}

/// An answer that is not sent yet.
#[derive(Clone)]
pub(super) struct Unsent {
    number: u64,
    clocks: Arc<Clocks>,
}

impl Unsent {
    /// So many bytes of it were given to HTTP.
    pub(super) fn gave(&self, len: usize) {
        if let Some(state) = self.clocks.answers().unsent.get_mut(&self.number) {
            state.given += len as u64;
        }
    }
}

struct Tracked {
    bytes: Bytes,
    _held: Held,
    unsent: Unsent,
}

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let mut answers = self.unsent.clocks.answers();
        answers.unsent.remove(&self.unsent.number);
        answers.last = Instant::now();
    }
}

/// Counts a request while its answer is made, also if its stream is reset meanwhile.
pub(super) struct InProgress(Arc<Clocks>);

impl InProgress {
    pub(super) fn begin(clocks: &Arc<Clocks>, is_http2: bool) -> Self {
        clocks.in_progress.fetch_add(1, Ordering::AcqRel);
        clocks.heads.fetch_add(1, Ordering::Relaxed);
        if is_http2 {
            clocks.is_http2.store(true, Ordering::Relaxed);
        }
        clocks.seat.rests(None);
        Self(Arc::clone(clocks))
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.answers().last = Instant::now();
        self.0.in_progress.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{admission::Admission, places::Places};

    const TIMES: Times = Times {
        idle: Duration::from_secs(75),
        head: Duration::from_secs(5),
        stall: Duration::from_secs(10),
    };

    struct Looked {
        clocks: Arc<Clocks>,
        traffic: Traffic,
        observed: Observed,
        began: Instant,
    }

    impl Looked {
        async fn new() -> Self {
            let began = Instant::now();
            let place = Places::new(1, 1).take(([127, 0, 0, 1], 1).into()).await;
            Self {
                clocks: Arc::new(Clocks::new(began, place.seat())),
                traffic: Traffic::none(),
                observed: Observed::new(began),
                began,
            }
        }

        fn at(&mut self, seconds: u64) -> Option<End> {
            let now = self.began + Duration::from_secs(seconds);
            self.clocks.look(now, &self.traffic, &TIMES, &mut self.observed)
        }

        fn track(&self, bytes: impl Into<Bytes>, in_turns: bool) -> (Bytes, Unsent) {
            self.clocks.track(bytes.into(), Admission::new(1, None).hold(None), in_turns)
        }

        fn stalls_at(&mut self, seconds: u64) -> bool {
            matches!(self.at(seconds), Some(End::Stalled(_)))
        }
    }

    #[tokio::test]
    async fn clocks_end_what_does_nothing() {
        let mut looked = Looked::new().await;
        assert_eq!(looked.at(0), None);
        assert_eq!(looked.at(25), Some(End::Gently));
        looked.clocks.authenticated();
        assert_eq!(looked.at(25), None);
        assert_eq!(looked.at(80), Some(End::Gently));
        let in_progress = InProgress::begin(&looked.clocks, false);
        assert_eq!(looked.at(80), None);
        assert!(!looked.clocks.may_leave());
        drop(in_progress);
        assert!(looked.clocks.may_leave());
        // A head that has begun.
        looked.traffic.reading.store(true, Ordering::Relaxed);
        assert_eq!(looked.at(30), None);
        assert_eq!(looked.at(34), None);
        assert!(looked.stalls_at(36));
        drop(InProgress::begin(&looked.clocks, false));
        assert_eq!(looked.at(37), None);
    }

    #[tokio::test]
    async fn an_answer_may_be_slow_and_may_not_stand_still() {
        let mut looked = Looked::new().await;
        looked.clocks.authenticated();
        let _long = looked.track(vec![0; 100 << 20], false);
        // A few bytes each second, and then none.
        for second in 0..29 {
            looked.traffic.wrote(1000);
            assert_eq!(looked.at(second), None, "{second}");
        }
        assert_eq!(looked.at(29), None);
        // Too few over all that time.
        assert!(looked.stalls_at(31));
        let mut looked = Looked::new().await;
        looked.clocks.authenticated();
        let long = looked.track(vec![0; 100 << 20], false);
        for second in 0..600 {
            looked.traffic.wrote(30 << 10);
            assert_eq!(looked.at(second), None, "{second}");
        }
        assert_eq!(looked.at(608), None);
        assert!(looked.stalls_at(611));
        drop(long);
        assert_eq!(looked.at(611), Some(End::Gently));
    }

    #[tokio::test]
    async fn an_answer_that_is_passed_over_again_and_again_ends_the_connection() {
        let mut looked = Looked::new().await;
        looked.clocks.authenticated();
        let (stopped, others) = (looked.track(vec![0; 1 << 20], true), [0; 3]);
        let others = others.map(|_| looked.track(vec![0; 1 << 20], true));
        for second in 0..11 {
            looked.traffic.wrote(100 << 10);
            others.iter().for_each(|(_, unsent)| unsent.gave(SERVER_ANSWER_PIECE_LEN));
            assert_eq!(looked.at(second), None, "{second}");
        }
        looked.traffic.wrote(100 << 10);
        others.iter().for_each(|(_, unsent)| unsent.gave(SERVER_ANSWER_PIECE_LEN));
        assert!(looked.stalls_at(11));
        stopped.1.gave(1);
        assert_eq!(looked.at(11), None);
    }
}
