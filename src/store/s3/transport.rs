//! How requests reach an S3 server: HTTP/1.1 over TCP, with TLS or without, on a bounded number of connections.
//!
//! The SDK is given this instead of its own client, because here
//! * names are never resolved by the C library (`base::resolve`);
//! * HTTP/1.1 is spoken always: one HTTP/2 connection moves bulk several times slower;
//! * every byte counts against the limits of the agent, on the socket itself;
//! * a connection that hangs is noticed by what it moves: [`Timeouts`];
//! * a certificate that cannot be trusted, or a port at which nobody listens, is an error that says so;
//! * every request that is really sent is counted, also one that is made again, where there is a meter.
//!
//! One attempt per call: who calls decides about trying again.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http::{HeaderValue, Uri, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsConnector;

use super::explain::tls_reason;
use crate::base::rate::{Activity, LimitedStream, RateLimit};
use crate::base::resolve::resolve;
use crate::error::{Error, Kind, Result};
use crate::model::cost::RequestKind;
use crate::store::metered::Meter;

/// An idle connection is not used again after this: many servers close theirs soon after.
const IDLE_MAX: Duration = Duration::from_secs(8);
/// A request that waited so long for a connection gets one more: bodies that are held back by their readers must not
/// stop the requests which those readers make.
const CONNECTION_WAIT_MAX: Duration = Duration::from_secs(10);

/// How long what may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For one address: TCP and TLS.
    pub connect: Duration,
    /// Nothing moves in either direction: while a request is sent, until its answer begins, and between two pieces of
    /// a body that somebody waits for.
    pub silence: Duration,
    /// A request from its begin to the begin of its answer, which is what one part of an upload takes.
    pub request: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            request: Duration::from_secs(600),
        }
    }
}

/// Byte rates of the whole agent: everybody who talks to an object store shares them.
#[derive(Clone, Default)]
pub struct Bandwidth {
    pub upload: Option<Arc<RateLimit>>,
    pub download: Option<Arc<RateLimit>>,
}

/// See the module. Clones share connections and limits.
#[derive(Clone)]
pub struct Transport {
    shared: Arc<Shared>,
    timeouts: Timeouts,
    meter: Option<Arc<Meter>>,
}

struct Shared {
    tls: Arc<rustls::ClientConfig>,
    bandwidth: Bandwidth,
    permits: Arc<Semaphore>,
    idle: Mutex<HashMap<Origin, Vec<Idle>>>,
}

/// Where a connection leads to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Origin {
    is_tls: bool,
    host: String,
    port: u16,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

struct Connection {
    sender: SendRequest<SdkBody>,
    activity: Arc<Activity>,
}

impl Transport {
    /// At most about `connections` at the same time, trusting the roots in `tls`.
    pub fn new(
        tls: Arc<rustls::ClientConfig>,
        bandwidth: Bandwidth,
        connections: usize,
        timeouts: Timeouts,
    ) -> Transport {
        let permits = Arc::new(Semaphore::new(connections.max(1)));
        let shared = Arc::new(Shared { tls, bandwidth, permits, idle: Mutex::default() });
        Transport { shared, timeouts, meter: None }
    }

    /// The same, counting what is sent and received as requests of an object store.
    pub fn counting(&self, meter: Arc<Meter>) -> Transport {
        Transport { meter: Some(meter), ..self.clone() }
    }

    async fn exchange(&self, request: HttpRequest) -> Result<HttpResponse> {
        let bad = |why: String| Error::new(Kind::Internal, format!("cannot make a request: {why}"));
        let answer = self.send(request.try_into_http1x().map_err(|error| bad(error.to_string()))?).await?;
        HttpResponse::try_from(answer)
            .map_err(|error| Error::new(Kind::Unreachable, format!("the answer makes no sense: {error}")))
    }

