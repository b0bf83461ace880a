//! Who may own, read and write the files of a store: rules as clear as SSH's.
//!
//! | | owner | group | others |
//! |---|---|---|---|
//! | root key | this user or root | may read, if root gave it or this process is in it | nothing |
//! | store, its log, its directory | this user or root | may write, if this process is in it | may not write |
//!
//! "This user" is the effective one. Secrets mounts hand out root keys that belong to root and that a group may read.
//! Whoever can write a store's directory can put another file in its place: a sticky bit does not change that for files
//! that are not there yet, such as the log.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::place::{COMPANIONS, with_suffix};
use crate::{
    error::{Error, ErrorKind, Result},
    os::files,
};

const GROUP_READ: u32 = 0o040;
const GROUP_WRITE: u32 = 0o020;
const GROUP_CHANGE: u32 = 0o030;
const OTHERS: u32 = 0o007;
const OTHERS_WRITE: u32 = 0o002;
const SUPERUSER: u32 = 0;

/// A file's owner, group and permissions.
#[derive(Clone, Copy)]
struct Found {
    user: u32,
    group: u32,
    mode: u32,
}

impl From<&Metadata> for Found {
    fn from(metadata: &Metadata) -> Self {
        Self { user: metadata.uid(), group: metadata.gid(), mode: metadata.mode() & 0o7777 }
    }
}

/// Whose rights a process has.
struct Us {
    user: u32,
    groups: Vec<u32>,
}

impl Us {
    fn now() -> Self {
        Self { user: files::effective_user(), groups: files::groups() }
    }

    /// Why a file of this owner is refused.
    fn stranger(&self, found: Found) -> Option<String> {
        let Found { user, .. } = found;
        (user != self.user && user != SUPERUSER).then(|| {
            let us = self.user;
            format!(
                "belongs to user {user}, and this process runs as user {us}; run it as user \
                 {user}, or give the file to the user that runs keymill by `chown`"
            )
        })
    }

    fn refuses_root_key(&self, found: Found) -> Option<String> {
        let Found { user, group, mode } = found;
        if let Some(why) = self.stranger(found) {
            return Some(why);
        }
        let who = if mode & OTHERS != 0 {
            "so everybody may access it"
        } else if mode & GROUP_CHANGE != 0 {
            "so others than its owner may change it"
        } else if mode & GROUP_READ != 0 && user != SUPERUSER && !self.groups.contains(&group) {
            "so a group may read it that this process is not in"
        } else {
            return None;
        };
        // Of root, it is for a process that could not read it with less.
        let remedy = match user == SUPERUSER && self.user != SUPERUSER {
            true => "give it a group of this process by `chgrp`, and run `chmod 440` on it",
            false => "run `chmod 600` on it",
        };
        Some(format!("has mode {mode:04o} and group {group}, {who}; {remedy}"))
    }

    fn refuses_store(&self, found: Found) -> Option<String> {
        let Found { group, mode, .. } = found;
        if let Some(why) = self.stranger(found) {
            return Some(why);
        }
        if mode & OTHERS_WRITE != 0 {
            return Some(format!(
                "has mode {mode:04o}, so everybody may write it; run `chmod o-w` on it, or keep \
                 the store in a directory of its own"
            ));
        }
        (mode & GROUP_WRITE != 0 && !self.groups.contains(&group)).then(|| {
            format!(
                "has mode {mode:04o} and group {group}, so a group may write it that this process \
                 is not in; run `chmod g-w` on it"
            )
        })
    }
}

/// Why this process does not take a root key from a file, in words that follow the file's name.
pub(super) fn refuses_root_key(metadata: &Metadata) -> Option<String> {
    Us::now().refuses_root_key(metadata.into())
}

/// Checks the directory in which a store is to be made.
///
/// # Errors
/// `StoreUnavailable` if others may write there.
pub(super) fn check_directory(store: &Path) -> Result<()> {
    check(&Us::now(), store.parent().unwrap_or(store))
}

/// Checks a store, what lies beside it, and the directory that holds both: where `store` is a link, the place that it
/// leads to as well.
///
/// # Errors
/// `StoreUnavailable` if others may write there.
pub(super) fn check_store(store: &Path) -> Result<()> {
    let us = Us::now();
    let real = fs::canonicalize(store).unwrap_or_else(|_| store.to_owned());
    let companions = COMPANIONS.iter().map(|suffix| with_suffix(&real, suffix));
    let directories = [store, &real].map(|file| file.parent().unwrap_or(file).to_owned());
    let all: Vec<PathBuf> =
        directories.into_iter().chain([real.clone()]).chain(companions).collect();
    all.iter().try_for_each(|path| check(&us, path))
}

