//! Writes rows as an Arrow IPC stream: a record batch for a window, its columns filled in parallel.
//!
//! Data keys lie in a column of ours (`columns`), and small batches of them in the buffer of small writes below. Both
//! are wiped. Arrow's writer makes no copy of a column as long as it does not compress: it hands our memory to [`Sink`]
//! as it is. It does not promise that; what it allocates for itself, a message's metadata today, is beyond our reach.

use std::{
    io::{self, Write},
    mem,
    ops::Range,
    sync::Arc,
};

use arrow_array::{ArrayRef, RecordBatch, StructArray, new_null_array};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{self as schema, ArrowError, DataType, Schema, SchemaRef};
use rayon::prelude::*;
use zeroize::Zeroizing;

use super::{COLUMNS, ERROR, Field, columns::Column};
use crate::{
    failure::{Failure, Result, hint},
    output::Output,
    rows::{Fields, Row, Window},
};

/// Most bytes of a record batch, roughly, unless a single row has more: a window of 16,384 keys of 32 bytes takes half
/// of it, and one whose rows have 8 KiB of AAD becomes many batches.
const BATCH_LEN_MAX: usize = 8 << 20;
/// A smaller batch is filled on the caller's thread. Chosen, not measured.
const PARALLEL_ROWS_MIN: usize = 512;
/// Bytes of a row beside data key, blob and AAD.
const ROW_LEN: usize = 160;
/// Writes below a quarter of this are put together.
const SINK_LEN: usize = 64 << 10;

/// An Arrow stream on its way to an output.
pub(crate) struct ArrowRows {
    writer: StreamWriter<Sink>,
    schema: SchemaRef,
    /// The columns beside `Error`.
    columns: Vec<Column>,
    /// The members of `Error`.
    error: [Column; 2],
    /// Memory for the rows of a batch: every column goes through them once.
    rows: Vec<Row<'static>>,
}

impl ArrowRows {
    pub(crate) fn new(fields: Fields, output: Output) -> Result<Self> {
        if output.is_terminal() {
            return Err(Failure::refused(
                "--format arrow is binary, and the output is a terminal",
                "name a file with --out, or lead the output into a program that reads Arrow",
            ));
        }
        let has = |field: &Field| match fields {
            Fields::Generated { plaintext } => plaintext || *field != Field::Plaintext,
            Fields::Opened => !matches!(field, Field::Iv | Field::CiphertextBlob | Field::Aad),
        };
        let columns: Vec<_> = COLUMNS.into_iter().filter(has).map(Column::new).collect();
        let error = [Field::Code, Field::Message].map(Column::new);
        let field = |column: &Column| {
            // A refused row has `Error` and `RequestId` alone.
            schema::Field::new(column.field.name(), column.data_type(), true)
        };
        let of_error = DataType::Struct(error.iter().map(field).collect());
        let all = columns.iter().map(field).chain([schema::Field::new(ERROR, of_error, true)]);
        let schema = Arc::new(Schema::new(all.collect::<Vec<_>>()));
        let sink =
            Sink { output, small: Zeroizing::new(Vec::with_capacity(SINK_LEN)), failure: None };
        let writer = StreamWriter::try_new(sink, &schema).map_err(|error| broke(&error))?;
        Ok(Self { writer, schema, columns, error, rows: Vec::new() })
    }