    /// Sends a request, whose URI names the host, and returns the answer when it begins.
    pub async fn send(&self, mut request: http::Request<SdkBody>) -> Result<http::Response<SdkBody>> {
        let bad = |why: String| Error::new(Kind::Internal, format!("cannot make a request: {why}"));
        let origin = Origin::of(request.uri())?;
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        let target = target.parse::<Uri>().map_err(|error| bad(error.to_string()))?;
        if !request.headers().contains_key(header::HOST) {
            let host = HeaderValue::from_str(&origin.host_header()).map_err(|error| bad(error.to_string()))?;
            request.headers_mut().insert(header::HOST, host);
        }
        *request.uri_mut() = target;
        let keeps_connection = request.method() == http::Method::GET;

        let waiting = self.shared.permits.clone().acquire_owned();
        let permit = tokio::time::timeout(CONNECTION_WAIT_MAX, waiting).await.ok().and_then(|permit| permit.ok());
        let mut connection = self.connection(&origin).await?;
        connection.activity.touch();
        let activity = connection.activity.clone();
        if let Some(meter) = &self.meter {
            meter.request(kind_of(request.method(), request.uri().query().unwrap_or_default()));
            meter.sent(request.body().content_length().unwrap_or(0));
        }
        let answer = self.watch(&origin, &activity, connection.sender.send_request(request)).await?;
        let answer = answer.map_err(|error| broken(&origin, &error))?;

        let (parts, incoming) = answer.into_parts();
        let mut body = AnswerBody {
            incoming,
            origin,
            silence: self.timeouts.silence,
            timer: None,
            meter: self.meter.clone(),
            held: Some(Held {
                connection,
                shared: self.shared.clone(),
                _permit: if keeps_connection { permit } else { None },
            }),
        };
        body.release_at_the_end();
        Ok(http::Response::from_parts(parts, SdkBody::from_body_1_x(body)))
    }

    /// Waits for an answer as long as bytes move.
    async fn watch<T>(&self, origin: &Origin, activity: &Activity, answer: impl Future<Output = T>) -> Result<T> {
        let began = Instant::now();
        let mut answer = std::pin::pin!(answer);
        loop {
            let silent_at = activity.last() + self.timeouts.silence;
            let late_at = began + self.timeouts.request;
            tokio::select! {
                biased;
                answer = &mut answer => return Ok(answer),
                () = tokio::time::sleep_until(silent_at.min(late_at)) => {}
            }
            let now = Instant::now();
            if now >= late_at {
                return Err(origin.late("no answer", self.timeouts.request));
            }
            if activity.last() + self.timeouts.silence <= now {
                return Err(origin.late("nothing was sent or received", self.timeouts.silence));
            }
        }
    }

    /// An idle connection that still works, or a new one.
    async fn connection(&self, origin: &Origin) -> Result<Connection> {
        while let Some(mut connection) = self.shared.take_idle(origin) {
            // Its last body has been read, so it is ready at once, or closed.
            let ready = tokio::time::timeout(Duration::from_millis(100), connection.sender.ready()).await;
            if matches!(ready, Ok(Ok(()))) {
                return Ok(connection);
            }
        }
        let addresses = resolve(&origin.address()).await?;
        let mut last = Error::new(Kind::Unreachable, format!("'{}' has no address", origin.host));
        for address in addresses {
            match tokio::time::timeout(self.timeouts.connect, self.dial(origin, address)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => last = error,
                Err(_) => last = origin.late("no connection", self.timeouts.connect),
            }
            if !last.is_temporary() {
                break;
            }
        }
        Err(last)
    }

    async fn dial(&self, origin: &Origin, address: std::net::SocketAddr) -> Result<Connection> {
        let socket = TcpStream::connect(address).await.map_err(|error| origin.no_connection(error))?;
        // It works without as well, only slower.
        let _ = socket.set_nodelay(true);
        let activity = Activity::new();
        let bandwidth = &self.shared.bandwidth;
        let socket = LimitedStream::new(socket, bandwidth.upload.clone(), bandwidth.download.clone(), activity.clone());
        let sender = if origin.is_tls {
            let name = ServerName::try_from(origin.host.clone())
                .map_err(|_| Error::new(Kind::BadInput, format!("'{}' cannot be the name of a server", origin.host)))?;
            let connector = TlsConnector::from(self.shared.tls.clone());
            let stream = connector
                .connect(name, socket)
                .await
                .map_err(|error| tls_reason(&origin.host, &error).unwrap_or_else(|| origin.no_connection(error)))?;
            begin(origin, stream).await?
        } else {
            begin(origin, socket).await?
        };
        Ok(Connection { sender, activity })
    }
}

async fn begin<I>(origin: &Origin, stream: I) -> Result<SendRequest<SdkBody>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let begun = Builder::new().handshake(TokioIo::new(stream)).await;
    let (sender, connection) = begun.map_err(|error| broken(origin, &error))?;
    // It ends when the sender is dropped or the server hangs up; its error reaches whoever waits for an answer.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

/// Which kind of request this is, as those are billed (Amazon S3 API reference, "Actions": each has its method, and some
/// a parameter by which they are told apart).
fn kind_of(method: &http::Method, query: &str) -> RequestKind {
    let has = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
    match *method {
        http::Method::GET if has("list-type") || has("uploads") => RequestKind::List,
        http::Method::GET => RequestKind::Get,
        http::Method::HEAD => RequestKind::Head,
        http::Method::DELETE => RequestKind::Delete,
        http::Method::POST if has("delete") => RequestKind::Delete,
        _ if has("uploads") || has("uploadId") => RequestKind::Part,
        _ => RequestKind::Put,
    }
}

