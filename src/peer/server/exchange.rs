//! One connection and its requests.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use http::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Method, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::stall::StallGuard;
use super::{ServerOptions, Service};
use crate::base::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::model::target::utc_text;
use crate::peer::access::Caller;
use crate::peer::api::{Request, Response};
use crate::peer::body::{Outgoing, incoming, with_start};
use crate::peer::tls::TlsIdentity;
use crate::peer::wire::{
    MESSAGE_BYTES_MAX, MessageReader, PROTOCOL_HEADER, PROTOCOL_VERSION, REQUEST_PATH, decode_request, encode_answer,
};
use crate::store::ByteStream;

/// The line and headers of a request; ours take 200 bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 32;
/// For the frames of a request, not for a bulk body after them.
const MESSAGE_SECONDS_MAX: u64 = 30;
/// An object: the manifest of a database of ten terabytes is a few gigabytes, everything else is smaller.
const OBJECT_BYTES_MAX: u64 = 64 << 30;
/// How long the rest of a refused request is read and thrown away, so that the refusal arrives.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 64 << 20;

/// What makes a connection as good as it was when it was accepted.
pub enum Trust {
    /// The credentials of the process that connected, which cannot change.
    Credentials,
    /// A certificate, until it expires or our own files are replaced.
    Certificate { identity: Arc<TlsIdentity>, generation: u64, not_after: Timestamp },
}

/// A connection whose caller is known.
#[derive(Clone)]
pub struct Connection {
    pub service: Arc<dyn Service>,
    pub clock: Arc<dyn Clock>,
    pub options: ServerOptions,
    pub caller: Caller,
    pub trust: Arc<Trust>,
}

type Reply = (Result<Response>, Option<ByteStream>);

impl Connection {
    /// Answers requests until the caller hangs up or `stop`; one that runs then is answered.
    pub async fn serve<I>(self, socket: I, open: Arc<Semaphore>, stop: CancellationToken)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let caller = self.caller.clone();
        let permit = open.try_acquire_owned().ok();
        let is_full = permit.is_none();
        let socket = TokioIo::new(StallGuard::new(socket, self.options.stall));
        let idle = self.options.idle;
        let service = service_fn(move |request| {
            let connection = self.clone();
            Box::pin(async move { connection.answer(request, is_full).await })
        });
        let mut connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(idle)
            .max_headers(HEADERS_MAX)
            .max_header_size(HEAD_BYTES_MAX)
            .serve_connection(socket, service);
        let mut is_stopping = false;
        let ending = loop {
            let drive = std::future::poll_fn(|context| connection.poll_without_shutdown(context));
            tokio::select! {
                biased;
                ending = drive => break ending,
                () = stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                }
            }
        };
        if let Err(error) = ending {
            tracing::debug!("the connection of '{caller}' ended: {error}");
        }
        drop(permit);
        linger(connection.into_parts().io.into_inner()).await;
    }

    async fn answer(
        self,
        request: http::Request<Incoming>,
        is_full: bool,
    ) -> std::result::Result<http::Response<Outgoing>, Error> {
        let (status, (answer, bulk)) = match self.check_head(&request, is_full) {
            Err(error) => (StatusCode::BAD_REQUEST, (Err(error), None)),
            Ok(()) => match self.read_request(request.into_body()).await {
                Err(error) => (StatusCode::BAD_REQUEST, (Err(error), None)),
                Ok((request, body)) => (StatusCode::OK, self.ask_service(request, body).await),
            },
        };
        let mut response = http::Response::new(reply_body(answer, bulk)?);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(PROTOCOL_HEADER, HeaderValue::from(PROTOCOL_VERSION));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if status != StatusCode::OK || !self.is_still_trusted() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    /// Whether the next request may come on the same connection.
    fn is_still_trusted(&self) -> bool {
        match &*self.trust {
            Trust::Credentials => true,
            Trust::Certificate { identity, generation, .. } => identity.is_current(*generation),
        }
    }

    fn check_head(&self, request: &http::Request<Incoming>, is_full: bool) -> Result<()> {
        if is_full {
            let message = format!("the agent serves {} connections already", self.options.connections_max);
            return Err(Error::new(Kind::Unreachable, message)
                .hint("try again later; 'connections' in [limits] says how many there may be"));
        }
        if let Trust::Certificate { not_after, .. } = &*self.trust
            && self.clock.now() > *not_after
        {
            let message = format!("the certificate of '{}' expired on {}", self.caller, utc_text(*not_after));
            return Err(Error::new(Kind::Forbidden, message).hint("issue a new one with 'keiki ca issue'"));
        }
        if request.method() != Method::POST || request.uri().path() != REQUEST_PATH {
            let path = request.uri().path().escape_default().to_string();
            return Err(Error::new(Kind::BadInput, format!("an agent does not answer '{} {path}'", request.method()))
                .hint("agents are asked with the 'keiki' command"));
        }
        let theirs = request.headers().get(PROTOCOL_HEADER).and_then(|value| value.to_str().ok()).unwrap_or("none");
        if theirs != PROTOCOL_VERSION.to_string() {
            let theirs = theirs.escape_default();
            let message = format!("the agent speaks protocol version {PROTOCOL_VERSION}, the caller {theirs}");
            return Err(Error::new(Kind::Unsupported, message).hint("install the same version of keiki on both hosts"));
        }
        Ok(())
    }

    /// The request, and the bulk body if it has one.
    async fn read_request(&self, body: Incoming) -> Result<(Request, Option<ByteStream>)> {
        let mut body = incoming(body, self.options.stall);
        let mut reader = MessageReader::default();
        let read_message = async {
            let mut received_bytes = 0;
            loop {
                if let Some(message) = reader.next_message()? {
                    return decode_request(&message);
                }
                match body.next().await {
                    Some(piece) => {
                        let piece = piece?;
                        received_bytes += piece.len();
                        // Longer than any message with its headers, and still no message.
                        if received_bytes > 2 * MESSAGE_BYTES_MAX {
                            return Err(Error::new(Kind::Damaged, "the request has no end"));
                        }
                        reader.feed(&piece);
                    }
                    None => return Err(Error::new(Kind::Damaged, "the request ends in the middle")),
                }
            }
        };
        let deadline = Duration::from_secs(MESSAGE_SECONDS_MAX);
        let request = tokio::time::timeout(deadline, read_message)
            .await
            .map_err(|_| Error::new(Kind::Unreachable, format!("the request did not come within {deadline:?}")))??;
        let rest = reader.into_rest();
        if matches!(request, Request::PutObject { .. }) {
            return Ok((request, Some(limited(with_start(rest, body)))));
        }
        // To read to the end also lets the connection be used again.
        let next = if rest.is_empty() { body.next().await.transpose()? } else { Some(rest) };
        match next {
            None => Ok((request, None)),
            Some(_) => Err(Error::new(Kind::Damaged, "there are bytes after the request")),
        }
    }

    async fn ask_service(&self, request: Request, body: Option<ByteStream>) -> Reply {
        let call = AssertUnwindSafe(self.service.handle(self.caller.clone(), request, body));
        match call.catch_unwind().await {
            Ok(Ok((response, bulk))) => (Ok(response), bulk),
            Ok(Err(error)) => (Err(error), None),
            Err(_) => {
                let error = Error::new(Kind::Internal, "a defect of keiki ended the request");
                (Err(error.hint("the log of the agent says more: 'journalctl -u keiki'")), None)
            }
        }
    }
}

