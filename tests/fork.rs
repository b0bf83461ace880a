//! Forks: a forked child works, and shares no data key, no IV, no salt and no request id with its parent or siblings.
//!
//! Method: warm everything that a process could hand on (per-thread pools, wrapping states, leases, rayon's global pool
//! and the engine's own), fork, let every process generate singly and in small and large batches, gather what they made
//! through files, and look for exact duplicates. Children leave by `_exit`, and an alarm ends whoever hangs, so that a
//! lock inherited from a thread that does not exist fails the test.
#![expect(unsafe_code, reason = "fork, _exit, alarm and waitpid are system calls")]

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{Read, Write},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use keymill::{
    CreateKey, DataKey, DataKeyBatch, DecryptRequest, Engine, EngineBuilder, ErrorKind,
    GenerateDataKeyRequest, KeySpec, KeyState, RootKey, Scheme,
};

/// Names of the keys that every engine here has.
const DERIVED: [&str; 2] = ["alias/derived", "alias/other"];
const DIRECT: [&str; 2] = ["alias/direct", "alias/small"];
/// Keys that each process makes where uniqueness is the question.
const KEYS_EACH: usize = 10_000;
/// Above this a batch fans out.
const LARGE: usize = 2_500;
/// Seconds after which a child is taken for hung.
const CHILD_SECONDS: u32 = 60;

/// What uniqueness is about, of one data key.
#[derive(Clone, Copy)]
struct Made {
    dek: [u8; 32],
    iv: [u8; 12],
    /// Zero for `Direct`.
    salt: [u8; 12],
    request_id: [u8; 16],
    /// 0 for `Derived`, else 1 + the place in `DIRECT`.
    direct: u8,
}

impl Made {
    const LEN: usize = 73;

    fn new(place: usize, advance: bool, key: (&[u8], &[u8], &[u8], [u8; 16])) -> Self {
        let (dek, iv, blob, request_id) = key;
        let salt_at = if advance { 51 } else { 0 };
        let direct = place % 4 / 2 * (1 + place % 2);
        let salt = match direct {
            0 => blob[salt_at..salt_at + 12].try_into().unwrap(),
            _ => [0; 12],
        };
        let (dek, iv) = (dek.try_into().unwrap(), iv.try_into().unwrap());
        Self { dek, iv, salt, request_id, direct: u8::try_from(direct).unwrap() }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.dek);
        out.extend(self.iv);
        out.extend(self.salt);
        out.extend(self.request_id);
        out.push(self.direct);
    }

    fn read(bytes: &[u8]) -> Self {
        Self {
            dek: bytes[..32].try_into().unwrap(),
            iv: bytes[32..44].try_into().unwrap(),
            salt: bytes[44..56].try_into().unwrap(),
            request_id: bytes[56..72].try_into().unwrap(),
            direct: bytes[72],
        }
    }
}

/// The name used at `place`: two of `Derived`, two of `Direct`, in turn. Without `Direct` only the former.
fn name(place: usize, direct: bool) -> &'static str {
    match (place % 4 / 2, direct) {
        (1, true) => DIRECT[place % 2],
        _ => DERIVED[place % 2],
    }
}

fn place(place: usize, direct: bool) -> usize {
    if direct { place } else { place % 2 }
}

fn single(engine: &Engine, at: usize, direct: bool) -> (DataKey, bool) {
    let request = GenerateDataKeyRequest::new(name(at, direct), 32).aad(b"single");
    let advance = at % 8 < 4;
    let key = match advance {
        true => engine.advance_generate_data_key(&request),
        false => engine.generate_data_key(&request),
    };
    (key.unwrap(), advance)
}

fn batch(engine: &Engine, count: usize, advance: bool, direct: bool) -> DataKeyBatch {
    let requests: Vec<_> = (0..count)
        .map(|at| GenerateDataKeyRequest::new(name(at, direct), 32).aad(b"batch"))
        .collect();
    let batch = match advance {
        true => engine.advance_generate_data_key_batch(&requests),
        false => engine.generate_data_key_batch(&requests),
    };
    let batch = batch.unwrap();
    assert!(batch.errors().is_empty(), "{:?}", batch.errors()[0]);
    batch
}

