//! Heads that are refused: every header missing, twice, too long and wrong, every signed part changed. Each refusal has
//! the KMS's status, code and sentence, and no key was touched.

use keymill::ClientId;
use prost::Message;

use crate::client::{
    API_NAME, BODY_HASH, CLIENT, Draft, Kms, OTHER_SIGNER, SIGNER, VERSION, create_client,
    generate, now_plus, sha256_hex,
};

/// What to do to a header before the head is signed.
#[derive(Clone, Copy, Debug)]
enum Bend<'a> {
    Missing,
    /// A second one of the same value.
    Twice,
    To(&'a [u8]),
}

use Bend::{Missing, To, Twice};

type Refused<'a> = (u16, &'static str, &'a str);

fn draft(kms: &Kms) -> Draft {
    kms.draft("GenerateDataKey", &generate("alias/direct", 32))
}

async fn check(kms: &Kms, name: &str, cases: &[(Bend<'_>, Refused<'_>)]) {
    for (bend, (status, code, message)) in cases {
        let mut draft = draft(kms);
        draft.sign();
        let before = draft.headers.get(name).map(|value| value.as_bytes().to_vec());
        match bend {
            Missing => draft.remove(name),
            Twice => draft.add(name, before.unwrap_or_else(|| b"x".into())),
            To(value) => draft.set(name, value),
        };
        if name != "authorization" {
            draft.sign();
        }
        let answer = kms.send(&draft).await;
        println!("{name} {bend:.80?}");
        answer.refused(*status, code, message);
    }
    // Nothing was done; and this is how it would show.
    assert_eq!(kms.wraps_granted(), 0, "{name}");
}

const LONG: &[u8] = &[b'a'; 100_000];

fn cut() -> String {
    "a".repeat(80)
}

#[tokio::test]
async fn a_content_type_that_is_not_protobuf() {
    let refused = |value: &str| format!("Content-Type \"{value}\" is unsupported.");
    let (none, html) = (refused(""), refused("text/html"));
    let json = refused("application/x-protobufs; a=application/x-protobuf");
    let long = refused(&cut());
    check(
        &Kms::new(),
        "content-type",
        &[
            (Missing, (415, "InvalidContentType", &none)),
            (Twice, (415, "InvalidContentType", &none)),
            (To(b""), (415, "InvalidContentType", &none)),
            (To(b"\xff"), (415, "InvalidContentType", &none)),
            (To(b"text/html"), (415, "InvalidContentType", &html)),
            (
                To(b"application/x-protobufs; a=application/x-protobuf"),
                (415, "InvalidContentType", &json),
            ),
            (To(LONG), (415, "InvalidContentType", &long)),
        ],
    )
    .await;
}

#[tokio::test]
async fn an_api_version_that_is_not_ours() {
    let refused = |value: &str| format!("The ApiVersion \"{value}\" is invalid.");
    let (none, other, long) = (refused(""), refused("dkms-gcs-0.3"), refused(&cut()));
    check(
        &Kms::new(),
        "x-kms-apiversion",
        &[
            (Missing, (400, "InvalidApiVersion", &none)),
            (Twice, (400, "InvalidApiVersion", &none)),
            (To(b"\xff"), (400, "InvalidApiVersion", &none)),
            (To(b"dkms-gcs-0.3"), (400, "InvalidApiVersion", &other)),
            (To(LONG), (400, "InvalidApiVersion", &long)),
        ],
    )
    .await;
}

