//! What is answered to those who may ask: operations, headers, batches, and the captured bytes of the vendor's SDK.

use keymill::server::proto::{
    self, AdvanceGenerateDataKeyRequest, BatchResponse, DecryptRequest, DecryptResponse,
    EncryptRequest, EncryptResponse, GenerateDataKeyRequest, GenerateDataKeyResponse,
    GenerateRandomRequest, GenerateRandomResponse,
};
use prost::Message;

use crate::client::{
    API_NAME, Draft, Kms, VERSION, advance_generate, assert_uuid, batch, generate, now_plus,
};

fn hex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

const KEYS: [(&str, usize); 2] = [("alias/derived", 12 + 16), ("alias/direct", 16)];

#[tokio::test]
async fn data_keys_round_trip_in_both_forms_and_schemes() {
    let kms = Kms::new();
    for (name, overhead) in KEYS {
        let key = kms.engine.describe_key(name).unwrap();
        for number in [1, 16, 32, 1024] {
            let aad = b"some aad".to_vec();
            let request =
                GenerateDataKeyRequest { aad: aad.clone().into(), ..generate(name, number) };
            let raw: GenerateDataKeyResponse = kms.ask("GenerateDataKey", &request).await.done();
            assert_eq!(raw.key_id, key.key_id.as_str());
            assert_eq!(raw.plaintext.len(), number as usize);
            assert_eq!(raw.ciphertext_blob.len(), number as usize + overhead);
            assert_eq!((raw.iv.len(), &*raw.algorithm, &*raw.key_version_id), (12, "AES_GCM", ""));
            assert_uuid(&raw.request_id);

            let request = AdvanceGenerateDataKeyRequest {
                aad: aad.clone().into(),
                ..advance_generate(name, number)
            };
            let own: GenerateDataKeyResponse =
                kms.ask("AdvanceGenerateDataKey", &request).await.done();
            assert_eq!(own.key_version_id, key.primary_version().key_version_id.as_str());
            assert_eq!(&own.ciphertext_blob[3..39], own.key_version_id.as_bytes());
            assert_ne!(own.plaintext, raw.plaintext);

            let mut asked = DecryptRequest {
                ciphertext_blob: raw.ciphertext_blob.clone(),
                key_id: name.into(),
                algorithm: "AES_GCM".into(),
                aad: aad.into(),
                iv: raw.iv.clone(),
                padding_mode: String::new(),
            };
            for api in ["Decrypt", "AdvanceDecrypt"] {
                let opened: DecryptResponse = kms.ask(api, &asked).await.done();
                assert_eq!(opened.plaintext, raw.plaintext);
                assert_eq!(opened.key_id, key.key_id.as_str());
                assert_eq!(opened.key_version_id.is_empty(), api == "Decrypt");
                assert_uuid(&opened.request_id);
            }
            asked.ciphertext_blob = own.ciphertext_blob.clone();
            (asked.key_id, asked.iv) = (String::new(), [1; 12].to_vec().into());
            let opened: DecryptResponse = kms.ask("AdvanceDecrypt", &asked).await.done();
            assert_eq!(opened.plaintext, own.plaintext);
            assert_eq!(opened.key_version_id, own.key_version_id);
            asked.aad = b"other aad".to_vec().into();
            let refused = kms.ask("AdvanceDecrypt", &asked).await;
            refused.refused(500, "InternalFailure", "Internal Failure.");
        }
    }
}

#[tokio::test]
async fn callers_data_round_trips_in_both_forms_and_schemes() {
    let kms = Kms::new();
    for (name, _) in KEYS {
        for len in [1, 32, 100_000] {
            let request = EncryptRequest {
                key_id: name.into(),
                plaintext: vec![7; len].into(),
                aad: b"aad".to_vec().into(),
                padding_mode: "PKCS7_PADDING".into(),
                ..Default::default()
            };
            for (encrypt, decrypt) in [("Encrypt", "Decrypt"), ("AdvanceEncrypt", "AdvanceDecrypt")]
            {
                let made: EncryptResponse = kms.ask(encrypt, &request).await.done();
                assert_eq!(
                    (made.iv.len(), &*made.algorithm, &*made.padding_mode),
                    (12, "AES_GCM", "")
                );
                assert_eq!(made.key_version_id.is_empty(), encrypt == "Encrypt");
                let asked = DecryptRequest {
                    ciphertext_blob: made.ciphertext_blob,
                    key_id: made.key_id,
                    aad: request.aad.clone(),
                    iv: made.iv,
                    ..Default::default()
                };
                let opened: DecryptResponse = kms.ask(decrypt, &asked).await.done();
                assert_eq!(opened.plaintext, request.plaintext);
            }
        }
    }
}

