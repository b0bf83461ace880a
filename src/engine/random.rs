//! Random bytes for the caller.

use super::Engine;
use crate::{
    error::{Error, Result},
    limits::{GENERATE_RANDOM_LEN_MAX, GENERATE_RANDOM_LEN_MIN},
    request_id::RequestId,
};

/// Random bytes.
impl Engine {
    /// Fills `out`, 1 to 64 bytes, with random bytes from the generator that data keys come from. A forked child's have
    /// nothing in common with its parent's.
    ///
    /// ```
    /// let engine = keymill::Engine::in_memory()?;
    /// let mut salt = [0; 16];
    /// engine.generate_random(&mut salt)?;
    /// # Ok::<(), keymill::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidParameter` for another length, and `out` is unchanged; `ServiceUnavailableTemporary` if the system gives
    /// no random bytes, and `out` holds nothing of use.
    pub fn generate_random(&self, out: &mut [u8]) -> Result<RequestId> {
        self.in_one_process(|shared| {
            let len = out.len();
            if !(GENERATE_RANDOM_LEN_MIN..=GENERATE_RANDOM_LEN_MAX).contains(&len) {
                return Err(Error::invalid(format!(
                    "Length {len} is outside {GENERATE_RANDOM_LEN_MIN} to \
                     {GENERATE_RANDOM_LEN_MAX}."
                )));
            }
            let mut id = [0; 16];
            shared.rng.fill_each(shared.rng.moment(), &mut [&mut id, out])?;
            Ok(RequestId::from_random(id))
        })
        .map_err(|error| self.shared().name(error))
    }
}
