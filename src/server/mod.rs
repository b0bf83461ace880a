//! The KMS's wire protocol on HTTP: what `keymill serve` runs. Unmodified SDKs of the KMS drive it.
//!
//! `POST /` with protobuf bodies, signed by clients' RSA keys ([`proto`] has the messages; SECURITY.md says what the
//! protocol protects and what it does not), and batches in the same style, one signed request for up to 65,536 keys.
//!
//! [`Service`] answers requests; [`Server`] puts it on a socket, with TLS, limits and clocks, and ends it in order. The
//! rooms: `head` and `auth` (who asks for what), `work` and `batch` (the operations), `body` and `encode` (what comes
//! and what goes), `refusal` (errors), `admission` (load), `audit` and `metrics`, `places` and `descriptors` (how many
//! connections), `handshake`, `connection`, `clocks` and `traffic` (one of them), `tls`, `certificate` and `pem`,
//! `failures`, `workers` and `observe`.
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
mod certificate;
mod clocks;
mod connection;
mod descriptors;
mod encode;
mod failures;
mod handshake;
mod head;
mod metrics;
mod observe;
mod pem;
mod places;
pub mod proto;
mod rate;
mod refusal;
mod service;
mod threads;
mod tls;
mod traffic;
mod work;
mod workers;

use std::{io, net::SocketAddr, num::NonZeroUsize, sync::Arc, thread, time::Duration};

use tokio::{net::TcpListener, sync::watch, task::JoinSet};

pub use audit::AuditConfig;
pub use service::Service;
pub use tls::TlsFiles;

use crate::{
    engine::Engine,
    limits::{
        SERVER_BATCH_BODY_LEN_DEFAULT, SERVER_CONNECTIONS_DEFAULT, SERVER_HEAD_TIME_DEFAULT,
        SERVER_KEYS_IN_PROGRESS_DEFAULT, SERVER_SOURCE_CONNECTIONS_MIN, SERVER_SOURCE_PART,
        SERVER_STALL_TIME_DEFAULT,
    },
};
use clocks::Times;
use descriptors::Connections;
use places::Places;
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
    /// Connections at once, as far as the process may open files. A further one takes the place of the oldest that has
    /// sent no authenticated request, else of one that has nothing to do, else it waits.
    pub connections_max: usize,
    /// Connections without an authenticated request from one address (IPv6: one /64 network) beyond which it makes room
    /// for itself. Counts only when places run out, and not for loopback. `None` is an eighth of all places.
    pub source_connections_max: Option<usize>,
    /// Threads that serve connections, each of which stays on one of them.
    pub threads: NonZeroUsize,
    /// How long a connection may do nothing.
    pub idle_time: Duration,
    /// How long a new connection has for its first head, TLS included, and every later head from its first byte on.
    pub head_time: Duration,
    /// How long nothing of an answer may leave a connection.
    pub stall_time: Duration,
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
            source_connections_max: None,
            threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            idle_time: Duration::from_secs(75),
            head_time: SERVER_HEAD_TIME_DEFAULT,
            stall_time: SERVER_STALL_TIME_DEFAULT,
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
    connections: Connections,
    config: ServerConfig,
}

