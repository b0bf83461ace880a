//! Layouts of `CiphertextBlob`: the only file that knows them. `n` is NumberOfBytes, or the length of a caller's text.
//!
//! ```text
//! raw                Direct    ct[n] tag[16]                                                  n + 16
//!                    Derived   salt[12] ct[n] tag[16]                                         n + 28
//! self-describing    Direct    24 00 02 | KeyVersionId[36] | Iv[12] | ct[n] tag[16]           n + 67
//!                    Derived   24 00 02 | KeyVersionId[36] | Iv[12] | salt[12] ct[n] tag[16]  n + 79
//! ```
//!
//! `GenerateDataKey` and `Encrypt` return raw blobs with the IV beside them, their Advance forms self-describing ones.
//! The head is the KMS's: `$`, cipher version and padding mode, algorithm 2 = AES_GCM. The scheme is the key version's.
//! What the bytes of a KeyVersionId mean is left to the caller: `keys` uses this room, not the other way round.

use std::ops::Range;

use super::Scheme;
use crate::limits::{BLOB_HEAD_LEN, BLOB_MAGIC_LEN, IV_LEN, KEY_VERSION_ID_LEN, SALT_LEN, TAG_LEN};

/// The head of a self-describing blob of AES-GCM.
pub(crate) const MAGIC: [u8; BLOB_MAGIC_LEN] = [0x24, 0x00, 0x02];

/// Which of the two forms of blob an operation makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// The wrapped key alone.
    Raw,
    /// With version id and IV in front.
    SelfDescribing,
}

/// Where the parts of a blob lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    pub(crate) form: Form,
    pub(crate) scheme: Scheme,
    /// Bytes of the wrapped data key, or of the encrypted text.
    pub(crate) dek_len: usize,
}

impl Layout {
    /// Bytes before the salt or the ciphertext.
    fn head_len(self) -> usize {
        match self.form {
            Form::Raw => 0,
            Form::SelfDescribing => BLOB_HEAD_LEN,
        }
    }

    /// Where the ciphertext begins.
    pub(crate) fn ciphertext_at(self) -> usize {
        self.head_len()
            + match self.scheme {
                Scheme::Direct => 0,
                Scheme::Derived => SALT_LEN,
            }
    }

    /// Bytes of the whole blob.
    pub(crate) fn len(self) -> usize {
        self.ciphertext_at() + self.dek_len + TAG_LEN
    }

    /// Writes everything but ciphertext and tag into `blob`, which has this layout's length.
    pub(crate) fn write_head(
        self,
        blob: &mut [u8],
        version: &[u8; KEY_VERSION_ID_LEN],
        iv: &[u8; IV_LEN],
        salt: &[u8; SALT_LEN],
    ) {
        self.write_heads(blob, version, std::slice::from_ref(iv), salt);
    }

    /// Writes everything but ciphertext and tag into each of `blobs`, one for each IV, side by side.
    pub(crate) fn write_heads(
        self,
        blobs: &mut [u8],
        version: &[u8; KEY_VERSION_ID_LEN],
        ivs: &[[u8; IV_LEN]],
        salt: &[u8; SALT_LEN],
    ) {
        assert_eq!(blobs.len(), ivs.len() * self.len());
        let heads = blobs.chunks_exact_mut(self.len()).zip(ivs);
        match (self.form, self.scheme) {
            (Form::Raw, Scheme::Direct) => {}
            (Form::Raw, Scheme::Derived) => {
                for (blob, _) in heads {
                    blob[..SALT_LEN].copy_from_slice(salt);
                }
            }
            (Form::SelfDescribing, scheme) => {
                let mut head = [0; BLOB_HEAD_LEN + SALT_LEN];
                head[..BLOB_MAGIC_LEN].copy_from_slice(&MAGIC);
                head[VERSION_AT].copy_from_slice(version);
                head[BLOB_HEAD_LEN..].copy_from_slice(salt);
                for (blob, iv) in heads {
                    if scheme == Scheme::Derived {
                        blob[..head.len()].copy_from_slice(&head);
                    } else {
                        blob[..BLOB_HEAD_LEN].copy_from_slice(&head[..BLOB_HEAD_LEN]);
                    }
                    blob[IV_AT].copy_from_slice(iv);
                }
            }
        }
    }
}

const VERSION_AT: Range<usize> = BLOB_MAGIC_LEN..BLOB_MAGIC_LEN + KEY_VERSION_ID_LEN;
const IV_AT: Range<usize> = VERSION_AT.end..VERSION_AT.end + IV_LEN;

