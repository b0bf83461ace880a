//! `keymill serve`: the KMS's wire protocol on this home's key store, until a signal ends it.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use clap::{ArgAction, ValueEnum, builder::BoolishValueParser, value_parser};
use keymill::{
    Engine, Tier,
    server::{AuditConfig, Handle, Server, ServerConfig, TlsFiles},
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

use crate::{
    failure::{Failure, Result, say},
    home::Home,
    identity::Named,
    logs::{self, Logs},
    variables::named,
};

#[derive(clap::Args)]
#[command(after_help = NOTES)]
pub(crate) struct Args {
    /// Where clients connect: an IP address and a port, of which 0 is one that is free
    #[arg(long, value_name = "ADDR", env = "KEYMILL_LISTEN", hide_env_values = true,
          value_parser = address)]
    listen: SocketAddr,

    /// The server's certificate chain, PEM; read again when it changes
    #[arg(long, value_name = "FILE", env = "KEYMILL_TLS_CERT", hide_env_values = true)]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key, PEM
    #[arg(long, value_name = "FILE", env = "KEYMILL_TLS_KEY", hide_env_values = true)]
    tls_key: Option<PathBuf>,

    /// Ask clients for a certificate that one of these CAs has signed, PEM (mutual TLS; the KMS's
    /// Python SDK has none to show)
    #[arg(long, value_name = "FILE", env = "KEYMILL_CLIENT_CA", hide_env_values = true)]
    client_ca: Option<PathBuf>,

    /// Speak plain HTTP on an address that is not loopback: data keys travel in the clear
    #[arg(long, env = "KEYMILL_PLAIN_HTTP", hide_env_values = true,
          action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    plain_http: bool,

    /// Where /metrics, /healthz and /readyz are, in plain HTTP
    #[arg(long, value_name = "ADDR", env = "KEYMILL_METRICS", hide_env_values = true,
          value_parser = address)]
    metrics: Option<SocketAddr>,

    /// Append a JSON line for each request to FILE. Once it cannot be written, no more keys are made
    #[arg(long, value_name = "FILE", env = "KEYMILL_AUDIT", hide_env_values = true)]
    audit: Option<PathBuf>,

    /// Answer a request only once its record is on disk
    #[arg(long, env = "KEYMILL_AUDIT_SYNC", hide_env_values = true,
          action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    audit_sync: bool,

    /// Size at which the audit log gets the time behind its name and is begun anew
    #[arg(long, value_name = "BYTES", env = "KEYMILL_AUDIT_MAX_BYTES", hide_env_values = true,
          default_value_t = 1 << 30, value_parser = value_parser!(u64).range(1 << 12..))]
    audit_max_bytes: u64,

    /// Most bytes of a batch's body
    #[arg(long, value_name = "BYTES", env = "KEYMILL_BATCH_BODY_MAX", hide_env_values = true,
          default_value_t = 64 << 20, value_parser = value_parser!(u64).range(1..=1 << 30))]
    batch_body_max: u64,

    /// Data keys that are worked on at once, shared by the clients that ask; what is beyond is
    /// answered 429
    #[arg(long, value_name = "N", env = "KEYMILL_KEYS_IN_PROGRESS", hide_env_values = true,
          default_value_t = 1 << 18, value_parser = value_parser!(u64).range(1..))]
    keys_in_progress: u64,

    /// Data keys a second, shared by the clients that ask; what is beyond is answered 429. A batch of
    /// more than 60 seconds of them is refused [default: no limit]
    #[arg(long, value_name = "N", env = "KEYMILL_KEYS_PER_SECOND", hide_env_values = true,
          value_parser = value_parser!(u32).range(1..))]
    keys_per_second: Option<u32>,

    /// Connections at once, as far as the limit of open files allows. A further one takes the place of
    /// the oldest without an authenticated request, else of one that has nothing to do, else it waits
    #[arg(long, value_name = "N", env = "KEYMILL_CONNECTIONS", hide_env_values = true,
          default_value_t = 4096, value_parser = value_parser!(u32).range(1..=1 << 20))]
    connections: u32,

    /// Connections without an authenticated request from one address (IPv6: one /64) beyond which it
    /// makes room for itself when places run out; loopback is exempt [default: an eighth of all]
    #[arg(long, value_name = "N", env = "KEYMILL_CONNECTIONS_PER_SOURCE", hide_env_values = true,
          value_parser = value_parser!(u32).range(1..))]
    connections_per_source: Option<u32>,

    /// Seconds that a new connection has for its first request head, TLS included
    #[arg(long, value_name = "N", env = "KEYMILL_HEAD_SECONDS", hide_env_values = true,
          default_value_t = 5, value_parser = value_parser!(u16).range(1..=3600))]
    head_seconds: u16,

    /// Seconds after which a connection ends if its client reads nothing of an answer
    #[arg(long, value_name = "N", env = "KEYMILL_STALL_SECONDS", hide_env_values = true,
          default_value_t = 10, value_parser = value_parser!(u16).range(1..=3600))]
    stall_seconds: u16,

    /// Seconds that a connection may do nothing
    #[arg(long, value_name = "N", env = "KEYMILL_IDLE_SECONDS", hide_env_values = true,
          default_value_t = 75, value_parser = value_parser!(u16).range(1..))]
    idle_seconds: u16,

    /// Seconds that a server which ends waits for what is in progress
    #[arg(long, value_name = "N", env = "KEYMILL_DRAIN_SECONDS", hide_env_values = true,
          default_value_t = 25, value_parser = value_parser!(u16).range(0..=3600))]
    drain_seconds: u16,

    /// Seconds that keys go on to be made while the key store cannot be read; then they are refused, since clients may
    /// have been disabled meanwhile
    #[arg(long, value_name = "N", env = "KEYMILL_STALE_SECONDS", hide_env_values = true,
          default_value_t = 60, value_parser = value_parser!(u16).range(1..=3600))]
    stale_seconds: u16,

    /// Threads that serve connections [default: as many as CPUs]
    #[arg(long, value_name = "N", env = "KEYMILL_THREADS", hide_env_values = true,
          value_parser = threads)]
    threads: Option<NonZeroUsize>,

    /// What is logged to standard error
    #[arg(long, value_name = "LEVEL", env = "KEYMILL_LOG_LEVEL", hide_env_values = true,
          value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,

    /// How it is written
    #[arg(long, value_name = "FORMAT", env = "KEYMILL_LOG_FORMAT", hide_env_values = true,
          value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

