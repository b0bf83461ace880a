//! Crowds of connections that do nothing, in whichever stage: they keep nobody waiting, and they do not last.

use std::time::Duration;

use keymill::server::proto::{GenerateDataKeyResponse, GenerateRandomRequest};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{
    client::{Draft, generate},
    running::{Http1, Http2, PATIENCE, Running, read_answer},
    tls::{Files, connect},
};

const RANDOM: GenerateRandomRequest = GenerateRandomRequest { length: 32 };
/// What ends connections by itself, so that room is made by nothing else.
const NEVER: Duration = Duration::from_secs(600);
/// Far less than any clock of the server that is not set here.
const SOON: Duration = Duration::from_secs(10);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\x00keymill!";

/// The beginnings of connections that come to nothing.
fn beginnings(server: &Running) -> Vec<Vec<u8>> {
    let good = server.draft("GenerateDataKey", &generate("alias/derived", 32)).bytes();
    let mut nobody = Draft::new("nobody", "Encrypt", vec![0; 1000]);
    let refused = nobody.sign().bytes();
    vec![
        Vec::new(),
        b"P".to_vec(),
        good[..100].to_vec(),
        // A good head, and half a body.
        good[..good.len() - 1].to_vec(),
        refused[..refused.len() - 1].to_vec(),
        PREFACE[..20].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, PING].concat(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_request_make_room_in_whichever_stage_they_are() {
    let server = Running::with(|config| {
        config.connections_max = 16;
        (config.head_time, config.idle_time) = (NEVER, NEVER);
    })
    .await;
    let draft = server.draft("GenerateDataKey", &generate("alias/derived", 32));
    // Proven before the crowd came, and at work when it is there.
    let mut early = Http1::on(server.connect().await).await;
    early.send(&draft).await.done::<GenerateDataKeyResponse>();
    for beginning in beginnings(&server) {
        let mut crowd = Vec::new();
        for _ in 0..20 {
            let mut stream = server.connect().await;
            stream.write_all(&beginning).await.unwrap();
            crowd.push(stream);
        }
        for _ in 0..3 {
            let answer = timeout(SOON, server.ask("GenerateRandom", &RANDOM)).await;
            assert_eq!(answer.expect("it waited").status, 200, "{beginning:?}");
        }
        assert_eq!(early.send(&draft).await.status, 200, "{beginning:?}");
        drop(crowd);
    }
    assert!(server.metric("keymill_connections_evicted_total").await >= 20.0);
    drop(early);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_connections_without_a_request_make_room_in_whichever_stage_they_are() {
    let files = Files::new();
    let tls = files.tls(false);
    let server = Running::with(|config| {
        config.connections_max = 8;
        (config.head_time, config.idle_time) = (NEVER, NEVER);
        config.tls = Some(tls);
    })
    .await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    let client = files.client(&["http/1.1"]);
    let honest = async || {
        let asked = async {
            let stream = connect(&client, server.address).await.unwrap();
            Http1::on(stream).await.send(&draft).await.status
        };
        assert_eq!(timeout(SOON, asked).await.expect("it waited"), 200);
    };
    let mut silent = Vec::new();
    for begun in [&b""[..], &[0x16, 3, 1]] {
        for _ in 0..10 {
            let mut stream = server.connect().await;
            stream.write_all(begun).await.unwrap();
            silent.push(stream);
        }
        honest().await;
    }
    let mut shaken = Vec::new();
    for _ in 0..10 {
        shaken.push(connect(&client, server.address).await.unwrap());
    }
    honest().await;
    drop((silent, shaken));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_come_in_time_ends_its_connection() {
    let short = Duration::from_millis(500);
    let server = Running::with(|config| config.head_time = short).await;
    let mut crowd = Vec::new();
    for beginning in [&b""[..], b"POST / HT", &PREFACE[..20], PREFACE] {
        let mut stream = server.connect().await;
        stream.write_all(beginning).await.unwrap();
        crowd.push(stream);
    }
    // Trickles do not help: a byte of a head, a PING.
    for (begin, more) in [(&b"POST / HTTP/1.1\r\na: "[..], &b"b"[..]), (PREFACE, PING)] {
        let mut stream = server.connect().await;
        stream.write_all(begin).await.unwrap();
        let ended = async {
            let mut memory = [0; 1000];
            loop {
                let wrote = stream.write_all(more).await;
                let read = timeout(Duration::from_millis(50), stream.read(&mut memory)).await;
                if wrote.is_err() || matches!(read, Ok(Ok(0) | Err(_))) {
                    return;
                }
            }
        };
        timeout(PATIENCE, ended).await.expect("it goes on");
    }
    for mut stream in crowd {
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it lasts");
    }
    // Neither does it help to have asked before.
    let mut stream = server.connect().await;
    let bytes = server.draft("GenerateRandom", &RANDOM).bytes();
    stream.write_all(&bytes).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 200);
    stream.write_all(&bytes[..30]).await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it lasts");
    server.end().await;

    let files = Files::new();
    let tls = files.tls(false);
    let server = Running::with(|config| {
        config.head_time = short;
        config.tls = Some(tls);
    })
    .await;
    let mut silent = server.connect().await;
    let mut shaken = connect(&files.client(&["h2"]), server.address).await.unwrap();
    let _ = timeout(PATIENCE, silent.read_to_end(&mut rest)).await.expect("it lasts");
    let _ = timeout(PATIENCE, shaken.read_to_end(&mut rest)).await.expect("it lasts");
    server.end().await;
}

/// Whoever has proven itself is not sent away from its work; but what it keeps for later, others may need now.
#[tokio::test(flavor = "multi_thread")]
async fn proven_connections_make_room_only_when_they_do_nothing() {
    let server = Running::with(|config| config.connections_max = 2).await;
    let bytes = server.draft("GenerateRandom", &RANDOM).bytes();
    let (first, rest) = bytes.split_at(bytes.len() - 1);
    let (mut one, mut two) = (server.connect().await, server.connect().await);
    for stream in [&mut one, &mut two] {
        stream.write_all(&bytes).await.unwrap();
        assert_eq!(read_answer(stream).await.status, 200);
        stream.write_all(first).await.unwrap();
    }
    let mut third = server.connect().await;
    third.write_all(&bytes).await.unwrap();
    let waiting = timeout(Duration::from_millis(1500), read_answer(&mut third)).await;
    assert!(waiting.is_err(), "it was served");
    for stream in [&mut one, &mut two] {
        stream.write_all(rest).await.unwrap();
        assert_eq!(read_answer(stream).await.status, 200);
    }
    // One of the two ends now, in order.
    assert_eq!(timeout(SOON, read_answer(&mut third)).await.expect("it waits").status, 200);
    let (mut memory_one, mut memory_two) = ([0; 1], [0; 1]);
    let ended = async {
        tokio::select! {
            read = one.read(&mut memory_one) => read,
            read = two.read(&mut memory_two) => read,
        }
    };
    assert_eq!(timeout(PATIENCE, ended).await.unwrap().unwrap(), 0);
    drop(third);
    drop((one, two));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_watch_have_places_of_their_own_and_never_wait() {
    let server = Running::with(|config| config.connections_max = 4).await;
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(TcpStream::connect(server.metrics).await.unwrap());
        crowd.push(server.connect().await);
    }
    let begun = Instant::now();
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(timeout(SOON, server.watch(path)).await.expect("it waited").0, 200);
    }
    assert!(begun.elapsed() < SOON);
    drop(crowd);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_2_connection_that_proved_nothing_for_long_is_ended_and_others_are_not() {
    let server = Running::start().await;
    let mut good = Http2::on(server.connect().await).await;
    let draft = server.draft("GenerateRandom", &RANDOM);
    assert_eq!(good.send(&draft).await.status, 200);
    let mut silent = server.connect().await;
    silent.write_all(PREFACE).await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, silent.read_to_end(&mut rest)).await.expect("it lasts");
    sleep(Duration::from_millis(100)).await;
    assert_eq!(good.send(&draft).await.status, 200);
    drop(good);
    server.end().await;
}
