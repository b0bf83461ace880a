//! Reads Arrow IPC streams of wrapped keys: a record batch at a time, with every length checked before it is believed.
//!
//! As strict as the reading of JSON Lines: an unknown or repeated column or one of another type refuses the stream,
//! since a misspelt `Aad` must not silently become no AAD. A stream without its end marker was cut off, or never
//! completed, and is refused too; its whole batches have been decrypted by then. A message may hold data keys, so its
//! memory is wiped.

use std::{borrow::Cow, ops::Range};

use arrow_ipc::{Endianness, Message, MessageHeader, MetadataVersion, Schema, Type};
use keymill::DecryptRequest;
use zeroize::Zeroizing;

use super::{
    COLUMNS, CONTINUATION, ERROR, Field,
    views::{Checked, Layout, Parts, Validity, View},
};
use crate::{
    decrypt::Item,
    failure::{Failure, Result, quoted},
    lines::{LINE_LEN_MAX, Lines},
    rows::PassedOn,
};

/// Most bytes of a message's description.
const METADATA_LEN_MAX: usize = 1 << 20;
/// Most bytes of a message's columns.
const BODY_LEN_MAX: usize = 256 << 20;
/// Memory that is there before the first byte of a body; beyond, it doubles as bytes arrive.
const BODY_LEN_FIRST: usize = 8 << 20;

/// An Arrow stream.
pub(crate) struct ArrowReader {
    input: Lines,
    /// Whether messages begin with a mark, as they do since Arrow 0.15. `None` before the first.
    marked: Option<bool>,
    columns: Vec<Kind>,
    /// The description of the message at hand.
    metadata: Vec<u8>,
    /// Its columns.
    body: Zeroizing<Vec<u8>>,
    rows_before: u64,
    bytes_read: u64,
}

/// A column of the schema.
enum Kind {
    Values(Field, Layout),
    /// `Error`, and its members.
    Error(Vec<(Field, Layout)>),
    /// `Error` by a writer that has never seen one, and so knows no type for it.
    NoError,
}

/// A record batch.
pub(crate) struct Batch<'a> {
    rows: usize,
    views: [Option<View<'a>>; COLUMNS.len()],
    error: Option<Refusals<'a>>,
    /// The number of the first row, counted from 1.
    pub(crate) first_number: u64,
    /// Bytes of input that were read for this batch.
    pub(crate) bytes_read: u64,
}

/// The column `Error`.
struct Refusals<'a> {
    valid: Validity<'a>,
    code: Option<View<'a>>,
    message: Option<View<'a>>,
}

impl Refusals<'_> {
    /// Whether there is an error: some writers have no null for a struct, and write one of nulls.
    fn says_something(&self, row: usize) -> bool {
        let has =
            |view: &Option<View<'_>>| view.as_ref().is_some_and(|view| view.get(row).is_some());
        self.valid.get(row) && (has(&self.code) || has(&self.message))
    }
}

/// Why there is no message.
enum Ended {
    /// The end marker.
    Marked,
    /// Something that is refused.
    Refused(String),
    /// A source that cannot be read.
    Failed(Failure),
}

impl From<String> for Ended {
    fn from(what: String) -> Self {
        Self::Refused(what)
    }
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl ArrowReader {
    /// Reads the schema.
    pub(crate) fn new(input: Lines) -> Result<Self> {
        let mut reader = Self {
            input,
            marked: None,
            columns: Vec::new(),
            metadata: Vec::new(),
            body: Zeroizing::default(),
            rows_before: 0,
            bytes_read: 0,
        };
        let done = reader.next_message().and_then(|()| {
            let message = message(&reader.metadata)?;
            let schema =
                message.header_as_schema().ok_or("it does not begin with a schema".to_owned())?;
            reader.columns = columns(schema)?;
            Ok(())
        });
        match done {
            Ok(()) => Ok(reader),
            Err(Ended::Marked) => Err(reader.refused("it ends before its schema")),
            Err(Ended::Refused(what)) => Err(reader.refused(&what)),
            Err(Ended::Failed(failure)) => Err(failure),
        }
    }

    /// The next record batch; `None` at the end.
    pub(crate) fn next_batch(&mut self) -> Result<Option<Batch<'_>>> {
        match self.next_message() {
            Ok(()) => {}
            Err(Ended::Marked) => return self.end().map(|()| None),
            Err(Ended::Refused(what)) => return Err(self.refused(&what)),
            Err(Ended::Failed(failure)) => return Err(failure),
        }
        let first_number = self.rows_before + 1;
        let bytes_read = std::mem::take(&mut self.bytes_read);
        match batch(&self.metadata, &self.body, &self.columns) {
            Ok((rows, views, error)) => {
                self.rows_before += rows as u64;
                Ok(Some(Batch { rows, views, error, first_number, bytes_read }))
            }
            Err(what) => Err(self.refused(&what)),
        }
    }

