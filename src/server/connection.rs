//! One connection: HTTP/1.1 or HTTP/2 on a socket, with or without TLS, and the clocks that end it (see `clocks`).
//!
//! A request that is refused while its body still comes in is answered all the same: the rest is read within bounds,
//! before the answer if its end is near, else after it. Over HTTP/2 nothing is reset before that.

use std::{
    convert::Infallible,
    error::Error,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, Version,
    body::{Body, Frame, Incoming, SizeHint},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::sleep_until,
};

use super::{
    body,
    clocks::{Clocks, End, InProgress, Observed, Times, Unsent},
    failures::{Causes, is_peer_gone},
    places::Place,
    service::Service,
    traffic::Traffic,
};
use crate::limits::{SERVER_ANSWER_PIECE_LEN, SERVER_TRANSFER_TIME};

/// How often a connection's clocks are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Time for a connection that was told to end to do so.
const END_TIME: Duration = Duration::from_secs(5);
/// The same when another waits for its place.
const LEAVE_TIME: Duration = Duration::from_millis(500);
/// Streams of an HTTP/2 connection at once.
const STREAMS_MAX: u32 = 256;
/// Bytes that a connection of HTTP/1.1 keeps of what it reads: a head has to fit.
const BUFFER_LEN_MAX: usize = 64 << 10;
/// Bytes of a head of HTTP/2.
const HEAD_LEN_MAX: u32 = 32 << 10;

/// What a connection is served with.
pub(super) struct Accepted {
    pub(super) service: Arc<Service>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) remote: SocketAddr,
    /// When it was accepted: handshakes count.
    pub(super) began: Instant,
    pub(super) times: Times,
    /// Turns true once the server ends.
    pub(super) draining: watch::Receiver<bool>,
}

/// The bytes of an answer, whole or in pieces.
struct Answer {
    rest: Bytes,
    piece_len: usize,
    unsent: Unsent,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let len = self.piece_len.min(self.rest.len());
        let piece = self.rest.split_to(len);
        self.unsent.gave(len);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// Answers one request of a connection.
async fn answer(
    accepted: Arc<Accepted>,
    clocks: Arc<Clocks>,
    request: Request<Incoming>,
) -> Response<Answer> {
    let Accepted { service, traffic, remote, .. } = &*accepted;
    let is_http2 = request.version() == Version::HTTP_2;
    let in_progress = InProgress::begin(&clocks, is_http2);
    traffic.reading.store(false, Ordering::Relaxed);
    let (parts, mut body) = request.into_parts();
    let (response, account) =
        service.answer_parts(parts, Pin::new(&mut body), *remote, &*clocks).await;
    // What was read meanwhile belongs to this request.
    traffic.reading.store(false, Ordering::Relaxed);
    // A body without a length never tells its end over HTTP/1, but what was done has come whole.
    if !response.status().is_success() && !body.is_end_stream() {
        if is_http2 {
            // As long as somebody has the stream, it is not reset.
            tokio::spawn(body::discard_late(body));
        } else {
            traffic.linger();
        }
    }
    let piece_len = if is_http2 { SERVER_ANSWER_PIECE_LEN } else { usize::MAX };
    let held = service.admission.hold(account.as_ref());
    let response = response.map(|bytes| {
        let (rest, unsent) = clocks.track(bytes, held, is_http2);
        Answer { rest, piece_len, unsent }
    });
    // Not before the answer counts as unsent: the connection is never at rest between the two.
    drop(in_progress);
    response
}

fn builder(times: &Times) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // The clocks come first: they can tell a connection that does nothing from a head that does not end.
        .header_read_timeout(times.idle + times.head + END_TIME)
        .max_buf_size(BUFFER_LEN_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_LEN_MAX)
        .keep_alive_interval(SERVER_TRANSFER_TIME)
        .keep_alive_timeout(SERVER_TRANSFER_TIME);
    builder
}

/// Serves a connection to its end.
pub(super) async fn serve<S>(accepted: Accepted, stream: S, place: &Place)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let accepted = Arc::new(accepted);
    let clocks = Arc::new(Clocks::new(accepted.began, place.seat()));
    let Accepted { service, traffic, remote, began, times, draining } = &*accepted;
    let fail = |why: &'static str| {
        service.metrics.connections_failed.inc();
        tracing::debug!(%remote, why, "a connection was ended");
    };
    let builder = builder(times);
    let respond = {
        let (accepted, clocks) = (Arc::clone(&accepted), Arc::clone(&clocks));
        move |request| {
            let answer = answer(Arc::clone(&accepted), Arc::clone(&clocks), request);
            async move { Ok::<_, Infallible>(answer.await) }
        }
    };
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service_fn(respond)));
    let mut head_time = pin!(sleep_until((*began + times.head).into()));
    let mut head_is_due = true;
    let mut end_time = pin!(sleep_until((*began + times.head).into()));
    let mut is_ending = false;
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut draining = draining.clone();
    let mut told_to_drain = false;
    let mut observed = Observed::new(*began);
    loop {
        let end_in = tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    failed(service, *remote, &clocks, &*error);
                }
                return;
            }
            () = head_time.as_mut(), if head_is_due => {
                head_is_due = false;
                if clocks.heads.load(Ordering::Relaxed) == 0 {
                    return fail("no head came in time");
                }
                None
            }
            () = end_time.as_mut(), if is_ending => return fail("it did not end when it was told"),
            _ = ticks.tick() => match clocks.look(Instant::now(), traffic, times, &mut observed) {
                None => None,
                Some(End::Gently) => Some(END_TIME),
                Some(End::Stalled(why)) => return fail(why),
            },
            () = place.must_leave() => match clocks.may_leave() {
                _ if !clocks.is_proven() => {
                    service.metrics.connections_evicted.inc();
                    return tracing::debug!(%remote, "a connection made room for another");
                }
                true => {
                    service.metrics.connections_evicted.inc();
                    Some(LEAVE_TIME)
                }
                false => {
                    place.stay();
                    None
                }
            },
            _ = draining.wait_for(|draining| *draining), if !told_to_drain => {
                told_to_drain = true;
                connection.as_mut().graceful_shutdown();
                None
            }
        };
        if let Some(time) = end_in
            && !is_ending
        {
            is_ending = true;
            end_time.as_mut().reset((Instant::now() + time).into());
            connection.as_mut().graceful_shutdown();
        }
    }
}

/// Tells of the end of a connection that was not in order, unless the client merely went.
fn failed(
    service: &Service,
    remote: SocketAddr,
    clocks: &Clocks,
    error: &(dyn Error + Send + Sync + 'static),
) {
    let causes = Causes(error);
    let at_rest = clocks.may_leave();
    if is_peer_gone(error) {
        if at_rest {
            return tracing::trace!(%remote, error = %causes, "a client closed its connection");
        }
        service.metrics.connections_failed.inc();
        return tracing::debug!(%remote, error = %causes, "a client went before its answer");
    }
    service.metrics.connections_failed.inc();
    if let Some(not_logged) = service.breaches.take("breach") {
        tracing::info!(%remote, error = %causes, not_logged, "a connection failed");
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
