//! A store whose file is taken away, replaced or put back under an engine that runs.
//!
//! Method: engines on files that are moved and copied by name, as a backup is restored. Nothing is granted by a file
//! that the path does not lead to; what is there is used once it has passed every check; the right file makes all good
//! again.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use keymill::{CreateKey, Engine, ErrorKind, GenerateDataKeyRequest, KeyPool, KeyPoolConfig};
use keymill::{Operation, RootKey, Scheme};

fn root_key(byte: u8) -> RootKey {
    let bytes: Vec<u8> = (0..32).map(|i| byte ^ i).collect();
    RootKey::from_bytes(&bytes).unwrap()
}

const REQUEST: GenerateDataKeyRequest<'static> = GenerateDataKeyRequest::new("alias/a", 32);

struct Scratch {
    _dir: tempfile::TempDir,
    home: PathBuf,
    store: PathBuf,
}

impl Scratch {
    /// A home with a store of one `Direct` key, closed.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        fs::create_dir(&home).unwrap();
        let store = home.join("keys.db");
        drop(new_store(&store, 1));
        Self { _dir: dir, home, store }
    }

    fn open(&self) -> Engine {
        Engine::open(&self.store, &root_key(1)).unwrap()
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.home.with_file_name(name)
    }
}

fn new_store(path: &Path, root: u8) -> Engine {
    let engine = Engine::create(path, &root_key(root)).unwrap();
    let alias = Some("alias/a".to_owned());
    let key = CreateKey { alias, scheme: Some(Scheme::Direct), ..CreateKey::default() };
    engine.create_key(&key).unwrap();
    engine
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Removes or moves the store and its companions.
fn take_away(store: &Path, to: Option<&Path>) {
    for suffix in ["", "-wal", "-shm"] {
        let with = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        match to {
            Some(to) => drop(fs::rename(with(store), with(to))),
            None => drop(fs::remove_file(with(store))),
        }
    }
}

fn refused(engine: &Engine) -> Option<String> {
    let error = engine.generate_data_key(&REQUEST).err()?;
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
    Some(error.message())
}

#[test]
fn an_older_copy_that_is_moved_over_the_store_is_read_anew_and_old_leases_are_void() {
    let scratch = Scratch::new();
    fs::copy(&scratch.store, scratch.beside("backup.db")).unwrap();
    let engine = scratch.open();
    let key = engine.key("alias/a").unwrap();
    let config = KeyPoolConfig::new(Operation::GenerateDataKey, 32);
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    wait_until("the pool's filling", || pool.metrics().depth > 500);
    for _ in 0..200 {
        engine.generate_data_key(&REQUEST).unwrap();
    }
    let granted =
        |engine: &Engine| engine.describe_key("alias/a").unwrap().versions[0].wraps_granted;
    assert!(granted(&engine) > 700);
    engine
        .create_key(&CreateKey { alias: Some("alias/new".into()), ..Default::default() })
        .unwrap();

    let restored = scratch.beside("restored.db");
    fs::copy(scratch.beside("backup.db"), &restored).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", scratch.store.display()));
    }
    fs::rename(&restored, &scratch.store).unwrap();
    wait_until("the new file's use", || {
        engine.key("alias/new").is_err_and(|error| error.kind() == ErrorKind::KeyNotFound)
    });
    // Whatever the engine and its pool have from the old file is not used: each wrap is counted in the new one.
    let before = granted(&engine);
    assert!(before < 2000, "the count is the new file's");
    let made = (0..300).filter(|_| engine.generate_data_key(&REQUEST).is_ok()).count() as u64;
    assert_eq!(made, 300);
    assert!(granted(&engine) >= 300);
    drop(pool);
    drop(engine);
    // Nothing was given back that this file had not granted.
    let engine = scratch.open();
    assert!(granted(&engine) >= 300, "{}", granted(&engine));
    assert_eq!(engine.list_keys().unwrap().len(), 1);
}

