//! Packets of the client/server protocol: greeting, log-in, text answers. Pure.
//!
//! Sources: MariaDB knowledge base, "Clients & Server protocol"; MySQL internals manual, "Client/Server Protocol".

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};

use crate::error::{Error, Kind, Result};

/// The greatest content of one packet.
pub const PACKET_BYTES_MAX: usize = (1 << 24) - 1;
pub const COM_QUERY: u8 = 3;

const PROTOCOL_VERSION: u8 = 10;
/// LONG_PASSWORD, LONG_FLAG, PROTOCOL_41, TRANSACTIONS, SECURE_CONNECTION, PLUGIN_AUTH.
const CAPABILITIES: u32 = 1 | 4 | 0x200 | 0x2000 | 0x8000 | 0x8_0000;
const CAPABILITY_PLUGIN_AUTH: u32 = 0x8_0000;
const UTF8MB4: u8 = 45;

const NATIVE: &str = "mysql_native_password";
const CACHING_SHA2: &str = "caching_sha2_password";

const OK: u8 = 0x00;
const MORE_DATA: u8 = 0x01;
const LOCAL_INFILE: u8 = 0xfb;
const END_OR_SWITCH: u8 = 0xfe;
const ERROR: u8 = 0xff;

/// What a server says first.
#[derive(Debug, PartialEq, Eq)]
pub struct Greeting {
    pub version: String,
    nonce: Vec<u8>,
    plugin: String,
}

/// What a log-in goes on with.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    Done,
    Wait,
    Send(Vec<u8>),
}

pub fn not_the_protocol() -> Error {
    Error::new(Kind::Server, "the answer is not the protocol of MariaDB or MySQL")
        .hint("is 'socket' of the instance the socket of a database server?")
}

/// Takes bytes from the front of a packet.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(count).ok_or_else(not_the_protocol)?;
        self.0 = later;
        Ok(now)
    }

    fn number(&mut self, bytes: usize) -> Result<u64> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn until_nul(&mut self) -> &'a [u8] {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        let text = &self.0[..end];
        self.0 = self.0.get(end + 1..).unwrap_or_default();
        text
    }

    fn length(&mut self) -> Result<u64> {
        match self.number(1)? {
            0xfc => self.number(2),
            0xfd => self.number(3),
            0xfe => self.number(8),
            0xff => Err(not_the_protocol()),
            small => Ok(small),
        }
    }

    fn text(&mut self) -> Result<String> {
        let length = usize::try_from(self.length()?).map_err(|_| not_the_protocol())?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }
}

impl Greeting {
    pub fn parse(packet: &[u8]) -> Result<Greeting> {
        if packet.first() == Some(&ERROR) {
            return Err(server_error(packet));
        }
        let mut reader = Reader(packet);
        if reader.number(1)? != u64::from(PROTOCOL_VERSION) {
            return Err(not_the_protocol());
        }
        let version = String::from_utf8_lossy(reader.until_nul()).into_owned();
        reader.take(4)?;
        let mut nonce = reader.take(8)?.to_vec();
        reader.take(1)?;
        let low = reader.number(2)?;
        reader.take(3)?;
        let capabilities = low | reader.number(2)? << 16;
        let nonce_bytes = reader.number(1)? as usize;
        reader.take(10)?;
        // The rest of 20 bytes and a NUL, which is not part of it.
        nonce.extend_from_slice(reader.take(nonce_bytes.saturating_sub(8).max(13))?);
        nonce.truncate(20);
        let has_plugin = capabilities & u64::from(CAPABILITY_PLUGIN_AUTH) != 0;
        let plugin = if has_plugin { String::from_utf8_lossy(reader.until_nul()).into_owned() } else { NATIVE.into() };
        // MariaDB 10 puts this in front of its number, for old replicas.
        let version = version.strip_prefix("5.5.5-").map(str::to_string).unwrap_or(version);
        Ok(Greeting { version, nonce, plugin })
    }

