//! Reads the material of `keymill key import`, with an eye for the usual mistake: text instead of raw bytes.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use zeroize::Zeroizing;

use crate::{
    failure::{Failure, Result, hint},
    output::DASH,
    warnings::warn,
};

/// More than any form of a key has, so that the message can tell its length.
const READ_MAX: usize = 256;

/// Material that is wiped when dropped.
pub(crate) struct Material {
    buffer: Zeroizing<[u8; READ_MAX]>,
    len: usize,
}

impl Material {
    /// Reads a file, or standard input for `-`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut material = Self { buffer: Zeroizing::new([0; READ_MAX]), len: 0 };
        let done = if path == Path::new(DASH) {
            material.fill(&mut io::stdin().lock())
        } else {
            File::open(path).and_then(|mut file| material.fill(&mut file))
        };
        done.map_err(|error| Failure::file("cannot read", path, &error))?;
        material.check(path)?;
        Ok(material)
    }

    /// The material itself.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn fill(&mut self, source: &mut impl Read) -> io::Result<()> {
        while self.len < READ_MAX {
            match source.read(&mut self.buffer[self.len..]) {
                Ok(0) => break,
                Ok(read) => self.len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Refuses lengths that are no key's, and says what the bytes look like.
    fn check(&self, path: &Path) -> Result<()> {
        let bytes = self.bytes();
        let stripped = bytes.trim_ascii_end();
        let hex =
            matches!(stripped.len(), 32 | 48 | 64) && stripped.iter().all(u8::is_ascii_hexdigit);
        let key = |len: usize| matches!(len, 16 | 24 | 32);
        if key(bytes.len()) {
            if hex {
                // Thirty-two raw bytes may be anything, so they are taken; by chance they look so once in 2^113 times.
                warn(format_args!(
                    "{path:?} holds {} hex digits, taken as raw bytes; if they spell a shorter key, \
                     delete this one and import the output of `xxd -r -p`",
                    bytes.len()
                ));
            }
            return Ok(());
        }
        let len = match bytes.len() {
            READ_MAX => format!("at least {READ_MAX} bytes"),
            len => format!("{len} bytes"),
        };
        let (looks, next) = if hex {
            (
                ", which look like hex text",
                "turn it into raw bytes first: `xxd -r -p FILE | keymill key import --material -`",
            )
        } else if bytes.len() > stripped.len() && key(stripped.len()) {
            (
                ", of which the last is a line end",
                "write the file without a line end, as `printf` does",
            )
        } else if stripped.len() > 20 && stripped.iter().all(u8::is_ascii_graphic) {
            (
                ", which look like text",
                "turn it into raw bytes first: `base64 -d FILE | keymill key import --material -`",
            )
        } else {
            ("", hint(keymill::ErrorKind::InvalidKeyMaterial))
        };
        Err(Failure::refused(
            format!(
                "InvalidKeyMaterial: {path:?} has {len}{looks}; key material is 16, 24 or 32 raw bytes"
            ),
            next,
        ))
    }
}
