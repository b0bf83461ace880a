//! TLS files as people have them: what can be used is used, and what cannot is told in plain words, with the file's name.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use keymill::{
    Engine,
    server::{Server, TlsFiles},
};

use crate::{
    running::Running,
    tls::{Files, connect},
};

async fn start(tls: TlsFiles) -> Result<(), String> {
    let mut config = crate::client::config();
    config.tls = Some(tls);
    let started = Server::bind(Engine::in_memory().unwrap(), &config).await;
    started.map(drop).map_err(|error| error.to_string())
}

/// Asserts that a server does not start with this file, and that the sentence names the file and has all these words.
#[track_caller]
fn told(result: Result<(), String>, path: &Path, words: &[&str]) {
    let error = result.expect_err(&format!("{path:?} was taken: {words:?}"));
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    for word in words {
        assert!(error.contains(word), "{word:?} is missing: {error}");
    }
}

const KEY: &str = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";

fn block(label: &str) -> String {
    KEY.replace("PRIVATE KEY", label)
}

fn utf16(text: &str) -> Vec<u8> {
    [0xfeff].into_iter().chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect()
}

/// The bytes of the only PEM block of a file.
fn der(path: &Path) -> Vec<u8> {
    let text = fs::read_to_string(path).unwrap();
    let lines: String = text.lines().filter(|line| !line.starts_with('-')).collect();
    base64_simd::STANDARD.decode_to_vec(lines).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_editors_and_systems_do_to_text_does_not_matter() {
    let files = Files::new();
    let edits: [&dyn Fn(&str) -> String; 5] = [
        &|text| format!("\u{feff}{text}"),
        &|text| text.replace('\n', "\r\n"),
        &|text| text.replace('\n', "\r"),
        &|text| text.lines().map(|line| format!("    {line}  \n\n")).collect(),
        &|text| format!("Subject: CN = somebody\n{}", text.trim_end()),
    ];
    let ca = fs::read_to_string(files.path("ca.pem")).unwrap();
    for edit in edits {
        files.renew();
        fs::write(files.path("ca.pem"), edit(&ca)).unwrap();
        for name in ["server.pem", "server.key"] {
            let text = fs::read_to_string(files.path(name)).unwrap();
            fs::write(files.path(name), edit(&text)).unwrap();
        }
        start(files.tls(true)).await.unwrap();
    }
    files.renew();
    // Both in one file.
    let both = files.path("both.pem");
    let [key, pem] =
        ["server.key", "server.pem"].map(|name| fs::read_to_string(files.path(name)).unwrap());
    fs::write(&both, key + &pem).unwrap();
    let tls = TlsFiles { certificate: both.clone(), key: both, client_ca: None };
    let server = Running::with(|config| config.tls = Some(tls)).await;
    connect(&files.client(&["h2"]), server.address).await.unwrap();
    server.end().await;
}

#[tokio::test]
async fn a_private_key_that_cannot_be_used_is_told_what_it_is() {
    let files = Files::new();
    let bad = files.path("bad.key");
    let pkcs12 = [&[0x30, 0x82, 1, 0, 2, 1, 3][..], &[0; 256]].concat();
    let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\n\
               AAAA\n-----END RSA PRIVATE KEY-----\n";
    let key = fs::read_to_string(files.path("server.key")).unwrap();
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (
            block("ENCRYPTED PRIVATE KEY").into(),
            &["is encrypted", "passphrase", "openssl pkey -in"],
        ),
        (old.into(), &["is encrypted", "passphrase", "openssl pkey -in"]),
        (old.replace('\n', "\r\n").into(), &["is encrypted"]),
        (block("OPENSSH PRIVATE KEY").into(), &["SSH", "ssh-keygen"]),
        (block("DSA PRIVATE KEY").into(), &["DSA"]),
        (block("PUBLIC KEY").into(), &["public key"]),
        (block("EC PARAMETERS").into(), &["EC PARAMETERS", "PRIVATE KEY"]),
        (block("CERTIFICATE").into(), &["a certificate and no private key", "swapped"]),
        (KEY.into(), &["cannot be used", "RSA of 2048"]),
        (KEY.replace("AAAA", "A*AA").into(), &["damaged"]),
        (der(&files.path("server.key")), &["DER", "openssl pkey -inform DER"]),
        (pkcs12, &["PKCS#12", "openssl pkcs12"]),
        (utf16(&key), &["UTF-16", "iconv"]),
        (utf16(&key)[2..].to_vec(), &["UTF-16", "iconv"]),
        (Vec::new(), &["empty"]),
        (b" \r\n".to_vec(), &["empty"]),
        (b"secret".to_vec(), &["no PEM", "BEGIN PRIVATE KEY"]),
        (vec![0xc3; 500], &["neither PEM nor"]),
        (vec![b'a'; 2 << 20], &["longer than"]),
    ];
    for (bytes, words) in cases {
        fs::write(&bad, bytes).unwrap();
        told(start(TlsFiles { key: bad.clone(), ..files.tls(false) }).await, &bad, words);
    }
    // Another's key.
    fs::copy(files.path("server.key"), &bad).unwrap();
    files.renew();
    let error = start(TlsFiles { key: bad.clone(), ..files.tls(false) }).await;
    told(error.clone(), &bad, &["belongs to the private key"]);
    told(error, &files.path("server.pem"), &[]);
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_is_told_what_it_is() {
    let files = Files::new();
    let bad = files.path("bad.pem");
    let pem = fs::read_to_string(files.path("server.pem")).unwrap();
    let cut = pem.lines().enumerate().filter(|(index, _)| *index != 2).map(|(_, line)| line);
    let cut = cut.collect::<Vec<_>>().join("\n");
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (block("PRIVATE KEY").into(), &["a private key and no certificate", "swapped"]),
        (block("CERTIFICATE REQUEST").into(), &["request"]),
        (block("TRUSTED CERTIFICATE").into(), &["openssl x509 -in"]),
        (block("PKCS7").into(), &["PKCS#7"]),
        (block("CERTIFICATE").into(), &["damaged"]),
        (cut.into(), &["damaged"]),
        (der(&files.path("server.pem")), &["DER", "openssl x509 -inform DER"]),
        (utf16(&pem), &["UTF-16", "iconv"]),
        (Vec::new(), &["empty"]),
        (b"none".to_vec(), &["no PEM", "BEGIN CERTIFICATE"]),
    ];
    for (bytes, words) in cases {
        fs::write(&bad, bytes).unwrap();
        told(start(TlsFiles { certificate: bad.clone(), ..files.tls(false) }).await, &bad, words);
        let client_ca = Some(bad.clone());
        told(start(TlsFiles { client_ca, ..files.tls(false) }).await, &bad, &[]);
    }
    // The CA's before its own.
    let ca = fs::read_to_string(files.path("ca.pem")).unwrap();
    fs::write(&bad, format!("{ca}{pem}")).unwrap();
    let tls = TlsFiles { certificate: bad.clone(), ..files.tls(false) };
    told(start(tls).await, &bad, &["wrong order", "number 2"]);
    fs::write(&bad, format!("{pem}{ca}")).unwrap();
    start(TlsFiles { certificate: bad, ..files.tls(false) }).await.unwrap();
}