fn broken(origin: &Origin, error: &hyper::Error) -> Error {
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        reason = inner.to_string();
        source = inner.source();
    }
    Error::new(Kind::Unreachable, format!("the connection to '{}' broke: {reason}", origin.address()))
}

impl Origin {
    fn of(uri: &Uri) -> Result<Origin> {
        let is_tls = uri.scheme_str() == Some("https");
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(Error::new(Kind::BadInput, format!("'{uri}' names no host")));
        }
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        Ok(Origin { is_tls, host: host.to_string(), port })
    }

    fn bracketed(&self) -> String {
        if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() }
    }

    /// For resolving and for messages.
    fn address(&self) -> String {
        format!("{}:{}", self.bracketed(), self.port)
    }

    /// As signed: the usual port is left out.
    fn host_header(&self) -> String {
        if self.port == if self.is_tls { 443 } else { 80 } { self.bracketed() } else { self.address() }
    }

    fn late(&self, what: &str, limit: Duration) -> Error {
        let message = format!("'{}': {what} within {} seconds", self.address(), limit.as_secs_f64());
        Error::new(Kind::Unreachable, message).hint("is the server overloaded, or does a firewall drop the packets?")
    }

    fn no_connection(&self, error: io::Error) -> Error {
        let hint = match error.kind() {
            io::ErrorKind::ConnectionRefused => "is the server running, and is the port of 'endpoint' right?",
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                "is there a route to it from this host?"
            }
            _ => "did it stop or restart just now?",
        };
        // Whatever it is: the server may come back.
        Error::io(format!("cannot reach '{}'", self.address()), error).with_kind(Kind::Unreachable).hint(hint)
    }
}

impl Shared {
    fn lock_idle(&self) -> std::sync::MutexGuard<'_, HashMap<Origin, Vec<Idle>>> {
        // Held for operations of a map only, which cannot panic.
        self.idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn take_idle(&self, origin: &Origin) -> Option<Connection> {
        let mut idle = self.lock_idle();
        let connections = idle.get_mut(origin)?;
        connections.retain(|idle| idle.since.elapsed() < IDLE_MAX && !idle.connection.sender.is_closed());
        // The one used last is the one that the server has least reason to close.
        connections.pop().map(|idle| idle.connection)
    }

    fn keep(&self, origin: &Origin, connection: Connection) {
        if !connection.sender.is_closed() {
            let since = Instant::now();
            self.lock_idle().entry(origin.clone()).or_default().push(Idle { connection, since });
        }
    }
}

/// What a body holds on to until it ends.
struct Held {
    connection: Connection,
    shared: Arc<Shared>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// The body of an answer: gives its connection back at the end, and fails when nothing comes for too long.
struct AnswerBody {
    incoming: Incoming,
    origin: Origin,
    silence: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    meter: Option<Arc<Meter>>,
    held: Option<Held>,
}

impl AnswerBody {
    fn release_at_the_end(&mut self) {
        if self.incoming.is_end_stream()
            && let Some(held) = self.held.take()
        {
            held.shared.keep(&self.origin, held.connection);
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        let frame = match Pin::new(&mut this.incoming).poll_frame(context) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                let silence = this.silence;
                let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(silence)));
                std::task::ready!(timer.as_mut().poll(context));
                this.held = None;
                return Poll::Ready(Some(Err(this.origin.late("nothing more of a body came", silence))));
            }
        };
        this.timer = None;
        match frame {
            Some(Ok(frame)) => {
                if let (Some(meter), Some(data)) = (&this.meter, frame.data_ref()) {
                    meter.received(data.len() as u64);
                }
                this.release_at_the_end();
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                this.held = None;
                Poll::Ready(Some(Err(broken(&this.origin, &error))))
            }
            None => {
                if let Some(held) = this.held.take() {
                    held.shared.keep(&this.origin, held.connection);
                }
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("timeouts", &self.timeouts).finish_non_exhaustive()
    }
}

impl HttpConnector for Transport {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let transport = self.clone();
        HttpConnectorFuture::new(async move {
            transport.exchange(request).await.map_err(|error| ConnectorError::io(Box::new(error)))
        })
    }
}

impl HttpClient for Transport {
    fn http_connector(&self, settings: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        // The look for an instance role must fail fast where there is none, and says so by its settings.
        let timeouts = Timeouts {
            connect: settings.connect_timeout().unwrap_or(self.timeouts.connect),
            silence: settings.read_timeout().unwrap_or(self.timeouts.silence),
            ..self.timeouts
        };
        SharedHttpConnector::new(Transport { timeouts, ..self.clone() })
    }
}
