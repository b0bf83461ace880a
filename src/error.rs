//! `Error`: the KMS codes, who is at fault, the request id and the batch index.
//!
//! The public error is one pointer wide, so that a `Result` of a hot call stays small. What went wrong is an
//! [`ErrorKind`]; code, HTTP status and fault follow from it, the message names the value that was refused. Codes and
//! the sentences at the head of messages are those of the KMS's instance API and OpenAPI pages.

use std::{borrow::Cow, fmt, sync::Arc};

use crate::request_id::RequestId;

/// Alias of `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. New kinds may be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A parameter is missing, malformed or out of its range.
    InvalidParameter,
    /// No key has this id, alias or version id.
    KeyNotFound,
    /// The caller may not use this key.
    NoPermission,
    /// No such alias.
    AliasNotFound,
    /// The alias names a key already.
    AliasAlreadyExists,
    /// The key is disabled.
    Disabled,
    /// The key waits for its deletion.
    PendingDeletion,
    /// The key's state does not allow this change of state.
    StateModifiedFailed,
    /// A batch over its limits, or a `Direct` key version whose wraps are spent.
    LimitExceeded,
    /// The operation does not exist for this kind of key.
    UnsupportedOperation,
    /// No client of the server has this id.
    ClientNotFound,
    /// Imported material is not a new key of 16, 24 or 32 bytes.
    InvalidKeyMaterial,
    /// Decryption failed. Deliberately without a cause: a wrong AAD, IV or blob cannot be told apart.
    DecryptFailed,
    /// The root key does not open this store.
    WrongRootKey,
    /// A record of the store was edited, swapped or damaged, or the file is no keymill store.
    StoreCorrupt,
    /// The store's file is not there.
    StoreMissing,
    /// The store cannot be read or written: read-only, full, locked for too long, or an I/O error.
    StoreUnavailable,
    /// The operating system refused something: random bytes, memory, a thread, a file.
    Machine,
}

/// Who has to act so that the call succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The caller: the request is wrong.
    Caller,
    /// The owner of the key: its state or budget refuses the request.
    Key,
    /// The operator of the key store.
    Store,
    /// The operator of the machine.
    Machine,
}

impl ErrorKind {
    /// The KMS's error code.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidParameter => "InvalidParameter",
            Self::KeyNotFound => "Forbidden.KeyNotFound",
            Self::NoPermission => "Forbidden.NoPermission",
            Self::AliasNotFound => "Forbidden.AliasNotFound",
            Self::AliasAlreadyExists => "AliasAlreadyExists",
            Self::Disabled => "Rejected.Disabled",
            Self::PendingDeletion => "Rejected.PendingDeletion",
            Self::StateModifiedFailed => "Rejected.StateModifiedFailed",
            Self::LimitExceeded => "Rejected.LimitExceeded",
            Self::UnsupportedOperation => "UnsupportedOperation",
            Self::ClientNotFound => "Unauthorized",
            Self::InvalidKeyMaterial => "InvalidKeyMaterial",
            Self::DecryptFailed | Self::WrongRootKey | Self::StoreCorrupt => "InternalFailure",
            Self::StoreMissing | Self::StoreUnavailable | Self::Machine => {
                "ServiceUnavailableTemporary"
            }
        }
    }

    /// The HTTP status that goes with the code.
    pub fn http_status(self) -> u16 {
        match self {
            Self::InvalidParameter
            | Self::AliasAlreadyExists
            | Self::LimitExceeded
            | Self::UnsupportedOperation
            | Self::InvalidKeyMaterial => 400,
            Self::NoPermission => 403,
            Self::KeyNotFound | Self::AliasNotFound | Self::ClientNotFound => 404,
            Self::Disabled | Self::PendingDeletion | Self::StateModifiedFailed => 409,
            Self::DecryptFailed | Self::WrongRootKey | Self::StoreCorrupt => 500,
            Self::StoreMissing | Self::StoreUnavailable | Self::Machine => 503,
        }
    }

    /// Who is at fault.
    pub fn fault(self) -> Fault {
        match self {
            Self::InvalidParameter
            | Self::KeyNotFound
            | Self::NoPermission
            | Self::AliasNotFound
            | Self::AliasAlreadyExists
            | Self::UnsupportedOperation
            | Self::ClientNotFound
            | Self::InvalidKeyMaterial
            | Self::DecryptFailed => Fault::Caller,
            Self::Disabled
            | Self::PendingDeletion
            | Self::StateModifiedFailed
            | Self::LimitExceeded => Fault::Key,
            Self::WrongRootKey
            | Self::StoreCorrupt
            | Self::StoreMissing
            | Self::StoreUnavailable => Fault::Store,
            Self::Machine => Fault::Machine,
        }
    }

    /// The KMS's sentence, with which a message begins where the KMS has one for the code. Empty if that names a value:
    /// then it is the detail.
    fn sentence(self) -> &'static str {
        match self {
            Self::InvalidParameter => "The specified parameter is not valid.",
            Self::KeyNotFound => "The key Key ID or Alias does not exist in the system.",
            Self::NoPermission => "",
            Self::AliasNotFound => "The specified Alias is not found.",
            Self::AliasAlreadyExists => "AliasName Already Exists.",
            Self::Disabled => "The request was rejected because the key state is Disabled.",
            Self::PendingDeletion => {
                "The request was rejected because the key state is PendingDeletion."
            }
            Self::StateModifiedFailed => "Keystate modified failed.",
            Self::LimitExceeded => "The request was rejected because a limit was exceeded.",
            Self::UnsupportedOperation => "Unsupported operation.",
            Self::ClientNotFound => "The AccessKey ID does not exist in our records.",
            Self::InvalidKeyMaterial => "The specified key material is not valid.",
            Self::DecryptFailed => "Internal Failure.",
            Self::WrongRootKey => "The root key does not open this store.",
            Self::StoreCorrupt => "The key store failed its integrity check.",
            Self::StoreMissing => "The key store does not exist.",
            Self::StoreUnavailable | Self::Machine => "Service Unavailable Temporary.",
        }
    }
}

