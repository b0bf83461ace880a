//! From a request to its answer: head, signature, body, operation, response, and what is written down about it.
//!
//! Knows nothing of sockets: tests and fuzz targets call it with heads and bodies of their own.

use std::{
    future::Future,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use aws_lc_rs::digest;
use bytes::Bytes;
use hyper::{
    Request, Response, StatusCode,
    body::Body,
    header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER},
    http::request::Parts,
};

use tokio::sync::watch;

use super::{
    ServerConfig,
    admission::{Account, Admission, Held},
    api::Api,
    audit::{self, Audit, Event, Record, Slot, Taboo},
    auth::{Signer, Signers},
    body, encode,
    failures::Quota,
    head::{Claims, Head, MEDIA_TYPE, VERSION_HEADER, body_hash_refused},
    metrics::{Metrics, Now, OK},
    refusal::Refusal,
    threads::Threads,
    work::{Done, Work},
};
use crate::{
    clients::ClientId,
    engine::{DueEvent, DueEventKind, Engine},
    error::{Error, ErrorKind},
    limits::{SERVER_BODY_LEN_MAX, SERVER_LIGHT_BODY_LEN_MAX},
    request_id::RequestId,
};

/// The KMS on an engine, without a listener. One for a server, or for a test.
pub struct Service {
    engine: Engine,
    signers: Signers,
    batch_body_max: usize,
    /// Requests that go on without their connections, until they are written down.
    elsewhere: watch::Sender<usize>,
    pub(super) admission: Admission,
    /// For work that may wait.
    pub(super) threads: Threads,
    pub(super) metrics: Metrics,
    pub(super) audit: Audit,
    /// Of the log, for what others can cause.
    pub(super) breaches: Quota,
    pub(super) handshakes: Quota,
    pub(super) not_accepted: Quota,
    /// Unix time of the first of the server's certificates; 0 without TLS.
    pub(super) certificate_expiry: Arc<AtomicI64>,
}

/// What a connection is told of its requests.
pub(super) trait Watch {
    /// A request with a good signature came.
    fn authenticated(&self) {}
    /// Its body came, too.
    fn received(&self) {}
}

/// Nobody.
struct Unwatched;

impl Watch for Unwatched {}

/// An authenticated request.
struct Call {
    head: Head,
    signer: Arc<Signer>,
    /// Its body.
    _held: Held,
}

/// How far a request has come.
enum Progress {
    Done(Done),
    Elsewhere(Job),
}

/// Work for a thread that may wait.
struct Job {
    call: Call,
    body: Asked,
}

/// A body, read or not.
enum Asked {
    Read(Work),
    Unread(Bytes),
}

/// Counts a request that goes on without its connection.
struct Elsewhere(Arc<Service>);

impl Elsewhere {
    fn begin(service: &Arc<Service>) -> Self {
        service.elsewhere.send_modify(|count| *count += 1);
        Self(Arc::clone(service))
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.0.elsewhere.send_modify(|count| *count -= 1);
    }
}

/// What the records tell of a request beside its result.
struct Facts {
    remote: SocketAddr,
    start: Instant,
    /// Whose request it was, once that is known.
    client: Option<Arc<Signer>>,
    /// The place of its record, once there is one.
    slot: Option<Slot>,
}

impl Facts {
    fn account(&self) -> Option<Arc<Account>> {
        self.client.as_ref().map(|signer| Arc::clone(&signer.account))
    }
}

impl Service {
    /// A service on `engine`.
    ///
    /// # Errors
    /// Of the audit log, if it cannot be opened, locked or written.
    pub fn new(engine: Engine, config: &ServerConfig) -> std::io::Result<Self> {
        let audit = match &config.audit {
            Some(audit) => Audit::open(audit, taboo(&engine, config), start_event(config))?,
            None => Audit::none(),
        };
        Ok(Self {
            signers: Signers::new(&engine),
            engine,
            batch_body_max: config.batch_body_max,
            elsewhere: watch::Sender::new(0),
            admission: Admission::new(config.keys_in_progress_max, config.keys_per_second),
            threads: Threads::default(),
            metrics: Metrics::new(),
            audit,
            breaches: Quota::default(),
            handshakes: Quota::default(),
            not_accepted: Quota::default(),
            certificate_expiry: Arc::default(),
        })
    }

