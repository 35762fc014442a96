//! The `tablespace_map` file: where the links in `pg_tblspc` point.
//!
//! One line per tablespace, its id, a space and the path, in which line ends and backslashes are escaped by a
//! backslash (`src/backend/access/transam/xlog.c`, do_pg_backup_start; read_tablespace_map in `xlogrecovery.c`). The
//! server that finds the file makes the links itself and renames the file to `tablespace_map.old`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};

/// One tablespace of a base backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// The id, which is the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// The directory that the link points to.
    pub path: PathBuf,
}

/// Reads the file. A line without an id or with an empty path, an id that occurs twice and an unfinished last line
/// are `Damaged`.
pub fn parse(content: &[u8]) -> Result<Vec<Tablespace>> {
    let mut tablespaces: Vec<Tablespace> = Vec::new();
    let mut line = Vec::new();
    let mut escaped = false;
    for &byte in content {
        match byte {
            b'\\' if !escaped => {
                escaped = true;
                continue;
            }
            b'\n' | b'\r' if !escaped => {
                // A line end of two characters leaves an empty line behind, as it does in the server.
                if !line.is_empty() {
                    let tablespace = parse_line(&line)?;
                    if tablespaces.iter().any(|other| other.oid == tablespace.oid) {
                        return Err(damaged(&format!("tablespace {} occurs twice", tablespace.oid)));
                    }
                    tablespaces.push(tablespace);
                    line.clear();
                }
            }
            _ => line.push(byte),
        }
        escaped = false;
    }
    if line.is_empty() && !escaped { Ok(tablespaces) } else { Err(damaged("its last line is unfinished")) }
}

/// The content of the file for these tablespaces.
pub fn render(tablespaces: &[Tablespace]) -> Vec<u8> {
    let mut content = Vec::new();
    for tablespace in tablespaces {
        content.extend_from_slice(format!("{} ", tablespace.oid).as_bytes());
        for &byte in tablespace.path.as_os_str().as_bytes() {
            if matches!(byte, b'\n' | b'\r' | b'\\') {
                content.push(b'\\');
            }
            content.push(byte);
        }
        content.push(b'\n');
    }
    content
}

/// A line whose escapes have been taken off.
fn parse_line(line: &[u8]) -> Result<Tablespace> {
    let space = line.iter().position(|byte| *byte == b' ').ok_or_else(|| damaged("a line has no path"))?;
    let (oid, path) = (&line[..space], &line[space + 1..]);
    let oid = std::str::from_utf8(oid)
        .ok()
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok())
        .filter(|oid| *oid > 0)
        .ok_or_else(|| damaged("a line does not begin with the id of a tablespace"))?;
    if path.is_empty() || path.contains(&0) {
        return Err(damaged(&format!("the path of tablespace {oid} is not a path")));
    }
    Ok(Tablespace { oid, path: PathBuf::from(OsString::from_vec(path.to_vec())) })
}

fn damaged(why: &str) -> Error {
    Error::new(Kind::Damaged, format!("tablespace map cannot be read: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tablespace(oid: u32, path: &str) -> Tablespace {
        Tablespace { oid, path: PathBuf::from(path) }
    }

    #[test]
    fn paths_with_spaces_backslashes_and_line_ends_survive() {
        let list = [tablespace(16385, "/srv/a b"), tablespace(16386, "/srv/\\n\n\r/x\\")];
        let text = render(&list);
        assert_eq!(text, b"16385 /srv/a b\n16386 /srv/\\\\n\\\n\\\r/x\\\\\n");
        assert_eq!(parse(&text).unwrap(), list);
        assert!(parse(b"").unwrap().is_empty());
        assert_eq!(parse(b"1 /x\r\n").unwrap(), [tablespace(1, "/x")]);
    }

    #[test]
    fn broken_maps_are_refused() {
        for bad in [
            &b"16385\n"[..],
            b"x /a\n",
            b"+1 /a\n",
            b"0 /a\n",
            b"1 /a",
            b"1 \n",
            b"1 /a\\",
            b"1 /a\n1 /b\n",
            b"1 /a\0b\n",
        ] {
            assert_eq!(parse(bad).unwrap_err().kind(), Kind::Damaged, "{:?}", String::from_utf8_lossy(bad));
        }
    }

    proptest! {
        #[test]
        fn rendered_maps_read_back(paths in prop::collection::vec("[^\0]{1,30}", 0..5)) {
            let list: Vec<Tablespace> = paths.iter().zip(1u32..).map(|(path, oid)| tablespace(oid, path)).collect();
            prop_assert_eq!(parse(&render(&list)).unwrap(), list);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
        }
    }
}
