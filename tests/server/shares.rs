//! What one client does to another: shares of the rate, of keys in progress and of bytes that are held.

use keymill::server::proto::{BatchResponse, GenerateDataKeyRequest, GenerateDataKeyResponse};

use crate::{
    client::{Answer, CLIENT, SIGNER, batch, create_client, generate},
    running::{Http1, Running},
};

/// Asks as the client `id`.
async fn ask_as(server: &Running, id: &str, api: &str, body: &impl prost::Message) -> Answer {
    let mut draft = server.draft(api, body);
    Http1::on(server.connect().await).await.send(draft.set(CLIENT, id).sign()).await
}

/// Two bytes of a body are an item: what it costs is what it makes others wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_in_debt_for_items_that_are_refused_keeps_no_other_out() {
    let server = Running::with(|config| config.keys_per_second = Some(100)).await;
    let [greedy, modest] = [(); 2].map(|()| create_client(&server.engine, &SIGNER, "all", &["*"]));
    let empty = batch((0..65_536).map(|_| GenerateDataKeyRequest::default()));
    let one = generate("alias/derived", 32);
    let answer = ask_as(&server, greedy.as_str(), "BatchGenerateDataKey", &empty).await;
    let answer: BatchResponse<GenerateDataKeyResponse> = answer.done();
    assert!(answer.results.iter().all(|result| result.error.is_some()));
    // A key for sixteen items: it has to wait for less than a minute, and not for eleven.
    let answer = ask_as(&server, greedy.as_str(), "GenerateDataKey", &one).await;
    answer.refused(429, "Rejected.Throttling", "QPS Limit Exceeded");
    let seconds = answer.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap();
    assert!((11..=41).contains(&seconds), "{seconds}");
    for _ in 0..20 {
        let answer = ask_as(&server, modest.as_str(), "GenerateDataKey", &one).await;
        answer.done::<GenerateDataKeyResponse>();
    }
    assert_eq!(server.metric("keymill_throttled_total{limit=\"keys_per_second\"}").await, 1.0);
    server.end().await;
}
