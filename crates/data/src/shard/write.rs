//! Writing a shard.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{HEADER, MAGIC, VERSION};
use crate::error::{DataError, Result};

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
    /// text bytes of each token, where they are kept
    counts: Option<Vec<u32>>,
}

impl ShardWriter {
    /// Starts a file, with or without the bytes of text behind each token. Tokens take two bytes when the vocabulary allows it.
    ///
    /// # Errors
    /// When the file cannot be made, or ids of the vocabulary take more than 32 bits.
    pub fn create(path: &Path, vocab: usize, tokenizer: u128, counted: bool) -> Result<Self> {
        let vocab = u32::try_from(vocab)
            .map_err(|_| DataError::content(path, format!("a vocabulary of {vocab} is above the ids of 32 bits")))?;
        let mut file = BufWriter::new(File::create(path).map_err(DataError::io(path, "cannot be created"))?);
        file.write_all(&[0; HEADER]).map_err(DataError::io(path, "cannot be written"))?;
        Ok(ShardWriter {
            path: path.to_path_buf(),
            file,
            hash: Xxh3::new(),
            width: if vocab <= 1 << 16 { 2 } else { 4 },
            vocab,
            tokenizer,
            tokens: 0,
            starts: Vec::new(),
            counts: counted.then(Vec::new),
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

    /// Documents so far.
    pub fn documents(&self) -> usize {
        self.starts.len()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(DataError::io(&self.path, "cannot be written"))
    }

    /// The next tokens begin a document.
    pub fn begin(&mut self) {
        self.starts.push(self.tokens);
    }

    /// Appends tokens, and the bytes of text behind each where the shard keeps them.
    ///
    /// # Errors
    /// When the file cannot be written, or an id is not below the vocabulary size.
    ///
    /// # Panics
    /// When a shard that keeps text bytes is given another number of them.
    pub fn append(&mut self, ids: &[u32], text_bytes: &[u32]) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| id >= self.vocab) {
            return Err(DataError::content(
                &self.path,
                format!("id {id} is not below the vocabulary size {}", self.vocab),
            ));
        }
        if let Some(counts) = &mut self.counts {
            assert_eq!(ids.len(), text_bytes.len(), "one count a token");
            counts.extend_from_slice(text_bytes);
        }
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
        let counts = self.counts.take();
        let text: Vec<u8> = counts.iter().flatten().flat_map(|n| n.to_le_bytes()).collect();
        self.write(&text)?;
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(self.width as u32).to_le_bytes());
        header.extend_from_slice(&self.tokens.to_le_bytes());
        header.extend_from_slice(&(self.starts.len() as u64).to_le_bytes());
        header.extend_from_slice(&self.vocab.to_le_bytes());
        header.extend_from_slice(&u32::from(counts.is_some()).to_le_bytes());
        header.extend_from_slice(&self.tokenizer.to_le_bytes());
        header.extend_from_slice(&self.hash.digest().to_le_bytes());
        header.extend_from_slice(&xxh3_64(&header).to_le_bytes());
        let run = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            file.flush()?;
            file.get_ref().sync_all()
        };
        run(&mut self.file).map_err(DataError::io(&self.path, "cannot be written"))
    }
}