    fn refused(&self, what: &str) -> Failure {
        Failure::refused(
            format!(
                "{} is no Arrow stream that can be read: after row {}, {what}",
                self.input.name(),
                self.rows_before
            ),
            "columns are Binary or Utf8 (or their Large or View forms, or FixedSizeBinary), as \
             `generate --format arrow` writes them, in record batches below 256 MiB without \
             compression (`compression=None` of pyarrow's IpcWriteOptions, `compression=\
             'uncompressed'` of polars); a stream that was cut off has to be made again",
        )
    }

    /// # Errors
    /// If there is anything after the end: another stream's keys would be left out in silence.
    fn end(&mut self) -> Result<()> {
        match self.input.take(&mut [0])? {
            0 => Ok(()),
            _ => Err(self.refused("more bytes follow its end")),
        }
    }

    /// Reads a message into `metadata` and `body`.
    fn next_message(&mut self) -> Result<(), Ended> {
        let mut head = [0; 4];
        let cut_off = || Ended::Refused("it is cut off: its end marker is missing".into());
        let mut head_len = self.input.take(&mut head)?;
        // The first message decides which of the two framings the stream has.
        let marked = *self.marked.get_or_insert(head == CONTINUATION);
        if marked && head_len == head.len() {
            if head != CONTINUATION {
                let what = "a message begins with other bytes than its mark";
                return Err(Ended::Refused(what.into()));
            }
            head_len = self.input.take(&mut head)?;
        }
        if head_len < head.len() {
            return Err(cut_off());
        }
        let len = i32::from_le_bytes(head);
        let len = match usize::try_from(len) {
            Ok(0) => return Err(Ended::Marked),
            Ok(len) if len <= METADATA_LEN_MAX => len,
            _ => return Err(Ended::Refused(format!("a message declares {len} bytes of metadata"))),
        };
        self.metadata.resize(len, 0);
        if self.input.take(&mut self.metadata)? < len {
            return Err(cut_off());
        }
        let declared = message(&self.metadata)?.bodyLength();
        let body_len = match usize::try_from(declared) {
            Ok(len) if len <= BODY_LEN_MAX => len,
            _ => return Err(Ended::Refused(format!("a message declares {declared} bytes"))),
        };
        if self.read_body(body_len)? < body_len {
            return Err(cut_off());
        }
        let head_len = if marked { 2 * head.len() } else { head.len() };
        self.bytes_read += (head_len + len + body_len) as u64;
        Ok(())
    }

    /// Reads so many bytes, and returns how many there were. What a liar declares is not taken from the system: memory
    /// grows with the bytes that arrive.
    fn read_body(&mut self, len: usize) -> Result<usize> {
        self.body.clear();
        let mut filled = 0;
        loop {
            let target = len.min(self.body.capacity().max(BODY_LEN_FIRST));
            if target > self.body.capacity() {
                // For the first bytes alone; what it replaces is wiped.
                self.body = Zeroizing::new(Vec::with_capacity(target));
            }
            self.body.resize(target, 0);
            filled += self.input.take(&mut self.body[filled..])?;
            if filled < target || target == len {
                return Ok(filled);
            }
            // Not grown, which would leave the bytes behind.
            let mut larger = Zeroizing::new(Vec::with_capacity(len.min(2 * target)));
            larger.extend_from_slice(&self.body);
            self.body = larger;
        }
    }
}

