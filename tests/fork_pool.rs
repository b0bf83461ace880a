//! Forks and what is kept ahead or behind: pools, streams, and the memory of batches.
//!
//! Method: as in `fork.rs`: everything is warm when the process forks; children report the data keys that they got
//! through files, leave by `_exit`, and an alarm ends whoever hangs. No data key may be in two processes, and what the
//! parent holds has to be there unchanged whatever a child does with its copy.
#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "fork, _exit, alarm and waitpid are system calls")]

use std::{
    collections::HashSet,
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use keymill::{
    CreateKey, DataKey, DataKeyBatch, DecryptRequest, Engine, ErrorKind, KeyHandle, KeyPool,
    KeyPoolConfig, NoAad, Operation, RootKey, Scheme,
};

const ADVANCE: Operation = Operation::AdvanceGenerateDataKey;
/// Seconds after which a child is taken for hung.
const CHILD_SECONDS: u32 = 60;

type Dek = [u8; 32];

/// A forked child, and the file in which it leaves its data keys, or why it failed.
struct Child {
    pid: libc::pid_t,
    report: PathBuf,
}

/// Forks; the child does `work`, reports, and leaves without a return to this harness.
fn fork(home: &Path, work: impl FnOnce() -> Vec<Dek>) -> Child {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    static ONCE: Once = Once::new();
    // SAFETY: a hung parent fails as well: the default action of the alarm ends the process, which is what is wanted.
    ONCE.call_once(|| unsafe {
        libc::alarm(240);
    });
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
        Ok(keys) => (0, keys.concat()),
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
    fn join(self) -> Vec<Dek> {
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
        report.chunks(32).map(|dek| dek.try_into().unwrap()).collect()
    }
}

/// An engine on a file, since children of one in memory have no `Direct` wraps.
fn engine_with_keys(home: &Path) -> (Engine, [KeyHandle; 2]) {
    let root = RootKey::from_bytes(&[3; 32]).unwrap();
    let engine = Engine::create(home.join("keys.db"), &root).unwrap();
    let keys = [Scheme::Derived, Scheme::Direct].map(|scheme| {
        let key = CreateKey { scheme: Some(scheme), ..CreateKey::default() };
        let id = engine.create_key(&key).unwrap().key_id;
        engine.key(id.as_str()).unwrap()
    });
    (engine, keys)
}

fn dek(key: &DataKey) -> Dek {
    key.plaintext().unwrap().expose().try_into().unwrap()
}

fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < end, "{what} was not seen");
        thread::sleep(Duration::from_millis(5));
    }
}

fn until_full(pool: &KeyPool) {
    until("a full pool", || pool.metrics().depth == pool.metrics().capacity);
}

fn new_pool(engine: &Engine, key: &KeyHandle) -> KeyPool {
    // Refilled whenever it is not full.
    let config = KeyPoolConfig::new(ADVANCE, 32).capacity(1500).low_watermark(1500);
    KeyPool::new(engine, key, config).unwrap()
}

/// Takes keys singly and many at once, each of which opens again.
fn take(engine: &Engine, pool: &KeyPool, count: usize) -> Vec<Dek> {
    let mut keys: Vec<_> = (0..count / 2).map(|_| pool.take().unwrap()).collect();
    keys.extend(pool.take_many(count - count / 2).unwrap());
    let opening: Vec<_> =
        keys.iter().map(|key| DecryptRequest::new(key.ciphertext_blob())).collect();
    let opened = engine.advance_decrypt_batch(&opening).unwrap();
    for (key, opened) in keys.iter().zip(opened.iter()) {
        assert_eq!(key.plaintext().unwrap().expose(), opened.unwrap().plaintext());
    }
    keys.iter().map(dek).collect()
}

fn assert_distinct(processes: &[Vec<Dek>]) {
    let total: usize = processes.iter().map(Vec::len).sum();
    let found = processes.iter().flatten().collect::<HashSet<_>>().len();
    assert_eq!(found, total, "{} data keys twice", total - found);
}

