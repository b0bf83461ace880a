//! One column of a record batch: filled from rows, lent to Arrow, and used again.
//!
//! The bytes of a column lie in memory of ours that Arrow only borrows: it is wiped when it is given up, and has its
//! full size before the first data key is written.

use std::{mem, sync::Arc};

use arrow_array::{ArrayRef, BinaryArray, StringArray};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_schema::{ArrowError, DataType};
use bytes::Bytes;
use zeroize::Zeroizing;

use super::Field;
use crate::rows::{PassedOn, Row, with_id_text};

/// The values of one field.
pub(super) struct Column {
    pub(super) field: Field,
    bytes: Arc<Zeroizing<Vec<u8>>>,
    /// Where each value ends, after a first 0.
    offsets: Vec<i32>,
    /// Rows without a value.
    nulls: Vec<usize>,
}

/// The memory of a column as Arrow holds it.
struct Lent(Arc<Zeroizing<Vec<u8>>>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Column {
    pub(super) fn new(field: Field) -> Self {
        Self { field, bytes: Arc::default(), offsets: Vec::new(), nulls: Vec::new() }
    }

    pub(super) fn data_type(&self) -> DataType {
        if self.field.is_bytes() { DataType::Binary } else { DataType::Utf8 }
    }

    /// Takes the values of `rows` in place of those that it had.
    pub(super) fn fill(&mut self, rows: &[Row<'_>]) {
        let len = match self.field {
            Field::Plaintext => rows.iter().filter_map(plaintext).map(<[u8]>::len).sum(),
            // Public: growing leaves nothing behind that matters.
            _ => 0,
        };
        // All on this thread's stack meanwhile: see `fill` of `json`.
        let mut bytes = Arc::get_mut(&mut self.bytes).map(mem::take).unwrap_or_default();
        if bytes.capacity() < len {
            // Not grown, which would copy. What it replaces is wiped.
            bytes = Zeroizing::new(Vec::with_capacity(len));
        }
        bytes.clear();
        let (mut offsets, mut nulls) = (Vec::with_capacity(rows.len() + 1), Vec::new());
        offsets.push(0);
        for (index, row) in rows.iter().enumerate() {
            if !put(self.field, row, &mut bytes) {
                nulls.push(index);
            }
            offsets.push(i32::try_from(bytes.len()).expect("batches are cut far below 2 GiB"));
        }
        *self = Self { field: self.field, bytes: Arc::new(bytes), offsets, nulls };
    }

    /// The values as Arrow has them. The column is to be filled again when the array is gone.
    pub(super) fn lend(&mut self) -> Result<ArrayRef, ArrowError> {
        let offsets = OffsetBuffer::new(mem::take(&mut self.offsets).into());
        let len = offsets.len() - 1;
        let bytes = Buffer::from(Bytes::from_owner(Lent(Arc::clone(&self.bytes))));
        let nulls = (!self.nulls.is_empty()).then(|| {
            let mut valid = vec![true; len];
            self.nulls.iter().for_each(|index| valid[*index] = false);
            NullBuffer::from(valid)
        });
        Ok(match self.field.is_bytes() {
            true => Arc::new(BinaryArray::try_new(offsets, bytes, nulls)?),
            false => Arc::new(StringArray::try_new(offsets, bytes, nulls)?),
        })
    }
}

fn plaintext<'a>(row: &Row<'a>) -> Option<&'a [u8]> {
    match row {
        Row::Key { key, .. } => key.plaintext(),
        Row::Opened(key) => Some(key.plaintext()),
        _ => None,
    }
}

/// Appends the value of a row. `false` if it has none.
fn put(field: Field, row: &Row<'_>, out: &mut Vec<u8>) -> bool {
    let mut some = |bytes: &[u8]| {
        out.extend_from_slice(bytes);
        true
    };
    match (field, row) {
        (Field::KeyId, Row::Key { key, .. }) => some(key.key_id().as_str().as_bytes()),
        (Field::KeyId, Row::Opened(key)) => some(key.key_id().as_str().as_bytes()),
        (Field::KeyVersionId, Row::Key { key, .. }) => {
            some(key.key_version_id().as_str().as_bytes())
        }
        (Field::KeyVersionId, Row::Opened(key)) => some(key.key_version_id().as_str().as_bytes()),
        (Field::Iv, Row::Key { key, .. }) => some(key.iv()),
        (Field::Plaintext, row) => plaintext(row).is_some_and(some),
        (Field::CiphertextBlob, Row::Key { key, .. }) => some(key.ciphertext_blob()),
        (Field::Algorithm, Row::Key { key, .. }) => some(key.algorithm().as_bytes()),
        (Field::Algorithm, Row::Opened(key)) => some(key.algorithm().as_bytes()),
        (Field::Aad, Row::Key { aad, .. }) => some(aad),
        (Field::RequestId, row) => {
            let id = match row {
                Row::Key { key, .. } => *key.request_id().as_bytes(),
                Row::Opened(key) => *key.request_id().as_bytes(),
                Row::Refused { id, .. } => *id,
                Row::PassedOn(PassedOn { request_id, .. }) => {
                    return request_id.as_ref().is_some_and(|id| some(id.as_bytes()));
                }
                Row::Line(_) => return false,
            };
            with_id_text(id, |id| some(id.as_bytes()))
        }
        (Field::Code, Row::Refused { code, .. }) => some(code.as_bytes()),
        (Field::Code, Row::PassedOn(PassedOn { code: Some(code), .. })) => some(code.as_bytes()),
        (Field::Message, Row::Refused { message, .. }) => some(message.as_bytes()),
        (Field::Message, Row::PassedOn(PassedOn { message: Some(message), .. })) => {
            some(message.as_bytes())
        }
        _ => false,
    }
}