/// Makes at least `count` data keys in every way: a fifth singly, half in large batches, the rest in small ones.
fn make(engine: &Engine, count: usize, direct: bool) -> Vec<Made> {
    let mut made = Vec::new();
    for at in 0..count / 5 {
        let (key, advance) = single(engine, at, direct);
        let dek = key.plaintext().unwrap().expose();
        let fields = (dek, &key.iv()[..], key.ciphertext_blob(), *key.request_id().as_bytes());
        made.push(Made::new(place(at, direct), advance, fields));
    }
    let sizes = [1, 2, 7, 31, 33, 100, 255, 257, 600, 1025];
    let (mut turn, mut large) = (0, count / 2);
    while made.len() < count || large > 0 {
        let size = if large > 0 { LARGE.min(large) } else { sizes[turn % sizes.len()] };
        large -= if large > 0 { size } else { 0 };
        let advance = turn % 2 == 0;
        let batch = batch(engine, size, advance, direct);
        for (at, key) in batch.iter().enumerate() {
            let key = key.unwrap();
            let dek = key.plaintext().unwrap();
            let fields = (dek, &key.iv()[..], key.ciphertext_blob(), *key.request_id().as_bytes());
            made.push(Made::new(place(at, direct), advance, fields));
        }
        if size >= LARGE {
            open_all(engine, &batch, direct);
        }
        turn += 1;
    }
    made
}

/// Opens a whole batch again, which fans out, too, where it may.
fn open_all(engine: &Engine, batch: &DataKeyBatch, direct: bool) {
    let requests: Vec<_> = (0..batch.len())
        .map(|at| {
            let key = batch.get(at).unwrap();
            DecryptRequest::new(key.ciphertext_blob())
                .key_id(name(at, direct))
                .iv(key.iv())
                .aad(b"batch")
        })
        .collect();
    let opened = engine.advance_decrypt_batch(&requests).unwrap();
    for at in 0..batch.len() {
        let (opened, key) = (opened.get(at).unwrap(), batch.get(at).unwrap());
        assert_eq!(opened.plaintext(), key.plaintext().unwrap());
    }
}

/// Looks for anything that two data keys have in common, within a process or between two.
fn assert_distinct(processes: &[Vec<Made>]) {
    let total: usize = processes.iter().map(Vec::len).sum();
    let all = || processes.iter().flatten();
    let distinct = |what: &str, values: Vec<&[u8]>| {
        let found = values.iter().collect::<HashSet<_>>().len();
        assert_eq!(found, total, "{} repeated among {total} {what}s", total - found);
    };
    distinct("data key", all().map(|made| &made.dek[..]).collect());
    distinct("IV", all().map(|made| &made.iv[..]).collect());
    distinct("request id", all().map(|made| &made.request_id[..]).collect());
    // A salt serves many wraps of one process and none of another.
    let mut owners = HashMap::new();
    for (process, made) in processes.iter().enumerate() {
        for made in made.iter().filter(|made| made.direct == 0) {
            let owner = *owners.entry(made.salt).or_insert(process);
            assert_eq!(owner, process, "processes {owner} and {process} share a salt");
        }
    }
}

/// A forked child, and the file in which it leaves what it has to say.
struct Child {
    pid: libc::pid_t,
    report: PathBuf,
}

/// A hung parent fails as well.
fn watch_parent() {
    static ONCE: Once = Once::new();
    // SAFETY: the default action of the alarm ends the process, which is what is wanted.
    ONCE.call_once(|| unsafe {
        libc::alarm(240);
    });
}

/// Forks; the child does `work`, reports, and leaves without a return to this harness.
fn fork(home: &Path, work: impl FnOnce() -> Vec<Made>) -> Child {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    watch_parent();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let report = home.join(format!("report-{}-{number}", std::process::id()));
    // SAFETY: glibc makes allocation safe in the child; whatever else is locked there, the alarm tells.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if pid > 0 {
        return Child { pid, report };
    }
    // SAFETY: an alarm with its default action ends this child.
    unsafe { libc::alarm(CHILD_SECONDS) };
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    let (code, bytes) = match done {
        Ok(made) => {
            let mut bytes = Vec::with_capacity(made.len() * Made::LEN);
            made.iter().for_each(|made| made.write(&mut bytes));
            (0, bytes)
        }
        Err(why) => {
            let text = why.downcast_ref::<String>().cloned();
            let text = text.or_else(|| why.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            (1, text.unwrap_or_default().into_bytes())
        }
    };
    let written = fs::write(&report, bytes).is_ok();
    // SAFETY: leaves at once, without the destructors and handlers that are the parent's.
    unsafe { libc::_exit(if written { code } else { 2 }) }
}

