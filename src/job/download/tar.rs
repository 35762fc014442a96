//! A tar stream: ustar, with extended headers where a name or a size does not fit (POSIX.1-2017, "pax", sections "ustar
//! Interchange Format" and "pax Extended Header").
//!
//! The two blocks of zeros that end an archive are written by `finish` only, so a stream that was cut off is noticed by
//! whatever reads it.

use std::io::Write;

use super::Output;
use crate::error::{Context, Error, Kind, Result};

const BLOCK_BYTES: usize = 512;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// What eleven octal digits hold.
const SIZE_MAX: u64 = 0o77_777_777_777;
const NAME_BYTES_MAX: usize = 100;

/// What is done with the stream when it is complete.
type Finish = Box<dyn FnOnce(&mut dyn Write) -> Result<()> + Send>;

/// See the module.
pub struct TarOutput {
    to: Box<dyn Write + Send>,
    /// Seconds since 1970, for all entries: the time of the backup.
    modified_at: u64,
    left_bytes: u64,
    file_bytes: u64,
    finish: Option<Finish>,
}

impl TarOutput {
    /// A stream into `to`. `finish` is called when everything was written and flushed.
    pub fn new(to: Box<dyn Write + Send>, modified_at: u64, finish: Finish) -> TarOutput {
        TarOutput { to, modified_at, left_bytes: 0, file_bytes: 0, finish: Some(finish) }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).context(|| "cannot write the tar stream")
    }

    fn put_zeros(&mut self, mut bytes: u64) -> Result<()> {
        while bytes > 0 {
            let some = bytes.min(ZEROS.len() as u64);
            self.put(&ZEROS[..some as usize])?;
            bytes -= some;
        }
        Ok(())
    }

    fn entry(&mut self, kind: u8, path: &str, mode: u32, bytes: u64, link: &str) -> Result<()> {
        let mut records = Vec::new();
        if path.len() > NAME_BYTES_MAX {
            records.extend(pax_record("path", path));
        }
        if link.len() > NAME_BYTES_MAX {
            records.extend(pax_record("linkpath", link));
        }
        if bytes > SIZE_MAX {
            records.extend(pax_record("size", &bytes.to_string()));
        }
        if !records.is_empty() {
            let header = header(b'x', "PaxHeaders/keiki", 0o644, records.len() as u64, "", self.modified_at);
            self.put(&header)?;
            self.put(&records)?;
            self.put_zeros(padding(records.len() as u64))?;
        }
        let header = header(kind, path, mode, bytes.min(SIZE_MAX), link, self.modified_at);
        self.put(&header)
    }

    fn count(&mut self, bytes: u64) -> Result<()> {
        self.left_bytes = self
            .left_bytes
            .checked_sub(bytes)
            .ok_or_else(|| Error::new(Kind::Internal, "a file is longer than was said"))?;
        Ok(())
    }
}

/// How many bytes complete the last block.
fn padding(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES as u64) - bytes
}

/// `<length of all of this> <keyword>=<value>\n`
fn pax_record(keyword: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {keyword}={value}\n");
    let mut length = rest.len() + 1;
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    format!("{length}{rest}").into_bytes()
}

fn header(kind: u8, path: &str, mode: u32, bytes: u64, link: &str, modified_at: u64) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    let mut set = |at: usize, text: &[u8]| {
        let room = &mut block[at..];
        room[..text.len()].copy_from_slice(text);
    };
    // What does not fit is in an extended header.
    let cut = |text: &str| text.as_bytes()[..text.len().min(NAME_BYTES_MAX)].to_vec();
    set(0, &cut(path));
    set(100, format!("{:07o}", mode & 0o7777).as_bytes());
    set(108, b"0000000");
    set(116, b"0000000");
    set(124, format!("{bytes:011o}").as_bytes());
    set(136, format!("{:011o}", modified_at.min(SIZE_MAX)).as_bytes());
    set(156, &[kind]);
    set(157, &cut(link));
    set(257, b"ustar\x0000");
    // The sum is made with blanks in its own place.
    set(148, b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

impl Output for TarOutput {
    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(b'5', &format!("{path}/"), mode, 0, "")
    }

    fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.entry(b'2', path, 0o777, 0, to)
    }

    fn begin_file(&mut self, path: &str, mode: u32, bytes: u64) -> Result<()> {
        (self.left_bytes, self.file_bytes) = (bytes, bytes);
        self.entry(b'0', path, mode, bytes, "")
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.count(bytes.len() as u64)?;
        self.put(bytes)
    }

    fn hole(&mut self, bytes: u64) -> Result<()> {
        self.count(bytes)?;
        self.put_zeros(bytes)
    }

    fn end_file(&mut self) -> Result<()> {
        if self.left_bytes > 0 {
            return Err(Error::new(Kind::Internal, "a file is shorter than was said"));
        }
        self.put_zeros(padding(self.file_bytes))
    }

    fn finish(&mut self) -> Result<()> {
        self.put_zeros(2 * BLOCK_BYTES as u64)?;
        self.to.flush().context(|| "cannot write the tar stream")?;
        match self.finish.take() {
            Some(finish) => finish(self.to.as_mut()),
            None => Ok(()),
        }
    }
}
