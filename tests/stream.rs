//! Streams of data keys: everything, in order, in bounded memory, and an end of the thread that makes it.
//!
//! Method: streams are read to their end and every key is opened with the AAD of its place; a source of AADs that notes
//! how far it was asked shows how far the windows are ahead of their reader. Tests run one after another, so that the
//! threads of one are not taken for those of another.
#![cfg(target_os = "linux")]

use std::{
    collections::HashSet,
    fs,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use keymill::{
    AadSource, CreateKey, DataKeyBatch, DataKeyStream, DecryptRequest, Engine, ErrorKind,
    KeyHandle, NoAad, Operation, SameAad, Scheme, limits,
};

const OPERATIONS: [Operation; 4] = [
    Operation::GenerateDataKey,
    Operation::GenerateDataKeyWithoutPlaintext,
    Operation::AdvanceGenerateDataKey,
    Operation::AdvanceGenerateDataKeyWithoutPlaintext,
];

const ADVANCE: Operation = Operation::AdvanceGenerateDataKey;

/// Windows that are made and not read: those in the queue, and the one that waits for a place there.
const AHEAD: usize = limits::STREAM_WINDOWS_AHEAD + 1;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // Or its threads would be started by the thread of a stream, and inherit its name.
    rayon::broadcast(|_| ());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn engine_with_key(scheme: Scheme) -> (Engine, KeyHandle) {
    let engine = Engine::in_memory().unwrap();
    let key = new_key(&engine, scheme);
    (engine, key)
}

fn new_key(engine: &Engine, scheme: Scheme) -> KeyHandle {
    let key = CreateKey { scheme: Some(scheme), ..CreateKey::default() };
    let id = engine.create_key(&key).unwrap().key_id;
    engine.key(id.as_str()).unwrap()
}

fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < end, "{what} was not seen");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Threads of this process that make streams.
fn stream_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.trim_end() == "keymill-stream").count()
}

fn assert_threads_end() {
    // A thread that was waited for may still be listed for a moment.
    until("the end of the thread", || stream_threads() == 0);
}

/// Numbers as AADs, which notes the highest number that was asked for.
struct Numbers {
    bytes: Vec<[u8; 8]>,
    asked: Arc<AtomicUsize>,
}

impl Numbers {
    fn new(count: usize) -> (Self, Arc<AtomicUsize>) {
        let bytes = (0..count as u64).map(u64::to_be_bytes).collect();
        let asked = Arc::new(AtomicUsize::new(0));
        (Self { bytes, asked: Arc::clone(&asked) }, asked)
    }
}

impl AadSource for Numbers {
    fn count(&self) -> Option<usize> {
        Some(self.bytes.len())
    }

    fn aad(&self, index: usize) -> &[u8] {
        self.asked.fetch_max(index, Relaxed);
        &self.bytes[index]
    }
}

fn windows(stream: DataKeyStream) -> Vec<DataKeyBatch> {
    stream.map(Result::unwrap).collect()
}

#[test]
fn a_stream_has_every_key_in_order_and_none_twice() {
    let _alone = alone();
    let count = 100_001;
    for (scheme, operation) in [Scheme::Derived, Scheme::Direct]
        .into_iter()
        .flat_map(|scheme| OPERATIONS.map(|operation| (scheme, operation)))
    {
        let (engine, key) = engine_with_key(scheme);
        let (numbers, _) = Numbers::new(count);
        let id = key.key_id();
        let stream = engine.stream_data_keys(&key, operation, 32, count as u64, numbers).unwrap();
        let (mut index, mut blobs, mut plaintexts) = (0, HashSet::new(), HashSet::new());
        for window in stream {
            let window = window.unwrap();
            assert!(!window.is_empty() && window.len() <= limits::STREAM_WINDOW_ITEMS);
            let aads: Vec<_> = (index..index + window.len() as u64).map(u64::to_be_bytes).collect();
            let opening: Vec<_> = (window.iter().zip(&aads))
                .map(|(key, aad)| {
                    let key = key.unwrap();
                    DecryptRequest::new(key.ciphertext_blob())
                        .key_id(id.as_str())
                        .iv(key.iv())
                        .aad(aad)
                })
                .collect();
            let opened = engine.advance_decrypt_batch(&opening).unwrap();
            assert!(opened.errors().is_empty(), "{}", opened.errors()[0]);
            for (key, opened) in window.iter().zip(opened.iter()) {
                let (key, opened) = (key.unwrap(), opened.unwrap());
                assert_eq!(key.plaintext().is_some(), operation.returns_plaintext());
                assert!(key.plaintext().is_none_or(|plaintext| plaintext == opened.plaintext()));
                assert!(plaintexts.insert(opened.plaintext().to_vec()), "a data key twice");
                assert!(blobs.insert(key.request_id()), "a request id twice");
            }
            index += window.len() as u64;
        }
        assert_eq!(index, count as u64);
        drop(engine);
    }
    assert_threads_end();
}

