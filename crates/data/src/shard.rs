//! Token shards: one header, then tokens, the document index and nothing else. Little-endian throughout.
//!
//! | byte | holds |
//! |---|---|
//! | 0 | magic `DASHTOKS` |
//! | 8 | u32 version (1) |
//! | 12 | u32 bytes of a token (2 or 4) |
//! | 16 | u64 number of tokens |
//! | 24 | u64 number of documents |
//! | 32 | u32 vocabulary size, u32 zero |
//! | 40 | u128 hash of the tokenizer.json |
//! | 56 | u64 xxh3 of everything after the header |
//! | 64 | u64 xxh3 of bytes 0 to 64 |
//! | 72 | tokens, zero-padded to a multiple of 8 bytes, then the start of each document as u64 |

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{DataError, Result};

const MAGIC: &[u8; 8] = b"DASHTOKS";
const VERSION: u32 = 1;
const HEADER: usize = 72;

/// A shard, memory-mapped and verified.
pub struct Shard {
    path: PathBuf,
    map: memmap2::Mmap,
    width: usize,
    tokens: usize,
    documents: usize,
    vocab: u32,
    tokenizer: u128,
}

fn u32_at(x: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(x[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(x: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(x[at..at + 8].try_into().expect("eight bytes"))
}

impl Shard {
    /// Opens a shard and checks size, checksums and the range of every token.
    ///
    /// # Errors
    /// Names the file and what does not fit; preparing the data again is always a remedy.
    pub fn open(path: &Path) -> Result<Self> {
        let bad =
            |what: String| DataError::content(path, format!("{what}; delete its folder to have it prepared again"));
        let file = File::open(path).map_err(DataError::io(path, "cannot be opened"))?;
        // SAFETY: shards appear by rename and are never written again; a foreign process that truncates one gets this
        // process a bus error, which is the documented price of a memory map.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(DataError::io(path, "cannot be mapped"))?;
        if map.len() < HEADER || &map[..8] != MAGIC {
            return Err(bad(format!("is no token shard ({} bytes, expected to start with DASHTOKS)", map.len())));
        }
        if xxh3_64(&map[..64]) != u64_at(&map, 64) {
            return Err(bad("the header does not match its checksum".into()));
        }
        let (version, width) = (u32_at(&map, 8), u32_at(&map, 12) as usize);
        if version != VERSION || !(width == 2 || width == 4) {
            return Err(bad(format!(
                "is version {version} with {width} bytes a token, expected version {VERSION} with 2 or 4"
            )));
        }
        let (tokens, documents) = (u64_at(&map, 16) as usize, u64_at(&map, 24) as usize);
        let expected = HEADER + (tokens * width).next_multiple_of(8) + documents * 8;
        if map.len() != expected {
            return Err(bad(format!(
                "has {} bytes, its header announces {expected}: it is truncated or was changed",
                map.len()
            )));
        }
        if xxh3_64(&map[HEADER..]) != u64_at(&map, 56) {
            return Err(bad("the content does not match its checksum: a bit was flipped".into()));
        }
        let tokenizer = u128::from_le_bytes(map[40..56].try_into().expect("sixteen bytes"));
        let vocab = u32_at(&map, 32);
        let shard = Shard { path: path.to_path_buf(), map, width, tokens, documents, vocab, tokenizer };
        let mut buffer = Vec::new();
        for start in (0..tokens).step_by(1 << 20) {
            shard.read(start, (1 << 20).min(tokens - start), &mut buffer);
            if let Some(i) = buffer.iter().position(|&id| id >= vocab) {
                return Err(bad(format!("token {} is {}, the vocabulary size is {vocab}", start + i, buffer[i])));
            }
        }
        Ok(shard)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// No token at all.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Bytes of the file, all of them mapped.
    pub fn bytes(&self) -> usize {
        self.map.len()
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
        let at = HEADER + (self.tokens * self.width).next_multiple_of(8);
        (0..self.documents).map(|i| u64_at(&self.map, at + i * 8)).collect()
    }

    /// Replaces `out` by `count` tokens from `start`.
    ///
    /// # Panics
    /// When the range ends after the last token.
    pub fn read(&self, start: usize, count: usize, out: &mut Vec<u32>) {
        assert!(start + count <= self.tokens, "range {start}+{count} of {} tokens", self.tokens);
        let bytes = &self.map[HEADER + start * self.width..][..count * self.width];
        out.clear();
        if self.width == 2 {
            out.extend(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]) as u32));
        } else {
            out.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
    }
}

/// Writes one shard. The header comes last, so an interrupted file is no shard.
pub struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hash: Xxh3,
    width: usize,
    vocab: u32,
    tokenizer: u128,
    tokens: u64,
    starts: Vec<u64>,
}

impl ShardWriter {
    /// Starts a file. Tokens take two bytes when the vocabulary allows it.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path, vocab: usize, tokenizer: u128) -> Result<Self> {
        let mut file = BufWriter::new(File::create(path).map_err(DataError::io(path, "cannot be created"))?);
        file.write_all(&[0; HEADER]).map_err(DataError::io(path, "cannot be written"))?;
        Ok(ShardWriter {
            path: path.to_path_buf(),
            file,
            hash: Xxh3::new(),
            width: if vocab <= 1 << 16 { 2 } else { 4 },
            vocab: vocab as u32,
            tokenizer,
            tokens: 0,
            starts: Vec::new(),
        })
    }

    /// Tokens so far.
    pub fn len(&self) -> u64 {
        self.tokens
    }

    /// No token yet.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(DataError::io(&self.path, "cannot be written"))
    }

    /// Appends a document.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn push(&mut self, ids: &[u32]) -> Result<()> {
        self.starts.push(self.tokens);
        self.tokens += ids.len() as u64;
        let bytes: Vec<u8> = match self.width {
            2 => ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect(),
            _ => ids.iter().flat_map(|&id| id.to_le_bytes()).collect(),
        };
        self.write(&bytes)
    }

    /// Writes the index and the header, and waits for the disk.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(mut self) -> Result<()> {
        let used = self.tokens as usize * self.width;
        self.write(&vec![0; used.next_multiple_of(8) - used])?;
        let index: Vec<u8> = self.starts.iter().flat_map(|s| s.to_le_bytes()).collect();
        self.write(&index)?;
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(self.width as u32).to_le_bytes());
        header.extend_from_slice(&self.tokens.to_le_bytes());
        header.extend_from_slice(&(self.starts.len() as u64).to_le_bytes());
        header.extend_from_slice(&self.vocab.to_le_bytes());
        header.extend_from_slice(&0u32.to_le_bytes());
        header.extend_from_slice(&self.tokenizer.to_le_bytes());
        header.extend_from_slice(&self.hash.digest().to_le_bytes());
        header.extend_from_slice(&xxh3_64(&header).to_le_bytes());
        let failed = |e| DataError::io(&self.path, "cannot be written")(e);
        self.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let failed = |e| DataError::io(&self.path, "cannot be written")(e);
        self.file.write_all(&header).and_then(|()| self.file.flush()).map_err(failed)?;
        let failed = |e| DataError::io(&self.path, "cannot be written")(e);
        self.file.get_ref().sync_all().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(vocab: usize) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.shard");
        let mut w = ShardWriter::create(&path, vocab, 77).unwrap();
        w.push(&[1, 2, 3]).unwrap();
        w.push(&[vocab as u32 - 1, 0]).unwrap();
        w.finish().unwrap();
        (dir, path)
    }

    #[test]
    fn round_trip_in_both_widths() {
        for vocab in [300, 65_536, 65_537, 200_000] {
            let (_dir, path) = written(vocab);
            let s = Shard::open(&path).unwrap();
            let mut out = Vec::new();
            s.read(1, 4, &mut out);
            assert_eq!((out, s.len(), s.vocab(), s.tokenizer()), (vec![2, 3, vocab as u32 - 1, 0], 5, vocab, 77));
            assert_eq!(s.document_starts(), [0, 3]);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_found() {
        let (_dir, path) = written(300);
        let good = std::fs::read(&path).unwrap();
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 1 << (byte % 8);
            std::fs::write(&path, &bad).unwrap();
            assert!(Shard::open(&path).is_err(), "byte {byte}");
        }
        for len in 0..good.len() {
            std::fs::write(&path, &good[..len]).unwrap();
            assert!(Shard::open(&path).is_err(), "{len} bytes");
        }
        std::fs::write(&path, &good).unwrap();
        assert!(Shard::open(&path).is_ok());
    }

    #[test]
    fn a_token_above_the_vocabulary_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.shard");
        let mut w = ShardWriter::create(&path, 300, 0).unwrap();
        w.push(&[1, 300]).unwrap();
        w.finish().unwrap();
        let err = Shard::open(&path).err().unwrap().to_string();
        assert!(err.contains("token 1 is 300, the vocabulary size is 300"), "{err}");
    }
}
