//! A store that is missing, damaged, read-only or on a full disk, and a root key that does not fit.
//!
//! Method: a store with keys of every kind and blobs made under them is damaged in every way that a test can reach.
//! Afterwards each operation works as before or is refused with an error of the store; every blob opens to its data key
//! or not at all; nothing panics. Read-only and full file systems are mounted in a namespace of the test's own thread
//! where the system allows it, and a limit on file sizes stands in for a full disk where not.
#![expect(unsafe_code, reason = "mounts, namespaces and resource limits are system calls")]

use std::{
    collections::BTreeMap,
    env,
    ffi::CStr,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use keymill::{
    CreateKey, DecryptRequest, Engine, Error, ErrorKind, Fault, GenerateDataKeyRequest, ImportKey,
    KeyMetadata, KeySpec, RootKey, Scheme,
};

/// Set in the process that limits its own file sizes.
const LIMITED: &str = "KEYMILL_TEST_LIMITED";

fn root_key() -> RootKey {
    RootKey::from_bytes(&[5; 32]).unwrap()
}

/// A data key and what it takes to open it.
struct Wrapped {
    blob: Vec<u8>,
    dek: Vec<u8>,
}

/// A store in a file, closed, and what was made with it.
struct Sample {
    home: tempfile::TempDir,
    wrapped: Vec<Wrapped>,
    keys: Vec<KeyMetadata>,
}

const USABLE: [&str; 4] = ["alias/derived", "alias/direct", "alias/small", "alias/imported"];

fn create_keys(engine: &Engine) {
    for (alias, spec, scheme) in [
        (USABLE[0], KeySpec::Aes256, Scheme::Derived),
        (USABLE[1], KeySpec::Aes256, Scheme::Direct),
        (USABLE[2], KeySpec::Aes128, Scheme::Direct),
        ("alias/disabled", KeySpec::Aes256, Scheme::Derived),
        ("alias/pending", KeySpec::Aes192, Scheme::Direct),
    ] {
        let (scheme, alias) = (Some(scheme), Some(alias.to_owned()));
        let description = "a key that is described".to_owned();
        let key = CreateKey { spec, scheme, alias, description, ..CreateKey::default() };
        engine.create_key(&key).unwrap();
    }
    let alias = Some(USABLE[3].to_owned());
    engine.import_key(&ImportKey { alias, ..ImportKey::new(&[0x5a; 32]) }).unwrap();
}

fn wrap(engine: &Engine, key: &str) -> Result<Wrapped, Error> {
    let made = engine.advance_generate_data_key(&GenerateDataKeyRequest::new(key, 32).aad(b"f"))?;
    let dek = made.plaintext().unwrap().expose().to_vec();
    Ok(Wrapped { blob: made.ciphertext_blob().to_vec(), dek })
}

fn open(engine: &Engine, wrapped: &Wrapped) -> Result<(), Error> {
    let opened = engine.advance_decrypt(&DecryptRequest::new(&wrapped.blob).aad(b"f"))?;
    assert_eq!(opened.plaintext().expose(), wrapped.dek, "a blob opened to another data key");
    Ok(())
}

impl Sample {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let engine = Engine::create(home.path().join("keys.db"), &root_key()).unwrap();
        create_keys(&engine);
        let mut wrapped: Vec<_> = USABLE.map(|key| wrap(&engine, key).unwrap()).into();
        engine.rotate_key(USABLE[0]).unwrap();
        wrapped.push(wrap(&engine, USABLE[0]).unwrap());
        engine.disable_key("alias/disabled").unwrap();
        engine.schedule_key_deletion("alias/pending", 30).unwrap();
        let keys = engine.list_keys().unwrap();
        Self { home, wrapped, keys }
    }

    fn path(&self) -> PathBuf {
        self.home.path().join("keys.db")
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    /// Everything in this store as it was made.
    fn assert_intact(&self) {
        let engine = Engine::open(self.path(), &root_key()).unwrap();
        self.assert_same(&engine);
        USABLE.iter().for_each(|key| drop(wrap(&engine, key).unwrap()));
    }

    fn assert_same(&self, engine: &Engine) {
        assert_eq!(described(&engine.list_keys().unwrap()), described(&self.keys));
        self.wrapped.iter().for_each(|wrapped| open(engine, wrapped).unwrap());
    }
}

/// Descriptions without the counts of wraps, which go on.
fn described(keys: &[KeyMetadata]) -> Vec<String> {
    let mut keys: Vec<_> = keys.to_vec();
    keys.iter_mut().flat_map(|key| &mut key.versions).for_each(|version| version.wraps_granted = 0);
    keys.iter().map(|key| format!("{key:?}")).collect()
}

fn names(home: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(home)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Opens a store that may be damaged and uses it. What works has to be right; what is refused has to be refused as a
/// fault of the store. Says whether everything worked.
fn use_damaged(store: &Path, sample: &Sample) -> Result<(), Error> {
    let engine = Engine::open(store, &root_key())?;
    // The store was verified in whole when it was opened, so the engine has the keys as they were.
    for wrapped in &sample.wrapped {
        open(&engine, wrapped)?;
    }
    assert_eq!(described(&engine.list_keys()?), described(&sample.keys));
    for key in USABLE {
        open(&engine, &wrap(&engine, key)?)?;
    }
    let batch =
        engine.generate_data_key_batch(&USABLE.map(|key| GenerateDataKeyRequest::new(key, 16)))?;
    if let Some(error) = batch.errors().first() {
        return Err(error.clone());
    }
    engine.list_aliases()?;
    // Nothing is made twice because the damage hides that it is there.
    let again = engine.import_key(&ImportKey::new(&[0x5a; 32]));
    refused_as(again.map(drop), ErrorKind::InvalidKeyMaterial)?;
    refused_as(engine.create_alias(USABLE[1], USABLE[0]), ErrorKind::AliasAlreadyExists)?;
    engine.disable_key(USABLE[2])?;
    Ok(())
}

/// A refusal that has to come; another one is passed on.
fn refused_as(done: Result<(), Error>, kind: ErrorKind) -> Result<(), Error> {
    match done {
        Ok(()) => panic!("{kind:?} did not come"),
        Err(error) if error.kind() == kind => Ok(()),
        Err(error) => Err(error),
    }
}

fn assert_clean(error: &Error, what: &dyn std::fmt::Display) {
    assert_eq!(error.fault(), Fault::Store, "{what}: {error}");
    assert!(
        matches!(error.kind(), ErrorKind::StoreCorrupt | ErrorKind::StoreUnavailable),
        "{what}: {error}"
    );
}

#[test]
fn what_is_no_store_is_refused_and_left_alone() {
    let sample = Sample::new();
    let home = tempfile::tempdir().unwrap();
    let place = home.path().join("keys.db");
    let refused = |kind| {
        let error = Engine::open(&place, &root_key()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains("keys.db"), "{error}");
    };
    refused(ErrorKind::StoreMissing);
    assert_eq!(names(home.path()), [""; 0]);

    let mut random = Vec::new();
    (0..70_000u64).for_each(|i| random.push((i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8));
    for content in [&b""[..], b"this is text\n", b"SQLite format 3\0", &random, &[0; 4096]] {
        fs::write(&place, content).unwrap();
        refused(ErrorKind::StoreCorrupt);
        assert_eq!(fs::read(&place).unwrap(), content);
        // Neither does `create` touch it.
        assert!(Engine::create(&place, &root_key()).is_err());
        assert_eq!(fs::read(&place).unwrap(), content);
    }
    fs::remove_file(&place).unwrap();
    fs::create_dir(&place).unwrap();
    refused(ErrorKind::StoreUnavailable);
    sample.assert_intact();
}

#[test]
fn a_truncated_store_is_refused() {
    let sample = Sample::new();
    let bytes = sample.bytes();
    let home = tempfile::tempdir().unwrap();
    let mut lengths = vec![1, 15, 16, 99, 100, 101, 511, 512, bytes.len() - 1, bytes.len() - 100];
    lengths.extend((1..bytes.len() / 4096).map(|pages| pages * 4096));
    lengths.extend((1..bytes.len() / 4096).map(|pages| pages * 4096 + 1234));
    for len in lengths {
        let place = home.path().join(format!("{len}.db"));
        fs::write(&place, &bytes[..len]).unwrap();
        match use_damaged(&place, &sample) {
            Ok(()) => println!("{len} of {} bytes work", bytes.len()),
            Err(error) => assert_clean(&error, &format_args!("{len} of {} bytes", bytes.len())),
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_is_harmless_or_refused() {
    let sample = Sample::new();
    let bytes = sample.bytes();
    // Every byte of the header and of what is written, and a sample of the empty space between.
    let offsets: Vec<_> = (0..bytes.len())
        .filter(|at| *at < 128 || (bytes[*at] != 0 && at % 2 == 0) || at % 53 == 0)
        .collect();
    let (next, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let other_root_key = AtomicUsize::new(0);
    let work = || {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("keys.db");
        while let Some(at) = offsets.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut damaged = bytes.clone();
            damaged[*at] ^= 1 << (at % 8);
            for name in names(home.path()) {
                fs::remove_file(home.path().join(name)).unwrap();
            }
            fs::write(&place, &damaged).unwrap();
            if let Err(error) = use_damaged(&place, &sample) {
                refused.fetch_add(1, Ordering::Relaxed);
                if error.kind() == ErrorKind::WrongRootKey {
                    other_root_key.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                assert_clean(&error, &format_args!("bit {} of byte {at}", at % 8));
            }
        }
    };
    thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(work))));
    let (tried, refused) = (offsets.len(), refused.into_inner());
    println!("{refused} of {tried} flips refused, {} harmless", tried - refused);
    // The store's id is half of what its keys are made from: with another one, no root key fits.
    assert!(other_root_key.into_inner() <= 16);
    assert!(tried > 2000 && refused > 1000, "{refused} of {tried}");
}

#[test]
fn a_flipped_bit_in_the_log_is_harmless_or_refused() {
    // A store whose process crashed: the file as it was made and a log beside it.
    let sample = Sample::new();
    let engine = Engine::open(sample.path(), &root_key()).unwrap();
    let alias = Some("alias/late".to_owned());
    engine.create_key(&CreateKey { alias, ..CreateKey::default() }).unwrap();
    let (file, log) = (sample.bytes(), fs::read(sample.path().with_extension("db-wal")).unwrap());
    drop(engine);
    for at in (0..log.len()).step_by(211) {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join("keys.db");
        let mut damaged = log.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&place, &file).unwrap();
        fs::write(home.path().join("keys.db-wal"), damaged).unwrap();
        match Engine::open(&place, &root_key()) {
            Err(error) => assert_clean(&error, &format_args!("byte {at} of the log")),
            // SQLite takes the log up to the damage: all of it, or what was before.
            Ok(engine) => {
                for wrapped in &sample.wrapped {
                    open(&engine, wrapped).unwrap();
                }
                assert!((6..=7).contains(&engine.list_keys().unwrap().len()));
            }
        }
    }
}

#[test]
fn a_wrong_root_key_leaves_the_store_as_it_is() {
    let sample = Sample::new();
    let before = sample.bytes();
    let wrong = RootKey::from_bytes(&[6; 32]).unwrap();
    for _ in 0..3 {
        let error = Engine::open(sample.path(), &wrong).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongRootKey, "{error}");
        assert_eq!(sample.bytes(), before);
    }
    // Nor is it touched by someone who has the store open.
    let engine = Engine::open(sample.path(), &root_key()).unwrap();
    assert_eq!(Engine::open(sample.path(), &wrong).unwrap_err().kind(), ErrorKind::WrongRootKey);
    sample.assert_same(&engine);
    drop(engine);
    assert_eq!(sample.bytes(), before);
    sample.assert_intact();
    // An empty store tells, too.
    let home = tempfile::tempdir().unwrap();
    drop(Engine::create(home.path().join("keys.db"), &root_key()).unwrap());
    let error = Engine::open(home.path().join("keys.db"), &wrong).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongRootKey, "{error}");
}

#[test]
fn a_root_key_file_that_is_not_right_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("root.key");
    let refused = |says: &str| {
        let error = RootKey::from_file(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidParameter, "{error}");
        assert!(error.message().contains(says), "{error}");
    };
    refused("does not exist");
    for len in [0, 31, 33, 4096] {
        fs::write(&path, vec![1; len]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        refused(&format!("has {len} bytes"));
    }
    fs::write(&path, [5; 32]).unwrap();
    for mode in [0o604, 0o620, 0o602, 0o660, 0o666, 0o777, 0o610] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        refused("chmod 600");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let sample = Sample::new();
    let engine = Engine::open(sample.path(), &RootKey::from_file(&path).unwrap()).unwrap();
    sample.assert_same(&engine);
}

// --- file systems of the test's own ---

/// Mounts a fresh tmpfs at `place`, which this thread and those it starts see, and nobody else. `false` where the
/// system does not allow it.
fn mount_tmpfs(place: &Path, options: &CStr) -> bool {
    let place = cstring(place);
    // SAFETY: the strings end with a zero and live through the calls.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
            && libc::mount(
                c"none".as_ptr(),
                place.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                options.as_ptr().cast(),
            ) == 0
    };
    if !done {
        eprintln!(
            "*** SKIPPED: no file system can be mounted here: {} ***",
            io::Error::last_os_error()
        );
    }
    done
}

