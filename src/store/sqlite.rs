//! The embedded store: one SQLite file that several processes may use at once.
//!
//! Connections, transactions and forks; rows are `rows.rs` and `client_rows.rs`, tables and settings `schema.rs`,
//! cryptography `seal.rs`.
//!
//! # Forks
//! SQLite must never be carried across a fork: POSIX file locks are not inherited, its process-wide table of open
//! files would lie to the child, and its mutexes may be held by threads that do not exist there. So
//!
//! 1. every use of SQLite happens under `os::fork_gate`, taken **before** the store's own mutex and never twice by one
//!    thread; nobody is inside SQLite while the process forks;
//! 2. before a fork every store closes its connection ([`Quiesce`]); parent and child open their own at the next use,
//!    and check that it is still the same store;
//! 3. a child that was made without fork handlers (raw `clone`) abandons the inherited connection without touching
//!    its lock, and refuses to use SQLite at all if any was in use (`schema::Use`).
//!
//! Other users of SQLite in the process are theirs to keep still.
//!
//! # Another file in its place
//! Before and after each use of the connection the path has to lead to the file that was opened, and to its log
//! (`identity.rs`). If it does not, the connection is closed and every call is refused, until [`KeyStore::load`] has
//! opened what is there by all checks of an opening and read every row. That counts as a new epoch: nothing that was
//! granted before is used or given back afterwards.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use rusqlite::{Connection, TransactionBehavior};

use super::{
    ClientChange, Grant, KeyChange, KeyStore, LeaseRequest, NewKey, StoreImage, checks,
    client_rows,
    identity::{FileId, Held, Wanted, replaced},
    image::load,
    mend,
    meta::{Meta, StoredMeta, Verdict},
    permissions,
    place::{COMPANIONS, Draft, with_suffix},
    root_key::RootKey,
    rows,
    schema::{Failure, Gate, Open, Outcome, corrupt, watch_forks},
    seal::{StoreId, StoreKeys},
};
use crate::{
    clients::{self, Client, ClientId},
    cpu::Tier,
    error::{Error, ErrorKind, Result},
    keys::{Alias, KeyId, KeyRecord, KeyVersionId, Origin, alias::AliasChange},
    os::{self, PerProcess, Quiesce},
    rng::Rng,
};

/// A store in an SQLite file.
pub(crate) struct SqliteStore(Arc<Inner>);

struct Inner {
    /// Absolute, so that it means the same after a change of directory.
    path: PathBuf,
    keys: StoreKeys,
    rng: Rng,
    /// The connection, if one is open. Locked only under the fork gate.
    connection: PerProcess<Mutex<Option<Held>>>,
    /// The file that passed every check. `None` once its path led elsewhere: another has to pass them first.
    accepted: ArcSwapOption<FileId>,
    /// How often another file was accepted.
    epoch: AtomicU64,
    /// Whether a key was deleted whose traces could not be erased yet.
    erasure_owed: AtomicBool,
    closed: AtomicBool,
}

impl SqliteStore {
    /// Makes a new store, whole or not at all, in a file of mode 0600.
    ///
    /// # Errors
    /// `InvalidParameter` if something is at `path` already; `StoreUnavailable` if the file cannot be written. There is
    /// then no store.
    pub(crate) fn create(path: &Path, root: &RootKey, rng: &Rng) -> Result<Self> {
        let path = checks::absolute(path)?;
        checks::check_path(&path)?;
        permissions::check_directory(&path)?;
        let mut id = StoreId([0; 16]);
        rng.fill_from_os(&mut id.0)?;
        let keys = StoreKeys::derive(root, id, tier(rng))?;
        watch_forks()?;
        let place = |error: io::Error| not_placed(&path, &error);
        let draft = Draft::new(&path).map_err(place)?;
        for companion in COMPANIONS {
            // SQLite would take a log that a removed store left behind for this store's.
            let leftover = with_suffix(&path, companion);
            if leftover.symlink_metadata().is_ok() {
                let leftover = leftover.display();
                return Err(Error::invalid(format!(
                    "{leftover} is left from another store; move it away first."
                )));
            }
        }
        {
            let _gate = Gate::enter(&path)?;
            write_new(draft.path(), &keys, rng).map_err(|failure| failure.explain(&path))?;
        }
        draft.publish().map_err(place)?;
        Self::open(&path, root, tier(rng))
    }

