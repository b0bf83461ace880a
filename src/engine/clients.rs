//! Operations on the clients of a server. Each is one transaction of the store, seen by this engine when it returns,
//! and by every other engine on the store, such as that of a server that runs, within a second.

use std::sync::Arc;

use super::Engine;
use crate::{
    clients::{self, Client, ClientDirectory, ClientId},
    error::Result,
    keys::system_time,
    request::clients::{CreateClient, UpdateClient},
    store::ClientChange,
};

/// Operations on clients of a server.
impl Engine {
    /// Creates a client, enabled, with an id of the engine's making. Its private key stays with whoever made it.
    ///
    /// # Errors
    /// `InvalidParameter`: a name of no or too many characters or with control characters, no public key or one of
    /// more than 1024 bytes, no permission, no pattern or too many. The store then has nothing new.
    pub fn create_client(&self, request: &CreateClient) -> Result<Client> {
        self.process();
        let shared = self.shared();
        let client = Client {
            client_id: ClientId::generate(&shared.rng)?,
            name: request.name.clone(),
            creation_date: system_time(shared.now()),
            enabled: true,
            permissions: request.permissions,
            key_patterns: request.key_patterns.clone(),
            public_key: request.public_key.clone(),
        };
        client.check()?;
        shared.store.create_client(&client)?;
        // It exists now: what fails from here on is for later calls to meet.
        if let Err(error) = shared.refresh() {
            let id = client.client_id;
            log::warn!("client {id} was created, but the store cannot be read: {error}");
        }
        Ok(client)
    }

    /// Describes the client with this id.
    ///
    /// # Errors
    /// `ClientNotFound`; the store's.
    pub fn describe_client(&self, id: &ClientId) -> Result<Client> {
        self.process();
        self.shared().refresh_if_changed()?;
        let directory = self.client_directory();
        directory.get(id).map(|client| (**client).clone()).ok_or_else(|| clients::not_found(id))
    }

    /// Describes every client, oldest first.
    ///
    /// # Errors
    /// The store's.
    pub fn list_clients(&self) -> Result<Vec<Client>> {
        self.process();
        self.shared().refresh_if_changed()?;
        let directory = self.client_directory();
        let mut clients: Vec<_> = directory.iter().map(|client| (**client).clone()).collect();
        clients.sort_unstable_by_key(|client| (client.creation_date, client.client_id));
        Ok(clients)
    }

    /// Changes a client's name, permissions or key patterns.
    ///
    /// # Errors
    /// `ClientNotFound`; as [`Engine::create_client`]. The client is then as before.
    pub fn update_client(&self, id: &ClientId, update: &UpdateClient) -> Result<Client> {
        self.change_client(id, |client| {
            let UpdateClient { name, permissions, key_patterns } = update;
            if let Some(name) = name {
                client.name.clone_from(name);
            }
            if let Some(permissions) = permissions {
                client.permissions = *permissions;
            }
            if let Some(key_patterns) = key_patterns {
                client.key_patterns.clone_from(key_patterns);
            }
        })
    }

    /// Enables a disabled client.
    ///
    /// # Errors
    /// `ClientNotFound`; the store's.
    pub fn enable_client(&self, id: &ClientId) -> Result<Client> {
        self.change_client(id, |client| client.enabled = true)
    }

    /// Disables a client: a server answers none of its requests until it is enabled again.
    ///
    /// # Errors
    /// As [`Engine::enable_client`].
    pub fn disable_client(&self, id: &ClientId) -> Result<Client> {
        self.change_client(id, |client| client.enabled = false)
    }

    /// Removes a client for good. What it wrapped is unchanged.
    ///
    /// # Errors
    /// `ClientNotFound`; the store's.
    pub fn delete_client(&self, id: &ClientId) -> Result<()> {
        self.process();
        let shared = self.shared();
        shared.store.change_client(id, &mut |_| Ok(ClientChange::Delete))?;
        shared.refresh().map(drop)
    }

    /// Every client as this engine knows it: a snapshot at the cost of a pointer, at most a second behind the store.
    pub(crate) fn client_directory(&self) -> Arc<ClientDirectory> {
        // A forked child starts the thread that keeps it fresh.
        self.process();
        self.shared().clients.load_full()
    }

