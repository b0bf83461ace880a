//! Encrypting texts of the caller's, through the public API: round trips of every length on every tier, whose IVs and
//! salts are used, what is refused, budgets; and random bytes.
//!
//! Method: keys of known material, so that AES-GCM of AWS-LC opens what `Direct` keys made, and an independent
//! XAES-256-GCM what `Derived` ones made, by the layouts of the documentation alone.

use std::{collections::HashSet, time::Duration};

use aws_lc_rs::aead::{AES_128_GCM, AES_192_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use keymill::{
    CreateKey, DecryptRequest, EncryptRequest, Encrypted, Engine, ErrorKind,
    GenerateDataKeyRequest, ImportKey, RotationPeriod, Scheme, Tier,
    limits::{AAD_LEN_MAX, PLAINTEXT_LEN_MAX},
};
use xaes_256_gcm::{
    Xaes256Gcm,
    aead::{Aead, KeyInit, Payload},
};

/// A key of each kind: its alias, the length of its material, its scheme.
const KINDS: [(&str, usize, Scheme); 4] = [
    ("alias/derived", 32, Scheme::Derived),
    ("alias/direct256", 32, Scheme::Direct),
    ("alias/direct192", 24, Scheme::Direct),
    ("alias/direct128", 16, Scheme::Direct),
];

fn material(alias: &str, len: usize) -> Vec<u8> {
    alias.bytes().cycle().take(len).collect()
}

/// An engine with these keys.
fn engine_on(tier: Tier) -> Engine {
    let engine = Engine::builder().tier(tier).in_memory().unwrap();
    for (alias, len, scheme) in KINDS {
        let material = material(alias, len);
        let key = ImportKey {
            scheme: Some(scheme),
            alias: Some(alias.into()),
            ..ImportKey::new(&material)
        };
        engine.import_key(&key).unwrap();
    }
    engine
}

fn engine() -> Engine {
    engine_on(Tier::available()[0])
}

/// Repeatable bytes.
fn text(len: usize) -> Vec<u8> {
    let mut state = len as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

/// What the two operations and their blobs are called here.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Raw,
    Advance,
}

const FORMS: [Form; 2] = [Form::Raw, Form::Advance];

fn encrypt(
    engine: &Engine,
    form: Form,
    request: &EncryptRequest<'_>,
) -> keymill::Result<Encrypted> {
    match form {
        Form::Raw => engine.encrypt(request),
        Form::Advance => engine.advance_encrypt(request),
    }
}

/// The request that opens what `request` made.
fn opening<'a>(
    form: Form,
    request: &EncryptRequest<'a>,
    made: &'a Encrypted,
) -> DecryptRequest<'a> {
    let opening = DecryptRequest::new(made.ciphertext_blob()).aad(request.aad);
    match form {
        Form::Raw => opening.key_id(request.key_id).iv(made.iv()),
        Form::Advance => opening,
    }
}

fn kind<T>(result: keymill::Result<T>) -> ErrorKind {
    result.err().expect("refused").kind()
}

/// Salt, if there is one, and sealed text.
fn parts(form: Form, scheme: Scheme, blob: &[u8]) -> (&[u8], &[u8]) {
    let head = if form == Form::Raw { 0 } else { 51 };
    blob[head..].split_at(if scheme == Scheme::Derived { 12 } else { 0 })
}

/// Opens a blob without the engine.
fn open_by_oracle(
    (alias, len, scheme): (&str, usize, Scheme),
    form: Form,
    aad: &[u8],
    made: &Encrypted,
) -> Vec<u8> {
    let (material, blob) = (material(alias, len), made.ciphertext_blob());
    let (salt, sealed) = parts(form, scheme, blob);
    if form == Form::Advance {
        assert_eq!(blob[..3], [0x24, 0, 2]);
        assert_eq!(blob[3..39], *made.key_version_id().as_str().as_bytes());
        assert_eq!(blob[39..51], *made.iv());
    }
    if scheme == Scheme::Derived {
        let nonce: [u8; 24] = [salt, made.iv()].concat().try_into().unwrap();
        let key: [u8; 32] = material.try_into().unwrap();
        let payload = Payload { msg: sealed, aad };
        return Xaes256Gcm::new(&key.into()).decrypt(&nonce.into(), payload).expect("right");
    }
    let algorithm = match len {
        16 => &AES_128_GCM,
        24 => &AES_192_GCM,
        _ => &AES_256_GCM,
    };
    let key = LessSafeKey::new(UnboundKey::new(algorithm, &material).unwrap());
    let nonce = Nonce::assume_unique_for_key(*made.iv());
    let mut opened = sealed.to_vec();
    key.open_in_place(nonce, Aad::from(aad), &mut opened).expect("right").to_vec()
}

