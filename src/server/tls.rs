//! TLS 1.2 and 1.3: certificate, key and the CA of clients from files, read again when they change.
//!
//! A connection keeps what it began with. Files that cannot be used leave everything as it was, and are told of once.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use arc_swap::ArcSwap;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio_rustls::TlsAcceptor;

/// Where the certificates are, all in PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and the CA.
    pub certificate: PathBuf,
    /// Its private key: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
    /// CAs, one of which has to have signed a client's certificate. Without it clients need none.
    pub client_ca: Option<PathBuf>,
}

/// The TLS of a server.
pub(super) struct Tls {
    files: TlsFiles,
    config: ArcSwap<ServerConfig>,
    stamps: Mutex<Vec<Stamp>>,
}

/// What tells that a file was changed.
type Stamp = Option<(SystemTime, u64, u64)>;

impl Tls {
    pub(super) fn open(files: &TlsFiles) -> io::Result<Self> {
        let stamps = Mutex::new(stamps(files));
        let config = ArcSwap::from_pointee(read(files)?);
        Ok(Self { files: files.clone(), config, stamps })
    }

    /// What the next connection is accepted with.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.load_full())
    }

    /// Reads the files again if one of them has changed, or whenever `always`.
    pub(super) fn reload(&self, always: bool) {
        let now = stamps(&self.files);
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        if !always && *stamps == now {
            return;
        }
        *stamps = now;
        match read(&self.files) {
            Ok(config) => {
                self.config.store(Arc::new(config));
                tracing::info!("the TLS certificate was read again");
            }
            Err(error) => {
                tracing::error!(%error, "the TLS files cannot be used; the old ones stay in use");
            }
        }
    }
}

fn stamps(files: &TlsFiles) -> Vec<Stamp> {
    let TlsFiles { certificate, key, client_ca } = files;
    let stamp = |path: &PathBuf| {
        let metadata = fs::metadata(path).ok()?;
        let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
        Some((metadata.modified().ok()?, metadata.len(), inode))
    };
    [Some(certificate), Some(key), client_ca.as_ref()].into_iter().flatten().map(stamp).collect()
}

fn read(files: &TlsFiles) -> io::Result<ServerConfig> {
    let TlsFiles { certificate, key, client_ca } = files;
    let chain = certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| bad(key, error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|error| bad(certificate, error))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for ca in certificates(path)? {
                roots.add(ca).map_err(|error| bad(path, error))?;
            }
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| bad(path, error))?)
        }
    };
    let mut config =
        builder.with_single_cert(chain, private).map_err(|error| bad(certificate, error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| bad(path, error))?.collect();
    match all.map_err(|error| bad(path, error))? {
        none if none.is_empty() => Err(bad(path, "there is no PEM certificate in it")),
        some => Ok(some),
    }
}

fn bad(path: &Path, error: impl std::fmt::Display) -> io::Error {
    let kind = match fs::metadata(path) {
        Ok(_) => io::ErrorKind::InvalidData,
        Err(error) => error.kind(),
    };
    io::Error::new(kind, format!("{path:?}: {error}"))
}
