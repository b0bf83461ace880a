//! `keymill`, the command line: one file per command, folders for `bench` and `client`, and shared rooms beside them.
//!
//! This file reads the arguments, calls the command, and turns its end into messages and an exit code: 0 done,
//! 1 refused (usage errors and any refused line included), 2 broke. `failure` holds the messages, `home` finds and
//! opens the key store, `lines` and `records` read JSON Lines in bounded memory, `rows` and `json` write them, `arrow`
//! reads and writes Arrow IPC streams, and `stream` ties them together. Files are `input`, `output` and `passing`, each
//! a decision about every kind of file; `links` and `identity` tell what a path leads to, `standard` has the streams of
//! the process, and `forms` knows inputs that are something else. Only the library's public API is used.

mod alias;
#[cfg(feature = "arrow")]
mod arrow;
#[cfg(feature = "bench")]
mod bench;
#[cfg(feature = "server")]
mod client;
mod decrypt;
mod failure;
mod forms;
mod generate;
mod home;
mod identity;
mod import;
mod info;
mod init;
mod input;
mod interrupt;
mod json;
mod key;
mod lines;
mod links;
#[cfg(feature = "server")]
mod logs;
mod mend;
mod output;
mod passing;
mod print;
mod progress;
mod records;
mod rows;
#[cfg(feature = "server")]
mod serve;
mod standard;
mod stream;
mod variables;
mod warnings;

use std::{
    env,
    io::{self, IsTerminal},
    path::PathBuf,
    process::ExitCode,
};

use clap::{FromArgMatches, Parser, Subcommand, error::ErrorKind};

use failure::{Failure, Result};
use home::Home;

/// Generates data keys in bulk and wraps them under versioned key-encryption keys by AES-GCM.
#[derive(Parser)]
#[command(
    name = "keymill",
    version,
    after_help = EXAMPLES,
    arg_required_else_help = true,
    subcommand_required = true,
    disable_help_subcommand = true
)]
struct Cli {
    /// Directory of keys.db and root.key [default: $KEYMILL_HOME, or else keymill in the XDG data
    /// directory]
    // The variable is read in `home`: clap would put it into usage lines as if it had been given.
    // Last: in the help of a command its own options come first.
    #[arg(long, global = true, value_name = "DIR", display_order = 900)]
    home: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make an empty key store
    Init(init::Args),
    /// Create, import, list and change keys
    #[command(subcommand)]
    Key(key::Command),
    /// Give keys names of your own
    #[command(subcommand)]
    Alias(alias::Command),
    /// Let others use the server: make, list and change clients
    #[cfg(feature = "server")]
    #[command(subcommand)]
    Client(client::Command),
    /// Make data keys: many for one key, or one for each line of a file
    Generate(generate::Args),
    /// Unwrap the data keys in a file that `generate` wrote
    Decrypt(decrypt::Args),
    /// Answer the KMS's wire protocol on HTTP, so that its SDKs drive this key store
    #[cfg(feature = "server")]
    Serve(Box<serve::Args>),
    /// Show CPU, tier, store and version
    Info(info::Args),
    /// Take away a log that does not belong to the key store, after a restore
    Mend(mend::Args),
    /// Measure this machine: keymill's kernels beside ring, aes-gcm and aws-lc-rs
    #[cfg(feature = "bench")]
    Bench(bench::Args),
}

impl Command {
    /// Whether the library's warnings are lines on standard error. A server has logs.
    fn prints_warnings(&self) -> bool {
        #[cfg(feature = "server")]
        if matches!(self, Self::Serve(_)) {
            return false;
        }
        true
    }
}

const EXAMPLES: &str = "\
Start here. This makes the key store and the key if they are missing, then ten data keys:
  keymill generate --key alias/app --count 10 --create

Other things to do:
  keymill generate --requests requests.jsonl --out keys.jsonl
  keymill decrypt --in keys.jsonl
  keymill key list

Exit codes: 0 done; 1 refused: a wrong argument, or at least one refused line; 2 broke: the key
store, a file or the machine failed.";

fn main() -> ExitCode {
    let cli = variables::parse().and_then(|matches| {
        Cli::from_arg_matches(&matches)
            .map_err(|error| variables::Refused { error, variable: None })
    });
    let cli = match cli {
        Ok(cli) => cli,
        Err(refused) => return usage(&refused),
    };
    if cli.command.prints_warnings() {
        warnings::install();
    }
    let code = match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    };
    #[cfg(feature = "server")]
    logs::flush();
    code
}

fn run(Cli { home, command }: Cli) -> Result<()> {
    // Resolved before the command: one that cannot find its home should say so before it reads anything.
    #[cfg(feature = "bench")]
    let asked = home.clone();
    let home = || {
        let home = Home::resolve(home)?;
        home.spare_from_streams()?;
        Ok::<_, Failure>(home)
    };
    if command.tells_what_it_did() {
        // Before anything is done: whoever is told of a failure does it again.
        standard::output()?;
    }
    match command {
        Command::Init(args) => init::run(&home()?, &args),
        Command::Key(command) => key::run(&home()?, command),
        Command::Alias(command) => alias::run(&home()?, command),
        #[cfg(feature = "server")]
        Command::Client(command) => client::run(&home()?, command),
        Command::Generate(args) => generate::run(&home()?, &args),
        Command::Decrypt(args) => decrypt::run(&home()?, &args),
        #[cfg(feature = "server")]
        Command::Serve(args) => serve::run(&home()?, &args),
        Command::Info(args) => info::run(&home()?, &args),
        Command::Mend(args) => mend::run(&home()?, &args),
        #[cfg(feature = "bench")]
        Command::Bench(args) => {
            // It needs no home, but is not to write over one.
            if let Ok(home) = Home::resolve(asked) {
                home.spare_from_streams()?;
            }
            bench::run(&args)
        }
    }
}

impl Command {
    /// Whether what it makes or changes is told on standard output alone. A server tells its log, too, and rows may go
    /// elsewhere.
    fn tells_what_it_did(&self) -> bool {
        match self {
            Self::Init(_) | Self::Key(_) | Self::Alias(_) | Self::Info(_) | Self::Mend(_) => true,
            #[cfg(feature = "server")]
            Self::Client(_) => true,
            _ => false,
        }
    }
}

/// Prints help and version as clap does, and usage errors in this program's form.
fn usage(variables::Refused { error, variable }: &variables::Refused) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let text = error.render();
            let text = if shows_colours() { text.ansi().to_string() } else { text.to_string() };
            match print::text(&text) {
                Ok(()) => ExitCode::SUCCESS,
                Err(failure) => failure.report(),
            }
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(1)
        }
        _ => {
            let text = error.render().to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
            let text = text.strip_suffix(CLAP_HINT).unwrap_or(text).trim_end();
            let hint = "run it with `--help` for what is allowed, and for examples";
            match variable {
                Some(name) => Failure::refused(
                    format!("{text}\n\nThe value is that of the environment variable {name}."),
                    format!("correct {name} or unset it; {hint}"),
                ),
                None => Failure::refused(text, hint),
            }
            .report()
        }
    }
}

/// Whether help has colours: for people who have not said that they want none.
fn shows_colours() -> bool {
    let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    wanted && io::stdout().is_terminal() && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// The line with which clap ends a usage error; ours says the same as a hint.
const CLAP_HINT: &str = "For more information, try '--help'.";
