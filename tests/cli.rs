//! Goal: the command line does what its help says, refuses with the right code, and leaves nothing half done.
//!
//! Method: transcripts. Each test has a home of its own, runs the built program as a shell would, and looks at exit
//! code, standard output, standard error and files.
#![cfg(feature = "cli")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, SystemTime},
};

use keymill::{CreateKey, Engine, RootKey, RotationPeriod};
use serde_json::{Value, json};

/// A scratch directory with a key store in `home`.
struct Scratch(tempfile::TempDir);

/// How a run ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// With a store and a key `alias/app`.
    fn with_key() -> Self {
        let scratch = Self::new();
        scratch.run("init").done();
        scratch.run("key create --alias alias/app").done();
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keymill"));
        command
            .args(args.split_whitespace())
            .current_dir(self.0.path())
            .env("KEYMILL_HOME", self.path("home"))
            .env_remove("XDG_DATA_HOME")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command line without quoting.
    fn run(&self, args: &str) -> Ran {
        self.run_with(args, b"")
    }

    fn run_with(&self, args: &str, input: &[u8]) -> Ran {
        run(&mut self.command(args), input)
    }
}

fn run(command: &mut Command, input: &[u8]) -> Ran {
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A program that refuses its arguments does not read.
    let feeder = thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    Ran {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Ran {
    /// Checks exit code 0, and returns standard output.
    #[track_caller]
    fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// Checks exit code, message and hint.
    #[track_caller]
    fn ended(self, code: i32, message: &str) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.contains(message), "{message}: {self:?}");
        assert!(self.err.starts_with("keymill: ") && self.err.contains("\nhint: "), "{self:?}");
        assert!(!self.err.contains("panicked"), "{self:?}");
        self.out
    }
}

fn rows(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn code(row: &Value) -> &str {
    row["Error"]["Code"].as_str().unwrap_or("")
}

#[test]
fn one_command_runs_the_main_job_on_a_fresh_machine() {
    let scratch = Scratch::new();
    let made = scratch.run("generate --key alias/app --count 10 --aad volume-7 --create");
    assert!(made.err.contains("made a key store") && made.err.contains("for alias/app"));
    let text = made.done();
    let keys = rows(&text);
    assert_eq!(keys.len(), 10);
    for (row, line) in keys.iter().zip(text.lines()) {
        let members = ["KeyId", "KeyVersionId", "Iv", "Plaintext", "CiphertextBlob", "Algorithm"];
        let members = members.into_iter().chain(["Aad", "RequestId"]);
        let places: Vec<_> = members.map(|m| line.find(&format!("\"{m}\":\"")).unwrap()).collect();
        assert!(places.is_sorted(), "{line}");
        assert_eq!((&row["Algorithm"], &row["Aad"]), (&json!("AES_GCM"), &json!("dm9sdW1lLTc=")));
    }
    let mode = |name: &str| fs::metadata(scratch.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("home"), mode("home/root.key")), (0o700, 0o600));

    // A second run makes nothing but data keys.
    let again = scratch.run("generate --key alias/app --create");
    assert_eq!(again.err, "");
    assert_eq!(rows(&again.done())[0]["KeyId"], keys[0]["KeyId"]);

    let opened = rows(&scratch.run_with("decrypt --in -", text.as_bytes()).done());
    for (key, opened) in keys.iter().zip(&opened) {
        assert_eq!(key["Plaintext"], opened["Plaintext"]);
        assert_eq!(opened.as_object().unwrap().len(), 5);
    }
}

#[test]
fn create_never_makes_a_root_key_beside_a_store_nor_a_key_without_alias() {
    let scratch = Scratch::with_key();
    fs::remove_file(scratch.path("home/root.key")).unwrap();
    scratch.run("generate --key alias/app --create").ended(2, "root.key\" is missing");
    assert!(!scratch.path("home/root.key").exists());

    let fresh = Scratch::new();
    fresh.run("generate --key app --create").ended(1, "\"app\"");
    assert!(!fresh.path("home").exists());
    fresh.run("generate --requests - --create").ended(1, "--create");
}

