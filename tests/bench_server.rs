//! Goal: `keymill bench --server` measures what its help promises on a server that runs, and says what is wrong when it
//! cannot.
//!
//! Method: the built program as server and as client, on one scratch home, for a second. No test looks at a time: only
//! that there is one, and that what was made is right, which the program checks itself.
#![cfg(all(feature = "bench", feature = "server"))]

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Output, Stdio},
};

use serde_json::Value;

/// A scratch home with `alias/app` and a client, and a server on it, which ends with the test.
struct Scratch {
    dir: tempfile::TempDir,
    server: Child,
    address: String,
}

impl Scratch {
    fn new(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for args in [
            "init",
            "key create --alias alias/app",
            "key create --alias alias/other",
            "client create --name load --out load.json --password-file load.password \
             --keys alias/app --allow generate,decrypt,random",
            "client create --name weak --out weak.json --password-file weak.password \
             --keys alias/app --allow random",
        ] {
            let output = command(&dir, args).output().unwrap();
            assert!(output.status.success(), "{args}: {output:?}");
        }
        let args = format!("serve --listen 127.0.0.1:0 {more}");
        let mut server = command(&dir, &args).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().rsplit(' ').next().unwrap().to_owned();
        assert!(line.starts_with("keymill: ready on http"), "{line}");
        Self { dir, server, address }
    }

    fn bench(&self, args: &str) -> Output {
        command(&self.dir, &format!("bench {args}")).output().unwrap()
    }

    /// With everything that a load needs.
    fn load(&self, args: &str) -> Output {
        self.bench(&format!(
            "--server {} --client-key load.json --password-file load.password --key alias/app {args}",
            self.address
        ))
    }

    #[track_caller]
    fn refused(&self, args: &str, code: i32, message: &str, hint: &str) {
        let args = args.replace("ADDR", &self.address);
        let output = self.bench(&args);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(code), &b""[..]), "{err}");
        assert!(err.starts_with("keymill: ") && err.contains(message), "{args}: {err}");
        let (_, tail) = err.split_once("\nhint: ").expect(&err);
        assert!(tail.contains(hint), "{args}: {err}");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn command(dir: &tempfile::TempDir, args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keymill"));
    command
        .args(args.split_whitespace())
        .current_dir(dir.path())
        .env_clear()
        .env("KEYMILL_HOME", dir.path().join("home"));
    command
}

fn rows(output: &Output) -> Vec<Value> {
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*err), (Some(0), ""));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Every figure of every job, in order, with what it is a ratio to.
const FIGURES: [(&str, &[&str], Option<&str>); 10] = [
    ("random", &["calls_per_s", "server_us", "client_us"], None),
    ("generate", &["calls_per_s", "server_us", "client_us"], Some("random")),
    ("advance", &["calls_per_s", "server_us", "client_us"], Some("random")),
    ("decrypt", &["calls_per_s", "server_us", "client_us"], Some("random")),
    (
        "verify",
        &[
            "verifications_per_s",
            "stalled_percent",
            "calls_per_verification",
            "signature_percent",
            "transport_percent",
            "key_percent",
        ],
        None,
    ),
    ("batch", &["keys_per_s", "server_us", "client_us"], Some("generate")),
    ("batch-decrypt", &["keys_per_s", "server_us", "client_us"], Some("decrypt")),
    ("half-load", &["p50_us", "p99_us", "p999_us", "lateness_p99_us", "offered_per_s"], None),
    (
        "overload",
        &["calls_per_s", "offered_per_s", "refused_per_s", "server_mib_before", "server_mib_after"],
        Some("generate"),
    ),
    (
        "many",
        &[
            "keys",
            "keys_per_s",
            "different",
            "opened_again",
            "server_mib_start",
            "server_mib_tenth",
            "server_mib_end",
        ],
        None,
    ),
];

