//! The root key: 32 bytes that open a store, kept in a file of their own.
//!
//! The file holds the 32 bytes and nothing else; who may read it is `permissions.rs`. What is made from a root key is
//! `seal.rs`.

use std::{
    fmt, fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

use super::{permissions, place::Draft};
use crate::{
    cpu::Tier,
    error::{Error, ErrorKind, Result},
    keys::TextForm,
    limits::ROOT_KEY_LEN,
    os::LockedBox,
    rng::Rng,
};

/// The key that opens a store: every record of the store is sealed or authenticated under keys made from it.
///
/// Whoever loses it loses every key of the store; whoever has it and the store has every key. Keep the two apart, and
/// back both up.
///
/// Secrets: kept in locked pages, wiped when dropped, never printed.
pub struct RootKey(LockedBox<[u8; ROOT_KEY_LEN]>);

impl RootKey {
    /// Makes a new root key from random bytes of the operating system, and a file of mode 0600 that holds it.
    ///
    /// The file is complete and on the disk when this returns, and on error there is none.
    ///
    /// # Errors
    /// `InvalidParameter` if something exists at `path`; `Machine` if the file cannot be written or there are no random
    /// bytes.
    pub fn create_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = &absolute(path.as_ref())?;
        let mut bytes = Zeroizing::new([0; ROOT_KEY_LEN]);
        Rng::Os(Tier::PORTABLE).fill_from_os(&mut *bytes)?;
        let written = Draft::new(path).and_then(|draft| {
            draft.write(&*bytes)?;
            draft.publish()
        });
        match written {
            Ok(()) => Self::from_bytes(&*bytes),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(refused(path, "exists already; a root key is never overwritten"))
            }
            Err(error) => Err(failed("written", path, &error)),
        }
    }

    /// Reads a root key from its file.
    ///
    /// # Errors
    /// `InvalidParameter` if there is no such file, if it has not exactly 32 bytes, if they are text, or if others may
    /// access it: the owner has to be the effective user or root, and may let a group read it that this process is in
    /// (root any group); `Machine` if it cannot be read.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = &absolute(path.as_ref())?;
        let metadata = match fs::metadata(path) {
            // Opening a named pipe would wait for its writer.
            Ok(metadata) if !metadata.is_file() => return Err(refused(path, "is no file")),
            Ok(_) => fs::File::open(path).and_then(|file| Ok((file.metadata()?, file))),
            Err(error) => Err(error),
        };
        let (metadata, mut file) = match metadata {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(refused(path, "does not exist"));
            }
            Err(error) => return Err(failed("read", path, &error)),
        };
        if let Some(why) = permissions::refuses_root_key(&metadata) {
            return Err(refused(path, &why));
        }
        // More bytes than a key has, so that a longer file is seen as one, and for what it is.
        let mut bytes = Zeroizing::new([0; READ_MAX]);
        let mut len = 0;
        while len < bytes.len() {
            match file.read(&mut bytes[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", path, &error)),
            }
        }
        let form = TextForm::of(&bytes[..len]).map(told).unwrap_or_default();
        if len != ROOT_KEY_LEN || !form.is_empty() {
            let len = metadata.len().max(len as u64);
            let why = format!("has {len} bytes{form}; a root key has {ROOT_KEY_LEN} raw bytes");
            return Err(refused(path, &why));
        }
        Self::from_bytes(&bytes[..ROOT_KEY_LEN])
    }

    /// Takes a root key from the caller, who wipes `bytes`.
    ///
    /// # Errors
    /// `InvalidParameter` for a length other than 32 bytes, and for hex or base64 text.
    ///
    /// Uniqueness: the bytes have to be random and unknown to others; a password is no root key.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.len() != ROOT_KEY_LEN {
            let len = bytes.len();
            let why = format!("The root key has {len} bytes; it has to have {ROOT_KEY_LEN}.");
            return Err(Error::invalid(why));
        }
        // Not other text: whoever calls this may have a use for a constant, and a file is where people put words.
        if let Some(form @ (TextForm::Hex | TextForm::Base64)) = TextForm::of(bytes) {
            let why = format!("The root key has {ROOT_KEY_LEN} bytes{}.", told(form));
            return Err(Error::invalid(why));
        }
        let mut boxed = LockedBox::new_with(|| [0; ROOT_KEY_LEN])?;
        boxed.copy_from_slice(bytes);
        Ok(Self(boxed))
    }

    pub(super) fn expose(&self) -> &[u8; ROOT_KEY_LEN] {
        &self.0
    }
}

