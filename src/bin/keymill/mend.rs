//! `keymill mend`: takes away a log that does not belong to the key store, after a restore.

use keymill::{RootKey, mend_store};

use crate::{failure::Result, home::Home, print};

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

const EXAMPLES: &str = "\
SQLite keeps a log beside keys.db while the store is in use, and after a crash. If keys.db is then
replaced by a backup, the log that is still there belongs to another state, and the store reads as
damaged. This command checks keys.db with its log and without. If it is sound without the log alone,
keys.db-wal, -shm and -journal are renamed, with the time behind their names; nothing is deleted.
Stop everything that uses the store first.

Examples:
  cp -p /backup/keys.db ~/.local/share/keymill/keys.db
  keymill mend";

pub(crate) fn run(home: &Home, Args {}: &Args) -> Result<()> {
    home.check_exists()?;
    let root_key: RootKey = home.read_root_key()?;
    let moved = mend_store(home.store(), &root_key)?;
    if moved.is_empty() {
        return print::text(&format!(
            "Nothing to mend: {:?} passes every check as it is.\n",
            home.store()
        ));
    }
    for file in &moved {
        print::text(&format!("Moved {:?} to {:?}.\n", file.from, file.to))?;
    }
    print::text(&format!(
        "{:?} passes every check now. What was in the log alone is not in it; remove the moved \
         files once you miss nothing.\n",
        home.store()
    ))
}