    /// Answers a request. Needs a tokio runtime, whose blocking threads do long work.
    pub async fn answer<B>(self: &Arc<Self>, request: Request<B>) -> Response<Bytes>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let (parts, body) = request.into_parts();
        self.answer_parts(parts, pin!(body), nowhere, &Unwatched).await.0
    }

    /// Answers a request from `remote`, and tells on whose account. What is left of the body then was not on its way,
    /// or would take too long.
    pub(super) async fn answer_parts<B>(
        self: &Arc<Self>,
        parts: Parts,
        mut body: Pin<&mut B>,
        remote: SocketAddr,
        watcher: &impl Watch,
    ) -> (Response<Bytes>, Option<Arc<Account>>)
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let start = Instant::now();
        let mut facts = Facts { client: None, slot: None, remote, start };
        let work = self.perform(&parts, body.as_mut(), watcher, &mut facts);
        let refused = match catch_panic(work).await {
            Some(Ok(Progress::Done(done))) => {
                let account = facts.account();
                return (self.finish(&parts, facts, Ok(done)).await, account);
            }
            Some(Ok(Progress::Elsewhere(job))) => {
                let account = facts.account();
                return (self.finish_elsewhere(parts, facts, job).await, account);
            }
            Some(Err(refusal)) => Err(refusal),
            None => self.panicked(),
        };
        let account = facts.account();
        let response = self.finish(&parts, facts, refused).await;
        body::discard(&parts, body, self.batch_body_max.max(2 * SERVER_BODY_LEN_MAX)).await;
        (response, account)
    }

    /// Does what a request asks for, or finds that this is for another thread. `facts` holds what is known of the
    /// request, also if it is refused later.
    async fn perform<B>(
        self: &Arc<Self>,
        parts: &Parts,
        body: Pin<&mut B>,
        watcher: &impl Watch,
        facts: &mut Facts,
    ) -> Result<Progress, Refusal>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.admission.look()?;
        let head = Head::read(parts, SystemTime::now(), self.batch_body_max)?;
        let disabled = || self.metrics.disabled_clients.inc();
        let signer = self.signers.claimed(&self.engine, &head, disabled)?;
        // Before the signature, whose check is most of a request's cost.
        self.admission.look_at(&signer.account)?;
        signer.verify(&head)?;
        watcher.authenticated();
        facts.client = Some(Arc::clone(&signer));
        let api = head.api;
        if !signer.client.permissions.contains(api.permission()) {
            return Err(Refusal::operation(api.as_str()));
        }
        let mut held = self.admission.hold(Some(&signer.account));
        let body = body::read(body, api.body_max(self.batch_body_max), &mut held).await?;
        watcher.received();
        // Not before: whoever sends many bodies slowly would hold places that others need.
        facts.slot = Some(self.audit.reserve()?);
        let call = Call { head, signer, _held: held };
        if !api.is_batch() && body.len() <= SERVER_LIGHT_BODY_LEN_MAX {
            let work = call.decode(body)?;
            if work.is_at_hand(&self.engine) {
                return self.run(&call, work).map(Progress::Done);
            }
            return Ok(Progress::Elsewhere(Job { call, body: Asked::Read(work) }));
        }
        Ok(Progress::Elsewhere(Job { call, body: Asked::Unread(body) }))
    }

    /// Works on a thread that may wait. Goes on to its end, and to its record, also if the client goes away meanwhile.
    async fn finish_elsewhere(
        self: &Arc<Self>,
        parts: Parts,
        facts: Facts,
        job: Job,
    ) -> Response<Bytes> {
        let service = Arc::clone(self);
        let elsewhere = Elsewhere::begin(self);
        let finished = tokio::spawn(async move {
            let _elsewhere = elsewhere;
            let worker = Arc::clone(&service);
            let run = move || {
                let Job { call, body } = job;
                let work = match body {
                    Asked::Read(work) => work,
                    Asked::Unread(body) => call.decode(body)?,
                };
                worker.run(&call, work)
            };
            let result = service.threads.run(run).await;
            let result = result.unwrap_or_else(|| service.panicked());
            service.finish(&parts, facts, result).await
        });
        match finished.await {
            Ok(response) => response,
            Err(_) => self.respond(None, self.panicked(), self.new_request_id()),
        }
    }

    /// Lets the work in and does it.
    fn run(&self, call: &Call, work: Work) -> Result<Done, Refusal> {
        let Call { head, signer, .. } = call;
        let done = self.admission.take(&signer.account, work.cost()).and_then(|admitted| {
            let done = work.run(&self.engine, &signer.client, head.version.as_deref())?;
            admitted.settle(done.tally.cost());
            Ok(done)
        });
        done.map_err(|refusal| Refusal { asked: work.asked(), ..refusal })
    }

    /// A panic is a refusal: the next request finds everything as before, since the engine keeps its own state whole.
    fn panicked(&self) -> Result<Done, Refusal> {
        self.metrics.panics.inc();
        tracing::error!("a panic was caught; please report it");
        Err(Refusal::internal())
    }

    /// Writes down what became of a request, and makes its response.
    async fn finish(
        &self,
        parts: &Parts,
        facts: Facts,
        mut result: Result<Done, Refusal>,
    ) -> Response<Bytes> {
        let Facts { client, slot, remote, start } = facts;
        // A client that is known is recorded whatever became of its request, as long as there is room.
        let slot = match (slot, &client) {
            (None, Some(_)) => self.audit.reserve().ok(),
            (slot, _) => slot,
        };
        let claims = Claims::of(parts);
        let request_id = match &result {
            Ok(done) => done.request_id,
            Err(refusal) => refusal.request_id.unwrap_or_else(|| self.new_request_id()),
        };
        if !self.audit.is_off() {
            let authenticated = client.as_ref().map(|signer| signer.client.client_id.as_str());
            let record = |skipped| {
                record(&claims, authenticated, remote, request_id, &result, start, skipped)
            };
            match slot {
                Some(slot) => {
                    if !slot.fill(record(None)).wait().await {
                        // Whoever answers after the record is on disk answers nothing that has none.
                        result = Err(Refusal::unavailable());
                    }
                }
                None => {
                    if !self.audit.record_refusal(record) {
                        self.metrics.audit_skipped.inc();
                    }
                }
            }
        }
        self.count(claims.api, &result, start.elapsed());
        log_refusal(&claims, &result, remote, request_id);
        self.respond(claims.api, result, request_id)
    }

    fn count(&self, api: Option<Api>, result: &Result<Done, Refusal>, took: Duration) {
        match result {
            Ok(done) => {
                self.metrics.count(api, OK, took);
                for (code, count) in &done.tally.codes {
                    if let Some(api) = api {
                        self.metrics.count_items(api, code, *count);
                    }
                }
            }
            Err(refusal) => {
                self.metrics.count(api, refusal.code, took);
                if let Some((limit, _)) = refusal.throttled {
                    self.metrics.count_throttled(limit);
                }
            }
        }
    }

    fn respond(
        &self,
        api: Option<Api>,
        result: Result<Done, Refusal>,
        request_id: RequestId,
    ) -> Response<Bytes> {
        let media_type = HeaderValue::from_static(MEDIA_TYPE);
        let mut response = match result {
            Ok(done) => {
                let mut response = Response::new(done.body);
                let version = done.version.filter(|_| api.is_some_and(Api::names_version));
                if let Some(version) = version {
                    let value = HeaderValue::from_str(version.as_str()).expect("plain ASCII");
                    response.headers_mut().insert(VERSION_HEADER, value);
                }
                response
            }
            Err(refusal) => {
                let mut text = RequestId::TEXT;
                let body = encode::body(&refusal.fields(request_id.encode(&mut text)));
                let mut response = Response::new(body);
                let status = StatusCode::from_u16(refusal.status).expect("one of ours");
                *response.status_mut() = status;
                let headers = response.headers_mut();
                match status {
                    StatusCode::METHOD_NOT_ALLOWED => {
                        headers.insert(ALLOW, HeaderValue::from_static("POST"));
                    }
                    StatusCode::TOO_MANY_REQUESTS => {
                        let seconds = refusal.throttled.map_or(1, |(_, seconds)| seconds);
                        headers.insert(RETRY_AFTER, seconds.into());
                    }
                    _ => {}
                }
                response
            }
        };
        response.headers_mut().insert(CONTENT_TYPE, media_type);
        response
    }

    fn new_request_id(&self) -> RequestId {
        self.engine.request_id().unwrap_or(RequestId::NIL)
    }

    /// Writes down what the engine has done by itself. Without an audit log that is left to whoever asks the engine.
    pub(super) fn write_down_due_work(&self) {
        if self.audit.is_off() {
            return;
        }
        for event in self.engine.take_due_events() {
            self.audit.tell(due_record(&event));
        }
    }

    /// Waits until all that goes on without a connection has ended and is written down.
    pub(super) async fn quiet(&self) {
        // The sender lives as long as `self`.
        drop(self.elsewhere.subscribe().wait_for(|count| *count == 0).await);
    }

    /// Whether the service answers key operations, and how well; or why not.
    ///
    /// One failed look at the store is no reason to send clients elsewhere: the restart of what it lies on would send
    /// them away from every server at once. Damage and a replaced file do not pass by themselves.
    pub(super) fn readiness(&self) -> Result<&'static str, &'static str> {
        if self.admission.is_draining() {
            return Err("draining");
        }
        if self.audit.is_failing() {
            return Err("the audit log cannot be written");
        }
        let store = self.engine.store_health();
        if store.is_grave {
            return Err("the key store is damaged, missing, or another one than before");
        }
        let late = store.age > self.engine.stale_max() / 2;
        if store.is_refusing || (store.failure.is_some() && late) {
            return Err("the key store cannot be read");
        }
        match store.failure {
            Some(_) => Ok("degraded: the key store cannot be read at the moment"),
            None => Ok("ready"),
        }
    }

    /// Every metric, in Prometheus's text format.
    pub(super) fn metrics_text(&self) -> Vec<u8> {
        self.metrics.text(&Now {
            engine: &self.engine,
            keys_in_progress: self.admission.in_progress(),
            audit_failing: self.audit.is_failing(),
            audit_reopened: self.audit.reopened(),
            draining: self.admission.is_draining(),
            certificate_expiry: self.certificate_expiry.load(Ordering::Relaxed),
        })
    }
}

