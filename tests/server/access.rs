//! Who may do what: operations, keys by whatever leads to them, clients that come and go.

use keymill::{
    ClientId, KeyPattern, Permissions, Scheme, UpdateClient,
    server::proto::{
        AdvanceGenerateDataKeyRequest, BatchResponse, DecryptRequest, DecryptResponse,
        EncryptRequest, GenerateDataKeyRequest, GenerateDataKeyResponse, GenerateRandomRequest,
    },
};
use prost::Message;

use crate::client::{
    Answer, Draft, Kms, OTHER_SIGNER, SIGNER, VERSION, advance_generate, batch, create_client,
    create_key, generate,
};

fn forbidden(name: &str) -> String {
    format!("This operation for \"{name}\" is forbidden by permission system.")
}

#[track_caller]
fn refused_for(answer: &Answer, name: &str) {
    answer.refused(403, "Forbidden.NoPermission", &forbidden(name));
}

/// Every operation with a body that is good for it.
async fn every_operation(kms: &Kms) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let name = "alias/derived";
    let raw: GenerateDataKeyResponse = kms.ask("GenerateDataKey", &generate(name, 32)).await.done();
    let asked = DecryptRequest {
        ciphertext_blob: raw.ciphertext_blob,
        key_id: name.into(),
        iv: raw.iv,
        ..Default::default()
    };
    let text = EncryptRequest {
        key_id: name.into(),
        plaintext: b"text".to_vec().into(),
        ..Default::default()
    };
    let generating = generate(name, 32);
    let advance = advance_generate(name, 32);
    vec![
        ("generate", "GenerateDataKey", generating.encode_to_vec()),
        ("generate", "AdvanceGenerateDataKey", advance.encode_to_vec()),
        ("generate", "BatchGenerateDataKey", batch([generating]).encode_to_vec()),
        ("generate", "BatchAdvanceGenerateDataKey", batch([advance]).encode_to_vec()),
        ("decrypt", "Decrypt", asked.encode_to_vec()),
        ("decrypt", "AdvanceDecrypt", asked.encode_to_vec()),
        ("decrypt", "BatchDecrypt", batch([asked.clone()]).encode_to_vec()),
        ("decrypt", "BatchAdvanceDecrypt", batch([asked]).encode_to_vec()),
        ("encrypt", "Encrypt", text.encode_to_vec()),
        ("encrypt", "AdvanceEncrypt", text.encode_to_vec()),
        ("random", "GenerateRandom", GenerateRandomRequest { length: 8 }.encode_to_vec()),
    ]
}

async fn ask_as(kms: &Kms, client: &ClientId, api: &str, body: Vec<u8>) -> Answer {
    kms.send(Draft::new(client.as_str(), api, body).sign()).await
}

#[tokio::test]
async fn a_client_does_what_it_is_allowed_to_and_nothing_else() {
    let kms = Kms::new();
    let operations = every_operation(&kms).await;
    for allowed in ["generate", "decrypt", "encrypt", "random"] {
        let client = create_client(&kms.engine, &SIGNER, allowed, &["*"]);
        for (needed, api, body) in &operations {
            let answer = ask_as(&kms, &client, api, body.clone()).await;
            match *needed == allowed {
                true => assert_eq!(answer.status, 200, "{api}"),
                false => refused_for(&answer, api),
            }
        }
    }
}