#[test]
fn windows_stay_within_their_limits() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    for (len, count) in [(1, 40_000), (32, 40_000), (256, 40_000), (1024, 20_000), (32, 1)] {
        let windows = windows(engine.stream_data_keys(&key, ADVANCE, len, count, NoAad).unwrap());
        for window in &windows {
            let key = window.get(0).unwrap();
            let item = key.plaintext().unwrap().len() + key.ciphertext_blob().len();
            assert!(window.len() <= limits::STREAM_WINDOW_ITEMS);
            let bytes = window.len() * (item + limits::IV_LEN);
            assert!(bytes <= limits::STREAM_WINDOW_BYTES, "{bytes} bytes in a window");
        }
        assert_eq!(windows.iter().map(|window| window.len() as u64).sum::<u64>(), count);
        // All but the last are full.
        let full = windows[0].len();
        assert!(windows[..windows.len() - 1].iter().all(|window| window.len() == full));
    }
}

#[test]
fn a_stream_of_nothing_ends_at_once() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    let mut stream = engine.stream_data_keys(&key, ADVANCE, 32, 0, NoAad).unwrap();
    assert!(stream.next().is_none());
    assert!(stream.next().is_none());
    let none: [[u8; 1]; 0] = [];
    assert!(engine.stream_data_keys(&key, ADVANCE, 32, 0, none).unwrap().next().is_none());
    assert_threads_end();
}

#[test]
fn what_is_wrong_with_a_stream_is_said_when_it_is_made() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    let (_other, stranger) = engine_with_key(Scheme::Derived);
    let make = |key, len, count, aads: Vec<[u8; 2]>| {
        engine.stream_data_keys(key, ADVANCE, len, count, aads).unwrap_err()
    };
    for error in [
        make(&key, 0, 0, Vec::new()),
        make(&key, 1025, 1, vec![[0; 2]]),
        make(&key, 32, 3, vec![[0; 2]; 2]),
        make(&key, 32, u64::MAX, vec![[0; 2]; 2]),
        make(&stranger, 32, 1, vec![[0; 2]]),
    ] {
        assert_eq!(error.kind(), ErrorKind::InvalidParameter, "{error}");
    }
    assert_eq!(stream_threads(), 0);
    // An AAD that is too long comes with its window, and ends the stream.
    let long = vec![0; limits::AAD_LEN_MAX + 1];
    let mut stream = engine.stream_data_keys(&key, ADVANCE, 32, 10, SameAad(long)).unwrap();
    assert_eq!(stream.next().unwrap().unwrap_err().kind(), ErrorKind::InvalidParameter);
    assert!(stream.next().is_none());
}

#[test]
fn a_rotation_amid_a_stream_takes_effect() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    let id = key.key_id();
    for (operation, follows) in [(OPERATIONS[0], false), (ADVANCE, true)] {
        let old = engine.describe_key(id.as_str()).unwrap();
        let mut stream = engine.stream_data_keys(&key, operation, 32, 200_000, NoAad).unwrap();
        let version = |batch: &DataKeyBatch| batch.get(batch.len() - 1).unwrap().key_version_id();
        let before = version(&stream.next().unwrap().unwrap());
        let new = engine.rotate_key(id.as_str()).unwrap().primary_version().key_version_id;
        let versions: Vec<_> = stream.map(|window| version(&window.unwrap())).collect();
        assert!(versions.len() > AHEAD + 1);
        // One more may have been in the making.
        let (first, rest) = versions.split_at(AHEAD + 1);
        if follows {
            assert_eq!(before, old.primary_version().key_version_id);
            assert!(rest.iter().all(|version| *version == new));
            assert!(first.is_sorted_by_key(|version| *version == new));
        } else {
            let initial = old.initial_version().key_version_id;
            assert!(versions.iter().all(|version| *version == initial) && before == initial);
        }
    }
}

#[test]
fn a_key_that_is_disabled_amid_a_stream_ends_it_with_one_error() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    let id = key.key_id();
    let mut stream = engine.stream_data_keys(&key, ADVANCE, 32, 500_000, NoAad).unwrap();
    stream.next().unwrap().unwrap();
    engine.disable_key(id.as_str()).unwrap();
    let rest: Vec<_> = stream.by_ref().collect();
    let (last, windows) = rest.split_last().unwrap();
    assert_eq!(last.as_ref().unwrap_err().kind(), ErrorKind::Disabled);
    assert!(windows.len() <= AHEAD + 1 && windows.iter().all(Result::is_ok));
    assert!(stream.next().is_none() && stream.next().is_none());
    // The thread has ended, though the stream lives.
    assert_threads_end();
    drop(stream);
    engine.enable_key(id.as_str()).unwrap();
    let stream = engine.stream_data_keys(&key, ADVANCE, 32, 5, NoAad).unwrap();
    assert_eq!(windows_len(stream), 5);
}