impl Child {
    /// Waits for the child, which has to have left well.
    fn join(self) -> Vec<Made> {
        let mut status = 0;
        // SAFETY: `status` is writable; the child is ours and waited for once.
        let waited = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!(waited, self.pid);
        let report = fs::read(&self.report).unwrap_or_default();
        assert!(
            !(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGALRM),
            "a child hung"
        );
        assert_eq!(status, 0, "a child failed: {}", String::from_utf8_lossy(&report));
        fs::remove_file(&self.report).unwrap();
        assert_eq!(report.len() % Made::LEN, 0);
        report.chunks_exact(Made::LEN).map(Made::read).collect()
    }
}

/// Adds the keys that these tests use.
fn with_keys(engine: Engine) -> Engine {
    for (alias, spec, scheme) in [
        (DERIVED[0], KeySpec::Aes256, Scheme::Derived),
        (DERIVED[1], KeySpec::Aes256, Scheme::Derived),
        (DIRECT[0], KeySpec::Aes256, Scheme::Direct),
        (DIRECT[1], KeySpec::Aes128, Scheme::Direct),
    ] {
        let alias = Some(alias.to_owned());
        let key = CreateKey { spec, scheme: Some(scheme), alias, ..CreateKey::default() };
        engine.create_key(&key).unwrap();
    }
    engine
}

fn root_key() -> RootKey {
    RootKey::from_bytes(&[7; 32]).unwrap()
}

fn in_file(builder: EngineBuilder, home: &Path) -> Engine {
    with_keys(builder.create(home.join("keys.db"), &root_key()).unwrap())
}

fn own_pool() -> Arc<rayon::ThreadPool> {
    Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap())
}

/// Starts the global pool of rayon, so that children inherit one without workers.
fn warm_global_pool() {
    rayon::broadcast(|_| ());
}

/// The store never counts fewer wraps than were made.
fn assert_counted<'a>(engine: &Engine, made: impl IntoIterator<Item = &'a Made>) {
    let mut counts = [0; 2];
    for made in made.into_iter().filter(|made| made.direct > 0) {
        counts[usize::from(made.direct) - 1] += 1;
    }
    for (alias, count) in DIRECT.iter().zip(counts) {
        let granted = engine.describe_key(alias).unwrap().initial_version().wraps_granted;
        assert!(granted >= count, "{alias}: {count} wraps made, {granted} granted");
    }
}

/// Parent, three children and a grandchild; the parent generates before and after the forks.
fn family(engine: &Engine, home: &Path, direct_in_children: bool) {
    warm_global_pool();
    let mut processes = vec![make(engine, KEYS_EACH, true)];
    let children: Vec<_> = (0..3)
        .map(|number| {
            fork(home, || {
                let mut made = make(engine, KEYS_EACH, direct_in_children);
                if number == 0 {
                    // The grandchild's report is the child's, too: both are in one list, checked as one process.
                    let grandchild = fork(home, || make(engine, KEYS_EACH, direct_in_children));
                    made.extend(make(engine, 1000, direct_in_children));
                    let grandchild = grandchild.join();
                    assert_distinct(&[made.clone(), grandchild.clone()]);
                    made.extend(grandchild);
                }
                made
            })
        })
        .collect();
    processes[0].extend(make(engine, KEYS_EACH, true));
    processes.extend(children.into_iter().map(Child::join));
    processes[0].extend(make(engine, 1000, true));
    assert_distinct(&processes);
    assert_counted(engine, processes.iter().flatten());
}

#[test]
fn a_family_on_a_file_shares_nothing() {
    let home = tempfile::tempdir().unwrap();
    family(&in_file(Engine::builder(), home.path()), home.path(), true);
}

