//! One connection: HTTP/1.1 or HTTP/2 on a socket, with or without TLS, and the clocks that end it.
//!
//! A client cannot hold a connection for nothing: its first authenticated request has to come in time, a head and a
//! body have their times, idleness ends it, and so does a response that is not read. Whether a response was read shows
//! in its memory: it is let go when the last of it is in the socket, and until then it counts as unsent.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};

use super::{
    admission::Held,
    service::{Service, Watch},
};
use crate::limits::{
    SERVER_FIRST_REQUEST_TIME, SERVER_TRANSFER_BYTES_PER_SECOND, SERVER_TRANSFER_TIME,
};

/// How often a connection's clocks are looked at.
const TICK: Duration = Duration::from_secs(2);
/// Streams of an HTTP/2 connection at once.
const STREAMS_MAX: u32 = 256;
/// Bytes that a connection of HTTP/1.1 keeps of what it reads: a head has to fit.
const BUFFER_LEN_MAX: usize = 64 << 10;
/// Bytes of a head of HTTP/2.
const HEAD_LEN_MAX: u32 = 32 << 10;

/// What the clocks of a connection go by.
struct Clocks {
    began: Instant,
    authenticated: AtomicBool,
    /// Requests whose answer is not made yet.
    in_progress: AtomicUsize,
    responses: Mutex<Responses>,
}

struct Responses {
    /// Those not yet sent, by number: when that should be over.
    unsent: BTreeMap<u64, Instant>,
    next: u64,
    /// When there was last anything to do.
    last: Instant,
}

/// Why a connection is to end.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// It has nothing to do: as HTTP ends connections.
    Idle,
    /// At once.
    Stalled(&'static str),
}

impl Clocks {
    fn new() -> Self {
        let began = Instant::now();
        let responses = Responses { unsent: BTreeMap::new(), next: 0, last: began };
        Self {
            began,
            authenticated: AtomicBool::new(false),
            in_progress: AtomicUsize::new(0),
            responses: Mutex::new(responses),
        }
    }

    fn responses(&self) -> std::sync::MutexGuard<'_, Responses> {
        self.responses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, now: Instant, idle_time: Duration) -> Option<End> {
        if !self.authenticated.load(Ordering::Relaxed)
            && now.saturating_duration_since(self.began) > SERVER_FIRST_REQUEST_TIME
        {
            return Some(End::Stalled("no authenticated request came in time"));
        }
        let responses = self.responses();
        if responses.unsent.values().any(|deadline| now > *deadline) {
            return Some(End::Stalled("a response was not read in time"));
        }
        let is_idle = responses.unsent.is_empty()
            && self.in_progress.load(Ordering::Relaxed) == 0
            && now.saturating_duration_since(responses.last) > idle_time;
        is_idle.then_some(End::Idle)
    }

    /// The same bytes, which count as unsent until they are let go.
    fn track(self: &Arc<Self>, bytes: Bytes, mut held: Held) -> Bytes {
        held.add(bytes.len());
        let more = Duration::from_secs((bytes.len() / SERVER_TRANSFER_BYTES_PER_SECOND) as u64);
        let now = Instant::now();
        let mut responses = self.responses();
        let number = responses.next;
        responses.next += 1;
        responses.unsent.insert(number, now + SERVER_TRANSFER_TIME + more);
        responses.last = now;
        drop(responses);
        Bytes::from_owner(Unsent { bytes, _held: held, number, clocks: Arc::clone(self) })
    }
}

impl Watch for Clocks {
    fn authenticated(&self) {
        self.authenticated.store(true, Ordering::Relaxed);
    }
}

struct Unsent {
    bytes: Bytes,
    _held: Held,
    number: u64,
    clocks: Arc<Clocks>,
}

impl AsRef<[u8]> for Unsent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        let mut responses = self.clocks.responses();
        responses.unsent.remove(&self.number);
        responses.last = Instant::now();
    }
}

/// Counts a request while its answer is made, also if its stream is reset meanwhile.
struct InProgress(Arc<Clocks>);

impl InProgress {
    fn begin(clocks: &Arc<Clocks>) -> Self {
        clocks.in_progress.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(clocks))
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.responses().last = Instant::now();
        self.0.in_progress.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves a connection to its end. `draining` turns true once the server ends.
pub(super) async fn serve<S>(
    service: Arc<Service>,
    stream: S,
    remote: SocketAddr,
    idle_time: Duration,
    mut draining: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let clocks = Arc::new(Clocks::new());
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(idle_time)
        .max_buf_size(BUFFER_LEN_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_LEN_MAX)
        .keep_alive_interval(SERVER_TRANSFER_TIME)
        .keep_alive_timeout(SERVER_TRANSFER_TIME);
    let answer = {
        let (service, clocks) = (Arc::clone(&service), Arc::clone(&clocks));
        move |request: Request<Incoming>| {
            let (service, clocks) = (Arc::clone(&service), Arc::clone(&clocks));
            async move {
                let _in_progress = InProgress::begin(&clocks);
                let response = service.answer_from(request, remote, &*clocks).await;
                let held = service.admission.hold();
                Ok::<_, Infallible>(response.map(|bytes| Full::new(clocks.track(bytes, held))))
            }
        }
    };
    let io = TokioIo::new(stream);
    let mut connection = pin!(builder.serve_connection(io, service_fn(answer)));
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told_to_drain = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    service.metrics.connections_failed.inc();
                    tracing::debug!(%remote, %error, "a connection failed");
                }
                return;
            }
            _ = ticks.tick() => match clocks.look(Instant::now(), idle_time) {
                None => {}
                Some(End::Idle) => connection.as_mut().graceful_shutdown(),
                Some(End::Stalled(why)) => {
                    service.metrics.connections_failed.inc();
                    tracing::debug!(%remote, why, "a connection was ended");
                    return;
                }
            },
            _ = draining.wait_for(|draining| *draining), if !told_to_drain => {
                told_to_drain = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// The response of a listener that has no protocol of its own.
pub(super) fn plain(status: u16, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    Response::builder()
        .status(status)
        .header("content-type", content_type)
        .body(Full::new(body))
        .expect("a status of ours")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::admission::Admission;

    const IDLE: Duration = Duration::from_secs(75);

    #[test]
    fn clocks_end_what_does_nothing() {
        let clocks = Arc::new(Clocks::new());
        let after = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert_eq!(clocks.look(after(0), IDLE), None);
        assert!(matches!(clocks.look(after(25), IDLE), Some(End::Stalled(_))));
        clocks.authenticated();
        assert_eq!(clocks.look(after(25), IDLE), None);
        assert_eq!(clocks.look(after(80), IDLE), Some(End::Idle));
        let in_progress = InProgress::begin(&clocks);
        assert_eq!(clocks.look(after(80), IDLE), None);
        drop(in_progress);
        let track = |bytes| clocks.track(bytes, Admission::new(1, None).hold());
        let (unsent, long) = (track(Bytes::from_static(b"key")), vec![0; 100 << 20]);
        assert!(matches!(clocks.look(after(40), IDLE), Some(End::Stalled(_))));
        drop(unsent);
        assert_eq!(clocks.look(after(40), IDLE), None);
        let _long = track(Bytes::from(long));
        assert_eq!(clocks.look(after(600), IDLE), None);
    }
}
