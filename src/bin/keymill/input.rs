//! Where bytes come from: a file, standard input, or an open descriptor under any name.
//!
//! `-`, `/dev/stdin`, `/dev/fd/3` and `/proc/self/fd/3` are the open descriptor itself, read from where it stands:
//! opening its file once more would begin anew, and for a socket it would fail. A FIFO is waited for.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use crate::{
    failure::{Failure, Result},
    links::{self, Led},
    output::DASH,
    progress::Total,
    standard::{self, Direction},
};

/// An open input.
#[derive(Debug)]
pub(crate) struct Input {
    file: File,
    /// For messages.
    name: String,
    /// What is known of its size.
    pub(crate) total: Total,
}

impl Input {
    /// Opens what `option` names; `-` is standard input.
    ///
    /// # Errors
    /// What is no input is refused here, before any work; that a file is missing, too.
    pub(crate) fn open(option: &str, path: &Path) -> Result<Self> {
        if path == Path::new(DASH) {
            let name = "standard input".to_owned();
            return Self::of(standard::input()?, name, option);
        }
        let fail = |error: io::Error| Failure::file("cannot read", path, &error);
        let name = format!("{path:?}");
        let file = match links::follow(path) {
            Ok(Led::Descriptor(0)) => standard::input()?,
            Ok(Led::Descriptor(number)) => {
                File::from(keymill::standard::duplicate(number).map_err(fail)?)
            }
            _ => File::open(path).map_err(fail)?,
        };
        standard::must_be_open_for(Direction::In, &file, &name)?;
        Self::of(file, name, option)
    }

    fn of(file: File, name: String, option: &str) -> Result<Self> {
        let about = file.metadata();
        if about.as_ref().is_ok_and(|about| about.is_dir()) {
            return Err(Failure::broke(
                format!("cannot read {option} {name}: it is a directory"),
                "name a file in it, or `-` for standard input",
            ));
        }
        let total = match about {
            Ok(about) if about.is_file() => Total::Bytes(about.len()),
            _ => Total::Unknown,
        };
        Ok(Self { file, name, total })
    }

    /// What it is called in messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The open file, for what only its owner and mode tell.
    #[cfg(feature = "server")]
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `out` with what comes, and returns how many bytes there were: fewer at the end alone.
    pub(crate) fn fill(&mut self, out: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < out.len() {
            match self.read(&mut out[filled..]).map_err(|error| self.failure(&error))? {
                0 => break,
                read => filled += read,
            }
        }
        Ok(filled)
    }

    /// Reads all of a small file.
    #[cfg(all(feature = "bench", feature = "server"))]
    pub(crate) fn all(&mut self, len_max: usize) -> Result<zeroize::Zeroizing<Vec<u8>>> {
        let mut bytes = zeroize::Zeroizing::new(vec![0; len_max]);
        let len = self.fill(&mut bytes)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    fn failure(&self, error: &io::Error) -> Failure {
        Failure::broke(
            format!("cannot read {}: {error}", self.name),
            "name a file that can be read, or `-` for standard input",
        )
    }
}

impl Read for Input {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        standard::read(&self.file, out)
    }
}
