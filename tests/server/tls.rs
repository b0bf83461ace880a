//! TLS: versions of HTTP by ALPN, the wrong protocol on the wrong port, certificates that are replaced, and clients'.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use keymill::server::{ServerConfig, TlsFiles, proto::GenerateRandomRequest};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::running::{Http1, Http2, PATIENCE, Running, exchange};

const RANDOM: GenerateRandomRequest = GenerateRandomRequest { length: 32 };

/// A CA, and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in DER.
#[derive(Clone)]
struct Certified {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate for 127.0.0.1.
    fn sign(&self) -> Certified {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Certified { certificate: certificate.der().to_vec(), key: key.serialize_der() }
    }

    fn der(&self) -> Vec<u8> {
        self.0.der().to_vec()
    }

    /// The TLS of a client that trusts this CA.
    fn client(&self, certified: Option<&Certified>, alpn: &[&str]) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(self.der())).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match certified {
            None => builder.with_no_client_auth(),
            Some(Certified { certificate, key }) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.clone()));
                let chain = vec![CertificateDer::from(certificate.clone())];
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }
}

/// Writes PEM as a careful program does: a new file in the place of the old one.
fn write_pem(path: &Path, label: &str, der: &[u8]) {
    let base64 = base64_simd::STANDARD.encode_to_string(der);
    let lines: Vec<&str> =
        base64.as_bytes().chunks(64).map(|line| str::from_utf8(line).unwrap()).collect();
    let text = format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"));
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, text).unwrap();
    fs::rename(unfinished, path).unwrap();
}

/// A directory with the files of a server.
pub(crate) struct Files {
    home: tempfile::TempDir,
    authority: Authority,
}

