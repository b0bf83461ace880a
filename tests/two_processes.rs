//! Two processes on one store: the bound of `Direct` keys, changes that the other sees, and `kill -9` at any moment.
//!
//! Method: this test binary runs itself as worker processes (the "test" `worker`, which does nothing unless the
//! environment names a store). A worker takes commands on stdin and answers on stdout, a line for a line; or it storms
//! through random key operations, announcing each (`>`) and acknowledging it (`<`) once it has returned, until it is
//! killed. What was acknowledged has to be there afterwards; what was announced may be there or not.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    env,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Once,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use keymill::{
    CreateKey, DecryptRequest, Engine, EngineBuilder, Error, ErrorKind, GenerateDataKeyRequest,
    KeyMetadata, KeySpec, RootKey, Scheme,
    limits::{LEASE_MAX, WRAPS_PER_VERSION_MAX},
};

/// The variables that make a worker of this binary.
const STORE: &str = "KEYMILL_TEST_STORE";
const LEASE: &str = "KEYMILL_TEST_LEASE";
const STORM: &str = "KEYMILL_TEST_STORM";

const DIRECT: &str = "alias/direct";
const DERIVED: &str = "alias/derived";

fn root_key() -> RootKey {
    RootKey::from_bytes(&[9; 32]).unwrap()
}

fn builder(lease: u64) -> EngineBuilder {
    Engine::builder().lease_max(lease)
}

/// A new store with a `Derived` key and a `Direct` one that counts `spent` wraps as spent.
fn new_store(home: &Path, spent: u64) -> PathBuf {
    let store = home.join("keys.db");
    let engine = Engine::builder().initial_spent(spent).create(&store, &root_key()).unwrap();
    for (alias, scheme) in [(DIRECT, Scheme::Direct), (DERIVED, Scheme::Derived)] {
        let alias = Some(alias.to_owned());
        let scheme = Some(scheme);
        engine.create_key(&CreateKey { alias, scheme, ..CreateKey::default() }).unwrap();
    }
    store
}

fn granted(key: &KeyMetadata) -> u64 {
    key.initial_version().wraps_granted
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

/// A pseudo-random sequence, so that a failure repeats as far as a kill can.
fn mix(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 40).unwrap()
}

// --- the worker ---

#[test]
fn worker() {
    let Ok(store) = env::var(STORE) else { return };
    let lease = env::var(LEASE).unwrap().parse().unwrap();
    let engine = builder(lease).open(store, &root_key()).unwrap();
    match env::var(STORM) {
        Ok(seed) => storm(&engine, seed.parse().unwrap()),
        Err(_) => obey(engine),
    }
}

/// One line to the parent, whole and at once.
fn say(line: String) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// The answer for one data key: its IV, or the code of the refusal.
fn answer(made: Result<&[u8], &Error>) -> String {
    made.map_or_else(|error| error.code().to_owned(), hex)
}

/// Does what stdin says, until it says `quit`.
fn obey(engine: Engine) {
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let done = match words[..] {
            ["make", key] => {
                let made = engine.generate_data_key(&GenerateDataKeyRequest::new(key, 32));
                answer(made.as_ref().map(|key| &key.iv()[..]))
            }
            ["many", key, count] => {
                let request = GenerateDataKeyRequest::new(key, 32);
                let batch =
                    engine.advance_generate_data_key_batch(&vec![request; count.parse().unwrap()]);
                let batch = batch.unwrap();
                batch.iter().map(|key| answer(key.map(|key| &key.iv()[..])) + " ").collect()
            }
            ["create", alias] => {
                let key = CreateKey { alias: Some(alias.to_owned()), ..CreateKey::default() };
                result(engine.create_key(&key))
            }
            ["alias", alias, key] => result(engine.create_alias(alias, key)),
            ["disable", key] => result(engine.disable_key(key)),
            ["enable", key] => result(engine.enable_key(key)),
            ["rotate", key] => result(engine.rotate_key(key)),
            ["delete", key] => result(engine.schedule_key_deletion(key, 7)),
            ["quit"] => break,
            _ => panic!("{line}"),
        };
        say(format!("< {done}"));
    }
    drop(engine);
    say("< closed".to_owned());
}

fn result<T>(done: Result<T, Error>) -> String {
    done.map_or_else(|error| error.code().to_owned(), |_| "done".to_owned())
}

// --- the worker, as its parent sees it ---