#[test]
fn every_job_has_its_figures() {
    let scratch = Scratch::new("");
    let pid = scratch.server.id();
    let args = format!("--seconds 1 --keys 10000 --connections 8 --server-pid {pid} --json");
    let rows = rows(&scratch.load(&args));
    let wanted: Vec<_> = FIGURES
        .iter()
        .flat_map(|(job, figures, _)| figures.iter().map(|figure| (*job, *figure)))
        .collect();
    let text = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
    let found: Vec<_> = rows.iter().map(|row| (text(row, "job"), text(row, "figure"))).collect();
    let found: Vec<_> = found.iter().map(|(job, figure)| (&**job, &**figure)).collect();
    assert_eq!(found, wanted);

    let row = |job: &str, figure: &str| {
        rows.iter().find(|row| row["job"] == job && row["figure"] == figure).unwrap()
    };
    for (job, figures, ratio_to) in FIGURES {
        let first = row(job, figures[0]);
        assert_eq!(first["ratio_to"].as_str(), ratio_to, "{first}");
        assert_eq!(first["ratio"].as_f64().is_some(), ratio_to.is_some(), "{first}");
    }
    for row in &rows {
        let number = |name: &str| row[name].as_f64();
        let (value, rounds) = (number("value").unwrap(), row["rounds"].as_u64().unwrap());
        if rounds == 1 {
            assert!(row["low"].is_null() && row["high"].is_null(), "{row}");
        } else {
            assert!(rounds >= 3 && rounds % 2 == 1, "{row}");
            assert!(number("low").unwrap() <= value && value <= number("high").unwrap(), "{row}");
        }
        if row["figure"].as_str().unwrap().ends_with("_per_s") && row["figure"] != "refused_per_s" {
            assert!(value > 0.0, "{row}");
        }
    }
    // Whole batches: three of 4096.
    assert_eq!(row("many", "keys")["value"], 12_288.0);
    assert_eq!(row("many", "different")["value"], 12_288.0);
    assert!(row("many", "opened_again")["value"].as_f64().unwrap() >= 12.0);
    assert_eq!(row("half-load", "p99_us")["ratio_to"], "p50");
}

#[test]
fn people_get_a_table_of_what_they_ask_for() {
    let scratch = Scratch::new("");
    let output = scratch.load("--seconds 1 --filter job=overload --filter verif");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]), "{text}");
    for part in ["64 connections", "middle half", "generate", "calls/s", "x generate", "verify"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for part in ["random", "half-load", "many", "server's CPU"] {
        assert!(!text.contains(part), "{part}: {text}");
    }
    assert!(text.lines().all(|line| line.len() <= 120), "{text}");
}

#[test]
fn a_server_with_tls_is_measured_too() {
    let pair = rcgen::generate_simple_self_signed(["127.0.0.1".into()]).unwrap();
    let files = tempfile::tempdir().unwrap();
    let (pem, key) = (files.path().join("server.pem"), files.path().join("server.key"));
    let text = |label: &str, der: &[u8]| {
        let base64 = base64_simd::STANDARD.encode_to_string(der);
        format!("-----BEGIN {label}-----\n{base64}\n-----END {label}-----\n")
    };
    fs::write(&pem, text("CERTIFICATE", pair.cert.der())).unwrap();
    fs::write(&key, text("PRIVATE KEY", pair.signing_key.serialized_der())).unwrap();
    let (pem, key) = (pem.display(), key.display());
    let scratch = Scratch::new(&format!("--tls-cert {pem} --tls-key {key}"));
    let args = format!("--ca {pem} --seconds 1 --filter random --connections 3 --json");
    let rows = rows(&scratch.load(&args));
    assert!(rows[0]["job"] == "random" && rows[0]["value"].as_f64().unwrap() > 0.0, "{rows:?}");

    // Mutual TLS: a certificate that is its own CA.
    let scratch = Scratch::new(&format!("--tls-cert {pem} --tls-key {key} --client-ca {pem}"));
    let shown = format!("{args} --tls-cert {pem} --tls-key {key}");
    assert!(self::rows(&scratch.load(&shown))[0]["value"].as_f64().unwrap() > 0.0);
    const KEY: &str = "--client-key load.json --password-file load.password --key alias/app";
    scratch.refused(&format!("--server ADDR {KEY} --ca {pem}"), 2, "ertificate", "--tls-cert");
    let half = format!("--server ADDR {KEY} --ca {pem} --tls-cert {pem}");
    scratch.refused(&half, 1, "--tls-key", "--help");
    let wrong = format!("{half} --tls-key {pem}");
    scratch.refused(&wrong, 1, "--tls-key", "PEM");
}

