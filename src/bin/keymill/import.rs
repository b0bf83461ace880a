//! Reads the material of `keymill key import`, with an eye for the usual mistake: text instead of raw bytes.

use std::path::Path;

use keymill::{ErrorKind, TextForm};
use zeroize::Zeroizing;

use crate::{
    failure::{Failure, Result, hint},
    home::Home,
    identity::Named,
    input::Input,
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
    /// Refuses files that hold something else than material, or that this command is about to write to.
    pub(crate) fn check_place(home: &Home, path: &Path) -> Result<()> {
        let material = Named::input("--material", path);
        home.excludes(&material, "which holds no material")?;
        Named::standard_output().spares(&material, "which would be damaged")
    }

    /// Reads a file, or standard input for `-`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut material = Self { buffer: Zeroizing::new([0; READ_MAX]), len: 0 };
        let mut input = Input::open("--material", path)?;
        material.len = input.fill(&mut *material.buffer)?;
        material.check(path)?;
        Ok(material)
    }

    /// The material itself.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// Refuses lengths that are no key's, and says what the bytes look like.
    fn check(&self, path: &Path) -> Result<()> {
        let bytes = self.bytes();
        if is_key(bytes.len()) {
            if bytes.iter().all(u8::is_ascii_graphic) {
                // Raw bytes may be anything, so they are taken; 16 random ones look like this once in 2^23 times.
                warn(format_args!(
                    "{path:?} holds {} characters of text, taken as raw bytes; if they spell a \
                     key in hex or base64, delete this one and import the decoded bytes",
                    bytes.len()
                ));
            }
            return Ok(());
        }
        let len = match bytes.len() {
            READ_MAX => format!("at least {READ_MAX} bytes"),
            len => format!("{len} bytes"),
        };
        let (looks, next) = looks(bytes);
        Err(Failure::refused(
            format!(
                "InvalidKeyMaterial: {path:?} has {len}{looks}; a key has 16, 24 or 32 raw bytes"
            ),
            next,
        ))
    }
}

fn is_key(len: usize) -> bool {
    matches!(len, 16 | 24 | 32)
}

/// What bytes that are no key look like, and what to do about it.
fn looks(bytes: &[u8]) -> (&'static str, &'static str) {
    const BASE64: (&str, &str) =
        (", which look like text", "decode it: `base64 -d FILE | keymill key import --material -`");
    match TextForm::of(bytes) {
        // Base64 of a key that happens to have no other digits is longer than that.
        Some(TextForm::Hex) if is_key(bytes.trim_ascii_end().len() / 2) => (
            ", which look like hex",
            "decode it: `xxd -r -p FILE | keymill key import --material -`",
        ),
        Some(_) if is_key(bytes.trim_ascii_end().len()) => {
            (", of which the last is a line end", "write the file without it, as `printf` does")
        }
        Some(TextForm::Hex | TextForm::Base64 | TextForm::Text) => BASE64,
        _ => ("", hint(ErrorKind::InvalidKeyMaterial)),
    }
}
