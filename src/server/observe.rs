//! The listener for those who watch the server: `/healthz`, `/readyz` and `/metrics`, on an address of its own, without
//! TLS and without a client's key. Nothing secret is told here.
//!
//! It has places of its own, so that a crowd of clients does not hide the server from those who watch it. When these
//! run out, the oldest connection makes room.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use super::{
    Shared,
    connection::plain,
    places::{Place, Places},
    service::Service,
};

const TEXT: &str = "text/plain; charset=utf-8";
/// Prometheus's text format.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Time for a head to arrive, and for a connection in all.
const HEAD_TIME: Duration = Duration::from_secs(5);
const CONNECTION_TIME: Duration = Duration::from_secs(120);

/// Serves until it is dropped.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener, connections_max: usize) {
    // Nobody proves anything here, so age alone counts.
    let places = Places::new(connections_max, usize::MAX);
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                places.make_room();
                shared.not_accepted(&error).await;
                continue;
            }
        };
        let place = places.take(remote).await;
        let service = Arc::clone(&shared.service);
        tokio::spawn(tokio::time::timeout(CONNECTION_TIME, connection(service, stream, place)));
    }
}

async fn connection(service: Arc<Service>, stream: TcpStream, place: Place) {
    let answer = |request: Request<Incoming>| {
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(answer(service, &request).await) }
    };
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .serve_connection(TokioIo::new(stream), service_fn(answer));
    tokio::select! {
        _ = served => {}
        () = place.must_leave() => {}
    }
}

async fn answer(service: Arc<Service>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(405, TEXT, Bytes::from_static(b"GET only\n"));
    }
    match request.uri().path() {
        "/healthz" => plain(200, TEXT, Bytes::from_static(b"ok\n")),
        "/readyz" => {
            // The store may be slow to answer.
            let asked = Arc::clone(&service);
            let ready = service.threads.run(move || asked.readiness()).await;
            match ready.unwrap_or(Err("a panic was caught")) {
                Ok(how) => plain(200, TEXT, Bytes::from(format!("{how}\n"))),
                Err(why) => plain(503, TEXT, Bytes::from(format!("not ready: {why}\n"))),
            }
        }
        "/metrics" => plain(200, METRICS, Bytes::from(service.metrics_text())),
        _ => plain(404, TEXT, Bytes::from_static(b"try /healthz, /readyz or /metrics\n")),
    }
}
