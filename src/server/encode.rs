//! Writes responses straight from the memory of their results into the body: each byte is copied once, and a body that
//! holds data keys is wiped when the last of it has been sent.
//!
//! A body's length is known before it is written, so that it never grows: growing would leave a copy behind. `proto`
//! reads what is written here.

use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use zeroize::Zeroize;

/// Fields of a message, in ascending order of their tags. Those that are empty are left out, as proto3 does.
pub(super) trait Fields {
    /// Passes every field to `sink`.
    fn each<S: Sink>(&self, sink: &mut S);
}

/// Takes fields: counts them, or writes them.
pub(super) trait Sink {
    /// Whether the lengths of fields are all that matters.
    const COUNTS: bool;

    /// A string or bytes.
    fn bytes(&mut self, tag: u32, value: &[u8]);

    /// A message.
    fn message(&mut self, tag: u32, value: &impl Fields);

    /// An int32 that is not negative.
    fn uint(&mut self, tag: u32, value: u64);
}

/// The encoded length of a message.
pub(super) fn encoded_len(message: &impl Fields) -> usize {
    let mut counter = Counter(0);
    message.each(&mut counter);
    counter.0
}

struct Counter(usize);

impl Sink for Counter {
    const COUNTS: bool = true;

    #[inline]
    fn bytes(&mut self, tag: u32, value: &[u8]) {
        if !value.is_empty() {
            self.0 += key_len(tag) + encoded_len_varint(value.len() as u64) + value.len();
        }
    }

    #[inline]
    fn message(&mut self, tag: u32, value: &impl Fields) {
        let len = encoded_len(value);
        self.0 += key_len(tag) + encoded_len_varint(len as u64) + len;
    }

    fn uint(&mut self, tag: u32, value: u64) {
        if value != 0 {
            self.0 += key_len(tag) + encoded_len_varint(value);
        }
    }
}

/// A body that is being written.
pub(super) struct Writer(Wiped);

/// Bytes that are wiped when they are dropped: as a slice, at the speed of the memory. (A `Vec` is wiped byte by byte,
/// which took a tenth of a batch's time.)
struct Wiped(Vec<u8>);

impl AsRef<[u8]> for Wiped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.as_mut_slice().zeroize();
    }
}

impl Writer {
    /// A body of `len` bytes, none of them written yet.
    pub(super) fn with_len(len: usize) -> Self {
        Self(Wiped(Vec::with_capacity(len)))
    }

    /// The body, which is wiped when nobody has it any more.
    pub(super) fn finish(self) -> Bytes {
        Bytes::from_owner(self.0)
    }
}

impl Sink for Writer {
    const COUNTS: bool = false;

    #[inline]
    fn bytes(&mut self, tag: u32, value: &[u8]) {
        if !value.is_empty() {
            encode_key(tag, WireType::LengthDelimited, &mut self.0.0);
            encode_varint(value.len() as u64, &mut self.0.0);
            self.0.0.extend_from_slice(value);
        }
    }

    #[inline]
    fn message(&mut self, tag: u32, value: &impl Fields) {
        encode_key(tag, WireType::LengthDelimited, &mut self.0.0);
        encode_varint(encoded_len(value) as u64, &mut self.0.0);
        value.each(self);
    }

    fn uint(&mut self, tag: u32, value: u64) {
        if value != 0 {
            encode_key(tag, WireType::Varint, &mut self.0.0);
            encode_varint(value, &mut self.0.0);
        }
    }
}

/// The body of one message.
pub(super) fn body(message: &impl Fields) -> Bytes {
    let len = encoded_len(message);
    let mut writer = Writer::with_len(len);
    message.each(&mut writer);
    debug_assert_eq!(writer.0.0.len(), len);
    writer.finish()
}