/// Closes a connection so that the last answer arrives: a socket that is closed with unread bytes in it is reset, and
/// what was on its way to the other side is thrown away.
async fn linger<I: AsyncRead + AsyncWrite + Unpin>(mut socket: I) {
    let farewell = async {
        let mut unread = vec![0u8; 64 << 10];
        if socket.shutdown().await.is_ok() {
            let mut left = LINGER_BYTES_MAX;
            while left > 0 {
                match socket.read(&mut unread).await {
                    Ok(bytes @ 1..) => left = left.saturating_sub(bytes),
                    _ => break,
                }
            }
        }
    };
    // Whoever goes on sending for longer than that does not want to know.
    let _ = tokio::time::timeout(LINGER, farewell).await;
}

/// A body that is refused when it becomes longer than any object.
fn limited(body: ByteStream) -> ByteStream {
    let mut left = OBJECT_BYTES_MAX;
    Box::pin(body.map(move |piece| {
        let piece = piece?;
        left = left
            .checked_sub(piece.len() as u64)
            .ok_or_else(|| Error::new(Kind::BadInput, format!("the object is longer than {OBJECT_BYTES_MAX} bytes")))?;
        Ok(piece)
    }))
}

fn reply_body(answer: Result<Response>, bulk: Option<ByteStream>) -> Result<Outgoing> {
    let mismatch = || Error::new(Kind::Internal, "the agent answered with a body that does not fit its answer");
    let (answer, bulk) = match (answer, bulk) {
        (Ok(Response::Body { size_bytes }), Some(bulk)) => {
            (Ok(Response::Body { size_bytes }), Some((size_bytes, bulk)))
        }
        (Ok(Response::Body { size_bytes: 1.. }), None) => (Err(mismatch()), None),
        (Ok(_), Some(_)) => (Err(mismatch()), None),
        (answer, _) => (answer, None),
    };
    let head = match encode_answer(&answer) {
        Ok(head) => head,
        // An answer that has no form is told as an error, which is short.
        Err(error) => return Ok(Outgoing::message(encode_answer(&Err(error.while_doing("cannot send the answer")))?)),
    };
    Ok(match bulk {
        Some((size_bytes, bulk)) => Outgoing::with_bulk(head, bulk, Some(size_bytes)),
        None => Outgoing::message(head),
    })
}
