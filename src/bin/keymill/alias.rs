//! `keymill alias`: names of keys.

use keymill::Engine;
use serde::Serialize;

use crate::{failure::Result, home::Home, print};

#[derive(clap::Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Command {
    /// Give a key a new alias
    Create(Target),
    /// Point an alias to another key
    Update(Target),
    /// Remove an alias; its key stays
    Delete {
        /// The alias, alias/NAME
        alias: String,
    },
    /// Show every alias and its key
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(clap::Args)]
pub(crate) struct Target {
    /// The alias: alias/ and letters, digits, '/', '_' or '-'
    alias: String,
    /// The key: an id or another alias
    key: String,
}

const EXAMPLES: &str = "\
Examples:
  keymill alias create alias/db alias/app
  keymill alias update alias/db key-hzz62f1cb66fa42qopd9s
  keymill alias delete alias/db
  keymill alias list --json";

pub(crate) fn run(home: &Home, command: Command) -> Result<()> {
    let engine = home.open()?;
    match command {
        Command::Create(Target { alias, key }) => {
            engine.create_alias(&alias, &key)?;
            now_names(&engine, &alias)
        }
        Command::Update(Target { alias, key }) => {
            engine.update_alias(&alias, &key)?;
            now_names(&engine, &alias)
        }
        Command::Delete { alias } => {
            engine.delete_alias(&alias)?;
            print::text(&format!("{alias} is gone; its key is unchanged.\n"))
        }
        Command::List { json } => {
            let aliases = engine.list_aliases()?;
            let texts = aliases.iter().map(|(alias, key)| (alias.to_string(), key.to_string()));
            if json {
                let document: Vec<_> = texts
                    .map(|(alias_name, key_id)| AliasDocument { alias_name, key_id })
                    .collect();
                print::json(&document)
            } else if aliases.is_empty() {
                print::text("No aliases yet. `keymill alias create alias/NAME KEY` makes one.\n")
            } else {
                print::table(["ALIAS", "KEY ID"], texts.map(|(a, k)| [a, k]).collect())
            }
        }
    }
}

/// Tells which key an alias names. An alias given for the key only found it: the two are not linked.
fn now_names(engine: &Engine, alias: &str) -> Result<()> {
    print::text(&format!("{alias} names {} now.\n", engine.describe_key(alias)?.key_id))
}

/// An alias as JSON.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct AliasDocument {
    alias_name: String,
    key_id: String,
}
