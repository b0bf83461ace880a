//! The messages of the KMS's instance API (`dkms-gcs-0.2`), and ours for batches in the same style.
//!
//! Field numbers and types are those of the vendor's own descriptors. Proto3: a field that is 0 or empty is absent on
//! the wire. `Encrypt` and `AdvanceEncrypt` share a request, and so do the two kinds of decryption; a response of an
//! `Advance` operation is that of its twin with a `KeyVersionId` behind it. What the server answers is written by
//! `encode`, without these structs; clients and tests read it with them.

use bytes::Bytes;
use prost::Message;

/// Asks for a data key under the initial version.
#[derive(Clone, PartialEq, Message)]
pub struct GenerateDataKeyRequest {
    /// An id or `alias/...`.
    #[prost(string, tag = "1")]
    pub key_id: String,
    /// Empty or `AES_GCM`.
    #[prost(string, tag = "2")]
    pub algorithm: String,
    /// 1 to 1024.
    #[prost(int32, tag = "3")]
    pub number_of_bytes: i32,
    /// At most 8192 bytes.
    #[prost(bytes = "bytes", tag = "4")]
    pub aad: Bytes,
}

/// Asks for a data key under the primary version.
#[derive(Clone, PartialEq, Message)]
pub struct AdvanceGenerateDataKeyRequest {
    /// An id or `alias/...`.
    #[prost(string, tag = "1")]
    pub key_id: String,
    /// 1 to 1024.
    #[prost(int32, tag = "2")]
    pub number_of_bytes: i32,
    /// At most 8192 bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub aad: Bytes,
}

/// A data key. `key_version_id` is set by the `Advance` operation alone.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct GenerateDataKeyResponse {
    /// The resolved key id.
    #[prost(string, tag = "1")]
    pub key_id: String,
    /// 12 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub iv: Bytes,
    /// The data key.
    #[prost(bytes = "bytes", tag = "3")]
    pub plaintext: Bytes,
    /// The wrapped data key.
    #[prost(bytes = "bytes", tag = "4")]
    pub ciphertext_blob: Bytes,
    /// A lower-case UUID.
    #[prost(string, tag = "5")]
    pub request_id: String,
    /// `AES_GCM`.
    #[prost(string, tag = "6")]
    pub algorithm: String,
    /// 36 characters.
    #[prost(string, tag = "7")]
    pub key_version_id: String,
}

/// Data to encrypt, under the initial version or, by the `Advance` operation, the primary one.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct EncryptRequest {
    /// An id or `alias/...`.
    #[prost(string, tag = "1")]
    pub key_id: String,
    /// At least one byte.
    #[prost(bytes = "bytes", tag = "2")]
    pub plaintext: Bytes,
    /// Empty or `AES_GCM`.
    #[prost(string, tag = "3")]
    pub algorithm: String,
    /// At most 8192 bytes.
    #[prost(bytes = "bytes", tag = "4")]
    pub aad: Bytes,
    /// Empty, or 12 bytes.
    #[prost(bytes = "bytes", tag = "5")]
    pub iv: Bytes,
    /// Means nothing with `AES_GCM`.
    #[prost(string, tag = "6")]
    pub padding_mode: String,
}

/// Encrypted data. `key_version_id` is set by the `Advance` operation alone.
#[derive(Clone, PartialEq, Message)]
pub struct EncryptResponse {
    /// The resolved key id.
    #[prost(string, tag = "1")]
    pub key_id: String,
    /// The encrypted data.
    #[prost(bytes = "bytes", tag = "2")]
    pub ciphertext_blob: Bytes,
    /// 12 bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub iv: Bytes,
    /// A lower-case UUID.
    #[prost(string, tag = "4")]
    pub request_id: String,
    /// `AES_GCM`.
    #[prost(string, tag = "5")]
    pub algorithm: String,
    /// Empty.
    #[prost(string, tag = "6")]
    pub padding_mode: String,
    /// 36 characters.
    #[prost(string, tag = "7")]
    pub key_version_id: String,
}

