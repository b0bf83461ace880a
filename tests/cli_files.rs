//! Goal: whatever kind of file a command reads or writes, nothing is lost, nothing hangs, and nothing looks done that is
//! not.
//!
//! Method: runs the built program on every kind of file and descriptor that can be made here, through a shell where
//! redirections are what is tested, and looks at exit codes, messages, and what is left.
#![cfg(feature = "cli")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, PermissionsExt, symlink},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A scratch directory with a key store in `home` and a key `alias/app`.
struct Scratch(tempfile::TempDir);

#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Scratch {
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        scratch.sh("$K init && $K key create --alias alias/app").done();
        scratch.sh("$K generate --key alias/app --count 3 --out keys.jsonl").done();
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A script, in which `$K` is the program.
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .current_dir(self.0.path())
            .env("K", env!("CARGO_BIN_EXE_keymill"))
            .env("KEYMILL_HOME", self.path("home"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn sh(&self, script: &str) -> Ran {
        Ran::of(self.command(script).spawn().unwrap())
    }

    /// Names in the scratch directory.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn lines(&self, name: &str) -> usize {
        fs::read_to_string(self.path(name)).unwrap().lines().count()
    }
}

impl Ran {
    fn of(child: Child) -> Self {
        let output = child.wait_with_output().unwrap();
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    #[track_caller]
    fn ended(self, code: i32, message: &str) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.contains(message), "{message}: {self:?}");
        assert!(self.err.contains("\nhint: ") && !self.err.contains("panicked"), "{self:?}");
        self.out
    }
}

#[test]
fn no_input_is_written_over_under_any_name() {
    let scratch = Scratch::new();
    fs::hard_link(scratch.path("keys.jsonl"), scratch.path("hard")).unwrap();
    symlink("keys.jsonl", scratch.path("link")).unwrap();
    symlink("/dev/stdin", scratch.path("to-stdin")).unwrap();
    let before = fs::read(scratch.path("keys.jsonl")).unwrap();
    for script in [
        "$K decrypt --in keys.jsonl --out ./keys.jsonl",
        "$K decrypt --in hard --out keys.jsonl",
        "$K decrypt --in keys.jsonl --out link",
        "$K decrypt --in - --out keys.jsonl <keys.jsonl",
        "$K decrypt --in /dev/stdin --out hard <keys.jsonl",
        "$K decrypt --in to-stdin --out hard <keys.jsonl",
        "$K decrypt --in /proc/self/fd/7 --out link 7<keys.jsonl",
        "$K decrypt --in keys.jsonl >>hard",
        "$K decrypt --in keys.jsonl 1<>hard",
        "$K decrypt --in - <keys.jsonl 1<>link",
        "$K decrypt --in keys.jsonl --out /dev/fd/3 3>>hard",
        "$K decrypt --in keys.jsonl --out /dev/stdout >>hard",
        "$K generate --requests keys.jsonl --out hard",
        "$K generate --requests - --out keys.jsonl <hard",
        "$K key import --material keys.jsonl >>hard",
    ] {
        let ran = scratch.sh(script);
        assert!(ran.err.contains("are the same file"), "{script}: {ran:?}");
        ran.ended(1, "");
        assert_eq!(fs::read(scratch.path("keys.jsonl")).unwrap(), before, "{script}");
    }
    // What cannot be confused is not: a pipe has been read to its end before the file is replaced.
    scratch.sh("cat keys.jsonl | $K decrypt --in - --out keys.jsonl").done();
    assert_eq!(scratch.lines("keys.jsonl"), 3);
}

#[test]
fn no_file_of_the_home_is_written_under_any_name() {
    let scratch = Scratch::new();
    fs::rename(scratch.path("home/root.key"), scratch.path("elsewhere.key")).unwrap();
    symlink("../elsewhere.key", scratch.path("home/root.key")).unwrap();
    fs::hard_link(scratch.path("home/keys.db"), scratch.path("hard")).unwrap();
    symlink("home/keys.db-journal", scratch.path("journal")).unwrap();
    let read =
        || ["home/keys.db", "elsewhere.key"].map(|name| fs::read(scratch.path(name)).unwrap());
    let before = read();
    for script in [
        "$K generate --key alias/app --out hard",
        "$K generate --key alias/app --out elsewhere.key",
        "$K generate --key alias/app --out journal",
        "$K generate --key alias/app --out home/KEYS.DB-SHM",
        "$K generate --key alias/app --out /dev/fd/3 3>>home/keys.db",
        "$K generate --key alias/app >>elsewhere.key",
        "$K key list >>hard",
        "$K info 1<>home/root.key",
        "$K key import --material elsewhere.key",
        "$K key import --material - <home/root.key",
    ] {
        scratch.sh(script).ended(1, "is part of the key store");
        assert!(read() == before, "{script}");
    }
    // A message would do the damage that it tells of.
    assert_eq!(scratch.sh("$K key list 2>>home/root.key").code, Some(1));
    assert!(read() == before);
    scratch.sh("$K generate --key alias/app").done();
}

