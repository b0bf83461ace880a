//! Files that are missing, foreign, unwritable or on a full disk: the right error, and nothing changed.
//!
//! What needs a file system of its own runs in a child with its own mount namespace, where that is allowed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::helpers::*;
use crate::{
    error::{Error, ErrorKind},
    store::{KeyChange, KeyStore, SqliteStore},
};

fn open_error(path: &Path) -> Error {
    let error = SqliteStore::open(path, &root(), tier()).err().expect("this had to fail");
    assert!(error.message().contains(&path.display().to_string()), "{error}");
    error
}

#[test]
fn what_is_no_store_is_refused_and_left_alone() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    assert_eq!(open_error(&path("absent")).kind(), ErrorKind::StoreMissing);
    assert_eq!(open_error(&path("absent/deeper")).kind(), ErrorKind::StoreMissing);
    assert_eq!(open_error(home.path()).kind(), ErrorKind::StoreUnavailable);
    assert_eq!(open_error(Path::new("/dev/null")).kind(), ErrorKind::StoreUnavailable);
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "nothing was made");

    rusqlite::Connection::open(path("foreign"))
        .unwrap()
        .execute_batch("CREATE TABLE a (b)")
        .unwrap();
    for (name, content) in [
        ("empty", Vec::new()),
        ("text", b"hello, this is a text and no database at all\n".repeat(100)),
        ("short", b"SQLite format 3\0".to_vec()),
        ("foreign", fs::read(path("foreign")).unwrap()),
    ] {
        fs::write(path(name), &content).unwrap();
        let error = open_error(&path(name));
        assert_eq!(error.kind(), ErrorKind::StoreCorrupt, "{name}: {error}");
        assert_eq!(fs::read(path(name)).unwrap(), content, "{name}");
    }
}

#[test]
fn a_truncated_store_is_refused() {
    let (scratch, store) = Scratch::new();
    for _ in 0..20 {
        store.create(&direct()).unwrap();
    }
    drop(store);
    let whole = fs::read(&scratch.path).unwrap();
    for len in (0..whole.len()).step_by(1999) {
        // SQLite reads zeros behind the end of a last page that is cut; if there were only zeros, nothing is lost.
        let page_end = len.next_multiple_of(4096);
        if page_end == whole.len() && whole[len..].iter().all(|byte| *byte == 0) {
            continue;
        }
        fs::write(&scratch.path, &whole[..len]).unwrap();
        let error = scratch.open().and_then(|store| store.load()).err();
        assert_eq!(
            error.as_ref().map(Error::kind),
            Some(ErrorKind::StoreCorrupt),
            "{len}: {error:?}"
        );
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(super::super::place::with_suffix(&scratch.path, suffix));
        }
    }
    fs::write(&scratch.path, &whole).unwrap();
    assert_eq!(scratch.open().unwrap().load().unwrap().keys.len(), 20);
}

#[test]
fn a_store_is_never_overwritten() {
    let (scratch, store) = Scratch::new();
    store.create(&direct()).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for entry in fs::read_dir(scratch.home.path()).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
    let before = contents(&store);
    let error = SqliteStore::create(&scratch.path, &root(), &rng()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidParameter);
    assert!(error.message().contains("exists already"), "{error}");
    assert_eq!(contents(&store), before);
    drop(store);

    // A log left by a store that was removed would be taken for the new store's.
    let other = scratch.home.path().join("other.db");
    fs::write(super::super::place::with_suffix(&other, "-wal"), b"old").unwrap();
    let error = SqliteStore::create(&other, &root(), &rng()).err().unwrap();
    assert!(error.message().contains("other.db-wal"), "{error}");
    assert!(!other.exists());
}

#[test]
fn paths_mean_files_whatever_they_look_like() {
    let home = tempfile::tempdir().unwrap();
    for name in ["file:memory?mode=memory", ":memory:", "a b%20c?d#e", "é'\""] {
        let path = home.path().join(name);
        drop(SqliteStore::create(&path, &root(), &rng()).unwrap());
        assert!(path.is_file(), "{name}");
        drop(SqliteStore::open(&path, &root(), tier()).unwrap());
    }
}

/// Whatever the limit on the size of files, a store is made whole or not at all.
#[test]
fn an_interrupted_creation_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    for limit in [0, 1, 4096, 5000, 20_000, 40_000, 1 << 20] {
        let path = home.path().join(format!("{limit}.db"));
        let made = Child::run(Birth::Fork, || {
            limit_files(limit);
            match SqliteStore::create(&path, &root(), &rng()) {
                Ok(_) => 1,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
                    0
                }
            }
        });
        let made = made.join();
        assert_eq!(made == 1, path.exists(), "{limit}");
        if made == 1 {
            drop(SqliteStore::open(&path, &root(), tier()).unwrap());
        }
        assert_eq!(fs::read_dir(home.path()).unwrap().count() as u64, made, "{limit}");
        let _ = fs::remove_file(&path);
    }
}