#[test]
fn no_key_of_a_pool_is_in_two_processes() {
    let home = tempfile::tempdir().unwrap();
    let (engine, keys) = engine_with_keys(home.path());
    let mut all = Vec::new();
    for key in &keys {
        let pool = new_pool(&engine, key);
        until_full(&pool);
        // Half of the stock is left when the process forks.
        all.push(take(&engine, &pool, 700));
        for stocked in [false, true] {
            let work = || {
                if stocked {
                    // The first look at the numbers starts the child's own pool.
                    until_full(&pool);
                }
                let mut taken = take(&engine, &pool, 1000);
                until_full(&pool);
                let metrics = pool.metrics();
                assert_eq!(metrics.hits + metrics.misses, 1000, "{metrics:?}");
                assert!(!stocked || metrics.misses == 0, "{metrics:?}");
                let grandchild = fork(home.path(), || take(&engine, &pool, 2000));
                let more = take(&engine, &pool, 2000);
                assert!(pool.metrics().hits >= 500);
                let grandchild = grandchild.join();
                taken.extend(more);
                taken.extend(grandchild);
                taken
            };
            let children = [(); 3].map(|()| fork(home.path(), work));
            all.push(take(&engine, &pool, 2000));
            all.extend(children.into_iter().map(Child::join));
        }
        all.push(take(&engine, &pool, 2000));
    }
    assert_distinct(&all);
}

#[test]
fn a_fork_amid_takers_shares_no_key() {
    let home = tempfile::tempdir().unwrap();
    let (engine, keys) = engine_with_keys(home.path());
    let pool = new_pool(&engine, &keys[0]);
    let stop = AtomicBool::new(false);
    let all = thread::scope(|scope| {
        let takers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut taken = Vec::new();
                    while !stop.load(Ordering::Relaxed) && taken.len() < 200_000 {
                        taken.extend(take(&engine, &pool, 100));
                    }
                    taken
                })
            })
            .collect();
        let children = panic::catch_unwind(AssertUnwindSafe(|| {
            let children: Vec<_> = (0..20)
                .map(|_| {
                    thread::sleep(Duration::from_millis(3));
                    fork(home.path(), || take(&engine, &pool, 600))
                })
                .collect();
            children.into_iter().map(Child::join).collect::<Vec<_>>()
        }));
        stop.store(true, Ordering::Relaxed);
        let mut all: Vec<_> = takers.into_iter().map(|taker| taker.join().unwrap()).collect();
        all.extend(children.unwrap_or_else(|why| panic::resume_unwind(why)));
        all
    });
    assert_distinct(&all);
}

#[test]
fn a_child_drops_an_inherited_pool_and_its_own() {
    let home = tempfile::tempdir().unwrap();
    let (engine, keys) = engine_with_keys(home.path());
    let mut pool = Some(new_pool(&engine, &keys[0]));
    until_full(pool.as_ref().unwrap());
    for uses in [false, true] {
        let child = fork(home.path(), || {
            let pool = pool.take().unwrap();
            let taken = if uses { take(&engine, &pool, 100) } else { Vec::new() };
            drop(pool);
            until("the end of the child's thread", || pool_threads() == 0);
            taken
        });
        child.join();
    }
    let metrics = pool.as_ref().unwrap().metrics();
    assert_eq!((metrics.depth, metrics.hits, metrics.misses), (1500, 0, 0));
    take(&engine, pool.as_ref().unwrap(), 100);
}

/// Threads of this process that fill pools.
fn pool_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.trim_end() == "keymill-pool").count()
}

#[test]
fn a_child_sees_a_rotation_in_its_own_pool() {
    let home = tempfile::tempdir().unwrap();
    let (engine, keys) = engine_with_keys(home.path());
    let id = keys[0].key_id();
    let pool = new_pool(&engine, &keys[0]);
    until_full(&pool);
    let child = fork(home.path(), || {
        until_full(&pool);
        let new = engine.rotate_key(id.as_str()).unwrap().primary_version().key_version_id;
        assert_eq!(pool.take().unwrap().key_version_id(), new, "the very next take");
        Vec::new()
    });
    child.join();
    let new = engine.describe_key(id.as_str()).unwrap().primary_version().key_version_id;
    until("the child's rotation", || pool.take().unwrap().key_version_id() == new);
}