    /// The packet that logs in: in the way that the server offers first, which it may change.
    pub fn answer(&self, user: &str, password: Option<&str>) -> Vec<u8> {
        let proof = proof(&self.plugin, &self.nonce, password).unwrap_or_default();
        let mut packet = CAPABILITIES.to_le_bytes().to_vec();
        packet.extend((PACKET_BYTES_MAX as u32).to_le_bytes());
        packet.push(UTF8MB4);
        packet.extend([0; 23]);
        packet.extend(user.as_bytes());
        packet.push(0);
        packet.push(proof.len() as u8);
        packet.extend(proof);
        packet.extend(self.plugin.as_bytes());
        packet.push(0);
        packet
    }
}

/// What proves that we know the password; nothing for a plugin that is not known.
fn proof(plugin: &str, nonce: &[u8], password: Option<&str>) -> Option<Vec<u8>> {
    let password = password.unwrap_or_default().as_bytes();
    let xor = |one: &[u8], other: &[u8]| one.iter().zip(other).map(|(one, other)| one ^ other).collect();
    match plugin {
        NATIVE | CACHING_SHA2 if password.is_empty() => Some(Vec::new()),
        NATIVE => {
            let once = digest(&SHA1_FOR_LEGACY_USE_ONLY, password);
            let twice = digest(&SHA1_FOR_LEGACY_USE_ONLY, once.as_ref());
            let salted = digest(&SHA1_FOR_LEGACY_USE_ONLY, &[nonce, twice.as_ref()].concat());
            Some(xor(once.as_ref(), salted.as_ref()))
        }
        CACHING_SHA2 => {
            let once = digest(&SHA256, password);
            let twice = digest(&SHA256, once.as_ref());
            let salted = digest(&SHA256, &[twice.as_ref(), nonce].concat());
            Some(xor(once.as_ref(), salted.as_ref()))
        }
        // The server looks at who owns the other end of the socket.
        "unix_socket" | "auth_socket" => Some(Vec::new()),
        _ => None,
    }
}

/// What to do about a packet of the log-in. `plugin` remembers which one the server asked for.
pub fn reply_to_log_in(packet: &[u8], plugin: &mut String, password: Option<&str>) -> Result<Reply> {
    match packet.first() {
        Some(&OK) => Ok(Reply::Done),
        Some(&ERROR) => Err(server_error(packet)),
        Some(&END_OR_SWITCH) => {
            let mut reader = Reader(&packet[1..]);
            *plugin = String::from_utf8_lossy(reader.until_nul()).into_owned();
            let nonce = reader.0.strip_suffix(&[0]).unwrap_or(reader.0);
            proof(plugin, nonce, password).map(Reply::Send).ok_or_else(|| {
                Error::new(Kind::Unsupported, format!("the account logs in by '{plugin}', which keiki does not know"))
                    .hint("give it a password of mysql_native_password or caching_sha2_password, or unix_socket")
            })
        }
        // caching_sha2_password: 3 means that the proof was good; 4 asks for the password itself, which may travel
        // over a unix socket.
        Some(&MORE_DATA) => match packet.get(1) {
            Some(3) => Ok(Reply::Wait),
            Some(4) => Ok(Reply::Send([password.unwrap_or_default().as_bytes(), &[0]].concat())),
            _ => Err(not_the_protocol()),
        },
        _ => Err(not_the_protocol()),
    }
}

/// The number of columns of an answer; nothing for a statement without result.
pub fn first_answer(packet: &[u8]) -> Result<Option<usize>> {
    match packet.first() {
        Some(&OK) => Ok(None),
        Some(&ERROR) => Err(server_error(packet)),
        Some(&LOCAL_INFILE) | None => Err(not_the_protocol()),
        Some(_) => {
            let count = Reader(packet).length()?;
            // MAX_FIELDS of the server is 4096.
            usize::try_from(count).ok().filter(|count| *count <= 4096).map(Some).ok_or_else(not_the_protocol)
        }
    }
}

/// Catalogue, schema, table, original table, name.
pub fn column_name(packet: &[u8]) -> Result<String> {
    let mut reader = Reader(packet);
    for _ in 0..4 {
        reader.text()?;
    }
    reader.text()
}

pub fn is_end(packet: &[u8]) -> bool {
    packet.first() == Some(&END_OR_SWITCH) && packet.len() < 9
}

