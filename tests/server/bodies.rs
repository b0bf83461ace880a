//! Bodies that are cut, damaged, too long or beyond their limits.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::{
    Request,
    body::{Body, Frame},
};
use keymill::server::proto::{
    AdvanceGenerateDataKeyRequest, BatchRequest, BatchResponse, DecryptRequest, DecryptResponse,
    EncryptRequest, GenerateDataKeyRequest, GenerateDataKeyResponse, GenerateRandomRequest, Item,
};
use prost::Message;

use crate::client::{Answer, Draft, Kms, batch, config, generate};

const MIB: usize = 1 << 20;

/// An operation, a body with all its fields set, and whether bytes are a body of its kind.
type Operation = (&'static str, Vec<u8>, fn(&[u8]) -> bool);

fn every_operation() -> Vec<Operation> {
    fn reads<M: Message + Default>(body: &[u8]) -> bool {
        M::decode(body).is_ok()
    }
    let (key_id, aad) = ("alias/direct".to_owned(), Bytes::from_static(b"aad"));
    let generating = GenerateDataKeyRequest {
        key_id: key_id.clone(),
        algorithm: "AES_GCM".into(),
        number_of_bytes: 300,
        aad: aad.clone(),
    };
    let advance = AdvanceGenerateDataKeyRequest {
        key_id: key_id.clone(),
        number_of_bytes: 300,
        aad: aad.clone(),
    };
    let text = EncryptRequest {
        key_id: key_id.clone(),
        plaintext: vec![1; 5].into(),
        algorithm: "AES_GCM".into(),
        aad: aad.clone(),
        iv: Bytes::new(),
        padding_mode: "NO_PADDING".into(),
    };
    let blob = DecryptRequest {
        ciphertext_blob: vec![1; 40].into(),
        key_id,
        algorithm: "AES_GCM".into(),
        aad,
        iv: vec![1; 12].into(),
        padding_mode: "NO_PADDING".into(),
    };
    let random = GenerateRandomRequest { length: 64 };
    vec![
        ("GenerateDataKey", generating.encode_to_vec(), reads::<GenerateDataKeyRequest>),
        ("AdvanceGenerateDataKey", advance.encode_to_vec(), reads::<AdvanceGenerateDataKeyRequest>),
        ("AdvanceEncrypt", text.encode_to_vec(), reads::<EncryptRequest>),
        ("Decrypt", blob.encode_to_vec(), reads::<DecryptRequest>),
        ("GenerateRandom", random.encode_to_vec(), reads::<GenerateRandomRequest>),
        (
            "BatchGenerateDataKey",
            batch([generating.clone(), generating]).encode_to_vec(),
            reads::<BatchRequest<GenerateDataKeyRequest>>,
        ),
        (
            "BatchAdvanceDecrypt",
            batch([blob.clone(), blob]).encode_to_vec(),
            reads::<BatchRequest<DecryptRequest>>,
        ),
    ]
}

#[track_caller]
fn not_a_message(answer: &Answer) {
    answer.refused_with(400, "InvalidParameter");
    let message = answer.error().error_message;
    let says = "The specified parameter is not valid. The body is no message of this operation: ";
    assert!(message.starts_with(says), "{message}");
}

#[tokio::test]
async fn bodies_cut_at_every_byte() {
    let kms = Kms::new();
    for (api, body, reads) in every_operation() {
        let mut unread = 0;
        for len in 0..body.len() {
            let answer = kms.ask_bytes(api, body[..len].to_vec()).await;
            if !reads(&body[..len]) {
                not_a_message(&answer);
                unread += 1;
            } else {
                assert!([200, 400, 500].contains(&answer.status), "{api} {len}: {answer:?}");
                assert!(answer.status < 500 || api == "Decrypt");
            }
        }
        assert!(unread >= body.len() / 2, "{api}");
    }
}

#[tokio::test]
async fn unknown_fields_are_skipped() {
    let kms = Kms::new();
    let (key, len) = (99 << 3, 99 << 3 | 2);
    let field = |key: u32, value: &[u8]| {
        let mut field = Vec::new();
        prost::encoding::encode_varint(key.into(), &mut field);
        field.extend_from_slice(value);
        field
    };
    let unknown = [
        field(key, b"\x7f"),
        field(key | 1, &[7; 8]),
        field(len, b"\x03abc"),
        field(key | 5, &[7; 4]),
        field(key | 3, &field(key | 4, b"")),
    ]
    .concat();
    for (api, body, _) in every_operation() {
        let plain = kms.ask_bytes(api, body.clone()).await;
        for body in [[&body[..], &unknown].concat(), [&unknown, &body[..]].concat()] {
            let answer = kms.ask_bytes(api, body).await;
            assert_eq!(answer.status, plain.status, "{api}");
        }
    }
}

#[tokio::test]
async fn damaged_bodies() {
    let kms = Kms::new();
    for (api, _, _) in every_operation() {
        // Of field 1: a wrong wire type, and one that does not exist; a length of 2^63 and of 2^31; a tag of 0.
        let wire_type = if api == "GenerateRandom" { 2 } else { 0 };
        for body in [
            vec![0x08 | wire_type, 1, 1],
            vec![0x0f, 1],
            [&b"\x0a"[..], &[0xff; 8], b"\x7fa"].concat(),
            vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x07, b'a'],
            vec![0, 1],
            // Ten bytes of a number, and more.
            vec![0xff; 11],
        ] {
            not_a_message(&kms.ask_bytes(api, body).await);
        }
    }
    // Texts are UTF-8: KeyId, Algorithm, and a reference.
    for text in [&b"\xff"[..], b"alias/\xc3", b"\xed\xa0\x80"] {
        let field = |tag: u8| [&[tag, u8::try_from(text.len()).unwrap()], text].concat();
        not_a_message(&kms.ask_bytes("GenerateDataKey", field(0x0a)).await);
        not_a_message(&kms.ask_bytes("GenerateDataKey", field(0x12)).await);
        not_a_message(&kms.ask_bytes("Decrypt", field(0x12)).await);
        let item = field(0x12);
        let item = [&[0x0a, u8::try_from(item.len()).unwrap()], &*item].concat();
        not_a_message(&kms.ask_bytes("BatchDecrypt", item).await);
    }
    assert_eq!(kms.wraps_granted(), 0);
}