#[tokio::test]
async fn clients_come_change_and_go() {
    let kms = Kms::new();
    let unknown =
        |client: &ClientId| format!("The AccessKey ID \"{client}\" does not exist in our records.");
    let asked = generate("alias/derived", 32);
    let client = create_client(&kms.engine, &OTHER_SIGNER, "generate", &["*"]);
    let mut draft = Draft::new(client.as_str(), "GenerateDataKey", asked.encode_to_vec());
    draft.sign_by(&OTHER_SIGNER);
    assert_eq!(kms.send(&draft).await.status, 200);
    kms.engine.disable_client(&client).unwrap();
    kms.send(&draft).await.refused(404, "Unauthorized", &unknown(&client));
    kms.engine.enable_client(&client).unwrap();
    assert_eq!(kms.send(&draft).await.status, 200);
    let update = UpdateClient {
        key_patterns: Some(vec![KeyPattern::parse("alias/direct").unwrap()]),
        ..Default::default()
    };
    kms.engine.update_client(&client, &update).unwrap();
    refused_for(&kms.send(&draft).await, "alias/derived");
    let update = UpdateClient {
        permissions: Some(Permissions::parse("random").unwrap()),
        ..Default::default()
    };
    kms.engine.update_client(&client, &update).unwrap();
    refused_for(&kms.send(&draft).await, "GenerateDataKey");
    kms.engine.delete_client(&client).unwrap();
    kms.send(&draft).await.refused(404, "Unauthorized", &unknown(&client));
    // The others were never in doubt.
    assert_eq!(kms.ask("GenerateDataKey", &asked).await.status, 200);
}

#[tokio::test]
async fn patterns_are_of_the_key_whatever_the_request_calls_it() {
    let kms = Kms::new();
    let id = create_key(&kms.engine, "alias/app/one", Scheme::Derived);
    kms.engine.create_alias("alias/other", &id).unwrap();
    let names = ["alias/app/one", "alias/other", &id];
    for pattern in ["*", "alias/app/*", "alias/oth?r", &id, "key-*"] {
        let client = create_client(&kms.engine, &SIGNER, "all", &["alias/none", pattern]);
        for name in names {
            let answer = kms.ask_as(&client, "GenerateDataKey", &generate(name, 32)).await;
            assert_eq!(answer.status, 200, "{pattern} {name}");
        }
    }
    let client =
        create_client(&kms.engine, &SIGNER, "all", &["alias/app", "alias/app/*/*", "key-"]);
    for name in names {
        refused_for(&kms.ask_as(&client, "GenerateDataKey", &generate(name, 32)).await, name);
    }
    // A key of no such name is not found, whoever asks.
    kms.ask_as(&client, "GenerateDataKey", &generate("alias/none", 32))
        .await
        .refused_with(404, "Forbidden.KeyNotFound");
}

#[tokio::test]
async fn the_key_of_a_blob_or_of_the_header_has_to_be_permitted() {
    let kms = Kms::new();
    let (mine, theirs) = ("alias/derived", "alias/direct");
    let client = create_client(&kms.engine, &SIGNER, "all", &[mine]);
    let id = kms.engine.describe_key(theirs).unwrap().key_id.to_string();
    let made = kms.ask("AdvanceGenerateDataKey", &advance_generate(theirs, 32)).await;
    let blob = made.done::<GenerateDataKeyResponse>().ciphertext_blob;
    let asked = |key_id: &str| DecryptRequest {
        ciphertext_blob: blob.clone(),
        key_id: key_id.into(),
        ..Default::default()
    };
    refused_for(&kms.ask_as(&client, "AdvanceDecrypt", &asked("")).await, &id);
    refused_for(&kms.ask_as(&client, "AdvanceDecrypt", &asked(mine)).await, mine);
    refused_for(&kms.ask_as(&client, "AdvanceDecrypt", &asked(theirs)).await, theirs);

    let made = kms.ask("GenerateDataKey", &generate(theirs, 32)).await;
    let version = made.headers[VERSION].to_str().unwrap().to_owned();
    let made: GenerateDataKeyResponse = made.done();
    let asked =
        DecryptRequest { ciphertext_blob: made.ciphertext_blob, iv: made.iv, ..Default::default() };
    let by_header = |client: &ClientId, asked: &DecryptRequest| {
        let mut draft = Draft::new(client.as_str(), "Decrypt", asked.encode_to_vec());
        draft.set(VERSION, &version).sign();
        draft
    };
    refused_for(&kms.send(&by_header(&client, &asked)).await, &id);
    // Of a key that is named the header says nothing, and the blob is none of this key's.
    let named = DecryptRequest { key_id: mine.into(), ..asked.clone() };
    kms.send(&by_header(&client, &named)).await.refused_with(500, "InternalFailure");
    assert_eq!(kms.send(&by_header(&kms.client, &asked)).await.status, 200);
}

