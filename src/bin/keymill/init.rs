//! `keymill init`: an empty key store.

use crate::{failure::Result, home::Home, print};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

const EXAMPLES: &str = "\
Makes the directory with mode 0700, and in it root.key, mode 0600, and keys.db. Refuses a home that
has either file. Back both up, and keep root.key apart from the copies of keys.db: together they
open every key.

Examples:
  keymill init
  keymill --home /srv/keys init";

pub(crate) fn run(home: &Home, Args {}: &Args) -> Result<()> {
    home.init()?;
    print::text("Next: `keymill key create --alias alias/app` makes a key.\n")
}
