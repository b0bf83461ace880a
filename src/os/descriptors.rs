//! File descriptors: how many this process may open, how many it has, and what a socket has not sent yet.

use std::os::fd::RawFd;

/// Most descriptors that this process may have open, after its soft limit was raised to `wanted` as far as the hard
/// limit lets it. The system's word for "no limit" is the largest number.
pub(crate) fn open_files_max(wanted: usize) -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is an `rlimit`, which the call fills.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return usize::MAX;
    }
    let wanted = libc::rlim_t::try_from(wanted).unwrap_or(libc::RLIM_INFINITY);
    if limit.rlim_cur < wanted && limit.rlim_cur < limit.rlim_max {
        let raised = libc::rlimit { rlim_cur: wanted.min(limit.rlim_max), ..limit };
        // SAFETY: `raised` is an `rlimit`, which the call reads.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
            limit = raised;
        }
    }
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

/// Descriptors that this process has open, as far as the system tells.
pub(crate) fn open_files() -> Option<usize> {
    // One of them is the directory's own.
    std::fs::read_dir("/proc/self/fd").ok().map(|files| files.count().saturating_sub(1))
}

/// Bytes that were written to a TCP socket and that its peer has not confirmed yet, where the system tells. The number
/// of a descriptor that is no socket, or none, tells nothing.
pub(crate) fn unconfirmed_len(socket: RawFd) -> Option<usize> {
    #[cfg(target_os = "linux")]
    {
        let mut len: libc::c_int = 0;
        // SAFETY: `TIOCOUTQ`, which is `SIOCOUTQ` of sockets, writes one `int`, and `len` is one.
        let asked = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut len) };
        if asked == 0 {
            return usize::try_from(len).ok();
        }
    }
    let _ = socket;
    None
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::fd::AsRawFd,
    };

    use super::*;

    #[test]
    fn what_a_peer_does_not_read_is_unconfirmed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut other = listener.accept().unwrap().0;
        one.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(len) = one.write(&[7; 1 << 16]) {
            sent += len;
        }
        let Some(unconfirmed) = unconfirmed_len(one.as_raw_fd()) else { return };
        assert!(unconfirmed > 0 && unconfirmed < sent);
        let mut received = vec![0; sent];
        other.read_exact(&mut received).unwrap();
        while unconfirmed_len(one.as_raw_fd()) != Some(0) {
            std::thread::yield_now();
        }
        assert_eq!(unconfirmed_len(-1), None);
    }

    #[test]
    fn descriptors_are_counted_and_their_limit_is_never_lowered() {
        let before = open_files_max(0);
        assert!(open_files_max(before.saturating_add(1)) >= before);
        let Some(count) = open_files() else { return };
        assert!((3..=before).contains(&count));
    }
}
