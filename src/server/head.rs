//! The head of a request: what is asked, by whom, and what was signed.
//!
//! Everything that a head can be refused for without a key operation, in the order that the KMS seems to keep: path and
//! method, size, content type, version, operation, method of signature, client, date and its skew, hash, signature. A
//! header that counts and stands there twice is refused: two readers could take two values from it.
//!
//! The string to sign (the KMS's page "Request signatures"):
//!
//! ```text
//! METHOD \n content-sha256 \n content-type \n date \n
//! name:value \n          for each header whose name begins with x-kms-, sorted by name, values trimmed
//! /
//! ```

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::{
    HeaderMap, Method,
    header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderName},
    http::request::Parts,
};

use super::{api::Api, refusal::Refusal};
use crate::limits::{CLOCK_SKEW_MAX, SIGNATURE_LEN_MAX};

/// The only version of the API.
pub(super) const API_VERSION: &str = "dkms-gcs-0.2";
/// The only method of signature.
pub(super) const SIGNATURE_METHOD: &str = "RSA_PKCS1_SHA_256";
/// The type of every body.
pub(super) const MEDIA_TYPE: &str = "application/x-protobuf";

pub(super) const API_VERSION_HEADER: HeaderName = HeaderName::from_static("x-kms-apiversion");
pub(super) const API_NAME_HEADER: HeaderName = HeaderName::from_static("x-kms-apiname");
pub(super) const SIGNATURE_METHOD_HEADER: HeaderName =
    HeaderName::from_static("x-kms-signaturemethod");
/// Three c: the misspelling is the real name.
pub(super) const CLIENT_HEADER: HeaderName = HeaderName::from_static("x-kms-acccesskeyid");
pub(super) const BODY_HASH_HEADER: HeaderName = HeaderName::from_static("content-sha256");
pub(super) const VERSION_HEADER: HeaderName =
    HeaderName::from_static("x-kms-migrationkeyversionid");

/// A head whose form is right. Nothing is authenticated yet.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) api: Api,
    pub(super) client: String,
    /// SHA-256 that the body has to have.
    pub(super) body_hash: [u8; 32],
    pub(super) signature: Vec<u8>,
    pub(super) signed: Vec<u8>,
    /// The key version that `Decrypt` without a KeyId means.
    pub(super) version: Option<String>,
}

/// What can be told of a head before anything is wrong with it, for metrics and the audit log.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Claims<'a> {
    pub(super) api: Option<Api>,
    pub(super) client: &'a str,
}

impl<'a> Claims<'a> {
    pub(super) fn of(parts: &'a Parts) -> Self {
        // Trimmed, as `Head` reads them: HTTP/2 leaves spaces around values.
        let header = |name| parts.headers.get(name).map(|value| value.as_bytes().trim_ascii());
        let client = header(CLIENT_HEADER).and_then(|value| std::str::from_utf8(value).ok());
        Self { api: header(API_NAME_HEADER).and_then(Api::parse), client: client.unwrap_or("") }
    }
}

