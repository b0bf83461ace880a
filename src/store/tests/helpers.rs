//! What the store's tests share: scratch stores, keys to put in them, images to compare, children to run things in.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
};

use crate::{
    clients::{Client, ClientId, KeyPattern, Permissions},
    cpu::Tier,
    error::{Error, ErrorKind, Result},
    keys::{
        Alias, KeyId, KeyRecord, KeySpec, KeyState, KeyVersionId, Origin, StoredKey, VersionRecord,
        system_time,
    },
    rng::Rng,
    secret::Material,
    store::{Grant, KeyStore, LeaseRequest, NewKey, RootKey, SqliteStore},
    wrap::Scheme,
};

pub(super) fn rng() -> Rng {
    Rng::Os(Tier::PORTABLE)
}

/// Of opened stores. New ones are written by the tier of `rng`, so that either reads what the other wrote.
pub(super) fn tier() -> Tier {
    Tier::detect().unwrap()
}

pub(super) fn root() -> RootKey {
    RootKey::from_bytes(&[0x5a; 32]).unwrap()
}

/// A directory with a new store.
pub(super) struct Scratch {
    pub(super) home: tempfile::TempDir,
    pub(super) path: PathBuf,
}

impl Scratch {
    pub(super) fn new() -> (Self, SqliteStore) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("keys.db");
        let store = SqliteStore::create(&path, &root(), &rng()).unwrap();
        (Self { home, path }, store)
    }

    pub(super) fn open(&self) -> Result<SqliteStore> {
        SqliteStore::open(&self.path, &root(), tier())
    }

    /// Runs statements on a connection that knows nothing of us, while no other test forks: SQLite's own locks would
    /// stay held in the child.
    pub(super) fn plant(&self, statements: &str) -> rusqlite::Result<()> {
        let _gate = crate::os::fork_gate();
        self.raw().execute_batch(statements)
    }

    /// Asks for one row, in the same way.
    pub(super) fn ask<T>(
        &self,
        query: &str,
        read: impl FnOnce(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> T {
        let _gate = crate::os::fork_gate();
        self.raw().query_row(query, [], read).unwrap()
    }

    /// A connection that knows nothing of us and checks nothing.
    pub(super) fn raw(&self) -> rusqlite::Connection {
        let raw = rusqlite::Connection::open(&self.path).unwrap();
        raw.execute_batch(
            "PRAGMA foreign_keys = OFF; PRAGMA synchronous = OFF; \
             PRAGMA ignore_check_constraints = ON; PRAGMA busy_timeout = 10000",
        )
        .unwrap();
        raw
    }
}

/// The bytes of a file, read by another process: if this one closed a descriptor of a database, its locks would go.
pub(super) fn bytes_of(path: &Path) -> Vec<u8> {
    std::process::Command::new("cat").arg(path).output().unwrap().stdout
}

pub(super) fn new_version(key: &KeyId, ordinal: u32, len: usize) -> VersionRecord {
    let mut material = vec![0; len];
    rng().fill(&mut material).unwrap();
    VersionRecord {
        id: KeyVersionId::generate(key, &rng()).unwrap(),
        ordinal,
        created: 1_000 + u64::from(ordinal),
        material: Material::new(&material).unwrap(),
        spent: 0,
    }
}

pub(super) fn new_key(spec: KeySpec, origin: Origin, alias: Option<&str>) -> NewKey {
    let id = KeyId::generate(&rng()).unwrap();
    NewKey {
        record: KeyRecord {
            id,
            spec,
            scheme: Scheme::Direct,
            origin,
            description: "a key; \0 é".to_owned(),
            created: 1_000,
            state: KeyState::Enabled,
            rotation: None,
            last_rotation: 1_000,
            version_count: 1,
        },
        version: new_version(&id, 0, spec.material_len()),
        alias: alias.map(|alias| Alias::parse(alias).unwrap()),
    }
}

pub(super) fn direct() -> NewKey {
    new_key(KeySpec::Aes256, Origin::Generated, None)
}

pub(super) fn new_client(name: &str) -> Client {
    Client {
        client_id: ClientId::generate(&rng()).unwrap(),
        name: name.to_owned(),
        creation_date: system_time(1_000),
        enabled: true,
        permissions: Permissions::parse("generate,decrypt").unwrap(),
        key_patterns: ["alias/*", "key-?"].map(|text| KeyPattern::parse(text).unwrap()).into(),
        public_key: (0..=u8::MAX).collect(),
    }
}

/// A store's contents in a form that can be compared and printed in tests.
pub(super) fn contents(store: &dyn KeyStore) -> Vec<String> {
    let version = |version: &VersionRecord| {
        let VersionRecord { id, ordinal, created, material, spent } = version;
        format!("{id} {ordinal} {created} {:x?} {spent}", material.expose())
    };
    let key = |key: &StoredKey| {
        let versions: Vec<_> = key.versions.iter().map(version).collect();
        format!("{:?} {versions:?} {:?}", key.record, key.aliases)
    };
    let image = store.load().unwrap();
    let clients = image.clients.iter().map(|client| format!("{client:?}"));
    image.keys.iter().map(key).chain(clients).collect()
}

pub(super) fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().as_ref().map(Error::kind).expect("this had to fail")
}

pub(super) fn lease(store: &dyn KeyStore, version: &KeyVersionId, need: u64) -> Grant {
    store.lease(version, LeaseRequest { need, surplus: 0 }).unwrap()
}

/// How a child is made.
#[derive(Clone, Copy)]
pub(super) enum Birth {
    /// `fork` of the C library, which runs the handlers.
    Fork,
    /// The bare system call, which does not. Only from a process with one thread: nothing repairs the allocator.
    RawClone,
}

/// A child process that runs `work` and sends back what it returns.
pub(super) struct Child {
    pid: libc::pid_t,
    answer: UnixStream,
}

impl Child {
    #[expect(unsafe_code, reason = "forks")]
    pub(super) fn run(birth: Birth, work: impl FnOnce() -> u64) -> Self {
        let (answer, mut ours) = UnixStream::pair().unwrap();
        // SAFETY: the child goes on in this function alone and leaves by `_exit`; after a raw clone it is the copy of
        // a process with one thread.
        let pid = unsafe {
            match birth {
                Birth::Fork => libc::fork(),
                Birth::RawClone => {
                    libc::pid_t::try_from(libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0))
                        .unwrap()
                }
            }
        };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: plain system calls. A child that hangs is ended by the alarm, which the parent sees as failure.
            unsafe { libc::alarm(120) };
            let answer = std::panic::catch_unwind(AssertUnwindSafe(work));
            if let Err(panic) = &answer {
                // The test's own output is captured in memory that this process takes with it.
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref().copied()).unwrap_or("a panic");
                let mut stderr = std::mem::ManuallyDrop::new(std::fs::File::from(
                    std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned().unwrap(),
                ));
                let _ = stderr.write_all(format!("child: {text}\n").as_bytes());
            }
            let sent = answer.is_ok_and(|answer| ours.write_all(&answer.to_be_bytes()).is_ok());
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!sent)) };
        }
        Self { pid, answer }
    }

    #[expect(unsafe_code, reason = "waits for the child")]
    pub(super) fn join(mut self) -> u64 {
        let mut status = 0;
        // SAFETY: `status` is writable, and the child is ours and not waited for before.
        let pid = unsafe { libc::waitpid(self.pid, &mut status, 0) };
        assert_eq!((pid, status), (self.pid, 0), "the child failed; its message is above");
        let mut answer = [0; 8];
        self.answer.read_exact(&mut answer).unwrap();
        u64::from_be_bytes(answer)
    }
}