#[test]
fn open_descriptors_are_written_as_they_are_open() {
    let scratch = Scratch::new();
    for (name, redirection) in [
        ("/dev/stdout", ">>rows"),
        ("/dev/fd/1", ">>rows"),
        ("/proc/self/fd/3", "3>>rows"),
        ("link", "7>>rows"),
    ] {
        fs::write(scratch.path("rows"), "first\n").unwrap();
        let _ = fs::remove_file(scratch.path("link"));
        symlink("/dev/fd/7", scratch.path("link")).unwrap();
        scratch.sh(&format!("$K generate --key alias/app --out {name} {redirection}")).done();
        assert_eq!(scratch.lines("rows"), 2, "{name}");
        assert!(fs::read_to_string(scratch.path("rows")).unwrap().starts_with("first\n"));
    }
    // The place is shared with the others who hold it.
    let script = "exec 3>rows; echo first >&3; $K generate --key alias/app --out /dev/fd/3; \
                  echo last >&3";
    scratch.sh(script).done();
    let rows = fs::read_to_string(scratch.path("rows")).unwrap();
    assert!(rows.starts_with("first\n{") && rows.ends_with("}\nlast\n"), "{rows}");
    let rest = scratch.sh("(read line; $K decrypt --in /dev/stdin) <keys.jsonl").done();
    assert_eq!(rest.lines().count(), 2);
    scratch.sh("$K generate --key alias/app --out /dev/fd/9").ended(2, "/dev/fd/9");
    scratch.sh("$K generate --key alias/app --out /dev/fd/3 3<keys.jsonl").ended(2, "for reading");
    scratch.sh("$K decrypt --in /dev/fd/3 3>>rows").ended(2, "for writing only");
}

#[test]
fn closed_descriptors_are_no_success_and_no_empty_input() {
    let scratch = Scratch::new();
    for args in
        ["key list", "--help", "--version", "info", "generate --key alias/app", "key --help"]
    {
        scratch.sh(&format!("$K {args} >&-")).ended(2, "standard output is closed");
        scratch.sh(&format!("$K {args} 1<keys.jsonl")).ended(2, "for reading only");
        if Path::new("/dev/full").exists() {
            scratch.sh(&format!("$K {args} >/dev/full")).ended(2, "No space left");
        }
        // A device that somebody else has opened both ways is none of these.
        scratch.sh(&format!("$K {args} 1<>/dev/null <&-")).done();
        assert_eq!(scratch.sh(&format!("$K {args} >&- 2>&-")).code, Some(2));
    }
    for args in ["decrypt --in -", "generate --requests -", "key import --material -"] {
        scratch.sh(&format!("$K {args} <&-")).ended(2, "standard input is closed");
    }
    scratch.sh("$K generate --key alias/app --out rows >&- <&-").done();
    assert_eq!(scratch.lines("rows"), 1);
}

/// Whoever is told of a failure does it again, and a refused argument asks for nothing.
#[test]
fn what_fails_has_made_nothing() {
    let scratch = Scratch::new();
    let before = scratch.sh("$K key list --json && $K client list --json").done();
    for args in
        ["key create --alias alias/new", "key rotate alias/app", "alias create alias/b alias/app"]
    {
        scratch.sh(&format!("$K {args} >&-")).ended(2, "standard output is closed");
    }
    let client =
        "$K client create --name c --out c.json --password-file c.pw --keys '*' --allow all >&-";
    scratch.sh(client).ended(2, "standard output is closed");
    let aad = "a".repeat(8193);
    for more in ["--bytes 2000", "--bytes 0", &format!("--aad {aad}")] {
        let script = format!("$K generate --key alias/new --create {more}");
        assert_eq!(scratch.sh(&script).code, Some(1), "{script}");
    }
    assert_eq!(scratch.sh("$K key list --json && $K client list --json").done(), before);
}

#[test]
fn standard_error_changes_nothing() {
    let scratch = Scratch::new();
    // With a warning on its way.
    scratch.sh("$K key set-rotation alias/app --every 30d").done();
    for (script, code) in [
        ("$K generate --key alias/app --count 5 2>&-", 0),
        ("$K generate --key alias/app --count 5 2>/dev/full", 0),
        ("$K generate --key alias/app --count 5 2</dev/null", 0),
        ("$K generate --key alias/none --count 5 2>&-", 1),
        ("$K generate --key alias/none --count 5 2>/dev/full", 1),
    ] {
        let ran = scratch.sh(script);
        assert_eq!((ran.code, ran.out.lines().count()), (Some(code), 5), "{script}: {ran:?}");
    }
    // Nobody reads what nobody can write.
    let (reader, mut writer) = std::io::pipe().unwrap();
    set_nonblocking(&writer, true);
    while writer.write(&[0; 4096]).is_ok() {}
    set_nonblocking(&writer, false);
    let mut command = scratch.command("$K generate --key alias/app --count 5");
    let output = command.stderr(writer).output().unwrap();
    assert!(output.status.success() && output.stdout.iter().filter(|b| **b == b'\n').count() == 5);
    drop(reader);
}