fn threads(text: &str) -> std::result::Result<NonZeroUsize, String> {
    const MAX: usize = 1024;
    let threads = text.parse().ok().filter(|threads: &NonZeroUsize| threads.get() <= MAX);
    threads.ok_or_else(|| format!("threads are 1 to {MAX}"))
}

/// An address and a port, or a sentence that says how to write what was probably meant.
fn address(text: &str) -> std::result::Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let plain = text.trim();
    let plain = plain.split_once("://").map_or(plain, |(_, rest)| rest).trim_end_matches('/');
    let (host, port) = match plain.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() && !host.ends_with(':') => {
            (host, port.to_owned())
        }
        _ if plain.parse::<u16>().is_ok() => ("", plain.to_owned()),
        _ => (plain, "PORT".to_owned()),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let meant = match bare {
        "" | "*" => format!("127.0.0.1:{port}, or 0.0.0.0:{port} for every address"),
        "localhost" => format!("127.0.0.1:{port} or [::1]:{port}"),
        _ => match bare.parse() {
            Ok(IpAddr::V4(ip)) => format!("{ip}:{port}"),
            Ok(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
            Err(_) => "127.0.0.1:8080 or [::1]:8080; names are not looked up".to_owned(),
        },
    };
    Err(format!("an IP address and a port of at most 65535 are needed: {meant}"))
}

#[derive(Clone, Copy, ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

const NOTES: &str = "\
Clients are made with `keymill client create`; keys and clients that are made, changed or disabled
while the server runs show up within a second. One line on standard output says that the server is
ready. SIGTERM and Ctrl-C let what is in progress end and exit 0; a second one ends at once and
exits 2. SIGHUP reads the TLS files again and opens the audit log by its name again.

Every option can be given as the environment variable beside it. A variable that is empty counts as
unset.

The audit log may be a file, which one server at a time locks, appends to and renames when it is
full; or a FIFO, a terminal or /dev/stdout, to which lines are written as they come. A file that is
removed or renamed is noticed within a second, and a new one is begun.

Examples:
  keymill serve --listen 127.0.0.1:8080
  keymill serve --listen 0.0.0.0:8443 --tls-cert server.pem --tls-key server.key \\
    --client-ca clients.pem --metrics 127.0.0.1:9090 --audit /var/log/keymill/audit.jsonl";

pub(crate) fn run(home: &Home, args: &Args) -> Result<()> {
    let config = args.config(home)?;
    args.logs().start();
    let stale_max = Duration::from_secs(args.stale_seconds.into());
    let engine = home.open_with(Engine::builder().stale_max(stale_max))?;
    let tier = engine.tier();
    find_descriptors(config.threads.get())?;
    // Accepts connections and signals; the server has threads of its own for the rest.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Failure::broke(format!("cannot start: {error}"), "check the limits of this machine")
    })?;
    let (in_order, lost) = runtime.block_on(async {
        let mut signals = Signals::catch()?;
        let server = Server::bind(engine, &config).await.map_err(|error| not_started(&error))?;
        tell_start(home, tier, &server, &config);
        announce(&server, &config);
        let handle = server.handle();
        let ended = handle.clone();
        tokio::spawn(async move { signals.obey(&handle).await });
        let in_order = server.run().await;
        Ok::<_, Failure>((in_order, ended.audit_records_lost()))
    })?;
    if in_order {
        return Ok(());
    }
    if lost > 0 {
        return Err(Failure::broke(
            format!("{lost} records of the audit log are lost, of requests that were worked on"),
            "the log says why; --drain-seconds gives requests longer, and the audit log's disk \
             needs room",
        ));
    }
    Err(Failure::broke(
        format!("not everything ended within {} seconds", args.drain_seconds),
        "--drain-seconds gives it longer",
    ))
}