#[test]
fn a_family_with_its_own_pool_shares_nothing() {
    let home = tempfile::tempdir().unwrap();
    let builder = Engine::builder().thread_pool(own_pool()).lease_max(100);
    family(&in_file(builder, home.path()), home.path(), true);
}

#[test]
fn a_family_in_memory_shares_nothing() {
    let home = tempfile::tempdir().unwrap();
    family(&with_keys(Engine::in_memory().unwrap()), home.path(), false);
}

#[test]
fn a_child_of_a_store_in_memory_is_refused_direct_wraps_alone() {
    let home = tempfile::tempdir().unwrap();
    let engine = with_keys(Engine::in_memory().unwrap());
    // The parent's lease is warm, and must be worth nothing in the child.
    make(&engine, 200, true);
    let child = fork(home.path(), || {
        let requests = [DIRECT[0], DERIVED[0]].map(|key| GenerateDataKeyRequest::new(key, 32));
        let error = engine.generate_data_key(&requests[0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        assert!(error.message().contains("forked child"), "{error}");
        let mixed: Vec<_> = requests.into_iter().cycle().take(2 * LARGE).collect();
        let batch = engine.generate_data_key_batch(&mixed).unwrap();
        for (at, key) in batch.iter().enumerate() {
            match key {
                Ok(_) => assert_eq!(at % 2, 1),
                Err(error) => {
                    assert_eq!((at % 2, error.kind()), (0, ErrorKind::StoreUnavailable));
                }
            }
        }
        // A name that only the store could know is refused alone, too.
        let unknown = GenerateDataKeyRequest::new("alias/absent", 32);
        let batch = engine.advance_generate_data_key_batch(&[requests[1], unknown]).unwrap();
        assert_eq!(batch.get(1).unwrap_err().kind(), ErrorKind::StoreUnavailable);
        let good = DecryptRequest::new(batch.get(0).unwrap().ciphertext_blob());
        let opened = engine.advance_decrypt_batch(&[good.key_id("alias/absent"), good]).unwrap();
        assert_eq!(opened.get(0).unwrap_err().kind(), ErrorKind::StoreUnavailable);
        assert!(opened.get(1).is_ok());
        let error = engine.create_key(&CreateKey::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        Vec::new()
    });
    child.join();
    engine.create_key(&CreateKey::default()).unwrap();
    make(&engine, 200, true);
}

/// Forks `forks` children, each making `each` keys, while `threads` threads generate; then compares everything.
fn fork_amid_threads(engine: &Engine, home: &Path, threads: usize, forks: usize, direct: bool) {
    warm_global_pool();
    let (stop, started) = (AtomicBool::new(false), AtomicUsize::new(0));
    let generate = || {
        let mut made = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            made.extend(make(engine, 100, true));
            started.fetch_add(1, Ordering::Relaxed);
            // What is kept has to stay within memory; what is not kept still moves every state on.
            if made.len() > 60_000 {
                thread::sleep(Duration::from_millis(1));
                make(engine, 10, true);
            }
        }
        made
    };
    let processes = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(generate)).collect();
        while started.load(Ordering::Relaxed) < 2 * threads.len() {
            thread::yield_now();
        }
        let children: Vec<_> =
            (0..forks).map(|_| fork(home, || make(engine, KEYS_EACH, direct))).collect();
        let children =
            panic::catch_unwind(|| children.into_iter().map(Child::join).collect::<Vec<_>>());
        stop.store(true, Ordering::Relaxed);
        let mut all = vec![Vec::new()];
        for thread in threads {
            all[0].extend(thread.join().unwrap());
        }
        all.extend(children.unwrap_or_else(|why| panic::resume_unwind(why)));
        all
    });
    assert!(processes[0].len() >= 200);
    assert_distinct(&processes);
    assert_counted(engine, processes.iter().flatten());
}

#[test]
fn a_fork_amid_generating_threads_shares_nothing() {
    let home = tempfile::tempdir().unwrap();
    let engine = in_file(Engine::builder(), home.path());
    fork_amid_threads(&engine, home.path(), 8, 4, true);
}