    /// Opens a store that exists. Its records are sealed and opened by the kernels of `tier`.
    ///
    /// # Errors
    /// `StoreMissing`; `WrongRootKey`, with nothing written; `StoreCorrupt` if the file is no store of ours, or a
    /// damaged one, or lies beside the log of another; `StoreUnavailable` if it cannot be read and written, or if
    /// others can write it; `InvalidParameter` if its path is too long.
    pub(crate) fn open(path: &Path, root: &RootKey, tier: Tier) -> Result<Self> {
        let path = checks::absolute(path)?;
        checks::check_file(&path)?;
        watch_forks()?;
        let (keys, meta, file) = {
            let _gate = Gate::enter(&path)?;
            if let Some(error) = mend::stale_journal(&path) {
                return Err(error);
            }
            let file = FileId::at(&path)?;
            let (keys, meta) = mend::open_beside_log(&path, root, tier)
                .map_err(|failure| mend::explain(&path, failure.explain(&path), root, tier))?;
            (keys, meta, file)
        };
        let store = Self(Arc::new(Inner {
            path,
            keys,
            rng: Rng::Os(tier),
            connection: PerProcess::empty(),
            accepted: ArcSwapOption::from_pointee(file),
            epoch: AtomicU64::new(0),
            erasure_owed: AtomicBool::new(meta.erased != meta.deleted),
            closed: AtomicBool::new(false),
        }));
        // Before it has a connection, so that no fork meets one that nobody closes. Takes the gate, so not under ours.
        let inner: Weak<Inner> = Arc::downgrade(&store.0);
        os::quiesce_before_fork(inner)?;
        store.0.with(|inner, open| {
            // After a crash between a deletion and its erasure.
            inner.erase(open);
            Ok(())
        })?;
        Ok(store)
    }

    /// Runs a read transaction: everything in it is of one moment.
    fn read<T>(&self, work: impl FnOnce(&Connection, &StoreKeys) -> Outcome<T>) -> Result<T> {
        self.0.with(|inner, open| {
            let transaction =
                open.sqlite.transaction_with_behavior(TransactionBehavior::Deferred)?;
            let answer = work(&transaction, &inner.keys)?;
            transaction.commit()?;
            Ok(answer)
        })
    }

    /// Runs a write transaction, which is undone if `work` fails or panics. Then pays an erasure that is owed.
    fn write<T>(&self, work: impl FnOnce(&Connection, &Inner) -> Outcome<T>) -> Result<T> {
        self.0.with(|inner, open| {
            let answer = inner.transact(open, work)?;
            inner.erase(open);
            Ok(answer)
        })
    }

    /// Counts wraps. Data keys wait for this, so it pays no erasure: that may wait long for a reader.
    fn count<T>(&self, work: impl FnOnce(&Connection, &Inner) -> Outcome<T>) -> Result<T> {
        self.0.with(|inner, open| inner.transact(open, work))
    }
}

#[cfg(test)]
impl SqliteStore {
    /// Deletes a key as a crash before the erasure leaves it.
    pub(super) fn delete_without_erasing(&self, id: &KeyId) {
        let deleted = self.0.with(|inner, open| {
            let transaction = open.sqlite.transaction()?;
            let mut meta = Meta::read(&transaction, &inner.keys)?;
            rows::delete_key(&transaction, id)?;
            meta.keys -= 1;
            meta.deleted += 1;
            meta.changed(&transaction, &inner.keys)?;
            inner.erasure_owed.store(true, Ordering::Relaxed);
            Ok(transaction.commit()?)
        });
        deleted.unwrap();
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.close();
    }
}

impl Inner {
    /// Runs `work` with the connection, opening it if there is none. Refuses if the path of the store does not lead to
    /// the file that was opened.
    fn with<T>(&self, work: impl FnOnce(&Self, &mut Open) -> Outcome<T>) -> Result<T> {
        self.with_file(Wanted::Accepted, work).map(|(answer, _)| answer)
    }

