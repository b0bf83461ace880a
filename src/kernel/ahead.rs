//! Single messages whose AES is done ahead of them.
//!
//! AES-GCM encrypts counters, which follow from the IV alone: before there is a message, [`KeyStreams`] holds the mask
//! of its tag and its key stream, for the next [`AHEAD`] IVs of a key, made by the widest kernel at once. A message
//! then takes a few multiplications, and waits for no AES rounds.
//!
//! Public: lengths. Secret: streams, which are worth as much as the messages that they will hide; they lie in locked
//! pages and are zeroed as they are used.

use zeroize::{Zeroize, zeroize_stack};

#[cfg(target_arch = "x86_64")]
use super::x86_64;
use super::{Iv, KeyRef, RefInner, STACK_LEN};
use crate::{error::Result, limits::TAG_LEN, os::LockedBox};

/// IVs whose streams are made together.
pub(crate) const AHEAD: usize = 8;
/// The longest message that there is a stream for.
pub(crate) const AHEAD_LEN_MAX: usize = 32;

/// The encrypted J0, then the key stream, of one IV.
pub(super) type Stream = [[u8; 16]; 1 + AHEAD_LEN_MAX / 16];

/// Streams of IVs in a row, in order; those that are used are zeros.
pub(crate) struct KeyStreams {
    streams: LockedBox<[Stream; AHEAD]>,
    /// Streams from here on are there to be used.
    next: usize,
}

impl KeyRef<'_> {
    /// Whether there are key streams on this key's tier. The portable one seals in one piece.
    pub(crate) fn has_streams(self) -> bool {
        !matches!(self.0, RefInner::Portable(_))
    }
}

impl KeyStreams {
    /// No streams.
    ///
    /// # Errors
    /// `Machine` if there is no memory.
    pub(crate) fn new() -> Result<Self> {
        let streams = LockedBox::new_with(|| [[[0; 16]; _]; AHEAD])?;
        Ok(Self { streams, next: AHEAD })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.next == AHEAD
    }

    /// Makes the streams of `ivs` under `key`, which [`KeyRef::has_streams`].
    pub(crate) fn fill(&mut self, key: KeyRef<'_>, ivs: &[Iv; AHEAD]) {
        match key.0 {
            RefInner::Portable(_) => panic!("no streams on the portable tier"),
            #[cfg(target_arch = "x86_64")]
            RefInner::Wide(context) => {
                x86_64::key_streams(context, ivs, &mut self.streams);
                zeroize_stack::<USED_STACK_LEN>();
            }
        }
        self.next = 0;
    }

    /// Zeroes the streams that are left.
    pub(crate) fn clear(&mut self) {
        if !self.is_empty() {
            self.streams.as_flattened_mut().as_flattened_mut().zeroize();
            self.next = AHEAD;
        }
    }

    /// Seals `plaintext`, at most [`AHEAD_LEN_MAX`] bytes, under the next IV, into `out`: ciphertext and tag. `key` is
    /// that of the streams. Erases the stream, and overwrites the stack that was used.
    pub(crate) fn seal(&mut self, key: KeyRef<'_>, aad: &[u8], plaintext: &[u8], out: &mut [u8]) {
        let stream = &mut self.streams[self.next];
        self.next += 1;
        assert!(plaintext.len() <= AHEAD_LEN_MAX && out.len() == plaintext.len() + TAG_LEN);
        match key.0 {
            RefInner::Portable(_) => panic!("no streams on the portable tier"),
            #[cfg(target_arch = "x86_64")]
            RefInner::Wide(context) => x86_64::seal_one(context, stream, aad, plaintext, out),
        }
        stream.as_flattened_mut().zeroize();
        zeroize_stack::<USED_STACK_LEN>();
    }
}

/// Bytes of stack that hold parts of streams and messages after a call of the kernel, and some more: the frames of
/// optimised builds add up to less than 250.
const USED_STACK_LEN: usize = if cfg!(debug_assertions) { STACK_LEN } else { 512 };

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::{cpu::Tier, kernel::GcmKey};

    #[test]
    fn a_used_stream_is_gone_and_so_are_all_that_were_cleared() {
        for &tier in Tier::available() {
            let key = GcmKey::new(tier, &[7; 32]).unwrap();
            if !key.key().has_streams() {
                continue;
            }
            let mut streams = KeyStreams::new().unwrap();
            streams.fill(key.key(), &[[9; 12]; AHEAD]);
            assert!(streams.streams.iter().flatten().all(|block| *block != [0; 16]));
            for used in 1..=3 {
                streams.seal(key.key(), b"aad", &[1; 32], &mut [0; 48]);
                let (gone, left) = streams.streams.split_at(used);
                assert!(gone.iter().flatten().all(|block| *block == [0; 16]));
                assert!(left.iter().flatten().all(|block| *block != [0; 16]));
            }
            streams.clear();
            assert!(streams.is_empty() && *streams.streams == [[[0; 16]; _]; AHEAD]);
        }
    }
}
