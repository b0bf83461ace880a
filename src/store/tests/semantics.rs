//! One battery for both stores, and what is particular to a file: it is still there the next time.

use super::helpers::*;
use crate::{
    clients::{Client, ClientId, KeyPattern, Permissions},
    error::{Error, ErrorKind},
    keys::{
        Alias, KeyId, KeySpec, KeyState, Origin, RotationPeriod, alias::AliasChange, system_time,
    },
    limits::WRAPS_PER_VERSION_MAX,
    secret::Material,
    store::{
        ClientChange, Grant, KeyChange, KeyStore, LeaseRequest, MemoryStore, RootKey, SqliteStore,
    },
};

fn battery(store: &dyn KeyStore) {
    assert!(store.load().unwrap().keys.is_empty());
    keys_and_aliases(store);
    changes_of_a_key(store);
    budgets(store);
    imports(store);
    clients(store);
    counter(store);
}

fn keys_and_aliases(store: &dyn KeyStore) {
    let (a, b) = (Alias::parse("alias/a").unwrap(), Alias::parse("alias/b").unwrap());
    let absent = KeyId::generate(&rng()).unwrap();
    let one = new_key(KeySpec::Aes192, Origin::Generated, Some("alias/a"));
    let two = new_key(KeySpec::Aes256, Origin::Generated, None);
    store.create(&one).unwrap();
    store.create(&two).unwrap();
    let before = contents(store);
    assert_eq!(before.len(), 2);

    let mut again = new_key(KeySpec::Aes128, Origin::Imported, Some("alias/a"));
    assert_eq!(kind(store.create(&again)), ErrorKind::AliasAlreadyExists);
    let change = |alias, change| store.change_alias(alias, change);
    assert_eq!(kind(change(&a, AliasChange::Create(two.record.id))), ErrorKind::AliasAlreadyExists);
    assert_eq!(kind(change(&b, AliasChange::Update(two.record.id))), ErrorKind::AliasNotFound);
    assert_eq!(kind(change(&b, AliasChange::Delete)), ErrorKind::AliasNotFound);
    assert_eq!(kind(change(&b, AliasChange::Create(absent))), ErrorKind::KeyNotFound);
    assert_eq!(contents(store), before, "a refused call changes nothing");
    // Its material was not remembered by the refused call.
    again.alias = None;
    store.create(&again).unwrap();

    change(&b, AliasChange::Create(two.record.id)).unwrap();
    change(&a, AliasChange::Update(two.record.id)).unwrap();
    let image = store.load().unwrap();
    let found = image.keys.iter().find(|key| key.record.id == two.record.id).unwrap();
    assert_eq!(found.aliases, [a.clone(), b.clone()]);
    assert_eq!((&found.record, found.versions.len()), (&two.record, 1));
    assert_eq!(found.versions[0].id, two.version.id);
    assert_eq!(found.versions[0].material.expose(), two.version.material.expose());
    change(&b, AliasChange::Delete).unwrap();
    let image = store.load().unwrap();
    let order: Vec<_> = image.keys.iter().map(|key| (key.record.created, key.record.id)).collect();
    assert!(order.is_sorted());
    let aliases: Vec<_> = image.keys.into_iter().flat_map(|key| key.aliases).collect();
    assert_eq!(aliases, [a]);
}

