//! PEM files as people have them: what is in one, and what to do if it is not what it should be.
//!
//! What editors and other systems do to text (a byte order mark, CR LF, spaces around lines) is taken away. Everything
//! else is told in a sentence that says what the file is and how to make the right one.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use zeroize::Zeroizing;

use crate::limits::TLS_FILE_LEN_MAX;

/// Every certificate of a file.
pub(super) fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let text = read(path)?;
    let labels = labels(&text);
    if !labels.contains(&"CERTIFICATE") {
        return Err(unusable(path, no_certificate(path, &labels)));
    }
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    all.map_err(|error| unusable(path, format!("a PEM block of it is damaged: {error}")))
}

/// The private key of a file.
pub(super) fn private_key(path: &Path) -> io::Result<PrivateKeyDer<'static>> {
    let text = read(path)?;
    let labels = labels(&text);
    let is_encrypted = labels.contains(&"ENCRYPTED PRIVATE KEY")
        || text.lines().any(|line| line.starts_with("Proc-Type:") && line.contains("ENCRYPTED"));
    if is_encrypted {
        return Err(unusable(
            path,
            format!(
                "the key is encrypted, and keymill asks for no passphrase; decrypt it with \
                 `openssl pkey -in {} -out NEW`, which only the server's user may read",
                path.display()
            ),
        ));
    }
    if !labels.iter().any(|label| KEYS.contains(label)) {
        return Err(unusable(path, no_key(path, &labels)));
    }
    PrivateKeyDer::from_pem_slice(text.as_bytes())
        .map_err(|error| unusable(path, format!("a PEM block of it is damaged: {error}")))
}

/// The labels of private keys that TLS takes.
const KEYS: [&str; 3] = ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"];

/// An error that names the file.
pub(super) fn unusable(path: &Path, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{path:?}: {why}"))
}

/// The labels of all PEM blocks.
fn labels(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("-----BEGIN ")?.strip_suffix("-----"))
        .collect()
}

fn no_certificate(path: &Path, labels: &[&str]) -> String {
    let path = path.display();
    let has = |label| labels.contains(&label);
    if has("CERTIFICATE REQUEST") || has("NEW CERTIFICATE REQUEST") {
        "it holds a request for a certificate; give the certificate that the CA made of it".into()
    } else if has("TRUSTED CERTIFICATE") {
        format!("it is in OpenSSL's own form; convert it with `openssl x509 -in {path} -out NEW`")
    } else if has("PKCS7") || has("CMS") {
        format!("it is PKCS#7; convert it with `openssl pkcs7 -print_certs -in {path} -out NEW`")
    } else if labels.iter().any(|label| label.ends_with("PRIVATE KEY")) {
        "it holds a private key and no certificate; are the two files swapped?".into()
    } else {
        no_pem(labels, "CERTIFICATE")
    }
}

fn no_key(path: &Path, labels: &[&str]) -> String {
    let path = path.display();
    let has = |label| labels.contains(&label);
    if has("OPENSSH PRIVATE KEY") {
        format!("it is an SSH key; convert a copy of it with `ssh-keygen -p -m PEM -f {path}`")
    } else if has("DSA PRIVATE KEY") {
        format!("it is a DSA key, which TLS has no use for; {KINDS}")
    } else if has("PUBLIC KEY") || has("RSA PUBLIC KEY") {
        "it holds a public key; give the private one".into()
    } else if has("CERTIFICATE") {
        "it holds a certificate and no private key; are the two files swapped?".into()
    } else {
        no_pem(labels, "PRIVATE KEY")
    }
}

fn no_pem(labels: &[&str], wanted: &str) -> String {
    match labels.first() {
        None => format!("there is no PEM in it, no line `-----BEGIN {wanted}-----`"),
        Some(other) => format!("its PEM is {other:?}, and {wanted:?} is needed"),
    }
}

/// What keys may be.
pub(super) const KINDS: &str =
    "a key is RSA of 2048 to 8192 bits, ECDSA on P-256, P-384 or P-521, or Ed25519";

/// A file's text, as PEM has it.
fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{path:?}: {error}"));
    let kind = fs::metadata(path).map_err(named)?.file_type();
    if kind.is_dir() {
        return Err(unusable(path, "it is a directory; name the file in it"));
    }
    if !kind.is_file() {
        // It is read again and again, and a pipe can keep whoever opens it waiting.
        return Err(unusable(path, "it is a pipe or a device; TLS files are regular files"));
    }
    let mut bytes = Zeroizing::new(Vec::new());
    let max = TLS_FILE_LEN_MAX as u64 + 1;
    File::open(path).map_err(named)?.take(max).read_to_end(&mut bytes).map_err(named)?;
    if bytes.len() > TLS_FILE_LEN_MAX {
        return Err(unusable(path, format!("it is longer than {TLS_FILE_LEN_MAX} bytes")));
    }
    text(&bytes).map_err(|why| unusable(path, why(&path.display().to_string())))
}

/// Says what a file of this path is, and what to do.
type Why = fn(&str) -> String;

fn text(bytes: &[u8]) -> Result<Zeroizing<String>, Why> {
    if bytes.trim_ascii().is_empty() {
        return Err(|_| "it is empty".into());
    }
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) || has_wide(bytes) {
        return Err(|path| {
            format!("it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8 {path} > NEW`")
        });
    }
    let bytes = bytes.strip_prefix(&[0xef, 0xbb, 0xbf]).unwrap_or(bytes);
    if let Some(why) = der(bytes) {
        return Err(why);
    }
    let text = str::from_utf8(bytes)
        .map_err(|_| -> Why { |_| "it is neither PEM nor any other text".into() })?;
    let mut clean = Zeroizing::new(String::with_capacity(text.len() + 1));
    for line in text.split(['\r', '\n']).map(str::trim).filter(|line| !line.is_empty()) {
        clean.push_str(line);
        clean.push('\n');
    }
    Ok(clean)
}

/// Whether ASCII was written with two bytes a character.
fn has_wide(bytes: &[u8]) -> bool {
    let zeros = |from| bytes.iter().take(64).skip(from).step_by(2).all(|byte| *byte == 0);
    bytes.len() >= 4 && (zeros(0) || zeros(1))
}

/// What DER is, if it is that.
fn der(bytes: &[u8]) -> Option<Why> {
    // SEQUENCE, with a length of up to four bytes.
    let [0x30, len, rest @ ..] = bytes else { return None };
    let skipped = match len {
        0..=0x7f => 0,
        0x81..=0x84 => usize::from(len - 0x80),
        _ => return None,
    };
    let content = rest.get(skipped..)?;
    Some(if content.starts_with(&[2, 1, 3]) {
        |path| format!("it is PKCS#12; convert it with `openssl pkcs12 -nodes -in {path} -out NEW`")
    } else if content.starts_with(&[2, 1]) {
        |path| format!("it is DER; convert it with `openssl pkey -inform DER -in {path} -out NEW`")
    } else {
        |path| format!("it is DER; convert it with `openssl x509 -inform DER -in {path} -out NEW`")
    })
}
