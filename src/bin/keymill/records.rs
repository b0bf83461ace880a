//! The records of JSON Lines files, as they are read: requests, and the results that `generate` wrote.
//!
//! Member names are the KMS's. Reading is strict: an unknown or repeated member, another type or bytes that are not
//! standard base64 refuse the line, since a misspelt `Aad` must not silently become no AAD. What programs write that
//! have a column for every member is read as it is meant: `null` is a member that is absent, `32.0` is 32, and an
//! `Error` whose members are all `null` is none. Every refusal is a sentence that begins with the line's number and
//! names the value.

use std::{borrow::Cow, fmt, ops::Range};

use base64_simd::STANDARD;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use crate::{
    failure::quoted,
    forms::BYTE_ORDER_MARK,
    lines::{LINE_LEN_MAX, Line},
};

/// A line that is refused before the engine sees it, and why.
pub(crate) type Parsed<T> = Result<T, String>;

/// One line of a request file.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) key_id: Cow<'a, str>,
    pub(crate) number_of_bytes: u32,
    /// As in the file, which is how the result repeats it.
    pub(crate) aad_text: Cow<'a, str>,
    /// The AAD's bytes in the arena.
    pub(crate) aad: Range<usize>,
}

/// One line of a result file.
#[derive(Debug)]
pub(crate) enum Outcome<'a> {
    /// A data key. Byte fields are ranges of the arena.
    Key {
        key_id: Option<Cow<'a, str>>,
        iv: Option<Range<usize>>,
        blob: Range<usize>,
        algorithm: Option<Cow<'a, str>>,
        aad: Range<usize>,
    },
    /// An `Error` line.
    Refused(&'a [u8]),
}

/// Reads a request; decoded bytes are appended to `arena`.
pub(crate) fn request<'a>(line: Line<'a>, number: u64, arena: &mut Vec<u8>) -> Parsed<Request<'a>> {
    let text = text(line, number, "a request")?;
    let mut fields = RequestFields::default();
    read(text, number, &mut fields)?;
    let missing = |name: &str| format!("Line {number}: {name} is missing.");
    let key_id = fields.key_id.ok_or_else(|| missing("KeyId"))?;
    let number_of_bytes = fields.number_of_bytes.ok_or_else(|| missing("NumberOfBytes"))?;
    let aad_text = fields.aad.flatten().unwrap_or_default();
    let aad = decode("Aad", &aad_text, number, arena)?;
    Ok(Request { key_id, number_of_bytes, aad_text, aad })
}

/// Reads a result; decoded bytes are appended to `arena`.
pub(crate) fn outcome<'a>(line: Line<'a>, number: u64, arena: &mut Vec<u8>) -> Parsed<Outcome<'a>> {
    let text = text(line, number, "a result of `generate`")?;
    let mut fields = OutcomeFields::default();
    read(text, number, &mut fields)?;
    let blob = fields.blob.flatten();
    if blob.is_none() && fields.error.is_some_and(|error| says_something(&error)) {
        return Ok(Outcome::Refused(text.trim_ascii_end().as_bytes()));
    }
    let blob = blob.ok_or_else(|| format!("Line {number}: CiphertextBlob is missing."))?;
    let blob = decode("CiphertextBlob", &blob, number, arena)?;
    let iv = fields.iv.flatten().map(|iv| decode("Iv", &iv, number, arena)).transpose()?;
    let aad = decode("Aad", &fields.aad.flatten().unwrap_or_default(), number, arena)?;
    let (key_id, algorithm) = (fields.key_id.flatten(), fields.algorithm.flatten());
    Ok(Outcome::Key { key_id, iv, blob, algorithm, aad })
}

/// Whether an `Error` is one: some writers have no null for an object, and write one of nulls.
fn says_something(error: &Value) -> bool {
    match error {
        Value::Null => false,
        Value::Object(members) => members.is_empty() || members.values().any(says_something),
        _ => true,
    }
}

/// The line as text. A mark of UTF-8 is no part of it, also behind the first line: files are put together.
fn text<'a>(line: Line<'a>, number: u64, what: &str) -> Parsed<&'a str> {
    let Line::Bytes(bytes) = line else {
        return Err(format!("Line {number} is longer than {LINE_LEN_MAX} bytes."));
    };
    let bytes = bytes.strip_prefix(&BYTE_ORDER_MARK).unwrap_or(bytes);
    if bytes.trim_ascii().is_empty() {
        return Err(format!("Line {number} is blank; every line is {what}."));
    }
    std::str::from_utf8(bytes).map_err(|error| {
        format!("Line {number} is not UTF-8 text, at byte {}.", error.valid_up_to() + 1)
    })
}