/// The error of every public call.
///
/// In a batch each refused item has its own, with its index and its request id.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    detail: Detail,
    request_id: Option<RequestId>,
    index: Option<usize>,
}

/// The second sentence of a message, or all of it. Shared, since one refusal may be that of a million items.
#[derive(Clone)]
enum Detail {
    Fixed(&'static str),
    Shared(Arc<str>),
}

impl Detail {
    fn as_str(&self) -> &str {
        match self {
            Self::Fixed(text) => text,
            Self::Shared(text) => text,
        }
    }
}

impl From<Cow<'static, str>> for Detail {
    fn from(text: Cow<'static, str>) -> Self {
        match text {
            Cow::Borrowed(text) => Self::Fixed(text),
            Cow::Owned(text) => Self::Shared(text.into()),
        }
    }
}

impl Error {
    /// An error whose message is the KMS's sentence alone.
    pub(crate) fn plain(kind: ErrorKind) -> Self {
        Self::new(kind, "")
    }

    /// An error whose message is the KMS's sentence followed by `detail`, which names the refused value.
    pub(crate) fn new(kind: ErrorKind, detail: impl Into<Cow<'static, str>>) -> Self {
        let detail = Detail::from(detail.into());
        Self(Box::new(Inner { kind, detail, request_id: None, index: None }))
    }

    /// The error of an invalid parameter.
    pub(crate) fn invalid(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::InvalidParameter, detail)
    }

    /// The error of an unknown key name.
    pub(crate) fn key_not_found(name: &str) -> Self {
        Self::new(ErrorKind::KeyNotFound, format!("No key is named {:?}.", Shortened(name)))
    }

    /// The refusal of a caller who may not use the key that the request names, or that it led to.
    #[cold]
    pub(crate) fn no_permission(name: &str) -> Self {
        let name = Shortened(name);
        let detail = format!("This operation for {name:?} is forbidden by permission system.");
        Self::new(ErrorKind::NoPermission, detail)
    }

    /// The same error, of the request `id`.
    #[must_use]
    pub(crate) fn with_request_id(mut self, id: RequestId) -> Self {
        self.0.request_id = Some(id);
        self
    }

    /// The same error, of item `index` of the batch.
    #[must_use]
    pub(crate) fn with_index(mut self, index: usize) -> Self {
        self.0.index = Some(index);
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The KMS's error code, such as `Forbidden.KeyNotFound`.
    pub fn code(&self) -> &'static str {
        self.0.kind.code()
    }

    /// The HTTP status that goes with the code.
    pub fn http_status(&self) -> u16 {
        self.0.kind.http_status()
    }

    /// Who is at fault.
    pub fn fault(&self) -> Fault {
        self.0.kind.fault()
    }

    /// The message: the KMS's sentence, then a sentence that names the refused value.
    pub fn message(&self) -> String {
        let Inner { kind, detail, .. } = &*self.0;
        let (sentence, detail) = (kind.sentence(), detail.as_str());
        match (sentence, detail) {
            (only, "") | ("", only) => only.to_owned(),
            _ => format!("{sentence} {detail}"),
        }
    }

    /// The id of the refused request. `None` for errors outside a request, as on opening a store.
    pub fn request_id(&self) -> Option<RequestId> {
        self.0.request_id
    }

    /// The position of the refused item in its batch. `None` outside batches.
    pub fn index(&self) -> Option<usize> {
        self.0.index
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code(), self.message())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, request_id, index, .. } = &*self.0;
        f.debug_struct("Error")
            .field("kind", kind)
            .field("message", &self.message())
            .field("request_id", request_id)
            .field("index", index)
            .finish()
    }
}

