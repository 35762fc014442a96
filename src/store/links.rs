//! The objects that a file of links leads to (`format::links`), to be read only: what a host needs that has neither an
//! agent nor credentials.
//!
//! The file is read through once, so that one which is not whole is refused before anything else happens; what stays in
//! memory is the place of each line, some 200 bytes for a pack of 64 MiB. An object must be the one that the link was
//! made for: its size and its entity tag are compared before its bytes are passed on. One attempt per call and nothing
//! is resumed: `store::peer::PeerStore` does both on top, as for every store whose connection breaks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::{Bound, Range};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, RANGE};
use http_body_util::BodyExt;

use super::s3::bucket::{parse_content_range, plain_tag};
use super::s3::explain::own_error;
use super::s3::transport::{Bandwidth, Timeouts, Transport};
use super::s3::trust::trusting;
use super::{ByteStream, Key, LIST_PAGE_OBJECTS_MAX, ObjectInfo, PutCondition, Store, Tag};
use crate::base::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::format::links::{LINE_BYTES_MAX, LinkLine, LinksHeader, LinksParser};
use crate::model::capabilities::Capabilities;
use crate::model::target::utc_text;

/// Of an answer that is not the object so much is read, to say what it was.
const REFUSAL_BYTES_MAX: usize = 16 << 10;
/// Bodies are read one after the other; a few more are open while they break.
const CONNECTIONS: usize = 8;

/// See the module.
pub struct LinksStore {
    header: LinksHeader,
    file: File,
    described: String,
    places: BTreeMap<Key, Place>,
    transport: Transport,
    clock: Arc<dyn Clock>,
}

/// Where the line of an object is in the file, and what it says of the object.
struct Place {
    at: u64,
    length: usize,
    size_bytes: u64,
    tag: Box<str>,
}

impl LinksStore {
    /// Opens a file of links. Servers are trusted whose certificates the host trusts or the file `ca` has. `Damaged` if
    /// the file is not what was written, `BadInput` if it is something else. Asks no server.
    pub fn open(path: &Path, ca: Option<&Path>, clock: Arc<dyn Clock>) -> Result<LinksStore> {
        let what = || format!("cannot use links '{}'", path.display());
        let file = File::open(path).context(what).map_err(|error| match error.kind() {
            Kind::NotFound => {
                error.hint("'keiki backup download INSTANCE BACKUP --link 1h --to FILE' writes such a file")
            }
            _ => error,
        })?;
        if !file.metadata().context(what)?.is_file() {
            return Err(Error::new(Kind::BadInput, format!("{}: it is not a file", what()))
                .hint("write what 'keiki backup download --link' printed into a file"));
        }
        let tls = trusting(ca).context(what)?;
        let (header, places) = read_places(&file).context(what)?;
        Ok(LinksStore {
            header,
            file,
            described: format!("links:{}", path.display()),
            places,
            transport: Transport::new(tls, Bandwidth::default(), CONNECTIONS, Timeouts::default()),
            clock,
        })
    }

    /// What the links are for.
    pub fn header(&self) -> &LinksHeader {
        &self.header
    }

    fn link(&self, place: &Place) -> Result<LinkLine> {
        let mut line = vec![0; place.length];
        self.file.read_exact_at(&mut line, place.at).context(|| format!("cannot read {}", self.described))?;
        serde_json::from_slice(&line)
            .map_err(|_| Error::new(Kind::Damaged, format!("{} was changed while it was used", self.described)))
    }

    fn place(&self, key: &Key) -> Result<&Place> {
        let missing =
            || Error::new(Kind::NotFound, format!("cannot read '{key}': {} has no link to it", self.described));
        self.places.get(key).ok_or_else(missing)
    }