    pub(crate) fn write(&mut self, window: &impl Window) -> Result<()> {
        let mut rows: Vec<Row<'_>> = mem::take(&mut self.rows);
        for range in batches(window) {
            rows.clear();
            window.each(range, |row| rows.push(row.clone()));
            let done = self.write_batch(&rows);
            done.map_err(|error| self.failure(&error))?;
        }
        rows.clear();
        // Collected in place: the same memory, for rows of any lifetime.
        self.rows = rows.into_iter().map(|_| unreachable!("there are none")).collect();
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<()> {
        // Writes the end of the stream, and flushes.
        let done = self.writer.finish();
        done.map_err(|error| self.failure(&error))?;
        let sink = self.writer.into_inner().map_err(|error| broke(&error))?;
        sink.output.finish()
    }

    fn write_batch(&mut self, rows: &[Row<'_>]) -> Result<(), ArrowError> {
        if rows.len() < PARALLEL_ROWS_MIN || keymill::parallelism() == 1 {
            self.columns.iter_mut().for_each(|column| column.fill(rows));
        } else {
            self.columns.par_iter_mut().with_max_len(1).for_each(|column| column.fill(rows));
        }
        let mut arrays = Vec::with_capacity(self.columns.len() + 1);
        for column in &mut self.columns {
            arrays.push(column.lend()?);
        }
        arrays.push(self.lend_error(rows)?);
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), arrays)?;
        self.writer.write(&batch)?;
        self.writer.flush()
    }

    /// The column `Error`.
    fn lend_error(&mut self, rows: &[Row<'_>]) -> Result<ArrayRef, ArrowError> {
        let last = self.schema.fields().last().expect("`Error` is the last");
        if !rows.iter().any(Row::is_refusal) {
            return Ok(new_null_array(last.data_type(), rows.len()));
        }
        let DataType::Struct(fields) = last.data_type() else { unreachable!("made in `new`") };
        let valid: Vec<bool> = rows.iter().map(Row::is_refusal).collect();
        let mut members = Vec::with_capacity(self.error.len());
        for column in &mut self.error {
            column.fill(rows);
            members.push(column.lend()?);
        }
        Ok(Arc::new(StructArray::try_new(fields.clone(), members, Some(valid.into()))?))
    }

    /// What a failed write means: the output's own failure, if there was one.
    fn failure(&mut self, error: &ArrowError) -> Failure {
        self.writer.get_mut().failure.take().unwrap_or_else(|| broke(error))
    }
}

/// Cuts a window: a batch has at least one row.
fn batches(rows: &impl Window) -> Vec<Range<usize>> {
    let mut batches = Vec::new();
    let (mut start, mut end, mut len) = (0, 0, 0);
    if rows.len().saturating_mul(rows.largest(len_of)) <= BATCH_LEN_MAX {
        end = rows.len();
    } else {
        rows.each(0..rows.len(), |row| {
            let row_len = len_of(row);
            if len + row_len > BATCH_LEN_MAX && end > start {
                batches.push(start..end);
                (start, len) = (end, 0);
            }
            end += 1;
            len += row_len;
        });
    }
    if end > start {
        batches.push(start..end);
    }
    batches
}

/// Bytes of a row, roughly.
fn len_of(row: &Row<'_>) -> usize {
    let values = match row {
        Row::Key { key, aad, .. } => {
            key.plaintext().map_or(0, <[u8]>::len) + key.ciphertext_blob().len() + aad.len()
        }
        Row::Opened(key) => key.plaintext().len(),
        Row::Refused { message, .. } => message.len(),
        Row::Line(line) => line.len(),
        Row::PassedOn(row) => row.len(),
    };
    ROW_LEN + values
}

fn broke(error: &ArrowError) -> Failure {
    Failure::broke(
        format!("cannot make an Arrow stream: {error}"),
        hint(keymill::ErrorKind::Machine),
    )
}

/// An output as Arrow's writer needs it.
struct Sink {
    output: Output,
    /// Small writes: a message begins with a dozen of them.
    small: Zeroizing<Vec<u8>>,
    /// Why a write failed.
    failure: Option<Failure>,
}

impl Sink {
    fn write_out(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write(bytes).map_err(|failure| {
            self.failure = Some(failure);
            io::ErrorKind::Other.into()
        })
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.small.len() + bytes.len() > SINK_LEN {
            self.flush()?;
        }
        if bytes.len() > SINK_LEN / 4 {
            self.flush()?;
            self.write_out(bytes)?;
        } else {
            self.small.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut small = mem::take(&mut self.small);
        let done = if small.is_empty() { Ok(()) } else { self.write_out(&small) };
        small.clear();
        self.small = small;
        done
    }
}
