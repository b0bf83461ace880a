//! `keymill key`: key-encryption keys, from making them to deleting them.

use std::path::PathBuf;

use keymill::{CreateKey, DueReport, Engine, KeySpec, RotationPeriod, Scheme};
use serde::Serialize;

use crate::{
    failure::{Failure, Result, Status, hint, say},
    home::Home,
    import, print,
};

#[derive(clap::Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Command {
    /// Make a key
    Create(Create),
    /// Make a key of material that you bring
    Import(Import),
    /// Show all keys
    List(Json),
    /// Show one key with its versions
    Show(Key),
    /// Give a key a new version, which `generate --advance` uses from then on
    Rotate(Key),
    /// Enable a disabled key
    Enable(Key),
    /// Disable a key: it neither wraps nor unwraps until it is enabled again
    Disable(Key),
    /// Have a key deleted after some days, with everything that it wrapped
    ScheduleDeletion {
        #[command(flatten)]
        key: Key,
        /// Days until the deletion, 7 to 366
        // The range is the engine's to judge.
        #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = days)]
        days: u32,
    },
    /// Call a scheduled deletion off; the key is enabled again
    CancelDeletion(Key),
    /// Rotate a key by itself, or stop that
    SetRotation {
        #[command(flatten)]
        key: Key,
        #[command(flatten)]
        rotation: Rotation,
    },
    /// Carry out the rotations and deletions that are due
    RunDue {
        /// Delete also keys whose date is in doubt, such as one that is overdue by more than 366 days:
        /// the clock was checked, and is right
        #[arg(long)]
        clock_is_right: bool,
        #[command(flatten)]
        json: Json,
    },
}

fn days(text: &str) -> std::result::Result<u32, String> {
    text.parse()
        .map_err(|_| "InvalidParameter: PendingWindowInDays is an integer from 7 to 366".into())
}

const EXAMPLES: &str = "\
KEY is a key id or an alias.

Examples:
  keymill key create --alias alias/app --rotate-every 90d
  keymill key import --material kek.bin --alias alias/legacy --scheme direct
  keymill key list
  keymill key show alias/app --json
  keymill key set-rotation alias/app --off
  keymill key schedule-deletion alias/app --days 30";

#[derive(clap::Args)]
#[command(after_help = CREATE_EXAMPLES)]
pub(crate) struct Create {
    /// A first alias: alias/ and letters, digits, '/', '_' or '-'
    #[arg(long, value_name = "alias/NAME")]
    alias: Option<String>,
    /// AES_256, AES_192 or AES_128
    #[arg(long, value_name = "SPEC", default_value = "AES_256")]
    spec: String,
    /// How the key wraps: derived or direct [default: derived for AES_256, direct for the others]
    #[arg(long, value_name = "SCHEME")]
    scheme: Option<String>,
    /// Rotate by itself every so often: an integer and d, h, m or s, 7 to 365 days
    #[arg(long, value_name = "PERIOD", allow_hyphen_values = true)]
    rotate_every: Option<String>,
    /// What the key is for
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
    #[command(flatten)]
    json: Json,
}

const CREATE_EXAMPLES: &str = "\
derived (XAES-256-GCM) has no practical bound on the number of wraps; direct is plain AES-GCM, which
other systems can open, and wraps at most 2^32 data keys per key version.

Examples:
  keymill key create --alias alias/app
  keymill key create --alias alias/disks --rotate-every 90d --description 'disks of the east hall'
  keymill key create --spec AES_128 --scheme direct";

#[derive(clap::Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub(crate) struct Import {
    /// File of 16, 24 or 32 raw bytes, no hex and no newline; `-` is standard input
    #[arg(long, value_name = "FILE")]
    material: PathBuf,
    /// A first alias: alias/ and letters, digits, '/', '_' or '-'
    #[arg(long, value_name = "alias/NAME")]
    alias: Option<String>,
    /// How the key wraps: derived or direct [default: derived for 32 bytes, direct for the others]
    #[arg(long, value_name = "SCHEME")]
    scheme: Option<String>,
    /// What the key is for
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
    #[command(flatten)]
    json: Json,
}

const IMPORT_EXAMPLES: &str = "\
The length of the material decides the spec. Imported keys do not rotate, and the same material
cannot be imported twice.

Examples:
  keymill key import --material kek.bin --alias alias/legacy
  xxd -r -p kek.hex | keymill key import --material - --scheme direct";