/// The message that `metadata` describes.
fn message(metadata: &[u8]) -> Checked<Message<'_>> {
    let message = arrow_ipc::root_as_message(metadata)
        .map_err(|_| "the metadata of a message is malformed".to_owned())?;
    match message.version() {
        MetadataVersion::V4 | MetadataVersion::V5 => Ok(message),
        version => Err(format!("its format version is {}", version.0)),
    }
}

/// The columns of a schema.
fn columns(schema: Schema<'_>) -> Checked<Vec<Kind>> {
    if schema.endianness() != Endianness::Little {
        return Err("it is big-endian".into());
    }
    let mut columns = Vec::new();
    let mut names = Vec::new();
    for field in schema.fields().into_iter().flatten() {
        let name = once(&field, &mut names)?;
        columns.push(if name == ERROR && field.type_type() == Type::Null {
            Kind::NoError
        } else if name == ERROR {
            Kind::Error(error_members(&field)?)
        } else {
            let known =
                COLUMNS.into_iter().find(|known| known.name() == name).ok_or_else(|| {
                    format!(
                        "column {} is unknown; a result has {} and {ERROR}",
                        quoted(name),
                        COLUMNS.map(Field::name).join(", ")
                    )
                })?;
            Kind::Values(known, layout(known, &field)?)
        });
    }
    let blob = |kind: &Kind| matches!(kind, Kind::Values(Field::CiphertextBlob, _));
    if columns.iter().any(blob) { Ok(columns) } else { Err("it has no CiphertextBlob".into()) }
}

/// The name of a field, unless another has it.
fn once<'a>(field: &arrow_ipc::Field<'a>, names: &mut Vec<&'a str>) -> Checked<&'a str> {
    let name = field.name().unwrap_or_default();
    if names.contains(&name) {
        return Err(format!("column {} is there twice", quoted(name)));
    }
    names.push(name);
    if field.dictionary().is_some() {
        return Err(format!("column {} is dictionary-encoded", quoted(name)));
    }
    Ok(name)
}

/// The members of `Error`.
fn error_members(field: &arrow_ipc::Field<'_>) -> Checked<Vec<(Field, Layout)>> {
    if field.type_type() != Type::Struct_ {
        return Err(format!("column {ERROR} is no struct of Code and Message"));
    }
    let mut names = Vec::new();
    let members = field.children().into_iter().flatten().map(|member| {
        let name = once(&member, &mut names)?;
        let known = [Field::Code, Field::Message].into_iter().find(|known| known.name() == name);
        let known = known.ok_or_else(|| format!("{ERROR} has a member {}", quoted(name)))?;
        Ok((known, layout(known, &member)?))
    });
    members.collect()
}

/// How the values of `field` lie, if its type is right for `known`.
fn layout(known: Field, field: &arrow_ipc::Field<'_>) -> Checked<Layout> {
    let kind = field.type_type();
    // Not used for decryption: text or bytes, as others may keep them.
    let either = matches!(known, Field::Plaintext | Field::RequestId);
    let (bytes, text) = (known.is_bytes() || either, !known.is_bytes() || either);
    let width = || {
        let width = field.type_as_fixed_size_binary()?.byteWidth();
        // Without bytes there would be no end to the rows that fit a message.
        usize::try_from(width).ok().filter(|width| *width > 0)
    };
    match kind {
        Type::Null if known != Field::CiphertextBlob => Ok(Layout::Null),
        Type::Binary if bytes => Ok(Layout::Small),
        Type::LargeBinary if bytes => Ok(Layout::Large),
        Type::BinaryView if bytes => Ok(Layout::Views),
        Type::Utf8View if text => Ok(Layout::Views),
        Type::Utf8 if text => Ok(Layout::Small),
        Type::LargeUtf8 if text => Ok(Layout::Large),
        Type::FixedSizeBinary if bytes => {
            width().map(Layout::Fixed).ok_or_else(|| format!("{} has no width", known.name()))
        }
        _ => Err(format!(
            "column {} has type {}, and not {}",
            known.name(),
            kind.variant_name().unwrap_or("unknown"),
            if known.is_bytes() {
                "Binary, LargeBinary, BinaryView or FixedSizeBinary"
            } else {
                "Utf8, LargeUtf8 or Utf8View"
            }
        )),
    }
}