/// The first of a store's directory, its file and what lies beside it that this process may not write.
pub(super) fn unwritable(store: &Path) -> Option<PathBuf> {
    let real = fs::canonicalize(store).unwrap_or_else(|_| store.to_owned());
    let companions = COMPANIONS.map(|suffix| with_suffix(&real, suffix));
    let directory = real.parent().unwrap_or(&real).to_owned();
    let mut all = [directory, real].into_iter().chain(companions);
    all.find(|path| path.symlink_metadata().is_ok() && !files::may_write(path))
}

/// What is not there, or cannot be looked at, is told by whoever opens it.
fn check(us: &Us, path: &Path) -> Result<()> {
    let Ok(metadata) = fs::metadata(path) else { return Ok(()) };
    match us.refuses_store((&metadata).into()) {
        None => Ok(()),
        Some(why) => {
            let what = if metadata.is_dir() { "directory" } else { "file" };
            let detail = format!("The {what} {} {why}.", path.display());
            Err(Error::new(ErrorKind::StoreUnavailable, detail))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u32 = 1000;
    const OURS: u32 = 2000;
    const STRANGER: u32 = 1001;
    const THEIRS: u32 = 2001;

    fn us() -> Us {
        Us { user: US, groups: vec![OURS, 2500] }
    }

    #[test]
    fn a_root_key_is_read_by_its_user_and_by_a_group_at_most() {
        for (user, group, mode, fine) in [
            (US, OURS, 0o600, true),
            (US, THEIRS, 0o400, true),
            (US, OURS, 0o640, true),
            (US, 2500, 0o440, true),
            (US, THEIRS, 0o640, false),
            (US, OURS, 0o660, false),
            (US, OURS, 0o610, false),
            (US, OURS, 0o604, false),
            (US, OURS, 0o601, false),
            (US, OURS, 0o602, false),
            // As Kubernetes with `fsGroup`, and systemd with an ACL, hand it out.
            (SUPERUSER, OURS, 0o440, true),
            (SUPERUSER, THEIRS, 0o440, true),
            (SUPERUSER, THEIRS, 0o400, true),
            (SUPERUSER, OURS, 0o444, false),
            (SUPERUSER, OURS, 0o460, false),
            (STRANGER, OURS, 0o440, false),
            (STRANGER, OURS, 0o400, false),
        ] {
            let refused = us().refuses_root_key(Found { user, group, mode });
            assert_eq!(refused.is_none(), fine, "{user} {group} {mode:o}: {refused:?}");
            if let Some(why) = refused {
                let remedies = ["`chmod 600`", "`chmod 440`", "`chown`"];
                assert!(remedies.iter().any(|remedy| why.contains(remedy)), "{why}");
            }
        }
    }

    #[test]
    fn a_store_is_written_by_its_user_and_its_groups_at_most() {
        for (user, group, mode, fine) in [
            (US, OURS, 0o700, true),
            (US, OURS, 0o644, true),
            (US, OURS, 0o775, true),
            (US, 2500, 0o2770, true),
            (US, THEIRS, 0o755, true),
            (US, THEIRS, 0o770, false),
            (US, OURS, 0o777, false),
            (US, OURS, 0o702, false),
            (SUPERUSER, OURS, 0o770, true),
            (SUPERUSER, THEIRS, 0o770, false),
            (SUPERUSER, SUPERUSER, 0o1777, false),
            (STRANGER, OURS, 0o700, false),
        ] {
            let refused = us().refuses_store(Found { user, group, mode });
            assert_eq!(refused.is_none(), fine, "{user} {group} {mode:o}: {refused:?}");
        }
    }

    /// The superuser can do everything, and still takes nothing that a stranger may change.
    #[test]
    fn the_superuser_follows_the_same_rules() {
        let us = Us { user: SUPERUSER, groups: vec![SUPERUSER] };
        let of = |user| Found { user, group: THEIRS, mode: 0o400 };
        assert!(us.refuses_root_key(of(SUPERUSER)).is_none());
        assert!(
            us.refuses_root_key(of(STRANGER)).is_some_and(|why| why.contains("run it as user"))
        );
        assert!(us.refuses_store(of(STRANGER)).is_some());
    }
}
