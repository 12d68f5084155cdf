//! A file as its content: gzip (RFC 1952) and zstd (RFC 8878) are found by their first bytes, whatever the file is called, and decompressed
//! as it is read. Several members or frames one after the other are one content, as `gzip` and `zstd` write them with `cat`.
//!
//! What is held at once is a buffer and the window of the compression: 32 KiB for gzip, up to [`WINDOW`] for zstd.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use flate2::bufread::GzDecoder;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::error::{DataError, Result};

/// The largest window of a zstd frame that is read, which `zstd -d` takes without being told, too.
const WINDOW: u64 = 128 << 20;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: u32 = 0xfd2f_b528;
/// Frames that hold no content: 16 magic numbers.
const SKIPPED: std::ops::RangeInclusive<u32> = 0x184d_2a50..=0x184d_2a5f;

/// The bytes of a file, some of them looked at before they are read.
struct Source {
    file: BufReader<File>,
    ahead: Vec<u8>,
    used: usize,
    /// bytes read so far
    at: u64,
    /// whether a read has met the end of the file
    ended: bool,
    /// what the system refused: decoders wrap it in words of their own
    refused: Option<io::Error>,
}

impl Source {
    fn refuse(refused: &mut Option<io::Error>, e: io::Error) -> io::Error {
        let again = |e: &io::Error| e.raw_os_error().map_or(e.kind().into(), io::Error::from_raw_os_error);
        if e.kind() != ErrorKind::Interrupted {
            *refused = Some(again(&e));
        }
        e
    }

    /// Up to `n` bytes that are not read yet, fewer at the end.
    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        self.ahead.drain(..std::mem::take(&mut self.used));
        let more = n.saturating_sub(self.ahead.len()) as u64;
        self.file.by_ref().take(more).read_to_end(&mut self.ahead)?;
        Ok(&self.ahead)
    }

    /// The 32 bits that come next, little-endian; `None` where the file ends before.
    fn peek_u32(&mut self) -> io::Result<Option<u32>> {
        let bytes = self.peek(4)?;
        Ok(bytes.get(..4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
    }
}

impl BufRead for Source {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let Source { file, ahead, used, ended, refused, .. } = self;
        if *used < ahead.len() {
            return Ok(&ahead[*used..]);
        }
        let buffer = file.fill_buf().map_err(|e| Source::refuse(refused, e))?;
        *ended |= buffer.is_empty();
        Ok(buffer)
    }

    fn consume(&mut self, n: usize) {
        self.at += n as u64;
        if self.used < self.ahead.len() {
            self.used += n;
        } else {
            self.file.consume(n);
        }
    }
}

impl Read for Source {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let buffer = self.fill_buf()?;
        let n = buffer.len().min(out.len());
        out[..n].copy_from_slice(&buffer[..n]);
        self.consume(n);
        Ok(n)
    }
}

/// Compressed content that is not what it should be; told apart from what the system refuses.
#[derive(Debug)]
struct Damaged(String);

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Damaged {}

enum Coding {
    Plain(Source),
    /// The member that is being read; `None` behind the last.
    Gzip(Option<GzDecoder<Source>>),
    Zstd(Source, Box<FrameDecoder>),
}

/// The content of a file.
pub(super) struct Content {
    coding: Coding,
    /// members or frames begun
    parts: u64,
    /// where the last one began in the file
    from: u64,
    /// bytes of content that a zstd frame has given, and how many its header announces
    given: u64,
    announced: Option<u64>,
}