#[test]
fn a_file_that_cannot_grow_leaves_the_store_as_it_was() {
    let (scratch, store) = Scratch::new();
    store.create(&direct()).unwrap();
    let before = contents(&store);
    let child = Child::run(Birth::Fork, || {
        refuses_every_write_and_goes_on(&store, &|full| {
            let len = fs::metadata(&scratch.path).unwrap().len();
            limit_files(if full { len } else { 1 << 30 });
        })
    });
    assert_eq!(child.join(), 1);
    assert_eq!(contents(&store), before);
}

/// Calls every writing operation while `set_full(true)` holds, and checks that nothing changed.
fn refuses_every_write_and_goes_on(store: &SqliteStore, set_full: &dyn Fn(bool)) -> u64 {
    let (before, changes) = (contents(store), store.changes().unwrap());
    let image = store.load().unwrap();
    let (id, version) = (image.keys[0].record.id, image.keys[0].versions[0].id);
    set_full(true);
    // Small writes may still fit in what is allocated; big ones do not for long.
    let (mut made, mut refused) = (Vec::new(), 0);
    while refused < 3 {
        let mut big = direct();
        big.record.description = "x".repeat(8192);
        match store.create(&big) {
            Ok(()) => made.push(big.record.id),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
                refused += 1;
            }
        }
        assert!(made.len() < 1000, "the disk is never full");
    }
    let image = store.load().expect("reading goes on");
    assert_eq!(image.keys.len(), before.len() + made.len());
    assert_eq!(image.changes, changes + made.len() as u64);
    set_full(false);
    lease(store, &version, 5);
    store.give_back(&version, 5).unwrap();
    store.change(&id, &mut |_| Ok(KeyChange::Keep)).unwrap();
    for id in made {
        store.change(&id, &mut |_| Ok(KeyChange::Delete)).unwrap();
    }
    assert_eq!(contents(store), before);
    1
}

#[test]
fn a_full_disk_is_told_and_changes_nothing() {
    in_own_file_system("size=192k,mode=700", |place| {
        let path = place.join("keys.db");
        let store = SqliteStore::create(&path, &root(), &rng()).unwrap();
        store.create(&direct()).unwrap();
        let ballast = place.join("ballast");
        refuses_every_write_and_goes_on(&store, &|full| {
            if full {
                let mut file = fs::File::create(&ballast).unwrap();
                while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
            } else {
                fs::remove_file(&ballast).unwrap();
            }
        });
        let error = {
            fs::write(&ballast, vec![1; 1 << 20]).unwrap_err();
            SqliteStore::create(&place.join("new.db"), &root(), &rng()).err().unwrap()
        };
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        assert!(error.message().contains("full"), "{error}");
        assert!(!place.join("new.db").exists());
    });
}

#[test]
fn a_read_only_file_system_is_told() {
    in_own_file_system("size=1m,mode=700", |place| {
        let path = place.join("keys.db");
        let store = SqliteStore::create(&path, &root(), &rng()).unwrap();
        store.create(&direct()).unwrap();
        drop(store);
        let remount = libc::MS_REMOUNT | libc::MS_RDONLY;
        assert_eq!(mount("none", place, "tmpfs", remount, ""), 0);
        let error = open_error(&path);
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
        let error = SqliteStore::create(&place.join("new.db"), &root(), &rng()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
        assert_eq!(mount("none", place, "tmpfs", libc::MS_REMOUNT, ""), 0);
        SqliteStore::open(&path, &root(), tier()).unwrap().load().unwrap();
    });
}

/// Runs `work` in a child on a file system of its own; says so loudly where that is not allowed.
fn in_own_file_system(options: &str, work: impl FnOnce(&Path)) {
    const NOT_ALLOWED: u64 = 77;
    let home = tempfile::tempdir().unwrap();
    let place: PathBuf = home.path().to_owned();
    let child = Child::run(Birth::Fork, || {
        if !own_mounts() || mount("none", &place, "tmpfs", 0, options) != 0 {
            return NOT_ALLOWED;
        }
        work(&place);
        0
    });
    if child.join() == NOT_ALLOWED {
        eprintln!(
            "SKIPPED: mounting a file system is not allowed here; a full disk was NOT tested"
        );
    }
}

#[expect(unsafe_code, reason = "system calls of a test")]
fn own_mounts() -> bool {
    let root = c"/";
    // SAFETY: unshares the mounts of this child, which has one thread; the strings end in zero bytes.
    unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                std::ptr::null(),
                root.as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
    }
}

#[expect(unsafe_code, reason = "system calls of a test")]
fn mount(source: &str, place: &Path, kind: &str, flags: libc::c_ulong, options: &str) -> i32 {
    let text = |text: &str| std::ffi::CString::new(text).unwrap();
    let place = text(place.to_str().unwrap());
    let (source, kind, options) = (text(source), text(kind), text(options));
    // SAFETY: the strings end in zero bytes and outlive the call.
    unsafe {
        libc::mount(source.as_ptr(), place.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast())
    }
}

/// Limits the size that a file may grow to, for this process.
#[expect(unsafe_code, reason = "system calls of a test")]
fn limit_files(len: u64) {
    let limit = libc::rlimit { rlim_cur: len, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is a valid limit; ignoring the signal turns it into an error of the write.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
}
