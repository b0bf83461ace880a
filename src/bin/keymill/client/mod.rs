//! `keymill client`: those who may use the server, from making their keys to deleting them.
//!
//! `key_file` makes the key and its file, `password` reads or makes the password that protects it, both by
//! `new_file`; `show` prints clients.

mod key_file;
mod new_file;
mod password;
mod show;

use std::path::{Path, PathBuf};

use keymill::{Client, ClientId, CreateClient, Engine, KeyPattern, Permissions, UpdateClient};

use crate::{
    failure::{Failure, Result, quoted},
    home::Home,
    identity::Named,
    interrupt,
    output::DASH,
    print,
    warnings::warn,
};
use key_file::KeyPair;
use new_file::NewFile;
use password::Password;

#[derive(clap::Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Command {
    /// Make a client and the key file that it signs its requests with
    Create(Create),
    /// Show all clients
    List(Json),
    /// Show one client
    Show(Which),
    /// Change a client's name, keys or permissions
    Set(Set),
    /// Disable a client: the server refuses it until it is enabled again
    Disable(Which),
    /// Enable a disabled client
    Enable(Which),
    /// Remove a client for good; what it wrapped stays
    Delete {
        /// The client's id, KAAP.<uuid>
        client: String,
    },
}

const EXAMPLES: &str = "\
CLIENT is a client's id, as `keymill client list` shows it. A server that runs on the same key store
follows a change within a second.

Examples:
  keymill client create --name backup --out clientKey.json --password-file clientKey.password \\
      --keys 'alias/backup*' --allow generate,decrypt
  keymill client list
  keymill client set KAAP.0a1b2c3d-0000-4fff-8000-00000000000f --allow decrypt
  keymill client disable KAAP.0a1b2c3d-0000-4fff-8000-00000000000f";

#[derive(clap::Args)]
#[command(after_help = CREATE_EXAMPLES)]
pub(crate) struct Create {
    /// What people call it: 1 to 64 characters
    #[arg(long, value_name = "NAME")]
    name: String,
    /// File for the client's key, in the JSON that the SDKs read; it must not exist yet
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// File of the password that protects the key; a new one is made if it does not exist
    #[arg(long, value_name = "FILE")]
    password_file: PathBuf,
    /// Keys that it may use: ids or aliases, in which * stands for any characters and ? for one;
    /// several with commas or spaces between them
    #[arg(long, value_name = "PATTERN", required = true, num_args = 1.., value_delimiter = ',')]
    keys: Vec<String>,
    /// What it may do: any of generate, decrypt, encrypt, random with commas between them, or all
    #[arg(long, value_name = "LIST")]
    allow: String,
}

const CREATE_EXAMPLES: &str = "\
A pattern fits a key by its id or by any alias that it has at the time of the request. Quote
patterns, or the shell replaces them by names of files. A client that may use every key and do
everything has --keys '*' --allow all.

A password has 8 to 64 characters of at least two kinds: digits, letters, and ~!@#$%^&*?_-. One line
end after it is no part of it.

The store keeps the public key alone. Who loses the key file makes a new client.

Examples:
  keymill client create --name backup --out clientKey.json --password-file clientKey.password \\
      --keys 'alias/backup*' --allow generate,decrypt
  keymill client create --name admin --out admin.json --password-file admin.password \\
      --keys '*' --allow all";

#[derive(clap::Args)]
pub(crate) struct Which {
    /// The client's id, KAAP.<uuid>
    client: String,
    #[command(flatten)]
    json: Json,
}

#[derive(clap::Args)]
pub(crate) struct Json {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct Set {
    /// The client's id, KAAP.<uuid>
    // It may stand behind the patterns of --keys, where clap takes it for one more.
    #[arg(required_unless_present = "keys")]
    client: Option<String>,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    changes: Changes,
}

#[derive(clap::Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Changes {
    /// A new name: 1 to 64 characters
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Patterns of key ids and aliases, in the place of all that it had; several with commas or
    /// spaces between them
    #[arg(long, value_name = "PATTERN", num_args = 1.., value_delimiter = ',')]
    keys: Option<Vec<String>>,
    /// Permissions in the place of all that it had: any of generate, decrypt, encrypt, random with
    /// commas between them, or all
    #[arg(long, value_name = "LIST")]
    allow: Option<String>,
}

pub(crate) fn run(home: &Home, command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create(home, &args),
        Command::List(Json { json }) => show::clients(&home.open()?.list_clients()?, json),
        Command::Show(which) => change(home, &which, Engine::describe_client),
        Command::Set(args) => set(home, args),
        Command::Disable(which) => change(home, &which, Engine::disable_client),
        Command::Enable(which) => change(home, &which, Engine::enable_client),
        Command::Delete { client } => {
            let id = id(&client)?;
            home.open()?.delete_client(&id)?;
            print::text(&format!("{id} is gone; what it wrapped is unchanged.\n"))
        }
    }
}

/// Runs an operation on one client, and shows the client as it is afterwards.
fn change(
    home: &Home,
    Which { client, json: Json { json } }: &Which,
    operation: impl FnOnce(&Engine, &ClientId) -> keymill::Result<Client>,
) -> Result<()> {
    let id = id(client)?;
    show::client(&operation(&home.open()?, &id)?, *json)
}

