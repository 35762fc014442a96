//! Requests and answers as bytes.
//!
//! * A *message* is one value of a closed enum in bincode 1 (default options: little endian, variable-length integers),
//!   at most [`MESSAGE_BYTES_MAX`] bytes. The values of `api` are never serialised themselves: `noun`, `request` and
//!   `answer` hold twins, converted by hand, and a variant's place in its enum is part of the protocol.
//! * A message travels in *frames*: four bytes, big endian, with the length of the payload in the lower 31 bits and
//!   "another frame of the same message follows" in the highest one, then 1 to [`FRAME_BYTES_MAX`] bytes of payload.
//! * A request is one message. An answer is one message, or several for a list, each with some of its items and
//!   whether more follow. After the last message comes the bulk body, if there is one, as it is.
//!
//! Whatever bytes arrive, decoding ends in a value or an error: no panic, no allocation that the sender chooses, no
//! recursion that the sender chooses. Trailing bytes and unknown variants are refused. `bincode` is used here only.

use bincode::Options;
use bytes::{Buf, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Kind, Result};
use crate::peer::api::{Request, Response};

mod answer;
mod noun;
mod repository;
mod request;

/// Travels in the HTTP header [`PROTOCOL_HEADER`] of each request and answer. Grows with any change of a message, or of
/// what it means.
pub const PROTOCOL_VERSION: u32 = 4;
pub const PROTOCOL_HEADER: &str = "keiki-protocol";
/// Where requests are posted. It never changes, so that versions can tell each other that they differ.
pub const REQUEST_PATH: &str = "/v1/request";
/// The payload of one frame.
pub const FRAME_BYTES_MAX: usize = 64 << 10;
/// One message. A delete of 1000 objects with the longest keys is 0.8 MB.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// All messages of one answer.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;

const FRAME_HEADER_BYTES: usize = 4;
const CONTINUES: u32 = 1 << 31;

/// A value that has a twin with bytes.
trait Twin: Sized {
    type Wire;
    fn to_wire(&self) -> Self::Wire;
    fn from_wire(wire: Self::Wire) -> Result<Self>;
}

impl<T: Twin> Twin for Vec<T> {
    type Wire = Vec<T::Wire>;

    fn to_wire(&self) -> Self::Wire {
        self.iter().map(T::to_wire).collect()
    }

    fn from_wire(wire: Self::Wire) -> Result<Self> {
        wire.into_iter().map(T::from_wire).collect()
    }
}

impl<T: Twin> Twin for Option<T> {
    type Wire = Option<T::Wire>;

    fn to_wire(&self) -> Self::Wire {
        self.as_ref().map(T::to_wire)
    }

    fn from_wire(wire: Self::Wire) -> Result<Self> {
        wire.map(T::from_wire).transpose()
    }
}

fn options() -> impl Options {
    bincode::DefaultOptions::new().with_limit(MESSAGE_BYTES_MAX as u64)
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    options().serialize(message).map_err(|error| match *error {
        bincode::ErrorKind::SizeLimit => {
            Error::new(Kind::Unsupported, format!("the message would be longer than {MESSAGE_BYTES_MAX} bytes"))
        }
        other => Error::new(Kind::Internal, format!("cannot encode a message: {other}")),
    })
}

fn encoded_bytes<T: Serialize>(value: &T) -> usize {
    // What cannot be measured is too long; `encode` then says so.
    options().serialized_size(value).map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX))
}

fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    options().deserialize(bytes).map_err(|error| {
        let why = match *error {
            bincode::ErrorKind::Custom(text) => text,
            bincode::ErrorKind::Io(_) => String::from("it ends too early"),
            bincode::ErrorKind::SizeLimit => String::from("it names a length that it cannot have"),
            other => other.to_string(),
        };
        Error::new(Kind::Damaged, format!("cannot understand {what}: {why}"))
            .hint("are both hosts running the same version of keiki?")
    })
}

