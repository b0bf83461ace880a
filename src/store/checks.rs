//! What is checked of a store before it is used: its path, its file, and then what is in it.
//!
//! Each refusal has a sentence of its own, and nothing is written meanwhile.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    image::load,
    meta::{Meta, StoredMeta, Verdict},
    permissions, place,
    root_key::RootKey,
    schema::{Open, Outcome, corrupt},
    seal::StoreKeys,
};
use crate::{
    cpu::Tier,
    error::{Error, ErrorKind, Result},
};

/// How much of a store is verified.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// That the file is sound, and that it is a store under this root key.
    Head,
    /// Every record as well.
    Whole,
}

/// Opens a store of unknown id, checks it, writes nothing, and closes it.
pub(super) fn open_first(
    path: &Path,
    root: &RootKey,
    tier: Tier,
    extent: Extent,
) -> Outcome<(StoreKeys, Meta)> {
    let open = Open::file(path)?;
    let found = verify(&open, path, root, tier, extent)?;
    open.check_writable(path)?;
    Ok(found)
}

/// Checks a store as of one moment: nothing gets between the look at its schema and what trusts it.
pub(super) fn verify(
    open: &Open,
    path: &Path,
    root: &RootKey,
    tier: Tier,
    extent: Extent,
) -> Outcome<(StoreKeys, Meta)> {
    let transaction = open.sqlite.unchecked_transaction()?;
    open.check_format(path)?;
    let stored = StoredMeta::read(&open.sqlite)?;
    let keys = StoreKeys::derive(root, stored.id, tier)?;
    match stored.verdict(&keys) {
        Verdict::Good => open.check_soundness()?,
        Verdict::Damaged => return Err(corrupt("meta", "the store")),
        Verdict::WrongRootKey => {
            let detail = format!("It belongs to another store than {}.", path.display());
            return Err(Error::new(ErrorKind::WrongRootKey, detail).into());
        }
    }
    if extent == Extent::Whole {
        load(&open.sqlite, &keys)?;
    }
    transaction.commit()?;
    Ok((keys, stored.meta))
}

/// Checks that a store can lie at this path, whether or not there is one: `InvalidParameter` tells how long a path may
/// be. For programs that make directories and other files before they make the store.
///
/// # Errors
/// `InvalidParameter` if the path, or a name in it, is too long.
pub fn check_store_path(path: impl AsRef<Path>) -> Result<()> {
    check_path(&absolute(path.as_ref())?)
}

pub(super) fn check_path(path: &Path) -> Result<()> {
    place::check_length(path).map_err(Error::invalid)
}

/// Looks at the file without opening it: closing a descriptor of it would drop the locks that SQLite holds on it.
pub(super) fn check_file(path: &Path) -> Result<()> {
    check_path(path)?;
    let unavailable =
        |why: &str| Error::new(ErrorKind::StoreUnavailable, format!("{} {why}.", path.display()));
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(unavailable("is a directory")),
        Ok(metadata) if !metadata.is_file() => Err(unavailable("is no file")),
        Ok(_) => permissions::check_store(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let detail = match fs::read_link(path) {
                Ok(target) => {
                    let (path, target) = (path.display(), target.display());
                    format!("{path} is a link to {target}, and there is no file.")
                }
                Err(_) => format!("There is no file {}.", path.display()),
            };
            Err(Error::new(ErrorKind::StoreMissing, detail))
        }
        Err(error) => Err(unavailable(&format!("cannot be read: {error}"))),
    }
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| {
        let detail = format!("The path {} means nothing: {error}.", path.display());
        Error::new(ErrorKind::StoreUnavailable, detail)
    })
}
