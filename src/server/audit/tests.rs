//! The audit log against files that others remove, rename, cut, lock and share, and against what is no file.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink},
    path::Path,
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn record(number: u64) -> Record {
    Record {
        time: time_now(),
        request_id: format!("request {number}"),
        client_id: "KAAP.\n\"".into(),
        authenticated: true,
        remote: "127.0.0.1:1".into(),
        operation: "Decrypt",
        status: 200,
        codes: [("OK", 1)].into(),
        keys: [("key-a".into(), number)].into(),
        requested: Default::default(),
        duration_us: 1,
        refusals_skipped: None,
    }
}

fn all_lines(path: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Without those of the server's start and end.
fn lines(path: &Path) -> Vec<serde_json::Value> {
    all_lines(path).into_iter().filter(|line| line["by"].is_null()).collect()
}

fn numbers(path: &Path) -> Vec<u64> {
    lines(path).iter().map(|line| line["keys"]["key-a"].as_u64().unwrap()).collect()
}

fn try_open(path: &Path, sync: bool, max_bytes: u64) -> io::Result<Audit> {
    let config = AuditConfig { path: path.to_owned(), sync, max_bytes };
    Audit::open(&config, Taboo::default(), Event::new("Start", "server"))
}

fn open(path: &Path, sync: bool, max_bytes: u64) -> Audit {
    try_open(path, sync, max_bytes).unwrap()
}

fn refusal(path: &Path) -> String {
    let refused = try_open(path, false, u64::MAX).err().expect("refused").to_string();
    assert!(refused.contains(&format!("{path:?}")), "{refused}");
    refused
}

fn fill(audit: &Audit, number: u64) -> Written {
    audit.reserve().unwrap().fill(record(number))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

#[test]
fn records_are_lines_in_order_and_rotate_by_size() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("audit.jsonl");
    let audit = open(&path, false, 20_000);
    for number in 0..1000 {
        fill(&audit, number);
        if number % 50 == 0 {
            thread::sleep(Duration::from_millis(2));
        }
    }
    assert_eq!(audit.close(), 0);
    let mut files: Vec<_> =
        fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    // The present file sorts first.
    files.rotate_left(1);
    assert!(files.len() > 5, "{files:?}");
    let all: Vec<_> = files.iter().flat_map(|file| numbers(file)).collect();
    assert_eq!(all, (0..1000).collect::<Vec<_>>());
    assert_eq!(lines(&files[0])[0]["client_id"], "KAAP.\n\"");
    let (start, end) = (all_lines(&files[0]), all_lines(files.last().unwrap()));
    assert_eq!((&start[0]["operation"], &start[0]["by"]), (&"Start".into(), &"server".into()));
    assert_eq!(end.last().unwrap()["operation"], "End");
    assert_eq!(audit.reopened(), 0, "its own rotation is not told as another's");
}

#[test]
fn with_sync_a_record_is_there_when_its_answer_goes_out() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("audit.jsonl");
    let audit = open(&path, true, u64::MAX);
    for number in 0..20 {
        assert!(block_on(fill(&audit, number).wait()));
        assert_eq!(lines(&path).len() as u64, number + 1);
    }
    assert_eq!(audit.close(), 0);
}

#[test]
fn what_cannot_be_written_is_told_when_the_log_is_opened() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    symlink("/dev/full", at("full")).unwrap();
    assert!(refusal(&at("full")).contains("No space left"));
    fs::create_dir(at("directory")).unwrap();
    assert!(refusal(&at("directory")).contains("it is a directory"));
    assert!(refusal(&at("none/audit.jsonl")).contains("there is no directory"));
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    assert!(refusal(&at("socket")).contains("it is a socket"));
    let writable = File::create(at("w"));
    writable.unwrap().set_permissions(fs::Permissions::from_mode(0o666)).unwrap();
    assert!(refusal(&at("w")).contains("everybody can write it"));
    symlink(at("loop"), at("loop")).unwrap();
    refusal(&at("loop"));
    // A stream has no disk that an answer could wait for.
    assert!(try_open(Path::new("/dev/null"), false, 1 << 20).is_ok());
    assert!(try_open(Path::new("/dev/null"), true, 1 << 20).is_err());
}

/// By what it is, under any name.
#[test]
fn the_files_of_others_are_refused_under_any_name() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    fs::write(at("keys.db"), "keys").unwrap();
    fs::hard_link(at("keys.db"), at("hard")).unwrap();
    symlink("keys.db", at("soft")).unwrap();
    for name in ["keys.db", "hard", "soft"] {
        let mut taboo = Taboo::default();
        taboo.add(&at("keys.db"), "a file of the key store");
        let config = AuditConfig { path: at(name), sync: false, max_bytes: u64::MAX };
        let refused = Audit::open(&config, taboo, Event::new("Start", "server")).err().unwrap();
        assert!(refused.to_string().contains("it is a file of the key store"), "{refused}");
    }
    assert_eq!(fs::read(at("keys.db")).unwrap(), b"keys");
}

