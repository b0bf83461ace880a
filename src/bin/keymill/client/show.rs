//! Prints clients: tables for people, JSON for programs.

use keymill::Client;
use serde::Serialize;

use crate::{failure::Result, print};

/// Prints one client.
pub(super) fn client(client: &Client, as_json: bool) -> Result<()> {
    if as_json {
        return print::json(&ClientDocument::new(client));
    }
    let mut rows = vec![
        ("Client id", client.client_id.to_string()),
        ("Name", client.name.clone()),
        ("State", state(client).to_owned()),
        ("Created", print::time(client.creation_date)),
        ("May", client.permissions.to_string()),
    ];
    for (index, pattern) in client.key_patterns.iter().enumerate() {
        rows.push((if index == 0 { "Keys" } else { "" }, pattern.to_string()));
    }
    print::list(rows)
}

/// Prints many clients.
pub(super) fn clients(clients: &[Client], as_json: bool) -> Result<()> {
    if as_json {
        return print::json(&clients.iter().map(ClientDocument::new).collect::<Vec<_>>());
    }
    if clients.is_empty() {
        return print::text(
            "No clients yet. `keymill client create` makes one; its --help shows how.\n",
        );
    }
    let rows = clients
        .iter()
        .map(|client| {
            let patterns: Vec<_> = client.key_patterns.iter().map(ToString::to_string).collect();
            [
                client.client_id.to_string(),
                client.name.clone(),
                state(client).to_owned(),
                client.permissions.to_string(),
                patterns.join(" "),
                print::time(client.creation_date),
            ]
        })
        .collect();
    print::table(["CLIENT ID", "NAME", "STATE", "MAY", "KEYS", "CREATED"], rows)
}

fn state(client: &Client) -> &'static str {
    if client.enabled { "Enabled" } else { "Disabled" }
}

/// A client as JSON.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ClientDocument {
    client_id: String,
    name: String,
    client_state: &'static str,
    creation_date: String,
    permissions: Vec<&'static str>,
    key_patterns: Vec<String>,
    /// `SubjectPublicKeyInfo` in DER, as base64.
    public_key: String,
}

impl ClientDocument {
    fn new(client: &Client) -> Self {
        Self {
            client_id: client.client_id.to_string(),
            name: client.name.clone(),
            client_state: state(client),
            creation_date: print::time(client.creation_date),
            permissions: client.permissions.iter().map(|permission| permission.as_str()).collect(),
            key_patterns: client.key_patterns.iter().map(ToString::to_string).collect(),
            public_key: base64_simd::STANDARD.encode_to_string(&client.public_key),
        }
    }
}