    /// Asks for bytes of an object, and looks whether the answer has them.
    async fn ask(&self, key: &Key, place: &Place, range: &Range<u64>) -> Result<SdkBody> {
        let link = self.link(place)?;
        let last = range.end.saturating_sub(1);
        let request = http::Request::get(&link.url).header(RANGE, format!("bytes={}-{last}", range.start));
        let request = request.body(SdkBody::empty()).map_err(|error| {
            Error::new(Kind::BadInput, format!("the link is none: {error}")).hint("have the links made again")
        })?;
        if !matches!(request.uri().scheme_str(), Some("http" | "https")) {
            let why = "the link leads nowhere: it begins with neither http nor https";
            return Err(Error::new(Kind::BadInput, why).hint("have the links made again"));
        }
        let host = request.uri().host().unwrap_or_default().to_string();
        let (answer, body) = self.transport.send(request).await?.into_parts();
        match answer.status.as_u16() {
            200 | 206 => self.check(key, place, range, answer.status.as_u16(), &answer.headers).map(|()| body),
            status => {
                let retry = status == 429 || status >= 500;
                let said = refusal_text(body).await;
                Err(self.refused(status, retry, &said, &host))
            }
        }
    }

    /// Whether these are bytes of the object that the link was made for.
    fn check(&self, key: &Key, place: &Place, range: &Range<u64>, status: u16, headers: &HeaderMap) -> Result<()> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let another = |why: String| {
            Error::new(Kind::Conflict, format!("object '{key}' is not the one that the link was made for: {why}"))
                .hint("was it replaced, or is a proxy between? have the links made again")
        };
        let tag = plain_tag(text(ETAG.as_str()).map(|tag| tag.trim_start_matches("W/")));
        if !tag.is_empty() && !place.tag.is_empty() && *tag != *place.tag {
            return Err(another(format!("its entity tag is '{tag}' and was '{}'", place.tag)));
        }
        let length = text(CONTENT_LENGTH.as_str()).and_then(|length| length.parse::<u64>().ok());
        let (from, to, size_bytes) = match text(CONTENT_RANGE.as_str()).and_then(parse_content_range) {
            Some(told) if status == 206 => told,
            _ if status == 200 && range.start == 0 => (0, length.unwrap_or(0), length.unwrap_or(0)),
            _ => {
                return Err(Error::new(Kind::Unsupported, "the server ignored the range that was asked for")
                    .hint("is there a proxy that drops 'Range'?"));
            }
        };
        if size_bytes != place.size_bytes {
            return Err(another(format!("it has {size_bytes} bytes and had {}", place.size_bytes)));
        }
        if from != range.start || to < range.end {
            return Err(Error::new(Kind::Unreachable, format!("bytes {from}..{to} came, not {range:?}")));
        }
        Ok(())
    }

    /// Why a server did not give the object.
    fn refused(&self, status: u16, retry: bool, said: &str, host: &str) -> Error {
        let words = match (element(said, "Code"), element(said, "Message")) {
            (None, _) => format!("'{host}' answered with status {status}"),
            (Some(code), message) => {
                format!("'{host}' answered '{code}: {}' (status {status})", message.unwrap_or_default())
            }
        };
        let end = self.header.expires_at;
        let is_over = self.clock.now() >= end;
        let says_so = said.to_ascii_lowercase().contains("expire");
        match status {
            _ if retry => Error::new(Kind::Unreachable, words).hint("the server has a problem, or asks for a pause"),
            400 | 401 | 403 if is_over => {
                Error::new(Kind::Forbidden, format!("the links worked until {}, which is over: {words}", utc_text(end)))
                    .hint("have new ones made: 'keiki backup download INSTANCE BACKUP --link 12h'")
            }
            400 | 401 | 403 if says_so => Error::new(
                Kind::Forbidden,
                format!("the link is over, though it should work until {}: {words}", utc_text(end)),
            )
            .hint("were the agent's credentials temporary, or is the clock of a host wrong? have new ones made"),
            400 | 401 | 403 => Error::new(Kind::Forbidden, words).hint(
                "were the keys that made the links withdrawn? does the server know itself by the name in the links, or \
                 must the agent be told with 'public_endpoint' in [repository]?",
            ),
            404 => Error::new(Kind::Damaged, format!("the object is not there: {words}"))
                .hint("was the backup deleted meanwhile, or is that another server?"),
            416 => Error::new(Kind::Conflict, format!("it is shorter than it was: {words}"))
                .hint("was it replaced? have the links made again"),
            300..400 => Error::new(Kind::BadInput, format!("{words}, which leads elsewhere"))
                .hint("does 'endpoint' or 'public_endpoint' of the agent name the server itself?"),
            _ => Error::new(Kind::BadInput, words).hint("is that the S3 server that the links were made for?"),
        }
    }

    fn read_only(&self, what: &str) -> Error {
        Error::new(Kind::Unsupported, format!("cannot {what} in {}: links are for reading only", self.described))
    }
}