#[derive(clap::Args)]
pub(crate) struct Key {
    /// The key: an id or an alias
    key: String,
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
#[group(required = true, multiple = false)]
pub(crate) struct Rotation {
    /// An integer and d, h, m or s, 7 to 365 days, such as 90d
    #[arg(long, value_name = "PERIOD", allow_hyphen_values = true)]
    every: Option<String>,
    /// No rotation by itself
    #[arg(long)]
    off: bool,
}

pub(crate) fn run(home: &Home, command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create(home, args),
        Command::Import(args) => import(home, args),
        Command::List(Json { json }) => print::keys(&home.open()?.list_keys()?, json),
        Command::Show(key) => change(home, key, Engine::describe_key),
        Command::Rotate(key) => change(home, key, Engine::rotate_key),
        Command::Enable(key) => change(home, key, Engine::enable_key),
        Command::Disable(key) => change(home, key, Engine::disable_key),
        Command::ScheduleDeletion { key, days } => {
            change(home, key, |engine, key| engine.schedule_key_deletion(key, days))
        }
        Command::CancelDeletion(key) => change(home, key, Engine::cancel_key_deletion),
        Command::SetRotation { key, rotation: Rotation { every, off: _ } } => {
            let period = every.as_deref().map(RotationPeriod::parse).transpose()?;
            change(home, key, |engine, key| engine.set_rotation(key, period))
        }
        Command::RunDue { clock_is_right, json: Json { json } } => {
            let engine = home.open_before_due_work()?;
            let report = match clock_is_right {
                true => engine.run_due_by_this_clock()?,
                false => engine.run_due()?,
            };
            run_due(&report, json)
        }
    }
}

/// Runs an operation on one key, and shows the key as it is afterwards.
fn change(
    home: &Home,
    Key { key, json: Json { json } }: Key,
    operation: impl FnOnce(&Engine, &str) -> keymill::Result<keymill::KeyMetadata>,
) -> Result<()> {
    print::key(&operation(&home.open()?, &key)?, json)
}

fn create(home: &Home, args: Create) -> Result<()> {
    let key = CreateKey {
        spec: KeySpec::parse(&args.spec)?,
        scheme: args.scheme.as_deref().map(Scheme::parse).transpose()?,
        alias: args.alias,
        description: args.description,
        rotation_period: args.rotate_every.as_deref().map(RotationPeriod::parse).transpose()?,
    };
    print::key(&home.open()?.create_key(&key)?, args.json.json)
}

fn import(home: &Home, args: Import) -> Result<()> {
    let scheme = args.scheme.as_deref().map(Scheme::parse).transpose()?;
    import::Material::check_place(home, &args.material)?;
    // Opened before the material is read: a secret is not asked for in vain.
    let engine = home.open()?;
    let material = import::Material::read(&args.material)?;
    let mut key = keymill::ImportKey::new(material.bytes());
    key.scheme = scheme;
    key.alias = args.alias;
    key.description = args.description;
    let made = engine.import_key(&key)?;
    drop(material);
    print::key(&made, args.json.json)
}

fn run_due(report: &DueReport, json: bool) -> Result<()> {
    let texts = |ids: &[keymill::KeyId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
    let document = DueDocument {
        rotated: texts(&report.rotated),
        deleted: texts(&report.deleted),
        failed: report
            .failed
            .iter()
            .map(|(key, error)| FailedDocument {
                key_id: key.to_string(),
                code: error.code(),
                message: error.message(),
            })
            .collect(),
    };
    if json {
        print::json(&document)?;
    } else {
        let lines = [("rotated", &document.rotated), ("deleted", &document.deleted)];
        let lines =
            lines.iter().flat_map(|(what, ids)| ids.iter().map(move |id| format!("{what} {id}\n")));
        let text = lines.collect::<String>();
        print::text(if text.is_empty() { "Nothing was due.\n" } else { &text })?;
    }
    for (key, error) in &report.failed {
        say(format_args!("{key}: {error}"));
    }
    let gravest = report.failed.iter().max_by_key(|(_, error)| Status::of(error));
    gravest.map_or(Ok(()), |(key, error)| {
        Err(Failure::new(
            Status::of(error),
            format!("due work failed on {} keys, such as {key}", report.failed.len()),
            hint(error.kind()),
        ))
    })
}

/// A report of due work as JSON.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DueDocument {
    rotated: Vec<String>,
    deleted: Vec<String>,
    failed: Vec<FailedDocument>,
}

/// A key whose due work failed.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct FailedDocument {
    key_id: String,
    code: &'static str,
    message: String,
}
