//! `keymill info`: CPU, tier, store and version, for bug reports and for a look at what one has.

use std::{env, fs, thread};

use keymill::{TIER_VARIABLE, Tier};
use serde::Serialize;

use crate::{failure::Result, home::Home, print};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
The tier is the instruction-set level of the kernels; KEYMILL_TIER=portable lowers it.

Examples:
  keymill info
  keymill info --json";

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    version: &'static str,
    platform: String,
    cpu: String,
    cpu_features: Vec<&'static str>,
    threads: usize,
    tier: String,
    home: String,
    /// What the store says of itself; `null` if there is none.
    store: Option<String>,
}

pub(crate) fn run(home: &Home, args: &Args) -> Result<()> {
    // A store that is there and does not open is reported last: the rest may tell why.
    let (store, failure) = match home.store().try_exists() {
        Ok(false) => (None, None),
        _ => match home.open() {
            Ok(engine) => (Some(engine.describe_store()), None),
            Err(failure) => (Some("does not open".to_owned()), Some(failure)),
        },
    };
    let info = Info {
        version: env!("CARGO_PKG_VERSION"),
        platform: format!("{} {}", env::consts::OS, env::consts::ARCH),
        cpu: cpu_name(),
        cpu_features: cpu_features(),
        threads: thread::available_parallelism().map_or(1, usize::from),
        tier: Tier::detect()?.to_string(),
        home: home.dir().display().to_string(),
        store,
    };
    if args.json {
        print::json(&info)?;
    } else {
        print::list(vec![
            ("Version", format!("keymill {}", info.version)),
            ("Platform", info.platform),
            ("CPU", info.cpu),
            ("Features", info.cpu_features.join(" ")),
            ("Threads", info.threads.to_string()),
            ("Tier", with_wish(info.tier)),
            ("Home", info.home),
            ("Store", info.store.unwrap_or("none yet; `keymill init` makes one".to_owned())),
        ])?;
    }
    failure.map_or(Ok(()), Err)
}

/// The tier in use, and what was asked for if that is another.
fn with_wish(tier: String) -> String {
    match env::var(TIER_VARIABLE) {
        Ok(asked) if !asked.is_empty() && asked != tier => {
            format!("{tier} ({TIER_VARIABLE} asks for {asked}, which this CPU does not have)")
        }
        _ => tier,
    }
}

/// The model name where the system tells it.
pub(crate) fn cpu_name() -> String {
    let about = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    about
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

/// The features that the tiers ask for.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    [
        ("ssse3", has!("ssse3")),
        ("sse4.1", has!("sse4.1")),
        ("aes", has!("aes")),
        ("pclmulqdq", has!("pclmulqdq")),
        ("avx2", has!("avx2")),
        ("vaes", has!("vaes")),
        ("vpclmulqdq", has!("vpclmulqdq")),
        ("avx512f", has!("avx512f")),
        ("avx512bw", has!("avx512bw")),
        ("avx512vl", has!("avx512vl")),
    ]
    .into_iter()
    .filter_map(|(name, there)| there.then_some(name))
    .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}