/// Opens a file.
pub(super) fn open(path: &Path) -> Result<Content> {
    let file = File::open(path).map_err(DataError::io(path, "cannot be read"))?;
    let file = BufReader::with_capacity(1 << 20, file);
    let mut source = Source { file, ahead: Vec::new(), used: 0, at: 0, ended: false, refused: None };
    let head = source.peek(4).map_err(DataError::io(path, "cannot be read"))?.to_vec();
    let first = head.get(..4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let coding = match first {
        _ if head.starts_with(&GZIP) => Coding::Gzip(Some(GzDecoder::new(source))),
        Some(magic) if magic == ZSTD || SKIPPED.contains(&magic) => Coding::Zstd(source, Box::default()),
        _ => Coding::Plain(source),
    };
    let parts = u64::from(matches!(coding, Coding::Gzip(_)));
    Ok(Content { coding, parts, from: 0, given: 0, announced: None })
}

/// The error of a read of a content: damage is the file's, the rest is the system's.
pub(super) fn failed(path: &Path) -> impl FnOnce(io::Error) -> DataError {
    move |e| match e.get_ref().and_then(|inner| inner.downcast_ref::<Damaged>()) {
        Some(Damaged(what)) => DataError::content(path, what.clone()),
        None => DataError::io(path, "cannot be read")(e),
    }
}

impl Content {
    /// Whether the file is compressed.
    pub fn is_compressed(&self) -> bool {
        !matches!(self.coding, Coding::Plain(_))
    }

    /// What was found, to be told: nothing for a file that is no compressed one. After the last byte it knows whether there were several
    /// members or frames.
    pub fn compression(&self) -> &'static str {
        match (&self.coding, self.parts) {
            (Coding::Plain(_), _) => "",
            (Coding::Gzip(_), ..=1) => ", gzip",
            (Coding::Gzip(_), _) => ", gzip of several members",
            (Coding::Zstd(..), ..=1) => ", zstd",
            (Coding::Zstd(..), _) => ", zstd of several frames",
        }
    }

    /// What is wrong with the member or frame that is being read.
    fn damage(&mut self, what: String) -> io::Error {
        let (name, source) = match &mut self.coding {
            Coding::Plain(source) => ("file", source),
            Coding::Gzip(Some(decoder)) => ("gzip member", decoder.get_mut()),
            Coding::Gzip(None) => return io::Error::new(ErrorKind::InvalidData, Damaged(what)),
            Coding::Zstd(source, _) => ("zstd frame", source),
        };
        if let Some(e) = source.refused.take() {
            return e;
        }
        let place = format!("{name} {}, which begins at byte {}", self.parts, self.from);
        let what = match source.ended {
            true => format!("ends within {place}: it was cut off; bring the whole file"),
            false => format!("{place}, cannot be decompressed: {what}; bring an undamaged file"),
        };
        io::Error::new(ErrorKind::InvalidData, Damaged(what))
    }

    /// The next member of a gzip file, if there is one. Zeros behind the last are padding, as for `gzip`.
    fn next_member(&mut self) -> io::Result<bool> {
        let Coding::Gzip(decoder) = &mut self.coding else { return Ok(false) };
        let Some(mut source) = decoder.take().map(GzDecoder::into_inner) else { return Ok(false) };
        let end = source.at;
        loop {
            let buffer = source.fill_buf()?;
            let zeros = buffer.iter().take_while(|&&b| b == 0).count();
            if zeros == 0 {
                break;
            }
            source.consume(zeros);
        }
        let next = source.peek(2)?;
        if next.is_empty() {
            return Ok(false);
        }
        if next != GZIP || source.at != end {
            let at = source.at;
            return Err(self.damage(format!(
                "byte {at}, behind gzip member {}, begins no other member: something was appended or the file is damaged; bring the \
                 whole file",
                self.parts
            )));
        }
        (self.parts, self.from) = (self.parts + 1, source.at);
        self.coding = Coding::Gzip(Some(GzDecoder::new(source)));
        Ok(true)
    }

    fn read_gzip(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let Coding::Gzip(Some(decoder)) = &mut self.coding else { return Ok(0) };
            match decoder.read(out) {
                Ok(0) if self.next_member()? => {}
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                Err(e) => return Err(self.damage(e.to_string())),
            }
        }
    }

    /// Begins the next frame of a zstd file, if there is one.
    fn next_frame(&mut self) -> io::Result<bool> {
        let Coding::Zstd(source, _) = &mut self.coding else { return Ok(false) };
        while let Some(magic) = source.peek_u32()?.filter(|magic| SKIPPED.contains(magic)) {
            let head = source.peek(8)?;
            let length = head.get(4..8).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as u64);
            let (at, length) = (source.at, length.map_or(8, |n| n + 8));
            if io::copy(&mut source.by_ref().take(length), &mut io::sink())? < length {
                (self.parts, self.from) = (self.parts + 1, at);
                return Err(self.damage(format!("{magic:#x} has no content")));
            }
        }
        let (head, at) = (source.peek(18)?.to_vec(), source.at);
        if head.is_empty() {
            return Ok(false);
        }
        let refused = |what: String| Err(io::Error::new(ErrorKind::InvalidData, Damaged(what)));
        if !head.iter().zip(ZSTD.to_le_bytes()).all(|(found, expected)| *found == expected) {
            let behind = self.parts;
            return refused(format!(
                "byte {at}, behind zstd frame {behind}, begins no other frame: something was appended or the file is damaged; bring the \
                 whole file"
            ));
        }
        (self.parts, self.from) = (self.parts + 1, at);
        (self.given, self.announced) = (0, content_size(&head));
        match window(&head) {
            Some(bytes) if bytes > WINDOW => {
                return refused(format!(
                    "zstd frame {}, which begins at byte {at}, has a window of {} MB, above the {} MB that are read; compress it again \
                     without --long",
                    self.parts,
                    bytes >> 20,
                    WINDOW >> 20
                ));
            }
            Some(_) => {}
            None => source.ended |= head.len() < 18,
        }
        let mut decoder = Box::new(FrameDecoder::new());
        if let Err(e) = decoder.reset(&mut *source) {
            return Err(self.damage(e.to_string()));
        }
        self.coding = match std::mem::replace(&mut self.coding, Coding::Gzip(None)) {
            Coding::Zstd(source, _) => Coding::Zstd(source, decoder),
            other => other,
        };
        Ok(true)
    }

    fn read_zstd(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let Coding::Zstd(source, decoder) = &mut self.coding else { return Ok(0) };
            if self.parts > 0 && decoder.can_collect() > 0 {
                let n = decoder.read(out)?;
                self.given += n as u64;
                return Ok(n);
            }
            if self.parts > 0 && !decoder.is_finished() {
                if let Err(e) = decoder.decode_blocks(source, BlockDecodingStrategy::UptoBlocks(1)) {
                    return Err(self.damage(e.to_string()));
                }
                continue;
            }
            let told = if self.parts > 0 { decoder.get_checksum_from_data() } else { None };
            if told.is_some() && told != decoder.get_calculated_checksum() {
                return Err(self.damage("the content does not match its checksum".into()));
            }
            if self.parts > 0 && self.announced.is_some_and(|n| n != self.given) {
                let (given, announced) = (self.given, self.announced.unwrap_or(0));
                return Err(self.damage(format!("it holds {given} bytes, its header announces {announced}")));
            }
            if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}