impl Args {
    fn logs(&self) -> Logs {
        let level = match self.log_level {
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
        };
        Logs { level, as_json: matches!(self.log_format, LogFormat::Json) }
    }

    fn config(&self, home: &Home) -> Result<ServerConfig> {
        let mut config = ServerConfig::new(self.listen);
        config.tls = self.tls()?;
        config.plain_http = self.plain_http;
        if config.tls.is_some() && self.plain_http {
            return Err(Failure::refused(
                format!("{} and {} exclude each other", named("--plain-http"), named("--tls-cert")),
                "leave one of them out",
            ));
        }
        if config.tls.is_none() && !self.plain_http && !self.listen.ip().is_loopback() {
            return Err(Failure::refused(
                format!(
                    "{} {} is not loopback, and data keys would travel in the clear",
                    named("--listen"),
                    self.listen
                ),
                "give --tls-cert and --tls-key, or --plain-http if a proxy ends TLS here",
            ));
        }
        config.metrics = self.metrics;
        if self.audit_sync && self.audit.is_none() {
            return Err(Failure::refused(
                format!("{} needs --audit FILE", named("--audit-sync")),
                "name the file, or set KEYMILL_AUDIT",
            ));
        }
        if let Some(path) = &self.audit {
            home.spare_as(&named("--audit"), path)?;
            let tls = [
                ("--tls-cert", &self.tls_cert),
                ("--tls-key", &self.tls_key),
                ("--client-ca", &self.client_ca),
            ];
            for (option, file) in tls {
                if let Some(file) = file {
                    let file = Named::file(&named(option), file);
                    Named::file(&named("--audit"), path).spares(&file, "which would be damaged")?;
                }
            }
            let (sync, max_bytes) = (self.audit_sync, self.audit_max_bytes);
            config.audit = Some(AuditConfig { path: absolute(path)?, sync, max_bytes });
        }
        let too_large = |_| {
            let option = named("--batch-body-max");
            Failure::refused(format!("{option} is too large"), "give a smaller one")
        };
        config.batch_body_max = usize::try_from(self.batch_body_max).map_err(too_large)?;
        config.keys_in_progress_max = self.keys_in_progress;
        config.keys_per_second = self.keys_per_second;
        config.connections_max = self.connections as usize;
        config.source_connections_max = self.connections_per_source.map(|max| max as usize);
        config.head_time = Duration::from_secs(self.head_seconds.into());
        config.stall_time = Duration::from_secs(self.stall_seconds.into());
        if let Some(threads) = self.threads {
            config.threads = threads;
        }
        config.idle_time = Duration::from_secs(self.idle_seconds.into());
        config.drain_time = Duration::from_secs(self.drain_seconds.into());
        Ok(config)
    }

    fn tls(&self) -> Result<Option<TlsFiles>> {
        match (&self.tls_cert, &self.tls_key, &self.client_ca) {
            (None, None, None) => Ok(None),
            (Some(certificate), Some(key), client_ca) => Ok(Some(TlsFiles {
                certificate: absolute(certificate)?,
                key: absolute(key)?,
                client_ca: client_ca.as_deref().map(absolute).transpose()?,
            })),
            (None, None, Some(_)) => Err(Failure::refused(
                format!("{} needs TLS", named("--client-ca")),
                "give --tls-cert and --tls-key, too",
            )),
            _ => Err(Failure::refused(
                format!("{} and {} need each other", named("--tls-cert"), named("--tls-key")),
                "give both; `--help` has an example",
            )),
        }
    }
}

/// The same after a change of directory.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Failure::file("cannot use", path, &error))
}

fn not_started(error: &io::Error) -> Failure {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "another program listens there; choose another port",
        io::ErrorKind::AddrNotAvailable => "this machine has no such address",
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 and other users' files need permission"
        }
        io::ErrorKind::InvalidData => "TLS files are PEM, and the server's user has to read them",
        io::ErrorKind::NotFound => "check the path; the directory must exist",
        io::ErrorKind::ResourceBusy => "end the other process, or name another file",
        _ => "check addresses and files; `--help` has an example",
    };
    Failure::broke(format!("cannot serve: {error}"), hint)
}

