//! Key bytes: zeroised on drop, compared in constant time, never printed.
//!
//! Public: lengths. Everything else here is secret. Long-lived secrets lie in `os::LockedBox`; the types of this file
//! are for material on its way there and for data keys, which are written once, where their caller reads them.

use std::{fmt, ops::Range, sync::Arc};

use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

use crate::{
    error::{Error, ErrorKind, Result},
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

/// Memory that holds many data keys and is wiped before it is freed.
pub(crate) struct SecretArena(Vec<u8>);

impl SecretArena {
    /// Zeroed memory.
    ///
    /// # Errors
    /// `Machine` if the allocator refuses.
    pub(crate) fn zeroed(len: usize) -> Result<Self> {
        zeroed(len).map(Self)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for SecretArena {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Zeroed memory for one column of a batch.
///
/// # Errors
/// `Machine` if the allocator refuses, so that an over-large batch is an error and not an abort.
pub(crate) fn zeroed(len: usize) -> Result<Vec<u8>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(len).map_err(|_| {
        Error::new(ErrorKind::Machine, format!("The allocator refused {len} bytes."))
    })?;
    memory.resize(len, 0);
    Ok(memory)
}

/// The plaintext of one data key: an owned view that shares its batch's memory.
///
/// `Debug` prints the length alone, `==` compares in constant time, and the memory is wiped when the last view of the
/// batch and the batch itself are gone. A view keeps the whole batch's memory alive; [`SecretBytes::detach`] copies one
/// key out of it.
#[derive(Clone)]
pub struct SecretBytes {
    arena: Arc<SecretArena>,
    range: Range<usize>,
}

impl SecretBytes {
    pub(crate) fn view(arena: &Arc<SecretArena>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= arena.0.len());
        Self { arena: Arc::clone(arena), range }
    }

    /// Takes the bytes over, to be wiped on drop.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { arena: Arc::new(SecretArena(bytes)), range }
    }

    /// The key itself. Copies that the caller makes are the caller's to wipe.
    pub fn expose(&self) -> &[u8] {
        &self.arena.0[self.range.clone()]
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// A copy in memory of its own, so that a key kept for long does not keep its batch.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self::from_vec(self.expose().to_vec())
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

    #[test]
    fn secrets_do_not_print() {
        let secret = SecretBytes::from_vec(vec![0x41; 32]);
        assert_eq!(format!("{secret:?}"), "SecretBytes(32 bytes)");
        assert_eq!(format!("{:?}", Material::new(&[0x41; 16]).unwrap()), "Material(16 bytes)");
    }

    #[test]
    fn views_share_memory_and_detached_ones_do_not() {
        let arena = Arc::new(SecretArena((0..64).collect()));
        let view = SecretBytes::view(&arena, 16..48);
        assert_eq!(view.expose().as_ptr(), arena.as_slice()[16..].as_ptr());
        let copy = view.detach();
        assert_eq!(copy, view);
        assert_ne!(copy.expose().as_ptr(), view.expose().as_ptr());
        assert_ne!(SecretBytes::view(&arena, 0..32), view);
    }

    #[test]
    fn material_has_the_length_of_an_aes_key() {
        for len in 0..=64 {
            assert_eq!(Material::new(&vec![7; len]).is_ok(), [16, 24, 32].contains(&len), "{len}");
        }
    }
}