#[test]
fn a_fork_amid_threads_in_the_store_can_use_the_store() {
    let home = tempfile::tempdir().unwrap();
    // Every `Direct` call is a transaction, so threads wait for the store at every fork.
    let engine = in_file(Engine::builder().lease_max(0), home.path());
    warm_global_pool();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for at in 0..6 {
            let (engine, stop) = (&engine, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match at {
                        0 => drop(engine.list_keys().unwrap()),
                        1 => drop(engine.describe_key(DERIVED[0]).unwrap()),
                        _ => drop(single(engine, 2 + at % 2, true)),
                    }
                }
            });
        }
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
            let mut all = Vec::new();
            for _ in 0..40 {
                all.push(fork(home.path(), || make(&engine, 40, true)).join());
            }
            assert_distinct(&all);
            assert_counted(&engine, all.iter().flatten());
        }));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|why| panic::resume_unwind(why));
    });
}

#[test]
fn a_fork_amid_threads_in_memory_shares_nothing() {
    let home = tempfile::tempdir().unwrap();
    let engine = with_keys(Engine::in_memory().unwrap());
    fork_amid_threads(&engine, home.path(), 4, 4, false);
}

#[test]
fn two_hundred_quick_forks_of_a_busy_process_all_work() {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("keys.db");
    let engine = in_file(Engine::builder().thread_pool(own_pool()).lease_max(16), home.path());
    warm_global_pool();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let busy = |work: fn(&Engine, &Path)| {
            let (engine, stop, store) = (&engine, &stop, store.as_path());
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    work(engine, store);
                }
            });
        };
        busy(|engine, _| drop(make(engine, 20, true)));
        busy(|engine, _| drop(batch(engine, LARGE, true, true)));
        // A key that changes, so that rings are replaced.
        let id = engine.create_key(&CreateKey::default()).unwrap().key_id;
        engine.create_alias("alias/changing", id.as_str()).unwrap();
        busy(|engine, _| {
            engine.disable_key("alias/changing").unwrap();
            engine.enable_key("alias/changing").unwrap();
            thread::sleep(Duration::from_millis(5));
        });
        // Engines that open and close.
        busy(|_, store| {
            let engine = Engine::open(store, &root_key()).unwrap();
            engine.generate_data_key(&GenerateDataKeyRequest::new(DIRECT[0], 32)).unwrap();
        });
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
            let mut all = Vec::new();
            for round in 0..200 {
                let child = fork(home.path(), || {
                    let requests = [DERIVED[0], DIRECT[0], DIRECT[1]]
                        .map(|key| GenerateDataKeyRequest::new(key, 32));
                    let mut made = Vec::new();
                    for (request, place) in requests.iter().zip([0, 2, 3]) {
                        let key = engine.generate_data_key(request).unwrap();
                        let dek = key.plaintext().unwrap().expose();
                        let id = *key.request_id().as_bytes();
                        let fields = (dek, &key.iv()[..], key.ciphertext_blob(), id);
                        made.push(Made::new(place, false, fields));
                    }
                    let many = vec![requests[0]; LARGE];
                    assert!(engine.generate_data_key_batch(&many).unwrap().errors().is_empty());
                    if round % 8 == 0 {
                        engine.list_keys().unwrap();
                        engine.create_key(&CreateKey::default()).unwrap();
                    }
                    made
                });
                all.push(child.join());
            }
            assert_distinct(&all);
            assert_counted(&engine, all.iter().flatten());
        }));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|why| panic::resume_unwind(why));
    });
}

#[test]
fn an_engine_opened_in_a_child_works_beside_pools_without_workers() {
    let home = tempfile::tempdir().unwrap();
    let engine = in_file(Engine::builder(), home.path());
    warm_global_pool();
    let mut processes = vec![make(&engine, 3 * LARGE, true)];
    let child = fork(home.path(), || {
        // rayon's global pool was inherited without its workers; whoever waits for them waits for ever.
        let opened = Engine::open(home.path().join("keys.db"), &root_key()).unwrap();
        let mut made = make(&opened, 3 * LARGE, true);
        let memory = with_keys(Engine::in_memory().unwrap());
        made.extend(make(&memory, 3 * LARGE, true));
        // A pool of the child's own making has workers.
        let pooled = Engine::builder().thread_pool(own_pool());
        let pooled = pooled.open(home.path().join("keys.db"), &root_key()).unwrap();
        made.extend(make(&pooled, 3 * LARGE, true));
        made
    });
    processes.push(child.join());
    assert_distinct(&processes);
}