/// Cuts a message into frames.
fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + FRAME_HEADER_BYTES * 2);
    let mut payloads = message.chunks(FRAME_BYTES_MAX).peekable();
    while let Some(payload) = payloads.next() {
        // At most 64 KiB, so the number fits.
        let length = payload.len() as u32;
        let flag = if payloads.peek().is_some() { CONTINUES } else { 0 };
        framed.extend_from_slice(&(length | flag).to_be_bytes());
        framed.extend_from_slice(payload);
    }
    framed.freeze()
}

/// The frames of a request.
pub fn encode_request(request: &Request) -> Result<Bytes> {
    Ok(frame(&encode(&request::to_wire(request)?)?))
}

/// The request in one message.
pub fn decode_request(message: &[u8]) -> Result<Request> {
    request::from_wire(decode("the request", message)?)
}

/// The frames of an answer, which may be a refusal.
pub fn encode_answer(answer: &Result<Response>) -> Result<Bytes> {
    let mut framed = BytesMut::new();
    for message in answer::to_wire(answer) {
        framed.extend_from_slice(&frame(&encode(&message)?));
    }
    Ok(framed.freeze())
}

/// Takes bytes in pieces of any size and gives messages.
#[derive(Default)]
pub struct MessageReader {
    received: BytesMut,
    message: Vec<u8>,
    total_bytes: usize,
}

impl MessageReader {
    /// Takes the next bytes from the connection.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
    }

    /// The next whole message, or nothing if bytes are missing.
    pub fn next_message(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let Some(header) = self.received.first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(None) };
            let header = u32::from_be_bytes(*header);
            // 31 bits fit into the usize of every machine that runs this.
            let length = (header & !CONTINUES) as usize;
            if length == 0 || length > FRAME_BYTES_MAX {
                return Err(too_long(format!("a frame of {length} bytes, not 1 to {FRAME_BYTES_MAX}")));
            }
            if self.message.len() + length > MESSAGE_BYTES_MAX {
                return Err(too_long(format!("a message of more than {MESSAGE_BYTES_MAX} bytes")));
            }
            if self.received.len() < FRAME_HEADER_BYTES + length {
                return Ok(None);
            }
            self.total_bytes += FRAME_HEADER_BYTES + length;
            if self.total_bytes > ANSWER_BYTES_MAX {
                return Err(too_long(format!("more than {ANSWER_BYTES_MAX} bytes of messages")));
            }
            self.received.advance(FRAME_HEADER_BYTES);
            self.message.extend_from_slice(&self.received.split_to(length));
            if header & CONTINUES == 0 {
                return Ok(Some(std::mem::take(&mut self.message)));
            }
        }
    }

    /// Whether bytes of an unfinished message are waiting.
    pub fn is_inside_message(&self) -> bool {
        !self.received.is_empty() || !self.message.is_empty()
    }

    /// The bytes after the last message: the beginning of the bulk body.
    pub fn into_rest(self) -> Bytes {
        self.received.freeze()
    }
}

fn too_long(what: String) -> Error {
    Error::new(Kind::Damaged, format!("the other side sent {what}"))
        .hint("is that really keiki, and the same version of it?")
}

/// Puts an answer together from its messages.
#[derive(Default)]
pub struct AnswerReader {
    so_far: Option<Response>,
}

impl AnswerReader {
    /// Takes one message; gives the answer once it is complete.
    pub fn take(&mut self, message: &[u8]) -> Result<Option<Result<Response>>> {
        let (part, more) = answer::from_wire(decode("the answer", message)?)?;
        let whole = match (self.so_far.take(), part) {
            (None, part) => part,
            (Some(so_far), Ok(part)) => Ok(answer::join(so_far, part)?),
            // The other side failed in the middle of its list.
            (Some(_), Err(error)) => Err(error),
        };
        match whole {
            Ok(part) if more => {
                self.so_far = Some(part);
                Ok(None)
            }
            whole => Ok(Some(whole)),
        }
    }
}

#[cfg(test)]
mod tests;