#[test]
fn a_missing_store_refuses_at_once_and_is_used_again_when_it_is_back() {
    let scratch = Scratch::new();
    let engine = scratch.open();
    engine.generate_data_key(&REQUEST).unwrap();
    let key = engine.key("alias/a").unwrap();
    let config = KeyPoolConfig::new(Operation::GenerateDataKey, 32);
    let pool = KeyPool::new(&engine, &key, config).unwrap();
    wait_until("the pool's filling", || pool.metrics().depth > 500);
    let away = scratch.beside("away.db");
    take_away(&scratch.store, Some(&away));
    wait_until("the refusal", || refused(&engine).is_some());
    // Keys that were made ahead of need are not handed out either.
    assert_eq!(pool.take().unwrap_err().kind(), ErrorKind::StoreUnavailable);
    assert_eq!(pool.take_many(3).unwrap_err().kind(), ErrorKind::StoreUnavailable);
    let health = engine.store_health();
    assert!(health.is_grave && health.is_refusing, "{health:?}");
    // Every use of the store is refused, too, and nothing is made in its place.
    assert!(engine.create_key(&CreateKey::default()).is_err());
    assert!(engine.list_keys().is_err());
    assert!(!scratch.store.exists());
    take_away(&away, Some(&scratch.store));
    wait_until("the return", || refused(&engine).is_none());
    wait_until("the pool's return", || pool.take().is_ok());
    assert!(engine.store_health().failure.is_none());

    // A directory that gets another name takes its store along.
    let renamed = scratch.beside("renamed");
    fs::rename(&scratch.home, &renamed).unwrap();
    wait_until("the refusal", || refused(&engine).is_some());
    fs::rename(&renamed, &scratch.home).unwrap();
    wait_until("the return", || refused(&engine).is_none());
}

#[test]
fn another_store_a_damaged_one_and_another_root_key_are_refused_by_name() {
    let scratch = Scratch::new();
    let engine = scratch.open();
    engine.generate_data_key(&REQUEST).unwrap();
    let away = scratch.beside("away.db");
    take_away(&scratch.store, Some(&away));
    for (root, damage) in [(1, false), (2, false), (1, true)] {
        drop(new_store(&scratch.store, root));
        if damage {
            fs::write(&scratch.store, b"no store at all, whatever its name is").unwrap();
        }
        let why = if damage { "no keymill store" } else { "another store than before" };
        wait_until("the refusal", || refused(&engine).is_some_and(|text| text.contains(why)));
        assert!(engine.create_key(&CreateKey::default()).is_err());
        assert!(engine.store_health().is_grave);
        take_away(&scratch.store, None);
    }
    take_away(&away, Some(&scratch.store));
    wait_until("the return", || refused(&engine).is_none());
}

#[test]
fn a_log_that_is_removed_under_an_engine_is_noticed() {
    let scratch = Scratch::new();
    let engine = scratch.open();
    engine
        .create_key(&CreateKey { alias: Some("alias/new".into()), ..Default::default() })
        .unwrap();
    let log = PathBuf::from(format!("{}-wal", scratch.store.display()));
    assert!(log.exists());
    for suffix in ["-wal", "-shm"] {
        fs::remove_file(format!("{}{suffix}", scratch.store.display())).unwrap();
    }
    // What was in the log alone is gone, and the engine says what the file says.
    wait_until("the loss", || {
        engine.key("alias/new").is_err_and(|error| error.kind() == ErrorKind::KeyNotFound)
    });
    assert_eq!(engine.list_keys().unwrap().len(), 1);
    drop(engine);
    assert_eq!(scratch.open().list_keys().unwrap().len(), 1);
}

#[test]
fn a_copy_over_the_open_file_is_refused_or_read_anew() {
    let scratch = Scratch::new();
    let backup = fs::read(&scratch.store).unwrap();
    let engine = scratch.open();
    engine
        .create_key(&CreateKey { alias: Some("alias/new".into()), ..Default::default() })
        .unwrap();
    for suffix in ["-wal", "-shm"] {
        fs::remove_file(format!("{}{suffix}", scratch.store.display())).unwrap();
    }
    // As `cp` does it, by another process: the inode stays.
    let copy = scratch.beside("backup.db");
    fs::write(&copy, &backup).unwrap();
    let status = std::process::Command::new("cp").arg(&copy).arg(&scratch.store).status().unwrap();
    assert!(status.success());
    wait_until("the older state", || {
        engine.key("alias/new").is_err_and(|error| error.kind() == ErrorKind::KeyNotFound)
    });
    engine.generate_data_key(&REQUEST).unwrap();
}