#[test]
fn two_first_commands_at_once_make_one_home() {
    let scratch = Scratch::new();
    let children: Vec<Child> = (0..4)
        .map(|_| scratch.command("generate --key alias/app --create").spawn().unwrap())
        .collect();
    let ids: Vec<Value> = children
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{output:?}");
            rows(&String::from_utf8(output.stdout).unwrap())[0]["KeyId"].clone()
        })
        .collect();
    assert!(ids.iter().all(|id| id == &ids[0]), "{ids:?}");
}

#[test]
fn every_line_is_answered_in_its_place() {
    let scratch = Scratch::with_key();
    let long = format!("{{\"KeyId\":\"{}\"}}", "x".repeat(70_000));
    let aad = "A".repeat(4 * 2731);
    let over = format!(r#"{{"KeyId":"alias/app","NumberOfBytes":32,"Aad":"{aad}"}}"#);
    let good = r#"{"NumberOfBytes":32,"KeyId":"alias/app","Aad":"\/w=="}"#;
    let cases: [(&[u8], &str, &str); 18] = [
        (good.as_bytes(), "", ""),
        (b"", "InvalidParameter", "Line 2 is blank"),
        (b"{", "InvalidParameter", "Line 3 is not JSON"),
        (br#"{"KeyId":"alias/none","NumberOfBytes":1}"#, "Forbidden.KeyNotFound", "alias/none"),
        (br#"{"KeyId":"alias/app","NumberOfBytes":0}"#, "InvalidParameter", "NumberOfBytes 0"),
        (br#"{"KeyId":"alias/app","NumberOfBytes":1025}"#, "InvalidParameter", "1025"),
        (br#"{"KeyId":"alias/app","NumberOfBytes":-1}"#, "InvalidParameter", "`-1`"),
        (br#"{"KeyId":"alias/app","NumberOfBytes":1.5}"#, "InvalidParameter", "`1.5`"),
        (br#"{"KeyId":"alias/app","NumberOfBytes":"32"}"#, "InvalidParameter", "\"32\""),
        (br#"{"KeyId":"alias/app"}"#, "InvalidParameter", "NumberOfBytes is missing"),
        (br#"{"KeyId":"a","NumberOfBytes":1,"Foo":2}"#, "InvalidParameter", "\"Foo\""),
        (br#"{"KeyId":"a","KeyId":"b","NumberOfBytes":1}"#, "InvalidParameter", "twice"),
        (br#"{"KeyId":"a","NumberOfBytes":1,"Aad":"%"}"#, "InvalidParameter", "\"%\""),
        (b"\xff\xfe", "InvalidParameter", "Line 14 is not UTF-8"),
        (long.as_bytes(), "InvalidParameter", "Line 15 is longer than 65536"),
        (over.as_bytes(), "InvalidParameter", "8193"),
        (b"  \r", "InvalidParameter", "Line 17 is blank"),
        (good.as_bytes(), "", ""),
    ];
    // The last line has no end.
    let input = cases.map(|(line, ..)| line).join(&b'\n');
    let ran = scratch.run_with("generate --requests - --out out.jsonl", &input);
    assert_eq!(ran.ended(1, "16 of 18 requests were refused"), "");
    let text = fs::read_to_string(scratch.path("out.jsonl")).unwrap();
    let answers = rows(&text);
    assert_eq!(answers.len(), cases.len());
    for (answer, (line, expected, part)) in answers.iter().zip(cases) {
        let shown = String::from_utf8_lossy(&line[..line.len().min(80)]);
        assert_eq!(code(answer), expected, "{shown}: {answer}");
        let id = answer["RequestId"].as_str().unwrap();
        assert_eq!((id.len(), id.as_bytes()[14]), (36, b'4'), "{id}");
        if !part.is_empty() {
            assert!(answer["Error"]["Message"].as_str().unwrap().contains(part), "{answer}");
        }
    }
    assert_eq!(answers[0]["Aad"], "/w==");

    // Decryption keeps the places, and hands Error lines on as they are.
    let ran = scratch.run("decrypt --in out.jsonl");
    let opened = ran.ended(1, "passed on");
    for ((line, answer), opened) in text.lines().zip(&answers).zip(opened.lines()) {
        if code(answer).is_empty() {
            assert_eq!(answer["Plaintext"], rows(opened)[0]["Plaintext"]);
        } else {
            assert_eq!(line, opened);
        }
    }
}

#[test]
fn advance_and_without_plaintext() {
    let scratch = Scratch::with_key();
    let old = scratch.run("generate --key alias/app").done();
    scratch.run("key rotate alias/app").done();
    let shown: Value =
        serde_json::from_str(&scratch.run("key show alias/app --json").done()).unwrap();
    let versions = shown["KeyVersions"].as_array().unwrap();
    let advance =
        rows(&scratch.run("generate --key alias/app --advance --without-plaintext").done());
    assert_eq!(advance[0]["KeyVersionId"], versions[1]["KeyVersionId"]);
    assert_eq!(shown["PrimaryKeyVersion"], versions[1]["KeyVersionId"]);
    assert!(advance[0].get("Plaintext").is_none());
    let raw = rows(&scratch.run("generate --key alias/app").done());
    assert_eq!(raw[0]["KeyVersionId"], versions[0]["KeyVersionId"]);
    // A blob that describes itself needs nothing beside it.
    let bare = format!("{}\n{old}", json!({ "CiphertextBlob": advance[0]["CiphertextBlob"] }));
    assert_eq!(scratch.run_with("decrypt --in -", bare.as_bytes()).done().lines().count(), 2);
}

#[test]
fn a_rotating_key_is_better_used_with_advance() {
    let scratch = Scratch::with_key();
    scratch.run("key set-rotation alias/app --every 30d").done();
    let ran = scratch.run("generate --key alias/app --count 3");
    assert!(ran.err.contains("rotates by itself") && ran.err.contains("--advance"), "{ran:?}");
    assert_eq!(scratch.run("generate --key alias/app --advance").err, "");
}

#[test]
fn decrypt_spares_the_wrapped_keys_that_it_reads() {
    let scratch = Scratch::with_key();
    scratch.run("generate --key alias/app --out keys.jsonl").done();
    let before = fs::read(scratch.path("keys.jsonl")).unwrap();
    scratch.run("decrypt --in keys.jsonl --out ./keys.jsonl").ended(1, "would be lost");
    assert_eq!(fs::read(scratch.path("keys.jsonl")).unwrap(), before);
}

#[test]
fn decrypt_refuses_without_saying_what_was_wrong() {
    let scratch = Scratch::with_key();
    let good = rows(&scratch.run("generate --key alias/app --bytes 4").done()).remove(0);
    let with = |name: &str, value: Value| {
        let mut row = good.clone();
        row[name] = value;
        let ran = scratch.run_with("decrypt --in -", row.to_string().as_bytes());
        rows(&ran.ended(1, "")).remove(0)
    };
    let mut messages = vec![
        with("Aad", json!("AAAA"))["Error"].clone(),
        with("Iv", json!("AAAAAAAAAAAAAAAA"))["Error"].clone(),
    ];
    let blob = good["CiphertextBlob"].as_str().unwrap();
    for len in (0..blob.len()).step_by(4) {
        messages.push(with("CiphertextBlob", json!(blob[..len]))["Error"].clone());
    }
    for message in &messages {
        assert_eq!(message, &json!({ "Code": "InternalFailure", "Message": "Internal Failure." }));
    }
    for (name, value) in [("Iv", "AAAA"), ("Algorithm", "AES_CBC"), ("Aad", "?"), ("Extra", "")] {
        assert_eq!(code(&with(name, json!(value))), "InvalidParameter", "{name}");
    }
    assert_eq!(code(&with("KeyId", json!("alias/none"))), "Forbidden.KeyNotFound");
}

#[test]
fn usage_errors_exit_1_and_help_exits_0() {
    let scratch = Scratch::new();
    for (args, part) in [
        ("nonsense", "nonsense"),
        ("generate", "--key"),
        ("generate --key a --count x", "'x'"),
        ("generate --key a --count -1", "'-1'"),
        ("generate --key a --count 1e6", "in digits alone"),
        ("generate --key a --bytes -1", "'-1'"),
        ("generate --key a --requests r", "--requests"),
        ("generate --requests r --count 3", "--count"),
        ("key set-rotation a", "--every"),
        ("key schedule-deletion a", "--days"),
        ("key schedule-deletion a --days -3", "7 to 366"),
        ("decrypt", "--in"),
    ] {
        scratch.run(args).ended(1, part);
    }
    assert_eq!(scratch.run("").code, Some(1));
    for args in ["", "init", "key", "key create", "key import", "alias", "generate", "decrypt"] {
        let help = scratch.run(&format!("{args} --help")).done();
        assert!(help.contains("keymill "), "{help}");
    }
    assert!(scratch.run("--help").done().contains("generate --key alias/app --count 10 --create"));
    assert!(scratch.run("--version").done().starts_with("keymill "));
}

#[test]
fn homes() {
    let scratch = Scratch::new();
    scratch.run("key list").ended(2, "there is no key store");
    scratch.run("init").done();
    scratch.run("init").ended(1, "exists already");
    assert!(scratch.run("key list").done().starts_with("No keys yet"));
    assert_eq!(scratch.run("key list --json").done(), "[]\n");
    scratch.run("alias list").done();

    let mut command = scratch.command("init");
    let ran = command.env_remove("KEYMILL_HOME").env_remove("HOME");
    run(ran, b"").ended(1, "neither XDG_DATA_HOME nor HOME");
    let mut command = scratch.command("info");
    command.env("KEYMILL_HOME", "").env("XDG_DATA_HOME", "relative").env("HOME", "/nowhere");
    let out = run(&mut command, b"").done();
    assert!(out.contains("/nowhere/.local/share/keymill"), "{out}");
    let mut command = scratch.command("info --home elsewhere");
    assert!(run(&mut command, b"").done().contains("elsewhere"));

    let root_key = scratch.path("home/root.key");
    let bytes = fs::read(&root_key).unwrap();
    fs::write(&root_key, [0; 31]).unwrap();
    scratch.run("key list").ended(2, "31 bytes");
    fs::write(&root_key, [0; 32]).unwrap();
    scratch.run("key list").ended(2, "does not open this store");
    fs::write(&root_key, bytes).unwrap();
    fs::set_permissions(&root_key, PermissionsExt::from_mode(0o644)).unwrap();
    scratch.run("key list").ended(2, "chmod 600");
    fs::set_permissions(&root_key, PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(scratch.path("home/keys.db"), [7; 5000]).unwrap();
    assert!(scratch.run("info").ended(2, "integrity").contains("does not open"));
}

#[test]
fn the_life_of_a_key() {
    let scratch = Scratch::new();
    scratch.run("init").done();
    let args =
        "key create --alias alias/a --spec AES_128 --rotate-every 90d --description disks --json";
    let key: Value = serde_json::from_str(&scratch.run(args).done()).unwrap();
    for (name, value) in [
        ("Aliases", json!(["alias/a"])),
        ("KeySpec", json!("AES_128")),
        ("Scheme", json!("direct")),
        ("Origin", json!("generated")),
        ("KeyState", json!("Enabled")),
        ("Description", json!("disks")),
        ("RotationInterval", json!("7776000s")),
    ] {
        assert_eq!(key[name], value, "{name}");
    }
    assert!(key["CreationDate"].as_str().unwrap().ends_with('Z'));
    let id = key["KeyId"].as_str().unwrap();

    scratch.run("key disable alias/a").done();
    let out = scratch.run("generate --key alias/a --count 2").ended(1, "all 2 data keys");
    assert_eq!(rows(&out).iter().map(code).collect::<Vec<_>>(), ["Rejected.Disabled"; 2]);
    scratch.run(&format!("key enable {id}")).done();
    scratch.run("key schedule-deletion alias/a --days 6").ended(1, "PendingWindowInDays 6");
    assert!(scratch.run("key schedule-deletion alias/a --days 7").done().contains("Deletion"));
    scratch.run("generate --key alias/a").ended(1, "Rejected.PendingDeletion");
    scratch.run("key enable alias/a").ended(1, "Rejected.StateModifiedFailed");
    scratch.run("key cancel-deletion alias/a").done();
    scratch.run("key set-rotation alias/a --every 6d").ended(1, "InvalidParameter");
    assert!(!scratch.run("key set-rotation alias/a --off").done().contains("Rotates"));
    assert!(scratch.run("key list").done().contains(id));

    scratch.run("alias create alias/b alias/a").done();
    scratch.run("alias create alias/b alias/a").ended(1, "AliasAlreadyExists");
    scratch.run(&format!("alias update alias/b {id}")).done();
    let aliases: Value = serde_json::from_str(&scratch.run("alias list --json").done()).unwrap();
    assert_eq!(aliases[1], json!({ "AliasName": "alias/b", "KeyId": id }));
    scratch.run("alias delete alias/b").done();
    scratch.run("alias delete alias/b").ended(1, "Forbidden.AliasNotFound");
    scratch.run("key show alias/b").ended(1, "Forbidden.KeyNotFound");
    assert_eq!(scratch.run("key run-due").done(), "Nothing was due.\n");
}

#[test]
fn due_work_is_reported() {
    let scratch = Scratch::new();
    scratch.run("init").done();
    let root_key = RootKey::from_file(scratch.path("home/root.key")).unwrap();
    let past = SystemTime::now() - Duration::from_secs(8 * 86_400);
    let engine = Engine::builder()
        .clock(move || past)
        .open(scratch.path("home/keys.db"), &root_key)
        .unwrap();
    let rotating = CreateKey {
        rotation_period: Some(RotationPeriod::parse("7d").unwrap()),
        ..CreateKey::default()
    };
    let rotating = engine.create_key(&rotating).unwrap().key_id;
    let doomed = engine.create_key(&CreateKey::default()).unwrap().key_id;
    engine.schedule_key_deletion(doomed.as_str(), 7).unwrap();
    drop(engine);
    let report: Value = serde_json::from_str(&scratch.run("key run-due --json").done()).unwrap();
    let expected = json!({
        "Rotated": [rotating.as_str()], "Deleted": [doomed.as_str()], "Failed": []
    });
    assert_eq!(report, expected);
}

#[test]
fn imported_material_is_raw() {
    let scratch = Scratch::new();
    scratch.run("init").done();
    let import = |bytes: &[u8]| scratch.run_with("key import --material -", bytes);
    import(&[7; 31]).ended(1, "31 bytes");
    import(&[7; 3000]).ended(1, "at least 256 bytes");
    import(b"").ended(1, "0 bytes");
    import(b"00112233445566778899aabbccddeeff\n").ended(1, "look like hex");
    import(&b"0123456789abcdef".repeat(4)).ended(1, "look like hex");
    import(b"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").ended(1, "look like text");
    import(b"sixteen raw byte\n").ended(1, "line end");
    fs::write(scratch.path("kek"), [7; 24]).unwrap();
    scratch.run("key import --material kek --scheme derived").ended(1, "AES_192");
    assert!(scratch.run("key import --material kek --alias alias/i").done().contains("imported"));
    scratch.run("key import --material kek").ended(1, "InvalidKeyMaterial");
    let text = import(b"0123456789abcdef");
    assert!(text.err.starts_with("keymill: warning: ") && text.code == Some(0), "{text:?}");
    scratch.run("key rotate alias/i").ended(1, "UnsupportedOperation");
    scratch.run("key import --material absent").ended(2, "absent");
}

/// Names in the scratch directory besides the home.
fn files(scratch: &Scratch) -> Vec<String> {
    let entries = fs::read_dir(scratch.0.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name != "home").collect();
    names.sort();
    names
}

#[test]
fn files_appear_when_they_are_complete() {
    let scratch = Scratch::with_key();
    scratch.run("generate --key alias/app --out keys.jsonl").done();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&scratch.path("keys.jsonl")), 0o600);
    // Over a file that others could read.
    fs::set_permissions(scratch.path("keys.jsonl"), PermissionsExt::from_mode(0o644)).unwrap();
    scratch.run("generate --key alias/app --count 2 --out keys.jsonl").done();
    assert_eq!(mode(&scratch.path("keys.jsonl")), 0o600);
    // Through a link, which stays.
    std::os::unix::fs::symlink("keys.jsonl", scratch.path("link")).unwrap();
    scratch.run("generate --key alias/app --count 0 --out link").done();
    assert!(scratch.path("link").is_symlink());
    assert_eq!(fs::read(scratch.path("keys.jsonl")).unwrap(), b"");

    scratch.run("generate --key alias/app --out .").ended(1, "is a directory");
    scratch.run("generate --key alias/app --out new/").ended(1, "names no file");
    scratch.run("generate --key alias/app --out absent/x").ended(2, "absent/x");
    scratch.run("decrypt --in absent --out y").ended(2, "absent");
    scratch.run("generate --key alias/app --out /dev/null").done();
    if Path::new("/dev/full").exists() {
        scratch.run("generate --key alias/app --out /dev/full").ended(2, "/dev/full");
        let mut command = scratch.command("key list");
        command.stdout(File::options().write(true).open("/dev/full").unwrap());
        run(&mut command, b"").ended(2, "standard output");
    }
    assert_eq!(files(&scratch), ["keys.jsonl", "link"]);
}

#[test]
fn no_output_replaces_the_key_store() {
    let scratch = Scratch::with_key();
    let home = scratch.path("home");
    for name in ["keys.db", "root.key", "keys.db-wal"] {
        let out = home.join(name);
        let out = out.to_str().expect("UTF-8");
        scratch.run(&format!("generate --key alias/app --out {out}")).ended(1, "key store");
        scratch.run(&format!("decrypt --in /dev/null --out {out}")).ended(1, "key store");
    }
    scratch.run("generate --key alias/app").done();
}

/// Signals as a shell leaves them to a command in the foreground: what runs these tests may ignore them, and a program
/// that is told to ignore a signal does.
#[expect(unsafe_code, reason = "what a child does before it becomes the program")]
fn in_foreground(command: &mut Command) -> &mut Command {
    let reset = || {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: sets a default action; async-signal-safe.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: `reset` allocates nothing and takes no lock.
    unsafe { command.pre_exec(reset) }
}

#[test]
fn an_interrupted_run_leaves_no_file() {
    for (signal, args) in [
        ("-INT", "generate --key alias/app --count 1000000000 --out keys.jsonl"),
        // Blocked: standard input stays open and says nothing.
        ("-TERM", "generate --requests - --out keys.jsonl"),
    ] {
        let scratch = Scratch::with_key();
        let mut child = in_foreground(&mut scratch.command(args)).spawn().unwrap();
        let _stdin = child.stdin.take();
        while files(&scratch).is_empty() {
            thread::sleep(Duration::from_millis(5));
        }
        let killed = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"), "{output:?}");
        assert_eq!(files(&scratch), [""; 0]);
    }
}

#[test]
fn a_run_under_nohup_outlives_its_terminal() {
    let scratch = Scratch::with_key();
    let keymill = env!("CARGO_BIN_EXE_keymill");
    let script = format!("trap '' HUP; exec {keymill} generate --requests - --out keys.jsonl");
    let mut command = Command::new("sh");
    command.args(["-c", &script]).current_dir(scratch.0.path()).stdin(Stdio::piped());
    let mut child = command.env("KEYMILL_HOME", scratch.path("home")).spawn().unwrap();
    let stdin = child.stdin.take();
    while files(&scratch).is_empty() {
        thread::sleep(Duration::from_millis(5));
    }
    let killed = Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    thread::sleep(Duration::from_millis(700));
    drop(stdin);
    assert!(child.wait().unwrap().success());
    assert_eq!(files(&scratch), ["keys.jsonl"]);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let scratch = Scratch::with_key();
    let mut child = scratch.command("generate --key alias/app --count 1000000").spawn().unwrap();
    let mut first = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]), "{output:?}");
}

#[test]
fn a_request_is_answered_before_the_next_one_comes() {
    let scratch = Scratch::with_key();
    let mut child = scratch.command("generate --requests -").spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    for _ in 0..3 {
        stdin.write_all(b"{\"KeyId\":\"alias/app\",\"NumberOfBytes\":16}\n").unwrap();
        let mut row = String::new();
        std::io::BufRead::read_line(&mut stdout, &mut row).unwrap();
        assert_eq!(code(&rows(&row)[0]), "");
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
}
