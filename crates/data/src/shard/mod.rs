//! Token shards: one header, then tokens, the document index and, for validation, the bytes of text behind each token.
//! Little-endian throughout.
//!
//! | byte | holds |
//! |---|---|
//! | 0 | magic `DASHTOKS` |
//! | 8 | u32 version: 2; of version 1, which had no text bytes, byte 36 is zero |
//! | 12 | u32 bytes of a token (2 or 4) |
//! | 16 | u64 number of tokens |
//! | 24 | u64 number of documents |
//! | 32 | u32 vocabulary size |
//! | 36 | u32 1 if there are text bytes, else 0 |
//! | 40 | u128 hash of the tokenizer.json |
//! | 56 | u64 xxh3 of everything after the header |
//! | 64 | u64 xxh3 of bytes 0 to 64 |
//! | 72 | tokens, zero-padded to a multiple of 8 bytes, then the start of each document as u64, then the text bytes of each token as u32 |
//!
//! The text bytes of a token are those of the original text that end with it and did not end with a token before: over a document
//! they add up to its size, whatever the tokenizer drops, merges or normalises.

mod series;
mod stamp;
#[cfg(test)]
mod tests;
mod write;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{DataError, Result};
pub(crate) use series::{ShardSeries, shard_path};
pub use write::ShardWriter;

const MAGIC: &[u8; 8] = b"DASHTOKS";
const VERSION: u32 = 2;
const HEADER: usize = 72;

/// Larger files are mapped; smaller ones are read, so that nothing that happens to the file later can be seen here.
const MAP_ABOVE: u64 = 64 << 20;

/// Tokens that one pass over a shard has in memory at a time.
const PIECE: usize = 1 << 20;

/// The bytes of a shard.
enum Content {
    Read(Vec<u8>),
    Mapped(memmap2::Mmap),
}

impl std::ops::Deref for Content {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Content::Read(bytes) => bytes,
            Content::Mapped(map) => map,
        }
    }
}

