//! What is counted, and its text form for Prometheus.
//!
//! Labels take few values: operations are ours, codes are ours, and no name that a caller sends is one.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::{
    api::{ALL, Api},
    refusal::Limit,
};
use crate::engine::{DueTotals, Engine, StoreHealth};

/// Upper bounds of the latency buckets, in seconds: from 10 microseconds, by 1, 2 and 5.
const LATENCIES: [f64; 19] = [
    10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2,
    0.5, 1.0, 2.0, 5.0, 10.0,
];
/// The code of what was not refused, in the labels.
pub(super) const OK: &str = "OK";
/// The operation of a request that names none of ours.
const OTHER: &str = "other";

/// Every metric of a server.
pub(super) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    items: IntCounterVec,
    /// Of each operation in the order of [`ALL`], looked up once.
    of_api: Vec<OfApi>,
    pub(super) connections: IntGauge,
    pub(super) connections_failed: IntCounter,
    pub(super) connections_evicted: IntCounter,
    handshakes_failed: IntCounterVec,
    certificate_expiry: IntGauge,
    throttled: IntCounterVec,
    pub(super) disabled_clients: IntCounter,
    pub(super) audit_skipped: IntCounter,
    pub(super) panics: IntCounter,
    draining: IntGauge,
    keys_in_progress: IntGauge,
    wraps_left: IntGaugeVec,
    initial_version_uses: IntGauge,
    recycled_bytes: IntGauge,
    resident_bytes: IntGauge,
    audit_failing: IntGauge,
    audit_reopened: IntCounter,
    store: OfStore,
    due: OfDueWork,
}

/// How the engine stands to its store.
struct OfStore {
    age: Gauge,
    failing: IntGauge,
    refusing: IntGauge,
}

/// What the engine did by itself.
struct OfDueWork {
    rotations: IntCounter,
    deletions: IntCounter,
    failures: IntCounter,
    turn: Mutex<()>,
}

struct OfApi {
    requests_done: IntCounter,
    items_done: IntCounter,
    seconds: Histogram,
}