/// Turns the mount at `place` read-only, or back.
fn remount(place: &Path, read_only: bool) -> bool {
    let place = cstring(place);
    let flags = libc::MS_REMOUNT | if read_only { libc::MS_RDONLY } else { 0 };
    // SAFETY: as in `mount_tmpfs`.
    unsafe {
        libc::mount(c"none".as_ptr(), place.as_ptr(), c"tmpfs".as_ptr(), flags, std::ptr::null())
            == 0
    }
}

fn cstring(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_str().unwrap()).unwrap()
}

#[test]
fn a_read_only_store_is_refused_and_left_alone() {
    // A namespace belongs to a thread, which this test's is no longer fit for anything else.
    thread::spawn(|| {
        let sample = Sample::new();
        let place = tempfile::tempdir().unwrap();
        if !mount_tmpfs(place.path(), c"size=4m,mode=700") {
            return;
        }
        let store = place.path().join("keys.db");
        fs::copy(sample.path(), &store).unwrap();
        assert!(remount(place.path(), true));
        let error = Engine::open(&store, &root_key()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
        assert!(Engine::create(place.path().join("new.db"), &root_key()).is_err());
        assert_eq!(fs::read(&store).unwrap(), sample.bytes());
        assert_eq!(names(place.path()), ["keys.db"]);
        assert!(remount(place.path(), false));
        use_damaged(&store, &sample).unwrap();
    })
    .join()
    .unwrap();
}

/// Creates keys until the disk is full, and checks that everything else goes on and nothing is lost.
fn fill_up(store: &Path) {
    let engine = Engine::builder().lease_max(0).create(store, &root_key()).unwrap();
    create_keys(&engine);
    let mut wrapped: Vec<_> = USABLE.map(|key| wrap(&engine, key).unwrap()).into();
    let mut made = BTreeMap::new();
    let error = loop {
        assert!(made.len() < 100_000, "the disk is never full");
        let alias = format!("alias/filler-{}", made.len());
        let description = "x".repeat(500);
        let key = CreateKey { alias: Some(alias.clone()), description, ..CreateKey::default() };
        match engine.create_key(&key) {
            Ok(key) => drop(made.insert(alias, key.key_id)),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
    assert!(made.len() > 1, "{} keys", made.len());
    // What needs the store is refused, clean, again and again; what does not, goes on.
    let mut refusals = 0;
    for round in 0..20 {
        match wrap(&engine, USABLE[1]) {
            Ok(good) => wrapped.push(good),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
                refusals += 1;
            }
        }
        if let Err(error) = engine.create_alias(&format!("alias/more-{round}"), USABLE[0]) {
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
            refusals += 1;
        }
        wrapped.push(wrap(&engine, USABLE[0]).unwrap());
    }
    assert!(refusals > 0);
    let request = GenerateDataKeyRequest::new(USABLE[0], 32);
    assert!(engine.generate_data_key_batch(&vec![request; 3000]).unwrap().errors().is_empty());
    let check = |engine: &Engine| {
        wrapped.iter().for_each(|wrapped| open(engine, wrapped).unwrap());
        for (alias, id) in &made {
            assert_eq!(engine.describe_key(alias).unwrap().key_id, *id);
        }
        // The key that was refused is not there, not even in part.
        let absent = format!("alias/filler-{}", made.len());
        assert_eq!(engine.describe_key(&absent).unwrap_err().kind(), ErrorKind::KeyNotFound);
        assert_eq!(engine.list_keys().unwrap().len(), 6 + made.len());
    };
    check(&engine);
    drop(engine);
    // Elsewhere, with room, everything acknowledged is there and the store takes new work.
    let home = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal"] {
        let name = format!("keys.db{suffix}");
        let from = store.with_file_name(&name);
        if from.exists() {
            fs::copy(from, home.path().join(name)).unwrap();
        }
    }
    let engine = Engine::open(home.path().join("keys.db"), &root_key()).unwrap();
    check(&engine);
}

#[test]
fn a_full_disk_refuses_and_loses_nothing() {
    thread::spawn(|| {
        for size in [c"size=768k,mode=700", c"size=1m,mode=700"] {
            let place = tempfile::tempdir().unwrap();
            if !mount_tmpfs(place.path(), size) {
                return;
            }
            let store = place.path().join("keys.db");
            fill_up(&store);
            // Still full, a new process opens it and goes on with what needs no room, or says why not.
            match Engine::open(&store, &root_key()) {
                Ok(engine) => drop(wrap(&engine, USABLE[0]).unwrap()),
                Err(error) => assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}"),
            }
            // There is no room for another store, nor is anything left of it.
            let before = names(place.path());
            if let Err(error) = Engine::create(place.path().join("other.db"), &root_key()) {
                assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}");
                assert_eq!(names(place.path()), before);
            }
        }
    })
    .join()
    .unwrap();
}

#[test]
fn a_limit_on_file_sizes_refuses_and_loses_nothing() {
    let home = tempfile::tempdir().unwrap();
    let worker = Command::new(env::current_exe().unwrap())
        .args(["--exact", "limited_worker", "--nocapture"])
        .env(LIMITED, home.path().join("keys.db"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&worker.stderr).into_owned();
    assert!(worker.status.success(), "{}: {said}", worker.status);
    // Without the limit the same store works on.
    let engine = Engine::open(home.path().join("keys.db"), &root_key()).unwrap();
    engine.create_key(&CreateKey::default()).unwrap();
    USABLE.iter().for_each(|key| drop(wrap(&engine, key).unwrap()));
}

#[test]
fn limited_worker() {
    let Some(store) = env::var_os(LIMITED) else { return };
    let limit = libc::rlimit { rlim_cur: 600 << 10, rlim_max: 600 << 10 };
    // SAFETY: the limit is of this process, which exists for this test alone; the signal would only end it.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
    fill_up(Path::new(&store));
}