impl Content {
    /// Takes a range of a mapped file out of this process's memory; who looks again has it read again. Each page that was looked at
    /// counts as the process's own, so that one pass over all shards would take as much memory as the corpus has.
    fn let_go(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Content::Mapped(map) = self {
            // SAFETY: nothing is lost: the map is shared and never written, so its pages are those of the file.
            // Where the system refuses, they stay until it needs the memory.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// A verified shard.
pub struct Shard {
    path: PathBuf,
    content: Content,
    width: usize,
    tokens: usize,
    documents: usize,
    counted: bool,
    vocab: u32,
    tokenizer: u128,
}

fn u32_at(x: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(x[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(x: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(x[at..at + 8].try_into().expect("eight bytes"))
}

/// Where the sections end: (tokens with padding, document index, whole file). `None` beyond what a file can have.
fn sections(tokens: usize, width: usize, documents: usize, counted: bool) -> Option<(usize, usize, usize)> {
    let tokens_end = tokens.checked_mul(width)?.checked_next_multiple_of(8)?.checked_add(HEADER)?;
    let index_end = documents.checked_mul(8)?.checked_add(tokens_end)?;
    let counts = if counted { tokens.checked_mul(4)? } else { 0 };
    Some((tokens_end, index_end, index_end.checked_add(counts)?))
}

/// The whole file, in memory or mapped.
fn load(path: &Path) -> Result<(Content, std::fs::Metadata)> {
    let mut file = File::open(path).map_err(DataError::io(path, "cannot be opened"))?;
    let metadata = file.metadata().map_err(DataError::io(path, "cannot be examined"))?;
    let content = if metadata.len() > MAP_ABOVE {
        // SAFETY: shards appear by rename and nothing here writes one again. Whoever else does so while it is mapped is the price of
        // a map, which Rust cannot rule out: a truncated file is a bus error, a modified one is a data race on this slice, that is,
        // undefined behaviour. Files up to MAP_ABOVE are read instead, where neither can happen.
        Content::Mapped(unsafe { memmap2::Mmap::map(&file) }.map_err(DataError::io(path, "cannot be mapped"))?)
    } else {
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        file.read_to_end(&mut bytes).map_err(DataError::io(path, "cannot be read"))?;
        Content::Read(bytes)
    };
    Ok((content, metadata))
}

impl Shard {
    /// Opens a shard. Header and size are checked every time; checksum and range of every token only where no stamp (`FILE.verified`)
    /// says that this file, by size and time of change, was found whole before. A stamp is left after the first check.
    ///
    /// # Errors
    /// Names the file and what does not fit; preparing the data again is always a remedy.
    pub fn open(path: &Path) -> Result<Self> {
        let (content, metadata) = load(path)?;
        let shard = Self::with_header(path, content)?;
        let header = u64_at(&shard.content, 64);
        if !stamp::holds(path, &metadata, header) {
            shard.verify()?;
            stamp::leave(path, &metadata, header);
        }
        Ok(shard)
    }

    /// A shard from the bytes of its file, checked in full; `origin` names it in messages.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub fn parse(bytes: Vec<u8>, origin: &Path) -> Result<Self> {
        let shard = Self::with_header(origin, Content::Read(bytes))?;
        shard.verify()?;
        Ok(shard)
    }

    fn bad(path: &Path, what: impl std::fmt::Display) -> DataError {
        DataError::content(path, format!("{what}; delete its folder to have it prepared again"))
    }

    /// Checks what takes no pass over the content.
    fn with_header(path: &Path, content: Content) -> Result<Self> {
        let bad = |what: String| Err(Self::bad(path, what));
        let x: &[u8] = &content;
        if x.len() < HEADER || &x[..8] != MAGIC {
            return bad(format!("is no token shard ({} bytes, expected to start with DASHTOKS)", x.len()));
        }
        if xxh3_64(&x[..64]) != u64_at(x, 64) {
            return bad("the header does not match its checksum".into());
        }
        let (version, width, counted) = (u32_at(x, 8), u32_at(x, 12) as usize, u32_at(x, 36));
        if !(version == VERSION && counted <= 1 || version == 1 && counted == 0) || !(width == 2 || width == 4) {
            return bad(format!(
                "is version {version} with {width} bytes a token, expected version 1 or {VERSION} with 2 or 4"
            ));
        }
        let (tokens, documents, counted) = (u64_at(x, 16), u64_at(x, 24), counted == 1);
        let sizes = usize::try_from(tokens).ok().zip(usize::try_from(documents).ok());
        let expected = sizes.and_then(|(t, d)| sections(t, width, d, counted));
        match expected {
            Some((_, _, end)) if end == x.len() => {}
            _ => {
                let announced = expected.map_or("more than a file can have".into(), |(_, _, end)| end.to_string());
                return bad(format!(
                    "has {} bytes, its header announces {announced}: it is truncated or was changed",
                    x.len()
                ));
            }
        }
        let (vocab, tokenizer) = (u32_at(x, 32), u128::from_le_bytes(x[40..56].try_into().expect("sixteen bytes")));
        let (tokens, documents) = (tokens as usize, documents as usize);
        Ok(Shard { path: path.to_path_buf(), content, width, tokens, documents, counted, vocab, tokenizer })
    }

    /// Reads everything: the checksum, the range of every token, the order of the documents.
    fn verify(&self) -> Result<()> {
        let bad = |what: String| Err(Self::bad(&self.path, what));
        let (end, tokens_end) = (self.content.len(), HEADER + self.tokens * self.width);
        let (mut hash, mut above, mut buffer) = (Xxh3::new(), None, Vec::new());
        for start in (HEADER..end).step_by(PIECE * self.width) {
            let range = start..(start + PIECE * self.width).min(end);
            hash.update(&self.content[range.clone()]);
            self.decode(start.min(tokens_end)..range.end.min(tokens_end), &mut buffer);
            let first = buffer.iter().position(|&id| id >= self.vocab);
            above = above.or(first.map(|i| ((start - HEADER) / self.width + i, buffer[i])));
            self.content.let_go(range);
        }
        if hash.digest() != u64_at(&self.content, 56) {
            return bad("the content does not match its checksum: a bit was flipped".into());
        }
        if let Some((at, id)) = above {
            return bad(format!("token {at} is {id}, the vocabulary size is {}", self.vocab));
        }
        let starts = self.document_starts();
        let ascend = starts.is_sorted() && starts.last().is_none_or(|&s| s <= self.tokens as u64);
        if !ascend { bad("its documents are not in order".into()) } else { Ok(()) }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// No token at all.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Bytes of the file, all of them in memory or mapped.
    pub fn bytes(&self) -> usize {
        self.content.len()
    }

    /// Vocabulary size that the tokens are below.
    pub fn vocab(&self) -> usize {
        self.vocab as usize
    }

    /// Hash of the tokenizer that made them.
    pub fn tokenizer(&self) -> u128 {
        self.tokenizer
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// First token of each document.
    pub fn document_starts(&self) -> Vec<u64> {
        self.index().chunks_exact(8).map(|b| u64_at(b, 0)).collect()
    }

    /// Those of a range of tokens, ascending.
    pub fn document_starts_in(&self, tokens: Range<u64>) -> impl Iterator<Item = u64> {
        let index = self.index();
        let (mut low, mut high) = (0, self.documents);
        while low < high {
            let middle = low + (high - low) / 2;
            if u64_at(index, middle * 8) < tokens.start {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low..self.documents).map(|i| u64_at(index, i * 8)).take_while(move |start| *start < tokens.end)
    }

    /// The document index.
    fn index(&self) -> &[u8] {
        let at = HEADER + (self.tokens * self.width).next_multiple_of(8);
        &self.content[at..at + self.documents * 8]
    }

    fn check_range(&self, start: usize, count: usize) {
        let inside = start <= self.tokens && count <= self.tokens - start;
        assert!(inside, "range {start}+{count} of {} tokens", self.tokens);
    }

    /// Replaces `out` by `count` tokens from `start`.
    ///
    /// # Panics
    /// When the range ends after the last token.
    pub fn read(&self, start: usize, count: usize, out: &mut Vec<u32>) {
        self.check_range(start, count);
        let at = HEADER + start * self.width;
        self.decode(at..at + count * self.width, out);
    }

    /// One pass over all tokens in order, piece by piece, each with up to `overlap` tokens of the next one. It takes memory for one
    /// piece, however large the file is.
    pub fn pieces(&self, overlap: usize, mut each: impl FnMut(&[u32])) {
        let mut buffer = Vec::new();
        for start in (0..self.tokens).step_by(PIECE) {
            self.read(start, (PIECE + overlap).min(self.tokens - start), &mut buffer);
            each(&buffer);
            let at = HEADER + start * self.width;
            self.content.let_go(at..at + buffer.len() * self.width);
        }
    }

    /// Replaces `out` by the tokens of a range of bytes.
    fn decode(&self, range: Range<usize>, out: &mut Vec<u32>) {
        let bytes = &self.content[range];
        out.clear();
        if self.width == 2 {
            out.extend(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]) as u32));
        } else {
            out.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
    }

    /// Bytes of the original text behind `count` tokens from `start`, where the shard knows them.
    ///
    /// # Panics
    /// When the range ends after the last token.
    pub fn text_bytes(&self, start: usize, count: usize) -> Option<u64> {
        self.check_range(start, count);
        let at = self.counted.then(|| self.content.len() - self.tokens * 4)?;
        let bytes = &self.content[at + start * 4..][..count * 4];
        Some(bytes.chunks_exact(4).map(|b| u32_at(b, 0) as u64).sum())
    }
}