#[expect(unsafe_code, reason = "the mode of a descriptor")]
fn set_nonblocking(file: &impl AsRawFd, on: bool) {
    let flags = if on { libc::O_NONBLOCK } else { 0 };
    // SAFETY: sets the flags of an open descriptor.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }, 0);
}

#[test]
fn descriptors_that_do_not_wait_are_waited_for() {
    let scratch = Scratch::new();
    let (mut reader, writer) = std::io::pipe().unwrap();
    set_nonblocking(&writer, true);
    let mut child =
        scratch.command("$K generate --key alias/app --count 5000").stdout(writer).spawn().unwrap();
    // It fills the pipe, and more.
    thread::sleep(Duration::from_millis(500));
    let mut rows = String::new();
    reader.read_to_string(&mut rows).unwrap();
    assert_eq!((child.wait().unwrap().code(), rows.lines().count()), (Some(0), 5000));

    let (reader, mut writer) = std::io::pipe().unwrap();
    set_nonblocking(&reader, true);
    let child = scratch.command("$K decrypt --in -").stdin(reader).spawn().unwrap();
    thread::sleep(Duration::from_millis(300));
    writer.write_all(&fs::read(scratch.path("keys.jsonl")).unwrap()).unwrap();
    drop(writer);
    assert_eq!(Ran::of(child).done().lines().count(), 3);
}

#[test]
fn a_fifo_waits_for_its_reader_and_heeds_an_interruption() {
    let scratch = Scratch::new();
    scratch.sh("mkfifo fifo").done();
    let child = scratch.command("$K generate --key alias/app --out fifo").spawn().unwrap();
    assert_eq!(scratch.sh("cat fifo").done().lines().count(), 1);
    Ran::of(child).done();
    assert!(fs::metadata(scratch.path("fifo")).is_ok_and(|about| !about.is_file()));

    let script = "trap - INT TERM; exec $K generate --key alias/app --out fifo";
    let mut child = scratch.command(script).spawn().unwrap();
    let mut said = [0; 20];
    // It says what it waits for.
    child.stderr.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    let start = Instant::now();
    Ran::of(child).ended(2, "interrupted");
    assert!(start.elapsed() < Duration::from_secs(20));

    let script = "cat fifo >got & $K decrypt --in keys.jsonl --out fifo && wait";
    scratch.sh(script).done();
    assert_eq!(scratch.lines("got"), 3);
    let script = "cat keys.jsonl >fifo & $K decrypt --in fifo --out got && wait";
    scratch.sh(script).done();
    assert_eq!(scratch.lines("got"), 3);
    scratch.sh("$K decrypt --in fifo --out fifo").ended(1, "are the same file");
}

#[test]
fn what_cannot_be_written_is_told_before_any_work() {
    let scratch = Scratch::new();
    fs::write(scratch.path("read-only"), "kept").unwrap();
    fs::set_permissions(scratch.path("read-only"), PermissionsExt::from_mode(0o400)).unwrap();
    let _socket = UnixListener::bind(scratch.path("socket")).unwrap();
    let long = "x".repeat(300);
    for (out, code, message) in [
        ("none/rows", 2, "none/rows"),
        ("keys.jsonl/rows", 2, "keys.jsonl/rows"),
        ("read-only", 1, "is read-only"),
        ("socket", 1, "is a socket"),
        (".", 1, "is a directory"),
        ("new/", 1, "names no file"),
        ("$(printf 'a\\033[31mb\\377')/rows", 2, "a\\u{1b}[31mb\\xFF/rows"),
        (&*long, 2, "longer than the system allows"),
    ] {
        let script =
            format!("$K --home fresh generate --key alias/new --create --count 10 --out \"{out}\"");
        let ran = scratch.sh(&script);
        assert!(ran.err.contains(message), "{out}: {ran:?}");
        ran.ended(code, "");
        assert!(!scratch.path("fresh").exists(), "{out}");
        let ran = scratch.sh(&format!("$K decrypt --in keys.jsonl --out \"{out}\""));
        ran.ended(code, message);
    }
    assert_eq!(fs::read(scratch.path("read-only")).unwrap(), b"kept");
    assert_eq!(scratch.files(), ["home", "keys.jsonl", "read-only", "socket"]);
    scratch.sh("$K decrypt --in .").ended(2, "is a directory");
    let ran = scratch.sh("$K $(printf 'a\\033]0;x\\007b\\010')");
    assert!(!ran.err.chars().any(|c| c.is_control() && c != '\n'), "{ran:?}");
    ran.ended(1, "unrecognized");
}

