//! What a server client is: id, public key, permissions, and the keys that it may use.
//!
//! Facts and pure rules alone. The store keeps clients, the engine changes them, the server asks [`ClientDirectory`]
//! who signed a request. The private key is made by whoever creates the client, and is never seen here; what a public
//! key means is the business of whoever checks signatures with it.

use std::{collections::HashMap, fmt, sync::Arc, time::SystemTime};

use foldhash::fast::RandomState;
use uuid::{Builder, Uuid};
use wildmatch::WildMatch;

use crate::{
    error::{Error, ErrorKind, Result, Shortened},
    keys::{access::Access, ring::Key},
    limits::{
        CLIENT_ID_LEN, CLIENT_KEY_PATTERNS_MAX, CLIENT_NAME_CHARS_MAX, CLIENT_PUBLIC_KEY_LEN_MAX,
        KEY_PATTERN_LEN_MAX,
    },
    rng::Rng,
};

const PREFIX: &str = "KAAP.";

/// The id of a client, with which it signs its requests: `KAAP.` and a lower-case UUID. A public value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId([u8; CLIENT_ID_LEN]);

impl ClientId {
    /// Makes a new id.
    pub(crate) fn generate(rng: &Rng) -> Result<Self> {
        let mut random = [0; 16];
        rng.fill(&mut random)?;
        let mut id = [0; CLIENT_ID_LEN];
        let (prefix, uuid) = id.split_at_mut(PREFIX.len());
        prefix.copy_from_slice(PREFIX.as_bytes());
        Builder::from_random_bytes(random).into_uuid().hyphenated().encode_lower(uuid);
        Ok(Self(id))
    }

    /// Reads an id. `None` if `text` has not the form of one.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; CLIENT_ID_LEN] = text.as_bytes().try_into().ok()?;
        let uuid = text.strip_prefix(PREFIX)?;
        // The length leaves no form but the hyphenated one. One client has one id, so there is one way to write it.
        let lower = !uuid.bytes().any(|byte| byte.is_ascii_uppercase());
        (lower && Uuid::try_parse(uuid).is_ok()).then_some(Self(bytes))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("ids are ASCII")
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl AsRef<str> for ClientId {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

/// What a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permission {
    /// Data keys, with and without their plaintext.
    Generate,
    /// Decryption, of data keys and of whatever `Encrypt` made.
    Decrypt,
    /// Encryption of the client's own bytes.
    Encrypt,
    /// Random bytes, which need no key.
    Random,
}

impl Permission {
    /// Every permission, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Generate, Self::Decrypt, Self::Encrypt, Self::Random];

    /// `generate`, `decrypt`, `encrypt` or `random`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Decrypt => "decrypt",
            Self::Encrypt => "encrypt",
            Self::Random => "random",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A set of permissions. `Display` writes the names with commas between them.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// Reads names with commas between them; `all` stands for every permission.
    ///
    /// # Errors
    /// `InvalidParameter` for any other name, and if there is none.
    pub fn parse(text: &str) -> Result<Self> {
        let mut permissions = Self::default();
        for name in text.split(',').map(str::trim) {
            if name == "all" {
                permissions.extend(Permission::ALL);
                continue;
            }
            let known = Permission::ALL.into_iter().find(|permission| permission.as_str() == name);
            permissions.extend([known.ok_or_else(|| {
                Error::invalid(format!(
                    "Permission {:?} is none of generate, decrypt, encrypt, random, all.",
                    Shortened(name)
                ))
            })?]);
        }
        Ok(permissions)
    }

    /// Every permission.
    pub fn all() -> Self {
        Permission::ALL.into_iter().collect()
    }

    /// Whether `permission` is in the set.
    pub fn contains(self, permission: Permission) -> bool {
        self.0 & permission.bit() != 0
    }

    /// Whether the set is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The permissions of the set, in the order of [`Permission::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.into_iter().filter(move |permission| self.contains(*permission))
    }
}

impl Extend<Permission> for Permissions {
    fn extend<I: IntoIterator<Item = Permission>>(&mut self, permissions: I) {
        for permission in permissions {
            self.0 |= permission.bit();
        }
    }
}

impl FromIterator<Permission> for Permissions {
    fn from_iter<I: IntoIterator<Item = Permission>>(permissions: I) -> Self {
        let mut set = Self::default();
        set.extend(permissions);
        set
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, permission) in self.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{permission}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A glob of key ids and aliases: `*` stands for any characters, `?` for one. Nothing escapes the two, which no id and
/// no alias holds.
#[derive(Clone)]
pub struct KeyPattern {
    text: Box<str>,
    glob: WildMatch,
}

impl KeyPattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// `InvalidParameter` unless it has 1 to 255 printable ASCII characters and no space.
    pub fn parse(text: &str) -> Result<Self> {
        let refused =
            |why: &str| Err(Error::invalid(format!("Key pattern {:?} {why}.", Shortened(text))));
        if text.is_empty() {
            return refused("is empty; \"*\" stands for every key");
        }
        if text.len() > KEY_PATTERN_LEN_MAX {
            return refused("is longer than 255 characters");
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return refused("may hold printable ASCII characters without spaces only");
        }
        Ok(Self { text: text.into(), glob: WildMatch::new(text) })
    }