    /// The same, with the file that is wanted. Returns the epoch, too.
    fn with_file<T>(
        &self,
        wanted: Wanted,
        work: impl FnOnce(&Self, &mut Open) -> Outcome<T>,
    ) -> Result<(T, u64)> {
        // Refuses before the gate and the mutex, which in a raw clone may be held by threads that do not exist.
        let _gate = Gate::enter(&self.path)?;
        let connection = self.connection.get_or(|_| Mutex::new(None));
        let mut slot = lock(&connection);
        let explain = |failure: Failure| failure.explain(&self.path);
        // Taken out, so that a panic in `work` closes the connection instead of leaving its transaction open.
        let mut held = match slot.take() {
            Some(held) if held.is_at(&self.path) => held,
            Some(_) => {
                self.accepted.store(None);
                self.reopen(wanted).map_err(explain)?
            }
            None => self.reopen(wanted).map_err(explain)?,
        };
        let outcome = work(self, &mut held.open).map_err(explain);
        held.note_log();
        // What was read or granted may be of a file that nobody else sees any more.
        if !held.is_at(&self.path) {
            self.accepted.store(None);
            return Err(replaced(&self.path));
        }
        // Whatever this connection remembers of damaged pages is read anew, in case the file is put right.
        let damaged = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::StoreCorrupt);
        if outcome.is_ok() && !self.accepts(held.file) {
            self.accepted.store(Some(Arc::new(held.file)));
            self.epoch.fetch_add(1, Ordering::Relaxed);
            self.erasure_owed.store(true, Ordering::Relaxed);
        }
        // A transaction that could not even be rolled back goes with its connection.
        if held.open.sqlite.is_autocommit() && !damaged && self.accepts(held.file) {
            *slot = Some(held);
        }
        outcome.map(|answer| (answer, self.epoch.load(Ordering::Relaxed)))
    }

    fn accepts(&self, file: FileId) -> bool {
        self.accepted.load().as_deref() == Some(&file)
    }

    /// Opens the file again, after a fork or because another lies there now, and checks that it is this store still.
    fn reopen(&self, wanted: Wanted) -> Outcome<Held> {
        checks::check_file(&self.path).inspect_err(|error| {
            if error.kind() == ErrorKind::StoreMissing {
                self.accepted.store(None);
            }
        })?;
        let file = FileId::at(&self.path)?;
        let known = self.accepts(file);
        if !known {
            self.accepted.store(None);
            if wanted == Wanted::Accepted {
                return Err(replaced(&self.path).into());
            }
        }
        if !known && let Some(error) = mend::stale_journal(&self.path) {
            return Err(error.into());
        }
        let open = Open::file(&self.path)?;
        open.check_format(&self.path)?;
        open.check_writable(&self.path)?;
        let stored = StoredMeta::read(&open.sqlite)?;
        match stored.verdict(&self.keys) {
            // Its id may be what was damaged.
            Verdict::Damaged => return Err(corrupt("meta", "the store")),
            _ if stored.id != self.keys.id => {
                let detail = format!("{} is another store than before.", self.path.display());
                return Err(Error::new(ErrorKind::StoreUnavailable, detail).into());
            }
            Verdict::WrongRootKey => {
                let detail = format!("It is not that of {} as it is now.", self.path.display());
                return Err(Error::new(ErrorKind::WrongRootKey, detail).into());
            }
            Verdict::Good => {}
        }
        if !known {
            open.check_soundness()?;
        }
        let held = Held::new(open, file, &self.path);
        if !held.is_at(&self.path) {
            return Err(replaced(&self.path).into());
        }
        Ok(held)
    }

    fn transact<T>(
        &self,
        open: &mut Open,
        work: impl FnOnce(&Connection, &Self) -> Outcome<T>,
    ) -> Outcome<T> {
        let transaction = open.sqlite.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let answer = work(&transaction, self)?;
        transaction.commit()?;
        Ok(answer)
    }

    /// Erases what deleted keys left in the file, if that is owed. The deletion itself is done, so a failure is no
    /// error: it is tried again after every change of keys, aliases or clients, and when the store is opened.
    fn erase(&self, open: &mut Open) {
        if !self.erasure_owed.load(Ordering::Relaxed) {
            return;
        }
        let path = self.path.display();
        match self.try_to_erase(open) {
            Ok(true) => self.erasure_owed.store(false, Ordering::Relaxed),
            Ok(false) => log::warn!(
                "A deleted key's sealed material is not yet erased from {path}: a reader is in the \
                 way."
            ),
            Err(failure) => {
                let error = failure.explain(&self.path);
                log::warn!("A deleted key's sealed material is not yet erased: {error}");
            }
        }
    }

    fn try_to_erase(&self, open: &mut Open) -> Outcome<bool> {
        // A deletion that another process commits meanwhile stays owed: it is beyond this number.
        let deleted = Meta::read(&open.sqlite, &self.keys)?.deleted;
        if !open.erase_leftovers(&self.path)? {
            return Ok(false);
        }
        let transaction = open.sqlite.transaction_with_behavior(TransactionBehavior::Immediate)?;
        Meta::read(&transaction, &self.keys)?.note_erased(&transaction, &self.keys, deleted)?;
        transaction.commit()?;
        Ok(true)
    }
}