impl Call {
    /// Reads the body, once it is the one that was signed.
    fn decode(&self, body: Bytes) -> Result<Work, Refusal> {
        // Compared as public values: the hash stands in the head.
        if digest::digest(&digest::SHA256, &body).as_ref() != self.head.body_hash {
            return Err(body_hash_refused());
        }
        Work::decode(self.head.api, body)
    }
}

/// A future's result, or `None` if it panicked.
async fn catch_panic<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    std::future::poll_fn(|context| {
        let poll = AssertUnwindSafe(|| future.as_mut().poll(context));
        match catch_unwind(poll) {
            Ok(poll) => poll.map(Some),
            Err(_) => std::task::Poll::Ready(None),
        }
    })
    .await
}

/// The files that an audit log must not be.
fn taboo(engine: &Engine, config: &ServerConfig) -> Taboo {
    let mut taboo = Taboo::default();
    for file in engine.store_files() {
        taboo.add(&file, "a file of the key store");
    }
    if let Some(tls) = &config.tls {
        taboo.add(&tls.certificate, "the server's certificate");
        taboo.add(&tls.key, "the server's private key");
        if let Some(client_ca) = &tls.client_ca {
            taboo.add(client_ca, "the file of client CAs");
        }
    }
    taboo
}

/// What is written first: who writes, and what it was told.
fn start_event(config: &ServerConfig) -> Event {
    let sync = config.audit.as_ref().is_some_and(|audit| audit.sync);
    Event::new("Start", "server")
        .with("version", env!("CARGO_PKG_VERSION"))
        .with("process", std::process::id())
        .with("listen", config.listen.to_string())
        .with("tls", config.tls.is_some())
        .with("sync", sync)
        .with("keys_in_progress_max", config.keys_in_progress_max)
        .with("keys_per_second", config.keys_per_second)
        .with("connections_max", config.connections_max)
}

