//! Key bytes: zeroised on drop, compared in constant time, never printed.
//!
//! Public: lengths. Everything else here is secret. Long-lived secrets lie in `os::LockedBox`; the types of this file
//! are for material on its way there and for data keys, which are written once, where their caller reads them (those of
//! batches in `memory`).

use std::{fmt, ops::Range, sync::Arc};

use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

use crate::{
    error::{Error, ErrorKind, Result},
    memory::Memory,
    os::LockedBox,
};

/// Raw KEK material of 16, 24 or 32 bytes, in locked pages.
pub(crate) struct Material {
    bytes: LockedBox<[u8; 32]>,
    len: usize,
}

impl Material {
    /// Copies material; the caller wipes its own copy.
    ///
    /// # Errors
    /// `InvalidKeyMaterial` for a length other than 16, 24 and 32.
    pub(crate) fn new(bytes: &[u8]) -> Result<Self> {
        if !matches!(bytes.len(), 16 | 24 | 32) {
            return Err(Error::new(
                ErrorKind::InvalidKeyMaterial,
                format!("It has {} bytes; AES keys have 16, 24 or 32.", bytes.len()),
            ));
        }
        let mut boxed = LockedBox::new_with(|| [0; 32])?;
        boxed[..bytes.len()].copy_from_slice(bytes);
        Ok(Self { bytes: boxed, len: bytes.len() })
    }

    /// The material itself.
    pub(crate) fn expose(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Material({} bytes)", self.len)
    }
}

/// The plaintext of one data key: alone in memory of its own, or a view of its batch's memory.
///
/// `Debug` prints the length alone and `==` compares in constant time. A key in memory of its own is wiped when it is
/// dropped, and a clone is a copy. A view shares the batch's memory, which is wiped when the last view of the batch and
/// the batch itself are gone; [`SecretBytes::detach`] copies one key out of it.
pub struct SecretBytes(Inner);

enum Inner {
    Own(Vec<u8>),
    /// In the boxed data key that this is a part of, and never on its own: moving it would leave a copy behind.
    Held {
        len: u8,
        bytes: [u8; HELD_LEN_MAX],
    },
    View {
        memory: Arc<Memory>,
        range: Range<usize>,
    },
}

/// Longest data key that is held in place.
pub(crate) const HELD_LEN_MAX: usize = 32;

impl SecretBytes {
    /// No bytes.
    pub(crate) const EMPTY: Self = Self(Inner::Held { len: 0, bytes: [0; HELD_LEN_MAX] });

    /// Makes room for `len` zeros, to be written once they are where they will stay. In place if they are few.
    pub(crate) fn set_len_in_place(&mut self, len: usize) {
        match (u8::try_from(len), &mut self.0) {
            (Ok(short), Inner::Held { len: held, .. }) if len <= HELD_LEN_MAX => *held = short,
            (_, inner) => *inner = Inner::Own(vec![0; len]),
        }
    }

    /// The data key at `range` of a batch's column.
    pub(crate) fn view(memory: &Arc<Memory>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= memory.columns().deks.len());
        Self(Inner::View { memory: Arc::clone(memory), range })
    }

    /// Takes the bytes over, to be wiped on drop.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self(Inner::Own(bytes))
    }

    /// The key itself. Copies that the caller makes are the caller's to wipe.
    pub fn expose(&self) -> &[u8] {
        match &self.0 {
            Inner::Own(bytes) => bytes,
            Inner::Held { len, bytes } => &bytes[..usize::from(*len)],
            Inner::View { memory, range } => &memory.columns().deks[range.clone()],
        }
    }

    /// The key, to be written; `None` of a view, which others may see.
    pub(crate) fn expose_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.0 {
            Inner::Own(bytes) => Some(bytes),
            Inner::Held { len, bytes } => Some(&mut bytes[..usize::from(*len)]),
            Inner::View { .. } => None,
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.expose().len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy in memory of its own, so that a key kept for long does not keep its batch.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self::from_vec(self.expose().to_vec())
    }
}

impl Clone for SecretBytes {
    fn clone(&self) -> Self {
        match &self.0 {
            Inner::View { memory, range } => Self::view(memory, range.clone()),
            Inner::Own(_) | Inner::Held { .. } => self.detach(),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        match self {
            Self::Own(bytes) => wipe(bytes),
            // As a slice: an array is zeroed byte by byte.
            Self::Held { bytes, .. } => bytes.as_mut_slice().zeroize(),
            Self::View { .. } => {}
        }
    }
}

/// Zeroes all of a vector's memory. `Vec::zeroize` would also write zero bytes behind a full one, which takes longer
/// than wiping a key where the address is not mapped.
fn wipe(bytes: &mut Vec<u8>) {
    bytes.as_mut_slice().zeroize();
    if bytes.capacity() > bytes.len() {
        bytes.spare_capacity_mut().zeroize();
    }
}

impl PartialEq for SecretBytes {
    fn eq(&self, other: &Self) -> bool {
        self.expose().ct_eq(other.expose()).into()
    }
}

impl Eq for SecretBytes {}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.len())
    }
}

/// A 32-byte seed of a ChaCha20 generator, wiped on drop.
pub(crate) type Seed = Zeroizing<[u8; 32]>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{ColumnLens, Recycler};

    #[test]
    fn secrets_do_not_print() {
        let secret = SecretBytes::from_vec(vec![0x41; 32]);
        assert_eq!(format!("{secret:?}"), "SecretBytes(32 bytes)");
        assert_eq!(format!("{:?}", Material::new(&[0x41; 16]).unwrap()), "Material(16 bytes)");
    }

    #[test]
    fn views_share_memory_and_detached_ones_do_not() {
        let lens = ColumnLens { deks: 64, ivs: 24, blobs: 120 };
        let mut memory = Memory::take(&Recycler::new(0), lens).unwrap();
        memory.columns_mut().deks.copy_from_slice(&(0..64).collect::<Vec<_>>());
        let memory = Arc::new(memory);
        let view = SecretBytes::view(&memory, 16..48);
        assert_eq!(view.expose().as_ptr(), memory.columns().deks[16..].as_ptr());
        assert_eq!(view.clone().expose().as_ptr(), view.expose().as_ptr());
        let copy = view.detach();
        assert!(copy == view && copy.clone() == view);
        assert_ne!(copy.expose().as_ptr(), view.expose().as_ptr());
        assert_ne!(SecretBytes::view(&memory, 0..32), view);
    }

    #[test]
    fn material_has_the_length_of_an_aes_key() {
        for len in 0..=64 {
            assert_eq!(Material::new(&vec![7; len]).is_ok(), [16, 24, 32].contains(&len), "{len}");
        }
    }
}