    fn change_client(&self, id: &ClientId, change: impl Fn(&mut Client)) -> Result<Client> {
        self.process();
        let shared = self.shared();
        let mut after = None;
        shared.store.change_client(id, &mut |client| {
            let mut changed = client.clone();
            change(&mut changed);
            changed.check()?;
            after = Some(changed.clone());
            let same = changed == *client;
            Ok(if same { ClientChange::Keep } else { ClientChange::Save(changed) })
        })?;
        shared.refresh()?;
        Ok(after.expect("the store decides once, or fails"))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{
        clients::{KeyPattern, Permissions},
        keys::access::Access,
        request::CreateKey,
        store::RootKey,
    };

    fn request(patterns: &[&str]) -> CreateClient {
        CreateClient {
            name: "n".to_owned(),
            public_key: vec![1],
            permissions: Permissions::all(),
            key_patterns: patterns.iter().map(|text| KeyPattern::parse(text).unwrap()).collect(),
        }
    }

    #[test]
    fn a_client_may_use_a_key_by_its_id_or_a_current_alias_whatever_name_led_to_it() {
        let engine = Engine::in_memory().unwrap();
        let key = |alias: Option<&str>| {
            let alias = alias.map(str::to_owned);
            engine.create_key(&CreateKey { alias, ..CreateKey::default() }).unwrap().key_id
        };
        let (named, nameless) = (key(Some("alias/app-1")), key(None));
        let permits = |patterns: &[&str], id: &str| {
            let client = engine.create_client(&request(patterns)).unwrap();
            client.permits(engine.shared().ring.load().resolve(id).unwrap())
        };
        for (patterns, on_named, on_nameless) in [
            (&["*"][..], true, true),
            (&["alias/*"], true, false),
            (&["alias/app-?"], true, false),
            (&["alias/app"], false, false),
            (&["key-*"], true, true),
            (&["nothing", named.as_str()], true, false),
            (&[nameless.as_str()], false, true),
        ] {
            assert_eq!(permits(patterns, named.as_str()), on_named, "{patterns:?}");
            assert_eq!(permits(patterns, "alias/app-1"), on_named, "{patterns:?}");
            assert_eq!(permits(patterns, nameless.as_str()), on_nameless, "{patterns:?}");
        }
        engine.update_alias("alias/app-1", nameless.as_str()).unwrap();
        assert!(!permits(&["alias/*"], named.as_str()));
        assert!(permits(&["alias/*"], nameless.as_str()));
    }

    #[test]
    fn the_directory_follows_every_change_at_once() {
        let engine = Engine::in_memory().unwrap();
        let client = engine.create_client(&request(&["*"])).unwrap();
        let id = &client.client_id;
        let before = engine.client_directory();
        assert_eq!(**before.active(id).unwrap(), client);
        engine.disable_client(id).unwrap();
        assert!(engine.client_directory().active(id).is_none());
        assert!(engine.client_directory().get(id).is_some());
        engine.enable_client(id).unwrap();
        assert!(engine.client_directory().active(id).is_some());
        engine.delete_client(id).unwrap();
        assert!(engine.client_directory().get(id).is_none());
        assert!(before.active(id).is_some(), "a snapshot stays what it is");
    }

    /// As a server sees what a command line does: nothing asks the store but the watcher.
    #[test]
    fn the_directory_follows_another_engine_within_a_second() {
        let home = tempfile::tempdir().unwrap();
        let store = home.path().join("keys.db");
        let root = RootKey::from_bytes(&[9; 32]).unwrap();
        let server = Engine::create(&store, &root).unwrap();
        let admin = Engine::open(&store, &root).unwrap();
        let id = admin.create_client(&request(&["*"])).unwrap().client_id;
        let followed = |what: &str, seen: &dyn Fn(&ClientDirectory) -> bool| {
            let start = Instant::now();
            while !seen(&server.client_directory()) {
                assert!(start.elapsed() < Duration::from_secs(1), "{what} is not seen");
                thread::sleep(Duration::from_millis(5));
            }
        };
        followed("create", &|directory| directory.active(&id).is_some());
        admin.disable_client(&id).unwrap();
        followed("disable", &|directory| directory.active(&id).is_none());
        let update = UpdateClient { name: Some("x".to_owned()), ..UpdateClient::default() };
        admin.update_client(&id, &update).unwrap();
        followed("update", &|directory| {
            directory.get(&id).is_some_and(|client| client.name == "x")
        });
        admin.delete_client(&id).unwrap();
        followed("delete", &|directory| directory.get(&id).is_none());
    }
}