/// `GenerateDataKey` and its Advance twin.
pub(super) struct DataKeyFields<'a> {
    pub(super) key_id: &'a str,
    pub(super) iv: &'a [u8],
    pub(super) plaintext: &'a [u8],
    pub(super) ciphertext_blob: &'a [u8],
    pub(super) request_id: &'a str,
    pub(super) algorithm: &'a str,
    /// Of the Advance operation; empty otherwise.
    pub(super) key_version_id: &'a str,
}

impl Fields for DataKeyFields<'_> {
    #[inline]
    fn each<S: Sink>(&self, sink: &mut S) {
        sink.bytes(1, self.key_id.as_bytes());
        sink.bytes(2, self.iv);
        sink.bytes(3, self.plaintext);
        sink.bytes(4, self.ciphertext_blob);
        sink.bytes(5, self.request_id.as_bytes());
        sink.bytes(6, self.algorithm.as_bytes());
        sink.bytes(7, self.key_version_id.as_bytes());
    }
}

/// `Encrypt` and its Advance twin.
pub(super) struct EncryptedFields<'a> {
    pub(super) key_id: &'a str,
    pub(super) ciphertext_blob: &'a [u8],
    pub(super) iv: &'a [u8],
    pub(super) request_id: &'a str,
    pub(super) algorithm: &'a str,
    /// Of the Advance operation; empty otherwise.
    pub(super) key_version_id: &'a str,
}

impl Fields for EncryptedFields<'_> {
    fn each<S: Sink>(&self, sink: &mut S) {
        sink.bytes(1, self.key_id.as_bytes());
        sink.bytes(2, self.ciphertext_blob);
        sink.bytes(3, self.iv);
        sink.bytes(4, self.request_id.as_bytes());
        sink.bytes(5, self.algorithm.as_bytes());
        sink.bytes(7, self.key_version_id.as_bytes());
    }
}

/// `Decrypt` and its Advance twin.
pub(super) struct DecryptedFields<'a> {
    pub(super) key_id: &'a str,
    pub(super) plaintext: &'a [u8],
    pub(super) request_id: &'a str,
    pub(super) algorithm: &'a str,
    /// Of the Advance operation; empty otherwise.
    pub(super) key_version_id: &'a str,
}

impl Fields for DecryptedFields<'_> {
    #[inline]
    fn each<S: Sink>(&self, sink: &mut S) {
        sink.bytes(1, self.key_id.as_bytes());
        sink.bytes(2, self.plaintext);
        sink.bytes(3, self.request_id.as_bytes());
        sink.bytes(4, self.algorithm.as_bytes());
        sink.bytes(6, self.key_version_id.as_bytes());
    }
}

/// `GenerateRandom`.
pub(super) struct RandomFields<'a> {
    pub(super) random: &'a [u8],
    pub(super) request_id: &'a str,
}

impl Fields for RandomFields<'_> {
    fn each<S: Sink>(&self, sink: &mut S) {
        sink.bytes(1, self.random);
        sink.bytes(2, self.request_id.as_bytes());
    }
}

/// `Error`.
pub(super) struct ErrorFields<'a> {
    pub(super) status: u16,
    pub(super) code: &'a str,
    pub(super) message: &'a str,
    pub(super) request_id: &'a str,
}

impl Fields for ErrorFields<'_> {
    fn each<S: Sink>(&self, sink: &mut S) {
        sink.uint(1, self.status.into());
        sink.bytes(2, self.code.as_bytes());
        sink.bytes(3, self.message.as_bytes());
        sink.bytes(4, self.request_id.as_bytes());
    }
}

/// The result of a batch's item.
pub(super) struct ResultFields<'a, R, E> {
    pub(super) result: Result<R, E>,
    pub(super) reference: &'a str,
}

impl<R: Fields, E: Fields> Fields for ResultFields<'_, R, E> {
    #[inline]
    fn each<S: Sink>(&self, sink: &mut S) {
        match &self.result {
            Ok(response) => sink.message(1, response),
            Err(error) => sink.message(2, error),
        }
        sink.bytes(3, self.reference.as_bytes());
    }
}