#[test]
fn a_log_has_one_writer() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("audit.jsonl");
    let audit = open(&path, false, u64::MAX);
    assert!(refusal(&path).contains("another process has locked it"));
    // The lock follows the file to its next one.
    fs::rename(&path, home.path().join("old")).unwrap();
    audit.reopen();
    wait_until("not reopened", || path.exists());
    assert!(refusal(&path).contains("another process has locked it"));
    // One that ends is waited for.
    let ending = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(audit);
    });
    drop(open(&path, false, u64::MAX));
    ending.join().unwrap();
}

/// Whatever others do to the file or its name, each record that is made afterwards is in the file of that name.
#[test]
fn no_record_is_lost_with_a_file_that_is_removed_renamed_replaced_or_cut() {
    let home = tempfile::tempdir().unwrap();
    let (directory, away) = (home.path().join("log"), home.path().join("away"));
    let path = directory.join("audit.jsonl");
    type Deed<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let deeds: [Deed<'_>; 5] = [
        ("removed", Box::new(|| fs::remove_file(&path).unwrap())),
        ("renamed", Box::new(|| fs::rename(&path, directory.join("old")).unwrap())),
        (
            "replaced",
            Box::new(|| {
                fs::write(directory.join("new"), "").unwrap();
                fs::rename(directory.join("new"), &path).unwrap();
            }),
        ),
        ("cut", Box::new(|| drop(File::create(&path).unwrap()))),
        (
            "in a directory that was renamed",
            Box::new(|| {
                fs::rename(&directory, &away).unwrap();
                fs::create_dir(&directory).unwrap();
            }),
        ),
    ];
    for (what, deed) in deeds {
        let _ = (fs::remove_dir_all(&directory), fs::remove_dir_all(&away));
        fs::create_dir(&directory).unwrap();
        let audit = open(&path, false, u64::MAX);
        fill(&audit, 0);
        wait_until("not settled", || audit.0.as_ref().unwrap().taken.load(Ordering::Relaxed) == 0);
        deed();
        fill(&audit, 1);
        wait_until(what, || audit.reopened() == 1);
        fill(&audit, 2);
        assert_eq!(audit.close(), 0, "{what}");
        // Record 1 may be in the file that has another name now.
        let mut found = numbers(&path);
        for old in [directory.join("old"), away.join("audit.jsonl")] {
            if old.exists() {
                found.extend(numbers(&old));
            }
        }
        assert!([1, 2].iter().all(|number| found.contains(number)), "{what}: {found:?}");
    }
}

#[test]
fn a_log_whose_place_is_gone_fails_closed_until_it_is_back() {
    let home = tempfile::tempdir().unwrap();
    let (directory, away) = (home.path().join("log"), home.path().join("away"));
    fs::create_dir(&directory).unwrap();
    let path = directory.join("audit.jsonl");
    let audit = open(&path, true, u64::MAX);
    assert!(block_on(fill(&audit, 1).wait()));
    fs::rename(&directory, &away).unwrap();
    assert!(!block_on(fill(&audit, 2).wait()));
    assert!(audit.is_failing());
    assert_eq!(audit.reserve().err().map(|refusal| refusal.status), Some(503));
    fs::rename(&away, &directory).unwrap();
    wait_until("not written again", || !audit.is_failing());
    assert!(block_on(fill(&audit, 3).wait()));
    assert_eq!(audit.close(), 0);
    let found = numbers(&path);
    assert!([1, 2, 3].iter().all(|number| found.contains(number)), "{found:?}");
}

#[test]
fn a_line_that_broke_off_is_closed_and_no_other_is_touched() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("audit.jsonl");
    fs::write(&path, "{\"a\":1}\n{\"broken").unwrap();
    let audit = open(&path, true, u64::MAX);
    assert!(block_on(fill(&audit, 1).wait()));
    // And one that breaks off later, by whomever.
    let mut other = fs::OpenOptions::new().append(true).open(&path).unwrap();
    other.write_all(b"{\"foreign").unwrap();
    assert!(block_on(fill(&audit, 2).wait()));
    assert_eq!(audit.close(), 0);
    let text = fs::read_to_string(&path).unwrap();
    let broken: Vec<_> = text
        .lines()
        .filter(|line| serde_json::from_str::<serde_json::Value>(line).is_err())
        .collect();
    assert_eq!(broken, ["{\"broken", "{\"foreign"]);
    assert_eq!(text.lines().count(), 7, "{text}");
}