fn set(home: &Home, Set { client, json, changes }: Set) -> Result<()> {
    let Changes { name, mut keys, allow } = changes;
    let client = client.or_else(|| id_behind(&mut keys)).ok_or_else(|| {
        Failure::refused(
            "no client is named: what follows --keys are patterns of keys",
            "write the client's id before the options; `keymill client list` shows the ids",
        )
    })?;
    let which = Which { client, json };
    let update = UpdateClient {
        name,
        permissions: allow.as_deref().map(Permissions::parse).transpose()?,
        key_patterns: keys.as_deref().map(patterns).transpose()?,
    };
    let key_patterns = update.key_patterns.as_deref().unwrap_or_default();
    change(home, &which, |engine, id| {
        let client = engine.update_client(id, &update)?;
        warn_of_idle(engine, key_patterns)?;
        Ok(client)
    })
}

/// Takes the client's id from behind the patterns: no key has an id or an alias of that form.
fn id_behind(keys: &mut Option<Vec<String>>) -> Option<String> {
    let patterns = keys.as_mut().filter(|patterns| patterns.len() > 1)?;
    ClientId::parse(patterns.last()?)?;
    patterns.pop()
}

fn create(home: &Home, args: &Create) -> Result<()> {
    let permissions = Permissions::parse(&args.allow)?;
    let key_patterns = patterns(&args.keys)?;
    check_places(home, args)?;
    // What is not finished is taken away again, also after Ctrl-C.
    interrupt::install()?;
    let file = NewFile::begin("--out", &args.out)?;
    let mut password = Password::of_file(&args.password_file)?;
    let engine = home.open()?;
    let pair = KeyPair::generate()?;
    let request = CreateClient {
        name: args.name.clone(),
        public_key: pair.public_key(),
        permissions,
        key_patterns,
    };
    let client = interrupt::complete(|| {
        password.make_if_missing()?;
        // The id comes from the store, and the file holds it. So the client exists for a moment without its file; it
        // is of no use to anyone then, and goes again if the file cannot be put in its place.
        let client = engine.create_client(&request)?;
        match key_file::write(file, &client.client_id, &pair, password.expose()) {
            Ok(()) => Ok(client),
            Err(failure) => Err(undo(&engine, &client.client_id, failure)),
        }
    })?;
    let made = password.keep();
    // Everything is in its place: what fails from here on changes nothing.
    if let Err(error) = warn_of_idle(&engine, &client.key_patterns) {
        warn(format_args!("the keys of {} could not be looked for: {error}", client.client_id));
    }
    let password_file = &args.password_file;
    let origin = if made { "made just now" } else { "as it was" };
    print::text(&format!(
        "Made client {} for {:?}.\n\
         Its key is in {:?}, which cannot be made again: it is the client's alone.\n\
         The password of that file is in {password_file:?}, {origin}; hand it over another way.\n\
         `keymill client show {}` shows what it may do.\n",
        client.client_id, client.name, args.out, client.client_id,
    ))
}

/// Removes a client whose key file could not be written.
fn undo(engine: &Engine, id: &ClientId, failure: Failure) -> Failure {
    match engine.delete_client(id) {
        Ok(()) => failure,
        Err(error) => Failure::broke(
            format!("client {id} has no key file, and could not be removed again: {error}"),
            format!("`keymill client delete {id}` removes it; nobody has its key"),
        ),
    }
}

/// Refuses places where the two files cannot be, before anything is made.
fn check_places(home: &Home, Create { out, password_file, .. }: &Create) -> Result<()> {
    for (option, path) in [("--out", out), ("--password-file", password_file)] {
        home.spare_as(option, path)?;
        if path == Path::new(DASH) {
            return Err(Failure::refused(
                format!("{option} {DASH} would be standard input or output; it has to be a file"),
                "name a file",
            ));
        }
    }
    let (key_file, password_file) =
        (Named::file("--out", out), Named::file("--password-file", password_file));
    if key_file.place().is(password_file.place()) {
        return Err(Failure::refused(
            format!("--out and --password-file are both {out:?}"),
            "name two files: whoever has both can act as the client",
        ));
    }
    Named::standard_output().spares(&password_file, "which would be damaged")
}

fn id(text: &str) -> Result<ClientId> {
    ClientId::parse(text).ok_or_else(|| {
        Failure::refused(
            format!("{} is no client id; one is KAAP. and a lower-case UUID", quoted(text)),
            "`keymill client list` shows the ids of all clients",
        )
    })
}

fn patterns(texts: &[String]) -> Result<Vec<KeyPattern>> {
    Ok(texts.iter().map(|text| KeyPattern::parse(text)).collect::<keymill::Result<_>>()?)
}

/// Warns of patterns that fit no key: a slip of the pen, or of a shell that put names of files in their place.
fn warn_of_idle(engine: &Engine, patterns: &[KeyPattern]) -> keymill::Result<()> {
    let keys = engine.list_keys()?;
    // Nobody misspells a star, and a store without keys will have some.
    for pattern in patterns.iter().filter(|pattern| pattern.as_str() != "*") {
        let fits = keys.iter().any(|key| {
            pattern.matches(key.key_id.as_str())
                || key.aliases.iter().any(|alias| pattern.matches(alias.as_str()))
        });
        if !fits {
            warn(format_args!(
                "no key has an id or an alias that fits {} yet",
                quoted(pattern.as_str())
            ));
        }
    }
    Ok(())
}
