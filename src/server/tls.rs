//! TLS 1.2 and 1.3: certificate, key and the CA of clients from files, read again when they change.
//!
//! A connection keeps what it began with. Files that cannot be used leave everything as it was, and are told of once.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{
    InconsistentKeys, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};
use tokio_rustls::TlsAcceptor;

use super::{
    certificate::{self, Validity},
    failures::Causes,
    pem::{self, KINDS, unusable},
};

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
    expiry: Mutex<Expiry>,
}

/// How long the certificates in use are good, and when somebody was last told that this is not long.
struct Expiry {
    validity: Validity,
    told: Option<Instant>,
}

/// Time between two warnings of the same certificate.
const WARNING_INTERVAL: Duration = Duration::from_secs(86_400);

/// What tells that a file was changed.
type Stamp = Option<(SystemTime, u64, u64)>;

impl Tls {
    pub(super) fn open(files: &TlsFiles) -> io::Result<Self> {
        let stamps = Mutex::new(stamps(files));
        let (config, validity) = read(files)?;
        let config = ArcSwap::from_pointee(config);
        let expiry = Mutex::new(Expiry { validity, told: None });
        Ok(Self { files: files.clone(), config, stamps, expiry })
    }

    /// What the next connection is accepted with.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.load_full())
    }

    fn expiry(&self) -> MutexGuard<'_, Expiry> {
        self.expiry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Warns of certificates that are not valid, or not much longer, once a day. Stores when the first expires.
    pub(super) fn tell_expiry(&self, gauge: &AtomicI64) {
        let mut expiry = self.expiry();
        gauge.store(expiry.validity.to, Ordering::Relaxed);
        if expiry.told.is_some_and(|told| told.elapsed() < WARNING_INTERVAL) {
            return;
        }
        if let Some(warning) = expiry.validity.warning(SystemTime::now()) {
            expiry.told = Some(Instant::now());
            tracing::warn!("{:?}: the TLS certificate {warning}", self.files.certificate);
        }
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
            Ok((config, validity)) => {
                self.config.store(Arc::new(config));
                *self.expiry() = Expiry { validity, told: None };
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

fn read(files: &TlsFiles) -> io::Result<(ServerConfig, Validity)> {
    let TlsFiles { certificate, key, client_ca } = files;
    let chain = pem::certificates(certificate)?;
    let private = pem::private_key(key)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let validity = certificate::validity(&chain).map_err(|why| unusable(certificate, why))?;
    check_pair(files, &chain, &private, &provider)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|error| unusable(certificate, error))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => builder.with_client_cert_verifier(clients(path, provider)?),
    };
    let mut config = builder
        .with_single_cert(chain, private)
        .map_err(|error| unusable(certificate, Causes(&error)))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((config, validity))
}

/// Whether the chain begins with the certificate of this key, and both can be used.
fn check_pair(
    files: &TlsFiles,
    chain: &[CertificateDer<'static>],
    private: &PrivateKeyDer<'static>,
    provider: &CryptoProvider,
) -> io::Result<()> {
    let TlsFiles { certificate, key, .. } = files;
    let not_usable = certificate::unusable(chain).map_err(|why| unusable(certificate, why))?;
    if let Some(why) = not_usable {
        return Err(unusable(certificate, why));
    }
    let signing = provider
        .key_provider
        .load_private_key(private.clone_key())
        .map_err(|_| unusable(key, format!("the key cannot be used: {KINDS}")))?;
    let is_of = |der: &CertificateDer<'static>| {
        CertifiedKey::new(vec![der.clone()], Arc::clone(&signing)).keys_match()
    };
    let mismatch = Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch));
    if chain.first().is_some_and(|own| is_of(own) == mismatch) {
        return Err(match chain.iter().position(|der| is_of(der).is_ok()) {
            Some(index) => unusable(
                certificate,
                format!(
                    "the chain is in the wrong order: the server's own certificate is number {}, \
                     and has to come first, then the one that signed it, and so on",
                    index + 1
                ),
            ),
            None => unusable(
                certificate,
                format!("no certificate of it belongs to the private key in {key:?}"),
            ),
        });
    }
    if let Some(number) = certificate::first_gap(chain) {
        let next = number + 1;
        tracing::warn!(
            "{certificate:?}: certificate {next} of the chain did not sign certificate {number}: \
             clients may find no way to their CA"
        );
    }
    Ok(())
}

/// What clients' certificates are checked by.
fn clients(path: &Path, provider: Arc<CryptoProvider>) -> io::Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for ca in pem::certificates(path)? {
        let sentence = certificate::unusable_ca(&ca);
        roots.add(ca).map_err(|error| {
            unusable(path, sentence.unwrap_or_else(|| Causes(&error).to_string()))
        })?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    verifier.map_err(|error| unusable(path, Causes(&error)))
}