fn windows_len(stream: DataKeyStream) -> usize {
    windows(stream).iter().map(DataKeyBatch::len).sum()
}

#[test]
fn a_stream_that_is_dropped_early_ends_its_thread() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    for read in 0..6 {
        let mut stream = engine.stream_data_keys(&key, ADVANCE, 32, u64::MAX, NoAad).unwrap();
        // It gives itself its name.
        until("the thread", || stream_threads() == 1);
        for _ in 0..read {
            stream.next().unwrap().unwrap();
        }
        drop(stream);
        assert_threads_end();
    }
    let many: Vec<_> = (0..8)
        .map(|_| engine.stream_data_keys(&key, ADVANCE, 32, u64::MAX, NoAad).unwrap())
        .collect();
    drop((engine, many));
    assert_threads_end();
}

#[test]
fn a_slow_reader_has_few_windows_ahead() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    let (numbers, asked) = Numbers::new(400_000);
    let mut stream = engine.stream_data_keys(&key, ADVANCE, 32, 400_000, numbers).unwrap();
    let window = stream.next().unwrap().unwrap().len();
    for read in 1..8 {
        let most = (read + AHEAD) * window;
        until("as many windows as may be ahead", || asked.load(Relaxed) + 1 >= most);
        // Time for a maker that knows no bounds.
        thread::sleep(Duration::from_millis(30));
        assert_eq!(asked.load(Relaxed) + 1, most, "after {read} windows");
        assert_eq!(stream.next().unwrap().unwrap().len(), window);
    }
}

#[test]
fn a_direct_key_at_its_bound_refuses_the_items_beyond() {
    let _alone = alone();
    let left = 40_000;
    let spent = limits::WRAPS_PER_VERSION_MAX - left;
    let engine = Engine::builder().initial_spent(spent).in_memory().unwrap();
    let key = new_key(&engine, Scheme::Direct);
    let stream = engine.stream_data_keys(&key, ADVANCE, 32, 100_000, NoAad).unwrap();
    let windows = windows(stream);
    let all: Vec<_> = windows.iter().flat_map(DataKeyBatch::iter).collect();
    assert_eq!(all.len(), 100_000);
    for (index, item) in all.into_iter().enumerate() {
        match item {
            Ok(_) => assert!(index < 40_000, "item {index} is beyond the bound"),
            Err(error) => {
                assert!(index >= 40_000, "item {index}: {error}");
                assert_eq!(error.kind(), ErrorKind::LimitExceeded);
            }
        }
    }
}

/// A source that fails.
struct Broken;

impl AadSource for Broken {
    fn count(&self) -> Option<usize> {
        None
    }

    fn aad(&self, index: usize) -> &[u8] {
        assert!(index < 50_000, "no AAD {index}");
        b"x"
    }
}

/// A stream that ends without a word has all its keys.
#[test]
fn a_source_that_panics_panics_in_the_reader() {
    let _alone = alone();
    let (engine, key) = engine_with_key(Scheme::Derived);
    let mut stream = engine.stream_data_keys(&key, ADVANCE, 32, 100_000, Broken).unwrap();
    let read = panic::catch_unwind(AssertUnwindSafe(|| {
        stream.by_ref().map(|window| window.unwrap().len()).sum::<usize>()
    }));
    let why = read.expect_err("the source's panic");
    assert!(why.downcast_ref::<String>().is_some_and(|why| why.starts_with("no AAD")));
    assert!(stream.next().is_none());
    assert_threads_end();
    // Whoever drops it unread is spared.
    drop(engine.stream_data_keys(&key, ADVANCE, 32, 100_000, Broken).unwrap());
}

/// All threads of the pool wait for windows whose makers would like their help.
#[test]
fn streams_can_be_read_on_the_threads_that_help_to_make_them() {
    let _alone = alone();
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    let engine = Engine::builder().thread_pool(Arc::clone(&pool)).in_memory().unwrap();
    let key = new_key(&engine, Scheme::Derived);
    let (done, all_done) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let read = |_: rayon::BroadcastContext<'_>| {
            let stream = engine.stream_data_keys(&key, ADVANCE, 32, 100_000, NoAad).unwrap();
            assert_eq!(windows_len(stream), 100_000);
            // And one that is dropped early.
            drop(engine.stream_data_keys(&key, ADVANCE, 32, u64::MAX, NoAad).unwrap());
        };
        pool.broadcast(read);
        done.send(()).unwrap();
    });
    all_done.recv_timeout(Duration::from_secs(20)).expect("nobody makes the windows");
}