    /// The pattern as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the whole of `name`, a key id or an alias, fits the pattern.
    pub fn matches(&self, name: &str) -> bool {
        self.glob.matches(name)
    }
}

impl PartialEq for KeyPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for KeyPattern {}

impl fmt::Display for KeyPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl fmt::Debug for KeyPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.text, f)
    }
}

/// A client of the server, as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Client {
    /// The id that it signs with.
    pub client_id: ClientId,
    /// What people call it; names need not differ.
    pub name: String,
    /// When it was created, to the second.
    pub creation_date: SystemTime,
    /// Whether its requests are answered.
    pub enabled: bool,
    /// What it may ask for.
    pub permissions: Permissions,
    /// The keys that it may use: those of which the id or a current alias fits one of these.
    pub key_patterns: Vec<KeyPattern>,
    /// The key that its signatures are checked with: the DER of a `SubjectPublicKeyInfo` (RFC 5280 section 4.1).
    pub public_key: Vec<u8>,
}

impl Client {
    /// Checks what was asked for, before it is stored.
    ///
    /// # Errors
    /// `InvalidParameter`.
    pub(crate) fn check(&self) -> Result<()> {
        let chars = self.name.chars().count();
        if !(1..=CLIENT_NAME_CHARS_MAX).contains(&chars) {
            return Err(Error::invalid(format!(
                "Name has {chars} characters; 1 to {CLIENT_NAME_CHARS_MAX} are allowed."
            )));
        }
        if self.name.chars().any(char::is_control) {
            return Err(Error::invalid(format!("Name {:?} has control characters.", self.name)));
        }
        let bytes = self.public_key.len();
        if !(1..=CLIENT_PUBLIC_KEY_LEN_MAX).contains(&bytes) {
            return Err(Error::invalid(format!(
                "The public key has {bytes} bytes; 1 to {CLIENT_PUBLIC_KEY_LEN_MAX} are allowed."
            )));
        }
        if self.permissions.is_empty() {
            return Err(Error::invalid("A client without a permission is of no use."));
        }
        let patterns = self.key_patterns.len();
        if !(1..=CLIENT_KEY_PATTERNS_MAX).contains(&patterns) {
            return Err(Error::invalid(format!(
                "{patterns} key patterns were given; 1 to {CLIENT_KEY_PATTERNS_MAX} are allowed."
            )));
        }
        Ok(())
    }
}

/// A client may use the keys that its patterns name, whatever name a request used.
impl Access for Client {
    fn permits(&self, key: &Key) -> bool {
        self.key_patterns.iter().any(|pattern| {
            pattern.matches(key.record.id.as_str())
                || key.aliases.iter().any(|alias| pattern.matches(alias.as_str()))
        })
    }

    fn is_unlimited(&self) -> bool {
        self.key_patterns.iter().any(|pattern| pattern.as_str() == "*")
    }
}

/// The error of an unknown client.
pub(crate) fn not_found(id: &ClientId) -> Error {
    Error::new(ErrorKind::ClientNotFound, format!("No client has the id {id}."))
}

/// Every client, as of one moment.
#[derive(Default)]
pub(crate) struct ClientDirectory {
    clients: HashMap<ClientId, Arc<Client>, RandomState>,
}

impl ClientDirectory {
    pub(crate) fn new(clients: Vec<Client>) -> Self {
        let clients = clients.into_iter();
        Self { clients: clients.map(|client| (client.client_id, Arc::new(client))).collect() }
    }

    /// The client with this id, disabled ones included.
    pub(crate) fn get(&self, id: &ClientId) -> Option<&Arc<Client>> {
        self.clients.get(id)
    }

    /// The client that signs with this id, if its requests are to be answered.
    #[cfg(any(feature = "server", test))]
    pub(crate) fn active(&self, id: &ClientId) -> Option<&Arc<Client>> {
        self.get(id).filter(|client| client.enabled)
    }

    /// Every client, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Client>> {
        self.clients.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Tier;