impl Read for Content {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        match &mut self.coding {
            Coding::Plain(source) => source.read(out),
            Coding::Gzip(_) => self.read_gzip(out),
            Coding::Zstd(..) => self.read_zstd(out),
        }
    }
}

/// Bytes of the window that a zstd frame asks for, from its header; `None` where that is none (RFC 8878, 3.1.1.1).
fn window(head: &[u8]) -> Option<u64> {
    let &[_, _, _, _, descriptor, ..] = head else { return None };
    if descriptor & 0x20 == 0 {
        let &byte = head.get(5)?;
        let base = 1u64 << (10 + (byte >> 3));
        return Some(base + base / 8 * u64::from(byte & 7));
    }
    // a single segment: the window is the content
    content_size(head)
}

/// Bytes of the content of a zstd frame, where its header says so (RFC 8878, 3.1.1.1.4).
fn content_size(head: &[u8]) -> Option<u64> {
    let &[_, _, _, _, descriptor, ..] = head else { return None };
    let single = descriptor & 0x20 != 0;
    let from = 5 + usize::from(!single) + [0, 1, 2, 4][usize::from(descriptor & 3)];
    let bytes = [usize::from(single), 2, 4, 8][usize::from(descriptor >> 6)];
    if bytes == 0 {
        return None;
    }
    let field = head.get(from..from + bytes)?;
    let size = field.iter().rev().fold(0u64, |sum, &b| sum << 8 | u64::from(b));
    Some(if bytes == 2 { size + 256 } else { size })
}

#[cfg(test)]
mod tests;