/// A blob to decrypt.
#[derive(Clone, PartialEq, Message)]
pub struct DecryptRequest {
    /// What an encrypting or generating operation returned.
    #[prost(bytes = "bytes", tag = "1")]
    pub ciphertext_blob: Bytes,
    /// An id or `alias/...`; needed for raw blobs.
    #[prost(string, tag = "2")]
    pub key_id: String,
    /// Empty or `AES_GCM`.
    #[prost(string, tag = "3")]
    pub algorithm: String,
    /// The AAD of the operation that made the blob.
    #[prost(bytes = "bytes", tag = "4")]
    pub aad: Bytes,
    /// 12 bytes; needed for raw blobs.
    #[prost(bytes = "bytes", tag = "5")]
    pub iv: Bytes,
    /// Means nothing with `AES_GCM`.
    #[prost(string, tag = "6")]
    pub padding_mode: String,
}

/// Decrypted data. `key_version_id` is set by the `Advance` operation alone.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct DecryptResponse {
    /// The resolved key id.
    #[prost(string, tag = "1")]
    pub key_id: String,
    /// The data.
    #[prost(bytes = "bytes", tag = "2")]
    pub plaintext: Bytes,
    /// A lower-case UUID.
    #[prost(string, tag = "3")]
    pub request_id: String,
    /// `AES_GCM`.
    #[prost(string, tag = "4")]
    pub algorithm: String,
    /// Empty.
    #[prost(string, tag = "5")]
    pub padding_mode: String,
    /// 36 characters.
    #[prost(string, tag = "6")]
    pub key_version_id: String,
}

/// Asks for random bytes.
#[derive(Clone, PartialEq, Message)]
pub struct GenerateRandomRequest {
    /// 1 to 64.
    #[prost(int32, tag = "1")]
    pub length: i32,
}

/// Random bytes.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct GenerateRandomResponse {
    /// The bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub random: Bytes,
    /// A lower-case UUID.
    #[prost(string, tag = "2")]
    pub request_id: String,
}

/// The body of every refusal.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Error {
    /// The HTTP status.
    #[prost(int32, tag = "1")]
    pub status_code: i32,
    /// Such as `Forbidden.KeyNotFound`.
    #[prost(string, tag = "2")]
    pub error_code: String,
    /// For people.
    #[prost(string, tag = "3")]
    pub error_message: String,
    /// A lower-case UUID.
    #[prost(string, tag = "4")]
    pub request_id: String,
}

/// An item of a batch: the single operation's request, and a text of the caller's that comes back with its result.
/// `T` is a message of this file.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct Item<T: Message + Default> {
    /// The single operation's request.
    #[prost(message, optional, tag = "1")]
    pub request: Option<T>,
    /// Of the caller's.
    #[prost(string, tag = "2")]
    pub reference: String,
}

/// A batch: `Item` for each request, at most 65,536.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct BatchRequest<T: Message + Default> {
    /// In the order in which results come back.
    #[prost(message, repeated, tag = "1")]
    pub items: Vec<Item<T>>,
}

/// The result of an item: the single operation's response, or the error that refused it.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct ItemResult<T: Message + Default> {
    /// The single operation's response.
    #[prost(message, optional, tag = "1")]
    pub response: Option<T>,
    /// Why there is none.
    #[prost(message, optional, tag = "2")]
    pub error: Option<Error>,
    /// That of the item.
    #[prost(string, tag = "3")]
    pub reference: String,
}

/// The results of a batch, in the order of its items.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct BatchResponse<T: Message + Default> {
    /// As many as items.
    #[prost(message, repeated, tag = "1")]
    pub results: Vec<ItemResult<T>>,
    /// A lower-case UUID: of the batch. Each item has its own.
    #[prost(string, tag = "2")]
    pub request_id: String,
}

/// Messages that hold secrets, and those that may, print their names and nothing else.
macro_rules! unprinted {
    ($($name:ident $(<$parameter:ident>)?),+) => {$(
        impl $(<$parameter: Message + Default>)? std::fmt::Debug for $name $(<$parameter>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )+};
}

unprinted!(
    GenerateDataKeyResponse,
    EncryptRequest,
    DecryptResponse,
    GenerateRandomResponse,
    Item<T>,
    BatchRequest<T>,
    ItemResult<T>,
    BatchResponse<T>
);
