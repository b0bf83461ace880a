//! Goal: `keymill bench` prints the rows that its help promises, picks those that are asked for, and refuses the rest.
//!
//! Method: runs the built program for a second or less and looks at shapes and names. No test looks at a time: only
//! that there is one.
#![cfg(feature = "bench")]

use std::process::{Command, Output};

use serde_json::{Map, Value, json};

fn bench(args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_keymill"))
        .arg("bench")
        .args(args.split_whitespace())
        // It needs no key store, and no place for one.
        .env_clear()
        .output()
        .unwrap()
}

#[track_caller]
fn rows(args: &str) -> Vec<(String, Map<String, Value>)> {
    let output = bench(args);
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), output.stderr);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&err));
    assert!(err.is_empty());
    let row = |line: &str| (line.to_owned(), serde_json::from_str(line).unwrap());
    out.lines().map(row).collect()
}

#[track_caller]
fn refused(args: &str, message: &str, hint: &str) {
    let output = bench(args);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]), "{err}");
    assert!(err.starts_with("keymill: ") && err.contains(message), "{err}");
    let (_, tail) = err.split_once("\nhint: ").expect(&err);
    assert!(tail.contains(hint), "{err}");
}

const MEMBERS: [&str; 9] =
    ["job", "contender", "dek_len", "aad_len", "keks", "batch", "threads", "ns_per_key", "rounds"];

#[test]
fn rows_have_the_promised_members_in_order() {
    let rows = rows("--seconds 1 --filter job=seal --json");
    for (line, row) in &rows {
        let places: Vec<_> =
            MEMBERS.iter().map(|name| line.find(&format!("\"{name}\":")).expect(line)).collect();
        assert!(places.is_sorted(), "{line}");
        assert_eq!((&row["job"], &row["threads"]), (&json!("seal"), &json!(1)));
        let number = |name: &str| row[name].as_f64().unwrap();
        assert!(number("ns_low") <= number("ns_per_key"), "{line}");
        assert!(number("ns_per_key") <= number("ns_high"), "{line}");
        let rounds = row["rounds"].as_u64().unwrap();
        assert!(rounds >= 3 && rounds % 2 == 1, "{line}");
    }
    let headline = |row: &Map<String, Value>| {
        let shape = ["dek_len", "aad_len", "keks", "batch"].map(|name| row[name].as_u64());
        shape == [32, 16, 1, 4096].map(Some)
    };
    let first: Vec<_> = rows.iter().take_while(|(_, row)| headline(row)).collect();
    let names: Vec<_> = first.iter().map(|(_, row)| row["contender"].as_str().unwrap()).collect();
    let tiers = keymill::Tier::available().iter().map(|tier| format!("keymill/{tier}"));
    let peers = ["ring", "aes-gcm", "aws-lc-rs"].map(String::from);
    assert_eq!(names, tiers.chain(peers).collect::<Vec<_>>());
    for (member, value) in [("keks", 1024), ("dek_len", 1024), ("aad_len", 0), ("batch", 16)] {
        assert!(rows.iter().any(|(_, row)| row[member] == value), "{member} {value}");
    }
}

#[test]
fn members_that_do_not_apply_are_null() {
    let args = "--seconds 1 --json --filter contender=ring --filter contender=rand_chacha \
                --filter job=setup --filter job=fill";
    for (line, row) in rows(args) {
        let null = match row["job"].as_str().unwrap() {
            "setup" => ["dek_len", "aad_len", "batch"].as_slice(),
            "fill" => &["aad_len", "keks"],
            other => panic!("{other} was not asked for"),
        };
        for member in MEMBERS {
            assert_eq!(row[member].is_null(), null.contains(&member), "{member} in {line}");
        }
    }
}

#[test]
fn every_job_gives_right_bytes_in_small_batches() {
    // Results are checked before anything is timed, so that the exit code says it.
    let names = |args: &str| -> Vec<_> {
        rows(args).into_iter().map(|(_, row)| row["job"].as_str().unwrap().to_owned()).collect()
    };
    let jobs = names("--seconds 1 --json --filter batch=16 --filter batch=null --filter keks=1");
    for job in ["seal", "open", "setup", "job"] {
        assert!(jobs.iter().any(|found| found == job), "{job}");
    }
    let many = names("--seconds 1 --json --filter keks=1024 --filter job=job --filter job=open");
    assert!(many.len() >= 8);
}

