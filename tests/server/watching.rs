//! What is written down about requests: the audit log, metrics, and whether the server is well.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use keymill::{
    CreateKey, Engine, RootKey, RotationPeriod,
    server::{
        AuditConfig, Server,
        proto::{
            BatchResponse, DecryptRequest, DecryptResponse, GenerateDataKeyResponse,
            GenerateRandomRequest, GenerateRandomResponse,
        },
    },
};
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, sleep},
};

use crate::{
    client::{SIGNER, advance_generate, batch, create_client, fill, generate},
    running::{Http1, PATIENCE, Running},
};

const RANDOM: GenerateRandomRequest = GenerateRandomRequest { length: 32 };

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Of requests: without what the server did by itself.
fn records(path: &Path) -> Vec<Value> {
    lines(path).into_iter().filter(|line| line["by"].is_null()).collect()
}

fn wraps_granted(server: &Running) -> u64 {
    server.engine.describe_key("alias/direct").unwrap().initial_version().wraps_granted
}

/// A directory with an audit log.
struct Log(tempfile::TempDir);

impl Log {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("audit.jsonl")
    }

    async fn serve(&self, sync: bool) -> Running {
        let (path, max_bytes) = (self.path(), u64::MAX);
        Running::with(|config| config.audit = Some(AuditConfig { path, sync, max_bytes })).await
    }

    /// Waits until there are so many records.
    async fn wait_for(&self, count: usize) -> Vec<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let records = records(&self.path());
            if records.len() >= count {
                return records;
            }
            assert!(Instant::now() < deadline, "{} records, not {count}", records.len());
            sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_has_one_record() {
    let log = Log::new();
    let server = log.serve(true).await;
    let id = |alias: &str| server.engine.describe_key(alias).unwrap().key_id.to_string();
    let (derived, direct) = (id("alias/derived"), id("alias/direct"));
    let mut expected: Vec<(String, &str, u16, bool, Value, Value)> = Vec::new();

    let one = server.ask("GenerateDataKey", &generate("alias/direct", 32)).await;
    let one: GenerateDataKeyResponse = one.done();
    let keys = json!({ &direct: 1 });
    expected.push((one.request_id.clone(), "GenerateDataKey", 200, true, json!({"OK": 1}), keys));

    let names = ["alias/direct", "alias/derived", "alias/none", "alias/direct"];
    let many = batch(names.map(|name| advance_generate(name, 32)));
    let many: BatchResponse<GenerateDataKeyResponse> =
        server.ask("BatchAdvanceGenerateDataKey", &many).await.done();
    expected.push((
        many.request_id.clone(),
        "BatchAdvanceGenerateDataKey",
        200,
        true,
        json!({"OK": 3, "Forbidden.KeyNotFound": 1}),
        json!({ &direct: 2, &derived: 1 }),
    ));

    let random: GenerateRandomResponse = server.ask("GenerateRandom", &RANDOM).await.done();
    let ok = json!({"OK": 1});
    expected.push((random.request_id.clone(), "GenerateRandom", 200, true, ok.clone(), json!({})));

    let asked = DecryptRequest {
        ciphertext_blob: one.ciphertext_blob.clone(),
        key_id: "alias/direct".into(),
        iv: one.iv.clone(),
        ..Default::default()
    };
    let opened: DecryptResponse = server.ask("Decrypt", &asked).await.done();
    expected.push((opened.request_id, "Decrypt", 200, true, ok, json!({ &direct: 1 })));

    let refused = server.ask("GenerateDataKey", &generate("alias/none", 32)).await.error();
    let codes = json!({"Forbidden.KeyNotFound": 1});
    expected.push((refused.request_id, "GenerateDataKey", 404, true, codes, json!({})));

    let limited = create_client(&server.engine, &SIGNER, "random", &["*"]);
    let mut draft = server.draft("GenerateDataKey", &generate("alias/direct", 32));
    draft.set(crate::client::CLIENT, limited.as_str()).sign();
    let refused = send(&server, &draft).await.error();
    let codes = json!({"Forbidden.NoPermission": 1});
    expected.push((refused.request_id, "GenerateDataKey", 403, true, codes, json!({})));

    let refused = send(&server, draft.set("date", "none")).await.error();
    let codes = json!({"InvalidParam": 1});
    expected.push((refused.request_id, "GenerateDataKey", 400, false, codes, json!({})));

    // Text of a stranger that is no client's id is not written down.
    let mut unknown = server.draft("Sign", &RANDOM);
    let claim = "bob\u{9b}31m\u{202e}";
    let refused = send(&server, unknown.set(crate::client::CLIENT, claim)).await.error();
    let codes = json!({"InvalidApiName": 1});
    expected.push((refused.request_id, "other", 400, false, codes, json!({})));

    let records = log.wait_for(expected.len()).await;
    assert_eq!(records.len(), expected.len());
    let mut by_id: BTreeMap<&str, &Value> = BTreeMap::new();
    for record in &records {
        assert!(by_id.insert(record["request_id"].as_str().unwrap(), record).is_none());
        let mut fields: HashSet<_> =
            record.as_object().unwrap().keys().map(String::as_str).collect();
        // What was asked for and refused, where that is a name of a key.
        let requested = match &record["codes"] {
            codes if codes.get("Forbidden.KeyNotFound").is_some() => json!(["alias/none"]),
            _ => Value::Null,
        };
        assert_eq!(record["requested"], requested, "{record}");
        fields.remove("requested");
        assert_eq!(
            fields,
            [
                "time",
                "request_id",
                "client_id",
                "authenticated",
                "remote",
                "operation",
                "status",
                "codes",
                "keys",
                "duration_us"
            ]
            .into()
        );
        assert!(record["remote"].as_str().unwrap().starts_with("127.0.0.1:"));
        assert!(record["duration_us"].as_u64().unwrap() < 30_000_000);
        let time = record["time"].as_str().unwrap();
        let age = std::time::SystemTime::now()
            .duration_since(humantime::parse_rfc3339(time).unwrap())
            .unwrap();
        assert!(age < Duration::from_secs(60));
    }
    for (request_id, operation, status, authenticated, codes, keys) in &expected {
        let record = by_id[request_id.as_str()];
        assert_eq!(record["operation"], *operation);
        assert_eq!(record["status"], *status);
        assert_eq!(record["authenticated"], *authenticated, "{record}");
        assert_eq!((&record["codes"], &record["keys"]), (codes, keys), "{record}");
        let client = match (*operation, *status) {
            ("other", _) => "",
            (_, 403) | (_, 400) => limited.as_str(),
            _ => server.client.as_str(),
        };
        assert_eq!(record["client_id"], client);
    }

    // No byte of what travelled is in it, in any spelling.
    let text = fs::read(log.path()).unwrap();
    let blobs = many.results.iter().filter_map(|result| result.response.as_ref());
    let blobs: Vec<_> = blobs.flat_map(|key| [&key.plaintext, &key.ciphertext_blob]).collect();
    let secrets = [&one.plaintext, &one.ciphertext_blob, &one.iv, &random.random];
    for secret in secrets.into_iter().chain(blobs) {
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let base64 = base64_simd::STANDARD.encode_to_string(secret);
        let numbers = format!("{},{},{}", secret[0], secret[1], secret[2]);
        for form in [&secret[..8], &hex.as_bytes()[..12], &base64.as_bytes()[..10]] {
            assert!(!text.windows(form.len()).any(|window| window == form));
        }
        assert!(!String::from_utf8_lossy(&text).contains(&numbers));
    }
    server.end().await;
}