#[tokio::test]
async fn parameters_at_and_beyond_their_bounds() {
    let kms = Kms::new();
    for number in [0, -1, i32::MIN, 1025, i32::MAX] {
        let asked = generate("alias/direct", number);
        kms.ask("GenerateDataKey", &asked).await.refused_with(400, "InvalidParameter");
    }
    let asked = |change: fn(&mut GenerateDataKeyRequest)| {
        let mut asked = generate("alias/direct", 32);
        change(&mut asked);
        asked
    };
    for change in [
        (|asked| asked.key_id.clear()) as fn(&mut GenerateDataKeyRequest),
        |asked| asked.algorithm = "AES_CBC".into(),
        |asked| asked.algorithm = "aes_gcm".into(),
        |asked| asked.aad = vec![0; 8193].into(),
    ] {
        let answer = kms.ask("GenerateDataKey", &asked(change)).await;
        answer.refused_with(400, "InvalidParameter");
    }
    for name in ["alias/none", "key-hzz62f1cb66fa42qo0001", &"k".repeat(1000), "é\n"] {
        let answer = kms.ask("GenerateDataKey", &generate(name, 32)).await;
        answer.refused_with(404, "Forbidden.KeyNotFound");
        assert!(answer.body.len() < 1000);
    }
    assert_eq!(kms.wraps_granted(), 0);
    let longest = asked(|asked| asked.aad = vec![0; 8192].into());
    assert_eq!(kms.ask("GenerateDataKey", &longest).await.status, 200);
}

/// A good body with an unknown field, `len` bytes in all.
fn padded(body: &[u8], len: usize) -> Vec<u8> {
    let mut padded = body.to_vec();
    // The field's tag and length take six bytes.
    let rest = len - body.len() - 6;
    padded.extend_from_slice(&[0x9a, 0x06]);
    let group = |index: usize| u8::try_from(rest >> (7 * index) & 0x7f).unwrap();
    padded.extend([group(0) | 0x80, group(1) | 0x80, group(2) | 0x80, group(3)]);
    padded.resize(len, 0);
    padded
}

#[tokio::test]
async fn a_body_has_at_most_three_megabytes() {
    let kms = Kms::new();
    let body = generate("alias/derived", 32).encode_to_vec();
    let largest = padded(&body, 3 * MIB);
    assert_eq!(kms.ask_bytes("GenerateDataKey", largest.clone()).await.status, 200);
    let refused = "The request body is larger than 3145728 bytes.";
    let larger = [&largest[..], &[0]].concat();
    let answer = kms.ask_bytes("GenerateDataKey", larger.clone()).await;
    answer.refused(413, "RequestEntityTooLarge", refused);
    // Whatever its head tells of it.
    for told in ["0", "5", "-1", "x", ""] {
        let mut draft = Draft::new(kms.client.as_str(), "GenerateDataKey", larger.clone());
        let answer = kms.send(draft.set("content-length", told).sign()).await;
        answer.refused(413, "RequestEntityTooLarge", refused);
    }
    // And before anything else is looked at, if it tells.
    let mut draft = Draft::new(kms.client.as_str(), "GenerateDataKey", "");
    for len in [100 * MIB, usize::MAX] {
        let answer = kms.send(draft.set("content-length", len.to_string())).await;
        answer.refused_with(413, "RequestEntityTooLarge");
    }
}

#[tokio::test]
async fn a_body_without_a_length_is_read_as_far_as_its_limit() {
    let kms = Kms::new();
    for (api, limit) in [("GenerateDataKey", 3), ("BatchGenerateDataKey", 64)] {
        let mut draft = Draft::new(kms.client.as_str(), api, "");
        let (parts, _) = draft.remove("content-length").sign().request().into_parts();
        let given = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&given);
        let chunks = std::iter::repeat_with(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(Bytes::from(vec![0; MIB]))
        });
        let request = Request::from_parts(parts, Chunks(chunks.take(100)));
        let answer = Answer::of(kms.service.answer(request).await);
        answer.refused_with(413, "RequestEntityTooLarge");
        assert_eq!(given.load(Ordering::Relaxed), limit + 1, "{api}");
    }
}

