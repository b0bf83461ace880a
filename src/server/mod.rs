//! The KMS's wire protocol on HTTP: what `keymill serve` runs. Unmodified SDKs of the KMS drive it.
//!
//! `POST /` with protobuf bodies, signed by clients' RSA keys ([`proto`] has the messages; SECURITY.md says what the
//! protocol protects and what it does not), and batches in the same style, one signed request for up to 65,536 keys.
//!
//! [`Service`] answers requests; [`Server`] puts it on a socket, with TLS, limits and clocks, and ends it in order. The
//! rooms: `head` and `auth` (who asks for what), `work` and `batch` (the operations), `body` and `encode` (what comes
//! and what goes), `refusal` (errors), `admission` (load), `audit` and `metrics`, `connection`, `tls`, `workers` and
//! `observe` (sockets).
//!
//! ```no_run
//! use keymill::{Engine, server::{Server, ServerConfig}};
//!
//! # async fn example(engine: Engine) -> std::io::Result<()> {
//! let config = ServerConfig::new(([127, 0, 0, 1], 8080).into());
//! let server = Server::bind(engine, &config).await?;
//! println!("ready on {}", server.address());
//! let handle = server.handle();
//! tokio::spawn(async move {
//!     let _ = tokio::signal::ctrl_c().await;
//!     handle.drain();
//! });
//! server.run().await;
//! # Ok(())
//! # }
//! ```

mod admission;
mod api;
mod audit;
mod auth;
mod batch;
mod body;
mod connection;
mod encode;
mod head;
mod metrics;
mod observe;
pub mod proto;
mod refusal;
mod service;
mod tls;
mod work;
mod workers;

use std::{io, net::SocketAddr, num::NonZeroUsize, sync::Arc, thread, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

pub use audit::AuditConfig;
pub use service::Service;
pub use tls::TlsFiles;

use crate::{
    engine::Engine,
    limits::{
        SERVER_BATCH_BODY_LEN_DEFAULT, SERVER_CONNECTIONS_DEFAULT, SERVER_KEYS_IN_PROGRESS_DEFAULT,
    },
};
use tls::Tls;
use workers::Workers;

/// What a server is told.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServerConfig {
    /// Where clients connect. Port 0 is one that is free.
    pub listen: SocketAddr,
    /// Certificates. Without them the server speaks plain HTTP, on a loopback address alone unless `plain_http` is set.
    pub tls: Option<TlsFiles>,
    /// Whether plain HTTP is meant, whatever the address: behind a proxy that ends TLS, say.
    pub plain_http: bool,
    /// Where `/healthz`, `/readyz` and `/metrics` are.
    pub metrics: Option<SocketAddr>,
    /// The audit log.
    pub audit: Option<AuditConfig>,
    /// Most bytes of a batch's body.
    pub batch_body_max: usize,
    /// Data keys that are worked on at once; what is beyond is answered 429. A batch that is alone is let in whatever
    /// its size.
    pub keys_in_progress_max: u64,
    /// Data keys a second; what is beyond is answered 429. A batch may overdraw it, and what follows waits.
    pub keys_per_second: Option<u32>,
    /// Connections at once; more wait to be accepted.
    pub connections_max: usize,
    /// Threads that serve connections, each of which stays on one of them.
    pub threads: NonZeroUsize,
    /// How long a connection may do nothing.
    pub idle_time: Duration,
    /// How long a server that ends waits for its connections.
    pub drain_time: Duration,
}

impl ServerConfig {
    /// The defaults, on this address.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            tls: None,
            plain_http: false,
            metrics: None,
            audit: None,
            batch_body_max: SERVER_BATCH_BODY_LEN_DEFAULT,
            keys_in_progress_max: SERVER_KEYS_IN_PROGRESS_DEFAULT,
            keys_per_second: None,
            connections_max: SERVER_CONNECTIONS_DEFAULT,
            threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            idle_time: Duration::from_secs(75),
            drain_time: Duration::from_secs(25),
        }
    }
}

/// A server that has its sockets and does not serve yet.
pub struct Server {
    service: Arc<Service>,
    shared: Arc<Shared>,
    listener: TcpListener,
    observer: Option<TcpListener>,
    workers: Workers,
    config: ServerConfig,
}

/// What a handle reaches.
struct Shared {
    service: Arc<Service>,
    tls: Option<Tls>,
    draining: watch::Sender<bool>,
}

/// Ends or reloads a server that runs.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Lets what is in progress end, refuses what is new with 503, and then lets [`Server::run`] return.
    pub fn drain(&self) {
        self.0.service.admission.drain();
        self.0.draining.send_replace(true);
    }

    /// Records of the audit log that were not written, once [`Server::run`] has returned: of requests that were ended
    /// in the midst of their work, or since the log could not be written to the end.
    pub fn audit_records_lost(&self) -> u64 {
        self.0.service.audit.lost()
    }

    /// Reads the TLS files again and opens the audit log by its name again.
    pub fn reload(&self) {
        self.0.service.audit.reopen();
        if let Some(tls) = &self.0.tls {
            tls.reload(true);
        }
    }
}