/// Lengths about a block, the longest data key, and 2^16; and such with a counter of three bytes.
const LENS: [usize; 12] = [
    1,
    15,
    16,
    17,
    32,
    1024,
    1025,
    4096,
    65_535,
    (1 << 20) + 3,
    PLAINTEXT_LEN_MAX - 1,
    PLAINTEXT_LEN_MAX,
];

#[test]
fn what_was_encrypted_opens_by_any_hand_on_every_tier() {
    for &tier in Tier::available() {
        let engine = engine_on(tier);
        for (k, kind) in KINDS.into_iter().enumerate() {
            for form in FORMS {
                for (l, len) in LENS.into_iter().enumerate() {
                    let what = format!("{tier} {kind:?} {form:?} {len}");
                    let (text, aad) = (text(len), text((k * 12 + l) * 7 % 200));
                    let request = EncryptRequest::new(kind.0, &text).aad(&aad);
                    let made = encrypt(&engine, form, &request).unwrap();
                    let salt_len = if kind.2 == Scheme::Derived { 12 } else { 0 };
                    let head_len = if form == Form::Raw { 0 } else { 51 };
                    let blob_len = head_len + salt_len + len + 16;
                    assert_eq!(made.ciphertext_blob().len(), blob_len, "{what}");
                    assert_eq!(made.algorithm(), "AES_GCM");
                    assert_eq!(made.key_id(), engine.describe_key(kind.0).unwrap().key_id);
                    assert!(open_by_oracle(kind, form, &aad, &made) == text, "{what}");

                    let opening = opening(form, &request, &made);
                    let one = engine.advance_decrypt(&opening).unwrap();
                    assert!(one.plaintext().expose() == text, "{what}");
                    assert_eq!(one.key_version_id(), made.key_version_id());
                    if form == Form::Raw {
                        let one = engine.decrypt(&opening).unwrap();
                        assert!(one.plaintext().expose() == text, "{what}");
                    }
                }
            }
        }
    }
}

/// Texts of all lengths and data keys, of several keys, open together, whatever is wrong with one of them.
#[test]
fn a_decrypting_batch_takes_texts_and_data_keys() {
    let engine = engine();
    for form in FORMS {
        let texts: Vec<_> = LENS.iter().chain(&[32; 20]).map(|len| text(*len)).collect();
        let requests: Vec<_> = (texts.iter().zip(KINDS.iter().cycle()))
            .map(|(text, kind)| EncryptRequest::new(kind.0, text).aad(b"right"))
            .collect();
        let made: Vec<_> =
            requests.iter().map(|request| encrypt(&engine, form, request).unwrap()).collect();
        let data_key = GenerateDataKeyRequest::new("alias/derived", 32).aad(b"right");
        let data_key = match form {
            Form::Raw => engine.generate_data_key(&data_key).unwrap(),
            Form::Advance => engine.advance_generate_data_key(&data_key).unwrap(),
        };
        let mut opening: Vec<_> = (requests.iter().zip(&made))
            .map(|(request, made)| opening(form, request, made))
            .collect();
        let of_data_key = DecryptRequest::new(data_key.ciphertext_blob()).aad(b"right");
        opening.insert(3, of_data_key.key_id("alias/derived").iv(data_key.iv()));
        let mut expected: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
        expected.insert(3, data_key.plaintext().unwrap().expose());
        for wrong in [None, Some(0), Some(3), Some(LENS.len())] {
            let mut opening = opening.clone();
            if let Some(wrong) = wrong {
                opening[wrong] = opening[wrong].aad(b"wrong");
            }
            let opened = match form {
                Form::Raw => engine.decrypt_batch(&opening).unwrap(),
                Form::Advance => engine.advance_decrypt_batch(&opening).unwrap(),
            };
            for (i, (opened, expected)) in opened.iter().zip(&expected).enumerate() {
                match opened {
                    Ok(opened) => assert!(opened.plaintext() == *expected, "{i}"),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::DecryptFailed),
                }
                assert_eq!(opened.is_err(), wrong == Some(i), "{i}");
            }
        }
    }
}