/// Reads a file of links through.
fn read_places(file: &File) -> Result<(LinksHeader, BTreeMap<Key, Place>)> {
    let mut lines = BufReader::with_capacity(LINE_BYTES_MAX, file);
    let mut line = Vec::new();
    let mut at = next_line(&mut lines, &mut line)?;
    let (header, mut parser) = LinksParser::begin(&line)?;
    let mut places = BTreeMap::new();
    loop {
        let length = next_line(&mut lines, &mut line)?;
        if length == 0 {
            break;
        }
        if let Some(LinkLine { key, bytes, etag, .. }) = parser.next(&line)? {
            let place = Place { at, length: line.len(), size_bytes: bytes, tag: etag.into_boxed_str() };
            places.insert(Key::parse(&key)?, place);
        }
        at += length;
    }
    parser.finish()?;
    Ok((header, places))
}

/// The next line with its end; its length, which is 0 at the end of the file.
fn next_line(lines: &mut impl BufRead, line: &mut Vec<u8>) -> Result<u64> {
    line.clear();
    let read = lines.take(LINE_BYTES_MAX as u64).read_until(b'\n', line);
    Ok(read.context(|| "it cannot be read")? as u64)
}

/// The beginning of what a server said instead of giving the object.
async fn refusal_text(mut body: SdkBody) -> String {
    let mut text = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        text.extend_from_slice(&frame.into_data().unwrap_or_default());
        if text.len() >= REFUSAL_BYTES_MAX {
            break;
        }
    }
    text.truncate(REFUSAL_BYTES_MAX);
    String::from_utf8_lossy(&text).into_owned()
}

/// The text of an element of an error document (Amazon S3 API reference, "Error responses"), short and printable.
fn element(document: &str, name: &str) -> Option<String> {
    let (_, rest) = document.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once('<')?;
    Some(text.chars().filter(|letter| !letter.is_control()).take(200).collect::<String>().trim_end_matches('.').into())
}

/// Bytes of a body until there were so many; what comes beyond is not passed on. An error begins with `what`.
fn pieces(body: SdkBody, bytes: u64, what: String) -> ByteStream {
    Box::pin(stream::unfold(Some((body, bytes, what)), |state| async move {
        let (mut body, left, what) = state?;
        loop {
            if left == 0 {
                return None;
            }
            let error = match body.frame().await {
                Some(Ok(frame)) => {
                    let mut piece = frame.into_data().unwrap_or_default();
                    piece.truncate(usize::try_from(left).unwrap_or(usize::MAX).min(piece.len()));
                    if piece.is_empty() {
                        continue;
                    }
                    let left = left - piece.len() as u64;
                    return Some((Ok(piece), Some((body, left, what))));
                }
                Some(Err(error)) => own_error(error.as_ref())
                    .unwrap_or_else(|| Error::new(Kind::Unreachable, format!("the body broke: {error}"))),
                None => Error::new(Kind::Unreachable, format!("the body ended {left} bytes too early")),
            };
            return Some((Err(error.while_doing(what)), None));
        }
    }))
}