struct Worker {
    process: Child,
    commands: Option<ChildStdin>,
    /// Read by a thread, so that a worker never waits for a parent that is busy elsewhere.
    lines: Receiver<String>,
}

impl Worker {
    fn start(store: &Path, lease: u64, storm: Option<u64>) -> Self {
        watch();
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", "worker", "--nocapture", "--test-threads=1"])
            .env(STORE, store)
            .env(LEASE, lease.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        match storm {
            Some(seed) => command.env(STORM, seed.to_string()),
            None => command.env_remove(STORM),
        };
        let mut process = command.spawn().unwrap();
        let commands = process.stdin.take();
        let out = BufReader::new(process.stdout.take().unwrap());
        let (to, lines) = mpsc::channel();
        thread::spawn(move || read_lines(out, &to));
        Self { process, commands, lines }
    }

    fn send(&mut self, command: &str) {
        writeln!(self.commands.as_mut().unwrap(), "{command}").unwrap();
    }

    /// The next line, if the worker has not ended.
    fn line(&mut self) -> Option<String> {
        self.lines.recv().ok()
    }

    fn hear(&mut self) -> String {
        self.line().expect("the worker ended").split_off(2)
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.hear()
    }

    fn quit(mut self) {
        assert_eq!(self.ask("quit"), "closed");
        assert!(self.process.wait().unwrap().success());
    }

    /// `kill -9`; what it had said until then can still be read.
    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Passes on the whole lines of the worker itself; the harness around it talks, too.
fn read_lines(mut out: BufReader<ChildStdout>, to: &Sender<String>) {
    loop {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        // Cut off by the kill, or the end.
        let Some(line) = line.strip_suffix('\n') else { return };
        // The harness writes this before the first line of the worker, without a line's end.
        let line = line.strip_prefix("test worker ... ").unwrap_or(line);
        if (line.starts_with('<') || line.starts_with("> ")) && to.send(line.to_owned()).is_err() {
            return;
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Ends everything if a worker hangs.
fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        thread::spawn(|| {
            thread::sleep(Duration::from_secs(240));
            eprintln!("a worker hung");
            std::process::abort();
        });
    });
}

// --- the bound of `Direct` keys ---

const REFUSED: &str = "Rejected.LimitExceeded";
const ALMOST_SPENT: u64 = WRAPS_PER_VERSION_MAX - 3;

/// Adds the IVs of an answer to `made`, and returns how many of its items were refused.
fn take(made: &mut Vec<String>, answer: &str) -> usize {
    let (good, refused): (Vec<_>, Vec<_>) =
        answer.split_whitespace().partition(|item| item.len() == 24);
    assert!(refused.iter().all(|item| *item == REFUSED), "{answer}");
    made.extend(good.into_iter().map(str::to_owned));
    refused.len()
}

fn assert_three(made: &[String]) {
    assert_eq!(made.len(), 3, "{made:?}");
    assert_eq!(made.iter().collect::<HashSet<_>>().len(), 3, "an IV was used twice: {made:?}");
}

#[test]
fn three_wraps_are_left_to_single_calls_and_to_a_batch() {
    for lease in [0, LEASE_MAX] {
        for batch in [false, true] {
            let home = tempfile::tempdir().unwrap();
            let store = new_store(home.path(), ALMOST_SPENT);
            let mut worker = Worker::start(&store, lease, None);
            let mut made = Vec::new();
            if batch {
                let answer = worker.ask(&format!("many {DIRECT} 8"));
                // The first three in request order.
                let third = answer.split_whitespace().nth(2).unwrap();
                assert_eq!(third.len(), 24, "{answer}");
                assert_eq!(take(&mut made, &answer), 5);
            } else {
                for _ in 0..3 {
                    assert_eq!(take(&mut made, &worker.ask(&format!("make {DIRECT}"))), 0);
                }
            }
            assert_three(&made);
            for command in [format!("make {DIRECT}"), format!("many {DIRECT} 1")] {
                assert_eq!(worker.ask(&command).trim(), REFUSED);
            }
            worker.quit();
            let engine = Engine::open(&store, &root_key()).unwrap();
            let error = engine.generate_data_key(&GenerateDataKeyRequest::new(DIRECT, 1));
            assert_eq!(error.unwrap_err().kind(), ErrorKind::LimitExceeded);
            assert_eq!(granted(&engine.describe_key(DIRECT).unwrap()), WRAPS_PER_VERSION_MAX);
        }
    }
}

#[test]
fn a_crash_between_lease_and_use_wastes_and_never_repeats() {
    for (lease, left_after_crash) in [(0, 2), (1, 1), (LEASE_MAX, 0)] {
        let home = tempfile::tempdir().unwrap();
        let store = new_store(home.path(), ALMOST_SPENT);
        let mut made = Vec::new();
        let mut worker = Worker::start(&store, lease, None);
        take(&mut made, &worker.ask(&format!("make {DIRECT}")));
        worker.kill();
        let mut worker = Worker::start(&store, 0, None);
        let refused = take(&mut made, &worker.ask(&format!("many {DIRECT} 8")));
        assert_eq!((made.len(), refused), (1 + left_after_crash, 8 - left_after_crash));
        assert_eq!(made.iter().collect::<HashSet<_>>().len(), made.len());
        worker.quit();
    }
}

#[test]
fn a_clean_close_returns_what_was_not_used() {
    for lease in [0, LEASE_MAX] {
        let home = tempfile::tempdir().unwrap();
        let store = new_store(home.path(), ALMOST_SPENT);
        let mut made = Vec::new();
        for last in [false, false, false, true] {
            let mut worker = Worker::start(&store, lease, None);
            let refused = take(&mut made, &worker.ask(&format!("make {DIRECT}")));
            assert_eq!(refused, usize::from(last));
            worker.quit();
        }
        assert_three(&made);
    }
}

#[test]
fn two_racing_processes_share_three_wraps() {
    for lease in [0, LEASE_MAX] {
        for command in [format!("make {DIRECT}"), format!("many {DIRECT} 2")] {
            let home = tempfile::tempdir().unwrap();
            let store = new_store(home.path(), ALMOST_SPENT);
            let mut workers = [(); 2].map(|()| Worker::start(&store, lease, None));
            // Both are up before either begins, and have all their commands before either is done.
            workers.iter_mut().for_each(|worker| drop(worker.ask(&format!("make {DERIVED}"))));
            for _ in 0..4 {
                workers.iter_mut().for_each(|worker| worker.send(&command));
            }
            let mut made = Vec::new();
            for worker in &mut workers {
                for _ in 0..4 {
                    take(&mut made, &worker.hear());
                }
            }
            assert_three(&made);
            workers.into_iter().for_each(Worker::quit);
        }
    }
}

// --- changes by the other process ---

/// Asks until `seen` says yes. A second is promised; a slow machine gets more.
fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !seen() {
        assert!(Instant::now() < end, "{what} was not seen");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn each_process_sees_what_the_other_changes() {
    let home = tempfile::tempdir().unwrap();
    let store = new_store(home.path(), 0);
    let here = Engine::open(&store, &root_key()).unwrap();
    let mut there = Worker::start(&store, LEASE_MAX, None);
    let make = |name: &str| here.generate_data_key(&GenerateDataKeyRequest::new(name, 32));
    let advance =
        |name: &str| here.advance_generate_data_key(&GenerateDataKeyRequest::new(name, 32));
    make(DERIVED).unwrap();
    assert_eq!(there.ask(&format!("make {DERIVED}")).len(), 24);

    // Missing names are looked up at once, singly and in batches.
    for (alias, command) in [("alias/one", "make alias/one"), ("alias/two", "many alias/two 3")] {
        let key = CreateKey { alias: Some(alias.to_owned()), ..CreateKey::default() };
        here.create_key(&key).unwrap();
        let answer = there.ask(command);
        assert!(answer.split_whitespace().all(|item| item.len() == 24), "{answer}");
    }
    assert_eq!(there.ask("create alias/three"), "done");
    let made = make("alias/three").unwrap();
    assert_eq!(there.ask("alias alias/four alias/three"), "done");
    let four = GenerateDataKeyRequest::new("alias/four", 32);
    let batch = here.generate_data_key_batch(&[four; 3]).unwrap();
    assert_eq!(batch.get(2).unwrap().key_id(), made.key_id());
    // So is a version that another process made, when its blob is opened.
    assert_eq!(there.ask("rotate alias/one"), "done");
    let other = Engine::open(&store, &root_key()).unwrap();
    assert_eq!(other.describe_key("alias/one").unwrap().versions.len(), 2);
    let new = GenerateDataKeyRequest::new("alias/one", 32).aad(b"new");
    let made = other.advance_generate_data_key(&new).unwrap();
    let request = DecryptRequest::new(made.ciphertext_blob()).aad(b"new");
    assert_eq!(here.advance_decrypt(&request).unwrap().plaintext(), made.plaintext().unwrap());

    // Everything else within a second.
    assert_eq!(there.ask(&format!("rotate {DERIVED}")), "done");
    let primary = other.describe_key(DERIVED).unwrap().primary_version().key_version_id;
    until("the rotation", || advance(DERIVED).unwrap().key_version_id() == primary);
    assert_eq!(there.ask("disable alias/two"), "done");
    let refused = |name, kind| make(name).is_err_and(|error: Error| error.kind() == kind);
    until("the disabling", || refused("alias/two", ErrorKind::Disabled));
    here.enable_key("alias/two").unwrap();
    until("the enabling", || there.ask("make alias/two").len() == 24);
    here.update_alias("alias/four", "alias/two").unwrap();
    here.disable_key("alias/two").unwrap();
    until("the new target of an alias", || there.ask("make alias/four") == "Rejected.Disabled");
    here.delete_alias("alias/four").unwrap();
    until("the end of an alias", || there.ask("make alias/four") == "Forbidden.KeyNotFound");
    assert_eq!(there.ask("delete alias/three"), "done");
    until("the pending deletion", || refused("alias/three", ErrorKind::PendingDeletion));
    // An engine that lives eight days later executes the deletion.
    let later = SystemTime::now() + Duration::from_secs(8 * 86_400);
    let later = Engine::builder().clock(move || later).open(&store, &root_key()).unwrap();
    // Opening deletes nothing.
    assert_eq!(later.run_due().unwrap().deleted.len(), 1);
    assert_eq!(later.list_keys().unwrap().len(), 4);
    until("the deletion", || refused("alias/three", ErrorKind::KeyNotFound));
    until("the deletion", || there.ask("make alias/three") == "Forbidden.KeyNotFound");
    there.quit();
}

// --- kill -9 ---

/// Most keys that a storming worker makes of its own.
const OWN_KEYS_MAX: usize = 6;

/// Random operations, each announced and acknowledged, for ever. Each storm has keys and aliases of its own, which
/// nobody else changes, and all share two keys under which they generate.
fn storm(engine: &Engine, seed: u64) {
    let mut state = seed;
    let mut keys: Vec<String> = Vec::new();
    let mut aliases: Vec<String> = Vec::new();
    let mut number = 0;
    loop {
        number += 1;
        let chosen = keys.get(mix(&mut state) % OWN_KEYS_MAX).cloned();
        let alias = format!("alias/storm-{seed}-{number}");
        match (mix(&mut state) % 12, chosen) {
            (0, None) | (1, None) => {
                say(format!("> create {alias}"));
                let scheme = [Scheme::Direct, Scheme::Derived][mix(&mut state) % 2];
                let spec =
                    [KeySpec::Aes128, KeySpec::Aes256][usize::from(scheme == Scheme::Derived)];
                let key = CreateKey {
                    alias: Some(alias),
                    spec,
                    scheme: Some(scheme),
                    ..CreateKey::default()
                };
                let made = engine.create_key(&key).unwrap();
                say(format!("< {} {}", made.key_id, made.initial_version().key_version_id));
                keys.push(made.key_id.to_string());
            }
            (0 | 1, Some(key)) => {
                say(format!("> rotate {key}"));
                let made = engine.rotate_key(&key).unwrap();
                say(format!("< {}", made.primary_version().key_version_id));
            }
            (2, Some(key)) => {
                say(format!("> state {key} Disabled"));
                engine.disable_key(&key).unwrap();
                say("< done".to_owned());
                say(format!("> state {key} Enabled"));
                engine.enable_key(&key).unwrap();
                say("< done".to_owned());
            }
            (3, Some(key)) => {
                say(format!("> state {key} PendingDeletion"));
                engine.schedule_key_deletion(&key, 7).unwrap();
                say("< done".to_owned());
                say(format!("> state {key} Enabled"));
                engine.cancel_key_deletion(&key).unwrap();
                say("< done".to_owned());
            }
            (4, Some(key)) => {
                say(format!("> point {alias} {key}"));
                engine.create_alias(&alias, &key).unwrap();
                say("< done".to_owned());
                aliases.push(alias);
            }
            (5, Some(key)) if !aliases.is_empty() => {
                let alias = &aliases[mix(&mut state) % aliases.len()];
                say(format!("> point {alias} {key}"));
                engine.update_alias(alias, &key).unwrap();
                say("< done".to_owned());
            }
            (6, Some(_)) if !aliases.is_empty() => {
                let alias = aliases.swap_remove(mix(&mut state) % aliases.len());
                say(format!("> unpoint {alias}"));
                engine.delete_alias(&alias).unwrap();
                say("< done".to_owned());
            }
            (7.., _) => {
                let name = [DIRECT, DERIVED][mix(&mut state) % 2];
                let count = [1, 1, 2, 5, 40][mix(&mut state) % 5];
                let requests = vec![GenerateDataKeyRequest::new(name, 16).aad(b"storm"); count];
                say("> generate".to_owned());
                let batch = engine.advance_generate_data_key_batch(&requests).unwrap();
                let line: String = batch
                    .iter()
                    .map(|key| {
                        let key = key.unwrap();
                        let dek = hex(key.plaintext().unwrap());
                        format!(" {dek}:{}", hex(key.ciphertext_blob()))
                    })
                    .collect();
                say(format!("<{line}"));
            }
            _ => {}
        }
    }
}

/// What has to be in the store by all that its workers acknowledged.
#[derive(Default)]
struct Model {
    keys: BTreeMap<String, ModelKey>,
    /// By alias.
    aliases: BTreeMap<String, String>,
    /// Data keys and blobs of the present round.
    blobs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Wraps of `Direct` versions by version, and all their IVs.
    wraps: HashMap<String, u64>,
    ivs: HashSet<(String, Vec<u8>)>,
    deks: HashSet<Vec<u8>>,
    acknowledged: usize,
}

struct ModelKey {
    versions: Vec<String>,
    state: String,
}

impl Model {
    fn apply(&mut self, announced: &str, acknowledged: &str) {
        self.acknowledged += 1;
        let said: Vec<_> = acknowledged.split_whitespace().collect();
        match announced.split(' ').collect::<Vec<_>>()[..] {
            ["create", alias] => {
                let (id, version) = (said[0].to_owned(), said[1].to_owned());
                self.aliases.insert(alias.to_owned(), id.clone());
                let key = ModelKey { versions: vec![version], state: "Enabled".to_owned() };
                assert!(self.keys.insert(id, key).is_none());
            }
            ["rotate", key] => self.keys.get_mut(key).unwrap().versions.push(said[0].to_owned()),
            ["state", key, state] => self.keys.get_mut(key).unwrap().state = state.to_owned(),
            ["point", alias, key] => drop(self.aliases.insert(alias.to_owned(), key.to_owned())),
            ["unpoint", alias] => assert!(self.aliases.remove(alias).is_some()),
            ["generate"] => said.iter().for_each(|made| self.note(made)),
            _ => panic!("{announced}"),
        }
    }

    fn note(&mut self, made: &str) {
        let (dek, blob) = made.split_once(':').unwrap();
        let (dek, blob) = (unhex(dek), unhex(blob));
        assert!(self.deks.insert(dek.clone()), "a data key came twice");
        // Without a salt, the blob is of the `Direct` key.
        if blob.len() == 51 + 16 + 16 {
            let version = String::from_utf8(blob[3..39].to_vec()).unwrap();
            assert!(
                self.ivs.insert((version.clone(), blob[39..51].to_vec())),
                "an IV of a Direct version came twice"
            );
            *self.wraps.entry(version).or_default() += 1;
        }
        self.blobs.push((dek, blob));
    }

    /// Compares with the store. Of what is named in `open` the last operation was announced and not acknowledged, or
    /// may have gone on since.
    fn check(&mut self, store: &Path, open: &BTreeSet<String>, alive: Option<u64>) {
        let engine = Engine::open(store, &root_key()).unwrap();
        let stored = engine.list_keys().unwrap();
        let by_id: HashMap<_, _> = stored.iter().map(|key| (key.key_id.to_string(), key)).collect();
        for (id, expected) in &self.keys {
            let key = by_id.get(id).unwrap_or_else(|| panic!("key {id} is lost"));
            let versions: Vec<_> =
                key.versions.iter().map(|version| version.key_version_id.to_string()).collect();
            let slack = usize::from(open.contains(id));
            assert!(versions.starts_with(&expected.versions), "{id}: a version is lost");
            assert!(versions.len() <= expected.versions.len() + slack, "{id}: a version too many");
            assert!(slack == 1 || key.state.as_str() == expected.state, "{id}: {}", key.state);
        }
        let aliases: BTreeMap<_, _> = (engine.list_aliases().unwrap().into_iter())
            .map(|(alias, key)| (alias.as_str().to_owned(), key.to_string()))
            .collect();
        for (alias, key) in &self.aliases {
            let same = aliases.get(alias) == Some(key);
            assert!(same || open.contains(alias), "{alias} is lost or elsewhere");
        }
        let living = alive.map(|seed| format!("alias/storm-{seed}-"));
        for alias in aliases.keys().filter(|alias| alias.starts_with("alias/storm")) {
            let excused = living.as_ref().is_some_and(|living| alias.starts_with(living));
            assert!(
                excused || self.aliases.contains_key(alias) || open.contains(alias),
                "{alias} is back"
            );
        }
        let requests: Vec<_> =
            self.blobs.iter().map(|(_, blob)| DecryptRequest::new(blob).aad(b"storm")).collect();
        let opened = engine.advance_decrypt_batch(&requests).unwrap();
        for (opened, (dek, _)) in opened.iter().zip(&self.blobs) {
            assert_eq!(opened.unwrap().plaintext(), dek);
        }
        self.blobs.clear();
        let versions = stored.iter().flat_map(|key| &key.versions);
        let counts: HashMap<_, _> = versions
            .map(|version| (version.key_version_id.to_string(), version.wraps_granted))
            .collect();
        for (version, wraps) in &self.wraps {
            assert!(counts[version] >= *wraps, "{version}: more wraps than were granted");
        }
        // The store takes new work.
        let key = engine.generate_data_key(&GenerateDataKeyRequest::new(DIRECT, 16)).unwrap();
        let version = key.key_version_id().to_string();
        assert!(self.ivs.insert((version.clone(), key.iv().to_vec())), "an IV came twice");
        *self.wraps.entry(version).or_default() += 1;
    }
}

/// Kills a worker, reads what it had said, and adds to `open` what its last announcement names.
fn end(mut worker: Worker, mut said: Vec<String>, model: &mut Model, open: &mut BTreeSet<String>) {
    worker.kill();
    while let Some(line) = worker.line() {
        said.push(line);
    }
    let mut announced: Option<String> = None;
    for line in said {
        match (line.split_at(1), announced.take()) {
            ((">", what), None) => announced = Some(what.trim().to_owned()),
            (("<", done), Some(what)) => model.apply(&what, done),
            _ => panic!("{line}"),
        }
    }
    let names = announced.iter().flat_map(|what| what.split(' ').skip(1));
    open.extend(names.map(str::to_owned));
}

#[test]
fn a_hundred_kills_lose_nothing_and_grant_nothing_twice() {
    const STORES: u64 = 5;
    const KILLS: u64 = 20;
    let mut acknowledged = 0;
    for number in 0..STORES {
        let home = tempfile::tempdir().unwrap();
        let store = new_store(home.path(), 0);
        let (mut model, mut open) = (Model::default(), BTreeSet::new());
        let mut second: Option<(Worker, u64)> = None;
        for round in 0..KILLS {
            let seed = 1 + number * KILLS + round;
            let mut random = seed;
            let lease = [0, 3, 64, LEASE_MAX][mix(&mut random) % 4];
            // In two rounds of four another worker storms on while this one is killed and the store is checked.
            if round % 4 == 1 {
                let seed = 1_000 + seed;
                second = Some((Worker::start(&store, lease, Some(seed)), seed));
            }
            let mut worker = Worker::start(&store, lease, Some(seed));
            let mut said = Vec::new();
            for _ in 0..mix(&mut random) % 40 {
                said.extend(worker.line());
            }
            thread::sleep(Duration::from_micros((mix(&mut random) % 4000) as u64));
            end(worker, said, &mut model, &mut open);
            if round % 4 == 3 {
                let (worker, _) = second.take().unwrap();
                end(worker, Vec::new(), &mut model, &mut open);
            }
            model.check(&store, &open, second.as_ref().map(|(_, seed)| *seed));
        }
        acknowledged += model.acknowledged;
    }
    assert!(acknowledged > 500, "only {acknowledged} operations were acknowledged");
    println!("{acknowledged} operations acknowledged");
}