/// What the engine did by itself, as a line: the key, and when that was due.
fn due_record(event: &DueEvent) -> Event {
    let operation = match event.kind {
        DueEventKind::Deleted | DueEventKind::DeletionFailed { .. } => "DeleteKey",
        _ => "RotateKey",
    };
    let line = Event::new(operation, "schedule")
        .at(event.time)
        .with("key_id", event.key_id.as_str())
        .with("due", event.due.map(audit::time_text));
    match &event.kind {
        DueEventKind::Rotated { key_version_id } => {
            line.with("code", OK).with("key_version_id", key_version_id.as_str())
        }
        DueEventKind::Deleted => line.with("code", OK),
        DueEventKind::RotationFailed { error } | DueEventKind::DeletionFailed { error } => {
            line.with("code", error.code()).with("message", error.message())
        }
    }
}

fn record(
    claims: &Claims<'_>,
    authenticated: Option<&str>,
    remote: SocketAddr,
    request_id: RequestId,
    result: &Result<Done, Refusal>,
    start: Instant,
    refusals_skipped: Option<u64>,
) -> Record {
    let (status, codes, keys, requested) = match result {
        Ok(done) => {
            let keys = done.tally.keys.iter().map(|(key, count)| (key.to_string(), *count));
            let codes = done.tally.codes.iter().copied().collect();
            (200, codes, keys.collect(), done.tally.asked.clone())
        }
        Err(refusal) => {
            let requested = refusal.asked.iter().cloned().collect();
            (refusal.status, [(refusal.code, 1)].into(), Default::default(), requested)
        }
    };
    Record {
        time: audit::time_now(),
        request_id: request_id.to_string(),
        client_id: match authenticated {
            Some(id) => id.to_owned(),
            // A stranger's text may be a command to the terminal that shows the log, or another client's look-alike.
            None => ClientId::parse(claims.client).map(|id| id.to_string()).unwrap_or_default(),
        },
        authenticated: authenticated.is_some(),
        remote: remote.to_string(),
        operation: claims.api.map_or("other", Api::as_str),
        status,
        codes,
        keys,
        requested,
        duration_us: u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX),
        refusals_skipped,
    }
}

/// Faults of ours are told loudly, those of others quietly.
fn log_refusal(
    claims: &Claims<'_>,
    result: &Result<Done, Refusal>,
    remote: SocketAddr,
    request_id: RequestId,
) {
    let Err(Refusal { status, code, message, .. }) = result else { return };
    let operation = claims.api.map_or("other", Api::as_str);
    if *status >= 500 && *code != Error::plain(ErrorKind::DecryptFailed).code() {
        tracing::warn!(%request_id, %remote, operation, status, code, %message, "refused");
    } else {
        tracing::debug!(%request_id, %remote, operation, status, code, %message, "refused");
    }
}
