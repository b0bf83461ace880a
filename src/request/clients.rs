//! What is asked for when a client of the server is made or changed. Checked as a whole by `Client::check`.

use crate::clients::{KeyPattern, Permissions};

/// A client to create, with the public half of a key that its owner keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateClient {
    /// What people call it: 1 to 64 characters, no control characters.
    pub name: String,
    /// The DER of a `SubjectPublicKeyInfo`, at most 1024 bytes. That it is a key is not checked here.
    pub public_key: Vec<u8>,
    /// What it may ask for; at least one permission.
    pub permissions: Permissions,
    /// The keys that it may use: 1 to 64 patterns of key ids and aliases.
    pub key_patterns: Vec<KeyPattern>,
}

/// Changes of a client. What is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpdateClient {
    /// A new name.
    pub name: Option<String>,
    /// Permissions in the place of all that it had.
    pub permissions: Option<Permissions>,
    /// Patterns in the place of all that it had.
    pub key_patterns: Option<Vec<KeyPattern>>,
}