fn read<'a>(text: &'a str, number: u64, fields: &mut impl Fields<'a>) -> Parsed<()> {
    let mut json = serde_json::Deserializer::from_str(text);
    let done = json.deserialize_map(Members(fields)).and_then(|()| json.end());
    done.map_err(|error| {
        let column = error.column();
        let message = error.to_string();
        let message = message.rsplit_once(" at line ").map_or(&*message, |(message, _)| message);
        if error.is_data() {
            format!("Line {number}: {}.", shortened(message))
        } else {
            let whole = if error.is_eof() { "; a record is one whole line" } else { "" };
            let message = shortened(message);
            format!("Line {number} is not JSON: {message} at column {column}{whole}.")
        }
    })
}

/// Cuts a message of the parser, which repeats values of any length.
fn shortened(message: &str) -> Cow<'_, str> {
    const CHARS_MAX: usize = 200;
    match message.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{} (cut)", &message[..end]).into(),
        None => message.into(),
    }
}

fn decode(name: &str, text: &str, number: u64, arena: &mut Vec<u8>) -> Parsed<Range<usize>> {
    let start = arena.len();
    STANDARD
        .decode_append(text, arena)
        .map_err(|_| format!("Line {number}: {name} {} is not standard base64.", quoted(text)))?;
    Ok(start..arena.len())
}

/// What a record's members are read into.
trait Fields<'a> {
    /// What the record is, for messages.
    const WHAT: &'static str;

    /// Reads the value of member `name`.
    fn member<A: MapAccess<'a>>(&mut self, name: &str, map: &mut A) -> Result<(), A::Error>;
}

#[derive(Default)]
struct RequestFields<'a> {
    key_id: Option<Cow<'a, str>>,
    number_of_bytes: Option<u32>,
    /// `Some(None)` is `null`, as in other members below.
    aad: Option<Option<Cow<'a, str>>>,
}

impl<'a> Fields<'a> for RequestFields<'a> {
    const WHAT: &'static str = "a request: an object with KeyId, NumberOfBytes and optionally Aad";

    fn member<A: MapAccess<'a>>(&mut self, name: &str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "KeyId" => once("KeyId", &mut self.key_id, map.next_value_seed(Text("KeyId"))?),
            "NumberOfBytes" => {
                once("NumberOfBytes", &mut self.number_of_bytes, map.next_value_seed(Number)?)
            }
            "Aad" => once("Aad", &mut self.aad, map.next_value_seed(Optional("Aad"))?),
            _ => Err(A::Error::custom(format_args!(
                "member {} is unknown; a request has KeyId, NumberOfBytes and optionally Aad",
                quoted(name)
            ))),
        }
    }
}

#[derive(Default)]
struct OutcomeFields<'a> {
    key_id: Option<Option<Cow<'a, str>>>,
    key_version_id: Option<Option<Cow<'a, str>>>,
    iv: Option<Option<Cow<'a, str>>>,
    blob: Option<Option<Cow<'a, str>>>,
    algorithm: Option<Option<Cow<'a, str>>>,
    aad: Option<Option<Cow<'a, str>>>,
    plaintext: Option<IgnoredAny>,
    request_id: Option<IgnoredAny>,
    error: Option<Value>,
}

impl<'a> Fields<'a> for OutcomeFields<'a> {
    const WHAT: &'static str = "a result of `generate`: an object with CiphertextBlob and, unless \
                                --advance made it, KeyId and Iv";

    fn member<A: MapAccess<'a>>(&mut self, name: &str, map: &mut A) -> Result<(), A::Error> {
        let (name, place) = match name {
            "KeyId" => ("KeyId", &mut self.key_id),
            // Read for its type alone: a raw blob is under the key's initial version, the other form names its own.
            "KeyVersionId" => ("KeyVersionId", &mut self.key_version_id),
            "Iv" => ("Iv", &mut self.iv),
            "CiphertextBlob" => ("CiphertextBlob", &mut self.blob),
            "Algorithm" => ("Algorithm", &mut self.algorithm),
            "Aad" => ("Aad", &mut self.aad),
            "Plaintext" => return once("Plaintext", &mut self.plaintext, map.next_value()?),
            "RequestId" => return once("RequestId", &mut self.request_id, map.next_value()?),
            "Error" => return once("Error", &mut self.error, map.next_value()?),
            _ => {
                return Err(A::Error::custom(format_args!(
                    "member {} is unknown; a result has KeyId, KeyVersionId, Iv, Plaintext, \
                     CiphertextBlob, Algorithm, Aad and RequestId",
                    quoted(name)
                )));
            }
        };
        once(name, place, map.next_value_seed(Optional(name))?)
    }
}