async fn send(server: &Running, draft: &crate::client::Draft) -> crate::client::Answer {
    Http1::on(server.connect().await).await.send(draft).await
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_there_when_a_server_has_ended() {
    let log = Log::new();
    let server = log.serve(false).await;
    for _ in 0..50 {
        assert_eq!(server.ask("GenerateRandom", &RANDOM).await.status, 200);
    }
    server.end().await;
    assert_eq!(records(&log.path()).len(), 50);
}

/// Others can be had for nothing, and are limited; these tell of a client that tries what it may not.
#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_of_an_authenticated_request_is_recorded() {
    let log = Log::new();
    let server = log.serve(false).await;
    let limited = create_client(&server.engine, &SIGNER, "random", &["*"]);
    let mut draft = server.draft("GenerateDataKey", &generate("alias/direct", 32));
    draft.set(crate::client::CLIENT, limited.as_str()).sign();
    let mut client = Http1::on(server.connect().await).await;
    for _ in 0..500 {
        client.send(&draft).await.refused_with(403, "Forbidden.NoPermission");
    }
    drop(client);
    server.end().await;
    assert_eq!(records(&log.path()).len(), 500);
}

/// Keys are made all the same, and a limit of a key is spent.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_before_its_answer_leaves_a_record() {
    let log = Log::new();
    let server = log.serve(false).await;
    let asked = batch((0..65_536).map(|_| generate("alias/direct", 32)));
    let mut stream = server.connect().await;
    stream.write_all(&server.draft("BatchGenerateDataKey", &asked).bytes()).await.unwrap();
    // Until the work has begun. What a client takes back before that is not done.
    let deadline = Instant::now() + PATIENCE;
    while wraps_granted(&server) == 0 {
        assert!(Instant::now() < deadline, "no key was made");
        sleep(Duration::from_millis(1)).await;
    }
    drop(stream);
    let records = log.wait_for(1).await;
    assert_eq!(records[0]["codes"], json!({"OK": 65_536}), "{records:?}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_made_while_the_audit_log_cannot_be_written() {
    let log = Log::new();
    let server = log.serve(true).await;
    // No file can be where a directory is.
    fs::remove_file(log.path()).unwrap();
    fs::create_dir(log.path()).unwrap();
    let asked = generate("alias/direct", 32);
    let unavailable = "Service Unavailable Temporary.";
    // If the first one finds it out, it is worked on, and not answered.
    let first = server.ask("GenerateDataKey", &asked).await;
    first.refused(503, "ServiceUnavailableTemporary", unavailable);
    let before = wraps_granted(&server);
    server.ask("GenerateDataKey", &asked).await.refused_with(503, "ServiceUnavailableTemporary");
    assert_eq!(wraps_granted(&server), before);
    let not_ready = "not ready: the audit log cannot be written\n";
    assert_eq!(server.watch("/readyz").await, (503, not_ready.into()));
    assert_eq!(server.metric("keymill_audit_failing").await, 1.0);
    fs::remove_dir(log.path()).unwrap();
    server.wait_for("keymill_audit_failing", 0.0).await;
    assert_eq!(server.metric("keymill_audit_reopened_total").await, 1.0);
    assert_eq!(server.ask("GenerateDataKey", &asked).await.status, 200);
    assert_eq!(server.watch("/readyz").await.0, 200);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_has_the_key_that_it_asked_for_in_its_record() {
    let log = Log::new();
    let server = log.serve(true).await;
    let some = create_client(&server.engine, &SIGNER, "all", &["alias/derived"]);
    let mut draft = server.draft("GenerateDataKey", &generate("alias/direct", 32));
    draft.set(crate::client::CLIENT, some.as_str()).sign();
    assert_eq!(send(&server, &draft).await.status, 403);
    let names = ["alias/derived", "alias/none", "no name of a key\u{202e}", "alias/direct"];
    let many = batch(names.map(|name| generate(name, 32)));
    let mut draft = server.draft("BatchGenerateDataKey", &many);
    draft.set(crate::client::CLIENT, some.as_str()).sign();
    assert_eq!(send(&server, &draft).await.status, 200);
    let records = log.wait_for(2).await;
    assert_eq!(records[0]["requested"], json!(["alias/direct"]), "{}", records[0]);
    assert_eq!(records[1]["requested"], json!(["alias/direct", "alias/none"]), "{}", records[1]);
    server.end().await;
}

/// The files of the server are found under any name, and a log that cannot be written is told at the start.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_log_that_cannot_work_is_refused_at_the_start() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let root_key = RootKey::create_file(at("root.key")).unwrap();
    let engine = Engine::create(at("keys.db"), &root_key).unwrap();
    for (name, companion) in [("hard", "keys.db"), ("wal", "keys.db-wal")] {
        fs::hard_link(at(companion), at(name)).unwrap();
    }
    std::os::unix::fs::symlink("/dev/full", at("full")).unwrap();
    let cases = [
        (at("hard"), "it is a file of the key store"),
        (at("wal"), "it is a file of the key store"),
        (at("full"), "No space left"),
        (at("none").join("audit.jsonl"), "there is no directory"),
    ];
    let before = fs::read(at("keys.db")).unwrap();
    for (path, why) in cases {
        let mut config = crate::client::config();
        config.audit = Some(AuditConfig { path: path.clone(), sync: false, max_bytes: 1 << 30 });
        let refused = Server::bind(engine.clone(), &config).await.err().unwrap().to_string();
        assert!(refused.contains(why) && refused.contains(&format!("{path:?}")), "{refused}");
    }
    assert_eq!(fs::read(at("keys.db")).unwrap(), before);
    engine.describe_key("alias/none").unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_does_by_itself_has_lines_of_its_own() {
    let log = Log::new();
    // A clock that the test moves.
    let days = Arc::new(AtomicU64::new(0));
    let moved = Arc::clone(&days);
    let clock =
        move || SystemTime::now() + Duration::from_secs(moved.load(Ordering::Relaxed) * 86_400);
    let engine = Engine::builder().clock(clock).in_memory().unwrap();
    let client = create_client(&engine, &SIGNER, "all", &["*"]);
    let key = engine.create_key(&CreateKey::default()).unwrap().key_id;
    let server = Running::on(engine, client, |config| {
        config.audit = Some(AuditConfig { path: log.path(), sync: false, max_bytes: u64::MAX });
    })
    .await;
    let week = RotationPeriod::new(Duration::from_secs(7 * 86_400)).unwrap();
    server.engine.set_rotation(key.as_str(), Some(week)).unwrap();
    days.store(8, Ordering::Relaxed);
    server.engine.run_due().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let rotation = loop {
        let found = lines(&log.path()).into_iter().find(|line| line["operation"] == "RotateKey");
        if let Some(found) = found {
            break found;
        }
        assert!(Instant::now() < deadline, "no line");
        sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(rotation["key_id"], key.as_str());
    assert_eq!((&rotation["by"], &rotation["code"]), (&json!("schedule"), &json!("OK")));
    let version =
        server.engine.describe_key(key.as_str()).unwrap().primary_version().key_version_id;
    assert_eq!(rotation["key_version_id"], version.as_str());
    server.end().await;
    let lines = lines(&log.path());
    let (first, last) = (&lines[0], &lines[lines.len() - 1]);
    assert_eq!((&first["operation"], &first["by"]), (&json!("Start"), &json!("server")));
    assert_eq!(first["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&last["operation"], &last["by"]), (&json!("End"), &json!("server")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_without_an_audit_log_is_bounded_and_tells_of_lost_records() {
    let log = Log::new();
    let server = log.serve(false).await;
    assert_eq!(server.ask("GenerateRandom", &RANDOM).await.status, 200);
    fs::remove_file(log.path()).unwrap();
    fs::create_dir(log.path()).unwrap();
    // Worked on, and never written.
    let lost = match server.ask("GenerateRandom", &RANDOM).await.status {
        200 => 1,
        _ => 0,
    };
    server.wait_for("keymill_audit_failing", 1.0).await;
    server.handle.drain();
    let in_order = tokio::time::timeout(PATIENCE, server.ended).await.unwrap().unwrap();
    // The first record may have been on disk before its file was removed.
    assert!(server.handle.audit_records_lost() >= lost);
    assert_eq!(in_order, server.handle.audit_records_lost() == 0);
}

/// Whoever was disabled in a store that is not there any more is served no longer either.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_taken_away_is_told_and_nothing_is_made_until_it_is_back() {
    let home = tempfile::tempdir().unwrap();
    let [store, away] = ["keys.db", "away.db"].map(|name| home.path().join(name));
    let root_key: Vec<u8> = (100..132).collect();
    let engine = Engine::create(&store, &RootKey::from_bytes(&root_key).unwrap()).unwrap();
    let client = fill(&engine);
    let server = Running::on(engine, client, |_| {}).await;
    let asked = generate("alias/derived", 32);
    assert_eq!(server.ask("GenerateDataKey", &asked).await.status, 200);
    assert_eq!(server.metric("keymill_store_failing").await, 0.0);
    fs::rename(&store, &away).unwrap();
    server.wait_for("keymill_store_refusing", 1.0).await;
    assert_eq!(server.metric("keymill_store_failing").await, 1.0);
    let (status, text) = server.watch("/readyz").await;
    assert!(status == 503 && text.contains("missing"), "{status} {text}");
    assert_eq!(server.watch("/healthz").await.0, 200);
    server.ask("GenerateDataKey", &asked).await.refused_with(503, "ServiceUnavailableTemporary");
    let random = server.ask("GenerateRandom", &RANDOM).await;
    random.refused_with(503, "ServiceUnavailableTemporary");
    fs::rename(&away, &store).unwrap();
    server.wait_for("keymill_store_failing", 0.0).await;
    assert_eq!(server.ask("GenerateDataKey", &asked).await.status, 200);
    assert_eq!(server.watch("/readyz").await, (200, "ready\n".into()));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_watch_find_three_pages() {
    let server = Running::start().await;
    assert_eq!(server.watch("/healthz").await, (200, "ok\n".into()));
    assert_eq!(server.watch("/readyz").await, (200, "ready\n".into()));
    assert_eq!(server.watch("/").await.0, 404);

    for _ in 0..3 {
        server.ask("GenerateDataKey", &generate("alias/direct", 32)).await;
    }
    server.ask("GenerateDataKey", &generate("alias/none", 32)).await;
    let names = ["alias/direct", "alias/none"].into_iter().cycle().take(10);
    server.ask("BatchGenerateDataKey", &batch(names.map(|name| generate(name, 32)))).await;
    let mut unknown = server.draft("Sign", &RANDOM);
    send(&server, unknown.set("x-kms-apiname", "evil\"} 1")).await;
    let (status, text) = server.watch("/metrics").await;
    assert_eq!(status, 200);

    let mut samples = BTreeMap::new();
    let mut declared = HashSet::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.split(' ');
            let (kind, name) = (words.next().unwrap(), words.next().unwrap());
            assert!(["HELP", "TYPE"].contains(&kind) && words.next().is_some(), "{line}");
            declared.insert(name);
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').unwrap();
        let name = sample.split('{').next().unwrap();
        let ours = name.starts_with("keymill_") || name == "process_resident_memory_bytes";
        assert!(ours && sample.is_ascii(), "{line}");
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        let base = name
            .strip_suffix("_bucket")
            .or_else(|| name.strip_suffix("_sum"))
            .or_else(|| name.strip_suffix("_count"));
        assert!(declared.contains(base.unwrap_or(name)), "{line}");
        if let Some((_, labels)) = sample.split_once('{') {
            let labels = labels.strip_suffix("\"}").unwrap();
            assert!(labels.split("\",").all(|label| label.contains("=\"")), "{line}");
        }
        let value: f64 = value.parse().unwrap();
        assert!(samples.insert(sample.to_owned(), value).is_none(), "{line} stands there twice");
    }
    for (sample, value) in [
        ("requests_total{code=\"OK\",operation=\"GenerateDataKey\"}", 3.0),
        ("requests_total{code=\"Forbidden.KeyNotFound\",operation=\"GenerateDataKey\"}", 1.0),
        ("requests_total{code=\"OK\",operation=\"BatchGenerateDataKey\"}", 1.0),
        ("requests_total{code=\"InvalidApiName\",operation=\"other\"}", 1.0),
        ("items_total{code=\"OK\",operation=\"GenerateDataKey\"}", 3.0),
        ("items_total{code=\"OK\",operation=\"BatchGenerateDataKey\"}", 5.0),
        ("items_total{code=\"Forbidden.KeyNotFound\",operation=\"BatchGenerateDataKey\"}", 5.0),
        ("request_seconds_count{operation=\"GenerateDataKey\"}", 4.0),
        ("panics_total", 0.0),
        ("draining", 0.0),
    ] {
        assert_eq!(samples.get(&format!("keymill_{sample}")), Some(&value), "{sample}\n{text}");
    }
    let key = server.engine.describe_key("alias/direct").unwrap();
    let version = key.initial_version().key_version_id;
    let left = samples[&format!("keymill_wraps_left{{key_version_id=\"{version}\"}}")];
    assert_eq!(left, 2_f64.powi(32) - 8.0);
    server.end().await;
}
