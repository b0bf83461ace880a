//! A server on loopback, and the ways to talk to it.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, client::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use keymill::{
    ClientId, Engine,
    server::{Handle, Server, ServerConfig},
};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::client::{Answer, Draft, config, engine};

/// No single wait of these tests is longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Running {
    pub(crate) engine: Engine,
    pub(crate) client: ClientId,
    pub(crate) address: SocketAddr,
    pub(crate) metrics: SocketAddr,
    pub(crate) handle: Handle,
    pub(crate) ended: JoinHandle<bool>,
}

impl Running {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let (engine, client) = engine();
        Self::on(engine, client, change).await
    }

    pub(crate) async fn on(
        engine: Engine,
        client: ClientId,
        change: impl FnOnce(&mut ServerConfig),
    ) -> Self {
        let mut config = config();
        config.metrics = Some(([127, 0, 0, 1], 0).into());
        change(&mut config);
        let server = Server::bind(engine.clone(), &config).await.unwrap();
        Self {
            engine,
            client,
            address: server.address(),
            metrics: server.metrics_address().unwrap(),
            handle: server.handle(),
            ended: tokio::spawn(server.run()),
        }
    }

    pub(crate) fn draft(&self, api: &str, message: &impl Message) -> Draft {
        let mut draft = Draft::new(self.client.as_str(), api, message.encode_to_vec());
        draft.sign();
        draft
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Asks on a connection of its own.
    pub(crate) async fn ask(&self, api: &str, message: &impl Message) -> Answer {
        let mut client = Http1::on(self.connect().await).await;
        client.send(&self.draft(api, message)).await
    }

    /// The status and text of `path` for those who watch.
    pub(crate) async fn watch(&self, path: &str) -> (u16, String) {
        let stream = TcpStream::connect(self.metrics).await.unwrap();
        let (mut sender, connection) =
            conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::new(Full::default());
        *request.uri_mut() = path.parse().unwrap();
        request.headers_mut().insert("host", "watch".parse().unwrap());
        let response = whole(sender.send_request(request).await.unwrap()).await;
        let text = String::from_utf8(response.body().to_vec()).unwrap();
        (response.status().as_u16(), text)
    }

    /// The value of a metric; 0 if it is not there.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.watch("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a metric has this value.
    pub(crate) async fn wait_for(&self, name: &str, value: f64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.metric(name).await;
            if (now - value).abs() < 0.5 {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is {now}, not {value}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends the server, which has to be in order.
    pub(crate) async fn end(self) {
        self.handle.drain();
        assert!(timeout(PATIENCE, self.ended).await.unwrap().unwrap());
    }
}

pub(crate) async fn whole(response: Response<Incoming>) -> Response<Bytes> {
    let (parts, body) = response.into_parts();
    let body = timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes();
    Response::from_parts(parts, body)
}

/// HTTP/1.1 on one connection.
pub(crate) struct Http1(conn::http1::SendRequest<Full<Bytes>>);

impl Http1 {
    pub(crate) async fn on(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (sender, connection) = conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    pub(crate) async fn try_send(&mut self, draft: &Draft) -> hyper::Result<Answer> {
        self.0.ready().await?;
        let response = timeout(PATIENCE, self.0.send_request(draft.request())).await.unwrap()?;
        Ok(Answer::of(whole(response).await))
    }

    pub(crate) async fn send(&mut self, draft: &Draft) -> Answer {
        self.try_send(draft).await.unwrap()
    }
}

/// HTTP/2 on one connection.
#[derive(Clone)]
pub(crate) struct Http2(conn::http2::SendRequest<Full<Bytes>>);

impl Http2 {
    pub(crate) async fn on(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (sender, connection) = conn::http2::Builder::new(TokioExecutor::new())
            .max_header_list_size(1 << 20)
            .handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    pub(crate) async fn try_send(&mut self, draft: &Draft) -> hyper::Result<Response<Bytes>> {
        let mut request = draft.request();
        *request.uri_mut() = "http://127.0.0.1/".parse().unwrap();
        request.headers_mut().remove("host");
        self.0.ready().await?;
        let response = timeout(PATIENCE, self.0.send_request(request)).await.unwrap()?;
        Ok(whole(response).await)
    }

    pub(crate) async fn send(&mut self, draft: &Draft) -> Answer {
        Answer::of(self.try_send(draft).await.unwrap())
    }
}

/// Sends bytes and reads until the server ends the connection. What it does with it otherwise is not looked at.
pub(crate) async fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> Vec<u8> {
    // The server may have gone before the last of it.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    answer
}

/// Reads one HTTP/1.1 answer with a length.
pub(crate) async fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let read = async {
        loop {
            let mut chunk = [0; 4096];
            let len = stream.read(&mut chunk).await.unwrap();
            assert_ne!(len, 0, "the connection was ended: {:?}", String::from_utf8_lossy(&bytes));
            bytes.extend_from_slice(&chunk[..len]);
            if let Some(answer) = parse_answer(&bytes) {
                return answer;
            }
        }
    };
    timeout(PATIENCE, read).await.unwrap()
}

/// The answer that begins with these bytes, once it is whole.
pub(crate) fn parse_answer(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status: u16 = lines.next()?.split(' ').nth(1)?.parse().unwrap();
    let mut response = Response::builder().status(status);
    let mut len = 0;
    for (name, value) in lines.map(|line| line.split_once(": ").unwrap()) {
        response = response.header(name, value);
        if name == "content-length" {
            len = value.parse().unwrap();
        }
    }
    let body = bytes.get(end + 4..end + 4 + len)?;
    Some(Answer::of(response.body(Bytes::copy_from_slice(body)).unwrap()))
}
