//! Text where raw key bytes should be: the usual mistake of whoever makes a key by hand.
//!
//! Looks at every byte whatever the others are, and tells classes of characters apart, nothing else.

use super::KeySpec;

/// What bytes that should be a raw key look like. For programs that read keys from files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TextForm {
    /// Hexadecimal digits.
    Hex,
    /// Base64, of either alphabet.
    Base64,
    /// Printable characters that spell nothing known.
    Text,
    /// A key of raw bytes, and a line end after it.
    LineEnd,
}

/// Fewer characters say too little.
const LEN_MIN: usize = 16;

impl TextForm {
    /// What `bytes` look like, if that is no raw key.
    ///
    /// 32 random bytes are never taken for hex or base64 (once in 2^64 keys), 16 random ones hardly ever for hex (once
    /// in 2^56).
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let stripped = bytes.trim_ascii_end();
        let len = stripped.len();
        let count = |class: fn(&u8) -> bool| stripped.iter().filter(|byte| class(byte)).count();
        if len < LEN_MIN {
            return None;
        }
        if count(u8::is_ascii_hexdigit) == len && len.is_multiple_of(2) {
            return Some(Self::Hex);
        }
        let padding = stripped.iter().rev().take_while(|byte| **byte == b'=').count();
        // Letters of one case alone are words, or a test's constant.
        let mixed = count(u8::is_ascii_uppercase) > 0 && count(u8::is_ascii_lowercase) > 0;
        if mixed && padding <= 2 && count(is_base64) + padding == len {
            return Some(Self::Base64);
        }
        if count(|byte| byte.is_ascii_graphic() || *byte == b' ') == len {
            return Some(Self::Text);
        }
        let is_key = |len| KeySpec::of_len(len).is_some();
        (len < bytes.len() && is_key(len) && !is_key(bytes.len())).then_some(Self::LineEnd)
    }
}

fn is_base64(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'-' | b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_told_from_raw_bytes() {
        let base64 = b"n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=";
        for (bytes, form) in [
            (&b"0123456789abcdef0123456789ABCDEF"[..], Some(TextForm::Hex)),
            (b"0123456789abcdef", Some(TextForm::Hex)),
            (b"0123456789abcdef0123456789abcdef\r\n", Some(TextForm::Hex)),
            (base64, Some(TextForm::Base64)),
            (&base64[..32], Some(TextForm::Base64)),
            (b"n4bQgYhMfWWaL-qgxVrQFaO_TxsrC4Is\n", Some(TextForm::Base64)),
            (b"correct horse battery staple, ok", Some(TextForm::Text)),
            (b"ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ", Some(TextForm::Text)),
            (
                b"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\n",
                Some(TextForm::LineEnd),
            ),
            (&[7; 32], None),
            (&[0xff; 16], None),
            (b"", None),
            (b"short", None),
        ] {
            assert_eq!(TextForm::of(bytes), form, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn no_raw_key_is_taken_for_text() {
        let mut state = 1_u64;
        for len in [24, 32] {
            for _ in 0..20_000 {
                let key: Vec<u8> = (0..len)
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        state.to_be_bytes()[0]
                    })
                    .collect();
                assert_eq!(TextForm::of(&key), None, "{}", key.escape_ascii());
            }
        }
    }
}
