//! Answers that are not read: a connection through which nothing goes ends soon, and what it held is let go; one through
//! which anything goes steadily does not.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use keymill::server::ServerConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{sleep, timeout},
};

use crate::{
    client::{Draft, batch, generate},
    running::{PATIENCE, Running, parse_answer},
    tls::{Files, connect},
};

fn short(config: &mut ServerConfig) {
    config.stall_time = Duration::from_secs(1);
}

/// Some 15 MB.
fn large(server: &Running) -> Draft {
    server.draft("BatchGenerateDataKey", &batch((0..65_536).map(|_| generate("alias/derived", 64))))
}

fn over_http2(draft: &Draft) -> Request<Full<Bytes>> {
    let mut request = draft.request();
    *request.uri_mut() = "http://127.0.0.1/".parse().unwrap();
    request.headers_mut().remove("host");
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_nobody_reads_ends_its_connection() {
    let files = Files::new();
    let tls = files.tls(false);
    let plain = Running::with(short).await;
    let secret = Running::with(|config| {
        short(config);
        config.tls = Some(tls);
    })
    .await;
    let draft = large(&plain);
    let mut stalled = plain.connect().await;
    stalled.write_all(&draft.bytes()).await.unwrap();
    let (mut sender, connection) = conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(100_000)
        .handshake(TokioIo::new(plain.connect().await))
        .await
        .unwrap();
    tokio::spawn(connection);
    // Its window is closed for good, and the connection answers every PING.
    let begun = timeout(PATIENCE, sender.send_request(over_http2(&draft))).await.unwrap().unwrap();
    assert_eq!(begun.status(), 200);
    plain.wait_for("keymill_connections_failed_total", 2.0).await;
    plain.wait_for("keymill_connections", 0.0).await;
    assert!(begun.into_body().collect().await.is_err());

    let mut over_tls = connect(&files.client(&["http/1.1"]), secret.address).await.unwrap();
    over_tls.write_all(&large(&secret).bytes()).await.unwrap();
    secret.wait_for("keymill_connections_failed_total", 1.0).await;
    secret.wait_for("keymill_connections", 0.0).await;
    drop((stalled, over_tls));
    plain.end().await;
    secret.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_read_slowly_and_steadily_arrives() {
    let server = Running::with(short).await;
    let draft = large(&server);
    let mut stream = server.connect().await;
    stream.write_all(&draft.bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut chunk = vec![0; 512 << 10];
    let read = async {
        loop {
            let len = stream.read(&mut chunk).await.unwrap();
            assert_ne!(len, 0, "it was ended after {} bytes", answer.len());
            answer.extend_from_slice(&chunk[..len]);
            let len = answer.len();
            if len > 10_000_000
                && let Some(answer) = parse_answer(&answer)
            {
                return answer;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    assert_eq!(timeout(PATIENCE * 2, read).await.unwrap().status, 200);
    // Over HTTP/2 with a narrow window.
    let (mut sender, connection) = conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(256 << 10)
        .handshake(TokioIo::new(server.connect().await))
        .await
        .unwrap();
    tokio::spawn(connection);
    let response = timeout(PATIENCE, sender.send_request(over_http2(&draft))).await.unwrap();
    let mut body = response.unwrap().into_body();
    let mut len = 0;
    while let Some(frame) = timeout(PATIENCE, body.frame()).await.unwrap() {
        len += frame.expect("it was ended").into_data().unwrap().len();
        sleep(Duration::from_millis(3)).await;
    }
    assert!(len > 10_000_000);
    drop((stream, sender));
    assert_eq!(server.metric("keymill_connections_failed_total").await, 0.0);
    server.end().await;
}