/// Keeps a member's value; a second one is an error.
fn once<T, E: serde::de::Error>(name: &str, place: &mut Option<T>, value: T) -> Result<(), E> {
    if place.replace(value).is_some() {
        return Err(E::custom(format_args!("member \"{name}\" is there twice")));
    }
    Ok(())
}

struct Members<'f, F>(&'f mut F);

impl<'a, F: Fields<'a>> Visitor<'a> for Members<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(F::WHAT)
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key_seed(Text("a member name"))? {
            self.0.member(&name, &mut map)?;
        }
        Ok(())
    }
}

/// Reads a string, borrowed from the line where it has no escapes. Holds the member's name for messages.
struct Text(&'static str);

impl<'a> DeserializeSeed<'a> for Text {
    type Value = Cow<'a, str>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Cow<'a, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'a> Visitor<'a> for Text {
    type Value = Cow<'a, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, a string", self.0)
    }

    fn visit_borrowed_str<E>(self, text: &'a str) -> Result<Cow<'a, str>, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E>(self, text: &str) -> Result<Cow<'a, str>, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

/// Reads a string or `null`.
struct Optional(&'static str);

impl<'a> DeserializeSeed<'a> for Optional {
    type Value = Option<Cow<'a, str>>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'a> Visitor<'a> for Optional {
    type Value = Option<Cow<'a, str>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Text(self.0).expecting(f)
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Text(self.0).deserialize(deserializer).map(Some)
    }
}

/// Reads NumberOfBytes. Its range is for the engine to judge.
struct Number;

impl<'a> DeserializeSeed<'a> for Number {
    type Value = u32;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<u32, D::Error> {
        deserializer.deserialize_u32(self)
    }
}

impl Visitor<'_> for Number {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NumberOfBytes, an integer from 1 to 1024")
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<u32, E> {
        u32::try_from(number)
            .map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(number), &self))
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<u32, E> {
        u32::try_from(number)
            .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(number), &self))
    }

    /// Programs that know one kind of number write 32 as 32.0.
    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<u32, E> {
        let integral = number.fract() == 0.0 && (0.0..=u32::MAX.into()).contains(&number);
        if !integral {
            return Err(E::invalid_value(serde::de::Unexpected::Float(number), &self));
        }
        #[expect(clippy::cast_possible_truncation, reason = "just checked")]
        Ok(number as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(line: &str) -> String {
        request(Line::Bytes(line.as_bytes()), 7, &mut Vec::new()).unwrap_err()
    }

    #[test]
    fn a_request_in_every_order() {
        let mut arena = b"before".to_vec();
        let line = r#" {"Aad":"\/w==","NumberOfBytes":32 , "KeyId":"alias/a"} "#;
        let request = request(Line::Bytes(line.as_bytes()), 1, &mut arena).unwrap();
        assert_eq!((&*request.key_id, request.number_of_bytes), ("alias/a", 32));
        assert_eq!((&arena[request.aad], &*request.aad_text), (&[0xff][..], "/w=="));
    }

    #[test]
    fn refusals_name_the_line_and_the_value() {
        for (line, part) in [
            ("", "Line 7 is blank"),
            ("\r", "Line 7 is blank"),
            ("{", "Line 7 is not JSON: EOF"),
            ("[]", "Line 7: invalid type: sequence, expected a request: an object"),
            ("{}", "Line 7: KeyId is missing."),
            (r#"{"KeyId":"k"}"#, "Line 7: NumberOfBytes is missing."),
            (r#"{"KeyId":"k","NumberOfBytes":-1}"#, "`-1`, expected NumberOfBytes"),
            (r#"{"KeyId":"k","NumberOfBytes":1.5}"#, "`1.5`, expected NumberOfBytes"),
            (r#"{"KeyId":"k","NumberOfBytes":"32"}"#, "\"32\", expected NumberOfBytes"),
            (r#"{"KeyId":"k","NumberOfBytes":4294967296}"#, "`4294967296`, expected NumberOfBytes"),
            (r#"{"KeyId":"k","NumberOfBytes":null}"#, "null, expected NumberOfBytes"),
            (r#"{"KeyId":7,"NumberOfBytes":1}"#, "`7`, expected KeyId, a string"),
            (r#"{"KeyId":"k","NumberOfBytes":1,"AAD":""}"#, "member \"AAD\" is unknown"),
            (r#"{"KeyId":"k","KeyId":"k","NumberOfBytes":1}"#, "\"KeyId\" is there twice"),
            (r#"{"KeyId":"k","NumberOfBytes":1,"Aad":"A"}"#, "Aad \"A\" is not standard base64"),
            (r#"{"KeyId":"k","NumberOfBytes":1,"Aad":"_w=="}"#, "Aad \"_w==\""),
            (r#"{"KeyId":"k","NumberOfBytes":1,"Aad":"/w"}"#, "Aad \"/w\""),
            (r#"{"KeyId":"k","NumberOfBytes":1,"Aad":"/x=="}"#, "Aad \"/x==\""),
            (r#"{"KeyId":"k","NumberOfBytes":1} {}"#, "trailing characters"),
        ] {
            let message = refusal(line);
            assert!(message.contains(part), "{line}: {message}");
            assert!(message.starts_with("Line 7"), "{line}: {message}");
        }
        let bad = request(Line::Bytes(b"{\"KeyId\":\"\xff\"}"), 3, &mut Vec::new()).unwrap_err();
        assert_eq!(bad, "Line 3 is not UTF-8 text, at byte 11.");
        let long =
            refusal(&format!("{{\"KeyId\":\"k\",\"NumberOfBytes\":\"{}\"}}", "9".repeat(50_000)));
        assert!(long.len() < 400, "{long}");
    }

    #[test]
    fn what_other_programs_write_is_read_as_it_is_meant() {
        for line in [
            r#"{"KeyId":"k","NumberOfBytes":32,"Aad":null}"#,
            r#"{"KeyId":"k","NumberOfBytes":32.0}"#,
            r#"{"KeyId":"k","NumberOfBytes":3.2e1}"#,
            "\u{feff}{\"KeyId\":\"k\",\"NumberOfBytes\":32}\r",
        ] {
            let request = request(Line::Bytes(line.as_bytes()), 1, &mut Vec::new()).unwrap();
            assert_eq!((request.number_of_bytes, request.aad.len()), (32, 0), "{line}");
        }
        for (line, part) in [
            (r#"{"KeyId":"k","NumberOfBytes":32.5}"#, "`32.5`, expected NumberOfBytes"),
            (r#"{"KeyId":"k","NumberOfBytes":-32.0}"#, "`-32.0`, expected NumberOfBytes"),
            (r#"{"KeyId":"k","NumberOfBytes":1e300}"#, "expected NumberOfBytes"),
            (r#"{"KeyId":null,"NumberOfBytes":32}"#, "null, expected KeyId"),
            (
                r#"{"KeyId":"k","NumberOfBytes":1,"Aad":null,"Aad":"AA=="}"#,
                "\"Aad\" is there twice",
            ),
            ("{\"KeyId\":\"k\",", "a record is one whole line"),
        ] {
            let message = refusal(line);
            assert!(message.contains(part), "{line}: {message}");
        }
        let of = |error: &str, blob: &str| {
            let rest = r#""KeyId":null,"Iv":null,"Algorithm":null,"Aad":null,"Plaintext":null"#;
            let line = format!("{{{rest},\"CiphertextBlob\":{blob},\"Error\":{error}}}\r");
            let mut arena = Vec::new();
            outcome(Line::Bytes(line.as_bytes()), 1, &mut arena).map(|outcome| match outcome {
                Outcome::Key { blob, .. } => Some(blob.len()),
                Outcome::Refused(passed_on) => {
                    assert!(line.as_bytes().starts_with(passed_on) && passed_on.ends_with(b"}"));
                    None
                }
            })
        };
        let none = [r#"null"#, r#"{"Code":null,"Message":null}"#];
        let some = [r#"{"Code":"c","Message":null}"#, r#""c""#, "{}"];
        for error in none {
            assert_eq!(of(error, "\"AAAA\""), Ok(Some(3)), "{error}");
            assert!(of(error, "null").unwrap_err().contains("CiphertextBlob is missing"));
        }
        for error in some {
            assert_eq!(of(error, "null"), Ok(None), "{error}");
        }
    }

    #[test]
    fn outcomes() {
        let line = r#"{"CiphertextBlob":"AAAA","Plaintext":[1],"RequestId":7,"KeyVersionId":"v"}"#;
        let mut arena = Vec::new();
        match outcome(Line::Bytes(line.as_bytes()), 1, &mut arena).unwrap() {
            Outcome::Key { key_id: None, iv: None, blob, algorithm: None, aad } => {
                assert_eq!((&arena[blob], aad.len()), (&[0; 3][..], 0));
            }
            other => panic!("{other:?}"),
        }
        let line = br#"{"Error":{"Code":"c","Message":"m"},"RequestId":"r"}"#;
        match outcome(Line::Bytes(line), 1, &mut arena).unwrap() {
            Outcome::Refused(bytes) => assert_eq!(bytes, line),
            other => panic!("{other:?}"),
        }
        let wrong = outcome(Line::Bytes(b"{\"KeyId\":\"k\"}"), 9, &mut arena).unwrap_err();
        assert_eq!(wrong, "Line 9: CiphertextBlob is missing.");
    }
}
