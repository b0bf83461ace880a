//! What goes over a connection: a socket that counts, so that clocks can tell a slow client from one that does nothing.

use std::{
    future::Future,
    io,
    os::fd::{AsRawFd, RawFd},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};

use crate::{
    limits::{SERVER_DISCARD_LATE_LEN_MAX, SERVER_DISCARD_LATE_TIME, SERVER_LINGER_TIME},
    os::descriptors::unconfirmed_len,
};

/// The counts of one connection.
#[derive(Debug)]
pub(super) struct Traffic {
    socket: RawFd,
    written: AtomicU64,
    has_read: AtomicBool,
    /// Something was read since this was last set back.
    pub(super) reading: AtomicBool,
    /// A body that nobody will read may still be on its way.
    lingers: AtomicBool,
}

impl Traffic {
    /// Bytes that have left: those that the peer has confirmed, where the system tells. To be asked only while the
    /// connection lives.
    pub(super) fn left(&self) -> u64 {
        let unconfirmed = unconfirmed_len(self.socket).unwrap_or(0) as u64;
        self.written.load(Ordering::Relaxed).saturating_sub(unconfirmed)
    }

    /// Whether anything ever came.
    pub(super) fn has_read(&self) -> bool {
        self.has_read.load(Ordering::Relaxed)
    }

    /// An answer goes out while its request still comes in: when the connection ends, what comes is read and thrown
    /// away for a while, since at a closed socket it would take the answer from whoever sent it.
    pub(super) fn linger(&self) {
        self.lingers.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
impl Traffic {
    /// The counts of no socket.
    pub(super) fn none() -> Self {
        Self {
            socket: -1,
            written: AtomicU64::new(0),
            has_read: AtomicBool::new(false),
            reading: AtomicBool::new(false),
            lingers: AtomicBool::new(false),
        }
    }

    pub(super) fn wrote(&self, len: u64) {
        self.written.fetch_add(len, Ordering::Relaxed);
    }
}

/// A socket that counts.
#[derive(Debug)]
pub(super) struct Counted {
    stream: TcpStream,
    traffic: Arc<Traffic>,
    lingering: Option<Lingering>,
}

/// How long a socket that is closed for writing is still read.
#[derive(Debug)]
struct Lingering {
    bytes_left: usize,
    until: Instant,
    quiet: Pin<Box<Sleep>>,
}

impl Counted {
    pub(super) fn new(stream: TcpStream) -> (Self, Arc<Traffic>) {
        let traffic = Arc::new(Traffic {
            socket: stream.as_raw_fd(),
            written: AtomicU64::new(0),
            has_read: AtomicBool::new(false),
            reading: AtomicBool::new(false),
            lingers: AtomicBool::new(false),
        });
        (Self { stream, traffic: Arc::clone(&traffic), lingering: None }, traffic)
    }

    fn count(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(len)) = written {
            self.traffic.written.fetch_add(len as u64, Ordering::Relaxed);
        }
        written
    }

    /// Reads what nobody wants, until the peer ends, too, or its time or its bytes are over.
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let lingering = self.lingering.get_or_insert_with(|| Lingering {
            bytes_left: SERVER_DISCARD_LATE_LEN_MAX,
            until: Instant::now() + SERVER_DISCARD_LATE_TIME,
            quiet: Box::pin(tokio::time::sleep(SERVER_LINGER_TIME)),
        });
        let mut memory = [0; 4096];
        loop {
            let mut chunk = ReadBuf::new(&mut memory);
            match Pin::new(&mut self.stream).poll_read(context, &mut chunk) {
                Poll::Ready(Ok(())) if !chunk.filled().is_empty() => {
                    let len = chunk.filled().len();
                    let now = Instant::now();
                    if len > lingering.bytes_left || now > lingering.until {
                        return Poll::Ready(());
                    }
                    lingering.bytes_left -= len;
                    lingering.quiet.as_mut().reset(now + SERVER_LINGER_TIME);
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return lingering.quiet.as_mut().poll(context),
            }
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.traffic.has_read.store(true, Ordering::Relaxed);
            self.traffic.reading.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.count(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.count(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingering.is_none() {
            ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
            if !self.traffic.lingers.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
        }
        ready!(self.poll_linger(context));
        Poll::Ready(Ok(()))
    }
}
