//! The asking side: a few kept connections to one agent.
//!
//! Connections are made when they are needed and kept for the next request. The agent may close a kept one at any
//! moment; a request that therefore could not be sent, or that is harmless to repeat and was not answered on it, is
//! sent once more on a new one. Anything else is reported, and whoever asked decides whether to ask again (kind
//! `Unreachable` says that this may help).

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::CONTENT_TYPE;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;

use crate::error::{Error, Kind, Result};
use crate::peer::api::{Request, Response};
use crate::peer::body::{Failure, Outgoing, broken, exactly, incoming, with_start};
use crate::peer::tls::{TlsIdentity, explain_client_side};
use crate::peer::wire::{AnswerReader, MessageReader, PROTOCOL_HEADER, PROTOCOL_VERSION, REQUEST_PATH, encode_request};
use crate::store::ByteStream;

mod dial;
mod objects;

pub use dial::tune;
pub use objects::PeerObjects;

use dial::Place;

/// Kept for the next request; more are opened when they are needed at the same time.
const IDLE_CONNECTIONS_MAX: usize = 8;
/// The server closes an idle connection after 60 seconds; this side must not use it at that very moment.
const IDLE_SECONDS_MAX: u64 = 45;
/// Between two pieces of a body.
const STALL: Duration = Duration::from_secs(60);
/// Until the answer begins, for what is answered at once and for what has to be done first.
const QUICK: Duration = Duration::from_secs(120);
const SLOW: Duration = Duration::from_secs(900);
/// A connection that is slower cannot carry an archive.
const SLOWEST_BYTES_PER_SECOND: u64 = 50_000;

/// A way to one agent. Cheap to make; nothing is connected before the first request.
pub struct Client {
    place: Place,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    sender: SendRequest<Outgoing>,
    since: Instant,
}

impl Client {
    /// The agent of this host, at its control socket.
    pub fn unix(path: impl AsRef<Path>) -> Client {
        Client { place: Place::Socket(path.as_ref().to_path_buf()), idle: Mutex::default() }
    }

    /// The agent of `host` at `address` (`name:port`), which must prove to be that host.
    pub fn tls(address: &str, host: &str, identity: Arc<TlsIdentity>) -> Client {
        let place = Place::Network { address: address.to_string(), host: host.to_string(), identity };
        Client { place, idle: Mutex::default() }
    }

    /// Asks for something that has no body in either direction.
    pub async fn ask(&self, request: Request) -> Result<Response> {
        let (response, bulk) = self.exchange(request, None).await?;
        match bulk {
            None => Ok(response),
            Some(_) => Err(self.damaged("a body came that was not asked for")),
        }
    }

    /// Sends a body after the request: of exactly `body_bytes`, or of a size that its end tells. If the body ends in
    /// an error, the agent does not take it for whole, and that error is returned.
    pub async fn ask_with_body(&self, request: Request, body: ByteStream, body_bytes: Option<u64>) -> Result<Response> {
        Ok(self.exchange(request, Some((body, body_bytes))).await?.0)
    }

    /// Asks for a body: its size, and its bytes, which are exactly as many or end in an error.
    pub async fn ask_for_body(&self, request: Request) -> Result<(u64, ByteStream)> {
        match self.exchange(request, None).await? {
            (Response::Body { size_bytes }, Some(body)) => Ok((size_bytes, body)),
            _ => Err(self.damaged("no body came")),
        }
    }

    /// How messages name the agent.
    pub fn describe(&self) -> String {
        self.place.describe()
    }

