//! Writes result rows: JSON by hand into one buffer, base64 straight into it.
//!
//! The buffer holds plaintext keys, so it has its full size from the start: growing would leave a copy behind in freed
//! memory. Ids, algorithm and base64 need no escaping; error messages go through `serde_json`.

use base64_simd::STANDARD;
use keymill::{DataKeyRef, DecryptedRef, Error, RequestId};
use zeroize::Zeroizing;

use crate::{
    failure::{Failure, Result, hint},
    lines::LINE_LEN_MAX,
    output::Output,
};

/// Bytes of the buffer.
const BUFFER_LEN: usize = 1 << 20;
/// No row is longer: the longest is an `Error` line that `decrypt` hands on; a data key of 1,024 bytes with 8,192 bytes
/// of AAD takes 14 KiB.
const ROW_LEN_MAX: usize = 2 * LINE_LEN_MAX;

const _: () = assert!(ROW_LEN_MAX < BUFFER_LEN);

/// Rows on their way to an output.
pub(crate) struct Rows {
    buffer: Zeroizing<Vec<u8>>,
    output: Output,
}

impl Rows {
    pub(crate) fn new(output: Output) -> Self {
        Self { buffer: Zeroizing::new(Vec::with_capacity(BUFFER_LEN)), output }
    }

    /// The row of a data key. `aad` is base64.
    pub(crate) fn data_key(&mut self, key: &DataKeyRef<'_>, aad: &str) -> Result<()> {
        self.begin()?;
        self.text("{\"KeyId\":\"", key.key_id().as_str());
        self.text("\",\"KeyVersionId\":\"", key.key_version_id().as_str());
        self.base64("\",\"Iv\":\"", key.iv());
        if let Some(plaintext) = key.plaintext() {
            self.base64("\",\"Plaintext\":\"", plaintext);
        }
        self.base64("\",\"CiphertextBlob\":\"", key.ciphertext_blob());
        self.text("\",\"Algorithm\":\"", key.algorithm());
        self.text("\",\"Aad\":\"", aad);
        self.end(key.request_id());
        Ok(())
    }

    /// The row of an unwrapped data key.
    pub(crate) fn decrypted(&mut self, key: &DecryptedRef<'_>) -> Result<()> {
        self.begin()?;
        self.text("{\"KeyId\":\"", key.key_id().as_str());
        self.text("\",\"KeyVersionId\":\"", key.key_version_id().as_str());
        self.base64("\",\"Plaintext\":\"", key.plaintext());
        self.text("\",\"Algorithm\":\"", key.algorithm());
        self.end(key.request_id());
        Ok(())
    }

    /// The row of a request that the engine refused.
    pub(crate) fn refused(&mut self, error: &Error, id: RequestId) -> Result<()> {
        self.error(error.code(), &error.message(), *id.as_bytes())
    }

    /// The row of a line that never reached the engine. It has a random id of its own.
    pub(crate) fn malformed(&mut self, code: &str, message: &str) -> Result<()> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| {
            Failure::broke(
                format!("the operating system gave no random bytes: {error}"),
                hint(keymill::ErrorKind::Machine),
            )
        })?;
        self.error(code, message, uuid::Builder::from_random_bytes(id).into_uuid().into_bytes())
    }

    /// A line as it is.
    pub(crate) fn unchanged(&mut self, line: &[u8]) -> Result<()> {
        self.begin()?;
        self.buffer.extend_from_slice(line);
        self.buffer.push(b'\n');
        Ok(())
    }

    /// Writes what is in the buffer: at the end of each window, so that nothing waits for further input.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let written = self.output.write(&self.buffer);
        self.buffer.clear();
        written
    }

    /// Completes the output.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.output.finish()
    }

    /// Makes room for a row.
    fn begin(&mut self) -> Result<()> {
        if self.buffer.len() > BUFFER_LEN - ROW_LEN_MAX { self.flush() } else { Ok(()) }
    }

    fn text(&mut self, before: &str, text: &str) {
        self.buffer.extend_from_slice(before.as_bytes());
        self.buffer.extend_from_slice(text.as_bytes());
    }

    fn base64(&mut self, before: &str, bytes: &[u8]) {
        self.buffer.extend_from_slice(before.as_bytes());
        STANDARD.encode_append(bytes, &mut *self.buffer);
    }

    fn error(&mut self, code: &str, message: &str, id: [u8; 16]) -> Result<()> {
        self.begin()?;
        self.text("{\"Error\":{\"Code\":\"", code);
        self.buffer.extend_from_slice(b"\",\"Message\":");
        self.buffer.extend_from_slice(serde_json::Value::from(message).to_string().as_bytes());
        self.buffer.push(b'}');
        self.request_id(",\"RequestId\":\"", id);
        Ok(())
    }

    fn end(&mut self, id: RequestId) {
        self.request_id("\",\"RequestId\":\"", *id.as_bytes());
    }

    fn request_id(&mut self, before: &str, id: [u8; 16]) {
        // `RequestId` prints the same, through the slower formatting machinery.
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        let text = uuid::Uuid::from_bytes(id).hyphenated().encode_lower(&mut text);
        self.text(before, text);
        self.buffer.extend_from_slice(b"\"}\n");
    }
}