#[test]
fn lengths_and_parameters_have_their_limits() {
    let engine = engine();
    let (longer, aad) = (vec![7; PLAINTEXT_LEN_MAX + 1], vec![7; AAD_LEN_MAX + 1]);
    for (alias, ..) in KINDS {
        for form in FORMS {
            let good = EncryptRequest::new(alias, b"text");
            for bad in [
                EncryptRequest::new(alias, b""),
                EncryptRequest::new(alias, &longer),
                good.aad(&aad),
                EncryptRequest { algorithm: Some("AES_CBC"), ..good },
                EncryptRequest { algorithm: Some("aes_gcm"), ..good },
            ] {
                let error = encrypt(&engine, form, &bad).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidParameter, "{bad:?}");
                assert!(error.request_id().is_some());
            }
            encrypt(&engine, form, &good.aad(&aad[1..])).unwrap();
            for algorithm in [None, Some(""), Some("AES_GCM")] {
                encrypt(&engine, form, &EncryptRequest { algorithm, ..good }).unwrap();
            }
            let absent = EncryptRequest { key_id: "alias/absent", ..good };
            assert_eq!(kind(encrypt(&engine, form, &absent)), ErrorKind::KeyNotFound);
        }
    }
    // A blob of more than any operation makes is a wrong blob, whoever reads it.
    for extra in [16, 28, 67, 79] {
        let blob = vec![7; PLAINTEXT_LEN_MAX + 1 + extra];
        let request = DecryptRequest::new(&blob).key_id("alias/derived").iv(&[7; 12]);
        assert_eq!(kind(engine.decrypt(&request)), ErrorKind::DecryptFailed);
        assert_eq!(kind(engine.advance_decrypt(&request)), ErrorKind::DecryptFailed);
        let batch = engine.decrypt_batch(&[request]).unwrap();
        assert_eq!(batch.errors()[0].kind(), ErrorKind::DecryptFailed);
    }
}

/// The lengths at the edge, which nobody but the key's owner can make: sealed by the oracle.
#[test]
fn the_longest_text_opens_and_one_byte_more_does_not() {
    let engine = engine();
    let key = UnboundKey::new(&AES_256_GCM, &material("alias/direct256", 32)).unwrap();
    let key = LessSafeKey::new(key);
    for (len, good) in [(PLAINTEXT_LEN_MAX, true), (PLAINTEXT_LEN_MAX + 1, false)] {
        let mut blob = text(len);
        let nonce = Nonce::assume_unique_for_key([7; 12]);
        key.seal_in_place_append_tag(nonce, Aad::empty(), &mut blob).unwrap();
        let request = DecryptRequest::new(&blob).key_id("alias/direct256").iv(&[7; 12]);
        let opened = engine.decrypt(&request);
        assert_eq!(opened.is_ok(), good);
        if let Err(error) = opened {
            assert_eq!(error.to_string(), "InternalFailure: Internal Failure.");
        }
    }
}

#[test]
fn an_iv_of_the_callers_has_a_salt_of_its_own_each_time() {
    let engine = engine();
    for form in FORMS {
        for len in [1, 32, 33, 1024, 1025, 70_000] {
            let (text, mut salts) = (text(len), HashSet::new());
            let request = EncryptRequest::new("alias/derived", &text).iv(b"the same IV.");
            for _ in 0..20 {
                let made = encrypt(&engine, form, &request).unwrap();
                assert_eq!(made.iv(), b"the same IV.");
                assert!(open_by_oracle(KINDS[0], form, b"", &made) == text);
                let (salt, _) = parts(form, Scheme::Derived, made.ciphertext_blob());
                assert!(salts.insert(salt.to_vec()), "a salt twice");
            }
            // That of the wrapping state, which data keys and short texts have, is none of them.
            let data_key = GenerateDataKeyRequest::new("alias/derived", 32);
            let data_key = engine.generate_data_key(&data_key).unwrap();
            let (salt, _) = parts(Form::Raw, Scheme::Derived, data_key.ciphertext_blob());
            assert!(!salts.contains(salt));
        }
        let good = EncryptRequest::new("alias/derived", b"text");
        for len in [0, 11, 13, 16] {
            let refused = encrypt(&engine, form, &good.iv(&[7; 16][..len]));
            assert_eq!(kind(refused), ErrorKind::InvalidParameter, "{len}");
        }
        for (alias, ..) in &KINDS[1..] {
            let request = EncryptRequest::new(alias, b"text").iv(&[7; 12]);
            assert_eq!(kind(encrypt(&engine, form, &request)), ErrorKind::InvalidParameter);
            // It took no wrap.
            let key = engine.describe_key(alias).unwrap();
            assert_eq!(key.versions[0].wraps_granted, 0);
        }
    }
}

