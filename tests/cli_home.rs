//! Goal: a home is used only as its owner left it, and what a restore, a tool or a hand did to it is said in a sentence.
//!
//! Method: as `cli.rs`: the built program on homes of its own, and its exit codes, messages and files.
#![cfg(feature = "cli")]

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    #[track_caller]
    fn ended(&self, code: i32, says: &str) -> &Self {
        assert!(self.code == Some(code) && self.err.contains(says), "{:?} {}", self.code, self.err);
        self
    }
}

fn run(home: &Path, args: &str) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keymill"));
    let output = command.arg("--home").arg(home).args(args.split_whitespace()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn new_home() -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let home = scratch.path().join("home");
    run(&home, "init").ended(0, "made a key store");
    run(&home, "key create --alias alias/app").ended(0, "");
    (scratch, home)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

#[test]
fn a_restored_store_beside_a_foreign_journal_is_mended_on_demand() {
    let (_scratch, home) = new_home();
    assert!(run(&home, "mend").ended(0, "").out.contains("Nothing to mend"));
    let journal = home.join("keys.db-journal");
    // The head of a rollback journal, as the file format has it.
    let mut head = vec![0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7, 0, 0, 0, 0];
    head.resize(1024, 1);
    fs::write(&journal, &head).unwrap();
    let store = fs::read(home.join("keys.db")).unwrap();
    run(&home, "key list").ended(2, "keys.db-journal").ended(2, "keymill mend");
    assert_eq!(fs::read(home.join("keys.db")).unwrap(), store);
    let mended = run(&home, "mend");
    mended.ended(0, "");
    assert!(mended.out.contains("Moved") && mended.out.contains("passes every check"));
    assert!(!journal.exists());
    assert!(run(&home, "key list").ended(0, "").out.contains("alias/app"));
    let kept = fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().path());
    let kept: Vec<_> = kept.filter(|path| fs::read(path).unwrap() == head).collect();
    assert_eq!(kept.len(), 1, "the journal is kept under another name");
    let nowhere = home.join("nowhere");
    run(&nowhere, "mend").ended(2, "there is no key store");
}

#[test]
fn what_others_may_change_is_refused_with_the_remedy() {
    let (_scratch, home) = new_home();
    for (name, mode, remedy, fine) in [
        ("", 0o777, "chmod o-w", 0o700),
        ("", 0o1777, "chmod o-w", 0o750),
        ("keys.db", 0o606, "chmod o-w", 0o600),
        ("root.key", 0o604, "chmod 600", 0o400),
        ("root.key", 0o660, "chmod 600", 0o440),
    ] {
        let path = if name.is_empty() { home.clone() } else { home.join(name) };
        set_mode(&path, mode);
        let shown = path.display().to_string();
        run(&home, "key list").ended(2, remedy).ended(2, &shown);
        set_mode(&path, fine);
        run(&home, "key list").ended(0, "");
    }
    // Nor is a store made where others can change it.
    let open = home.join("open");
    fs::create_dir(&open).unwrap();
    set_mode(&open, 0o777);
    run(&open, "init").ended(2, "chmod o-w");
    assert_eq!(fs::read_dir(&open).unwrap().count(), 0);
}

#[test]
fn text_in_the_place_of_a_root_key_is_told() {
    let (_scratch, home) = new_home();
    for (text, says) in [
        ("0123456789abcdef0123456789abcdef", "look like hex"),
        ("n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=\n", "look like base64"),
        ("correct horse battery staple, ok", "look like text"),
    ] {
        fs::write(home.join("root.key"), text).unwrap();
        run(&home, "key list").ended(2, says);
        let empty = home.join("empty");
        fs::create_dir_all(&empty).unwrap();
        fs::write(empty.join("root.key"), text).unwrap();
        set_mode(&empty.join("root.key"), 0o600);
        run(&empty, "generate --key alias/a --create").ended(1, says);
        assert!(!empty.join("keys.db").exists());
    }
}

#[test]
fn a_path_that_is_too_long_is_told_before_anything_is_made() {
    let scratch = tempfile::tempdir().unwrap();
    let deep = |len: usize| {
        let mut path = scratch.path().canonicalize().unwrap();
        while path.as_os_str().len() < len {
            let part = (len - path.as_os_str().len() - 1).clamp(1, 60);
            path.push("d".repeat(part));
        }
        path
    };
    run(&deep(500), "init").ended(1, "it may have 504");
    run(&scratch.path().join("x".repeat(256)), "init").ended(1, "it may have 255");
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    run(&deep(500), "key list").ended(1, "it may have 504");
    // `/keys.db` behind it is what SQLite can open at most.
    let longest = deep(496);
    assert_eq!(longest.as_os_str().len(), 496);
    run(&longest, "init").ended(0, "");
    run(&longest, "key create --alias alias/app").ended(0, "");
    assert_eq!(fs::read_dir(&longest).unwrap().count(), 2);
}

#[test]
fn a_path_is_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    for name in [&b"caf\xe9 \xff"[..], b"file:a?mode=memory", b"a%20b#c", b"new\nline"] {
        let home = scratch.path().join(OsStr::from_bytes(name));
        run(&home, "init").ended(0, "");
        run(&home, "key create --alias alias/app").ended(0, "");
        assert!(run(&home, "key list").ended(0, "").out.contains("alias/app"));
        assert!(run(&home, "mend").ended(0, "").out.contains("Nothing to mend"));
        assert_eq!(fs::read_dir(&home).unwrap().count(), 2);
    }
}