fn changes_of_a_key(store: &dyn KeyStore) {
    let key = direct();
    let id = key.record.id;
    store.create(&key).unwrap();
    let absent = KeyId::generate(&rng()).unwrap();
    assert_eq!(kind(store.change(&absent, &mut |_| unreachable!())), ErrorKind::KeyNotFound);

    let before = contents(store);
    store.change(&id, &mut |_| Ok(KeyChange::Keep)).unwrap();
    let refuse = &mut |_: &_| Err(Error::plain(ErrorKind::Disabled));
    assert_eq!(kind(store.change(&id, refuse)), ErrorKind::Disabled);
    assert_eq!(contents(store), before);

    let version = new_version(&id, 1, 32);
    let (version_id, mut version) = (version.id, Some(version));
    store
        .change(&id, &mut |record| {
            assert_eq!(*record, key.record);
            let mut record = record.clone();
            record.state = KeyState::PendingDeletion { due: u64::MAX };
            record.rotation = Some(RotationPeriod::parse("9d").unwrap());
            record.last_rotation = 77;
            record.version_count = 2;
            record.description = "other".to_owned();
            Ok(KeyChange::Save(record, version.take()))
        })
        .unwrap();
    let find = || store.load().unwrap().keys.into_iter().find(|key| key.record.id == id);
    let found = find().unwrap();
    assert_eq!(found.record.state, KeyState::PendingDeletion { due: u64::MAX });
    assert_eq!(found.record.rotation.unwrap().to_string(), "9d");
    assert_eq!((found.record.last_rotation, found.record.version_count), (77, 2));
    assert_eq!(found.record.description, "other");
    assert_eq!(found.versions.iter().map(|v| v.ordinal).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(found.versions[1].id, version_id);

    let alias = Alias::parse("alias/late").unwrap();
    let create = AliasChange::Create(id);
    assert_eq!(kind(store.change_alias(&alias, create)), ErrorKind::StateModifiedFailed);
    store
        .change(&id, &mut |record| {
            let mut record = record.clone();
            record.cancel_deletion()?;
            Ok(KeyChange::Save(record, None))
        })
        .unwrap();
    store.change_alias(&alias, create).unwrap();
    store.change(&id, &mut |_| Ok(KeyChange::Delete)).unwrap();
    assert!(find().is_none());
    assert_eq!(kind(store.change_alias(&alias, AliasChange::Delete)), ErrorKind::AliasNotFound);
    let request = LeaseRequest { need: 1, surplus: 0 };
    assert_eq!(kind(store.lease(&version_id, request)), ErrorKind::KeyNotFound);
    assert_eq!(kind(store.give_back(&version_id, 1)), ErrorKind::KeyNotFound);
    assert_eq!(kind(store.change(&id, &mut |_| Ok(KeyChange::Keep))), ErrorKind::KeyNotFound);
}

fn budgets(store: &dyn KeyStore) {
    let key = direct();
    let id = key.version.id;
    store.create(&key).unwrap();
    let lease = |need, surplus| store.lease(&id, LeaseRequest { need, surplus }).unwrap();
    assert_eq!(lease(3, 4), Grant { wraps: 7, spent: 7 });
    assert_eq!(lease(0, 0), Grant { wraps: 0, spent: 7 });
    store.give_back(&id, 2).unwrap();
    assert_eq!(lease(1, 0), Grant { wraps: 1, spent: 6 });
    store.give_back(&id, u64::MAX).unwrap();
    assert_eq!(lease(1, 0), Grant { wraps: 1, spent: 1 });

    let mut key = direct();
    let id = key.version.id;
    key.version.spent = WRAPS_PER_VERSION_MAX - 3;
    store.create(&key).unwrap();
    let lease = |need, surplus| store.lease(&id, LeaseRequest { need, surplus }).unwrap();
    assert_eq!(lease(1, 0), Grant { wraps: 1, spent: WRAPS_PER_VERSION_MAX - 2 });
    assert_eq!(lease(8, u64::MAX), Grant { wraps: 2, spent: WRAPS_PER_VERSION_MAX });
    assert_eq!(lease(1, 1), Grant { wraps: 0, spent: WRAPS_PER_VERSION_MAX });
    let image = store.load().unwrap();
    let key = image.keys.iter().find(|key| key.record.id == id.key_id()).unwrap();
    assert_eq!(key.versions[0].spent, WRAPS_PER_VERSION_MAX);
}

fn imports(store: &dyn KeyStore) {
    let first = new_key(KeySpec::Aes256, Origin::Imported, None);
    store.create(&first).unwrap();
    let twin = || {
        let mut twin = new_key(KeySpec::Aes256, Origin::Imported, None);
        twin.version.material = Material::new(first.version.material.expose()).unwrap();
        twin
    };
    let before = contents(store);
    assert_eq!(kind(store.create(&twin())), ErrorKind::InvalidKeyMaterial);
    assert_eq!(contents(store), before);
    store.change(&first.record.id, &mut |_| Ok(KeyChange::Delete)).unwrap();
    assert_eq!(kind(store.create(&twin())), ErrorKind::InvalidKeyMaterial, "kept after deletion");
}

fn clients(store: &dyn KeyStore) {
    assert!(store.load().unwrap().clients.is_empty());
    let (mut one, mut two) = (new_client("one"), new_client("zwei é"));
    (one.creation_date, two.creation_date) = (system_time(2_000), system_time(1_000));
    store.create_client(&one).unwrap();
    store.create_client(&two).unwrap();
    assert_eq!(store.load().unwrap().clients, [two.clone(), one.clone()]);
    let before = contents(store);
    let absent = ClientId::generate(&rng()).unwrap();
    let change = |id: &ClientId, change: ClientChange| {
        let mut change = Some(change);
        store.change_client(id, &mut |_| Ok(change.take().unwrap()))
    };
    assert_eq!(kind(store.create_client(&one)), ErrorKind::InvalidParameter);
    assert_eq!(
        kind(store.change_client(&absent, &mut |_| unreachable!())),
        ErrorKind::ClientNotFound
    );
    let refuse = &mut |_: &_| Err(Error::plain(ErrorKind::Disabled));
    assert_eq!(kind(store.change_client(&one.client_id, refuse)), ErrorKind::Disabled);
    change(&one.client_id, ClientChange::Keep).unwrap();
    assert_eq!(contents(store), before, "a refused call changes nothing");

    let mut changed = one.clone();
    changed.name = "other".to_owned();
    changed.enabled = false;
    changed.permissions = Permissions::all();
    changed.key_patterns = vec![KeyPattern::parse("*").unwrap()];
    store
        .change_client(&one.client_id, &mut |client| {
            assert_eq!(*client, one);
            Ok(ClientChange::Save(changed.clone()))
        })
        .unwrap();
    assert_eq!(store.load().unwrap().clients, [two.clone(), changed]);
    change(&two.client_id, ClientChange::Delete).unwrap();
    assert_eq!(kind(change(&two.client_id, ClientChange::Keep)), ErrorKind::ClientNotFound);
    store.create_client(&two).unwrap();
    assert_eq!(store.load().unwrap().clients.len(), 2);
}

fn counter(store: &dyn KeyStore) {
    let key = direct();
    let (id, version) = (key.record.id, key.version.id);
    let alias = Alias::parse("alias/counted").unwrap();
    let mut last = store.changes().unwrap();
    let mut moved = |what: &str, moves: bool| {
        let now = store.changes().unwrap();
        assert_eq!(now != last, moves, "{what}");
        assert_eq!(store.load().unwrap().changes, now);
        last = now;
    };
    store.create(&key).unwrap();
    moved("create", true);
    lease(store, &version, 5);
    moved("lease", false);
    store.give_back(&version, 2).unwrap();
    moved("give_back", false);
    store.change(&id, &mut |_| Ok(KeyChange::Keep)).unwrap();
    moved("keep", false);
    let _ = store.change(&id, &mut |_| Err(Error::plain(ErrorKind::Disabled)));
    moved("refused", false);
    let disable = &mut |record: &crate::keys::KeyRecord| {
        let mut record = record.clone();
        record.disable()?;
        Ok(KeyChange::Save(record, None))
    };
    store.change(&id, disable).unwrap();
    moved("save", true);
    store.change_alias(&alias, AliasChange::Create(id)).unwrap();
    moved("alias create", true);
    store.change_alias(&alias, AliasChange::Update(id)).unwrap();
    moved("alias update", true);
    store.change_alias(&alias, AliasChange::Delete).unwrap();
    moved("alias delete", true);
    store.change(&id, &mut |_| Ok(KeyChange::Delete)).unwrap();
    moved("delete", true);
    let client = new_client("counted");
    let change = |change: fn(&Client) -> ClientChange| {
        store.change_client(&client.client_id, &mut |client| Ok(change(client))).unwrap();
    };
    store.create_client(&client).unwrap();
    moved("client create", true);
    let _ = store.create_client(&client);
    moved("client refused", false);
    change(|_| ClientChange::Keep);
    moved("client keep", false);
    change(|client| ClientChange::Save(client.clone()));
    moved("client save", true);
    change(|_| ClientChange::Delete);
    moved("client delete", true);
}

#[test]
fn a_store_in_memory_keeps_the_rules() {
    battery(&MemoryStore::new());
}

#[test]
fn a_store_in_a_file_keeps_the_rules_and_its_contents() {
    let (scratch, store) = Scratch::new();
    battery(&store);
    let (before, changes) = (contents(&store), store.changes().unwrap());
    assert!(before.len() >= 4);
    drop(store);
    assert_eq!(std::fs::read_dir(scratch.home.path()).unwrap().count(), 1, "closed: one file");
    let store = scratch.open().unwrap();
    assert_eq!((contents(&store), store.changes().unwrap()), (before, changes));
    assert!(store.describe().contains("keys.db"));
}

#[test]
fn a_panic_in_a_decision_undoes_it_and_the_store_goes_on() {
    let (_scratch, store) = Scratch::new();
    let key = direct();
    store.create(&key).unwrap();
    let before = contents(&store);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        store.change(&key.record.id, &mut |_| panic!("as planned"))
    }));
    assert!(panicked.is_err());
    assert_eq!(contents(&store), before);
    lease(&store, &key.version.id, 1);
}