#[test]
fn a_stream_is_its_makers_alone() {
    let home = tempfile::tempdir().unwrap();
    let (engine, keys) = engine_with_keys(home.path());
    let streams = || {
        [1, 100_000, u64::MAX]
            .map(|count| engine.stream_data_keys(&keys[0], ADVANCE, 32, count, NoAad).unwrap())
    };
    let mut inherited = Some(streams());
    // Windows wait in the queues now.
    inherited.as_mut().unwrap()[2].next().unwrap().unwrap();
    let reads = fork(home.path(), || {
        for mut stream in inherited.take().unwrap() {
            let error = stream.next().unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Machine);
            assert!(error.message().contains("forked"), "{error}");
            assert!(stream.next().is_none());
            drop(stream);
        }
        let own = engine.stream_data_keys(&keys[0], ADVANCE, 32, 40_000, NoAad).unwrap();
        own.flat_map(|window| deks(&window.unwrap())).collect()
    });
    // One that reads nothing only drops them.
    let drops = fork(home.path(), || {
        drop(inherited.take());
        Vec::new()
    });
    let mut all = vec![reads.join(), drops.join()];
    assert_eq!(all[0].len(), 40_000);
    let [one, many, endless] = inherited.unwrap();
    for (stream, count) in [(one, 1), (many, 100_000)] {
        all.push(stream.flat_map(|window| deks(&window.unwrap())).collect());
        assert_eq!(all.last().unwrap().len(), count);
    }
    drop(endless);
    assert_distinct(&all);
}

fn deks(batch: &DataKeyBatch) -> Vec<Dek> {
    batch.iter().map(|key| key.unwrap().plaintext().unwrap().try_into().unwrap()).collect()
}

#[test]
fn what_a_child_does_with_inherited_batches_is_nothing_to_its_parent() {
    let home = tempfile::tempdir().unwrap();
    let (engine, keys) = engine_with_keys(home.path());
    let make = |count| engine.advance_generate_data_keys(&keys[0], 32, count, NoAad).unwrap();
    let mut batch = Some(make(3000));
    // Waiting memory, which a child must not take.
    drop([make(3000), make(50)]);
    let waiting = engine.recycled_bytes();
    assert!(waiting > 0);
    let before = deks(batch.as_ref().unwrap());
    let view = batch.as_ref().unwrap().get(7).unwrap().to_data_key();
    let mut works = |what: usize| {
        let mut batch = batch.take().unwrap();
        assert!(deks(&batch) == before, "the child has its copy");
        assert_eq!(engine.recycled_bytes(), 0, "and no waiting memory");
        let mut made = Vec::new();
        match what {
            0 => drop(batch),
            1 => {
                batch.clear();
                engine
                    .generate_data_keys_into(&mut batch, ADVANCE, &keys[1], 32, 100, NoAad)
                    .unwrap();
                made.extend(deks(&batch));
            }
            _ => {
                for count in [3000, 10, 5000] {
                    engine
                        .generate_data_keys_into(&mut batch, ADVANCE, &keys[0], 32, count, NoAad)
                        .unwrap();
                    made.extend(deks(&batch));
                }
                drop(batch);
                assert!(engine.recycled_bytes() > 0, "the child keeps memory of its own");
            }
        }
        for _ in 0..50 {
            made.extend(deks(&make(300)));
        }
        assert_eq!(dek(&view), before[7]);
        made
    };
    let mut all = vec![before.clone()];
    for what in 0..3 {
        all.push(fork(home.path(), || works(what)).join());
        all.push(deks(&engine.advance_generate_data_keys(&keys[0], 32, 500, NoAad).unwrap()));
    }
    let batch = batch.unwrap();
    assert!(deks(&batch) == before, "the parent's batch has changed");
    let opening: Vec<_> =
        batch.iter().map(|key| DecryptRequest::new(key.unwrap().ciphertext_blob())).collect();
    let opened = engine.advance_decrypt_batch(&opening).unwrap();
    assert!(opened.iter().zip(&before).all(|(opened, dek)| opened.unwrap().plaintext() == dek));
    drop((opened, batch, view));
    assert!(engine.recycled_bytes() >= waiting);
    assert_distinct(&all);
}