#[tokio::test]
async fn permission_is_asked_before_the_state_of_a_key() {
    let kms = Kms::new();
    let client = create_client(&kms.engine, &SIGNER, "all", &["alias/direct"]);
    let operations = every_operation(&kms).await;
    let of_key = operations.iter().filter(|(_, api, _)| *api != "GenerateRandom");
    let single = of_key.filter(|(_, api, _)| !api.starts_with("Batch"));
    kms.engine.disable_key("alias/derived").unwrap();
    for (_, api, body) in single.clone() {
        refused_for(&ask_as(&kms, &client, api, body.clone()).await, "alias/derived");
        let answer = ask_as(&kms, &kms.client, api, body.clone()).await;
        answer.refused_with(409, "Rejected.Disabled");
        let sentence = "The request was rejected because the key state is Disabled.";
        assert!(answer.error().error_message.starts_with(sentence), "{answer:?}");
    }
    kms.engine.schedule_key_deletion("alias/derived", 30).unwrap();
    for (_, api, body) in single {
        refused_for(&ask_as(&kms, &client, api, body.clone()).await, "alias/derived");
        let answer = ask_as(&kms, &kms.client, api, body.clone()).await;
        answer.refused_with(409, "Rejected.PendingDeletion");
    }
}

#[tokio::test]
async fn every_item_of_a_batch_is_authorised_by_itself() {
    let kms = Kms::new();
    let client = create_client(&kms.engine, &SIGNER, "all", &["alias/derived"]);
    let outcomes = |codes: Vec<Option<String>>| {
        let mine = codes.iter().step_by(2).all(Option::is_none);
        let code = Some("Forbidden.NoPermission");
        let theirs = codes.iter().skip(1).step_by(2).all(|other| other.as_deref() == code);
        assert!(mine && theirs, "{codes:?}");
    };
    let names = ["alias/derived", "alias/direct"].into_iter().cycle().take(100);
    let asked = batch(names.clone().map(|name| generate(name, 32)));
    let made: BatchResponse<GenerateDataKeyResponse> =
        kms.ask_as(&client, "BatchGenerateDataKey", &asked).await.done();
    outcomes(made.results.into_iter().map(|r| r.error.map(|e| e.error_code)).collect());
    let asked = batch(names.map(|name| advance_generate(name, 32)));
    let made: BatchResponse<GenerateDataKeyResponse> =
        kms.ask_as(&client, "BatchAdvanceGenerateDataKey", &asked).await.done();
    outcomes(made.results.into_iter().map(|r| r.error.map(|e| e.error_code)).collect());
    assert_eq!(kms.wraps_granted(), 0);

    let all: BatchResponse<GenerateDataKeyResponse> =
        kms.ask("BatchAdvanceGenerateDataKey", &asked).await.done();
    let blobs = all.results.into_iter().map(|result| DecryptRequest {
        ciphertext_blob: result.response.unwrap().ciphertext_blob,
        ..Default::default()
    });
    let opened: BatchResponse<DecryptResponse> =
        kms.ask_as(&client, "BatchAdvanceDecrypt", &batch(blobs)).await.done();
    outcomes(opened.results.into_iter().map(|r| r.error.map(|e| e.error_code)).collect());
}

/// The two messages have the same fields under other numbers: what is meant for one is nothing to the other.
#[tokio::test]
async fn the_api_name_and_not_the_body_says_what_is_asked() {
    let kms = Kms::new();
    let body = AdvanceGenerateDataKeyRequest {
        key_id: "alias/derived".into(),
        number_of_bytes: 32,
        ..Default::default()
    }
    .encode_to_vec();
    assert!(GenerateDataKeyRequest::decode(&*body).is_err());
    kms.ask_bytes("GenerateDataKey", body.clone()).await.refused_with(400, "InvalidParameter");
    assert_eq!(kms.ask_bytes("AdvanceGenerateDataKey", body).await.status, 200);
}