/// The intervals of wraps that threads were granted through several stores on one file never overlap.
#[test]
fn two_stores_on_one_file_never_grant_the_same_wraps() {
    let (scratch, first) = Scratch::new();
    let second = scratch.open().unwrap();
    let key = direct();
    first.create(&key).unwrap();
    let grants_of = |store: &SqliteStore| {
        (0..40).map(|need| lease(store, &key.version.id, 1 + need % 3)).collect::<Vec<_>>()
    };
    let mut grants: Vec<Grant> = std::thread::scope(|scope| {
        let threads: Vec<_> = [&first, &second, &first, &second]
            .map(|store| scope.spawn(move || grants_of(store)))
            .into_iter()
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    grants.sort_by_key(|grant| grant.spent);
    let mut spent = 0;
    for grant in &grants {
        spent += grant.wraps;
        assert_eq!(grant.spent, spent, "no gap, no overlap");
    }
    assert_eq!(lease(&second, &key.version.id, 0).spent, spent);
    first.create(&new_key(KeySpec::Aes128, Origin::Generated, Some("alias/x"))).unwrap();
    assert_eq!(contents(&first), contents(&second));
    assert_eq!(first.changes().unwrap(), second.changes().unwrap());
    drop(first);
    lease(&second, &key.version.id, 1);
}

#[test]
fn sealed_material_of_deleted_keys_is_nowhere_in_the_files() {
    let (scratch, store) = Scratch::new();
    let keys: Vec<_> = (0..120).map(|_| direct()).collect();
    for key in &keys {
        store.create(key).unwrap();
    }
    let raw = scratch.raw();
    let sealed = |key: &crate::store::NewKey| -> Vec<u8> {
        let id = key.version.id.as_str();
        raw.query_row("SELECT sealed FROM versions WHERE id = ?1", [id], |row| row.get(0)).unwrap()
    };
    let files = || {
        let log = super::super::place::with_suffix(&scratch.path, "-wal");
        [bytes_of(&scratch.path), bytes_of(&log)].concat()
    };
    let found = |bytes: &[u8], sealed: &[u8]| {
        // Any third of the record counts: a stale copy may be cut.
        sealed.chunks(24).any(|part| bytes.windows(part.len()).any(|window| window == part))
    };
    let last = sealed(&keys[119]);
    assert!(found(&files(), &last), "the search works");
    // A different neighbour stays each time: pages become sparse, and SQLite merges them.
    for at in (0..120).map(|step| step * 77 % 120).filter(|at| at % 12 != 5) {
        let (key, sealed) = (&keys[at], sealed(&keys[at]));
        store.change(&key.record.id, &mut |_| Ok(KeyChange::Delete)).unwrap();
        assert!(!found(&files(), &sealed));
    }
    assert_eq!(store.load().unwrap().keys.len(), 10);
}

/// `secure_delete` does not reach every stale copy of a row, so the file is rewritten. Here the stale copies are left
/// by a connection without `secure_delete`.
#[test]
fn stale_copies_in_unused_parts_of_pages_are_erased() {
    let (scratch, store) = Scratch::new();
    let keys: Vec<_> = (0..30).map(|_| direct()).collect();
    for key in &keys {
        store.create(key).unwrap();
    }
    let raw = scratch.raw();
    let mut query = raw.prepare("SELECT sealed FROM versions").unwrap();
    let sealed: Vec<Vec<u8>> =
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    drop(query);
    let stale = || {
        let bytes = bytes_of(&scratch.path);
        let is_there = |sealed: &&Vec<u8>| bytes.windows(48).any(|window| window == &sealed[24..]);
        sealed.iter().filter(is_there).count()
    };
    raw.execute_batch(
        "PRAGMA secure_delete = OFF; \
         UPDATE versions SET sealed = zeroblob(1); PRAGMA wal_checkpoint(TRUNCATE)",
    )
    .unwrap();
    assert!(stale() > 0);
    store.change(&keys[0].record.id, &mut |_| Ok(KeyChange::Delete)).unwrap();
    assert_eq!(stale(), 0);
}

#[test]
fn an_erasure_that_a_crash_prevented_is_made_good() {
    let (scratch, store) = Scratch::new();
    let key = direct();
    store.create(&key).unwrap();
    let raw = scratch.raw();
    raw.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let sealed: Vec<u8> = raw.query_row("SELECT sealed FROM versions", [], |r| r.get(0)).unwrap();
    // As a crash between the two leaves it.
    store.delete_without_erasing(&key.record.id);
    assert_eq!(owed(&raw), 1);
    let before = bytes_of(&scratch.path);
    assert!(before.windows(sealed.len()).any(|window| window == sealed));
    let again = scratch.open().unwrap();
    assert_eq!(owed(&raw), 0);
    let after = bytes_of(&scratch.path);
    assert!(!after.windows(sealed.len()).any(|window| window == sealed));
    assert!(again.load().unwrap().keys.is_empty());
}

/// Data keys wait for a lease, and an erasure for readers of other programs.
#[test]
fn a_lease_pays_no_erasure_and_the_next_change_does() {
    let (scratch, store) = Scratch::new();
    let (gone, stays) = (direct(), direct());
    store.create(&gone).unwrap();
    store.create(&stays).unwrap();
    store.delete_without_erasing(&gone.record.id);
    let raw = scratch.raw();
    store.lease(&stays.version.id, LeaseRequest { need: 1, surplus: 4 }).unwrap();
    store.give_back(&stays.version.id, 4).unwrap();
    assert_eq!(owed(&raw), 1);
    store.create(&direct()).unwrap();
    assert_eq!(owed(&raw), 0);
}

fn owed(raw: &rusqlite::Connection) -> i64 {
    raw.query_row("SELECT deleted - erased FROM meta", [], |row| row.get(0)).unwrap()
}

#[test]
fn a_wrong_root_key_is_told_and_touches_nothing() {
    let (scratch, store) = Scratch::new();
    drop(store);
    let wrong = RootKey::from_bytes(&[1; 32]).unwrap();
    for round in 0..2 {
        let before = bytes_of(&scratch.path);
        let error = SqliteStore::open(&scratch.path, &wrong, tier()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::WrongRootKey);
        assert!(error.message().contains("keys.db"), "{error}");
        assert_eq!(bytes_of(&scratch.path), before);
        let store = scratch.open().unwrap();
        if round == 0 {
            store.create(&direct()).unwrap();
        }
    }
}
