//! What is refused, in the words of the KMS: every 4xx and 5xx that is made here, as status, code and sentence.
//!
//! The sentences are those of the KMS's page of common error codes, letter for letter, save where it has none.

use std::borrow::Cow;

use super::encode::ErrorFields;
use crate::{
    error::{Error, Printable, Shortened},
    request_id::RequestId,
};

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: &'static str,
    pub(super) message: Cow<'static, str>,
    /// Of an engine's error.
    pub(super) request_id: Option<RequestId>,
    /// Of 429: the limit, and when to come again, in seconds.
    pub(super) throttled: Option<(Limit, u32)>,
    /// The key that was asked for, as an id or an alias.
    pub(super) asked: Option<String>,
}

/// What a client has had too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    KeysInProgress,
    KeysPerSecond,
    Bytes,
}

impl Limit {
    /// Its name in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::KeysInProgress => "keys_in_progress",
            Self::KeysPerSecond => "keys_per_second",
            Self::Bytes => "bytes_held",
        }
    }
}

impl Refusal {
    fn new(status: u16, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        let message = message.into();
        Self { status, code, message, request_id: None, throttled: None, asked: None }
    }

    pub(super) fn path(path: &str) -> Self {
        let path = Shortened(path);
        Self::new(
            404,
            "InvalidPath",
            format!("The path {path:?} is invalid; requests go to \"/\"."),
        )
    }

    pub(super) fn method(method: &str) -> Self {
        let method = Shortened(method);
        Self::new(
            405,
            "UnsupportedHTTPMethod",
            format!("The HTTP method {method:?} is not supported; requests are POST."),
        )
    }

    pub(super) fn too_large(max: usize) -> Self {
        let message = format!("The request body is larger than {max} bytes.");
        Self::new(413, "RequestEntityTooLarge", message)
    }

    pub(super) fn content_type(given: &str) -> Self {
        let given = Cut(given);
        Self::new(415, "InvalidContentType", format!("Content-Type \"{given}\" is unsupported."))
    }

    pub(super) fn api_version(given: &str) -> Self {
        let given = Cut(given);
        Self::new(400, "InvalidApiVersion", format!("The ApiVersion \"{given}\" is invalid."))
    }

    pub(super) fn api_name(given: &str) -> Self {
        let given = Cut(given);
        Self::new(400, "InvalidApiName", format!("The ApiName \"{given}\" is invalid."))
    }

    /// A header that is missing, doubled or not what it should be.
    pub(super) fn param(name: &str) -> Self {
        Self::new(400, "InvalidParam", format!("The Param {name} is invalid."))
    }

    pub(super) fn signature_method(given: &str) -> Self {
        let given = Cut(given);
        Self::new(
            400,
            "InvalidParam",
            format!("The Param x-kms-signaturemethod is invalid. message:\"{given}\"."),
        )
    }

    pub(super) fn no_client() -> Self {
        Self::new(
            400,
            "MissingParameter",
            "Parameter x-kms-acccesskeyid does not exist in http header or body.",
        )
    }

    pub(super) fn skewed() -> Self {
        Self::new(
            400,
            "RequestTimeTooSkewed",
            "Request time exceeds server time more than 15 minutes.",
        )
    }

    pub(super) fn unknown_client(id: &str) -> Self {
        let id = Cut(id);
        Self::new(
            404,
            "Unauthorized",
            format!("The AccessKey ID \"{id}\" does not exist in our records."),
        )
    }

    pub(super) fn signature() -> Self {
        Self::new(401, "SignatureNotMatch", "Signature is not matched.")
    }

    pub(super) fn operation(name: &str) -> Self {
        Self::new(
            403,
            "Forbidden.NoPermission",
            format!("This operation for \"{name}\" is forbidden by permission system."),
        )
    }

    pub(super) fn parameter(detail: impl std::fmt::Display) -> Self {
        Self::new(
            400,
            "InvalidParameter",
            format!("The specified parameter is not valid. {detail}"),
        )
    }

    pub(super) fn timeout() -> Self {
        Self::new(408, "RequestTimeout", "The request body did not arrive in time.")
    }

    pub(super) fn throttled(limit: Limit, seconds: u32) -> Self {
        let refusal = Self::new(429, "Rejected.Throttling", "QPS Limit Exceeded");
        Self { throttled: Some((limit, seconds)), ..refusal }
    }

    pub(super) fn internal() -> Self {
        Self::new(500, "InternalFailure", "Internal Failure.")
    }

    pub(super) fn unavailable() -> Self {
        Self::new(503, "ServiceUnavailableTemporary", "Service Unavailable Temporary.")
    }

    /// The fields of the body.
    pub(super) fn fields<'a>(&'a self, request_id: &'a str) -> ErrorFields<'a> {
        let Self { status, code, message, .. } = self;
        ErrorFields { status: *status, code, message, request_id }
    }
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Self {
        let refusal = Self::new(error.http_status(), error.code(), error.message());
        Self { request_id: error.request_id(), ..refusal }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

/// A caller's text as it is, cut to a length that fits a message, what is not printable escaped.
struct Cut<'a>(&'a str);

impl std::fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const CHARS_MAX: usize = 80;
        let end = self.0.char_indices().nth(CHARS_MAX).map_or(self.0.len(), |(end, _)| end);
        Printable(&self.0[..end]).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_caller_sent_is_cut_and_cannot_break_a_line() {
        let long = format!("a\nb{}", "é".repeat(500));
        let message = Refusal::api_name(&long).message;
        assert!(message.starts_with("The ApiName \"a\\nb") && message.chars().count() < 120);
    }
}