impl std::error::Error for Error {}

/// So that `?` works on the borrowed errors of a batch.
impl From<&Error> for Error {
    fn from(error: &Error) -> Self {
        error.clone()
    }
}

/// A caller's string in which everything that is not printable is escaped: control characters (C0 and C1), marks that
/// turn the direction of text around, separators of lines, and what has no width. So it commands no terminal and looks
/// like nothing that it is not. `Debug` of a string escapes the same, and quotes besides.
#[cfg(any(feature = "server", test))]
pub(crate) struct Printable<'a>(pub(crate) &'a str);

#[cfg(any(feature = "server", test))]
impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for char in self.0.chars() {
            match char {
                // Not to be told from an escape otherwise, but quotes may stand.
                '"' | '\'' => fmt::Write::write_char(f, char)?,
                _ => fmt::Display::fmt(&char.escape_debug(), f)?,
            }
        }
        Ok(())
    }
}

/// Prints a caller's string cut to a length that fits a message.
pub(crate) struct Shortened<'a>(pub(crate) &'a str);

impl fmt::Debug for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CHARS_MAX: usize = 80;
        match self.0.char_indices().nth(CHARS_MAX) {
            Some((end, _)) => write!(f, "{:?} (cut)", &self.0[..end]),
            None => fmt::Debug::fmt(self.0, f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_pointer_and_its_message_names_the_value() {
        assert_eq!(size_of::<Result<(), Error>>(), size_of::<usize>());
        let error = Error::key_not_found("alias/absent");
        assert_eq!(
            error.to_string(),
            "Forbidden.KeyNotFound: The key Key ID or Alias does not exist in the system. \
             No key is named \"alias/absent\"."
        );
        assert_eq!((error.http_status(), error.fault()), (404, Fault::Caller));
    }

    #[test]
    fn a_refusal_by_permission_is_the_sentence_of_the_kms_alone() {
        let error = Error::no_permission("alias/a");
        let sentence = "This operation for \"alias/a\" is forbidden by permission system.";
        assert_eq!(error.message(), sentence);
        assert_eq!(error.to_string(), format!("Forbidden.NoPermission: {sentence}"));
        assert_eq!((error.http_status(), error.fault()), (403, Fault::Caller));
    }

    /// One of each kind: C0, DEL, C1, a mark of direction, an isolate, separators, and what has no width.
    #[test]
    fn nothing_that_is_not_printable_reaches_a_message() {
        let bad = "\n\u{1b}\u{7f}\u{85}\u{9b}\u{202e}\u{2066}\u{2028}\u{2029}\u{200b}\u{200d}\
                   \u{feff}\u{ad}";
        let good = "alias/grün 鍵 \"'";
        for char in bad.chars() {
            let text = format!("a{char}b");
            for shown in [Printable(&text).to_string(), format!("{:?}", Shortened(&text))] {
                assert!(shown.chars().all(|char| char.is_ascii_graphic()), "{shown:?}");
            }
        }
        assert_eq!(Printable(good).to_string(), good);
        assert_eq!(Printable("\\n").to_string(), "\\\\n");
    }

    #[test]
    fn a_long_value_is_cut_on_a_character() {
        let long = "é".repeat(500);
        assert!(Error::key_not_found(&long).message().len() < 400);
        assert!(Error::no_permission(&long).message().len() < 400);
    }
}