impl Files {
    pub(crate) fn new() -> Self {
        let files = Self { home: tempfile::tempdir().unwrap(), authority: Authority::new() };
        files.renew();
        write_pem(&files.path("ca.pem"), "CERTIFICATE", &files.authority.der());
        files
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Puts a new certificate in the place of the old one, and returns it.
    pub(crate) fn renew(&self) -> Vec<u8> {
        let Certified { certificate, key } = self.authority.sign();
        write_pem(&self.path("server.key"), "PRIVATE KEY", &key);
        write_pem(&self.path("server.pem"), "CERTIFICATE", &certificate);
        certificate
    }

    /// The TLS of a client that trusts the server and has no certificate.
    pub(crate) fn client(&self, alpn: &[&str]) -> TlsConnector {
        self.authority.client(None, alpn)
    }

    pub(crate) fn tls(&self, client_ca: bool) -> TlsFiles {
        TlsFiles {
            certificate: self.path("server.pem"),
            key: self.path("server.key"),
            client_ca: client_ca.then(|| self.path("ca.pem")),
        }
    }

    async fn serve(&self, client_ca: bool) -> Running {
        let tls = self.tls(client_ca);
        Running::with(|config: &mut ServerConfig| config.tls = Some(tls)).await
    }
}

pub(crate) async fn connect(
    connector: &TlsConnector,
    address: SocketAddr,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::from(address.ip());
    timeout(PATIENCE, connector.connect(name, stream)).await.unwrap()
}

/// The certificate that a new connection is shown.
async fn shown(connector: &TlsConnector, address: SocketAddr) -> Vec<u8> {
    let stream = connect(connector, address).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn alpn_says_which_http_is_spoken() {
    let files = Files::new();
    let server = files.serve(false).await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    for (offered, agreed) in [
        (&["h2", "http/1.1"][..], Some("h2")),
        (&["h2"], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&[], None),
    ] {
        let client = files.authority.client(None, offered);
        let stream = connect(&client, server.address).await.unwrap();
        let protocol = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        assert_eq!(protocol.as_deref(), agreed.map(str::as_bytes));
        let answer = match agreed {
            Some("h2") => Http2::on(stream).await.send(&draft).await,
            _ => Http1::on(stream).await.send(&draft).await,
        };
        assert_eq!(answer.status, 200);
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_protocol_for_a_port_ends_a_connection_alone() {
    let files = Files::new();
    let server = files.serve(false).await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    for bytes in [draft.bytes(), Vec::new(), vec![0x16; 3], vec![0xff; 50_000]] {
        let answer = exchange(&mut TcpStream::connect(server.address).await.unwrap(), &bytes).await;
        assert!(!answer.starts_with(b"HTTP"), "{:?}", String::from_utf8_lossy(&answer));
    }
    // A client that does not trust the server.
    let stranger = Authority::new().client(None, &[]);
    assert!(connect(&stranger, server.address).await.is_err());
    let stream = connect(&files.authority.client(None, &[]), server.address).await.unwrap();
    assert_eq!(Http1::on(stream).await.send(&draft).await.status, 200);
    server.wait_for("keymill_connections", 0.0).await;
    assert!(server.metric("keymill_connections_failed_total").await >= 4.0);

    let plain = Running::start().await;
    let client = files.authority.client(None, &[]);
    assert!(connect(&client, plain.address).await.is_err());
    assert_eq!(plain.ask("GenerateRandom", &RANDOM).await.status, 200);
    plain.end().await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_are_replaced_are_used_and_bad_ones_are_not() {
    let files = Files::new();
    let server = files.serve(false).await;
    let client = files.authority.client(None, &["http/1.1"]);
    let mut old = Http1::on(connect(&client, server.address).await.unwrap()).await;
    let renewed = files.renew();
    let deadline = Instant::now() + Duration::from_secs(3);
    while shown(&client, server.address).await != renewed {
        assert!(Instant::now() < deadline, "the old certificate is still used");
        sleep(Duration::from_millis(100)).await;
    }
    // A connection keeps what it began with.
    let draft = server.draft("GenerateRandom", &RANDOM);
    assert_eq!(old.send(&draft).await.status, 200);

    let spoiled: [&dyn Fn(); 4] = [
        &|| fs::write(files.path("server.pem"), "no PEM").unwrap(),
        &|| fs::remove_file(files.path("server.pem")).unwrap(),
        // A certificate and another one's key.
        &|| {
            let Certified { certificate, .. } = files.authority.sign();
            write_pem(&files.path("server.pem"), "CERTIFICATE", &certificate);
        },
        &|| fs::write(files.path("server.key"), "").unwrap(),
    ];
    for spoil in spoiled {
        spoil();
        // As a signal does, at once.
        server.handle.reload();
        assert!(shown(&client, server.address).await == renewed);
    }
    let renewed = files.renew();
    server.handle.reload();
    assert!(shown(&client, server.address).await == renewed);
    drop(old);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_a_client_ca_wants_certificates_of_it() {
    let files = Files::new();
    let server = files.serve(true).await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    let strangers = Authority::new().sign();
    for certified in [None, Some(&strangers)] {
        // In TLS 1.3 the client learns of it when it reads.
        let client = files.authority.client(certified, &["http/1.1"]);
        if let Ok(mut stream) = connect(&client, server.address).await {
            let _ = stream.write_all(&draft.bytes()).await;
            let mut answer = Vec::new();
            let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
            assert!(read.is_err() && answer.is_empty());
        }
    }
    let own = files.authority.sign();
    let client = files.authority.client(Some(&own), &["h2"]);
    let stream = connect(&client, server.address).await.unwrap();
    assert_eq!(Http2::on(stream).await.send(&draft).await.status, 200);
    server.end().await;

    // One that asks for none takes no offence at one.
    let server = files.serve(false).await;
    let client = files.authority.client(Some(&strangers), &[]);
    let stream = connect(&client, server.address).await.unwrap();
    let draft = server.draft("GenerateRandom", &RANDOM);
    assert_eq!(Http1::on(stream).await.send(&draft).await.status, 200);
    server.end().await;
}

#[tokio::test]
async fn a_server_does_not_start_with_files_that_cannot_be_used() {
    use keymill::{Engine, server::Server};
    let files = Files::new();
    let started = async |tls: TlsFiles| {
        let mut config = crate::client::config();
        config.tls = Some(tls);
        Server::bind(Engine::in_memory().unwrap(), &config).await.map(drop)
    };
    started(files.tls(true)).await.unwrap();
    fs::write(files.path("bad"), "no PEM").unwrap();
    for name in ["bad", "none"] {
        let path = files.path(name);
        for tls in [
            TlsFiles { certificate: path.clone(), ..files.tls(false) },
            TlsFiles { key: path.clone(), ..files.tls(false) },
            TlsFiles { client_ca: Some(path.clone()), ..files.tls(false) },
        ] {
            let error = started(tls).await.unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }
    let mut config = ServerConfig::new(([0, 0, 0, 0], 0).into());
    let refused = Server::bind(Engine::in_memory().unwrap(), &config).await.map(drop).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
    config.plain_http = true;
    Server::bind(Engine::in_memory().unwrap(), &config).await.map(drop).unwrap();
}