impl Head {
    /// Reads a head. `batch_max` is the most bytes of a batch's body.
    pub(super) fn read(parts: &Parts, now: SystemTime, batch_max: usize) -> Result<Self, Refusal> {
        if parts.uri.path() != "/" {
            return Err(Refusal::path(parts.uri.path()));
        }
        if parts.method != Method::POST {
            return Err(Refusal::method(parts.method.as_str()));
        }
        let headers = Headers(&parts.headers);
        // Before anything else is looked at, so that what follows is not much. What the API allows comes below.
        headers.check_length(batch_max.max(crate::limits::SERVER_BODY_LEN_MAX))?;
        let content_type = headers.text(&CONTENT_TYPE).map_err(|_| Refusal::content_type(""))?;
        if !is_protobuf(content_type) {
            return Err(Refusal::content_type(content_type));
        }
        let version = headers.text(&API_VERSION_HEADER).map_err(|_| Refusal::api_version(""))?;
        if version != API_VERSION {
            return Err(Refusal::api_version(version));
        }
        let name = headers.text(&API_NAME_HEADER).map_err(|_| Refusal::api_name(""))?;
        let api = Api::parse(name.as_bytes()).ok_or_else(|| Refusal::api_name(name))?;
        headers.check_length(api.body_max(batch_max))?;
        let method = headers.text(&SIGNATURE_METHOD_HEADER)?;
        if method != SIGNATURE_METHOD {
            return Err(Refusal::signature_method(method));
        }
        let client = match headers.text(&CLIENT_HEADER) {
            Ok(client) if !client.is_empty() => client,
            _ => return Err(Refusal::no_client()),
        };
        let date = headers.text(&DATE).map_err(|_| Refusal::param("Date"))?;
        let at = parse_date(date).ok_or_else(|| Refusal::param("Date"))?;
        if skew(at, now) > CLOCK_SKEW_MAX {
            return Err(Refusal::skewed());
        }
        let hash = headers.text(&BODY_HASH_HEADER).ok().and_then(parse_hash);
        let body_hash = hash.ok_or_else(body_hash_refused)?;
        let authorization = headers.text(&AUTHORIZATION).ok().and_then(parse_authorization);
        let signature = authorization.ok_or_else(|| Refusal::param("Authorization"))?;
        let version = match headers.text(&VERSION_HEADER) {
            Ok(version) => Some(version.to_owned()),
            Err(_) if parts.headers.contains_key(VERSION_HEADER) => {
                return Err(Refusal::param(VERSION_HEADER.as_str()));
            }
            Err(_) => None,
        };
        let signed = string_to_sign(parts)?;
        Ok(Self { api, client: client.to_owned(), body_hash, signature, signed, version })
    }
}

/// The refusal of a hash that is missing, malformed or not the body's. One SDK tries again on exactly this sentence.
pub(super) fn body_hash_refused() -> Refusal {
    Refusal::param("Content-SHA256")
}

struct Headers<'a>(&'a HeaderMap);

impl<'a> Headers<'a> {
    /// The only value of a header, trimmed.
    fn text(&self, name: &HeaderName) -> Result<&'a str, Refusal> {
        let mut values = self.0.get_all(name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => value.to_str().ok().map(str::trim),
            _ => None,
        }
        .ok_or_else(|| Refusal::param(name.as_str()))
    }

    /// Checks the length that the head tells. One that it does not tell is checked as the body comes.
    fn check_length(&self, max: usize) -> Result<(), Refusal> {
        let told = self.0.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let told = told.and_then(|value| value.trim().parse::<u64>().ok());
        match told {
            Some(len) if len > max as u64 => Err(Refusal::too_large(max)),
            _ => Ok(()),
        }
    }
}

fn is_protobuf(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case(MEDIA_TYPE)
}

/// Reads an RFC 1123 date. The KMS's own example has a day of one digit.
fn parse_date(text: &str) -> Option<SystemTime> {
    let (weekday, rest) = text.split_once(", ")?;
    let day = rest.split(' ').next()?;
    if day.len() == 1 {
        return httpdate::parse_http_date(&format!("{weekday}, 0{rest}")).ok();
    }
    httpdate::parse_http_date(text).ok()
}

fn skew(one: SystemTime, other: SystemTime) -> Duration {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    seconds(one).abs_diff(seconds(other))
}

/// SHA-256 in hex. The SDKs write upper case.
fn parse_hash(hex: &str) -> Option<[u8; 32]> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
    if pairs.len() != 32 || !rest.is_empty() {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, [high, low]) in hash.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(hash)
}