#[test]
fn mistakes_are_refused_with_a_hint() {
    const KEY: &str = "--client-key load.json --password-file load.password --key alias/app";
    let scratch = Scratch::new("");
    for option in ["--client-key load.json", "--key alias/app", "--connections 4", "--keys 5"] {
        let name = option.split(' ').next().unwrap();
        scratch.refused(option, 1, &format!("{name} needs --server"), "name the server");
    }
    scratch.refused("--server ADDR", 1, "needs --client-key", "--key KEY");
    scratch.refused("--server ADDR --client-key load.json", 1, "needs --password-file", "--key");
    let rest = KEY.replace(" --key alias/app", "");
    scratch.refused(&format!("--server ADDR {rest}"), 1, "needs --key KEY", "--help");
    for address in ["nowhere", "ftp://127.0.0.1:1", "http://127.0.0.1:x"] {
        scratch.refused(&format!("--server {address} {KEY}"), 1, "no address", "http://host:port");
    }
    scratch.refused(&format!("--server https://127.0.0.1:1 {KEY}"), 1, "needs --ca", "PEM");
    scratch.refused(&format!("--server ADDR --ca x.pem {KEY}"), 1, "plain HTTP", "https");
    // Nothing listens on port 1.
    scratch.refused(&format!("--server 127.0.0.1:1 {KEY}"), 2, "cannot connect", "keymill serve");
    scratch.refused(&format!("--server ADDR {KEY} --filter speed"), 1, "\"speed\"", "job=random|");
    scratch.refused(&format!("--server ADDR {KEY} --server-pid 4294967295"), 1, "/proc", "leave");

    let with = |from: &str, to: &str| format!("--server ADDR {}", KEY.replace(from, to));
    scratch.refused(&with("load.password", "weak.password"), 1, "does not open", "line end");
    scratch.refused(
        &with("load.json", "load.password"),
        1,
        "no client's key file",
        "client create",
    );
    scratch.refused(&with("load.json", "none.json"), 2, "cannot read", "path");
    scratch.refused(&with("alias/app", "alias/none"), 1, "404 Forbidden.KeyNotFound", "key list");
    scratch.refused(&with("alias/app", "alias/other"), 1, "403 Forbidden", "client set");
    scratch.refused(&with("load", "weak"), 1, "403 Forbidden.NoPermission", "--allow");

    // A key that the server has under another id.
    let mut file: Value =
        serde_json::from_slice(&fs::read(scratch.dir.path().join("load.json")).unwrap()).unwrap();
    let weak: Value =
        serde_json::from_slice(&fs::read(scratch.dir.path().join("weak.json")).unwrap()).unwrap();
    file["KeyId"] = weak["KeyId"].clone();
    fs::write(scratch.dir.path().join("mixed.json"), file.to_string()).unwrap();
    scratch.refused(&with("load.json", "mixed.json"), 1, "401 SignatureNotMatch", "under its id");
    file["KeyId"] = "KAAP.00000000-0000-4000-8000-000000000000".into();
    fs::write(scratch.dir.path().join("unknown.json"), file.to_string()).unwrap();
    scratch.refused(&with("load.json", "unknown.json"), 1, "404 Unauthorized", "client list");
}