/// Refuses to start where not even the server's own descriptors can be opened: its runtimes would panic.
fn find_descriptors(threads: usize) -> Result<()> {
    const OTHERS: usize = 16;
    const PER_THREAD: usize = 4;
    let needed = OTHERS + PER_THREAD * threads;
    let opened: io::Result<Vec<_>> = (0..needed).map(|_| File::open("/dev/null")).collect();
    match opened {
        // A container without devices is no reason.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::broke(
            format!("cannot open the {needed} descriptors that the server itself needs: {error}"),
            "raise the limit of open files (`ulimit -n`, LimitNOFILE=, --ulimit nofile=), or give \
             fewer --threads",
        )),
        _ => Ok(()),
    }
}

/// What runs, and within which limits, for whoever reads the log later.
fn tell_start(home: &Home, tier: Tier, server: &Server, config: &ServerConfig) {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        tier = %tier,
        store = ?home.store(),
        tls = config.tls.is_some(),
        threads = config.threads,
        connections = server.connections_max(),
        batch_body_max = config.batch_body_max,
        keys_in_progress = config.keys_in_progress_max,
        keys_per_second = config.keys_per_second,
        idle_seconds = config.idle_time.as_secs(),
        head_seconds = config.head_time.as_secs(),
        stall_seconds = config.stall_time.as_secs(),
        "serving"
    );
}

/// The line that says that the server is ready. Whoever started it may have closed standard output, or may not read it:
/// it is written by a thread of its own, and the server goes on. It goes to standard error where standard output is
/// the audit log.
fn announce(server: &Server, config: &ServerConfig) {
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let mut line = format!("keymill: ready on {scheme}://{}", server.address());
    if let Some(metrics) = server.metrics_address() {
        line.push_str(&format!(", metrics on http://{metrics}"));
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "{}", &line["keymill: ".len()..]);
    if config.audit.as_ref().is_some_and(|audit| is_stdout(&audit.path)) {
        return say(&line["keymill: ".len()..]);
    }
    line.push('\n');
    let write = move || {
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()) {
            tracing::warn!(%error, "cannot write the ready line to standard output");
        }
    };
    // A short line into a pipe that was opened just now finds room: without a thread it is written here.
    if thread::Builder::new().name("keymill-ready".into()).spawn(write.clone()).is_err() {
        write();
    }
}

/// Whether `path` is what standard output goes to, under any name.
fn is_stdout(path: &Path) -> bool {
    let stdout = io::stdout().as_fd().try_clone_to_owned().map(fs::File::from);
    let (Ok(stdout), Ok(there)) = (stdout.and_then(|file| file.metadata()), fs::metadata(path))
    else {
        return false;
    };
    (stdout.dev(), stdout.ino()) == (there.dev(), there.ino())
}

struct Signals {
    end: [Signal; 2],
    reload: Signal,
}

impl Signals {
    fn catch() -> Result<Self> {
        let catch = |kind| {
            signal(kind).map_err(|error| {
                Failure::broke(format!("cannot catch signals: {error}"), "try again")
            })
        };
        Ok(Self {
            end: [catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?],
            reload: catch(SignalKind::hangup())?,
        })
    }

    /// Obeys signals. The second one that asks for the end ends at once.
    async fn obey(&mut self, handle: &Handle) {
        let mut ending = false;
        loop {
            let [terminate, interrupt] = &mut self.end;
            tokio::select! {
                _ = self.reload.recv() => {
                    handle.reload();
                    continue;
                }
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if ending {
                say("ended before everything in progress was done");
                logs::flush();
                process::exit(2);
            }
            ending = true;
            tracing::info!("draining");
            handle.drain();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn an_address_that_cannot_be_used_is_told_how_to_write_it() {
        for good in ["127.0.0.1:0", "[::1]:8080", "0.0.0.0:65535"] {
            assert_eq!(address(good).unwrap().to_string(), good);
        }
        for (bad, meant) in [
            ("localhost:8080", "127.0.0.1:8080 or [::1]:8080"),
            (":8080", "127.0.0.1:8080, or 0.0.0.0:8080"),
            ("*:8080", "0.0.0.0:8080"),
            ("8080", "127.0.0.1:8080"),
            ("127.0.0.1", "127.0.0.1:PORT"),
            ("::1", "[::1]:PORT"),
            ("::1:8080", "[::1]:8080"),
            ("[::1]", "[::1]:PORT"),
            ("http://127.0.0.1:8080/", "127.0.0.1:8080"),
            ("https://localhost:8443", "127.0.0.1:8443"),
            ("kms.example.org:443", "names are not looked up"),
            ("127.0.0.1:80800", "at most 65535"),
            ("", "127.0.0.1:PORT"),
        ] {
            let sentence = address(bad).unwrap_err();
            assert!(sentence.contains(meant), "{bad:?}: {sentence}");
        }
    }
}