/// The signature: SDKs write `Bearer`, the KMS's pages `TOKEN`.
fn parse_authorization(value: &str) -> Option<Vec<u8>> {
    let (scheme, signature) = value.split_once(' ')?;
    let known = ["Bearer", "TOKEN"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    let signature = signature.trim();
    if !known || signature.is_empty() || signature.len() > SIGNATURE_LEN_MAX.div_ceil(3) * 4 {
        return None;
    }
    base64_simd::STANDARD.decode_to_vec(signature).ok()
}

/// What the client has signed.
fn string_to_sign(parts: &Parts) -> Result<Vec<u8>, Refusal> {
    let mut kms: Vec<(&str, &[u8])> = (parts.headers.iter())
        .filter(|(name, _)| name.as_str().starts_with("x-kms-"))
        .map(|(name, value)| (name.as_str(), value.as_bytes().trim_ascii()))
        .collect();
    kms.sort_unstable();
    if let Some(twice) = kms.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Refusal::param(twice[0].0));
    }
    let mut signed = Vec::with_capacity(512);
    signed.extend_from_slice(parts.method.as_str().as_bytes());
    for name in [&BODY_HASH_HEADER, &CONTENT_TYPE, &DATE] {
        signed.push(b'\n');
        signed.extend_from_slice(parts.headers[name].as_bytes().trim_ascii());
    }
    signed.push(b'\n');
    for (name, value) in kms {
        signed.extend_from_slice(name.as_bytes());
        signed.push(b':');
        signed.extend_from_slice(value);
        signed.push(b'\n');
    }
    signed.push(b'/');
    Ok(signed)
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    /// A head that the vendor's SDK was seen to send, and what it had signed of it.
    const CAPTURED: [(&str, &str); 8] = [
        ("date", "Mon, 23 Nov 2026 13:31:53 GMT"),
        ("x-kms-apiversion", "dkms-gcs-0.2"),
        ("x-kms-apiname", "GenerateDataKey"),
        ("x-kms-signaturemethod", "RSA_PKCS1_SHA_256"),
        ("x-kms-acccesskeyid", "KAAP.6751aedb-9ef4-4a04-9ee7-0e865e0b872e"),
        ("content-type", "application/x-protobuf"),
        ("content-sha256", "AFBF30CBB7A53EBABD29BEDDDF9ADB2650B71674947560E82619F258C2C64793"),
        ("authorization", "Bearer c2lnbmF0dXJl"),
    ];
    const SIGNED: &str = "POST\n\
        AFBF30CBB7A53EBABD29BEDDDF9ADB2650B71674947560E82619F258C2C64793\n\
        application/x-protobuf\n\
        Mon, 23 Nov 2026 13:31:53 GMT\n\
        x-kms-acccesskeyid:KAAP.6751aedb-9ef4-4a04-9ee7-0e865e0b872e\n\
        x-kms-apiname:GenerateDataKey\n\
        x-kms-apiversion:dkms-gcs-0.2\n\
        x-kms-signaturemethod:RSA_PKCS1_SHA_256\n/";

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut builder = Request::post("/");
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    fn at(date: &str) -> SystemTime {
        parse_date(date).unwrap()
    }

    #[test]
    fn a_captured_head_is_read_and_its_string_to_sign_is_the_captured_one() {
        let now = at("Mon, 23 Nov 2026 13:31:53 GMT");
        let head = Head::read(&parts(&CAPTURED), now, 0).unwrap();
        assert_eq!(std::str::from_utf8(&head.signed).unwrap(), SIGNED);
        assert_eq!(head.api.as_str(), "GenerateDataKey");
        assert_eq!(head.client, "KAAP.6751aedb-9ef4-4a04-9ee7-0e865e0b872e");
        assert_eq!((head.body_hash[0], head.body_hash[31]), (0xaf, 0x93));
        assert_eq!(head.signature, b"signature");
        assert_eq!(head.version, None);
    }

    #[test]
    fn headers_of_the_kms_are_signed_in_the_order_of_their_names() {
        let mut headers = CAPTURED.to_vec();
        headers.insert(0, ("X-Kms-Z", " z\t"));
        headers.push(("x-kms-", ""));
        headers.push(("x-kmsa", "not ours"));
        let head = Head::read(&parts(&headers), at(CAPTURED[0].1), 0).unwrap();
        let expected = SIGNED
            .replace("x-kms-acccesskeyid", "x-kms-:\nx-kms-acccesskeyid")
            .replace("256\n/", "256\nx-kms-z:z\n/");
        assert_eq!(std::str::from_utf8(&head.signed).unwrap(), expected);
    }

    #[test]
    fn dates_are_good_for_fifteen_minutes_to_either_side() {
        let (captured, second) = (at(CAPTURED[0].1), Duration::from_secs(1));
        let read = |now| Head::read(&parts(&CAPTURED), now, 0).map(drop);
        for now in [captured - CLOCK_SKEW_MAX, captured + CLOCK_SKEW_MAX] {
            read(now).unwrap();
        }
        for now in [captured - CLOCK_SKEW_MAX - second, captured + CLOCK_SKEW_MAX + second] {
            assert_eq!(read(now), Err(Refusal::skewed()));
        }
        assert_eq!(at("Sun, 3 Jan 2010 08:33:47 GMT"), at("Sun, 03 Jan 2010 08:33:47 GMT"));
    }
}
