//! Writes rows as JSON Lines: by hand, base64 straight into the buffer, slices of a window in parallel.
//!
//! Buffers hold plaintext keys, so each has its full size before the first byte: growing would leave a copy behind in
//! freed memory. Ids, algorithm and base64 need no escaping; what others wrote goes through `serde_json`.

use std::{collections::VecDeque, mem, ops::Range};

use base64_simd::STANDARD;
use crossbeam::channel;
use keymill::limits::{KEY_ID_LEN, KEY_VERSION_ID_LEN};
use zeroize::Zeroizing;

use crate::{
    failure::Result,
    output::Output,
    rows::{PassedOn, Row, Window, with_id_text},
};

/// Most rows of a slice: some 180 KiB of 32-byte keys, so that the buffers in use stay in the cores' caches.
const SLICE_ROWS_MAX: usize = 512;
/// Most bytes of a slice, unless a single row has more, and the size of a buffer.
const SLICE_LEN_MAX: usize = 256 << 10;
/// Most buffers.
const BUFFERS_MAX: usize = 32;
/// Fewer slices are formatted on the caller's thread: waking another takes as long as a slice.
const PARALLEL_SLICES_MIN: usize = 4;
/// Names, marks and request id of a row.
const ROW_FRAME_LEN: usize = 256;

type Buffer = Zeroizing<Vec<u8>>;

/// So many rows in slices of `len`.
struct Slices {
    rows: usize,
    len: usize,
}

impl Slices {
    fn count(&self) -> usize {
        self.rows.div_ceil(self.len)
    }

    fn get(&self, index: usize) -> Range<usize> {
        index * self.len..self.rows.min((index + 1) * self.len)
    }
}

/// JSON Lines on their way to an output.
pub(crate) struct JsonRows {
    output: Output,
    /// At least one.
    buffers: Vec<Buffer>,
}

impl JsonRows {
    pub(crate) fn new(output: Output) -> Self {
        Self { output, buffers: vec![new_buffer(SLICE_LEN_MAX)] }
    }

    pub(crate) fn write(&mut self, rows: &impl Window) -> Result<()> {
        // Slices are of one length, by the longest row: measuring every row would take as long as copying it.
        let len = (SLICE_LEN_MAX / rows.largest(len_max).max(1)).clamp(1, SLICE_ROWS_MAX);
        let slices = Slices { rows: rows.len(), len };
        if slices.count() < PARALLEL_SLICES_MIN || keymill::parallelism() == 1 {
            return (0..slices.count()).try_for_each(|slice| {
                fill(&mut self.buffers[0], rows, slices.get(slice));
                self.output.write(&self.buffers[0])
            });
        }
        self.write_in_parallel(rows, &slices)
    }

    /// Formats slices on rayon's threads, and writes each on this one as soon as it and those before it are ready:
    /// writing a file copies as much as formatting does, and neither waits for the other.
    fn write_in_parallel(&mut self, rows: &impl Window, slices: &Slices) -> Result<()> {
        let Self { output, buffers } = self;
        // For each thread one that is being filled, and one that waits to be written.
        let wanted = (2 * keymill::parallelism()).min(BUFFERS_MAX);
        if buffers.len() < wanted {
            buffers.resize_with(wanted, || new_buffer(SLICE_LEN_MAX));
        }
        let mut free: Vec<&mut Buffer> = buffers.iter_mut().collect();
        let mut rest = (0..slices.count()).map(|index| slices.get(index));
        let mut begun = VecDeque::with_capacity(free.len());
        rayon::in_place_scope(|scope| {
            loop {
                while let Some(buffer) = free.pop() {
                    let Some(slice) = rest.next() else { break };
                    let (sender, filled) = channel::bounded(1);
                    begun.push_back(filled);
                    scope.spawn(move |_| {
                        fill(buffer, rows, slice);
                        // Nobody waits for it after a failed write.
                        let _ = sender.send(buffer);
                    });
                }
                let Some(filled) = begun.pop_front() else { return Ok(()) };
                // Nothing comes of a task that panics; the scope hands its panic on.
                let Ok(buffer) = filled.recv() else { return Ok(()) };
                output.write(buffer)?;
                free.push(buffer);
            }
        })
    }

    pub(crate) fn finish(self) -> Result<()> {
        self.output.finish()
    }
}

fn new_buffer(len: usize) -> Buffer {
    Zeroizing::new(Vec::with_capacity(len))
}

