//! Goal: `keymill serve` goes on, and ends, whatever becomes of the files and pipes that it was started with; what
//! cannot work is told at its start.
//!
//! Method: the built program on a scratch home, with standard output and error that nobody reads, that are full or
//! closed; and with variables of the environment as env files leave them. No test depends on how long anything takes.
#![cfg(all(feature = "cli", feature = "server"))]

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(60);

struct Scratch(tempfile::TempDir);

/// A server that ends with the test.
struct Server(Child);

impl Scratch {
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        assert!(scratch.command("init").output().unwrap().status.success());
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
            .env_clear()
            .env("KEYMILL_HOME", self.path("home"))
            .stdin(Stdio::null());
        command
    }

    fn serve(&self, more: &str) -> Command {
        let mut command = self.command(&format!("serve --listen 127.0.0.1:0 {more}"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A server on another file than the one that is there, or a refusal.
    #[track_caller]
    fn refused(&self, command: &mut Command, code: i32, message: &str) -> Output {
        let output = command.output().unwrap();
        let err = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(output.status.code(), Some(code), "{err}");
        assert!(err.contains(message), "{err}");
        assert!(err.contains("\nhint: "), "{err}");
        output
    }
}

impl Server {
    fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn end(&mut self) {
        self.signal("TERM");
        assert_eq!(self.wait().code(), Some(0));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The address in a ready line.
fn address(line: &str) -> String {
    let (_, rest) = line.split_once("ready on http://").expect(line);
    rest.split([',', ' ', '"', '\n']).next().unwrap().to_owned()
}

fn first_line_with(what: &str, from: impl Read) -> String {
    let mut lines = BufReader::new(from).lines();
    lines.find_map(|line| line.ok().filter(|line| line.contains(what))).expect(what)
}

/// Asks for a path that is refused, so many times, each of which is a line of the log at level debug.
fn ask(address: &str, times: usize) {
    let mut left = times;
    while left > 0 {
        let now = left.min(200);
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut sender = stream.try_clone().unwrap();
        let send = thread::spawn(move || {
            for number in 0..now {
                let last = if number + 1 == now { "close" } else { "keep-alive" };
                let head = format!("GET /x HTTP/1.1\r\nhost: a\r\nconnection: {last}\r\n\r\n");
                sender.write_all(head.as_bytes()).unwrap();
            }
        });
        let mut text = Vec::new();
        stream.read_to_end(&mut text).unwrap();
        send.join().unwrap();
        assert_eq!(String::from_utf8_lossy(&text).matches("HTTP/1.1 404").count(), now);
        left -= now;
    }
}

#[test]
fn a_log_that_nobody_reads_stops_no_request_and_no_end_and_tells_what_was_dropped() {
    let scratch = Scratch::new();
    for is_read_later in [true, false] {
        let mut server = Server::start(&mut scratch.serve("--log-level debug"));
        let ready = first_line_with("ready", server.0.stdout.take().unwrap());
        let err = server.0.stderr.take().unwrap();
        // More than the pipe and the queue hold.
        ask(&address(&ready), 12_000);
        if is_read_later {
            let found = Arc::new(AtomicBool::new(false));
            let told = Arc::clone(&found);
            let reader = thread::spawn(move || {
                for line in BufReader::new(err).lines() {
                    if line.unwrap().contains("were dropped") {
                        told.store(true, Ordering::Relaxed);
                    }
                }
            });
            let deadline = Instant::now() + PATIENCE;
            while !found.load(Ordering::Relaxed) {
                assert!(Instant::now() < deadline, "nobody tells of what was dropped");
                thread::sleep(Duration::from_millis(20));
            }
            server.end();
            reader.join().unwrap();
        } else {
            server.end();
            drop(err);
        }
    }
}

/// Its other holder may have made it so; a line that finds no room now finds it later.
#[test]
fn a_standard_error_that_does_not_block_loses_no_line() {
    const REQUESTS: usize = 4000;
    let scratch = Scratch::new();
    let (theirs, ours) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut command = scratch.serve("--log-level debug");
    command.stderr(OwnedFd::from(theirs));
    let mut server = Server::start(&mut command);
    drop(command);
    let ready = first_line_with("ready", server.0.stdout.take().unwrap());
    ask(&address(&ready), REQUESTS);
    let reader = thread::spawn(move || {
        let lines = BufReader::new(ours).lines();
        lines.filter(|line| line.as_ref().unwrap().contains("InvalidPath")).count()
    });
    server.end();
    assert_eq!(reader.join().unwrap(), REQUESTS);
}

#[test]
fn standard_output_and_error_that_take_nothing_do_not_stop_a_server() {
    let scratch = Scratch::new();
    let full = || File::create("/dev/full").unwrap();
    // Full, and closed by its reader: the log tells where the server is.
    for is_full in [true, false] {
        let mut command = scratch.serve("");
        if is_full {
            command.stdout(full());
        }
        let mut server = Server::start(&mut command);
        drop(server.0.stdout.take());
        let line = first_line_with("ready on", server.0.stderr.take().unwrap());
        ask(&address(&line), 1);
        server.end();
    }
    // And with an error that takes nothing, or has no reader.
    for is_full in [true, false] {
        let mut command = scratch.serve("--log-level debug");
        if is_full {
            command.stderr(full());
        }
        let mut server = Server::start(&mut command);
        drop(server.0.stderr.take());
        let line = first_line_with("ready on", server.0.stdout.take().unwrap());
        ask(&address(&line), 10);
        server.end();
    }
}

#[test]
fn an_audit_log_that_cannot_work_is_refused_at_the_start_with_its_name() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("directory")).unwrap();
    fs::hard_link(scratch.path("home/keys.db"), scratch.path("hard")).unwrap();
    for (path, why) in [
        ("/dev/full", "No space left"),
        ("directory", "it is a directory"),
        ("none/audit.jsonl", "there is no directory"),
        ("hard", "key store"),
    ] {
        let output =
            scratch.command(&format!("serve --listen 127.0.0.1:0 --audit {path}")).output();
        let output = output.unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{err}");
        assert!(err.contains(path) && err.contains(why), "{err}");
    }

    let mut server = Server::start(&mut scratch.serve("--audit audit.jsonl"));
    first_line_with("ready", server.0.stdout.take().unwrap());
    let second = &mut scratch.serve("--audit audit.jsonl");
    scratch.refused(second, 2, "another process has locked it");
    server.end();
    let text = fs::read_to_string(scratch.path("audit.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[test]
fn an_audit_log_on_standard_output_has_it_for_itself() {
    let scratch = Scratch::new();
    let mut server = Server::start(&mut scratch.serve("--audit /dev/stdout"));
    let err = server.0.stderr.take().unwrap();
    let out = server.0.stdout.take().unwrap();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&lines);
    let reader = thread::spawn(move || {
        for line in BufReader::new(out).lines() {
            kept.lock().unwrap().push(line.unwrap());
        }
    });
    let ready = first_line_with("keymill: ready on", err);
    ask(&address(&ready), 3);
    server.end();
    reader.join().unwrap();
    let lines = lines.lock().unwrap();
    let operation = |line: &String| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["operation"].as_str().unwrap().to_owned()
    };
    let operations: Vec<_> = lines.iter().map(operation).collect();
    assert_eq!(operations, ["Start", "other", "other", "other", "End"]);
}

/// The names of the variables that `serve --help` lists.
fn variables(scratch: &Scratch) -> Vec<String> {
    let output = scratch.command("serve --help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    // Lines are broken anywhere.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let names = help.split("[env: ").skip(1).map(|rest| rest.split([']', '=']).next().unwrap());
    let names: Vec<_> = names.map(str::to_owned).collect();
    assert!(names.len() > 15, "{names:?}");
    assert!(names.iter().all(|name| name.starts_with("KEYMILL_")), "{names:?}");
    names
}

#[test]
fn a_variable_that_is_empty_counts_as_unset_whatever_it_is_for() {
    let scratch = Scratch::new();
    let mut command = scratch.serve("");
    for name in variables(&scratch).iter().map(String::as_str).chain(["KEYMILL_TIER"]) {
        command.env(name, "");
    }
    let mut server = Server::start(&mut command);
    let ready = first_line_with("ready", server.0.stdout.take().unwrap());
    ask(&address(&ready), 1);
    server.end();
    // Help names every variable all the same.
    let mut help = scratch.command("serve --help");
    let help = help.env("KEYMILL_METRICS", "").output().unwrap();
    assert!(String::from_utf8(help.stdout).unwrap().contains("KEYMILL_METRICS"));
    // Nothing but the command line says where to listen.
    let mut command = scratch.command("serve");
    scratch.refused(command.env("KEYMILL_LISTEN", ""), 1, "--listen");
}

#[test]
fn a_refused_value_is_told_with_the_variable_that_it_came_from() {
    let scratch = Scratch::new();
    let of_paths = ["KEYMILL_TLS_CERT", "KEYMILL_TLS_KEY", "KEYMILL_CLIENT_CA", "KEYMILL_AUDIT"];
    for name in variables(&scratch) {
        if of_paths.contains(&name.as_str()) {
            continue;
        }
        let mut command = scratch.command("serve");
        if name != "KEYMILL_LISTEN" {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        scratch.refused(command.env(&name, "nonsense"), 1, &name);
    }
    let mut command = scratch.serve("");
    scratch.refused(command.env("KEYMILL_TLS_CERT", "cert.pem"), 1, "KEYMILL_TLS_CERT");
    let mut command = scratch.serve("");
    scratch.refused(command.env("KEYMILL_AUDIT_SYNC", "true"), 1, "KEYMILL_AUDIT_SYNC needs");
    let mut command = scratch.command("info");
    scratch.refused(command.env("KEYMILL_TIER", "fast"), 1, "KEYMILL_TIER is \"fast\"");
    // Nor does the terminal get a command from it.
    let mut command = scratch.command("serve");
    let output =
        command.env("KEYMILL_LISTEN", "\u{1b}[31m\u{9b}\u{202e}\u{200b}").output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.bytes().all(|byte| byte.is_ascii_graphic() || b" \n".contains(&byte)), "{err:?}");
    // A value of the command line is not the variable's.
    let mut command = scratch.command("serve --listen 127.0.0.1:0 --metrics nonsense");
    let output = command.env("KEYMILL_METRICS", "127.0.0.1:1").output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.contains("--metrics") && !err.contains("KEYMILL_METRICS"), "{err}");
}

/// Not a reader of its own: the file that this test names.
#[test]
fn a_log_file_is_no_audit_log() {
    let scratch = Scratch::new();
    let log: &Path = &scratch.path("log");
    let mut command = scratch.serve("--audit log");
    command.stderr(File::create(log).unwrap());
    assert_eq!(command.output().unwrap().status.code(), Some(2));
    let err = fs::read_to_string(log).unwrap();
    assert!(err.contains("standard error goes to"), "{err}");
}