/// Asks until `seen` says yes, for as long as a slow machine may need.
fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < end, "{what} was not seen");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn parent_and_child_see_what_the_other_changes() {
    let home = tempfile::tempdir().unwrap();
    let engine = in_file(Engine::builder(), home.path());
    make(&engine, 100, true);
    let (mut to_child, mut to_parent) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    let create = |alias: &str| {
        let key = CreateKey { alias: Some(alias.to_owned()), ..CreateKey::default() };
        engine.create_key(&key).unwrap();
    };
    let one = |name| engine.generate_data_key(&GenerateDataKeyRequest::new(name, 32));
    let disabled = |name| one(name).is_err_and(|error| error.kind() == ErrorKind::Disabled);
    let child = fork(home.path(), || {
        // Used before, so that its ring is of its own reading when the parent makes more.
        make(&engine, 100, true);
        let mut word = [0];
        to_parent.1.write_all(b"1").unwrap();
        to_child.0.read_exact(&mut word).unwrap();
        one("alias/of-the-parent").expect("a name that is missing is looked up at once");
        until("the parent's disabling", || disabled(DERIVED[1]));
        create("alias/of-the-child");
        engine.enable_key(DERIVED[1]).unwrap();
        to_parent.1.write_all(b"2").unwrap();
        to_child.0.read_exact(&mut word).unwrap();
        Vec::new()
    });
    let mut word = [0];
    to_parent.0.read_exact(&mut word).unwrap();
    create("alias/of-the-parent");
    engine.disable_key(DERIVED[1]).unwrap();
    assert!(disabled(DERIVED[1]));
    to_child.1.write_all(b"1").unwrap();
    to_parent.0.read_exact(&mut word).unwrap();
    one("alias/of-the-child").expect("a name that is missing is looked up at once");
    until("the child's enabling", || one(DERIVED[1]).is_ok());
    assert_eq!(engine.describe_key(DERIVED[1]).unwrap().state, KeyState::Enabled);
    to_child.1.write_all(b"2").unwrap();
    child.join();
}

/// How many descriptors of this process belong to `path`.
fn open_files(path: &Path) -> usize {
    let path = path.canonicalize().unwrap();
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    descriptors.filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to == path)).count()
}

#[test]
fn a_child_that_drops_the_engine_takes_nothing_from_its_parent() {
    let home = tempfile::tempdir().unwrap();
    let mut engine = Some(in_file(Engine::builder(), home.path()));
    let mut all = vec![make(engine.as_ref().unwrap(), 400, true)];
    let granted = |engine: &Engine| {
        DIRECT.map(|key| engine.describe_key(key).unwrap().initial_version().wraps_granted)
    };
    let before = granted(engine.as_ref().unwrap());
    for uses in [false, true] {
        let child = fork(home.path(), || {
            let engine = engine.take().unwrap();
            let made = if uses { make(&engine, 400, true) } else { Vec::new() };
            drop(engine);
            // Nothing keeps it alive in the name of a thread that does not exist here.
            assert_eq!(open_files(&home.path().join("keys.db")), 0);
            made
        });
        all.push(child.join());
        let engine = engine.as_ref().unwrap();
        if uses {
            assert!(granted(engine) > before);
        } else {
            assert_eq!(granted(engine), before, "the child returned its parent's lease");
        }
        all[0].extend(make(engine, 400, true));
    }
    assert_distinct(&all);
    assert_counted(engine.as_ref().unwrap(), all.iter().flatten());
    // Closed cleanly by everyone, the store has counted what was made and nothing else.
    drop(engine);
    let engine = Engine::open(home.path().join("keys.db"), &root_key()).unwrap();
    let made = |direct| all.iter().flatten().filter(|made| made.direct == direct).count() as u64;
    assert_eq!(granted(&engine), [made(1), made(2)]);
}
