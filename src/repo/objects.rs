//! Reading containers from a store: the index from the end of the object, then frames by range.

use std::ops::Range;

use bytes::Bytes;

use crate::base::bulk::run_blocking;
use crate::error::{Error, Kind, Result};
use crate::format::container::{
    ContainerIndex, ContainerKind, FOOTER_BYTES, FramePlace, INDEX_PLAIN_BYTES_MAX, parse_footer,
};
use crate::format::frame::{FRAME_HEADER_BYTES, FrameDecoder, FrameHeader, ObjectSeal};
use crate::store::read::read_range;
use crate::store::{Key, Store};

/// An object's end is fetched in one request of this size, in which the index usually is.
const TAIL_BYTES: u64 = 16 << 10;

/// A container whose index was read.
#[derive(Debug, Clone)]
pub(super) struct OpenObject {
    pub key: Key,
    pub seal: ObjectSeal,
    pub index: ContainerIndex,
}

/// The key of an object of the layout.
pub(super) fn object_key(text: String) -> Result<Key> {
    Key::parse(&text)
}

/// Reads the index of an object that has `size` bytes.
pub(super) async fn open_object(store: &dyn Store, key: &Key, size: u64, kind: ContainerKind) -> Result<OpenObject> {
    let seal = ObjectSeal::of(key.as_str());
    if size < FOOTER_BYTES as u64 {
        return Err(seal.damaged("is too short"));
    }
    let tail_at = size.saturating_sub(TAIL_BYTES);
    let tail = read_range(store, key, tail_at..size).await.map_err(|error| as_damage(&seal, error))?;
    let index = index_from_tail(store, key, &seal, size, tail_at, tail, kind).await?;
    Ok(OpenObject { key: key.clone(), seal, index })
}

async fn index_from_tail(
    store: &dyn Store,
    key: &Key,
    seal: &ObjectSeal,
    size: u64,
    tail_at: u64,
    tail: Bytes,
    kind: ContainerKind,
) -> Result<ContainerIndex> {
    let range = parse_footer(seal, size, &tail[tail.len() - FOOTER_BYTES..])?;
    if range.end - range.start > (INDEX_PLAIN_BYTES_MAX + FRAME_HEADER_BYTES) as u64 {
        return Err(seal.damaged("its index is larger than can be"));
    }
    let bytes = match range.start.checked_sub(tail_at) {
        Some(from) => tail.slice(from as usize..(range.end - tail_at) as usize),
        None => read_range(store, key, range.clone()).await.map_err(|error| as_damage(seal, error))?,
    };
    ContainerIndex::parse(seal, kind, &range, &bytes)
}

/// A range that the store says is outside of an object means that the object was listed with another size: it is not
/// the caller's mistake.
fn as_damage(seal: &ObjectSeal, error: Error) -> Error {
    match error.kind() {
        Kind::BadInput => seal.damaged(error.message()),
        _ => error,
    }
}

/// The consecutive frames that hold bytes `range` of the content (not empty, inside), and where the first begins in it.
pub(super) fn frames_for(frames: &[FramePlace], range: &Range<u64>) -> (Range<usize>, u64) {
    let mut begins = 0u64;
    let mut first = None;
    for (number, frame) in frames.iter().enumerate() {
        let ends = begins + u64::from(frame.plain_bytes);
        if first.is_none() && range.start < ends {
            first = Some((number, begins));
        }
        if let Some((from, content_at)) = first
            && range.end <= ends
        {
            return (from..number + 1, content_at);
        }
        begins = ends;
    }
    first.map_or((0..0, 0), |(from, content_at)| (from..frames.len(), content_at))
}

/// Fetches consecutive frames in one request and returns their contents, one after the other in one piece.
pub(super) async fn read_frames(store: &dyn Store, object: &OpenObject, numbers: Range<usize>) -> Result<Bytes> {
    let places: Vec<FramePlace> = object.index.frames[numbers].to_vec();
    let (Some(first), Some(last)) = (places.first(), places.last()) else { return Ok(Bytes::new()) };
    let range = first.offset..last.offset + u64::from(last.stored_bytes);
    let stored = read_range(store, &object.key, range).await.map_err(|error| as_damage(&object.seal, error))?;
    let seal = object.seal.clone();
    run_blocking("decode", move || decode_frames(&seal, &places, &stored)).await
}

fn decode_frames(seal: &ObjectSeal, places: &[FramePlace], stored: &Bytes) -> Result<Bytes> {
    let mut decoder = FrameDecoder::new()?;
    let mut rest = stored.clone();
    let mut all = Vec::new();
    let plain_bytes = places.iter().map(|place| place.plain_bytes as usize).sum();
    for place in places {
        let frame = rest.split_to(place.stored_bytes as usize);
        let header = FrameHeader::parse(seal, place.offset, &frame)?;
        if header.plain_bytes != place.plain_bytes {
            return Err(seal.damaged(format!("the frame at byte {} is not the one of the index", place.offset)));
        }
        let plain = decoder.decode(seal, place.offset, &header, &frame.slice(FRAME_HEADER_BYTES..))?;
        if places.len() == 1 {
            return Ok(plain);
        }
        all.reserve_exact(if all.is_empty() { plain_bytes } else { 0 });
        all.extend_from_slice(&plain);
    }
    Ok(Bytes::from(all))
}