#[tokio::test]
async fn random_bytes_have_the_length_that_was_asked_for() {
    let kms = Kms::new();
    for length in [1, 32, 64] {
        let asked = GenerateRandomRequest { length };
        let made: GenerateRandomResponse = kms.ask("GenerateRandom", &asked).await.done();
        assert_eq!(made.random.len(), length as usize);
        assert_uuid(&made.request_id);
    }
    for length in [0, -1, 65, i32::MIN, i32::MAX] {
        let asked = GenerateRandomRequest { length };
        kms.ask("GenerateRandom", &asked).await.refused(
            400,
            "InvalidParameter",
            &format!("The specified parameter is not valid. Length {length} is outside 1 to 64."),
        );
    }
}

/// Bodies that the vendor's SDK was seen to send.
#[test]
fn captured_bodies_are_read_as_what_they_say() {
    let key = "key-hzz62f1cb66fa42qo0001";
    let body = hex(
        "0a196b65792d687a7a363266316362363666613432716f3030303112074145535f47434d182022050102616164",
    );
    let read = GenerateDataKeyRequest::decode(&*body).unwrap();
    assert_eq!((&*read.key_id, &*read.algorithm, read.number_of_bytes), (key, "AES_GCM", 32));
    assert_eq!(&*read.aad, b"\x01\x02aad");
    assert_eq!(read.encode_to_vec(), body);

    let body = hex("0a0c616c6961732f6d792d6b65791810");
    assert_eq!(GenerateDataKeyRequest::decode(&*body).unwrap(), generate("alias/my-key", 16));

    let body = hex("0a196b65792d687a7a363266316362363666613432716f3030303110201a03616164");
    let read = AdvanceGenerateDataKeyRequest::decode(&*body).unwrap();
    assert_eq!((&*read.key_id, read.number_of_bytes, &*read.aad), (key, 32, &b"aad"[..]));
    assert_eq!(read.encode_to_vec(), body);

    let blob = |len: usize| "43".repeat(len);
    let body = hex(&format!(
        "0a30{}12196b65792d687a7a363266316362363666613432716f303030311a074145535f47434d2203616164\
         2a0c000102030405060708090a0b",
        blob(48)
    ));
    let read = DecryptRequest::decode(&*body).unwrap();
    assert_eq!((&*read.ciphertext_blob, &*read.key_id), (&[b'C'; 48][..], key));
    assert_eq!((&*read.algorithm, &*read.aad), ("AES_GCM", &b"aad"[..]));
    assert_eq!(&*read.iv, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(read.encode_to_vec(), body);

    let body = hex(&format!("0a63{}2203616164", blob(99)));
    let read = DecryptRequest::decode(&*body).unwrap();
    assert_eq!((&*read.ciphertext_blob, &*read.aad), (&[b'C'; 99][..], &b"aad"[..]));
    assert_eq!(GenerateRandomRequest::decode(&*hex("0840")).unwrap().length, 64);

    // A response that the SDK accepted.
    let body = hex(&format!(
        "0a196b65792d687a7a363266316362363666613432716f30303031120c000102030405060708090a0b1a20{}\
         2230{}2a24{}32074145535f47434d",
        "50".repeat(32),
        blob(48),
        "61".repeat(36)
    ));
    let read = GenerateDataKeyResponse::decode(&*body).unwrap();
    assert_eq!((&*read.key_id, &*read.plaintext), (key, &[0x50; 32][..]));
    assert_eq!((&*read.ciphertext_blob, &*read.algorithm), (&[b'C'; 48][..], "AES_GCM"));
    assert_eq!(read.encode_to_vec(), body);
}

#[tokio::test]
async fn the_version_stands_in_a_header_where_transfer_clients_look_for_it() {
    let kms = Kms::new();
    for (name, _) in KEYS {
        kms.engine.rotate_key(name).unwrap();
        let initial = kms.engine.describe_key(name).unwrap().initial_version().key_version_id;
        let made = kms.ask("GenerateDataKey", &generate(name, 32)).await;
        assert_eq!(made.headers[VERSION], initial.as_str());
        let made: GenerateDataKeyResponse = made.done();
        let text = EncryptRequest {
            key_id: name.into(),
            plaintext: b"text".to_vec().into(),
            ..Default::default()
        };
        assert_eq!(kms.ask("Encrypt", &text).await.headers[VERSION], initial.as_str());

        // Sent back, it stands for the key that is not named.
        let asked = DecryptRequest {
            ciphertext_blob: made.ciphertext_blob,
            iv: made.iv,
            ..Default::default()
        };
        let mut draft = kms.draft("Decrypt", &asked);
        let opened = kms.send(draft.set(VERSION, initial.as_str()).sign()).await;
        assert_eq!(opened.headers[VERSION], initial.as_str());
        assert_eq!(opened.done::<DecryptResponse>().plaintext, made.plaintext);
        kms.ask("Decrypt", &asked).await.refused_with(400, "InvalidParameter");

        let made = kms.ask("AdvanceGenerateDataKey", &advance_generate(name, 32)).await;
        assert!(!made.headers.contains_key(VERSION));
        let blob = made.done::<GenerateDataKeyResponse>().ciphertext_blob;
        let asked = DecryptRequest { ciphertext_blob: blob, ..Default::default() };
        let others = [
            kms.ask("AdvanceEncrypt", &text).await,
            kms.ask("AdvanceDecrypt", &asked).await,
            kms.ask("GenerateRandom", &GenerateRandomRequest { length: 1 }).await,
            kms.ask("BatchGenerateDataKey", &batch([generate(name, 32)])).await,
            kms.ask("BatchDecrypt", &batch([asked])).await,
        ];
        for other in others {
            assert_eq!(other.status, 200);
            assert!(!other.headers.contains_key(VERSION));
        }
    }
}

#[tokio::test]
async fn heads_may_be_written_in_several_ways() {
    let kms = Kms::new();
    let draft = || kms.draft("GenerateDataKey", &generate("alias/direct", 32));
    type Bend = fn(&mut Draft) -> &mut Draft;
    let before: [Bend; 8] = [
        |draft| draft.set("content-type", "application/x-protobuf; charset=utf-8"),
        |draft| draft.set("content-type", "Application/X-Protobuf"),
        |draft| draft.set("accept", "*/*").add("accept", "text/html"),
        |draft| draft.remove("accept").remove("host").remove("content-length"),
        |draft| draft.set(API_NAME, "  GenerateDataKey "),
        |draft| draft.set("x-kms-extra", ""),
        |draft| draft.set("date", now_plus(-890)),
        |draft| draft.set("date", now_plus(890)),
    ];
    for (index, bend) in before.into_iter().enumerate() {
        let mut draft = draft();
        bend(&mut draft);
        let answer = kms.send(draft.sign()).await;
        assert_eq!(answer.status, 200, "{index}: {:?}", answer.error());
    }
    for scheme in ["Bearer", "bearer", "BEARER", "TOKEN", "Token", "token"] {
        let mut draft = draft();
        let signed = draft.sign().headers["authorization"].to_str().unwrap().to_owned();
        let signature = signed.strip_prefix("Bearer ").unwrap();
        let answer = kms.send(draft.set("authorization", format!("{scheme} {signature}"))).await;
        assert_eq!(answer.status, 200, "{scheme}");
    }
    let mut draft = draft();
    draft.sign();
    let hash = draft.headers["content-sha256"].to_str().unwrap().to_lowercase();
    let answer = kms.send(draft.set("content-sha256", hash).sign()).await;
    assert_eq!(answer.status, 200);
    draft.uri = "/?a=b".into();
    assert_eq!(kms.send(&draft).await.status, 200);
    draft.uri = "http://127.0.0.1:18481/".into();
    assert_eq!(kms.send(&draft).await.status, 200);
}

fn errors<M: Message + Default>(response: &BatchResponse<M>) -> Vec<(i32, &str)> {
    let error = |result: &proto::ItemResult<M>| result.error.is_some();
    let results = response.results.iter().filter(|result| error(result));
    results
        .map(|result| {
            let error = result.error.as_ref().unwrap();
            (error.status_code, &*error.error_code)
        })
        .collect()
}

#[tokio::test]
async fn batches_answer_every_item_in_order() {
    let kms = Kms::new();
    let names = ["alias/derived", "alias/direct", "alias/none", "", "alias/direct"];
    let numbers = [32, 16, 32, 32, -1];
    let requests = || names.into_iter().zip(numbers);
    let made: BatchResponse<GenerateDataKeyResponse> = kms
        .ask("BatchGenerateDataKey", &batch(requests().map(|(name, n)| generate(name, n))))
        .await
        .done();
    let advanced: BatchResponse<GenerateDataKeyResponse> = kms
        .ask(
            "BatchAdvanceGenerateDataKey",
            &batch(requests().map(|(name, n)| advance_generate(name, n))),
        )
        .await
        .done();
    let mut ids = std::collections::HashSet::new();
    for (response, advance) in [(&made, false), (&advanced, true)] {
        assert_eq!(response.results.len(), 5);
        assert_eq!(
            errors(response),
            [(404, "Forbidden.KeyNotFound"), (400, "InvalidParameter"), (400, "InvalidParameter")]
        );
        assert_uuid(&response.request_id);
        ids.insert(response.request_id.clone());
        for (index, result) in response.results.iter().enumerate() {
            assert_eq!(result.reference, index.to_string());
            assert_ne!(result.response.is_some(), result.error.is_some());
            if let Some(key) = &result.response {
                assert_eq!(key.plaintext.len(), numbers[index] as usize);
                assert_eq!(key.key_version_id.is_empty(), !advance);
                ids.insert(key.request_id.clone());
            } else {
                ids.insert(result.error.as_ref().unwrap().request_id.clone());
            }
        }
    }
    assert_eq!(ids.len(), 12, "request ids are not distinct");

    let key = |response: &BatchResponse<GenerateDataKeyResponse>, index: usize| {
        response.results[index].response.clone().unwrap()
    };
    let raw = |index| {
        let key = key(&made, index);
        let GenerateDataKeyResponse { ciphertext_blob, key_id, iv, .. } = key;
        DecryptRequest { ciphertext_blob, key_id, iv, ..Default::default() }
    };
    let own = |index| {
        let ciphertext_blob = key(&advanced, index).ciphertext_blob;
        DecryptRequest { ciphertext_blob, ..Default::default() }
    };
    let damaged = DecryptRequest { iv: vec![0; 12].into(), ..raw(0) };
    let response: BatchResponse<DecryptResponse> = kms
        .ask("BatchDecrypt", &batch([raw(1), damaged.clone(), Default::default(), raw(0)]))
        .await
        .done();
    assert_eq!(errors(&response), [(500, "InternalFailure"), (400, "InvalidParameter")]);
    let plaintext = |response: &BatchResponse<DecryptResponse>, index: usize| {
        response.results[index].response.clone().unwrap().plaintext
    };
    assert_eq!(plaintext(&response, 0), key(&made, 1).plaintext);
    assert_eq!(plaintext(&response, 3), key(&made, 0).plaintext);
    let response: BatchResponse<DecryptResponse> =
        kms.ask("BatchAdvanceDecrypt", &batch([own(1), raw(0), damaged, own(0)])).await.done();
    assert_eq!(errors(&response), [(500, "InternalFailure")]);
    assert_eq!(plaintext(&response, 0), key(&advanced, 1).plaintext);
    assert_eq!(plaintext(&response, 1), key(&made, 0).plaintext);
    assert_eq!(plaintext(&response, 3), key(&advanced, 0).plaintext);
}

#[tokio::test]
async fn an_empty_batch_has_an_empty_result() {
    let kms = Kms::new();
    for api in [
        "BatchGenerateDataKey",
        "BatchAdvanceGenerateDataKey",
        "BatchDecrypt",
        "BatchAdvanceDecrypt",
    ] {
        let response: BatchResponse<DecryptResponse> = kms.ask_bytes(api, "").await.done();
        assert!(response.results.is_empty());
        assert_uuid(&response.request_id);
    }
}
