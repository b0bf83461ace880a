//! A store beside what another state or another store has left: told as what it is, and mended without losing a byte.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use super::helpers::*;
use crate::{
    error::{Error, ErrorKind},
    store::{KeyStore, RootKey, SqliteStore, mend_store, place::with_suffix},
};

fn companion(store: &Path, suffix: &str) -> PathBuf {
    with_suffix(store, suffix)
}

/// A store that was left by a crash: its newest rows are in the log alone. `rows` of them.
fn crashed(scratch: &Scratch, rows: usize) {
    let path = scratch.path.clone();
    let child = Child::run(Birth::Fork, || {
        let store = SqliteStore::open(&path, &root(), tier()).unwrap();
        for _ in 0..rows {
            store.create(&direct()).unwrap();
        }
        std::mem::forget(store);
        0
    });
    child.join();
    assert!(fs::metadata(companion(&scratch.path, "-wal")).unwrap().len() > 0);
}

/// A scratch store with `rows` keys, and a copy of its file.
fn backed_up(rows: usize) -> (Scratch, Vec<u8>, Vec<String>) {
    let (scratch, store) = Scratch::new();
    for _ in 0..rows {
        store.create(&direct()).unwrap();
    }
    let before = contents(&store);
    drop(store);
    let backup = fs::read(&scratch.path).unwrap();
    (scratch, backup, before)
}

/// Says what opening says, mends, and sees that the store is the one that was restored and that nothing is gone.
fn mends(scratch: &Scratch, backup: &[u8], before: &[String], stale: &[&str]) -> Error {
    let error = scratch.open().err().expect("opened beside a log of another state");
    assert_eq!(error.kind(), ErrorKind::StoreCorrupt, "{error}");
    for part in [&companion(&scratch.path, stale[0]).display().to_string(), "keymill mend"] {
        assert!(error.message().contains(part), "{part}: {error}");
    }
    assert_eq!(fs::read(&scratch.path).unwrap(), backup, "a refusal writes nothing");
    let left: Vec<_> =
        stale.iter().map(|suffix| fs::read(companion(&scratch.path, suffix)).unwrap()).collect();
    let moved = mend_store(&scratch.path, &root()).unwrap();
    for (suffix, content) in stale.iter().zip(left) {
        let place = companion(&scratch.path, suffix);
        let moved = moved.iter().find(|moved| moved.from == place).expect(suffix);
        assert_eq!(fs::read(&moved.to).unwrap(), content, "{suffix}");
        assert!(moved.to.to_str().unwrap().starts_with(place.to_str().unwrap()), "{moved:?}");
    }
    assert_eq!(contents(&scratch.open().unwrap()), before);
    assert_eq!(mend_store(&scratch.path, &root()).unwrap(), [], "nothing is left to mend");
    error
}

/// Logs of a few transactions, and logs so long that they began anew in between.
#[test]
fn a_log_of_a_later_state_is_told_and_moved_aside() {
    for rows in [40, 300] {
        let (scratch, backup, before) = backed_up(5);
        // A first crash and its recovery, so that the log is not all that happened since.
        crashed(&scratch, rows);
        drop(scratch.open().unwrap());
        crashed(&scratch, rows);
        fs::write(&scratch.path, &backup).unwrap();
        mends(&scratch, &backup, &before, &["-wal", "-shm"]);
    }
}

/// What SQLite can replay in whole is the later state, with nothing missing: no rows of two states are ever mixed.
#[test]
fn a_log_that_holds_all_that_happened_since_is_the_later_state() {
    let (scratch, backup, _) = backed_up(5);
    crashed(&scratch, 3);
    let later = contents(&scratch.open().unwrap());
    crashed(&scratch, 1);
    let log = fs::read(companion(&scratch.path, "-wal")).unwrap();
    fs::write(&scratch.path, &backup).unwrap();
    fs::write(companion(&scratch.path, "-wal"), &log).unwrap();
    match scratch.open() {
        Ok(store) => assert_eq!(contents(&store).len(), later.len() + 1),
        Err(error) => assert!(error.message().contains("keymill mend"), "{error}"),
    }
}