/// The 36 bytes at the place of the version id, if `blob` begins as a self-describing one. Whether they are an id and
/// name a version that exists, and so whether the blob is self-describing at all, is for the caller to look up.
///
/// The magic and the id alone decide: a blob that ends within its IV is a self-describing one that was cut, which
/// [`dek_len`] refuses, and must not be read as a raw one.
#[inline]
pub(crate) fn head(blob: &[u8]) -> Option<&[u8; KEY_VERSION_ID_LEN]> {
    let version = blob.get(VERSION_AT).filter(|_| blob.starts_with(&MAGIC))?;
    Some(version.try_into().expect("KEY_VERSION_ID_LEN"))
}

/// The IV of a self-describing blob. `None` if the blob ends before.
#[inline]
pub(crate) fn iv(blob: &[u8]) -> Option<&[u8; IV_LEN]> {
    blob.get(IV_AT)?.try_into().ok()
}

/// Whether a blob begins as a self-describing one, cut or not.
pub(crate) fn claims_head(blob: &[u8]) -> bool {
    blob.starts_with(&MAGIC) || MAGIC.starts_with(blob)
}

/// A blob cut into its parts.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// Zeros for `Direct`, which has none.
    pub(crate) salt: [u8; SALT_LEN],
    /// Ciphertext and tag.
    pub(crate) sealed: &'a [u8],
}

/// Bytes of the data key in a blob. `None` if the blob is too short to hold even one.
#[inline]
pub(crate) fn dek_len(blob: &[u8], form: Form, scheme: Scheme) -> Option<usize> {
    let others = Layout { form, scheme, dek_len: 0 }.len();
    blob.len().checked_sub(others).filter(|len| *len > 0)
}

/// Cuts a blob. `None` if it is too short to hold even one byte of data key.
#[inline]
pub(crate) fn cut(blob: &[u8], form: Form, scheme: Scheme) -> Option<Parts<'_>> {
    dek_len(blob, form, scheme)?;
    let (head, sealed) = blob.split_at(Layout { form, scheme, dek_len: 0 }.ciphertext_at());
    let salt = match scheme {
        Scheme::Direct => [0; SALT_LEN],
        Scheme::Derived => *head.last_chunk().expect("a salt comes last in it"),
    };
    Some(Parts { salt, sealed })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &[u8; KEY_VERSION_ID_LEN] = b"key-hzz62f1cb66fa42qopd9s-17kedvabcd";

    #[test]
    fn lengths_are_those_of_the_table() {
        let len = |form, scheme| Layout { form, scheme, dek_len: 32 }.len() - 32;
        assert_eq!(len(Form::Raw, Scheme::Direct), 16);
        assert_eq!(len(Form::Raw, Scheme::Derived), 28);
        assert_eq!(len(Form::SelfDescribing, Scheme::Direct), 67);
        assert_eq!(len(Form::SelfDescribing, Scheme::Derived), 79);
    }

    #[test]
    fn what_is_written_is_cut_again() {
        for form in [Form::Raw, Form::SelfDescribing] {
            for scheme in [Scheme::Direct, Scheme::Derived] {
                let layout = Layout { form, scheme, dek_len: 5 };
                let mut blob = vec![0xee; layout.len()];
                layout.write_head(&mut blob, VERSION, &[1; 12], &[2; 12]);
                let parts = cut(&blob, form, scheme).unwrap();
                assert_eq!(parts.sealed, [0xee; 21]);
                assert_eq!(dek_len(&blob, form, scheme), Some(5));
                assert_eq!(parts.salt, if scheme == Scheme::Derived { [2; 12] } else { [0; 12] });
                let described = form == Form::SelfDescribing;
                assert_eq!(head(&blob), described.then_some(VERSION));
                assert!(!described || iv(&blob) == Some(&[1; 12]));
                for short in 0..=layout.len() - 5 {
                    assert!(cut(&blob[..short], form, scheme).is_none(), "{short}");
                    assert_eq!(dek_len(&blob[..short], form, scheme), None, "{short}");
                }
            }
        }
    }

    #[test]
    fn only_the_magic_and_the_length_make_a_head() {
        let layout = Layout { form: Form::SelfDescribing, scheme: Scheme::Direct, dek_len: 1 };
        let mut blob = vec![0; layout.len()];
        layout.write_head(&mut blob, &[0xff; KEY_VERSION_ID_LEN], &[1; 12], &[0; 12]);
        // Not an id, not even text: for the caller to say.
        assert_eq!(head(&blob), Some(&[0xff; KEY_VERSION_ID_LEN]));
        for len in 0..VERSION_AT.end {
            assert_eq!(head(&blob[..len]), None, "{len}");
        }
        for len in VERSION_AT.end..BLOB_HEAD_LEN {
            assert_eq!(head(&blob[..len]), Some(&[0xff; KEY_VERSION_ID_LEN]), "{len}");
            assert_eq!(iv(&blob[..len]), None, "{len}");
            assert!(cut(&blob[..len], Form::SelfDescribing, Scheme::Direct).is_none());
        }
        for bit in 0..8 * BLOB_MAGIC_LEN {
            let mut other = blob.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(head(&other), None, "{bit}");
        }
    }
}