#[test]
fn a_file_that_cannot_be_renamed_grows_on_and_a_taken_name_is_left_alone() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("audit.jsonl");
    let place = |sink: &Sink| match sink {
        Sink::File(_) => sink.rename(),
        Sink::Stream(_) => unreachable!(),
    };
    let sink = Sink::open(&path, &Taboo::default(), Duration::ZERO).unwrap();
    fs::remove_file(&path).unwrap();
    place(&sink).unwrap_err();
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0, "the name that was taken is let go");
    // A descriptor's name cannot be given away at all.
    let file = File::create(&path).unwrap();
    let descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let audit = open(Path::new(&descriptor), true, 1);
    for number in 0..3 {
        assert!(block_on(fill(&audit, number).wait()));
    }
    assert_eq!(audit.close(), 0);
    assert_eq!(numbers(&path), [0, 1, 2]);
    assert_eq!(fs::read_dir(&home).unwrap().count(), 1);
}

fn fifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn reader(path: &Path) -> File {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

#[test]
fn a_fifo_is_written_while_it_is_read_and_never_hangs() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("fifo");
    fifo(&path);
    assert!(refusal(&path).contains("no process reads this FIFO"));
    let mut read = reader(&path);
    let audit = open(&path, false, 1);
    let mut text = String::new();
    fill(&audit, 1);
    wait_until("record 1", || {
        let _ = read.read_to_string(&mut text);
        text.contains("request 1")
    });
    // Its reader goes away.
    drop(read);
    fill(&audit, 2);
    wait_until("not failing", || audit.is_failing());
    assert!(audit.reserve().is_err());
    let mut read = reader(&path);
    wait_until("not written again", || !audit.is_failing());
    let mut text = String::new();
    wait_until("record 2", || {
        let _ = read.read_to_string(&mut text);
        text.contains("request 2") && text.ends_with('\n')
    });
    text.lines().for_each(|line| drop(serde_json::from_str::<Value>(line).unwrap()));
    // Its reader stops reading.
    let mut sent = 10;
    wait_until("never full", || {
        while let Ok(slot) = audit.reserve() {
            slot.fill(record(sent));
            sent += 1;
        }
        audit.is_failing()
    });
    let mut text = Vec::new();
    wait_until("not drained", || {
        let _ = read.read_to_end(&mut text);
        String::from_utf8_lossy(&text).contains(&format!("request {}\"", sent - 1))
    });
    wait_until("not well again", || !audit.is_failing());
    assert_eq!(audit.close(), 0);
    let text = String::from_utf8(text).unwrap();
    let records = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count();
    assert_eq!(records as u64, sent - 10);
}

#[test]
fn the_end_is_bounded_and_tells_how_many_records_are_lost() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join("log");
    fs::create_dir(&directory).unwrap();
    let audit = open(&directory.join("audit.jsonl"), false, u64::MAX);
    let slots = [1, 2, 3].map(|number| (number, audit.reserve().unwrap()));
    let (cut, going_on) = (audit.reserve().unwrap(), audit.reserve().unwrap());
    fs::rename(&directory, home.path().join("away")).unwrap();
    wait_until("not noticed", || audit.is_failing());
    for (number, slot) in slots {
        slot.fill(record(number));
    }
    // A request that was ended, and one that has not ended yet.
    drop(cut);
    let since = Instant::now();
    assert_eq!(audit.close(), 5);
    assert!(since.elapsed() < AUDIT_END_TIME + PATIENCE);
    assert_eq!(audit.lost(), 5);
    drop(going_on);
}

#[test]
fn texts_are_ascii() {
    let mut line = Vec::new();
    let text = "\u{9b}31m\u{202e}\u{7f}\u{1b}é\u{1f511}\\\"";
    Line::Event(Event::new("Start", "server").with("text", text)).write(&mut line);
    assert!(line.iter().all(|byte| byte.is_ascii_graphic() || b" \n".contains(byte)));
    let read: Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(read["text"], text);
}

#[test]
fn refusals_before_authentication_cannot_fill_the_disk() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("audit.jsonl");
    let audit = open(&path, false, u64::MAX);
    let refuse =
        || audit.record_refusal(|skipped| Record { refusals_skipped: skipped, ..record(0) });
    let recorded = (0..10_000).filter(|_| refuse()).count();
    assert!(recorded < 10_000 / 2, "{recorded}");
    thread::sleep(Duration::from_millis(1100));
    assert!(refuse());
    audit.close();
    let told: u64 = lines(&path).iter().filter_map(|line| line["refusals_skipped"].as_u64()).sum();
    assert_eq!(told + lines(&path).len() as u64, 10_001);
}

#[test]
fn places_are_bounded_and_given_back() {
    let home = tempfile::tempdir().unwrap();
    let audit = open(&home.path().join("audit.jsonl"), false, u64::MAX);
    let slots: Vec<_> = (0..AUDIT_QUEUE_MAX).map(|_| audit.reserve().unwrap()).collect();
    assert!(audit.reserve().is_err());
    drop(slots);
    assert!(audit.reserve().is_ok());
    audit.close();
}