#[tokio::test]
async fn a_body_in_pieces_is_one_body() {
    let kms = Kms::new();
    let body = Bytes::from(generate("alias/derived", 32).encode_to_vec());
    let (parts, _) = Draft::new(kms.client.as_str(), "GenerateDataKey", body.clone())
        .sign()
        .request()
        .into_parts();
    let pieces = body.chunks(1).flat_map(|piece| [Ok(body.slice_ref(piece)), Ok(Bytes::new())]);
    let request = Request::from_parts(parts.clone(), Chunks(pieces));
    Answer::of(kms.service.answer(request).await).done::<GenerateDataKeyResponse>();
    // One that breaks off is answered as well.
    let broken = [Ok(body.slice(..5)), Err(io::Error::other("gone"))];
    let request = Request::from_parts(parts, Chunks(broken.into_iter()));
    let answer = Answer::of(kms.service.answer(request).await);
    answer.refused_with(400, "InvalidParameter");
}

/// A body of what an iterator has, without a length.
struct Chunks<I>(I);

impl<I: Iterator<Item = io::Result<Bytes>> + Unpin> Body for Chunks<I> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        Poll::Ready(self.0.next().map(|chunk| chunk.map(Frame::data)))
    }
}

#[tokio::test]
async fn a_batch_has_as_many_bytes_as_are_configured() {
    let mut config = config();
    config.batch_body_max = 10_000;
    let kms = Kms::with(&config);
    let body = batch([generate("alias/derived", 32)]).encode_to_vec();
    assert_eq!(kms.ask_bytes("BatchGenerateDataKey", padded(&body, 10_000)).await.status, 200);
    let answer = kms.ask_bytes("BatchGenerateDataKey", padded(&body, 10_001)).await;
    let refused = "The request body is larger than 10000 bytes.";
    answer.refused(413, "RequestEntityTooLarge", refused);
    // Single operations keep their limit.
    let body = generate("alias/derived", 32).encode_to_vec();
    assert_eq!(kms.ask_bytes("GenerateDataKey", padded(&body, MIB)).await.status, 200);
}

#[tokio::test]
async fn a_batch_has_at_most_65536_items() {
    let kms = Kms::new();
    let items = |count| batch((0..count).map(|_| generate("alias/direct", 32)));
    let made = kms.ask("BatchGenerateDataKey", &items(65_537)).await;
    let refused = "The batch has more than 65536 items.";
    made.refused(
        400,
        "InvalidParameter",
        &format!("The specified parameter is not valid. {refused}"),
    );
    assert_eq!(kms.wraps_granted(), 0);
    let made: BatchResponse<GenerateDataKeyResponse> =
        kms.ask("BatchGenerateDataKey", &items(65_536)).await.done();
    assert_eq!(made.results.len(), 65_536);
    let mut plaintexts = std::collections::HashSet::new();
    for (index, result) in made.results.into_iter().enumerate() {
        assert_eq!(result.reference, index.to_string());
        assert!(plaintexts.insert(result.response.unwrap().plaintext));
    }
}

#[tokio::test]
async fn one_bad_item_harms_no_other() {
    let kms = Kms::new();
    let count = 50;
    let bad: [fn(&mut Item<GenerateDataKeyRequest>); 6] = [
        |item| item.request = None,
        |item| item.request.as_mut().unwrap().number_of_bytes = -1,
        |item| item.request.as_mut().unwrap().number_of_bytes = 1025,
        |item| item.request.as_mut().unwrap().key_id = "alias/none".into(),
        |item| item.request.as_mut().unwrap().algorithm = "SM4_GCM".into(),
        |item| item.request.as_mut().unwrap().aad = vec![0; 8193].into(),
    ];
    for (index, spoil) in bad.into_iter().enumerate() {
        for place in [0, 20, count - 1] {
            let mut asked = batch((0..count).map(|_| generate("alias/direct", 32)));
            for item in &mut asked.items {
                item.reference = "the same".into();
            }
            spoil(&mut asked.items[place]);
            let made: BatchResponse<GenerateDataKeyResponse> =
                kms.ask("BatchGenerateDataKey", &asked).await.done();
            for (at, result) in made.results.iter().enumerate() {
                assert_eq!(result.response.is_some(), at != place, "{index}");
                assert_eq!(result.error.is_some(), at == place);
                assert_eq!(result.reference, "the same");
            }
        }
    }
    let asked = BatchRequest::<DecryptRequest> {
        items: vec![Item { request: None, reference: "é".repeat(5000) }, Item::default()],
    };
    let made: BatchResponse<DecryptResponse> = kms.ask("BatchDecrypt", &asked).await.done();
    assert_eq!(made.results[0].reference, asked.items[0].reference);
    assert!(made.results.iter().all(|result| result.error.is_some()));
}
