//! What happens on connections: breaches of HTTP, HTTP/2, slow and vanishing clients, load, and the end of a server.

use std::time::Duration;

use keymill::{
    Scheme,
    server::{
        ServerConfig,
        proto::{BatchResponse, GenerateDataKeyResponse, GenerateRandomRequest},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::{
    client::{Draft, OTHER_SIGNER, batch, create_client, generate},
    running::{Http1, Http2, PATIENCE, Running, exchange, parse_answer, read_answer},
};

const RANDOM: GenerateRandomRequest = GenerateRandomRequest { length: 32 };

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_many_requests_of_either_version() {
    let server = Running::start().await;
    let mut one = Http1::on(server.connect().await).await;
    let mut two = Http2::on(server.connect().await).await;
    for _ in 0..20 {
        let draft = server.draft("GenerateDataKey", &generate("alias/direct", 32));
        one.send(&draft).await.done::<GenerateDataKeyResponse>();
        two.send(&draft).await.done::<GenerateDataKeyResponse>();
    }
    // At once, each with its own answer.
    let draft = server.draft("BatchGenerateDataKey", &batch([generate("alias/derived", 16)]));
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let (mut two, draft) = (two.clone(), draft.clone());
            tokio::spawn(async move { two.send(&draft).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().done::<BatchResponse<GenerateDataKeyResponse>>();
    }
    drop((one, two));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_methods_and_paths_are_answered_in_protobuf() {
    let server = Running::start().await;
    let mut draft = server.draft("GenerateRandom", &RANDOM);
    let mut stream = server.connect().await;
    for (method, path, status) in [("GET", "/", 405), ("DELETE", "/", 405), ("POST", "/a", 404)] {
        draft.method = method.parse().unwrap();
        draft.uri = path.into();
        stream.write_all(&draft.bytes()).await.unwrap();
        let answer = read_answer(&mut stream).await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.headers.contains_key("allow"), status == 405);
    }
    // Nothing was broken by that.
    (draft.method, draft.uri) = ("POST".parse().unwrap(), "/".into());
    stream.write_all(&draft.bytes()).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 200);
    drop(stream);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_1_0_is_answered_and_its_connection_ended() {
    let server = Running::start().await;
    let bytes = server.draft("GenerateRandom", &RANDOM).bytes();
    let text = String::from_utf8_lossy(&bytes[..24]).replace("HTTP/1.1", "HTTP/1.0");
    let bytes = [text.as_bytes(), &bytes[24..]].concat();
    let mut stream = server.connect().await;
    stream.write_all(&bytes).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(parse_answer(&answer).unwrap().status, 200);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http_ends_its_own_connection_alone() {
    let server = Running::start().await;
    let mut good = Http1::on(server.connect().await).await;
    let client_hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 512]].concat();
    let header = |len| format!("POST / HTTP/1.1\r\nx-kms-a: {}\r\n\r\n", "a".repeat(len));
    let headers = |count| format!("POST / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(count));
    let body = |length: &str| {
        let draft = server.draft("GenerateRandom", &RANDOM);
        let text = String::from_utf8(draft.bytes()).unwrap();
        text.replace("content-length: 2", length)
    };
    let twice = body("content-length: 2\r\ncontent-length: 3");
    let negative = body("content-length: -2");
    let both = body("content-length: 2\r\ntransfer-encoding: gzip");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let http2_garbage = [&preface[..], &[0xff; 300]].concat();
    let garbage: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"\0".to_vec(),
        b"GET\r\n\r\n".to_vec(),
        vec![0xff; 70_000],
        vec![b'\r'; 1000],
        b"POST / HTTP/9.9\r\n\r\n".to_vec(),
        b"POST / HTTP/1.1\r\nno colon\r\n\r\n".to_vec(),
        b"POST / HTTP/1.1\r\nbad name : a\r\n\r\n".to_vec(),
        header(1 << 20).into(),
        headers(5000).into(),
        twice.into(),
        negative.into(),
        both.into(),
        client_hello,
        preface.to_vec(),
        http2_garbage,
        preface[..10].to_vec(),
    ];
    for (index, bytes) in garbage.into_iter().enumerate() {
        let answer = exchange(&mut server.connect().await, &bytes).await;
        let text = String::from_utf8_lossy(&answer);
        assert!(!text.contains(" 200 "), "{index}: {text}");
        let draft = server.draft("GenerateRandom", &RANDOM);
        assert_eq!(good.send(&draft).await.status, 200, "{index}");
    }
    drop(good);
    server.wait_for("keymill_connections", 0.0).await;
    assert_eq!(server.metric("keymill_panics_total").await, 0.0);
    assert_ne!(server.metric("keymill_connections_failed_total").await, 0.0);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_of_http_2_has_at_most_32_kib() {
    let server = Running::start().await;
    let mut client = Http2::on(server.connect().await).await;
    let draft = |len| {
        let mut draft = server.draft("GenerateRandom", &RANDOM);
        draft.set("x-kms-extra", "a".repeat(len)).sign();
        draft
    };
    assert_eq!(client.send(&draft(20 << 10)).await.status, 200);
    // Refused by status alone, or with its stream or its connection.
    if let Ok(answer) = client.try_send(&draft(40 << 10)).await {
        assert_eq!(answer.status().as_u16(), 431);
    }
    let mut another = Http2::on(server.connect().await).await;
    assert_eq!(another.send(&draft(1)).await.status, 200);
    drop((client, another));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_in_chunks_is_one_body_with_the_same_limit() {
    let server = Running::start().await;
    let mut draft = server.draft("GenerateRandom", &RANDOM);
    let body = std::mem::take(&mut draft.body);
    draft.remove("content-length").set("transfer-encoding", "chunked");
    let mut stream = server.connect().await;
    stream.write_all(&draft.bytes()).await.unwrap();
    for byte in &body {
        stream.write_all(&[b'1', b'\r', b'\n', *byte, b'\r', b'\n']).await.unwrap();
        sleep(Duration::from_millis(10)).await;
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 200);
    // A gigabyte, of which the server takes three megabytes and throws away some more.
    stream.write_all(&draft.bytes()).await.unwrap();
    let chunk = [b"100000\r\n".to_vec(), vec![0; 1 << 20], b"\r\n".to_vec()].concat();
    let (mut read, mut write) = stream.split();
    let send = async {
        for sent in 0..1000 {
            if write.write_all(&chunk).await.is_err() {
                return sent;
            }
        }
        1000
    };
    let receive = async {
        let mut answer = Vec::new();
        let _ = read.read_to_end(&mut answer).await;
        answer
    };
    let (sent, answer) = timeout(PATIENCE, async { tokio::join!(send, receive) }).await.unwrap();
    assert!(sent < 1000, "everything was taken");
    // The answer may be lost to a client that goes on sending for ever.
    if let Some(answer) = parse_answer(&answer) {
        answer.refused_with(413, "RequestEntityTooLarge");
    }
    server.end().await;
}

/// A body that is refused by its head is read all the same, or else the answer is lost with the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_refusal_reaches_whoever_still_sends_and_the_connection_goes_on() {
    let server = Running::start().await;
    let mut stream = server.connect().await;
    let mut large = Draft::new("nobody", "Encrypt", vec![0; (3 << 20) + 1]);
    let mut forged = server.draft("Encrypt", &generate("alias/derived", 32));
    forged.set("authorization", "Bearer AAAA");
    for _ in 0..3 {
        stream.write_all(&large.sign().bytes()).await.unwrap();
        read_answer(&mut stream).await.refused_with(413, "RequestEntityTooLarge");
        stream.write_all(&forged.bytes()).await.unwrap();
        read_answer(&mut stream).await.refused_with(401, "SignatureNotMatch");
    }
    stream
        .write_all(&server.draft("GenerateDataKey", &generate("alias/derived", 32)).bytes())
        .await
        .unwrap();
    read_answer(&mut stream).await.done::<GenerateDataKeyResponse>();
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_body_delays_nobody_else() {
    let server = Running::start().await;
    let bytes = server.draft("GenerateDataKey", &generate("alias/derived", 32)).bytes();
    let (head, rest) = bytes.split_at(bytes.len() - 5);
    let mut slow: Vec<TcpStream> = Vec::new();
    for _ in 0..20 {
        slow.push(server.connect().await);
        slow.last_mut().unwrap().write_all(head).await.unwrap();
    }
    let mut quick = Http1::on(server.connect().await).await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    for byte in rest {
        for stream in &mut slow {
            stream.write_all(&[*byte]).await.unwrap();
        }
        assert_eq!(quick.send(&draft).await.status, 200);
        sleep(Duration::from_millis(20)).await;
    }
    for stream in &mut slow {
        assert_eq!(read_answer(stream).await.status, 200);
    }
    drop((slow, quick));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_holds_up_nobody_and_is_forgotten() {
    let server = Running::start().await;
    let asked = batch((0..65_536).map(|_| generate("alias/derived", 64)));
    let draft = server.draft("BatchGenerateDataKey", &asked);
    let mut stalled = Vec::new();
    for _ in 0..3 {
        let mut stream = server.connect().await;
        stream.write_all(&draft.bytes()).await.unwrap();
        let mut begun = [0; 1000];
        timeout(PATIENCE, stream.read_exact(&mut begun)).await.unwrap().unwrap();
        assert!(begun.starts_with(b"HTTP/1.1 200 OK\r\n"));
        stalled.push(stream);
    }
    let mut good = Http1::on(server.connect().await).await;
    for _ in 0..20 {
        let draft = server.draft("GenerateDataKey", &generate("alias/derived", 64));
        assert_eq!(good.send(&draft).await.status, 200);
    }
    assert_eq!(server.metric("keymill_connections").await, 4.0);
    drop(stalled);
    server.wait_for("keymill_connections", 1.0).await;
    drop(good);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_does_nothing_is_ended() {
    let short = |config: &mut ServerConfig| {
        config.idle_time = Duration::from_millis(500);
        config.head_time = Duration::from_millis(1500);
    };
    let server = Running::with(short).await;
    let mut used = server.connect().await;
    used.write_all(&server.draft("GenerateRandom", &RANDOM).bytes()).await.unwrap();
    assert_eq!(read_answer(&mut used).await.status, 200);
    let mut rest = Vec::new();
    timeout(PATIENCE, used.read_to_end(&mut rest)).await.unwrap().unwrap();
    // A head that is begun and not ended counts as nothing.
    let mut begun = server.connect().await;
    begun.write_all(b"POST / HTTP/1.1\r\n").await.unwrap();
    timeout(PATIENCE, begun.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(!String::from_utf8_lossy(&rest).contains(" 200 "));
    server.end().await;
}

/// Load balancers open connections to see whether anybody listens, and clients keep them until they are told to go.
#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_end_of_a_connection_is_no_failure() {
    let server = Running::with(|config| config.idle_time = Duration::from_millis(300)).await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    let mut one = Http1::on(server.connect().await).await;
    let mut two = Http2::on(server.connect().await).await;
    assert_eq!((one.send(&draft).await.status, two.send(&draft).await.status), (200, 200));
    // Ended by the server, both.
    server.wait_for("keymill_connections", 0.0).await;
    for _ in 0..3 {
        drop(server.connect().await);
        // In the midst of nothing, without a word: what is left unread makes it a reset.
        let mut stream = server.connect().await;
        stream.write_all(&draft.bytes()).await.unwrap();
        timeout(PATIENCE, stream.readable()).await.unwrap().unwrap();
        drop(stream);
        let mut two = Http2::on(server.connect().await).await;
        assert_eq!(two.send(&draft).await.status, 200);
    }
    server.wait_for("keymill_connections", 0.0).await;
    assert_eq!(server.metric("keymill_connections_failed_total").await, 0.0);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_rate_is_429_with_a_time_to_wait() {
    let server = Running::with(|config| config.keys_per_second = Some(10)).await;
    let many = batch((0..500).map(|_| generate("alias/derived", 32)));
    assert_eq!(server.ask("BatchGenerateDataKey", &many).await.status, 200);
    for _ in 0..3 {
        let answer = server.ask("GenerateDataKey", &generate("alias/derived", 32)).await;
        answer.refused(429, "Rejected.Throttling", "QPS Limit Exceeded");
        // 500 keys at 10 a second, of which the first second's were saved.
        let seconds = answer.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap();
        assert!((20..=49).contains(&seconds), "{seconds}");
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_keys_in_progress_is_429_and_places_come_back() {
    let server = Running::with(|config| config.keys_in_progress_max = 0).await;
    let answer = server.ask("GenerateDataKey", &generate("alias/derived", 32)).await;
    answer.refused(429, "Rejected.Throttling", "QPS Limit Exceeded");
    server.end().await;

    let server = Running::with(|config| config.keys_in_progress_max = 100).await;
    let many = server
        .draft("BatchGenerateDataKey", &batch((0..5000).map(|_| generate("alias/derived", 32))));
    let mut client = Http2::on(server.connect().await).await;
    let tasks: Vec<_> = (0..10)
        .map(|_| {
            let (mut client, many) = (client.clone(), many.clone());
            tokio::spawn(async move { client.send(&many).await.status })
        })
        .collect();
    let mut statuses = Vec::new();
    for task in tasks {
        statuses.push(task.await.unwrap());
    }
    assert!(statuses.contains(&200), "{statuses:?}");
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert_eq!(server.metric("keymill_keys_in_progress").await, 0.0);
    let one = server.draft("GenerateDataKey", &generate("alias/derived", 32));
    assert_eq!(client.send(&one).await.status, 200);
    drop(client);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ends_finishes_what_is_in_progress_and_refuses_what_is_new() {
    let server = Running::start().await;
    let bytes = server.draft("GenerateDataKey", &generate("alias/derived", 32)).bytes();
    let (head, rest) = bytes.split_at(bytes.len() - 1);
    // Authenticated, and its body not there yet.
    let mut in_progress = server.connect().await;
    in_progress.write_all(head).await.unwrap();
    // A head that has begun.
    let mut begun = server.connect().await;
    begun.write_all(&bytes[..20]).await.unwrap();
    // Idle, after a request.
    let mut idle = Http1::on(server.connect().await).await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    assert_eq!(idle.send(&draft).await.status, 200);
    let mut idle_http2 = Http2::on(server.connect().await).await;
    assert_eq!(idle_http2.send(&draft).await.status, 200);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(server.watch("/readyz").await, (200, "ready\n".into()));

    server.handle.drain();
    sleep(Duration::from_millis(200)).await;
    assert!(TcpStream::connect(server.address).await.is_err(), "the port is still open");
    assert_eq!(server.watch("/readyz").await, (503, "not ready: draining\n".into()));
    assert_eq!(server.watch("/healthz").await.0, 200);
    assert!(idle.try_send(&draft).await.is_err());
    assert!(idle_http2.try_send(&draft).await.is_err());
    begun.write_all(&bytes[20..]).await.unwrap();
    let refused = read_answer(&mut begun).await;
    refused.refused(503, "ServiceUnavailableTemporary", "Service Unavailable Temporary.");
    assert!(!server.ended.is_finished());
    in_progress.write_all(rest).await.unwrap();
    read_answer(&mut in_progress).await.done::<GenerateDataKeyResponse>();
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ends_does_not_wait_longer_than_it_is_told() {
    let server = Running::with(|config| config.drain_time = Duration::from_millis(300)).await;
    let bytes = server.draft("GenerateRandom", &RANDOM).bytes();
    let mut never = server.connect().await;
    never.write_all(&bytes[..bytes.len() - 1]).await.unwrap();
    sleep(Duration::from_millis(200)).await;
    server.handle.drain();
    assert!(!timeout(PATIENCE, server.ended).await.unwrap().unwrap());
    let mut rest = Vec::new();
    timeout(PATIENCE, never.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(rest.is_empty());
}

/// Another engine on the store, such as the command line's, changes what the server knows.
#[tokio::test(flavor = "multi_thread")]
async fn changes_by_another_engine_are_seen_within_a_second() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("keys.db");
    let root = keymill::RootKey::from_bytes(&[5; 32]).unwrap();
    let other = keymill::Engine::create(&path, &root).unwrap();
    let id = crate::client::create_key(&other, "alias/derived", Scheme::Derived);
    let client = create_client(&other, &crate::client::SIGNER, "all", &["*"]);
    let engine = keymill::Engine::open(&path, &root).unwrap();
    let server = Running::on(engine, client, |_| {}).await;
    let mut client = Http1::on(server.connect().await).await;
    let known = server.draft("GenerateDataKey", &generate("alias/derived", 32));
    assert_eq!(client.send(&known).await.status, 200);

    // A name that nobody had is looked for in the store at once.
    let draft = server.draft("GenerateDataKey", &generate("alias/new", 32));
    assert_eq!(client.send(&draft).await.status, 404);
    crate::client::create_key(&other, "alias/new", Scheme::Direct);
    assert_eq!(client.send(&draft).await.status, 200);

    let newcomer = create_client(&other, &OTHER_SIGNER, "random", &["*"]);
    other.disable_key(&id).unwrap();
    sleep(Duration::from_millis(1200)).await;
    client.send(&known).await.refused_with(409, "Rejected.Disabled");
    let mut draft = server.draft("GenerateRandom", &RANDOM);
    draft.set(crate::client::CLIENT, newcomer.as_str()).sign_by(&OTHER_SIGNER);
    assert_eq!(client.send(&draft).await.status, 200);
    other.disable_client(&newcomer).unwrap();
    sleep(Duration::from_millis(1200)).await;
    client.send(&draft).await.refused_with(404, "Unauthorized");
    drop(client);
    server.end().await;
}
