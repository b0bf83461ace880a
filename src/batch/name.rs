//! A key's name as a request has it, quick to compare with the next one.

/// A name and its two ends.
#[derive(Clone, Copy)]
pub(super) struct Name<'a> {
    text: &'a str,
    /// The first and the last eight bytes: all of most names, so that comparing and hashing them calls no function and
    /// touches no other memory.
    ends: [u64; 2],
}

impl<'a> Name<'a> {
    /// Names up to this length are their two ends.
    const ENDS_LEN: usize = 16;

    #[inline]
    pub(super) fn new(text: &'a str) -> Self {
        let bytes = text.as_bytes();
        let ends = match (bytes.first_chunk(), bytes.last_chunk()) {
            (Some(first), Some(last)) => [*first, *last].map(u64::from_ne_bytes),
            _ => {
                let mut short = [0; 8];
                short[..bytes.len()].copy_from_slice(bytes);
                [u64::from_ne_bytes(short), 0]
            }
        };
        Self { text, ends }
    }

    pub(super) fn as_str(self) -> &'a str {
        self.text
    }

    /// The two ends of a name that is nothing beside them.
    #[inline]
    pub(super) fn whole_ends(self) -> Option<[u64; 2]> {
        (self.text.len() <= Self::ENDS_LEN).then_some(self.ends)
    }
}

impl PartialEq for Name<'_> {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.ends == other.ends
            && self.text.len() == other.text.len()
            && (self.text.len() <= Self::ENDS_LEN
                // The same text at the same place needs no comparison of bytes.
                || std::ptr::eq(self.text, other.text)
                || self.text == other.text)
    }
}

impl Eq for Name<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths on both sides of where ends overlap, and where a middle begins.
    #[test]
    fn names_are_equal_as_their_texts_are() {
        for len in [0, 1, 7, 8, 9, 15, 16, 17, 24, 40] {
            let text = "n".repeat(len);
            let copy = text.clone();
            assert!(Name::new(&text) == Name::new(&copy), "{len}");
            assert!(Name::new(&text) != Name::new(&format!("{text}n")), "{len}");
            for at in 0..len {
                let mut other = text.clone();
                other.replace_range(at..=at, "m");
                assert!(Name::new(&text) != Name::new(&other), "{len} {at}");
            }
        }
        // A short name is not taken for one that ends with zeros.
        assert!(Name::new("n") != Name::new("n\0"));
    }
}
