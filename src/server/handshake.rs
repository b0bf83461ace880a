//! From an accepted socket to a connection that is served: its place, its TLS handshake, and what is told of one that
//! fails.

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use tokio::{net::TcpStream, time::timeout_at};

use super::{
    Shared,
    clocks::Times,
    connection::{self, Accepted},
    failures::Causes,
    places::Place,
    service::Service,
    tls::Tls,
    traffic::{Counted, Traffic},
};

/// Serves a connection to its end, whatever that is.
pub(super) async fn connection(
    shared: Arc<Shared>,
    stream: std::net::TcpStream,
    remote: SocketAddr,
    times: Times,
    place: Place,
) {
    let began = Instant::now();
    // From here on it belongs to the runtime of this thread.
    let stream = match TcpStream::from_std(stream) {
        Ok(stream) => stream,
        Err(error) => return tracing::warn!(%error, "a connection cannot be served"),
    };
    let (stream, traffic) = Counted::new(stream);
    let service = Arc::clone(&shared.service);
    let draining = shared.draining.subscribe();
    let connections = service.metrics.connections.clone();
    connections.inc();
    let accepted = Accepted { service, traffic, remote, began, times, draining };
    match &shared.tls {
        None => connection::serve(accepted, stream, &place).await,
        Some(tls) => over_tls(accepted, stream, tls, &place).await,
    }
    connections.dec();
}

async fn over_tls(accepted: Accepted, stream: Counted, tls: &Tls, place: &Place) {
    let Accepted { service, traffic, remote, began, times, .. } = &accepted;
    let handshake = tls.acceptor().accept(stream);
    let handshake = timeout_at((*began + times.head).into(), handshake);
    let shaken = tokio::select! {
        shaken = handshake => shaken,
        () = place.must_leave() => {
            service.metrics.connections_evicted.inc();
            return tracing::debug!(%remote, "a TLS handshake made room for another connection");
        }
    };
    match shaken {
        Ok(Ok(stream)) => connection::serve(accepted, stream, place).await,
        Ok(Err(error)) => failed(service, traffic, *remote, &error),
        Err(_) => {
            service.metrics.count_handshake("timeout");
            tracing::debug!(%remote, "a TLS handshake did not end in time");
        }
    }
}

fn failed(service: &Service, traffic: &Traffic, remote: SocketAddr, error: &io::Error) {
    let (reason, sentence) = reason(error);
    if reason == CLOSED {
        if !traffic.has_read() {
            // As load balancers do, to see whether anybody listens.
            return tracing::trace!(%remote, "a connection was opened and closed");
        }
        service.metrics.count_handshake(reason);
        return tracing::debug!(%remote, error = %Causes(error), "{sentence}");
    }
    service.metrics.count_handshake(reason);
    if let Some(not_logged) = service.handshakes.take(reason) {
        let error = Causes(error);
        tracing::info!(%remote, %error, not_logged, "a TLS handshake failed: {sentence}");
    }
}

const CLOSED: &str = "closed";

/// What went wrong: a label, and a sentence for whoever reads the log.
fn reason(error: &io::Error) -> (&'static str, &'static str) {
    use rustls::Error::{
        AlertReceived, InappropriateHandshakeMessage, InappropriateMessage, InvalidCertificate,
        InvalidMessage, NoCertificatesPresented, PeerIncompatible, PeerMisbehaved,
    };
    let by_tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    match by_tls {
        None => (CLOSED, "the client closed the connection"),
        Some(NoCertificatesPresented) => {
            ("no_certificate", "the client showed no certificate, and --client-ca wants one")
        }
        Some(InvalidCertificate(_)) => {
            ("bad_certificate", "the client's certificate is not accepted")
        }
        Some(AlertReceived(_)) => (
            "alert",
            "the client did not accept the server (does it know the CA, and is the name right?)",
        ),
        Some(PeerIncompatible(_)) => {
            ("incompatible", "client and server have no version or cipher in common")
        }
        Some(InvalidMessage(_) | InappropriateMessage { .. }) => {
            ("not_tls", "what came is not TLS (plain HTTP on a TLS port?)")
        }
        Some(PeerMisbehaved(_) | InappropriateHandshakeMessage { .. }) => {
            ("misbehaved", "the client broke the rules of TLS")
        }
        Some(_) => ("other", "TLS failed"),
    }
}
