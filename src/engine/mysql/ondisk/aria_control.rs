//! `aria_log_control`: the file of MariaDB that says which data directory it is.
//!
//! MariaDB gives its data directory no identifier of its own, but Aria, the engine of the system tables, makes a UUID
//! when it makes its log, and writes it here (`storage/maria/ma_control_file.c`: three bytes of magic, one byte of
//! version, then the UUID). A physical copy has its parent's.

use crate::error::{Error, Kind, Result};

pub const FILE: &str = "aria_log_control";

const MAGIC: [u8; 3] = [0xfe, 0xfe, 0x0c];
const UUID_AT: usize = 4;
const UUID_BYTES: usize = 16;

/// The UUID, in lower-case hexadecimal digits.
pub fn uuid(bytes: &[u8]) -> Result<String> {
    let uuid = bytes.get(UUID_AT..UUID_AT + UUID_BYTES).filter(|_| bytes.starts_with(&MAGIC));
    let uuid = uuid.filter(|uuid| uuid.iter().any(|byte| *byte != 0)).ok_or_else(|| {
        Error::new(Kind::Damaged, format!("'{FILE}' is not a control file of Aria"))
            .hint("is 'data_dir' the data directory of MariaDB?")
    })?;
    Ok(uuid.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uuid_stands_behind_magic_and_version_and_other_files_have_none() {
        let mut bytes = vec![0xfe, 0xfe, 0x0c, 1];
        bytes.extend(0x10u8..0x20);
        bytes.extend([0x1e, 0]);
        assert_eq!(uuid(&bytes).unwrap(), "101112131415161718191a1b1c1d1e1f");
        for bad in
            [&bytes[..19], &[0; 40][..], b"", &[0xfe, 0xfe, 0x0c, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
        {
            assert_eq!(uuid(bad).unwrap_err().kind(), Kind::Damaged, "{bad:?}");
        }
    }
}