/// What a handle reaches.
struct Shared {
    service: Arc<Service>,
    tls: Option<Tls>,
    places: Arc<Places>,
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
/// Pause after a connection could not be accepted, as when there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

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
        let connections = Connections::within_limit(config);
        let part = connections.clients / SERVER_SOURCE_PART;
        let of_source = config.source_connections_max;
        let of_source = of_source.unwrap_or(part.max(SERVER_SOURCE_CONNECTIONS_MIN));
        let places = Places::new(connections.clients, of_source);
        if let Some(tls) = &tls {
            tls.tell_expiry(&service.certificate_expiry);
        }
        let shared = Arc::new(Shared { service: Arc::clone(&service), tls, places, draining });
        let workers = Workers::start(config.threads.get());
        let config = config.clone();
        Ok(Self { service, shared, listener, observer, workers, connections, config })
    }

    /// Connections at once: those of the configuration, or what the limit of open files leaves of them.
    pub fn connections_max(&self) -> usize {
        self.connections.clients
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
        let Self { service, shared, listener, observer, workers, connections, config } = self;
        let observing = observer.map(|listener| {
            tokio::spawn(observe::serve(Arc::clone(&shared), listener, connections.watchers))
        });
        let mut connections = JoinSet::new();
        let times =
            Times { idle: config.idle_time, head: config.head_time, stall: config.stall_time };
        let mut draining = shared.draining.subscribe();
        let mut ticks = tokio::time::interval(TICK_INTERVAL);
        // Accepted, and without a place yet.
        let mut newcomer: Option<(std::net::TcpStream, SocketAddr)> = None;
        loop {
            let remote = newcomer.as_ref().map(|(_, remote)| *remote);
            tokio::select! {
                biased;
                // What it returns holds a lock, and would keep this future from being `Send`.
                () = async { drop(draining.wait_for(|draining| *draining).await) } => break,
                _ = ticks.tick() => shared.tick(),
                // Takes what has ended out of the set.
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                place = shared.place(remote), if remote.is_some() => {
                    let Some((stream, remote)) = newcomer.take() else { continue };
                    let shared = Arc::clone(&shared);
                    let serve = handshake::connection(shared, stream, remote, times, place);
                    connections.spawn_on(serve, &workers.next());
                }
                accepted = accept(&listener), if remote.is_none() => match accepted {
                    Ok(accepted) => newcomer = Some(accepted),
                    Err(error) => shared.not_accepted(&error).await,
                },
            }
        }
        // From here on connections are refused by the system, and clients try elsewhere.
        drop((listener, newcomer));
        let all = async {
            while connections.join_next().await.is_some() {}
            service.quiet().await;
        };
        let in_time = tokio::time::timeout(config.drain_time, all).await.is_ok();
        connections.shutdown().await;
        if let Some(observing) = observing {
            observing.abort();
        }
        let closing = Arc::clone(&service);
        let close = move || {
            workers.end();
            closing.write_down_due_work();
            closing.audit.close()
        };
        let lost = service.threads.run(close).await;
        in_time && lost.is_some_and(|lost| lost == 0)
    }
}

impl Shared {
    /// What is looked at all the time.
    fn tick(&self) {
        self.service.write_down_due_work();
        self.places.recover();
        if let Some(tls) = &self.tls {
            tls.reload(false);
            tls.tell_expiry(&self.service.certificate_expiry);
        }
        if let Some(count) = self.service.breaches.rest() {
            tracing::info!(count, "further connections failed");
        }
        if let Some(count) = self.service.handshakes.rest() {
            tracing::info!(count, "further TLS handshakes failed");
        }
    }

    /// A place for a connection from `remote`, once there is one.
    async fn place(&self, remote: Option<SocketAddr>) -> places::Place {
        match remote {
            Some(remote) => self.places.take(remote).await,
            None => std::future::pending().await,
        }
    }

    /// Makes room if file descriptors ran out, and lets a moment pass.
    async fn not_accepted(&self, error: &io::Error) {
        // ECONNABORTED and its like: that client has gone, and the next one waits.
        if error.kind() == io::ErrorKind::ConnectionAborted {
            return;
        }
        let made_room = self.places.make_room();
        if let Some(not_logged) = self.service.not_accepted.take("accept") {
            tracing::warn!(%error, made_room, not_logged, "a connection cannot be accepted");
        }
        // Whoever made room is gone in a moment.
        let pause = if made_room { ACCEPT_PAUSE / 10 } else { ACCEPT_PAUSE };
        tokio::time::sleep(pause).await;
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))
}

async fn accept(listener: &TcpListener) -> io::Result<(std::net::TcpStream, SocketAddr)> {
    let (stream, remote) = listener.accept().await?;
    // Answers are written whole; waiting for more would only delay them.
    let _ = stream.set_nodelay(true);
    Ok((stream.into_std()?, remote))
}