/// What is read when somebody asks.
pub(super) struct Now<'a> {
    pub(super) engine: &'a Engine,
    pub(super) keys_in_progress: u64,
    pub(super) audit_failing: bool,
    pub(super) audit_reopened: u64,
    pub(super) draining: bool,
    /// Unix time.
    pub(super) certificate_expiry: i64,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Self::build().expect("names are good, and each is registered once")
    }

    fn build() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counters = |name, help, labels: &[&str]| -> prometheus::Result<_> {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok(counters)
        };
        let counter = |name, help| -> prometheus::Result<_> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let gauge = |name, help| -> prometheus::Result<_> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let requests = counters(
            "keymill_requests_total",
            "Requests answered, by operation and code",
            &["operation", "code"],
        )?;
        let items = counters(
            "keymill_items_total",
            "Items of requests (a single operation has one), by operation and code",
            &["operation", "code"],
        )?;
        let seconds = HistogramVec::new(
            HistogramOpts::new(
                "keymill_request_seconds",
                "Time from the head of a request to its answer, the wait for its body included",
            )
            .buckets(LATENCIES.to_vec()),
            &["operation"],
        )?;
        registry.register(Box::new(seconds.clone()))?;
        let handshakes_failed = counters(
            "keymill_tls_handshakes_failed_total",
            "TLS handshakes that failed, by what was wrong",
            &["reason"],
        )?;
        let throttled = counters(
            "keymill_throttled_total",
            "Requests answered 429, by the limit that was reached",
            &["limit"],
        )?;
        let wraps_left = IntGaugeVec::new(
            Opts::new(
                "keymill_wraps_left",
                "Wraps that a key version of scheme direct has left of 2^32",
            ),
            &["key_version_id"],
        )?;
        registry.register(Box::new(wraps_left.clone()))?;
        let of_api = |(_, name): &(Api, &str)| OfApi {
            requests_done: requests.with_label_values(&[name, OK]),
            items_done: items.with_label_values(&[name, OK]),
            seconds: seconds.with_label_values(&[name]),
        };
        Ok(Self {
            of_api: ALL.iter().map(of_api).collect(),
            connections: gauge("keymill_connections", "Open connections")?,
            connections_failed: counter(
                "keymill_connections_failed_total",
                "Connections ended by a failed handshake, a breach of HTTP or a time limit",
            )?,
            connections_evicted: counter(
                "keymill_connections_evicted_total",
                "Connections that made room for others when places or file descriptors ran out",
            )?,
            handshakes_failed,
            certificate_expiry: gauge(
                "keymill_tls_certificate_expiry_seconds",
                "Unix time at which the first of the server's certificates expires; 0 without TLS",
            )?,
            throttled,
            disabled_clients: counter(
                "keymill_disabled_client_requests_total",
                "Requests in the name of clients that are disabled",
            )?,
            audit_skipped: counter(
                "keymill_audit_skipped_total",
                "Refusals before authentication that were counted in the audit log, not recorded",
            )?,
            panics: counter("keymill_panics_total", "Panics caught; each is a fault of keymill")?,
            draining: gauge("keymill_draining", "1 while the server ends")?,
            keys_in_progress: gauge("keymill_keys_in_progress", "Data keys being worked on")?,
            initial_version_uses: gauge(
                "keymill_initial_version_uses",
                "Data keys made by GenerateDataKey of keys that rotate, which defeats rotation",
            )?,
            recycled_bytes: gauge(
                "keymill_recycled_bytes",
                "Bytes of memory that wait for the next batches",
            )?,
            resident_bytes: gauge(
                "process_resident_memory_bytes",
                "Memory of the process that lies in RAM; 0 where there is no /proc",
            )?,
            audit_reopened: counter(
                "keymill_audit_reopened_total",
                "Times that the audit log was removed, renamed or cut by others, and gone on with",
            )?,
            audit_failing: gauge(
                "keymill_audit_failing",
                "1 while the audit log cannot be written and key operations are refused",
            )?,
            store: OfStore::register(&registry)?,
            due: OfDueWork::register(&registry)?,
            registry,
            requests,
            items,
            wraps_left,
        })
    }

    /// Counts a request that was answered.
    pub(super) fn count(&self, api: Option<Api>, code: &str, took: Duration) {
        let of_api = api.map(|api| &self.of_api[api.index()]);
        match of_api {
            Some(of_api) if code == OK => of_api.requests_done.inc(),
            _ => self.requests.with_label_values(&[name(api), code]).inc(),
        }
        if let Some(of_api) = of_api {
            of_api.seconds.observe(took.as_secs_f64());
        }
    }

    /// Counts items that ended with one code.
    pub(super) fn count_items(&self, api: Api, code: &str, count: u64) {
        match code {
            OK => self.of_api[api.index()].items_done.inc_by(count),
            _ => self.items.with_label_values(&[name(Some(api)), code]).inc_by(count),
        }
    }

    /// Counts a request that was beyond a limit.
    pub(super) fn count_throttled(&self, limit: Limit) {
        self.throttled.with_label_values(&[limit.as_str()]).inc();
    }

    /// Counts a TLS handshake that failed, which is a connection that failed.
    pub(super) fn count_handshake(&self, reason: &str) {
        self.connections_failed.inc();
        self.handshakes_failed.with_label_values(&[reason]).inc();
    }

    /// Everything, in Prometheus's text format.
    pub(super) fn text(&self, now: &Now<'_>) -> Vec<u8> {
        let Now {
            engine,
            keys_in_progress,
            audit_failing,
            audit_reopened,
            draining,
            certificate_expiry,
        } = *now;
        self.certificate_expiry.set(certificate_expiry);
        let gauge = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.keys_in_progress.set(gauge(keys_in_progress));
        self.audit_failing.set(audit_failing.into());
        self.audit_reopened.inc_by(audit_reopened.saturating_sub(self.audit_reopened.get()));
        self.draining.set(draining.into());
        self.initial_version_uses.set(gauge(engine.initial_version_uses()));
        self.recycled_bytes.set(gauge(engine.recycled_bytes() as u64));
        self.resident_bytes.set(gauge(resident_bytes()));
        self.store.set(&engine.store_health());
        self.due.set(engine.due_totals());
        // Versions that are gone leave no gauge behind.
        self.wraps_left.reset();
        for (version, left) in engine.wraps_left() {
            self.wraps_left.with_label_values(&[version.as_str()]).set(gauge(left));
        }
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("memory takes every byte, and metrics have samples");
        text
    }
}

impl OfStore {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let age = Gauge::new(
            "keymill_store_age_seconds",
            "Time since the key store was last read, or found to be unchanged",
        )?;
        let failing = IntGauge::new(
            "keymill_store_failing",
            "1 while the key store cannot be read, or is not the one that it was",
        )?;
        let refusing = IntGauge::new(
            "keymill_store_refusing",
            "1 while key operations are refused since the key store cannot be read",
        )?;
        registry.register(Box::new(age.clone()))?;
        registry.register(Box::new(failing.clone()))?;
        registry.register(Box::new(refusing.clone()))?;
        Ok(Self { age, failing, refusing })
    }

    fn set(&self, health: &StoreHealth) {
        self.age.set(health.age.as_secs_f64());
        self.failing.set(health.failure.is_some().into());
        self.refusing.set(health.is_refusing.into());
    }
}

impl OfDueWork {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name, help| -> prometheus::Result<_> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        Ok(Self {
            rotations: counter("keymill_due_rotations_total", "Keys rotated by the schedule")?,
            deletions: counter("keymill_due_deletions_total", "Keys deleted by the schedule")?,
            failures: counter(
                "keymill_due_failures_total",
                "Attempts at a rotation or deletion by the schedule that failed",
            )?,
            turn: Mutex::new(()),
        })
    }

    fn set(&self, totals: DueTotals) {
        // Of two who ask at once, one counts.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        for (counter, total) in [
            (&self.rotations, totals.rotations),
            (&self.deletions, totals.deletions),
            (&self.failures, totals.failures),
        ] {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn name(api: Option<Api>) -> &'static str {
    api.map_or(OTHER, Api::as_str)
}