/// Formats `slice` of `rows` in place of what `buffer` holds.
fn fill(buffer: &mut Buffer, rows: &impl Window, slice: Range<usize>) {
    // On this thread's stack meanwhile: the length of a buffer beside that of another thread's would move from core to
    // core with every field, which took four times as long as the copying.
    let mut out = mem::take(buffer);
    out.clear();
    let alone = slice.len() == 1;
    let mut capacity = out.capacity();
    rows.each(slice, |row| {
        if alone && len_max(row) > capacity {
            // Not grown; what it replaces is wiped.
            capacity = len_max(row);
            out = new_buffer(capacity);
        }
        format(&mut out, row);
    });
    assert!(out.capacity() >= capacity && out.len() <= capacity, "`len_max` is too small");
    *buffer = out;
}

/// No row is longer.
fn len_max(row: &Row<'_>) -> usize {
    // A control character takes six bytes.
    const ESCAPED: usize = 6;
    let ids = KEY_ID_LEN + KEY_VERSION_ID_LEN;
    let base64 = |bytes: &[u8]| STANDARD.encoded_length(bytes.len());
    ROW_FRAME_LEN
        + match row {
            Row::Key { key, aad_text, .. } => {
                let plaintext = key.plaintext().map_or(0, base64);
                ids + base64(key.iv()) + plaintext + base64(key.ciphertext_blob()) + aad_text.len()
            }
            Row::Opened(key) => ids + base64(key.plaintext()),
            Row::Refused { message, .. } => ESCAPED * message.len(),
            Row::Line(line) => line.len(),
            Row::PassedOn(row) => ESCAPED * row.len(),
        }
}

fn format(out: &mut Vec<u8>, row: &Row<'_>) {
    match row {
        Row::Key { key, aad_text, .. } => {
            text(out, "{\"KeyId\":\"", key.key_id().as_str());
            text(out, "\",\"KeyVersionId\":\"", key.key_version_id().as_str());
            base64(out, "\",\"Iv\":\"", key.iv());
            if let Some(plaintext) = key.plaintext() {
                base64(out, "\",\"Plaintext\":\"", plaintext);
            }
            base64(out, "\",\"CiphertextBlob\":\"", key.ciphertext_blob());
            text(out, "\",\"Algorithm\":\"", key.algorithm());
            text(out, "\",\"Aad\":\"", aad_text);
            request_id(out, "\",\"RequestId\":\"", *key.request_id().as_bytes());
        }
        Row::Opened(key) => {
            text(out, "{\"KeyId\":\"", key.key_id().as_str());
            text(out, "\",\"KeyVersionId\":\"", key.key_version_id().as_str());
            base64(out, "\",\"Plaintext\":\"", key.plaintext());
            text(out, "\",\"Algorithm\":\"", key.algorithm());
            request_id(out, "\",\"RequestId\":\"", *key.request_id().as_bytes());
        }
        Row::Refused { code, message, id } => {
            text(out, "{\"Error\":{\"Code\":\"", code);
            text(out, "\",\"Message\":", &quoted(message));
            request_id(out, "},\"RequestId\":\"", *id);
        }
        Row::Line(line) => {
            out.extend_from_slice(line);
            out.push(b'\n');
        }
        Row::PassedOn(PassedOn { code, message, request_id }) => {
            out.extend_from_slice(b"{\"Error\":{");
            if let Some(code) = code {
                text(out, "\"Code\":", &quoted(code));
            }
            if let Some(message) = message {
                text(out, if code.is_some() { "," } else { "" }, "\"Message\":");
                text(out, "", &quoted(message));
            }
            out.push(b'}');
            if let Some(id) = request_id {
                text(out, ",\"RequestId\":", &quoted(id));
            }
            out.extend_from_slice(b"}\n");
        }
    }
}

fn text(out: &mut Vec<u8>, before: &str, text: &str) {
    out.extend_from_slice(before.as_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn base64(out: &mut Vec<u8>, before: &str, bytes: &[u8]) {
    out.extend_from_slice(before.as_bytes());
    STANDARD.encode_append(bytes, out);
}

/// The last member.
fn request_id(out: &mut Vec<u8>, before: &str, id: [u8; 16]) {
    with_id_text(id, |id| text(out, before, id));
    out.extend_from_slice(b"\"}\n");
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// What an `Error` line says. Members of other types than ours are left out, save that a strange `Error` is its own
/// message.
#[cfg(feature = "arrow")]
pub(crate) fn passed_on(line: &[u8]) -> PassedOn<'static> {
    use serde_json::Value;

    let value: Value = serde_json::from_slice(line).unwrap_or_default();
    let owned = |value: &Value| value.as_str().map(|text| text.to_owned().into());
    let error = &value["Error"];
    let message = match &error["Message"] {
        Value::String(message) => Some(message.clone().into()),
        Value::Null if !error["Code"].is_null() => None,
        _ => Some(error.to_string().into()),
    };
    PassedOn { code: owned(&error["Code"]), message, request_id: owned(&value["RequestId"]) }
}
