//! One connection: HTTP/1.1 in as few steps as a signed call needs, since client and server share the machine.
//!
//! A request is written as it was built; of a response, the status line and the length are read, and the body stays in
//! the connection's buffer. The server always tells the length, so there is no chunked encoding here.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    path::Path,
    sync::Arc,
    time::Duration,
};

use keymill::server::proto;
use prost::Message;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::failure::{Failure, Result, quoted};

/// Where the server is, and how it is reached.
pub(super) struct Target {
    /// As the caller wrote it, for messages and tables.
    pub(super) url: String,
    /// The value of the `host` header.
    pub(super) host: String,
    address: SocketAddr,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

/// How long a connection may take to come to be, and an answer to come.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first size of a buffer: any answer to a single call fits.
const BUFFER_LEN: usize = 4 << 10;
/// Headers of a response that are looked at.
const HEADERS_MAX: usize = 32;

impl Target {
    /// Reads `http://host:port`, `https://host:port`, or `host:port`, which is plain HTTP. `shown` are the files of a
    /// certificate for a server that asks for one, and of its key.
    pub(super) fn parse(
        url: &str,
        ca: Option<&Path>,
        shown: Option<(&Path, &Path)>,
    ) -> Result<Self> {
        let (is_tls, host) = match url.split_once("://") {
            Some(("http", host)) => (false, host),
            Some(("https", host)) => (true, host),
            None => (false, url),
            Some(_) => return Err(no_server(url)),
        };
        let host = host.strip_suffix('/').unwrap_or(host);
        let (name, _) = host.rsplit_once(':').ok_or_else(|| no_server(url))?;
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let tls = match (is_tls, ca) {
            (false, None) if shown.is_some() => {
                return Err(Failure::refused(
                    format!("--tls-cert is for https, and --server {} is plain HTTP", quoted(url)),
                    "write https://host:port, or leave --tls-cert and --tls-key out",
                ));
            }
            (false, None) => None,
            (false, Some(_)) => {
                return Err(Failure::refused(
                    format!("--ca is for https, and --server {} is plain HTTP", quoted(url)),
                    "write https://host:port, or leave --ca out",
                ));
            }
            (true, None) => {
                return Err(Failure::refused(
                    "--server with https needs --ca FILE",
                    "name the certificate, in PEM, that the server's is to be checked with",
                ));
            }
            (true, Some(ca)) => {
                let name = ServerName::try_from(name.to_owned()).map_err(|_| no_server(url))?;
                Some((connector(ca, shown)?, name))
            }
        };
        let address = host.to_socket_addrs().ok().and_then(|mut found| found.next());
        let address = address.ok_or_else(|| no_server(url))?;
        Ok(Self { url: url.to_owned(), host: host.to_owned(), address, tls })
    }

    /// A new connection.
    pub(super) async fn connect(&self) -> Result<Connection> {
        let connecting = async {
            let stream = TcpStream::connect(self.address).await?;
            stream.set_nodelay(true)?;
            let stream: Box<dyn Stream> = match &self.tls {
                None => Box::new(stream),
                Some((connector, name)) => Box::new(connector.connect(name.clone(), stream).await?),
            };
            Ok::<_, std::io::Error>(stream)
        };
        let failed = |why: String| {
            Failure::broke(
                format!("cannot connect to {}: {why}", self.url),
                "check that `keymill serve` runs there, and its address; with https, that --ca is \
                 the CA of its certificate and that the certificate names this host",
            )
        };
        match tokio::time::timeout(PATIENCE, connecting).await {
            Ok(Ok(stream)) => Ok(Connection { stream, buffer: Vec::with_capacity(BUFFER_LEN) }),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed("it takes too long".into())),
        }
    }
}

fn no_server(url: &str) -> Failure {
    Failure::refused(
        format!("--server {} is no address of a server", quoted(url)),
        "write http://host:port or https://host:port, as in the line that `keymill serve` prints",
    )
}

fn connector(ca: &Path, shown: Option<(&Path, &Path)>) -> Result<TlsConnector> {
    let refused = |option: &str, path: &Path, why: String| {
        let message = format!("{option} {path:?} cannot be used: {why}");
        Failure::refused(message, "name a file in PEM; certificate and key belong together")
    };
    let bad = |why: String| refused("--ca", ca, why);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca).map_err(bad)? {
        roots.add(certificate).map_err(|error| bad(error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(error.to_string()))?
        .with_root_certificates(roots);
    let mut config = match shown {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain =
                certificates(certificate).map_err(|why| refused("--tls-cert", certificate, why))?;
            let bad_key = |why: String| refused("--tls-key", key, why);
            let read = PrivateKeyDer::from_pem_file(key);
            let read = read.map_err(|error| bad_key(error.to_string()))?;
            let config = config.with_client_auth_cert(chain, read);
            config.map_err(|error| bad_key(error.to_string()))?
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The certificates in a PEM file: one at least.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found {
        Ok(found) if found.is_empty() => Err("there is no certificate in it".into()),
        Ok(found) => Ok(found),
        Err(error) => Err(error.to_string()),
    }
}

/// A socket, with or without TLS.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection that is kept.
pub(super) struct Connection {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
}

/// An answer, of which the body is still in the connection's buffer.
pub(super) struct Answer<'a> {
    pub(super) status: u16,
    pub(super) body: &'a [u8],
}

/// What a call needs to know of a response's head.
struct Head {
    status: u16,
    /// Where the body begins and ends.
    body: std::ops::Range<usize>,
}

impl Connection {
    /// Sends a request and waits for its answer.
    pub(super) async fn call(&mut self, request: &[u8]) -> Result<Answer<'_>> {
        let lost = |why: &str| {
            Failure::broke(
                format!("the connection to the server broke: {why}"),
                "look at the server's log; one that ends or restarts ends its connections, and \
                 one that asks for a certificate wants --tls-cert",
            )
        };
        self.buffer.clear();
        let sent = self.stream.write_all(request).await;
        sent.map_err(|error| lost(&error.to_string()))?;
        // TLS writes when it is flushed; a bare socket has written already, and this costs nothing.
        self.stream.flush().await.map_err(|error| lost(&error.to_string()))?;
        let mut head = None;
        loop {
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => return Err(lost("it was closed within a response")),
                Ok(_) => {}
                Err(error) => return Err(lost(&error.to_string())),
            }
            if head.is_none() {
                head = read_head(&self.buffer).ok_or_else(|| lost("the answer is not HTTP/1.1"))?;
                if let Some(Head { body, .. }) = &head {
                    self.buffer.reserve(body.end.saturating_sub(self.buffer.len()));
                }
            }
            if let Some(Head { status, body }) = &head
                && self.buffer.len() >= body.end
            {
                return Ok(Answer { status: *status, body: &self.buffer[body.clone()] });
            }
        }
    }
}

