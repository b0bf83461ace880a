//! One call, many items: `plan` (pure decisions), `run` (the work, fanned out), `result` (the columnar result).

pub(crate) mod open;
pub(crate) mod plan;
pub(crate) mod result;
pub(crate) mod run;

use crate::{
    error::{Error, ErrorKind, Result},
    limits::{BATCH_ITEMS_MAX, BATCH_OUTPUT_MAX},
    wrap::blob::Form,
};

/// What distinguishes the four generating operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operation {
    /// Raw blobs are wrapped under the initial version, self-describing ones under the primary one.
    pub(crate) form: Form,
    /// Whether the data keys are returned.
    pub(crate) plaintext: bool,
}

/// Where each item of a batch lies.
pub(crate) enum Slots {
    /// Item *i* in slot *i*.
    Same,
    /// Item *i* in slot `map[i]`; [`NO_SLOT`] for a refused one.
    Map(Vec<u32>),
}

/// Stands for an item that was refused.
pub(crate) const NO_SLOT: u32 = u32::MAX;

impl Slots {
    /// The slot of item `index`, unless it was refused.
    pub(crate) fn of(&self, index: usize) -> Option<usize> {
        match self {
            Self::Same => Some(index),
            Self::Map(map) => (map[index] != NO_SLOT).then_some(map[index] as usize),
        }
    }
}

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