type Views<'a> = (usize, [Option<View<'a>>; COLUMNS.len()], Option<Refusals<'a>>);

/// The columns of a record batch.
fn batch<'a>(metadata: &[u8], body: &'a [u8], columns: &[Kind]) -> Checked<Views<'a>> {
    let message = message(metadata)?;
    let header = message.header_type();
    let batch = message
        .header_as_record_batch()
        .ok_or_else(|| format!("a message is a {}", header.variant_name().unwrap_or("stranger")))?;
    debug_assert_eq!(header, MessageHeader::RecordBatch);
    let mut parts = Parts::new(batch, body)?;
    let mut views = [const { None }; COLUMNS.len()];
    let mut error = None;
    for kind in columns {
        match kind {
            Kind::Values(field, layout) => {
                let place = COLUMNS.iter().position(|known| known == field).expect("is a column");
                views[place] = Some(parts.column(*field, *layout)?);
            }
            Kind::NoError => parts.nothing(ERROR)?,
            Kind::Error(members) => {
                let valid = parts.validity(ERROR)?;
                let mut refusals = Refusals { valid, code: None, message: None };
                for (field, layout) in members {
                    let view = Some(parts.column(*field, *layout)?);
                    match field {
                        Field::Code => refusals.code = view,
                        _ => refusals.message = view,
                    }
                }
                error = Some(refusals);
            }
        }
    }
    let rows = parts.rows();
    parts.end()?;
    Ok((rows, views, error))
}

impl<'a> Batch<'a> {
    /// The rows in windows of at most `len`.
    pub(crate) fn windows(&self, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.rows;
        (0..rows).step_by(len).map(move |start| start..rows.min(start + len))
    }

    /// A row as the engine or the output needs it.
    pub(crate) fn item(&self, row: usize) -> Item<'a> {
        self.read(row).unwrap_or_else(|what| {
            let number = self.first_number + row as u64;
            Item::Malformed(format!("Row {number}: {what}").into())
        })
    }

    fn read(&self, row: usize) -> Checked<Item<'a>> {
        let Some(blob) = self.bytes(Field::CiphertextBlob, row) else {
            return match self.error.as_ref().filter(|error| error.says_something(row)) {
                Some(error) => self.refusal(error, row).map(Item::Row),
                None => Err("CiphertextBlob is missing.".into()),
            };
        };
        let mut request = DecryptRequest::new(blob);
        request.key_id = self.text(Field::KeyId, row)?;
        request.iv = self.bytes(Field::Iv, row);
        request.aad = self.bytes(Field::Aad, row).unwrap_or_default();
        request.algorithm = self.text(Field::Algorithm, row)?;
        Ok(Item::Request(request))
    }

    fn refusal(&self, error: &Refusals<'a>, row: usize) -> Checked<PassedOn<'a>> {
        let of = |view: &Option<View<'a>>, field: Field| {
            let value = view.as_ref().and_then(|view| view.get(row));
            value.map(|value| as_text(value, field).map(Cow::Borrowed)).transpose()
        };
        let passed_on = PassedOn {
            code: of(&error.code, Field::Code)?,
            message: of(&error.message, Field::Message)?,
            // Bytes, if others keep it so, are no text to pass on.
            request_id: self.text(Field::RequestId, row).ok().flatten().map(Cow::Borrowed),
        };
        // As long as a line may be.
        if passed_on.len() > LINE_LEN_MAX {
            return Err(format!("{ERROR} is longer than {LINE_LEN_MAX} bytes."));
        }
        Ok(passed_on)
    }

    fn bytes(&self, field: Field, row: usize) -> Option<&'a [u8]> {
        let place = COLUMNS.iter().position(|known| *known == field)?;
        self.views[place].as_ref().and_then(|view| view.get(row))
    }

    fn text(&self, field: Field, row: usize) -> Checked<Option<&'a str>> {
        self.bytes(field, row).map(|value| as_text(value, field)).transpose()
    }
}

