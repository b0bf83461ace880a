//! Descriptors by their numbers, for the program: which of the standard three were closed when the process began, and
//! another descriptor of the same open file.
//!
//! Hidden and without promises, like the door to the kernels. The standard library opens `/dev/null` in the place of a
//! standard descriptor that is closed, before `main`: what is written there is lost, and nobody is told. So a function
//! of the initialisation array, which runs before that, looks first: three times `fcntl`, and nothing else.
#![expect(unsafe_code, reason = "the initialisation array and descriptors by number")]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU8, Ordering},
};

/// Bit n is descriptor n, of the first three.
static CLOSED: AtomicU8 = AtomicU8::new(0);

#[used]
#[cfg_attr(target_vendor = "apple", unsafe(link_section = "__DATA,__mod_init_func"))]
#[cfg_attr(not(target_vendor = "apple"), unsafe(link_section = ".init_array"))]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    for descriptor in 0..3 {
        // SAFETY: asks for the flags of a descriptor; one that is closed is an error and nothing else.
        if unsafe { libc::fcntl(descriptor, libc::F_GETFD) } == -1 {
            CLOSED.fetch_or(1 << descriptor, Ordering::Relaxed);
        }
    }
}

/// Whether this descriptor, 0, 1 or 2, was closed when the process began.
pub fn was_closed_at_start(descriptor: RawFd) -> bool {
    (0..3).contains(&descriptor) && CLOSED.load(Ordering::Relaxed) >> descriptor & 1 == 1
}

/// Another descriptor of the file that `descriptor` has open: place and append mode are shared with it.
///
/// # Errors
/// If it is not open, or too many are.
pub fn duplicate(descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: makes a new descriptor and leaves the other as it is; a number that is not open is an error.
    let made = unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 3) };
    if made == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::fd::AsRawFd,
    };

    use super::*;

    #[test]
    fn a_duplicate_is_the_same_open_file() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut other = File::from(duplicate(writer.as_raw_fd()).unwrap());
        drop(writer);
        other.write_all(b"x").unwrap();
        drop(other);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"x");
        assert!(duplicate(-1).is_err());
        assert!(!was_closed_at_start(7));
    }
}