#[test]
fn no_salt_and_iv_twice_and_long_texts_share_no_salt() {
    let engine = engine();
    for (alias, len, scheme) in KINDS {
        let (mut pairs, mut long_salts) = (HashSet::new(), HashSet::new());
        for round in 0..300 {
            let text = text([5, 32, 100, 1024, 1025, 3000][round % 6]);
            let form = FORMS[round / 6 % 2];
            let made = encrypt(&engine, form, &EncryptRequest::new(alias, &text)).unwrap();
            let (salt, _) = parts(form, scheme, made.ciphertext_blob());
            assert!(pairs.insert((salt.to_vec(), *made.iv())), "{alias} {len}");
            if text.len() > 1024 && scheme == Scheme::Derived {
                assert!(long_salts.insert(salt.to_vec()));
            }
        }
        // Nobody else had the salt of a long text.
        let shared = pairs.iter().filter(|(salt, _)| long_salts.contains(salt)).count();
        assert_eq!(shared, long_salts.len());
    }
}

/// Every way in which a blob, an AAD or an IV can be wrong is one error, message included.
#[test]
fn what_is_wrong_with_a_blob_is_not_told() {
    let engine = engine();
    let refused = |request: &DecryptRequest<'_>, what: &str| {
        let batch = engine.advance_decrypt_batch(std::slice::from_ref(request)).unwrap();
        let singles = [engine.advance_decrypt(request), engine.decrypt(request)];
        let errors = [singles[0].as_ref().err(), batch.get(0).err()];
        for error in errors {
            assert_eq!(error.expect(what).to_string(), "InternalFailure: Internal Failure.");
        }
        assert!(singles[1].is_err());
    };
    for (alias, ..) in KINDS {
        for form in FORMS {
            for len in [1, 16, 33] {
                let text = text(len);
                let request = EncryptRequest::new(alias, &text).aad(b"right");
                let made = encrypt(&engine, form, &request).unwrap();
                let good = opening(form, &request, &made);
                engine.advance_decrypt(&good).unwrap();
                refused(&good.aad(b"wrong"), "AAD");
                refused(&good.aad(b""), "no AAD");
                let blob = made.ciphertext_blob();
                for cut in 0..blob.len() {
                    let cut = DecryptRequest { ciphertext_blob: &blob[..cut], ..good };
                    refused(&cut, "cut");
                }
                for bit in 0..8 * blob.len() {
                    let mut flipped = blob.to_vec();
                    flipped[bit / 8] ^= 1 << (bit % 8);
                    refused(&DecryptRequest { ciphertext_blob: &flipped, ..good }, "flipped");
                }
                if form == Form::Raw {
                    let mut iv = *made.iv();
                    iv[11] ^= 1;
                    refused(&DecryptRequest { iv: Some(&iv), ..good }, "IV");
                }
            }
        }
    }
}

/// The last bit of a long text, of its tag, and a byte in its midst.
#[test]
fn a_long_text_that_is_wrong_anywhere_does_not_open() {
    let engine = engine();
    let text = text(PLAINTEXT_LEN_MAX);
    for (alias, ..) in KINDS {
        let request = EncryptRequest::new(alias, &text);
        let mut blob = engine.advance_encrypt(&request).unwrap().into_ciphertext_blob();
        let len = blob.len();
        for at in [52, 64, len / 2, len - 17, len - 16, len - 1] {
            blob[at] ^= 1;
            let refused = engine.advance_decrypt(&DecryptRequest::new(&blob));
            assert_eq!(kind(refused), ErrorKind::DecryptFailed, "{alias} {at}");
            blob[at] ^= 1;
        }
        engine.advance_decrypt(&DecryptRequest::new(&blob)).unwrap();
    }
}

#[test]
fn the_blob_is_handed_over_without_a_copy() {
    let engine = engine();
    let made = engine.encrypt(&EncryptRequest::new("alias/derived", &text(5000))).unwrap();
    let other = made.clone();
    let place = made.ciphertext_blob().as_ptr();
    let blob = made.into_ciphertext_blob();
    assert_eq!(blob.as_ptr(), place);
    let place = other.ciphertext_blob().as_ptr();
    let bytes = other.into_ciphertext_bytes();
    assert_eq!(bytes.as_ptr(), place);
    assert_eq!(bytes, blob);
}

fn direct(alias: &str) -> CreateKey {
    CreateKey { alias: Some(alias.into()), scheme: Some(Scheme::Direct), ..CreateKey::default() }
}

const REQUEST: EncryptRequest<'static> = EncryptRequest::new("alias/a", b"text");

