//! The password that protects a client's key, in a file: read if it is there, made if not.
//!
//! The rules are those of the KMS for its client keys, so that a password is good in either place. A password is never
//! printed; messages name its file.

use std::{
    fs, io, mem,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use keymill::ErrorKind;
use zeroize::Zeroizing;

use super::new_file::NewFile;
use crate::{
    failure::{Failure, Result, hint},
    input::Input,
    warnings::warn,
};

const LEN_MIN: usize = 8;
const LEN_MAX: usize = 64;
/// Characters besides letters and digits.
const SPECIAL: &[u8] = b"~!@#$%^&*?_-";
/// Characters of a new password: 144 random bits.
const NEW_LEN: usize = 24;
/// Of new passwords: 64, so that six random bits choose one.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
/// More than the longest password and its line end, so that one that is too long is seen to be.
const READ_MAX: usize = LEN_MAX + 3;

/// A password, wiped when it is dropped. A file that was made for it is then removed, unless it is to be kept.
pub(super) struct Password {
    text: Zeroizing<String>,
    path: PathBuf,
    state: State,
}

enum State {
    /// The file was there before.
    Found,
    /// There is no file yet, and this is to be it.
    Missing(NewFile),
    /// The file is ours, and goes if the client does not come to be.
    Made,
    /// It stays.
    Kept,
}

impl Password {
    /// Reads the password in `path`, or makes up one for a file that does not exist, if it can be made there.
    pub(super) fn of_file(path: &Path) -> Result<Self> {
        let missing = matches!(
            fs::metadata(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound
        );
        let (text, state) = match missing {
            true => (made_up()?, State::Missing(NewFile::begin("--password-file", path)?)),
            false => (read(path, Input::open("--password-file", path)?)?, State::Found),
        };
        Ok(Self { text, path: path.to_owned(), state })
    }

    /// The password itself.
    pub(super) fn expose(&self) -> &str {
        &self.text
    }

    /// Writes the file if there is none. Never over a file that has come meanwhile.
    pub(super) fn make_if_missing(&mut self) -> Result<()> {
        match mem::replace(&mut self.state, State::Found) {
            State::Missing(file) => {
                let line = Zeroizing::new(format!("{}\n", *self.text));
                file.finish(line.as_bytes())?;
                self.state = State::Made;
            }
            state => self.state = state,
        }
        Ok(())
    }

    /// Leaves the file where it is. Returns whether it was made.
    pub(super) fn keep(mut self) -> bool {
        let made = matches!(self.state, State::Made);
        self.state = State::Kept;
        made
    }
}

impl Drop for Password {
    fn drop(&mut self) {
        if matches!(self.state, State::Made) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn read(path: &Path, mut input: Input) -> Result<Zeroizing<String>> {
    // A pipe has no owner whose carelessness there is to warn of.
    let metadata = input.file().metadata();
    let metadata = metadata.map_err(|error| Failure::file("cannot read", path, &error))?;
    if metadata.is_file() && metadata.permissions().mode() & 0o077 != 0 {
        warn(format_args!(
            "others than its owner may access {path:?}; `chmod 600` makes it private"
        ));
    }
    let mut buffer = Zeroizing::new([0; READ_MAX]);
    let len = input.fill(&mut *buffer)?;
    let bytes = &buffer[..len];
    let bytes =
        bytes.strip_suffix(b"\n").map_or(bytes, |cut| cut.strip_suffix(b"\r").unwrap_or(cut));
    if let Err(why) = check(bytes) {
        return Err(Failure::refused(
            format!("the password in {path:?} {why}"),
            format!(
                "a password has {LEN_MIN} to {LEN_MAX} characters of at least two kinds: digits, \
                 letters, and {}; name a file that does not exist, and one is made",
                String::from_utf8_lossy(SPECIAL)
            ),
        ));
    }
    Ok(Zeroizing::new(bytes.iter().copied().map(char::from).collect()))
}

/// Says what is wrong with a password, in words that do not give it away.
fn check(password: &[u8]) -> Result<(), &'static str> {
    let kinds: [fn(&u8) -> bool; 3] =
        [u8::is_ascii_digit, u8::is_ascii_alphabetic, |byte| SPECIAL.contains(byte)];
    if !password.iter().all(|byte| kinds.iter().any(|kind| kind(byte))) {
        return Err("has characters that are neither digits nor letters nor among ~!@#$%^&*?_-");
    }
    if password.len() < LEN_MIN {
        return Err("is shorter than 8 characters");
    }
    if password.len() > LEN_MAX {
        return Err("is longer than 64 characters");
    }
    if kinds.iter().filter(|kind| password.iter().any(*kind)).count() < 2 {
        return Err("has characters of one kind only");
    }
    Ok(())
}

fn made_up() -> Result<Zeroizing<String>> {
    let mut random = Zeroizing::new([0; NEW_LEN]);
    loop {
        getrandom::fill(&mut *random).map_err(|error| {
            Failure::broke(format!("no random bytes: {error}"), hint(ErrorKind::Machine))
        })?;
        for byte in random.iter_mut() {
            *byte = ALPHABET[usize::from(*byte % 64)];
        }
        // One of a single kind is drawn again; that is one in many millions.
        if check(&*random).is_ok() {
            let text = random.iter().copied().map(char::from);
            return Ok(Zeroizing::new(text.collect()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_at_and_beyond_their_limits() {
        for good in ["abcdefg1", "1234567~", "~~~~~~~a", &"aB3".repeat(21)] {
            assert!(check(good.as_bytes()).is_ok(), "{good}");
        }
        assert!(check(&[b"1".as_slice(), &[b'a'; 63]].concat()).is_ok());
        for (bad, why) in [
            ("", "shorter"),
            ("abcdef1", "shorter"),
            ("abcdefgh", "one kind"),
            ("abcdEFGH", "one kind"),
            ("12345678", "one kind"),
            ("~!@#$%^&*?_-", "one kind"),
            ("abcdefg 1", "characters that"),
            ("abcdefg1\n", "characters that"),
            ("abcdefg1é", "characters that"),
            ("abcdefg1+", "characters that"),
            (&"a1".repeat(33), "longer"),
        ] {
            let said = check(bad.as_bytes()).unwrap_err();
            assert!(said.contains(why), "{bad}: {said}");
        }
    }

    #[test]
    fn new_passwords_differ_and_keep_the_rules() {
        let passwords: Vec<_> = (0..64).map(|_| made_up().unwrap()).collect();
        for password in &passwords {
            assert_eq!(password.len(), 24);
            assert!(check(password.as_bytes()).is_ok());
            assert_eq!(passwords.iter().filter(|other| other == &password).count(), 1);
        }
    }
}
