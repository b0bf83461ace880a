//! What an input is by its first bytes, when it is not what a command reads: each gets a sentence that says what to do.
//!
//! No JSON text begins like any of these, so that nothing that could be read is turned away. A form is known as soon as
//! it can be: a program on the other side of a pipe may send one short line and wait for its answer.

/// What an input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Lines of JSON, or nothing that is known.
    Lines,
    /// An Arrow IPC stream, as its standard has it since 0.15 or as it was before.
    Arrow,
    /// Something else: what it is, and what to do about it.
    Foreign(&'static str, &'static str),
}

/// The mark that some Windows programs put before UTF-8 text. It is no part of the text.
pub(crate) const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

const UTF_16: Form =
    Form::Foreign("UTF-16 text", "convert it to UTF-8, as `iconv -f UTF-16 -t UTF-8 FILE` does");
const UTF_32: Form =
    Form::Foreign("UTF-32 text", "convert it to UTF-8, as `iconv -f UTF-32 -t UTF-8 FILE` does");
const ARRAY: Form = Form::Foreign(
    "a JSON array, and not one object a line",
    "write its items as lines, as `jq -c '.[]' FILE` does",
);
const SPREAD: Form = Form::Foreign(
    "JSON that is spread over several lines, and not one object a line",
    "write each object as one line, as `jq -c . FILE` does",
);
const ARROW_FILE: Form = Form::Foreign(
    "an Arrow IPC file, and not a stream",
    "write it again in the streaming format: `pyarrow.ipc.new_stream`, or `write_ipc_stream` of \
     polars",
);
const FEATHER_1: Form = Form::Foreign(
    "a Feather file of version 1",
    "write it again as an Arrow IPC stream, or as JSON Lines",
);
const PARQUET: Form =
    Form::Foreign("a Parquet file", "write it again as JSON Lines, or as an Arrow IPC stream");
const GZIP: Form = Form::Foreign("compressed by gzip", "lead `gzip -dc FILE` into `-`");
const ZSTD: Form = Form::Foreign("compressed by zstd", "lead `zstd -dc FILE` into `-`");
const XZ: Form = Form::Foreign("compressed by xz", "lead `xz -dc FILE` into `-`");
const BZIP2: Form = Form::Foreign("compressed by bzip2", "lead `bzip2 -dc FILE` into `-`");
const LZ4: Form = Form::Foreign("compressed by lz4", "lead `lz4 -dc FILE` into `-`");
const ZIP: Form = Form::Foreign("a ZIP archive", "unpack it, and name the file in it");
const SQLITE: Form = Form::Foreign("an SQLite database", "name a file of lines, not the key store");
const AVRO: Form = Form::Foreign("an Avro file", "write it again as JSON Lines");
const ORC: Form = Form::Foreign("an ORC file", "write it again as JSON Lines");

/// First bytes. Of two that begin alike, the longer stands first.
const MARKS: [(&[u8], Form); 22] = [
    (&[0xff, 0xff, 0xff, 0xff], Form::Arrow),
    (b"ARROW1", ARROW_FILE),
    (b"FEA1", FEATHER_1),
    (b"PAR1", PARQUET),
    (b"PARE", PARQUET),
    (&[0x1f, 0x8b], GZIP),
    (&[0x28, 0xb5, 0x2f, 0xfd], ZSTD),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], XZ),
    (b"BZh", BZIP2),
    (&[0x04, 0x22, 0x4d, 0x18], LZ4),
    (b"PK\x03\x04", ZIP),
    (b"SQLite format 3\0", SQLITE),
    (b"Obj\x01", AVRO),
    (b"ORC", ORC),
    (&[0xff, 0xfe, 0, 0], UTF_32),
    (&[0, 0, 0xfe, 0xff], UTF_32),
    (&[0xff, 0xfe], UTF_16),
    (&[0xfe, 0xff], UTF_16),
    // Without a mark, by the first character of an object or an array.
    (b"{\0", UTF_16),
    (b"\0{", UTF_16),
    (b"[\0", UTF_16),
    (b"\0[", UTF_16),
];