impl Quiesce for Inner {
    /// Closes the connection. The gate is held alone, so nobody holds the mutex.
    fn before_fork(&self) {
        if let Some(connection) = self.connection.get() {
            drop(lock(&connection).take());
        }
    }
}

impl KeyStore for SqliteStore {
    fn load(&self) -> Result<StoreImage> {
        let (image, epoch) = self.0.with_file(Wanted::AnyGood, |inner, open| {
            let transaction =
                open.sqlite.transaction_with_behavior(TransactionBehavior::Deferred)?;
            let image = load(&transaction, &inner.keys)?;
            transaction.commit()?;
            Ok(image)
        })?;
        Ok(StoreImage { epoch, ..image })
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn is_replaced(&self) -> bool {
        self.0.accepted.load().is_none()
    }

    fn epoch(&self) -> u64 {
        self.0.epoch.load(Ordering::Relaxed)
    }

    fn changes(&self) -> Result<u64> {
        self.read(|sqlite, keys| Ok(Meta::read(sqlite, keys)?.changes.cast_unsigned()))
    }

    fn create(&self, key: &NewKey) -> Result<()> {
        self.write(|sqlite, inner| {
            let keys = &inner.keys;
            let NewKey { record, version, alias } = key;
            let mut meta = Meta::read(sqlite, keys)?;
            if rows::read_key(sqlite, keys, &record.id)?.is_some() {
                return Err(rows::known(&record.id));
            }
            if let Some(alias) = alias {
                let current = rows::read_alias(sqlite, keys, alias)?;
                AliasChange::Create(record.id).check(alias, current, Some(record))?;
            }
            if record.origin == Origin::Imported {
                rows::remember_import(sqlite, keys, key)?;
                meta.fingerprints += 1;
            }
            rows::insert_key(sqlite, keys, record)?;
            rows::insert_version(sqlite, keys, record, version, &inner.rng)?;
            if let Some(alias) = alias {
                rows::write_alias(sqlite, keys, alias, &record.id)?;
                meta.aliases += 1;
            }
            meta.keys += 1;
            meta.changed(sqlite, keys)
        })
    }

    fn change(
        &self,
        key: &KeyId,
        decide: &mut dyn FnMut(&KeyRecord) -> Result<KeyChange>,
    ) -> Result<()> {
        self.write(|sqlite, inner| {
            let keys = &inner.keys;
            let mut meta = Meta::read(sqlite, keys)?;
            let record = rows::read_key(sqlite, keys, key)?
                .ok_or_else(|| Error::key_not_found(key.as_str()))?;
            match decide(&record)? {
                KeyChange::Keep => return Ok(()),
                KeyChange::Save(changed, version) => {
                    save(sqlite, inner, &record, &changed, version.as_ref())?;
                }
                KeyChange::Delete => {
                    let aliases = rows::delete_key(sqlite, key)?;
                    meta.aliases -= i64::try_from(aliases).expect("SQLite counts in i64");
                    meta.keys -= 1;
                    meta.deleted += 1;
                    inner.erasure_owed.store(true, Ordering::Relaxed);
                }
            }
            meta.changed(sqlite, keys)
        })
    }

    fn change_alias(&self, alias: &Alias, change: AliasChange) -> Result<()> {
        self.write(|sqlite, inner| {
            let keys = &inner.keys;
            let mut meta = Meta::read(sqlite, keys)?;
            let current = rows::read_alias(sqlite, keys, alias)?;
            let target = match change.target() {
                Some(key) => rows::read_key(sqlite, keys, &key)?,
                None => None,
            };
            change.check(alias, current, target.as_ref())?;
            match change.target() {
                Some(key) => rows::write_alias(sqlite, keys, alias, &key)?,
                None => rows::delete_alias(sqlite, alias)?,
            }
            meta.aliases += i64::from(change.target().is_some()) - i64::from(current.is_some());
            meta.changed(sqlite, keys)
        })
    }

    fn create_client(&self, client: &Client) -> Result<()> {
        self.write(|sqlite, inner| {
            let keys = &inner.keys;
            let mut meta = Meta::read(sqlite, keys)?;
            if client_rows::read_client(sqlite, keys, &client.client_id)?.is_some() {
                return Err(super::client_known(&client.client_id).into());
            }
            client_rows::insert_client(sqlite, keys, client)?;
            meta.clients += 1;
            meta.changed(sqlite, keys)
        })
    }

    fn change_client(
        &self,
        id: &ClientId,
        decide: &mut dyn FnMut(&Client) -> Result<ClientChange>,
    ) -> Result<()> {
        self.write(|sqlite, inner| {
            let keys = &inner.keys;
            let mut meta = Meta::read(sqlite, keys)?;
            let client = client_rows::read_client(sqlite, keys, id)?
                .ok_or_else(|| clients::not_found(id))?;
            match decide(&client)? {
                ClientChange::Keep => return Ok(()),
                ClientChange::Save(changed) => {
                    assert_eq!(changed.client_id, *id);
                    client_rows::update_client(sqlite, keys, &changed)?;
                }
                ClientChange::Delete => {
                    client_rows::delete_client(sqlite, id)?;
                    meta.clients -= 1;
                }
            }
            meta.changed(sqlite, keys)
        })
    }

    fn lease(&self, version: &KeyVersionId, request: LeaseRequest) -> Result<Grant> {
        self.count(|sqlite, inner| rows::lease(sqlite, &inner.keys, version, request))
    }

    fn give_back(&self, version: &KeyVersionId, unused: u64) -> Result<()> {
        self.count(|sqlite, inner| rows::give_back(sqlite, &inner.keys, version, unused))
    }

    fn close(&self) {
        // In a child that has not used the store, or must not, there is nothing to close.
        let Some(connection) = self.0.connection.get() else { return };
        let Ok(_gate) = Gate::enter(&self.0.path) else { return };
        if self.0.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        // A connection that a fork closed left the log beside the file; people copy the file alone.
        let held = lock(&connection).take().or_else(|| self.0.reopen(Wanted::Accepted).ok());
        // The log at the path may be that of another file: SQLite would remove it by its name.
        if let Some(held) = held.filter(|held| held.is_at(&self.0.path)) {
            held.open.close_cleanly();
        }
    }

    fn describe(&self) -> String {
        format!("SQLite file {}", self.0.path.display())
    }

    #[cfg(feature = "server")]
    fn files(&self) -> Vec<PathBuf> {
        let companions = COMPANIONS.map(|companion| with_suffix(&self.0.path, companion));
        [self.0.path.clone()].into_iter().chain(companions).collect()
    }
}

/// Writes a changed record, and its new primary version if there is one.
fn save(
    sqlite: &Connection,
    inner: &Inner,
    before: &KeyRecord,
    changed: &KeyRecord,
    version: Option<&crate::keys::VersionRecord>,
) -> Outcome<()> {
    // What versions are sealed with does not change, and versions are added one by one.
    let fixed = |record: &KeyRecord| (record.id, record.spec, record.scheme, record.origin);
    assert_eq!(fixed(before), fixed(changed));
    assert_eq!(changed.version_count, before.version_count + u32::from(version.is_some()));
    rows::update_key(sqlite, &inner.keys, changed)?;
    if let Some(version) = version {
        assert_eq!(version.ordinal, before.version_count);
        rows::insert_version(sqlite, &inner.keys, changed, version, &inner.rng)?;
    }
    Ok(())
}

fn write_new(path: &Path, keys: &StoreKeys, rng: &Rng) -> Outcome<()> {
    let mut open = Open::file(path)?;
    open.make_tables(|sqlite| Meta::default().insert(sqlite, keys, rng))?;
    open.close_cleanly();
    Ok(())
}

fn not_placed(path: &Path, error: &io::Error) -> Error {
    let path = path.display();
    if error.kind() == io::ErrorKind::AlreadyExists {
        return Error::invalid(format!("{path} exists already; a store is never overwritten."));
    }
    let detail = format!("The store {path} could not be made: {error}.");
    Error::new(ErrorKind::StoreUnavailable, detail)
}

fn tier(rng: &Rng) -> Tier {
    match rng {
        Rng::Os(tier) => *tier,
        #[cfg(any(feature = "deterministic", fuzzing, test))]
        Rng::Seeded { tier, .. } => *tier,
    }
}

fn lock(connection: &Mutex<Option<Held>>) -> MutexGuard<'_, Option<Held>> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}
