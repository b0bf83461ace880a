//! Bodies of requests: reading one in the time that its length has, or reading the rest of one that is refused.

use std::{
    future::Future,
    pin::{Pin, pin},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{Version, body::Body, header::EXPECT, http::request::Parts};

use super::{admission::Held, refusal::Refusal};
use crate::limits::{
    SERVER_DISCARD_LATE_LEN_MAX, SERVER_DISCARD_LATE_TIME, SERVER_DISCARD_TIME,
    SERVER_LIGHT_BODY_LEN_MAX, SERVER_TRANSFER_BYTES_PER_SECOND, SERVER_TRANSFER_TIME,
};

/// Most bytes for which memory is there before they are.
const RESERVED_LEN_MAX: usize = 1 << 20;

/// Reads a body of at most `max` bytes in the time that its length has.
pub(super) async fn read<B>(body: B, max: usize, held: &mut Held) -> Result<Bytes, Refusal>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let deadline = Instant::now() + SERVER_TRANSFER_TIME;
    let told = body.size_hint().lower();
    let mut body = pin!(Limited::new(body, max));
    let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
    let mut len = 0;
    loop {
        let more = Duration::from_secs((len / SERVER_TRANSFER_BYTES_PER_SECOND) as u64);
        let deadline = tokio::time::Instant::from_std(deadline + more);
        let frame = match poll_now_or(body.frame(), deadline).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => break,
            Ok(Some(Err(error))) if error.is::<LengthLimitError>() => {
                return Err(Refusal::too_large(max));
            }
            // The client has gone, or its framing is wrong. Nobody reads the answer.
            Ok(Some(Err(_))) => return Err(Refusal::parameter("The body is incomplete.")),
            Err(_) => return Err(Refusal::timeout()),
        };
        let Ok(data) = frame.into_data() else { continue };
        len += data.len();
        held.add(data.len());
        held.check()?;
        // Most bodies are one piece, and stay where they are.
        if first.is_empty() {
            first = data;
            continue;
        }
        if rest.is_empty() {
            // A length is only told, so not all of a long one is reserved.
            rest.reserve(usize::try_from(told).unwrap_or(max).min(RESERVED_LEN_MAX));
            rest.extend_from_slice(&first);
        }
        rest.extend_from_slice(&data);
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}

/// A future's result, or the end of its time. A timer is set only for one that has to wait.
async fn poll_now_or<F: Future>(
    future: F,
    deadline: tokio::time::Instant,
) -> Result<F::Output, tokio::time::error::Elapsed> {
    let mut future = pin!(future);
    let now = std::future::poll_fn(|context| {
        std::task::Poll::Ready(match future.as_mut().poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    });
    match now.await {
        Some(output) => Ok(output),
        None => tokio::time::timeout_at(deadline, future).await,
    }
}

/// Reads what is left of a body that nobody wants, if its end is near: to close what is unread takes the answer from a
/// client that is still sending. Whoever asks before it sends has sent nothing.
pub(super) async fn discard<B>(parts: &Parts, body: Pin<&mut B>, max: usize)
where
    B: Body<Data = Bytes>,
{
    let told = body.size_hint().upper();
    // Over HTTP/2 many bodies tell no length, since their last frame says that it is that.
    let max = match told {
        Some(_) => max,
        None if parts.version > Version::HTTP_11 => SERVER_LIGHT_BODY_LEN_MAX,
        None => return,
    };
    if parts.headers.contains_key(EXPECT) || told.is_some_and(|told| told > max as u64) {
        return;
    }
    let deadline = tokio::time::Instant::now() + SERVER_DISCARD_TIME;
    // The answer goes out either way.
    let _ = poll_now_or(rest(body, max), deadline).await;
}

/// The same after the answer, for a stream that is not reset as long as somebody reads it. In the end it is: a client
/// that never stops sending has had time to read its answer.
pub(super) async fn discard_late<B: Body<Data = Bytes>>(body: B) {
    let body = pin!(body);
    let rest = rest(body, SERVER_DISCARD_LATE_LEN_MAX);
    let _ = tokio::time::timeout(SERVER_DISCARD_LATE_TIME, rest).await;
}

async fn rest<B: Body<Data = Bytes>>(mut body: Pin<&mut B>, max: usize) {
    let mut len = 0;
    while len <= max
        && let Some(Ok(frame)) = body.frame().await
    {
        len += frame.data_ref().map_or(0, Bytes::len);
    }
}