pub fn row(packet: &[u8], columns: usize) -> Result<Vec<Option<String>>> {
    if packet.first() == Some(&ERROR) {
        return Err(server_error(packet));
    }
    let mut reader = Reader(packet);
    let mut values = Vec::with_capacity(columns.min(packet.len()));
    for _ in 0..columns {
        if reader.0.first() == Some(&0xfb) {
            reader.take(1)?;
            values.push(None);
        } else {
            values.push(Some(reader.text()?));
        }
    }
    Ok(values)
}

/// What the server said, as our error. Numbers: MariaDB knowledge base, "MariaDB Error Codes".
fn server_error(packet: &[u8]) -> Error {
    let mut reader = Reader(packet.get(1..).unwrap_or_default());
    let number = reader.number(2).unwrap_or(0);
    let text = String::from_utf8_lossy(reader.0);
    let text = match text.strip_prefix('#') {
        Some(with_state) => with_state.get(5..).unwrap_or_default(),
        None => &text,
    };
    let (kind, hint) = match number {
        1045 | 1698 | 1044 | 1130 => (
            Kind::Forbidden,
            "does the account of 'user' exist, and may it log in by unix_socket or with the password in 'password_file'?",
        ),
        // Whoever asked knows which right it takes.
        1227 | 1142 | 1290 => (Kind::Forbidden, ""),
        1040 | 1203 | 1226 => {
            (Kind::Unreachable, "all connections are taken: raise max_connections or close idle ones")
        }
        1053 | 1077..=1080 | 1927 => (Kind::Unreachable, "was the server stopped? its log says why"),
        _ => (Kind::Server, ""),
    };
    let error = Error::new(kind, format!("the server says '{}' (error {number})", text.trim()));
    if hint.is_empty() { error } else { error.hint(hint) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As MariaDB 10.11 sends it.
    fn greeting() -> Vec<u8> {
        let mut packet = vec![10];
        packet.extend(b"5.5.5-10.11.19-MariaDB-log\0");
        packet.extend([1, 0, 0, 0]);
        packet.extend(b"abcdefgh\0");
        packet.extend([0xfe, 0xf7, 45, 2, 0, 0xff, 0x81, 21]);
        packet.extend([0; 10]);
        packet.extend(b"ijklmnopqrst\0");
        packet.extend(b"mysql_native_password\0");
        packet
    }

    #[test]
    fn the_greeting_of_mariadb_is_read_without_the_prefix_for_old_replicas() {
        let greeting = Greeting::parse(&greeting()).unwrap();
        assert_eq!(greeting.version, "10.11.19-MariaDB-log");
        assert_eq!((greeting.nonce.as_slice(), greeting.plugin.as_str()), (&b"abcdefghijklmnopqrst"[..], NATIVE));
        let answer = greeting.answer("keiki", None);
        assert!(answer[32..].starts_with(b"keiki\0\0mysql_native_password\0"));
    }

    #[test]
    fn an_error_of_the_log_in_says_what_to_look_at() {
        let mut packet = vec![ERROR, 0xa2, 0x06];
        packet.extend(b"#28000Access denied for user 'x'@'localhost'");
        let error = reply_to_log_in(&packet, &mut String::new(), None).unwrap_err();
        assert_eq!(error.kind(), Kind::Forbidden);
        assert_eq!(error.message(), "the server says 'Access denied for user 'x'@'localhost'' (error 1698)");
        let switch = [&[END_OR_SWITCH][..], b"client_ed25519\0xxxx\0"].concat();
        assert_eq!(reply_to_log_in(&switch, &mut String::new(), None).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn a_row_has_text_and_nulls() {
        assert_eq!(row(&[0xfb, 1, b'x', 0], 3).unwrap(), [None, Some("x".into()), Some(String::new())]);
        assert!(row(&[9, b'x'], 1).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_value_or_an_error(packet in prop::collection::vec(any::<u8>(), 0..80), columns in 0usize..9) {
            let _ = Greeting::parse(&packet);
            let _ = reply_to_log_in(&packet, &mut String::new(), Some("x"));
            let _ = first_answer(&packet);
            let _ = column_name(&packet);
            let _ = row(&packet, columns);
        }
    }
}