#[test]
fn a_write_that_fails_in_the_middle_leaves_nothing() {
    let scratch = Scratch::new();
    // A limit of a file's size stands for a disk that is full.
    let script = "ulimit -f 100; $K generate --key alias/app --count 100000 --out rows";
    scratch.sh(script).ended(2, "cannot write \"");
    scratch
        .sh("ulimit -f 100; $K generate --key alias/app --count 100000 >rows")
        .ended(2, "ulimit");
    fs::remove_file(scratch.path("rows")).unwrap();
    assert_eq!(scratch.files(), ["home", "keys.jsonl"]);
}

#[test]
fn a_link_that_a_stranger_has_put_where_everybody_may_is_not_followed() {
    let scratch = Scratch::new();
    let shared = scratch.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, PermissionsExt::from_mode(0o1777)).unwrap();
    symlink("../keys.jsonl", shared.join("link")).unwrap();
    symlink("..", shared.join("dir")).unwrap();
    scratch.sh("mkfifo -m 666 shared/fifo").done();
    // One's own are.
    scratch.sh("$K generate --key alias/app --out shared/link").done();
    assert_eq!(scratch.lines("keys.jsonl"), 1);
    if fs::metadata(&shared).unwrap().uid() != 0 {
        eprintln!("not root: a stranger's link cannot be made here");
        return;
    }
    for name in ["link", "dir", "fifo"] {
        std::os::unix::fs::lchown(shared.join(name), Some(65_534), Some(65_534)).unwrap();
    }
    for out in ["shared/link", "shared/dir/rows", "shared/fifo"] {
        let ran = scratch.sh(&format!("$K generate --key alias/app --count 2 --out {out}"));
        ran.ended(1, "somebody else has put where everybody may");
    }
    assert_eq!(scratch.lines("keys.jsonl"), 1);
    assert!(shared.join("link").is_symlink());
}

#[test]
fn inputs_of_other_forms_are_named_with_what_to_do() {
    let scratch = Scratch::new();
    let utf16 = |text: &str| {
        let units = std::iter::once(0xfeff).chain(text.encode_utf16());
        units.flat_map(u16::to_le_bytes).collect::<Vec<_>>()
    };
    let request = "{\"KeyId\":\"alias/app\",\"NumberOfBytes\":32}\n";
    for (bytes, what, next) in [
        (utf16(request), "UTF-16", "iconv -f UTF-16"),
        (utf16(request)[2..].to_vec(), "UTF-16", "iconv -f UTF-16"),
        (format!("[{request}]").into_bytes(), "a JSON array", "jq -c '.[]'"),
        (request.replace(',', ",\n").replace('{', "{\n").into_bytes(), "several lines", "jq -c ."),
        (b"\x1f\x8b\x08\0rest".to_vec(), "gzip", "gzip -dc"),
        (b"\x28\xb5\x2f\xfdrest".to_vec(), "zstd", "zstd -dc"),
        (b"PAR1rest".to_vec(), "Parquet", "JSON Lines"),
        (b"ARROW1\0\0rest".to_vec(), "an Arrow IPC file", "streaming format"),
        (fs::read(scratch.path("home/keys.db")).unwrap(), "SQLite", "name a file"),
    ] {
        fs::write(scratch.path("input"), bytes).unwrap();
        for args in ["generate --requests", "decrypt --in"] {
            for (name, from) in [("input", ""), ("-", "<input")] {
                let ran = scratch.sh(&format!("$K {args} {name} --out rows {from}"));
                assert!(ran.err.contains(next), "{ran:?}");
                assert_eq!(ran.ended(1, what), "");
            }
        }
    }
    assert!(!scratch.path("rows").exists());
    for text in [format!("\u{feff}{request}"), request.replace('\n', "\r\n"), "\u{feff}".into()] {
        fs::write(scratch.path("input"), &text).unwrap();
        let rows = scratch.sh("$K generate --requests input").done();
        assert_eq!(rows.lines().count(), usize::from(text.len() > 3), "{text:?}");
    }
}

/// A file of 0 bytes, as in `touch`, and what the umask says of others, do not matter.
#[test]
fn new_files_are_private_whatever_the_umask() {
    let scratch = Scratch::new();
    scratch.sh("umask 000; $K generate --key alias/app --out rows").done();
    let mode = File::open(scratch.path("rows")).unwrap().metadata().unwrap().mode() & 0o777;
    assert_eq!(mode, 0o600);
}
