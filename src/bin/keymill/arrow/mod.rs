//! Arrow IPC streams: `write` makes them of rows, `read` reads those of `generate` and of other writers.
//!
//! Columns are named as the KMS names the fields. The format: <https://arrow.apache.org/docs/format/Columnar.html>.

mod columns;
pub(crate) mod read;
mod views;
pub(crate) mod write;

/// The first bytes of every message of a stream. Before Arrow 0.15 messages had none.
pub(crate) const CONTINUATION: [u8; 4] = [0xff; 4];

/// A column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    KeyId,
    KeyVersionId,
    Iv,
    Plaintext,
    CiphertextBlob,
    Algorithm,
    Aad,
    RequestId,
    /// A member of `Error`.
    Code,
    /// A member of `Error`.
    Message,
}

/// The struct that is null unless the request was refused.
pub(crate) const ERROR: &str = "Error";

/// The columns beside `Error`, in their order in a row.
pub(crate) const COLUMNS: [Field; 8] = [
    Field::KeyId,
    Field::KeyVersionId,
    Field::Iv,
    Field::Plaintext,
    Field::CiphertextBlob,
    Field::Algorithm,
    Field::Aad,
    Field::RequestId,
];

impl Field {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::KeyId => "KeyId",
            Self::KeyVersionId => "KeyVersionId",
            Self::Iv => "Iv",
            Self::Plaintext => "Plaintext",
            Self::CiphertextBlob => "CiphertextBlob",
            Self::Algorithm => "Algorithm",
            Self::Aad => "Aad",
            Self::RequestId => "RequestId",
            Self::Code => "Code",
            Self::Message => "Message",
        }
    }

    /// Whether values are bytes; the others are text.
    pub(crate) fn is_bytes(self) -> bool {
        matches!(self, Self::Iv | Self::Plaintext | Self::CiphertextBlob | Self::Aad)
    }
}