#[tokio::test]
async fn an_api_name_that_is_not_ours() {
    let refused = |value: &str| format!("The ApiName \"{value}\" is invalid.");
    let (none, sign, lower) = (refused(""), refused("Sign"), refused("generatedatakey"));
    let (several, long) = (refused("Encrypt, Decrypt"), refused(&cut()));
    check(
        &Kms::new(),
        API_NAME,
        &[
            (Missing, (400, "InvalidApiName", &none)),
            (Twice, (400, "InvalidApiName", &none)),
            (To(b"\xff"), (400, "InvalidApiName", &none)),
            (To(b"Sign"), (400, "InvalidApiName", &sign)),
            (To(b"generatedatakey"), (400, "InvalidApiName", &lower)),
            (To(b"Encrypt, Decrypt"), (400, "InvalidApiName", &several)),
            (To(LONG), (400, "InvalidApiName", &long)),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_method_of_signature_that_is_not_ours() {
    let none = "The Param x-kms-signaturemethod is invalid.";
    let refused = |value: &str| format!("{none} message:\"{value}\".");
    let (sha1, long) = (refused("RSA_PKCS1_SHA_1"), refused(&cut()));
    check(
        &Kms::new(),
        "x-kms-signaturemethod",
        &[
            (Missing, (400, "InvalidParam", none)),
            (Twice, (400, "InvalidParam", none)),
            (To(b"\xff"), (400, "InvalidParam", none)),
            (To(b"RSA_PKCS1_SHA_1"), (400, "InvalidParam", &sha1)),
            (To(LONG), (400, "InvalidParam", &long)),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_client_that_is_not_known() {
    let none = "Parameter x-kms-acccesskeyid does not exist in http header or body.";
    let refused =
        |value: &str| format!("The AccessKey ID \"{value}\" does not exist in our records.");
    let absent = "KAAP.0a1b2c3d-0000-4fff-8000-00000000000f";
    let (absent_refused, bob, long) = (refused(absent), refused("bob"), refused(&cut()));
    let kms = Kms::new();
    let upper = kms.client.as_str().to_uppercase();
    let upper_refused = refused(&upper);
    check(
        &kms,
        CLIENT,
        &[
            (Missing, (400, "MissingParameter", none)),
            (Twice, (400, "MissingParameter", none)),
            (To(b""), (400, "MissingParameter", none)),
            (To(b"\xff"), (400, "MissingParameter", none)),
            (To(b"bob"), (404, "Unauthorized", &bob)),
            (To(absent.as_bytes()), (404, "Unauthorized", &absent_refused)),
            (To(upper.as_bytes()), (404, "Unauthorized", &upper_refused)),
            (To(LONG), (404, "Unauthorized", &long)),
        ],
    )
    .await;
    // The right spelling is the wrong one.
    let mut draft = draft(&kms);
    draft.remove(CLIENT).set("x-kms-accesskeyid", kms.client.as_str());
    kms.send(draft.sign()).await.refused(400, "MissingParameter", none);
}

#[tokio::test]
async fn a_date_that_is_none_or_too_far_away() {
    let bad = (400, "InvalidParam", "The Param Date is invalid.");
    let message = "Request time exceeds server time more than 15 minutes.";
    let skewed = (400, "RequestTimeTooSkewed", message);
    let (early, late) = (now_plus(-920), now_plus(920));
    check(
        &Kms::new(),
        "date",
        &[
            (Missing, bad),
            (Twice, bad),
            (To(b""), bad),
            (To(b"\xff"), bad),
            (To(b"2026-11-23T13:31:53Z"), bad),
            (To(b"Mon, 31 Feb 2026 13:31:53 GMT"), bad),
            (To(b"Mon,  3 Jan 2010 08:33:47 GMT"), bad),
            (To(b", "), bad),
            (To(LONG), bad),
            // Days of one and of two digits are dates, if old ones.
            (To(b"Sun, 3 Jan 2010 08:33:47 GMT"), skewed),
            (To(b"Sun, 03 Jan 2010 08:33:47 GMT"), skewed),
            (To(b"Fri, 31 Dec 9999 23:59:59 GMT"), skewed),
            (To(early.as_bytes()), skewed),
            (To(late.as_bytes()), skewed),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_body_hash_that_is_not_the_bodys() {
    let bad = (400, "InvalidParam", "The Param Content-SHA256 is invalid.");
    let other = sha256_hex(b"");
    let mut not_hex = other.clone();
    not_hex.replace_range(63.., "g");
    check(
        &Kms::new(),
        BODY_HASH,
        &[
            (Missing, bad),
            (Twice, bad),
            (To(b""), bad),
            (To(b"\xff"), bad),
            (To(&other.as_bytes()[..63]), bad),
            (To(not_hex.as_bytes()), bad),
            (To(LONG), bad),
            (To(other.as_bytes()), bad),
        ],
    )
    .await;
}

#[tokio::test]
async fn an_authorization_that_is_no_signature() {
    let bad = (400, "InvalidParam", "The Param Authorization is invalid.");
    let wrong = (401, "SignatureNotMatch", "Signature is not matched.");
    let of_len = |len| format!("Bearer {}", base64_simd::STANDARD.encode_to_string(vec![7; len]));
    let (short, long, longer, too_long) = (of_len(255), of_len(256), of_len(1024), of_len(1027));
    check(
        &Kms::new(),
        "authorization",
        &[
            (Missing, bad),
            (Twice, bad),
            (To(b""), bad),
            (To(b"\xff"), bad),
            (To(b"Bearer"), bad),
            (To(b"Bearer "), bad),
            (To(b"Bearer not!base64"), bad),
            (To(b"Bearer AAA"), bad),
            (To(b"Basic AAAA"), bad),
            (To(b"AAAA"), bad),
            (To(too_long.as_bytes()), bad),
            (To(LONG), bad),
            (To(b"Bearer AAAA"), wrong),
            (To(short.as_bytes()), wrong),
            (To(long.as_bytes()), wrong),
            (To(longer.as_bytes()), wrong),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_key_version_or_an_extra_header_that_stands_there_twice() {
    let kms = Kms::new();
    for name in [VERSION, "x-kms-extra", "x-kms-"] {
        let message = format!("The Param {name} is invalid.");
        let mut draft = draft(&kms);
        draft.add(name, "a").add(name, "b");
        kms.send(draft.sign()).await.refused(400, "InvalidParam", &message);
    }
    check(
        &kms,
        VERSION,
        &[(
            To(b"\xff"),
            (400, "InvalidParam", "The Param x-kms-migrationkeyversionid is invalid."),
        )],
    )
    .await;
    // One is signed with the rest, whatever it holds.
    for value in [&b""[..], b"\xff", LONG] {
        let mut draft = draft(&kms);
        let answer = kms.send(draft.set("x-kms-extra", value).sign()).await;
        assert_eq!(answer.status, 200, "{:?}", answer.error());
    }
    assert_ne!(kms.wraps_granted(), 0);
}

#[tokio::test]
async fn a_key_version_that_is_none() {
    let kms = Kms::new();
    let asked = keymill::server::proto::DecryptRequest {
        ciphertext_blob: vec![1; 48].into(),
        iv: vec![1; 12].into(),
        ..Default::default()
    };
    for value in [&b""[..], b"key-hzz62f1cb66fa42qo0001-aaaaaaaaaa", b"?", LONG] {
        let mut draft = kms.draft("Decrypt", &asked);
        let answer = kms.send(draft.set(VERSION, value).sign()).await;
        answer.refused_with(404, "Forbidden.KeyNotFound");
        assert!(answer.body.len() < 500);
    }
}

#[tokio::test]
async fn a_signature_is_of_every_part_of_its_head() {
    let kms = Kms::new();
    let other: ClientId = create_client(&kms.engine, &OTHER_SIGNER, "all", &["*"]);
    let twin: ClientId = create_client(&kms.engine, &SIGNER, "all", &["*"]);
    let date = now_plus(-1);
    let changes: [(&str, Option<&str>); 10] = [
        ("content-type", Some("application/x-protobuf; a=b")),
        ("date", Some(&date)),
        (API_NAME, Some("AdvanceGenerateDataKey")),
        (CLIENT, Some(other.as_str())),
        // Has the same key pair.
        (CLIENT, Some(twin.as_str())),
        (BODY_HASH, Some(&"00".repeat(32))),
        (VERSION, Some("key-hzz62f1cb66fa42qo0001-aaaaaaaaaa")),
        ("x-kms-another", Some("")),
        ("x-kms-extra", Some("signee")),
        ("x-kms-extra", None),
    ];
    for (name, value) in changes {
        let mut draft = draft(&kms);
        draft.set("x-kms-extra", "signed").sign();
        match value {
            Some(value) => draft.set(name, value),
            None => draft.remove(name),
        };
        let answer = kms.send(&draft).await;
        answer.refused(401, "SignatureNotMatch", "Signature is not matched.");
    }
    let mut by_another = draft(&kms);
    by_another.sign_by(&OTHER_SIGNER);
    kms.send(&by_another).await.refused_with(401, "SignatureNotMatch");
    // Every bit of the signature counts.
    let mut changed = draft(&kms);
    changed.sign();
    let header = changed.headers["authorization"].to_str().unwrap().to_owned();
    let signature = base64_simd::STANDARD.decode_to_vec(&header["Bearer ".len()..]).unwrap();
    for bit in (0..8 * signature.len()).step_by(61) {
        let mut signature = signature.clone();
        signature[bit / 8] ^= 1 << (bit % 8);
        let signature = base64_simd::STANDARD.encode_to_string(signature);
        changed.set("authorization", format!("Bearer {signature}"));
        kms.send(&changed).await.refused_with(401, "SignatureNotMatch");
    }
    assert_eq!(kms.wraps_granted(), 0);
    assert_eq!(kms.send(draft(&kms).sign()).await.status, 200);
    assert_ne!(kms.wraps_granted(), 0);
}

#[tokio::test]
async fn a_body_that_was_not_signed() {
    let kms = Kms::new();
    let other = generate("alias/direct", 33).encode_to_vec();
    for body in [other.as_slice(), &other[..other.len() - 1], b""] {
        let mut draft = draft(&kms);
        draft.sign();
        draft.body = body.to_vec().into();
        draft.set("content-length", body.len().to_string());
        let answer = kms.send(&draft).await;
        answer.refused(400, "InvalidParam", "The Param Content-SHA256 is invalid.");
    }
    assert_eq!(kms.wraps_granted(), 0);
}

#[tokio::test]
async fn another_method_or_path() {
    let kms = Kms::new();
    for method in ["GET", "PUT", "HEAD", "OPTIONS", "post", "X"] {
        let mut draft = draft(&kms);
        draft.method = method.parse().unwrap();
        let answer = kms.send(draft.sign()).await;
        answer.refused_with(405, "UnsupportedHTTPMethod");
        assert_eq!(answer.headers["allow"], "POST");
    }
    for path in ["/healthz", "//", "/a?b", "*"] {
        let mut draft = draft(&kms);
        draft.uri = path.into();
        kms.send(draft.sign()).await.refused_with(404, "InvalidPath");
    }
    assert_eq!(kms.wraps_granted(), 0);
}