/// The head of a response: `None` if it cannot be one, `Some(None)` if it is not complete.
fn read_head(bytes: &[u8]) -> Option<Option<Head>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Some(None);
    };
    let mut lines = bytes[..end].split(|byte| *byte == b'\n').take(HEADERS_MAX);
    let status = lines.next()?.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    let status = std::str::from_utf8(status).ok()?.parse().ok()?;
    let mut len = None;
    for line in lines {
        const NAME: &[u8] = b"content-length:";
        if line.len() > NAME.len() && line[..NAME.len()].eq_ignore_ascii_case(NAME) {
            let value = std::str::from_utf8(&line[NAME.len()..]).ok()?;
            len = Some(value.trim().parse::<usize>().ok()?);
        }
    }
    let start = end + 4;
    Some(Some(Head { status, body: start..start + len? }))
}

impl<'a> Answer<'a> {
    /// The body of a call that succeeded.
    pub(super) fn ok(self) -> Result<&'a [u8]> {
        if self.status == 200 { Ok(self.body) } else { Err(self.refusal()) }
    }

    /// Its message.
    pub(super) fn message<M: Message + Default>(self) -> Result<M> {
        let body = bytes::Bytes::copy_from_slice(self.ok()?);
        M::decode(body).map_err(|error| {
            Failure::broke(
                format!("the server's answer cannot be read: {error}"),
                "is it `keymill serve` of this version that answers there?",
            )
        })
    }

    fn refusal(&self) -> Failure {
        let Self { status, body } = self;
        match proto::Error::decode(*body) {
            Ok(error) if !error.error_code.is_empty() => refused(*status, &error),
            _ => Failure::broke(
                format!("the server answers {status}"),
                "is it `keymill serve` that answers there?",
            ),
        }
    }
}

/// What the server said, and what to do about it.
pub(super) fn refused(status: u16, error: &proto::Error) -> Failure {
    let proto::Error { error_code: code, error_message: message, .. } = error;
    let hint = match code.as_str() {
        "Unauthorized" => {
            "the server knows no enabled client of this key: `keymill client list` on its home \
             shows those that it knows"
        }
        "SignatureNotMatch" => {
            "the key in --client-key is not the one that the server has under its id; was the file \
             made with this server's home?"
        }
        "Forbidden.NoPermission" => {
            "`keymill client set ID --allow generate,decrypt,random --keys PATTERN` on its home \
             allows what is measured"
        }
        "Forbidden.KeyNotFound" => {
            "--key names a key or an alias that the server has and the client may use: `keymill \
             key list` on its home shows them"
        }
        "Rejected.Disabled" | "Rejected.PendingDeletion" | "Rejected.PendingImport" => {
            "choose a key that is enabled: `keymill key list` on the server's home shows them"
        }
        "RequestTimeTooSkewed" => "set the clocks of both machines",
        "Rejected.Throttling" => {
            "the server has a limit: give its --keys-per-second or --keys-in-progress more room, \
             or ask for fewer --connections"
        }
        "ServiceUnavailableTemporary" => "the server is ending, or its audit log cannot be written",
        _ => "look at the server's log",
    };
    let text = format!("the server refuses with {status} {code}: {message}");
    if status >= 500 { Failure::broke(text, hint) } else { Failure::refused(text, hint) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_when_they_are_complete() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-type: x\r\nContent-Length: 12\r\n\r\n0123";
        let head = read_head(whole).unwrap().unwrap();
        assert_eq!((head.status, head.body), (200, whole.len() - 4..whole.len() + 8));
        assert!(read_head(&whole[..40]).unwrap().is_none());
        for bad in ["HTTP/2 200\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "x\r\n\r\n"] {
            assert!(read_head(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn addresses_have_a_scheme_or_none() {
        for url in ["http://127.0.0.1:80", "127.0.0.1:80", "http://127.0.0.1:80/"] {
            let target = Target::parse(url, None, None).unwrap();
            assert_eq!((target.host.as_str(), target.tls.is_none()), ("127.0.0.1:80", true));
        }
        for bad in ["", "127.0.0.1", "ftp://127.0.0.1:80", "https://127.0.0.1:80", "http://:x"] {
            assert!(Target::parse(bad, None, None).is_err(), "{bad}");
        }
        assert!(Target::parse("http://127.0.0.1:80", Some(Path::new("ca.pem")), None).is_err());
    }
}