    #[test]
    fn an_id_has_one_form() {
        let id = ClientId::generate(&Rng::Os(Tier::PORTABLE)).unwrap();
        assert_eq!(ClientId::parse(id.as_str()), Some(id));
        assert_ne!(id, ClientId::generate(&Rng::Os(Tier::PORTABLE)).unwrap());
        let good = "KAAP.0a1b2c3d-0000-4fff-8000-00000000000f";
        assert_eq!(ClientId::parse(good).unwrap().to_string(), good);
        for bad in [
            "",
            "KAAP.",
            "0a1b2c3d-0000-4fff-8000-00000000000f",
            "kaap.0a1b2c3d-0000-4fff-8000-00000000000f",
            "KAAP.0A1b2c3d-0000-4fff-8000-00000000000f",
            "KAAP.0a1b2c3d-0000-4fff-8000-00000000000g",
            "KAAP.0a1b2c3d00004fff-8000--00000000000f",
            "KAAP.0a1b2c3d-0000-4fff-8000-00000000000",
            "KAAP.0a1b2c3d-0000-4fff-8000-00000000000f\n",
            "KAAP.{a1b2c3d-0000-4fff-8000-0000000000}f",
            "KAAP.urn:uuid:00-4fff-8000-00000000000ff1",
        ] {
            assert_eq!(ClientId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn permissions_are_read_and_written() {
        for (text, written) in [
            ("generate", "generate"),
            ("random,generate", "generate,random"),
            ("decrypt, encrypt,decrypt", "decrypt,encrypt"),
            ("all", "generate,decrypt,encrypt,random"),
            ("random,all", "generate,decrypt,encrypt,random"),
        ] {
            let permissions = Permissions::parse(text).unwrap();
            assert_eq!(permissions.to_string(), written);
            assert_eq!(Permissions::parse(written).unwrap(), permissions);
            for permission in Permission::ALL {
                assert_eq!(permissions.contains(permission), written.contains(permission.as_str()));
            }
        }
        assert_eq!(Permissions::all().iter().collect::<Vec<_>>(), Permission::ALL);
        for bad in ["", ",", "generate,", "Generate", "ALL", "*", "sign", "generate decrypt"] {
            let error = Permissions::parse(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidParameter, "{bad}");
        }
    }

    #[test]
    fn patterns_are_globs_of_whole_names() {
        for (pattern, name, fits) in [
            ("*", "alias/a", true),
            ("**", "key-x", true),
            ("alias/app", "alias/app", true),
            ("alias/app", "alias/app2", false),
            ("alias/app", "Alias/app", false),
            ("alias/app*", "alias/app", true),
            ("alias/*/disk", "alias/a/b/disk", true),
            ("alias/?", "alias/a", true),
            ("alias/?", "alias/", false),
            ("alias/?", "alias/ab", false),
            ("app", "alias/app", false),
            ("key-*9", "key-9", true),
            ("alias/[a]", "alias/a", false),
        ] {
            assert_eq!(KeyPattern::parse(pattern).unwrap().matches(name), fits, "{pattern} {name}");
        }
        assert_eq!(KeyPattern::parse("a**b").unwrap().as_str(), "a**b");
        assert!(KeyPattern::parse(&"*".repeat(255)).is_ok());
        for bad in ["", " ", "alias/a b", "alias/é", "a\n", "a\0", &"*".repeat(256)] {
            let error = KeyPattern::parse(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidParameter, "{bad}");
        }
    }

    fn client() -> Client {
        Client {
            client_id: ClientId::generate(&Rng::Os(Tier::PORTABLE)).unwrap(),
            name: "n".to_owned(),
            creation_date: SystemTime::UNIX_EPOCH,
            enabled: true,
            permissions: Permissions::all(),
            key_patterns: vec![KeyPattern::parse("*").unwrap()],
            public_key: vec![1],
        }
    }

    #[test]
    fn clients_at_and_beyond_their_limits() {
        let pattern = KeyPattern::parse("*").unwrap();
        let check = |change: &dyn Fn(&mut Client)| {
            let mut client = client();
            change(&mut client);
            client.check()
        };
        check(&|client| client.name = "é".repeat(CLIENT_NAME_CHARS_MAX)).unwrap();
        check(&|client| client.public_key = vec![0; CLIENT_PUBLIC_KEY_LEN_MAX]).unwrap();
        check(&|client| client.key_patterns = vec![pattern.clone(); CLIENT_KEY_PATTERNS_MAX])
            .unwrap();
        let refused: [&dyn Fn(&mut Client); 8] = [
            &|client| client.name.clear(),
            &|client| client.name = "é".repeat(CLIENT_NAME_CHARS_MAX + 1),
            &|client| client.name = "a\nb".to_owned(),
            &|client| client.public_key.clear(),
            &|client| client.public_key = vec![0; CLIENT_PUBLIC_KEY_LEN_MAX + 1],
            &|client| client.permissions = Permissions::default(),
            &|client| client.key_patterns.clear(),
            &|client| client.key_patterns = vec![pattern.clone(); CLIENT_KEY_PATTERNS_MAX + 1],
        ];
        for (index, change) in refused.into_iter().enumerate() {
            assert_eq!(check(change).unwrap_err().kind(), ErrorKind::InvalidParameter, "{index}");
        }
    }

    #[test]
    fn a_directory_knows_all_and_answers_the_active() {
        let (one, mut two) = (client(), client());
        two.enabled = false;
        let directory = ClientDirectory::new(vec![one.clone(), two.clone()]);
        assert_eq!(directory.iter().count(), 2);
        assert_eq!(**directory.active(&one.client_id).unwrap(), one);
        assert_eq!(**directory.get(&two.client_id).unwrap(), two);
        assert!(directory.active(&two.client_id).is_none());
        assert!(directory.get(&client().client_id).is_none());
    }
}
