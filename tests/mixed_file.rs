//! The main job as a user runs it: a file of 10,000 mixed requests through the program, and every result opened by
//! implementations that are not ours.
//!
//! Method: 50 keys of both schemes and three specs are imported, so that their material is known here. One line in a
//! hundred is bad, in every way in which a line can be. Each blob is opened with AWS-LC (all three specs) or with the
//! crate `xaes-256-gcm`, and once more through `keymill decrypt`.
#![cfg(feature = "cli")]

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    process::{Command, Output},
};

use aws_lc_rs::aead::{AES_128_GCM, AES_192_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64_simd::STANDARD;
use serde_json::Value;
use xaes_256_gcm::{
    Xaes256Gcm,
    aead::{Aead, KeyInit, Payload},
};

const LINES: usize = 10_000;
const KEYS: usize = 50;

struct Kek {
    alias: String,
    material: Vec<u8>,
    derived: bool,
}

/// A pseudo-random sequence, so that a failure repeats.
struct Mix(u64);

impl Mix {
    fn below(&mut self, bound: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % bound
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| u8::try_from(self.below(256)).unwrap()).collect()
    }
}

fn keymill(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_keymill"))
        .arg("--home")
        .arg(home)
        .args(arguments)
        .env_remove("KEYMILL_HOME")
        .output()
        .unwrap()
}

fn import_keys(home: &Path, mix: &mut Mix) -> Vec<Kek> {
    assert!(keymill(home, &["init"]).status.success());
    let material_file = home.join("material");
    (0..KEYS)
        .map(|nth| {
            let (len, derived) = [(32, true), (32, false), (24, false), (16, false)][nth % 4];
            let (alias, material) = (format!("alias/kek-{nth}"), mix.bytes(len));
            fs::write(&material_file, &material).unwrap();
            let scheme = if derived { "derived" } else { "direct" };
            let path = material_file.to_str().unwrap();
            let import =
                ["key", "import", "--material", path, "--alias", &alias, "--scheme", scheme];
            let done = keymill(home, &import);
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            Kek { alias, material, derived }
        })
        .collect()
}

