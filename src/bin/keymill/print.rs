//! Prints keys and aliases: tables for people, JSON with the KMS's member names for programs.

use std::time::SystemTime;

use comfy_table::{Table, presets};
use keymill::{KeyMetadata, KeyVersionMetadata, Scheme};
use serde::Serialize;

use crate::{
    failure::{Failure, Result},
    output::Output,
};

/// Writes text to standard output.
pub(crate) fn text(text: &str) -> Result<()> {
    Output::stdout()?.write(text.as_bytes())
}

/// Writes one JSON document to standard output.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    let document = serde_json::to_string_pretty(value).map_err(|error| {
        Failure::broke(format!("cannot write JSON: {error}"), "report this as a bug")
    })?;
    text(&format!("{document}\n"))
}

/// Writes a table to standard output.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> Result<()> {
    text(&laid_out(header, rows))
}

fn laid_out<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row.map(|cell| printable(&cell)));
    }
    lined_up(&table)
}

/// Writes names and values to standard output.
pub(crate) fn list(rows: Vec<(&str, String)>) -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row([name, &printable(&value)]);
    }
    text(&lined_up(&table))
}

/// The table without the space that surrounds it.
fn lined_up(table: &Table) -> String {
    table
        .lines()
        .map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(&line).trim_end()))
        .collect()
}

/// `text` with everything escaped that is not printable. A description may hold anything: a terminal obeys control
/// characters, and marks of direction make text look like another one. The one rule of this program: tables and every
/// message take it.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '"' | '\'' | '\\' => shown.push(char),
            _ => shown.extend(char.escape_debug()),
        }
    }
    shown
}

/// A time as RFC 3339 in UTC.
pub(crate) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Prints one key.
pub(crate) fn key(key: &KeyMetadata, as_json: bool) -> Result<()> {
    if as_json {
        return json(&KeyDocument::new(key));
    }
    let mut rows = vec![
        ("Key id", key.key_id.to_string()),
        ("Aliases", aliases(key)),
        ("Spec", key.spec.to_string()),
        ("Scheme", key.scheme.to_string()),
        ("Origin", key.origin.to_string()),
        ("State", key.state.to_string()),
        ("Created", time(key.creation_date)),
    ];
    if !key.description.is_empty() {
        rows.push(("Description", key.description.clone()));
    }
    if let Some(date) = key.state.deletion_date() {
        rows.push(("Deletion", time(date)));
    }
    if let Some(period) = key.rotation_period {
        rows.push(("Rotates every", period.to_string()));
        let next = key.next_rotation_date.map_or("suspended".to_owned(), time);
        rows.push(("Next rotation", next));
    }
    for (index, version) in key.versions.iter().enumerate() {
        let name = if index == 0 { "Versions" } else { "" };
        rows.push((name, version_line(key, index, version)));
    }
    list(rows)
}

fn version_line(key: &KeyMetadata, index: usize, version: &KeyVersionMetadata) -> String {
    let mut line = format!("{}  {}", version.key_version_id, time(version.creation_date));
    if index == 0 {
        line += "  initial";
    }
    if index + 1 == key.versions.len() {
        line += "  primary";
    }
    if key.scheme == Scheme::Direct {
        line += &format!("  {} wraps granted", version.wraps_granted);
    }
    line
}

/// Prints many keys.
pub(crate) fn keys(keys: &[KeyMetadata], as_json: bool) -> Result<()> {
    if as_json {
        return json(&keys.iter().map(KeyDocument::new).collect::<Vec<_>>());
    }
    if keys.is_empty() {
        return text("No keys yet. `keymill key create --alias alias/app` makes one.\n");
    }
    let header = [
        "KEY ID", "ALIASES", "SPEC", "SCHEME", "ORIGIN", "STATE", "VERSIONS", "ROTATES", "CREATED",
    ];
    let rows = keys
        .iter()
        .map(|key| {
            [
                key.key_id.to_string(),
                aliases(key),
                key.spec.to_string(),
                key.scheme.to_string(),
                key.origin.to_string(),
                key.state.to_string(),
                key.versions.len().to_string(),
                key.rotation_period.map_or("-".to_owned(), |period| period.to_string()),
                time(key.creation_date),
            ]
        })
        .collect();
    table(header, rows)
}

fn aliases(key: &KeyMetadata) -> String {
    if key.aliases.is_empty() {
        return "-".to_owned();
    }
    key.aliases.iter().map(|alias| alias.as_str()).collect::<Vec<_>>().join(", ")
}

/// A key as JSON.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct KeyDocument {
    key_id: String,
    aliases: Vec<String>,
    key_spec: &'static str,
    scheme: &'static str,
    origin: &'static str,
    key_state: &'static str,
    description: String,
    creation_date: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    delete_date: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rotation_interval: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_rotation_date: Option<String>,
    primary_key_version: String,
    key_versions: Vec<VersionDocument>,
}

/// A key version as JSON.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct VersionDocument {
    key_version_id: String,
    creation_date: String,
    /// Of `direct` keys, which have a bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    wraps_granted: Option<u64>,
}

impl KeyDocument {
    fn new(key: &KeyMetadata) -> Self {
        let direct = key.scheme == Scheme::Direct;
        Self {
            key_id: key.key_id.to_string(),
            aliases: key.aliases.iter().map(ToString::to_string).collect(),
            key_spec: key.spec.as_str(),
            scheme: key.scheme.as_str(),
            origin: key.origin.as_str(),
            key_state: key.state.as_str(),
            description: key.description.clone(),
            creation_date: time(key.creation_date),
            delete_date: key.state.deletion_date().map(time),
            rotation_interval: key.rotation_period.map(|period| format!("{}s", period.as_secs())),
            next_rotation_date: key.next_rotation_date.map(time),
            primary_key_version: key.primary_version().key_version_id.to_string(),
            key_versions: key
                .versions
                .iter()
                .map(|version| VersionDocument {
                    key_version_id: version.key_version_id.to_string(),
                    creation_date: time(version.creation_date),
                    wraps_granted: direct.then_some(version.wraps_granted),
                })
                .collect(),
        }
    }
}