#[tokio::test]
async fn places_that_hold_no_file_are_told_apart() {
    let files = Files::new();
    let (fifo, secret) = (files.path("fifo"), files.path("secret"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    fs::copy(files.path("server.key"), &secret).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    let none = files.path("none");
    let directory = files.path("");
    let mut cases: Vec<(&Path, &str)> = vec![
        (&none, "No such file"),
        (&directory, "is a directory"),
        (&fifo, "a pipe or a device"),
        (Path::new("/dev/null"), "a pipe or a device"),
    ];
    // Root reads everything.
    if fs::read(&secret).is_err() {
        cases.push((&secret, "ermission denied"));
    }
    for (path, words) in cases {
        let tls = || files.tls(false);
        let path = path.to_owned();
        let key = TlsFiles { key: path.clone(), ..tls() };
        let certificate = TlsFiles { certificate: path.clone(), ..tls() };
        let client_ca = TlsFiles { client_ca: Some(path.clone()), ..tls() };
        for tls in [key, certificate, client_ca] {
            told(start(tls).await, &path, &[words]);
        }
    }
}

/// Runs `openssl`, or says that there is none.
fn openssl(directory: &Path, arguments: &str) -> bool {
    let run = Command::new("openssl").args(arguments.split(' ')).current_dir(directory).output();
    run.is_ok_and(|output| output.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_clients_refuse_are_told_of() {
    let files = Files::new();
    let home = files.path("");
    if !openssl(&home, "genrsa -out small.key 1024") {
        eprintln!("skipped: no openssl");
        return;
    }
    assert!(openssl(&home, "req -x509 -key small.key -subj /CN=a -days 2 -out small.pem"));
    let (certificate, key) = (files.path("small.pem"), files.path("small.key"));
    let error = start(TlsFiles { certificate: certificate.clone(), key, client_ca: None }).await;
    told(error, &certificate, &["1024 bits", "2048"]);

    assert!(openssl(&home, "genrsa -out v1.key 2048"));
    assert!(openssl(&home, "req -new -key v1.key -subj /CN=a -out v1.csr"));
    assert!(openssl(&home, "x509 -req -in v1.csr -signkey v1.key -days 2 -out v1.pem"));
    let (certificate, key) = (files.path("v1.pem"), files.path("v1.key"));
    let mut shown = Command::new("openssl");
    let shown = shown.args(["x509", "-noout", "-text", "-in"]).arg(&certificate).output().unwrap();
    if String::from_utf8_lossy(&shown.stdout).contains("Version: 1") {
        let tls = TlsFiles { certificate: certificate.clone(), key, client_ca: None };
        told(start(tls).await, &certificate, &["version 1", "version 3"]);
        // As a CA it is a name and a key, and is taken; or it is refused in the same words.
        let client_ca = Some(certificate.clone());
        if let Err(error) = start(TlsFiles { client_ca, ..files.tls(false) }).await {
            told(Err(error), &certificate, &["version 1", "version 3"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_expiry_of_a_certificate_and_failed_handshakes_are_counted() {
    let files = Files::new();
    let tls = files.tls(false);
    let server = Running::with(|config| config.tls = Some(tls)).await;
    // That of rcgen's certificates.
    let expiry = server.metric("keymill_tls_certificate_expiry_seconds").await;
    assert!(expiry > 4_000_000_000.0, "{expiry}");
    let stranger = Files::new();
    assert!(connect(&stranger.client(&["h2"]), server.address).await.is_err());
    let failed = |reason| format!("keymill_tls_handshakes_failed_total{{reason=\"{reason}\"}}");
    server.wait_for(&failed("alert"), 1.0).await;
    let mut stream = server.connect().await;
    crate::running::exchange(&mut stream, b"GET / HTTP/1.1\r\n\r\n").await;
    server.wait_for(&failed("not_tls"), 1.0).await;
    server.end().await;
    let plain = Running::start().await;
    assert_eq!(plain.metric("keymill_tls_certificate_expiry_seconds").await, 0.0);
    plain.end().await;
}