#[test]
fn a_log_of_another_store_is_told_and_moved_aside() {
    let other_root = RootKey::from_bytes(&[3; 32]).unwrap();
    for same_root in [true, false] {
        let (scratch, backup, before) = backed_up(3);
        let other_home = tempfile::tempdir().unwrap();
        let other = other_home.path().join("keys.db");
        let child = Child::run(Birth::Fork, || {
            let root_of_other = if same_root { &root() } else { &other_root };
            let store = SqliteStore::create(&other, root_of_other, &rng()).unwrap();
            for _ in 0..30 {
                store.create(&direct()).unwrap();
            }
            std::mem::forget(store);
            0
        });
        child.join();
        fs::copy(companion(&other, "-wal"), companion(&scratch.path, "-wal")).unwrap();
        mends(&scratch, &backup, &before, &["-wal"]);
    }
}

/// SQLite would write it into the file as soon as it opens it.
#[test]
fn a_journal_beside_a_store_is_told_before_it_is_played_back() {
    let (scratch, backup, before) = backed_up(3);
    let other = scratch.home.path().join("other.db");
    let journal = {
        let _gate = crate::os::fork_gate();
        let raw = rusqlite::Connection::open(&other).unwrap();
        raw.execute_batch(
            "PRAGMA cache_size = 1; CREATE TABLE a (b); \
             INSERT INTO a VALUES (zeroblob(100000)); \
             BEGIN; UPDATE a SET b = zeroblob(200000)",
        )
        .unwrap();
        fs::read(companion(&other, "-journal")).unwrap()
    };
    assert!(journal.len() > 512);
    fs::write(companion(&scratch.path, "-journal"), &journal).unwrap();
    mends(&scratch, &backup, &before, &["-journal"]);
}

#[test]
fn what_belongs_to_the_store_is_left_alone() {
    let (scratch, _, before) = backed_up(3);
    // An index without a log is made anew by SQLite, and an empty log or journal says nothing.
    for suffix in ["-shm", "-wal", "-journal"] {
        fs::write(companion(&scratch.path, suffix), b"").unwrap();
    }
    fs::write(companion(&scratch.path, "-shm"), vec![7; 32768]).unwrap();
    assert_eq!(contents(&scratch.open().unwrap()), before);
    // Nor is the log of a crash touched.
    crashed(&scratch, 7);
    assert_eq!(mend_store(&scratch.path, &root()).unwrap(), []);
    assert_eq!(scratch.open().unwrap().load().unwrap().keys.len(), 10);
    // Nor anything, if the store is damaged by itself: the log may be all that there is.
    crashed(&scratch, 7);
    let raw = fs::read(&scratch.path).unwrap();
    let mut damaged = raw.clone();
    damaged[4096 * 2..].fill(9);
    fs::write(&scratch.path, &damaged).unwrap();
    let error = mend_store(&scratch.path, &root()).unwrap_err();
    assert!(!error.message().contains("keymill mend"), "{error}");
    assert!(companion(&scratch.path, "-wal").exists());
}

#[test]
fn a_store_that_somebody_has_open_is_not_mended() {
    let (scratch, backup, before) = backed_up(5);
    crashed(&scratch, 40);
    drop(scratch.open().unwrap());
    crashed(&scratch, 40);
    let log = fs::read(companion(&scratch.path, "-wal")).unwrap();
    fs::write(&scratch.path, &backup).unwrap();
    let other = std::process::Command::new("sqlite3")
        .arg(&scratch.path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let Ok(mut other) = other else {
        eprintln!("SKIPPED: there is no sqlite3; a store open elsewhere was NOT tested");
        return;
    };
    let mut input = other.stdin.take().unwrap();
    input.write_all(b"PRAGMA application_id;\n").unwrap();
    input.flush().unwrap();
    // It has the store open once it has answered.
    let mut answer = [0; 1];
    other.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
    let error = mend_store(&scratch.path, &root()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
    assert!(error.message().contains("Another process"), "{error}");
    assert_eq!(fs::read(companion(&scratch.path, "-wal")).unwrap(), log);
    drop(input);
    other.wait().unwrap();
    fs::write(&scratch.path, &backup).unwrap();
    fs::write(companion(&scratch.path, "-wal"), &log).unwrap();
    mend_store(&scratch.path, &root()).unwrap();
    assert_eq!(contents(&scratch.open().unwrap()), before);
}