impl fmt::Debug for RootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RootKey")
    }
}

/// As much of a file as tells what it is.
const READ_MAX: usize = 256;

/// What text in the place of a root key looks like and what to do, in words that follow its length.
fn told(form: TextForm) -> &'static str {
    match form {
        TextForm::Hex => ", which look like hex: decode them by `xxd -r -p`",
        TextForm::Base64 => ", which look like base64: decode them by `base64 -d`",
        TextForm::Text => ", which look like text, and a password is no root key",
        TextForm::LineEnd => {
            ", of which the last is a line end: write it without, as `printf` does"
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| failed("found", path, &error))
}

fn refused(path: &Path, why: &str) -> Error {
    Error::invalid(format!("The root key file {} {why}.", path.display()))
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Error {
    let detail = format!("The root key file {} could not be {what}: {error}.", path.display());
    Error::new(ErrorKind::Machine, detail)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn write(path: &Path, content: &[u8], mode: u32) {
        let _ = fs::remove_file(path);
        fs::write(path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_new_file_holds_the_key_and_is_never_overwritten() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("root.key");
        let made = RootKey::create_file(&path).unwrap();
        let read = RootKey::from_file(&path).unwrap();
        assert_eq!(made.expose(), read.expose());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "no passing file is left");

        let error = RootKey::create_file(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidParameter);
        assert!(error.message().contains("root.key exists already"), "{error}");
        assert_eq!(RootKey::from_file(&path).unwrap().expose(), made.expose());
        let other = RootKey::create_file(home.path().join("other.key")).unwrap();
        assert_ne!(other.expose(), made.expose());
        assert_eq!(format!("{made:?}"), "RootKey");
    }

    #[test]
    fn a_dangling_link_is_something() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("root.key");
        std::os::unix::fs::symlink(home.path().join("absent"), &path).unwrap();
        assert!(RootKey::create_file(&path).is_err());
        assert!(RootKey::from_file(&path).is_err());
    }

    #[test]
    fn other_lengths_are_named() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("root.key");
        for len in [0, 1, 31, 33, 64, 5000] {
            write(&path, &vec![1; len], 0o600);
            let error = RootKey::from_file(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidParameter);
            assert!(error.message().contains(&format!("has {len} bytes")), "{error}");
            assert!(RootKey::from_bytes(&vec![1; len]).is_err());
        }
        write(&path, &[1; 32], 0o600);
        assert_eq!(RootKey::from_file(&path).unwrap().expose(), &[1; 32]);
    }

    #[test]
    fn access_of_others_is_refused_with_the_remedy() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("root.key");
        for bit in [0o020, 0o010, 0o004, 0o002, 0o001] {
            write(&path, &[1; 32], 0o600 | bit);
            let error = RootKey::from_file(&path).unwrap_err();
            assert!(error.message().contains("chmod 600"), "{error}");
        }
        // A group that this process is in, or that root has chosen, may read.
        for mode in [0o400, 0o440, 0o600, 0o640] {
            write(&path, &[1; 32], mode);
            RootKey::from_file(&path).unwrap();
        }
    }

    #[test]
    fn text_is_no_root_key_whatever_it_spells() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("root.key");
        let hex = "0123456789abcdef".repeat(4);
        for (text, named) in [
            (&hex[..32], "look like hex"),
            (&hex[..], "look like hex"),
            (&format!("{hex}\n"), "look like hex"),
            ("n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is", "look like base64"),
            ("n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=\n", "look like base64"),
            ("correct horse battery staple, ok", "look like text"),
        ] {
            write(&path, text.as_bytes(), 0o600);
            let error = RootKey::from_file(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidParameter);
            assert!(error.message().contains(named), "{error}");
            assert!(!error.message().contains(&text[..8]), "a secret in a message: {error}");
        }
        write(&path, &[&[7; 32][..], b"\n"].concat(), 0o600);
        let error = RootKey::from_file(&path).unwrap_err();
        assert!(error.message().contains("line end"), "{error}");
        assert!(RootKey::from_bytes(&hex.as_bytes()[..32]).is_err());
        assert!(RootKey::from_bytes(b"n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is").is_err());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let home = tempfile::tempdir().unwrap();
        for path in [home.path().to_owned(), home.path().join("absent"), "/dev/null".into()] {
            let error = RootKey::from_file(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidParameter, "{error}");
            assert!(error.message().contains(&path.display().to_string()), "{error}");
        }
        let error = RootKey::create_file(home.path().join("absent/root.key")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Machine, "{error}");
    }
}