/// What begins with `bytes`, of which there are more unless they have `ended`. `None` if more are needed to tell.
pub(crate) fn form(bytes: &[u8], ended: bool) -> Option<Form> {
    if !ended && MARKS.iter().any(|(mark, _)| mark.len() > bytes.len() && mark.starts_with(bytes)) {
        return None;
    }
    if let Some((_, form)) = MARKS.iter().find(|(mark, _)| bytes.starts_with(mark)) {
        return Some(*form);
    }
    if let Some(legacy) = legacy_arrow(bytes, ended) {
        return legacy.then_some(Form::Arrow);
    }
    let text = bytes.strip_prefix(&BYTE_ORDER_MARK).unwrap_or(bytes);
    if !ended && BYTE_ORDER_MARK.len() > bytes.len() && BYTE_ORDER_MARK.starts_with(bytes) {
        return None;
    }
    match text.trim_ascii_start() {
        // Blank so far. A blank line is answered as such, and so is what comes after it.
        [] => (ended || text.contains(&b'\n')).then_some(Form::Lines),
        [b'[', ..] => Some(ARRAY),
        [b'{', rest @ ..] => {
            let blanks = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r'));
            match rest.get(blanks.count()) {
                None => ended.then_some(Form::Lines),
                Some(b'\n') => Some(SPREAD),
                Some(_) => Some(Form::Lines),
            }
        }
        _ => Some(Form::Lines),
    }
}

/// Whether a stream of Arrow before 0.15 begins here: it has no mark, but a length right away. `None` if not; otherwise
/// whether it is known to be one.
///
/// With its own four bytes, that length is a multiple of eight. No character that a JSON text or a line of one begins
/// with is so, and what has a line end here is a line.
fn legacy_arrow(bytes: &[u8], ended: bool) -> Option<bool> {
    const LEN_MAX: u32 = 1 << 20;
    if bytes.first()? % 8 != 4 || bytes.len() < 4 && (ended || bytes.contains(&b'\n')) {
        return None;
    }
    let Some(len) = bytes.first_chunk() else { return Some(false) };
    (u32::from_le_bytes(*len) <= LEN_MAX).then_some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mark_is_known_as_soon_as_it_is_complete_and_not_before() {
        for (mark, expected) in MARKS {
            assert_eq!(form(&[mark, b"rest of it"].concat(), false), Some(expected), "{mark:?}");
            for len in 0..mark.len() {
                let shorter = MARKS.iter().any(|(other, _)| *other == &mark[..len]);
                assert!(shorter || form(&mark[..len], false).is_none(), "{mark:?} {len}");
            }
        }
        assert_eq!(form(&[0xff, 0xfe, b'{', 0], false), Some(UTF_16));
        assert_eq!(form(&[0x3c, 2, 0, 0, 0x10, 0, 0, 0], false), Some(Form::Arrow));
    }

    #[test]
    fn lines_are_lines_after_as_few_bytes_as_it_takes() {
        for text in ["{\"", "{}\n", "{ \"", "{}", "\n", " \r\n", "true", "x", "t\n", "<abc", "7\n"]
        {
            assert_eq!(form(text.as_bytes(), false), Some(Form::Lines), "{text:?}");
        }
        for text in ["", "{", " ", "\u{feff}", "\u{feff}{", "t", "{  "] {
            assert_eq!(form(text.as_bytes(), false), None, "{text:?}");
            assert_eq!(form(text.as_bytes(), true), Some(Form::Lines), "{text:?}");
        }
        for (text, expected) in [
            ("[{\"KeyId\"", ARRAY),
            ("\u{feff} [", ARRAY),
            ("{\n  \"KeyId\"", SPREAD),
            ("\u{feff}{ \r\n", SPREAD),
        ] {
            assert_eq!(form(text.as_bytes(), false), Some(expected), "{text:?}");
        }
    }
}