/// How often TLS files are looked at, and what the engine does by itself is written down.
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// Time for a TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Pause after a connection could not be accepted, as when there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

impl Server {
    /// Opens the audit log, reads the TLS files and binds the addresses. What cannot work is refused here: a log that
    /// cannot be written, is locked by another server, or is a file of the key store or of TLS under any name.
    ///
    /// # Errors
    /// `InvalidInput` for plain HTTP on an address that others reach, unless it was asked for; otherwise of the files
    /// and sockets, with their names.
    pub async fn bind(engine: Engine, config: &ServerConfig) -> io::Result<Self> {
        if config.tls.is_none() && !config.plain_http && !config.listen.ip().is_loopback() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is no loopback address, and there is no TLS", config.listen),
            ));
        }
        let tls = config.tls.as_ref().map(Tls::open).transpose()?;
        let listener = bind(config.listen).await?;
        let observer = match config.metrics {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        let service = Arc::new(Service::new(engine, config)?);
        let (draining, _) = watch::channel(false);
        let shared = Arc::new(Shared { service: Arc::clone(&service), tls, draining });
        let workers = Workers::start(config.threads.get())?;
        Ok(Self { service, shared, listener, observer, workers, config: config.clone() })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket has an address")
    }

    /// Where `/metrics` is.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        let address = |observer: &TcpListener| observer.local_addr();
        self.observer.as_ref().map(|observer| address(observer).expect("bound"))
    }

    /// Ends or reloads this server.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Serves until [`Handle::drain`]; then waits for what is in progress, for the time that is configured at most.
    /// Returns whether all of it ended in time and no record of the audit log was lost. The end takes a few seconds
    /// more if the audit log cannot be written.
    pub async fn run(self) -> bool {
        let Self { service, shared, listener, observer, workers, config } = self;
        let observing =
            observer.map(|listener| tokio::spawn(observe::serve(Arc::clone(&service), listener)));
        let mut connections = JoinSet::new();
        let places = Arc::new(Semaphore::new(config.connections_max));
        let mut draining = shared.draining.subscribe();
        let mut ticks = tokio::time::interval(TICK_INTERVAL);
        loop {
            tokio::select! {
                biased;
                // What it returns holds a lock, and would keep this future from being `Send`.
                () = async { drop(draining.wait_for(|draining| *draining).await) } => break,
                _ = ticks.tick() => {
                    service.write_down_due_work();
                    if let Some(tls) = &shared.tls {
                        tls.reload(false);
                    }
                }
                // Takes what has ended out of the set.
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = accept(&listener, &places) => match accepted {
                    Ok((stream, remote, place)) => {
                        let (shared, idle_time) = (Arc::clone(&shared), config.idle_time);
                        let serve = async move {
                            let _place = place;
                            connection(shared, stream, remote, idle_time).await;
                        };
                        connections.spawn_on(serve, workers.next());
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        // From here on connections are refused by the system, and clients try elsewhere.
        drop(listener);
        let all = async {
            while connections.join_next().await.is_some() {}
            service.quiet().await;
        };
        let in_time = tokio::time::timeout(config.drain_time, all).await.is_ok();
        connections.shutdown().await;
        if let Some(observing) = observing {
            observing.abort();
        }
        let close = move || {
            workers.end();
            service.write_down_due_work();
            service.audit.close()
        };
        let lost = tokio::task::spawn_blocking(close).await;
        in_time && lost.is_ok_and(|lost| lost == 0)
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(std::net::TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.expect("nobody closes it");
    let (stream, remote) = listener.accept().await?;
    // Answers are written whole; waiting for more would only delay them.
    let _ = stream.set_nodelay(true);
    Ok((stream.into_std()?, remote, place))
}

async fn connection(
    shared: Arc<Shared>,
    stream: std::net::TcpStream,
    remote: SocketAddr,
    idle_time: Duration,
) {
    // From here on it belongs to the runtime of this thread.
    let stream = match TcpStream::from_std(stream) {
        Ok(stream) => stream,
        Err(error) => return tracing::warn!(%error, "a connection cannot be served"),
    };
    let service = Arc::clone(&shared.service);
    let draining = shared.draining.subscribe();
    let connections = service.metrics.connections.clone();
    connections.inc();
    match &shared.tls {
        None => connection::serve(service, stream, remote, idle_time, draining).await,
        Some(tls) => {
            let handshake = tls.acceptor().accept(stream);
            match tokio::time::timeout(HANDSHAKE_TIME, handshake).await {
                Ok(Ok(stream)) => {
                    connection::serve(service, stream, remote, idle_time, draining).await;
                }
                Ok(Err(error)) => {
                    service.metrics.connections_failed.inc();
                    tracing::debug!(%remote, %error, "a TLS handshake failed");
                }
                Err(_) => service.metrics.connections_failed.inc(),
            }
        }
    }
    connections.dec();
}
