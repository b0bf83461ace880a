//! Goal: clients of a server live and change as their operations say, in memory and in a file, for every engine on a
//! store.
//!
//! Method: the public API alone; two engines on one file stand for a server and a command line.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use keymill::{
    ClientId, CreateClient, CreateKey, Engine, Error, ErrorKind, Fault, KeyPattern, Permission,
    Permissions, Result, RootKey, UpdateClient, limits,
};

fn root_key() -> RootKey {
    RootKey::from_bytes(&[9; 32]).unwrap()
}

fn patterns(texts: &[&str]) -> Vec<KeyPattern> {
    texts.iter().map(|text| KeyPattern::parse(text).unwrap()).collect()
}

fn request(name: &str) -> CreateClient {
    CreateClient {
        name: name.to_owned(),
        public_key: vec![7; 294],
        permissions: Permissions::parse("generate,decrypt").unwrap(),
        key_patterns: patterns(&["alias/app*"]),
    }
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().as_ref().map(Error::kind).expect("this had to fail")
}

#[test]
fn the_life_of_a_client() {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("keys.db");
    for engine in [Engine::in_memory().unwrap(), Engine::create(&store, &root_key()).unwrap()] {
        assert_eq!(engine.list_clients().unwrap(), []);
        let made = engine.create_client(&request("backup")).unwrap();
        let id = &made.client_id;
        assert_eq!(ClientId::parse(id.as_str()), Some(*id));
        assert_eq!((made.name.as_str(), made.enabled), ("backup", true));
        assert_eq!(made.public_key, [7; 294]);
        assert!(made.permissions.contains(Permission::Decrypt));
        assert!(!made.permissions.contains(Permission::Random));
        assert!(made.creation_date.elapsed().unwrap() < Duration::from_secs(60));
        assert_eq!(engine.describe_client(id).unwrap(), made);

        let twin = engine.create_client(&request("backup")).unwrap();
        assert_ne!(twin.client_id, *id);
        assert_eq!(engine.list_clients().unwrap().len(), 2);

        let update = UpdateClient {
            name: Some("restore".to_owned()),
            permissions: Some(Permissions::all()),
            key_patterns: Some(patterns(&["*", "key-?"])),
        };
        let changed = engine.update_client(id, &update).unwrap();
        assert_eq!(changed.name, "restore");
        assert_eq!(changed.permissions, Permissions::all());
        assert_eq!(changed.key_patterns, patterns(&["*", "key-?"]));
        assert_eq!(engine.update_client(id, &UpdateClient::default()).unwrap(), changed);
        assert_eq!(engine.describe_client(&twin.client_id).unwrap(), twin);

        let disabled = engine.disable_client(id).unwrap();
        assert_eq!(disabled, engine.disable_client(id).unwrap());
        assert!(!disabled.enabled && engine.list_clients().unwrap().contains(&disabled));
        assert_eq!(engine.enable_client(id).unwrap(), changed);

        engine.delete_client(id).unwrap();
        assert_eq!(engine.list_clients().unwrap(), [twin]);
        for refused in [
            kind(engine.describe_client(id)),
            kind(engine.update_client(id, &update)),
            kind(engine.enable_client(id)),
            kind(engine.disable_client(id)),
            kind(engine.delete_client(id)),
        ] {
            assert_eq!(refused, ErrorKind::ClientNotFound);
        }
        let error = engine.delete_client(id).unwrap_err();
        assert_eq!((error.code(), error.http_status()), ("Unauthorized", 404));
        assert_eq!(error.fault(), Fault::Caller);
        assert!(error.message().contains(id.as_str()), "{error}");
    }
    let engine = Engine::open(&store, &root_key()).unwrap();
    assert_eq!(engine.list_clients().unwrap().len(), 1, "it lasts");
}

#[test]
fn a_refused_client_leaves_nothing_behind() {
    let engine = Engine::in_memory().unwrap();
    let stays = engine.create_client(&request("stays")).unwrap();
    let many = limits::CLIENT_KEY_PATTERNS_MAX + 1;
    let bad: [&dyn Fn(&mut CreateClient); 8] = [
        &|request| request.name.clear(),
        &|request| request.name = "x".repeat(limits::CLIENT_NAME_CHARS_MAX + 1),
        &|request| request.name = "a\u{7}".to_owned(),
        &|request| request.public_key.clear(),
        &|request| request.public_key = vec![0; limits::CLIENT_PUBLIC_KEY_LEN_MAX + 1],
        &|request| request.permissions = Permissions::default(),
        &|request| request.key_patterns.clear(),
        &|request| request.key_patterns = vec![KeyPattern::parse("*").unwrap(); many],
    ];
    for (index, spoil) in bad.into_iter().enumerate() {
        let mut request = request("bad");
        spoil(&mut request);
        assert_eq!(kind(engine.create_client(&request)), ErrorKind::InvalidParameter, "{index}");
        let update = UpdateClient {
            name: Some(request.name),
            permissions: Some(request.permissions),
            key_patterns: Some(request.key_patterns),
        };
        let updated = engine.update_client(&stays.client_id, &update);
        // The public key never changes.
        let spoilt_key = (3..=4).contains(&index);
        assert_eq!(updated.is_ok(), spoilt_key, "{index}");
        if spoilt_key {
            let name = UpdateClient { name: Some("stays".to_owned()), ..UpdateClient::default() };
            engine.update_client(&stays.client_id, &name).unwrap();
        }
    }
    assert_eq!(engine.list_clients().unwrap(), [stays]);
}

#[test]
fn clients_are_listed_oldest_first() {
    let now = Arc::new(AtomicU64::new(2_000));
    let clock = Arc::clone(&now);
    let read = move || {
        let seconds = clock.load(Ordering::Relaxed);
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    };
    let engine = Engine::builder().clock(read).in_memory().unwrap();
    for (time, name) in [(2_000, "b"), (3_000, "c"), (1_000, "a")] {
        now.store(time, Ordering::Relaxed);
        engine.create_client(&request(name)).unwrap();
    }
    let names: Vec<_> = engine.list_clients().unwrap().into_iter().map(|c| c.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
}

/// What is asked for by id or listed is as the store has it at that moment. (What a server knows without asking follows
/// within a second; that is tested beside the engine.)
#[test]
fn two_engines_on_one_store_change_one_client() {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("keys.db");
    let server = Engine::create(&store, &root_key()).unwrap();
    let admin = Engine::open(&store, &root_key()).unwrap();
    let made = admin.create_client(&request("backup")).unwrap();
    let id = made.client_id;
    assert_eq!(server.describe_client(&id).unwrap(), made);
    admin.disable_client(&id).unwrap();
    assert!(!server.describe_client(&id).unwrap().enabled);
    // Either side changes it, and nothing of the other's is lost.
    let update = UpdateClient { name: Some("x".to_owned()), ..UpdateClient::default() };
    server.update_client(&id, &update).unwrap();
    let both = admin.enable_client(&id).unwrap();
    assert_eq!((both.name.as_str(), both.enabled), ("x", true));
    admin
        .create_key(&CreateKey { alias: Some("alias/app".into()), ..CreateKey::default() })
        .unwrap();
    assert_eq!(server.list_clients().unwrap(), [both]);
    assert_eq!(server.list_keys().unwrap().len(), 1);
    admin.delete_client(&id).unwrap();
    assert_eq!(kind(server.describe_client(&id)), ErrorKind::ClientNotFound);
    assert_eq!(server.list_clients().unwrap(), []);
}
