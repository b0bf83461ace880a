//! One call, many items: `plan` and `lookup` (pure decisions), `run` (the work) and `fan_out` (shared among threads),
//! `resolve` and `open` (the same for decrypting), `name` (what both look up), `result` (the columnar result),
//! `data_key` (one of its items, owned).

pub(crate) mod data_key;
pub(crate) mod fan_out;
pub(crate) mod helpers;
mod lookup;
mod name;
pub(crate) mod open;
pub(crate) mod plan;
pub(crate) mod resolve;
pub(crate) mod result;
pub(crate) mod run;

use crate::{
    error::{Error, ErrorKind, Result},
    limits::{BATCH_ITEMS_MAX, BATCH_OUTPUT_MAX},
    request::{GenerateDataKeyRequest, aads::AadSource},
};

/// Where the AADs of a batch's items are.
#[derive(Clone, Copy)]
pub(crate) enum Aads<'a> {
    Requests(&'a [GenerateDataKeyRequest<'a>]),
    Source(&'a dyn AadSource),
}

/// Stands for an item that was refused.
pub(crate) const NO_SLOT: u32 = u32::MAX;

/// # Errors
/// `LimitExceeded` for more items than one call takes.
pub(crate) fn check_item_count(count: usize) -> Result<()> {
    if count <= BATCH_ITEMS_MAX {
        return Ok(());
    }
    let detail = format!("The batch has {count} items; at most {BATCH_ITEMS_MAX} are allowed.");
    Err(Error::new(ErrorKind::LimitExceeded, detail))
}

/// # Errors
/// `LimitExceeded` for more output than one call returns.
pub(crate) fn check_output(bytes: usize) -> Result<()> {
    if bytes <= BATCH_OUTPUT_MAX {
        return Ok(());
    }
    let detail =
        format!("The batch returns {bytes} bytes; at most {BATCH_OUTPUT_MAX} (1 GiB) are allowed.");
    Err(Error::new(ErrorKind::LimitExceeded, detail))
}