/// The jobs of the engine in the order of the rows, with their contenders in the headline.
const ENGINE_JOBS: [(&str, &[&str]); 8] = [
    ("batch", &["keymill", "ring-loop", "idiomatic-loop", "kernels"]),
    ("batch-strings", &["keymill", "ring-loop"]),
    ("batch-mixed", &["keymill", "ring-loop"]),
    ("batch-tenants", &["keymill", "ring-loop"]),
    ("batch-large", &["keymill"]),
    ("decrypt", &["keymill", "ring-loop"]),
    ("pool-take", &["keymill", "ring-loop"]),
    ("single", &["keymill", "ring-loop", "idiomatic-loop"]),
];

#[test]
fn the_engines_jobs_have_their_contenders_and_shapes() {
    let jobs = ENGINE_JOBS.map(|(job, _)| format!("--filter job={job}")).join(" ");
    let rows = rows(&format!("--seconds 1 --json {jobs}"));
    let text = |row: &Map<String, Value>, name: &str| row[name].as_str().unwrap().to_owned();
    for (job, contenders) in ENGINE_JOBS {
        let of_job: Vec<_> = rows.iter().filter(|(_, row)| row["job"] == job).collect();
        let names: Vec<_> = of_job.iter().map(|(_, row)| text(row, "contender")).collect();
        assert_eq!(names[..contenders.len()], *contenders, "{job}");
        for (line, row) in of_job {
            let shape = ["dek_len", "aad_len", "keks"].map(|name| row[name].as_u64());
            let right = match job {
                "batch-mixed" => shape == [None, None, Some(64)],
                "batch-tenants" => shape == [Some(32), Some(16), Some(1024)],
                "decrypt" => shape[..2] == [Some(32), Some(16)],
                _ => shape == [32, 16, 1].map(Some),
            };
            assert!(right && row["ns_per_key"].as_f64().unwrap() > 0.0, "{line}");
            let threads = row["threads"].as_u64().unwrap();
            assert!(threads == 1 || (row["contender"] == "keymill"), "{line}");
        }
    }
    let is_there = |job: &str, member: &str, value: u64, threads: u64| {
        let mut rows = rows.iter().map(|(_, row)| row);
        let is = |row: &Map<String, Value>| row["job"] == job && row[member] == value;
        rows.any(|row| is(row) && row["threads"] == threads && row["contender"] == "keymill")
    };
    let many = std::thread::available_parallelism().map_or(2, |n| n.get().max(2)) as u64;
    for (sizes, threads) in [
        (&[1, 16, 64, 256, 1024, 4096, 16_384, 65_536][..], 1),
        (&[4096, 8192, 16_384, 65_536], many),
    ] {
        for size in sizes {
            assert!(is_there("batch", "batch", *size, threads), "{size} in {threads} threads");
        }
    }
    assert!(is_there("batch-large", "batch", 1 << 20, 1));
    assert!(is_there("decrypt", "keks", 1, 1) && is_there("decrypt", "keks", 16_384, 1));
    assert!(is_there("single", "batch", 1, 1) && is_there("single", "batch", 1, many));
}

#[test]
fn people_get_tables() {
    let output = bench("--seconds 1 --filter job=seal --filter keks=1 --filter dek_len=32");
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["seal: 32-byte DEKs", "middle half", "vs ring", "keymill/portable", "spread"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.lines().all(|line| line.len() <= 120), "{text}");

    let output = bench("--seconds 1 --filter job=batch");
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["batch: 32-byte DEKs", "vs idiomatic-loop", "vs kernels", "threads", "65536"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.lines().all(|line| line.len() <= 120), "{text}");
}

#[test]
fn what_cannot_be_measured_is_refused_with_a_hint() {
    refused("--filter job=sael", "\"job=sael\"", "job=seal|open|fill|setup|job|batch|");
    refused("--filter dek_len=33 --filter seal", "nothing to measure", "dek_len=16|32|64|256|1024");
    refused("--filter speed=11", "\"speed=11\"", "members are job, contender");
    refused("--filter job=", "\"job=\"", "member=value");
    for seconds in ["0", "-1", "3601", "1.5", "x"] {
        refused(&format!("--seconds {seconds}"), "--seconds", "--help");
    }
}