/// What one line asks for: a good request, or a bad one with the code that it should get.
enum Line {
    Good { kek: usize, len: usize, aad: Vec<u8> },
    Bad(&'static str),
}

fn write_line(nth: usize, mix: &mut Mix, keks: &[Kek], out: &mut String) -> Line {
    let kek = mix.below(KEYS);
    let alias = &keks[kek].alias;
    if nth % 100 == 57 {
        let long = STANDARD.encode_to_string(vec![7; 8193]);
        let (line, code) = match nth / 100 % 12 {
            0 => (r#"{"KeyId":"alias/absent","NumberOfBytes":32}"#.into(), "Forbidden.KeyNotFound"),
            1 => (format!(r#"{{"KeyId":"{alias}","NumberOfBytes":0}}"#), "InvalidParameter"),
            2 => (format!(r#"{{"KeyId":"{alias}","NumberOfBytes":1025}}"#), "InvalidParameter"),
            3 => (format!(r#"{{"KeyId":"{alias}","NumberOfBytes":-1}}"#), "InvalidParameter"),
            4 => (format!(r#"{{"KeyId":"{alias}"}}"#), "InvalidParameter"),
            5 => (
                format!(r#"{{"KeyId":"{alias}","NumberOfBytes":32,"Aad":"{long}"}}"#),
                "InvalidParameter",
            ),
            6 => (String::new(), "InvalidParameter"),
            7 => (format!(r#"{{"KeyId":"{alias}","NumberOfBytes":32"#), "InvalidParameter"),
            8 => (
                format!(r#"{{"KeyId":"{alias}","NumberOfBytes":32,"Extra":1}}"#),
                "InvalidParameter",
            ),
            9 => (
                format!(r#"{{"KeyId":"{alias}","NumberOfBytes":32,"Aad":"***"}}"#),
                "InvalidParameter",
            ),
            10 => ("not json".into(), "InvalidParameter"),
            _ => (format!("{{\"KeyId\":\"{}\"}}", "x".repeat(70_000)), "InvalidParameter"),
        };
        writeln!(out, "{line}").unwrap();
        return Line::Bad(code);
    }
    let len = [32, 1, 1024, 1 + mix.below(1024)][mix.below(4)];
    let aad_len = [0, 16, mix.below(200), if mix.below(20) == 0 { 8192 } else { 5 }][mix.below(4)];
    let aad = mix.bytes(aad_len);
    write!(out, r#"{{"KeyId":"{alias}","NumberOfBytes":{len}"#).unwrap();
    if !aad.is_empty() {
        write!(out, r#","Aad":"{}""#, STANDARD.encode_to_string(&aad)).unwrap();
    }
    writeln!(out, "}}").unwrap();
    Line::Good { kek, len, aad }
}

fn bytes(row: &Value, field: &str) -> Vec<u8> {
    STANDARD.decode_to_vec(row[field].as_str().unwrap()).unwrap()
}

/// Opens a raw blob without any code of ours.
fn open_elsewhere(kek: &Kek, iv: &[u8], aad: &[u8], blob: &[u8]) -> Vec<u8> {
    if kek.derived {
        let (salt, sealed) = blob.split_at(12);
        let nonce: [u8; 24] = [salt, iv].concat().try_into().unwrap();
        let cipher = Xaes256Gcm::new(kek.material.as_slice().try_into().unwrap());
        return cipher.decrypt(&nonce.into(), Payload { msg: sealed, aad }).unwrap();
    }
    let algorithm = match kek.material.len() {
        16 => &AES_128_GCM,
        24 => &AES_192_GCM,
        _ => &AES_256_GCM,
    };
    let key = LessSafeKey::new(UnboundKey::new(algorithm, &kek.material).unwrap());
    let nonce = Nonce::try_assume_unique_for_key(iv).unwrap();
    let mut sealed = blob.to_vec();
    key.open_in_place(nonce, Aad::from(aad), &mut sealed).unwrap().to_vec()
}

#[test]
fn ten_thousand_mixed_lines_come_back_in_order_and_open_elsewhere() {
    let place = tempfile::tempdir().unwrap();
    let (home, file) = (place.path().join("home"), |name: &str| place.path().join(name));
    let mut mix = Mix(42);
    let keks = import_keys(&home, &mut mix);
    let mut text = String::new();
    let lines: Vec<_> = (0..LINES).map(|nth| write_line(nth, &mut mix, &keks, &mut text)).collect();
    fs::write(file("requests"), text).unwrap();

    for form in ["raw", "advanced"] {
        let [requests, made, opened] =
            ["requests", "made", "opened"].map(|name| file(name).to_str().unwrap().to_owned());
        let mut arguments = vec!["generate", "--requests", &requests, "--out", &made];
        arguments.extend((form == "advanced").then_some("--advance"));
        let done = keymill(&home, &arguments);
        assert_eq!(done.status.code(), Some(1), "{}", String::from_utf8_lossy(&done.stderr));
        let done = keymill(&home, &["decrypt", "--in", &made, "--out", &opened]);
        assert_eq!(done.status.code(), Some(1), "{}", String::from_utf8_lossy(&done.stderr));

        let (made, opened) =
            (fs::read_to_string(made).unwrap(), fs::read_to_string(opened).unwrap());
        assert_eq!((made.lines().count(), opened.lines().count()), (LINES, LINES));
        for (nth, ((line, made), opened)) in
            lines.iter().zip(made.lines()).zip(opened.lines()).enumerate()
        {
            let row: Value = serde_json::from_str(made).unwrap();
            match line {
                Line::Bad(code) => {
                    assert_eq!(row["Error"]["Code"], *code, "line {}: {made}", nth + 1);
                    assert_eq!(opened, made, "errors pass through");
                }
                Line::Good { kek, len, aad } => {
                    let (plaintext, blob) =
                        (bytes(&row, "Plaintext"), bytes(&row, "CiphertextBlob"));
                    assert_eq!(
                        (plaintext.len(), &bytes(&row, "Aad")),
                        (*len, aad),
                        "line {}",
                        nth + 1
                    );
                    let raw = if form == "raw" { &blob[..] } else { &blob[51..] };
                    let elsewhere = open_elsewhere(&keks[*kek], &bytes(&row, "Iv"), aad, raw);
                    assert_eq!(elsewhere, plaintext, "line {}", nth + 1);
                    let opened: Value = serde_json::from_str(opened).unwrap();
                    assert_eq!(bytes(&opened, "Plaintext"), plaintext, "line {}", nth + 1);
                    assert_eq!(opened["KeyVersionId"], row["KeyVersionId"]);
                }
            }
        }
    }
}
