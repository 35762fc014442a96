//! One event of the fake engine's log, as 64 bytes.

use jiff::Timestamp;

use crate::error::{Error, Kind, Result};

pub const RECORD_BYTES: usize = 64;
const NAME_BYTES_MAX: usize = 34;

/// An event: the `index`th, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub index: u64,
    pub at: Timestamp,
    pub value: u64,
    /// Set for a named point.
    pub name: Option<String>,
}

impl Event {
    /// index, microseconds, value: 8 bytes each, little endian; length of the name; the name; CRC-32C of all that.
    pub fn encode(&self) -> Result<[u8; RECORD_BYTES]> {
        let name = self.name.as_deref().unwrap_or_default().as_bytes();
        if name.len() > NAME_BYTES_MAX {
            return Err(Error::new(Kind::BadInput, "the name of the point is too long"));
        }
        let mut bytes = [0u8; RECORD_BYTES];
        bytes[0..8].copy_from_slice(&self.index.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.at.as_microsecond().to_le_bytes());
        bytes[16..24].copy_from_slice(&self.value.to_le_bytes());
        bytes[24] = u8::from(self.name.is_some());
        bytes[25] = name.len() as u8;
        bytes[26..26 + name.len()].copy_from_slice(name);
        let crc = checksum(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// Reads a record and checks that it is event number `index`.
    pub fn decode(bytes: &[u8], index: u64) -> Result<Event> {
        let damaged = |why: &str| Error::new(Kind::Damaged, format!("event {index} of the log is damaged: {why}"));
        let bytes: &[u8; RECORD_BYTES] = bytes.try_into().map_err(|_| damaged("it is cut off"))?;
        let word = |at: usize| {
            let mut word = [0u8; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            word
        };
        if bytes[60..] != checksum(&bytes[..60]).to_le_bytes() {
            return Err(damaged("its checksum is wrong"));
        }
        if u64::from_le_bytes(word(0)) != index {
            return Err(damaged("another event is in its place"));
        }
        let length = usize::from(bytes[25]).min(NAME_BYTES_MAX);
        let name = (bytes[24] == 1).then(|| String::from_utf8_lossy(&bytes[26..26 + length]).into_owned());
        Ok(Event {
            index,
            at: Timestamp::from_microsecond(i64::from_le_bytes(word(8))).map_err(|_| damaged("its time is wrong"))?,
            value: u64::from_le_bytes(word(16)),
            name,
        })
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    // The function returns 64 bits for every algorithm; a 32-bit checksum fills the lower half.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}
