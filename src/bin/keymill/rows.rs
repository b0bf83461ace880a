//! What a command answers, row by row, and the formats in which rows are written.

use std::{borrow::Cow, ops::Range};

use clap::ValueEnum;
use keymill::{DataKeyRef, DecryptedRef, Error, RequestId};

#[cfg(feature = "arrow")]
use crate::arrow::write::ArrowRows;
use crate::{failure::Result, json::JsonRows, output::Output};

/// One row. Rows borrow the batch that they are results of.
#[derive(Clone)]
pub(crate) enum Row<'a> {
    /// A data key.
    Key {
        key: DataKeyRef<'a>,
        #[cfg_attr(not(feature = "arrow"), expect(dead_code, reason = "JSON has it in base64"))]
        aad: &'a [u8],
        /// The same in base64, as the request had it.
        aad_text: &'a str,
    },
    /// An unwrapped data key.
    Opened(DecryptedRef<'a>),
    /// A request that was refused, by the engine or before it.
    Refused { code: &'static str, message: String, id: [u8; 16] },
    /// An `Error` line of the input, as it is.
    Line(&'a [u8]),
    /// An `Error` row of the input in another format than the output's, or in a binary one.
    PassedOn(PassedOn<'a>),
}

/// What an `Error` row says. Nothing in it is ours, so anything may be missing.
#[derive(Clone, Debug)]
pub(crate) struct PassedOn<'a> {
    pub(crate) code: Option<Cow<'a, str>>,
    pub(crate) message: Option<Cow<'a, str>>,
    pub(crate) request_id: Option<Cow<'a, str>>,
}

impl PassedOn<'_> {
    /// Bytes of its texts.
    pub(crate) fn len(&self) -> usize {
        let texts = [&self.code, &self.message, &self.request_id];
        texts.into_iter().flatten().map(|text| text.len()).sum()
    }
}

/// The rows of a window, for the threads that format them. Not a vector of all rows: making one takes a sixth of the
/// time in which `generate` makes a data key and its line.
pub(crate) trait Window: Sync {
    fn len(&self) -> usize;

    /// Calls `with` for each of `rows` in their order.
    fn each<'s>(&'s self, rows: Range<usize>, with: impl FnMut(&Row<'s>));

    /// The largest of what `measure` says of each row.
    fn largest(&self, measure: impl Fn(&Row<'_>) -> usize) -> usize {
        let mut largest = 0;
        self.each(0..self.len(), |row| largest = largest.max(measure(row)));
        largest
    }
}

impl Window for Vec<Row<'_>> {
    fn len(&self) -> usize {
        self.len()
    }

    fn each<'s>(&'s self, rows: Range<usize>, with: impl FnMut(&Row<'s>)) {
        self[rows].iter().for_each(with);
    }
}

impl Row<'_> {
    /// The row of a request that the engine refused.
    pub(crate) fn of_error(error: &Error, id: RequestId) -> Self {
        Self::Refused { code: error.code(), message: error.message(), id: *id.as_bytes() }
    }

    #[cfg(feature = "arrow")]
    pub(crate) fn is_refusal(&self) -> bool {
        !matches!(self, Self::Key { .. } | Self::Opened(_))
    }
}

/// How rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    // Not documentation, which `--help` would spread over a page.
    // JSON Lines, bytes in base64.
    Jsonl,
    // An Arrow IPC stream, bytes as they are.
    #[cfg(feature = "arrow")]
    Arrow,
}

/// Which fields the rows of a command have, beside `Error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fields {
    /// Those of a generated data key.
    Generated { plaintext: bool },
    /// Those of an unwrapped one.
    Opened,
}

/// Rows on their way to an output.
pub(crate) enum Rows {
    Json(JsonRows),
    #[cfg(feature = "arrow")]
    Arrow(Box<ArrowRows>),
}

impl Rows {
    /// # Errors
    /// Refuses to show binary rows to people.
    #[cfg_attr(not(feature = "arrow"), expect(unused_variables, reason = "columns alone need it"))]
    pub(crate) fn new(format: Format, fields: Fields, output: Output) -> Result<Self> {
        match format {
            Format::Jsonl => Ok(Self::Json(JsonRows::new(output))),
            #[cfg(feature = "arrow")]
            Format::Arrow => Ok(Self::Arrow(Box::new(ArrowRows::new(fields, output)?))),
        }
    }

    /// Writes a window of rows, none of which waits for further input.
    pub(crate) fn write(&mut self, rows: &impl Window) -> Result<()> {
        match self {
            Self::Json(json) => json.write(rows),
            #[cfg(feature = "arrow")]
            Self::Arrow(arrow) => arrow.write(rows),
        }
    }

    /// The row of an `Error` line.
    pub(crate) fn of_line<'a>(&self, line: &'a [u8]) -> Row<'a> {
        match self {
            Self::Json(_) => Row::Line(line),
            #[cfg(feature = "arrow")]
            Self::Arrow(_) => Row::PassedOn(crate::json::passed_on(line)),
        }
    }

    /// Completes the output.
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Json(json) => json.finish(),
            #[cfg(feature = "arrow")]
            Self::Arrow(arrow) => arrow.finish(),
        }
    }
}

/// A request id as text. `RequestId` prints the same, through the slower formatting machinery.
pub(crate) fn with_id_text<T>(id: [u8; 16], with: impl FnOnce(&str) -> T) -> T {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    with(uuid::Uuid::from_bytes(id).hyphenated().encode_lower(&mut text))
}
