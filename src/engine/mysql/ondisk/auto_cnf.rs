//! `auto.cnf`: the file of MySQL that says which data directory it is.
//!
//! The server makes it with a new UUID when it starts without one (`sql/mysqld.cc`, init_server_auto_options), and a
//! copy by the clone plugin has none.

use crate::error::{Error, Kind, Result};

pub const FILE: &str = "auto.cnf";
const KEY: &str = "server-uuid";

/// The UUID, in lower case with its dashes.
pub fn uuid(bytes: &[u8]) -> Result<String> {
    let text = String::from_utf8_lossy(bytes);
    let mut values = text.lines().filter_map(|line| line.split_once('=')).filter(|(key, _)| key.trim() == KEY);
    let uuid = values.next_back().and_then(|(_, value)| value.trim().parse::<uuid::Uuid>().ok());
    uuid.map(|uuid| uuid.to_string()).ok_or_else(|| {
        Error::new(Kind::Damaged, format!("'{FILE}' has no '{KEY}'")).hint("is 'data_dir' the data directory of MySQL?")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uuid_is_read_and_nothing_else_is_taken_for_one() {
        let text = b"[auto]\nserver-uuid=A9EFA202-e59e-11f1-a868-02fc00000001\n";
        assert_eq!(uuid(text).unwrap(), "a9efa202-e59e-11f1-a868-02fc00000001");
        for bad in [&b""[..], b"[auto]\n", b"server-uuid=\n", b"[auto]\nserver-uuid=x\n", &[0xff; 40]] {
            assert_eq!(uuid(bad).unwrap_err().kind(), Kind::Damaged, "{bad:?}");
        }
    }
}