#[async_trait]
impl Store for LinksStore {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let place = self.place(key)?;
        let range = range.unwrap_or(0..place.size_bytes);
        let what = || format!("cannot read '{key}' in {}", self.described);
        if range.start > range.end || range.end > place.size_bytes {
            let reason = format!("{}: it has {} bytes, not {range:?}", what(), place.size_bytes);
            return Err(Error::new(Kind::BadInput, reason));
        }
        if range.is_empty() {
            return Ok(Box::pin(stream::empty()));
        }
        let body = self.ask(key, place, &range).await.map_err(|error| error.while_doing(what()))?;
        Ok(pieces(body, range.end - range.start, what()))
    }

    async fn put(&self, key: &Key, _: Bytes, _: PutCondition) -> Result<Tag> {
        Err(self.read_only(&format!("store '{key}'")))
    }

    async fn put_stream(&self, key: &Key, _: ByteStream, _: PutCondition) -> Result<Tag> {
        Err(self.read_only(&format!("store '{key}'")))
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        Ok(self.places.get_key_value(key).map(info))
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        // A prefix and what comes after a text need not be keys; both are compared as text.
        let after = after.filter(|after| *after >= prefix);
        let is_listed = |(key, _): &(&Key, &Place)| {
            key.as_str().starts_with(prefix) && after.is_none_or(|after| key.as_str() > after)
        };
        let begun = self.places.range::<str, _>((Bound::Included(after.unwrap_or(prefix)), Bound::Unbounded));
        let here =
            begun.take_while(|(key, _)| key.as_str() <= after.unwrap_or(prefix) || key.as_str().starts_with(prefix));
        Ok(here.filter(is_listed).take(limit.min(LIST_PAGE_OBJECTS_MAX)).map(info).collect())
    }

    async fn delete(&self, _: &[Key]) -> Result<()> {
        Err(self.read_only("delete objects"))
    }

    fn describe(&self) -> String {
        self.described.clone()
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        Ok(None)
    }

    fn adopt(&self, _: &Capabilities) {}
}

fn info((key, place): (&Key, &Place)) -> ObjectInfo {
    ObjectInfo { key: key.clone(), size_bytes: place.size_bytes, tag: Tag(place.tag.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::SystemClock;
    use crate::format::links::LinksWriter;
    use crate::model::id::{BackupId, IncarnationId};
    use crate::store::read::list_all;
    use futures_util::StreamExt;

    fn store(keys: &[String]) -> LinksStore {
        let now = "2026-11-21T10:00:00Z".parse().unwrap();
        let mut writer = LinksWriter::default();
        let header = LinksHeader {
            keiki: "0.1.0".into(),
            repository: "s3://backups/keiki".into(),
            incarnation: IncarnationId::fresh(),
            backup: BackupId::parse("20261121T095900Z-k3xq").unwrap(),
            backup_ended_at: now,
            made_at: now,
            expires_at: now,
        };
        let mut text = writer.header(&header).unwrap();
        for key in keys {
            let link = LinkLine { key: key.clone(), bytes: 7, etag: "e".into(), url: "https://x/".into() };
            text += &writer.link(&link).unwrap();
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text + &writer.end().unwrap()).unwrap();
        LinksStore::open(file.path(), None, Arc::new(SystemClock)).unwrap()
    }

    #[tokio::test]
    async fn a_listing_has_every_key_below_a_prefix_in_order_from_any_start() {
        // More than a page, in no order, and names before, between and behind those of the prefix.
        let mut keys: Vec<String> = (0..2500).map(|number| format!("a/log/{:05}", number * 7919 % 2500)).collect();
        keys.extend(["a/lo", "a/log.x", "a/logs/1", "a", "b/log/00001", "z"].map(String::from));
        let store = store(&keys);
        keys.sort();
        let starts =
            [None, Some("a/log/01234"), Some("a/log/01234x"), Some(""), Some("a/aa"), Some("a/log/99"), Some("c")];
        for prefix in ["", "a/log/", "a/log", "a/log/012", "b", "nothing", "zz"] {
            for after in starts {
                let pages: Vec<_> = list_all(&store, prefix, after).collect().await;
                let found: Vec<String> =
                    pages.into_iter().flat_map(Result::unwrap).map(|object| object.key.to_string()).collect();
                let wanted =
                    keys.iter().filter(|key| key.starts_with(prefix) && after.is_none_or(|after| key.as_str() > after));
                assert_eq!(found, wanted.cloned().collect::<Vec<_>>(), "{prefix:?} after {after:?}");
            }
        }
        assert_eq!(store.list("a/log/", None, 3).await.unwrap().len(), 3);
    }

    #[test]
    fn what_a_server_says_is_shortened_and_cannot_control_a_terminal() {
        let said = "<Error><Code>AccessDenied</Code><Message>Request has\x1b[31m expired.</Message></Error>";
        assert_eq!(element(said, "Code").unwrap(), "AccessDenied");
        assert_eq!(element(said, "Message").unwrap(), "Request has[31m expired");
        assert_eq!(element("<html>", "Code"), None);
    }
}