    async fn exchange(
        &self,
        request: Request,
        body: Option<(ByteStream, Option<u64>)>,
    ) -> Result<(Response, Option<ByteStream>)> {
        let head = encode_request(&request)?;
        let again = is_repeatable(&request).then(|| head.clone());
        let outgoing = match body {
            None => Outgoing::message(head),
            Some((bulk, bytes)) => Outgoing::with_bulk(head, bulk, bytes),
        };
        let failure = outgoing.failure();
        let patience = patience(&request, &outgoing);
        let answer = async {
            let (sender, response) = self.send(http_request(outgoing)?, again, &failure).await?;
            self.check_head(&response)?;
            self.read_answer(sender, response.into_body()).await
        };
        let Some(patience) = patience else { return answer.await };
        match tokio::time::timeout(patience, answer).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let message = format!("{} did not answer within {} seconds", self.describe(), patience.as_secs());
                Err(Error::new(Kind::Unreachable, message).hint("is that host overloaded, or its repository slow?"))
            }
        }
    }

    /// Sends on a kept connection if there is a good one, otherwise on a new one.
    async fn send(
        &self,
        mut request: http::Request<Outgoing>,
        again: Option<Bytes>,
        failure: &Failure,
    ) -> Result<(SendRequest<Outgoing>, http::Response<Incoming>)> {
        while let Some(mut sender) = self.take_idle() {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((sender, response)),
                Err(mut unsent) => match (unsent.take_message(), &again) {
                    // The agent had closed this connection: not a byte of the request was sent.
                    (Some(message), _) => request = message,
                    // It was closed while the request was on its way.
                    (None, Some(head)) => request = http_request(Outgoing::message(head.clone()))?,
                    (None, None) => return Err(self.failed(unsent.error(), failure)),
                },
            }
        }
        let mut sender = self.place.connect().await?;
        match sender.send_request(request).await {
            Ok(response) => Ok((sender, response)),
            Err(error) => Err(self.failed(&error, failure)),
        }
    }

    fn take_idle(&self) -> Option<SendRequest<Outgoing>> {
        let mut idle = self.idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        idle.retain(|kept| !kept.sender.is_closed() && kept.since.elapsed().as_secs() < IDLE_SECONDS_MAX);
        // One whose answer is still being read is not ready.
        let ready = idle.iter().position(|kept| kept.sender.is_ready())?;
        Some(idle.swap_remove(ready).sender)
    }

    fn keep(&self, sender: SendRequest<Outgoing>) {
        let mut idle = self.idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if idle.len() < IDLE_CONNECTIONS_MAX && !sender.is_closed() {
            idle.push(Idle { sender, since: Instant::now() });
        }
    }

    fn check_head(&self, response: &http::Response<Incoming>) -> Result<()> {
        let theirs = response.headers().get(PROTOCOL_HEADER).and_then(|value| value.to_str().ok());
        match theirs {
            Some(theirs) if theirs == PROTOCOL_VERSION.to_string() => Ok(()),
            Some(theirs) => {
                let versions =
                    format!("speaks protocol version {}, this keiki {PROTOCOL_VERSION}", theirs.escape_default());
                Err(Error::new(Kind::Unsupported, format!("{} {versions}", self.describe()))
                    .hint("install the same version of keiki on both hosts, and restart the agents"))
            }
            None => Err(self.damaged("what answers is not an agent of keiki")),
        }
    }

    async fn read_answer(
        &self,
        sender: SendRequest<Outgoing>,
        body: Incoming,
    ) -> Result<(Response, Option<ByteStream>)> {
        let mut body = incoming(body, STALL);
        let mut reader = MessageReader::default();
        let mut answer = AnswerReader::default();
        let what = || format!("cannot read the answer of {}", self.describe());
        let response = loop {
            let message = reader.next_message().map_err(|error| error.while_doing(what()))?;
            if let Some(message) = message {
                match answer.take(&message).map_err(|error| error.while_doing(what()))? {
                    Some(response) => break response,
                    None => continue,
                }
            }
            match body.next().await {
                Some(piece) => reader.feed(&piece.map_err(|error| error.while_doing(what()))?),
                None => {
                    let error = Error::new(Kind::Unreachable, format!("{}: it ends in the middle", what()));
                    return Err(error.hint("did that agent stop or restart just now? its log says more"));
                }
            }
        };
        let rest = with_start(reader.into_rest(), body);
        if let Ok(Response::Body { size_bytes }) = response {
            self.keep(sender);
            return Ok((Response::Body { size_bytes }, Some(Box::pin(exactly(size_bytes, rest)))));
        }
        // Read to the end, which makes the connection ready for the next request.
        let mut rest = exactly(0, rest).boxed();
        match rest.next().await {
            None => self.keep(sender),
            Some(Ok(_)) => {}
            // What was asked is answered; only the connection is of no more use.
            Some(Err(error)) => tracing::debug!("{}: {error}", what()),
        }
        response.map(|response| (response, None))
    }

    /// Why a request could not be sent or was not answered.
    fn failed(&self, error: &hyper::Error, failure: &Failure) -> Error {
        // The body's own error is the cause of whatever the connection says.
        if let Some(error) = failure.take() {
            return error;
        }
        let what = self.place.cannot_reach();
        if let Place::Network { host, .. } = &self.place
            && let Some(explained) = explain_client_side(error, host)
        {
            return explained.while_doing(what);
        }
        broken(error).while_doing(what).hint("did it stop or restart just now? the log of the other agent says more")
    }

    fn damaged(&self, why: &str) -> Error {
        Error::new(Kind::Damaged, format!("cannot read the answer of {}: {why}", self.describe()))
            .hint("is the address right, and is the same version of keiki running there?")
    }
}

/// Whether asking twice has no other effect than asking once. Orders have ids that make them so.
fn is_repeatable(request: &Request) -> bool {
    match request {
        Request::Hello
        | Request::Status
        | Request::Doctor
        | Request::Submit { .. }
        | Request::Check { .. }
        | Request::ListJobs
        | Request::ShowJob { .. }
        | Request::ListBackups { .. }
        | Request::ShowWindow { .. }
        | Request::ShowRepository
        | Request::ShowCost
        | Request::ShipNow { .. }
        | Request::PushLog { .. }
        | Request::GetObject { .. }
        | Request::HeadObject { .. }
        | Request::ListObjects { .. }
        | Request::LinkObjects { .. }
        | Request::DeleteObjects { .. } => true,
        Request::Forward { request, .. } => is_repeatable(request),
        // The second time the answer would be another one.
        Request::CancelJob { .. }
        | Request::ResumeJob { .. }
        | Request::Accept { .. }
        | Request::Discard { .. }
        | Request::InitRepository
        | Request::PutObject { .. } => false,
    }
}

/// How long to wait until the answer begins; nothing for a body of unknown length, where the other side watches for
/// stalls.
fn patience(request: &Request, outgoing: &Outgoing) -> Option<Duration> {
    let request = match request {
        Request::Forward { request, .. } => request,
        request => request,
    };
    match request {
        Request::PutObject { .. } => {
            let bytes = http_body::Body::size_hint(outgoing).exact()?;
            Some(SLOW + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND))
        }
        Request::PushLog { .. }
        | Request::ShipNow { .. }
        | Request::Doctor
        | Request::Check { .. }
        | Request::ShowRepository
        | Request::ShowCost => Some(SLOW),
        _ => Some(QUICK),
    }
}

fn http_request(body: Outgoing) -> Result<http::Request<Outgoing>> {
    http::Request::post(REQUEST_PATH)
        .header(http::header::HOST, "keiki")
        .header(PROTOCOL_HEADER, PROTOCOL_VERSION)
        .header(CONTENT_TYPE, "application/octet-stream")
        .body(body)
        .map_err(|error| Error::new(Kind::Internal, format!("cannot make a request: {error}")))
}
