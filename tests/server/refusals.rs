//! Refusals of requests whose bodies are still on their way: over HTTP/2, too, each of them arrives.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    Request, Response,
    body::{Body, Frame, SizeHint},
    client::conn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    client::{Answer, Draft, generate},
    running::{PATIENCE, Running, parse_answer, whole},
};

/// A body that comes in pieces, none of them with the head.
struct Slow {
    left: usize,
    told: bool,
    pause: bool,
    /// Set once all of it was given away: a reset would have come before.
    done: Arc<AtomicBool>,
}

impl Body for Slow {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.pause = !self.pause;
        if self.pause {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let len = self.left.min(50_000);
        self.left -= len;
        self.done.store(self.left == 0, Ordering::Relaxed);
        Poll::Ready((len > 0).then(|| Ok(Frame::data(Bytes::from(vec![0; len])))))
    }

    fn size_hint(&self) -> SizeHint {
        match self.told {
            true => SizeHint::with_exact(self.left as u64),
            false => SizeHint::default(),
        }
    }
}

type Sender = conn::http2::SendRequest<Slow>;

async fn client(server: &Running) -> Sender {
    let stream = server.connect().await;
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = conn::http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

async fn ask(sender: &mut Sender, draft: &Draft, len: usize, told: bool) -> Answer {
    let done = Arc::new(AtomicBool::new(false));
    let body = Slow { left: len, told, pause: false, done: Arc::clone(&done) };
    let mut request = Request::new(body);
    *request.method_mut() = draft.method.clone();
    *request.uri_mut() = format!("http://127.0.0.1{}", draft.uri).parse().unwrap();
    *request.headers_mut() = draft.headers.clone();
    request.headers_mut().remove("host");
    request.headers_mut().remove("content-length");
    if told {
        request.headers_mut().insert("content-length", len.into());
    }
    sender.ready().await.unwrap();
    let answer = timeout(PATIENCE, sender.send_request(request)).await.unwrap();
    let answer: Response<_> = answer.expect("the stream was reset");
    let answer = Answer::of(whole(answer).await);
    let sent = async {
        while !done.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, sent).await.expect("the rest of the body was not taken");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn no_refusal_over_http_2_is_lost_or_wears_its_connection_out() {
    let server = Running::start().await;
    let mut nobody = Draft::new("nobody", "Encrypt", Vec::new());
    nobody.sign();
    let mut wrong_path = nobody.clone();
    wrong_path.uri = "/elsewhere".into();
    let mut forged = server.draft("Encrypt", &generate("alias/derived", 32));
    forged.set("authorization", "Bearer AAAA");
    let mut waits = forged.clone();
    waits.set("expect", "100-continue");
    let cases: [(&Draft, usize, u16); 6] = [
        (&nobody, 13, 404),
        (&wrong_path, 13, 404),
        (&forged, 13, 401),
        (&forged, 200_000, 401),
        (&waits, 13, 401),
        (&forged, (3 << 20) + 1, 413),
    ];
    // More than the resets that a connection has in all.
    let mut sender = client(&server).await;
    for round in 0..300 {
        for (draft, len, status) in cases.iter().filter(|(_, len, _)| *len < 100) {
            let told = round % 2 == 0;
            assert_eq!(ask(&mut sender, draft, *len, told).await.status, *status, "{round} {len}");
        }
    }
    for round in 0..20 {
        let (draft, len, status) = cases[3];
        assert_eq!(ask(&mut sender, draft, len, round % 2 == 0).await.status, status, "{round}");
    }
    let (large, len, status) = cases[5];
    for _ in 0..5 {
        assert_eq!(ask(&mut sender, large, len, true).await.status, status);
    }
    // At once.
    let mut tasks = JoinSet::new();
    for index in 0..200 {
        let (mut sender, draft) = (sender.clone(), cases[index % 4].0.clone());
        tasks.spawn(async move { ask(&mut sender, &draft, 1000, true).await.status });
    }
    while let Some(status) = tasks.join_next().await {
        assert!([401, 404].contains(&status.unwrap()));
    }
    assert_eq!(server.metric("keymill_connections_failed_total").await, 0.0);
    drop(sender);
    server.end().await;
}

/// Such a body is not read to its end before the answer, but for a while after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_arrives_though_the_body_is_beyond_what_is_thrown_away_before_it() {
    let server = Running::with(|config| config.batch_body_max = 1 << 20).await;
    let mut large = Draft::new("nobody", "Encrypt", Vec::new());
    large.sign();
    let mut sender = client(&server).await;
    for _ in 0..20 {
        let answer = ask(&mut sender, &large, 11 << 20, true).await;
        answer.refused_with(413, "RequestEntityTooLarge");
    }
    // A body of no told length, in which the limit is passed.
    let mut draft = server.draft("Encrypt", &generate("alias/derived", 32));
    draft.remove("content-length").sign();
    let answer = ask(&mut sender, &draft, 11 << 20, false).await;
    answer.refused_with(413, "RequestEntityTooLarge");

    // HTTP/1.1, written whole before anything is read; whether it asked to be told when to send, or not.
    for expect in [None, Some("100-continue")] {
        let mut stream = server.connect().await;
        let mut draft = Draft::new("nobody", "Encrypt", vec![0; 11 << 20]);
        if let Some(expect) = expect {
            draft.set("expect", expect);
        }
        timeout(PATIENCE, stream.write_all(&draft.sign().bytes())).await.unwrap().unwrap();
        let mut answer = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
        read.expect("the answer was lost to a reset");
        parse_answer(&answer).unwrap().refused_with(413, "RequestEntityTooLarge");
    }
    // A client that waits for the word is answered at once.
    let mut waits = Draft::new("nobody", "Encrypt", vec![0; 100]);
    let mut stream = server.connect().await;
    let bytes = waits.set("expect", "100-continue").sign().bytes();
    stream.write_all(&bytes[..bytes.len() - 100]).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(Duration::from_secs(4), stream.read_to_end(&mut answer)).await;
    parse_answer(&answer).unwrap().refused_with(404, "Unauthorized");
    drop(sender);
    server.end().await;
}