#[test]
fn a_direct_version_encrypts_its_last_three_texts_and_no_more() {
    for lease_max in [0, 1, 1 << 20] {
        for form in FORMS {
            let spent = (1 << 32) - 3;
            let builder = Engine::builder().initial_spent(spent).lease_max(lease_max);
            let engine = builder.in_memory().unwrap();
            engine.create_key(&direct("alias/a")).unwrap();
            let long = text(100_000);
            for nth in 0..6 {
                // What is wrong with its parameters costs no wrap.
                let bad = EncryptRequest { iv: Some(&[7; 12]), ..REQUEST };
                assert_eq!(kind(encrypt(&engine, form, &bad)), ErrorKind::InvalidParameter);
                let request = EncryptRequest { plaintext: &long[nth * 10_000..], ..REQUEST };
                let made = encrypt(&engine, form, &request);
                assert_eq!(made.is_ok(), nth < 3, "{nth}");
                if let Err(error) = made {
                    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
                }
            }
            let key = engine.describe_key("alias/a").unwrap();
            assert_eq!(key.versions[0].wraps_granted, 1 << 32);
            let data_key = GenerateDataKeyRequest::new("alias/a", 32);
            assert_eq!(kind(engine.generate_data_key(&data_key)), ErrorKind::LimitExceeded);
        }
    }
}

#[test]
fn advance_encrypt_goes_on_with_a_new_version_when_a_rotating_key_is_spent() {
    let engine = Engine::builder().initial_spent((1 << 32) - 3).in_memory().unwrap();
    let month = RotationPeriod::new(Duration::from_secs(30 * 86_400)).unwrap();
    let key = CreateKey { rotation_period: Some(month), ..direct("alias/a") };
    engine.create_key(&key).unwrap();
    let made: Vec<_> = (0..12).map(|_| engine.advance_encrypt(&REQUEST).unwrap()).collect();
    let versions: HashSet<_> = made.iter().map(Encrypted::key_version_id).collect();
    assert!(versions.len() > 1);
    for made in &made {
        let opened = engine.advance_decrypt(&DecryptRequest::new(made.ciphertext_blob())).unwrap();
        assert_eq!(opened.plaintext().expose(), b"text");
    }
    // The initial version does not recover for those who insist on it.
    let good = (0..8).filter(|_| engine.encrypt(&REQUEST).is_ok()).count();
    assert!(good < 3, "{good}");
}

#[test]
fn encrypt_keeps_the_initial_version_and_advance_encrypt_follows_rotation() {
    let engine = Engine::in_memory().unwrap();
    engine.create_key(&CreateKey { scheme: None, ..direct("alias/a") }).unwrap();
    let before = engine.advance_encrypt(&REQUEST).unwrap();
    engine.rotate_key("alias/a").unwrap();
    let key = engine.describe_key("alias/a").unwrap();
    let versions = [key.initial_version(), key.primary_version()].map(|v| v.key_version_id);
    let iv = Some(&[7; 12][..]);
    for request in [REQUEST, EncryptRequest { iv, ..REQUEST }] {
        for (form, version) in FORMS.into_iter().zip(versions) {
            let made = encrypt(&engine, form, &request).unwrap();
            assert_eq!(made.key_version_id(), version);
            engine.advance_decrypt(&opening(form, &request, &made)).unwrap();
        }
    }
    engine.advance_decrypt(&DecryptRequest::new(before.ciphertext_blob())).unwrap();
}

#[test]
fn states_refuse_to_encrypt() {
    let engine = engine();
    for (alias, ..) in KINDS {
        engine.disable_key(alias).unwrap();
        let request = EncryptRequest::new(alias, b"text");
        for form in FORMS {
            assert_eq!(kind(encrypt(&engine, form, &request)), ErrorKind::Disabled);
        }
        engine.schedule_key_deletion(alias, 7).unwrap();
        for form in FORMS {
            assert_eq!(kind(encrypt(&engine, form, &request)), ErrorKind::PendingDeletion);
        }
        engine.cancel_key_deletion(alias).unwrap();
        engine.encrypt(&request).unwrap();
    }
}

#[test]
fn random_bytes_come_in_1_to_64() {
    let engine = Engine::in_memory().unwrap();
    for len in [0, 65, 1024] {
        let mut out = vec![7; len];
        assert_eq!(kind(engine.generate_random(&mut out)), ErrorKind::InvalidParameter, "{len}");
        assert!(out.iter().all(|byte| *byte == 7));
    }
    let (mut seen, mut ids) = (HashSet::new(), HashSet::new());
    for len in 1..=64 {
        // Each byte is written: sixteen draws leave none at zero by chance.
        let mut written = vec![0; len];
        for _ in 0..16 {
            let mut out = vec![0; len];
            assert!(ids.insert(engine.generate_random(&mut out).unwrap()));
            written.iter_mut().zip(&out).for_each(|(all, byte)| *all |= byte);
            assert!(len < 16 || seen.insert(out));
        }
        assert!(!written.contains(&0), "{len}");
    }
}