fn as_text(value: &[u8], field: Field) -> Checked<&str> {
    std::str::from_utf8(value).map_err(|_| format!("{} is not UTF-8 text.", field.name()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{
        ArrayRef, BinaryArray, LargeStringArray, RecordBatch, StringArray, StructArray,
    };
    use arrow_ipc::writer::StreamWriter;

    use super::*;

    /// The metadata and bodies of a schema and a record batch with every kind of column.
    fn messages() -> Vec<(Vec<u8>, Vec<u8>)> {
        let text = |values: [Option<&str>; 3]| -> ArrayRef {
            Arc::new(StringArray::from(values.to_vec()))
        };
        let bytes = |values: [Option<&[u8]>; 3]| -> ArrayRef {
            Arc::new(BinaryArray::from(values.to_vec()))
        };
        let members = ["Code", "Message"].map(|name| (name, text([None, Some("text"), None])));
        let error = StructArray::try_from(members.to_vec()).unwrap();
        let ids: ArrayRef =
            Arc::new(LargeStringArray::from(vec![Some("key-a"), None, Some("key-b")]));
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("KeyId", ids, true),
            ("Iv", bytes([Some(&[1; 12]), None, Some(&[2; 12])]), true),
            ("CiphertextBlob", bytes([Some(&[3; 48]), None, Some(&[4; 48])]), true),
            ("Error", Arc::new(error), true),
        ]);
        let batch = batch.unwrap();
        let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        let stream = writer.into_inner().unwrap();
        let mut messages = Vec::new();
        let mut rest = &stream[..];
        while rest[4..8] != [0; 4] {
            let len = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
            let metadata = rest[8..8 + len].to_vec();
            let body_len = usize::try_from(message(&metadata).unwrap().bodyLength()).unwrap();
            messages.push((metadata, rest[8 + len..8 + len + body_len].to_vec()));
            rest = &rest[8 + len + body_len..];
        }
        messages
    }

    /// Reads everything, and returns the number of rows and of refusals.
    fn read_all(schema: &[u8], metadata: &[u8], body: &[u8]) -> Checked<(usize, usize)> {
        let schema = message(schema)?.header_as_schema().ok_or("no schema")?;
        let (rows, views, error) = batch(metadata, body, &columns(schema)?)?;
        let batch = Batch { rows, views, error, first_number: 1, bytes_read: 0 };
        let refused = (0..rows).filter(|row| !matches!(batch.item(*row), Item::Request(_)));
        Ok((rows, refused.count()))
    }

    #[test]
    fn no_bit_of_a_message_makes_reading_panic() {
        let messages = messages();
        let [(schema, _), (metadata, body)] = &messages[..] else { panic!("two messages") };
        assert_eq!(read_all(schema, metadata, body), Ok((3, 1)));
        let flip = |bytes: &[u8], bit: usize| {
            let mut bytes = bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        };
        let (mut good, mut refused) = (0, 0);
        let mut count = |outcome: Checked<(usize, usize)>| match outcome {
            Ok(_) => good += 1,
            Err(what) => {
                assert!(what.len() < 1000, "{what}");
                refused += 1;
            }
        };
        for bit in 0..8 * schema.len() {
            count(read_all(&flip(schema, bit), metadata, body));
        }
        for bit in 0..8 * metadata.len() {
            count(read_all(schema, &flip(metadata, bit), body));
        }
        for bit in 0..8 * body.len() {
            count(read_all(schema, metadata, &flip(body, bit)));
        }
        for len in 0..body.len() {
            count(read_all(schema, metadata, &body[..len]));
        }
        for len in 0..metadata.len() {
            count(read_all(schema, &metadata[..len], body));
            count(read_all(&metadata[..len], metadata, body));
        }
        // Padding and values may be anything; positions and lengths may not.
        assert!(good > 1000 && refused > 1000, "{good} {refused}");
    }
}
