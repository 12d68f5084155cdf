//! The shards of one half of a corpus, each begun when the one before is full.

use std::path::{Path, PathBuf};

use super::ShardWriter;
use crate::error::Result;

/// Tokens of a shard at most; a reader maps shards one by one.
const TOKENS: u64 = 1 << 27;
/// Tokens of a shard whose text bytes wait in memory.
const COUNTED_TOKENS: u64 = 1 << 24;
/// Documents of a shard, whose starts wait in memory.
const DOCUMENTS: usize = 1 << 22;

/// The file of a shard.
pub(crate) fn shard_path(folder: &Path, name: &str, i: usize) -> PathBuf {
    folder.join(format!("{name}-{i:05}.shard"))
}

/// Shards that are being written.
pub(crate) struct ShardSeries<'a> {
    folder: &'a Path,
    name: &'static str,
    /// vocabulary size and hash of the tokenizer
    made_with: (usize, u128),
    counted: bool,
    writer: ShardWriter,
    shards: usize,
    tokens: u64,
}

impl<'a> ShardSeries<'a> {
    /// Begins the first; with or without the bytes of text behind each token.
    ///
    /// # Errors
    /// As [`ShardWriter::create`].
    pub fn create(folder: &'a Path, name: &'static str, vocab: usize, tokenizer: u128, counted: bool) -> Result<Self> {
        let writer = ShardWriter::create(&shard_path(folder, name, 0), vocab, tokenizer, counted)?;
        Ok(ShardSeries { folder, name, made_with: (vocab, tokenizer), counted, writer, shards: 1, tokens: 0 })
    }

    /// Tokens of all shards so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    fn next(&mut self) -> Result<()> {
        let path = shard_path(self.folder, self.name, self.shards);
        let next = ShardWriter::create(&path, self.made_with.0, self.made_with.1, self.counted)?;
        self.shards += 1;
        std::mem::replace(&mut self.writer, next).finish()
    }

    /// The next tokens begin a document.
    ///
    /// # Errors
    /// When a full shard cannot be finished.
    pub fn begin(&mut self) -> Result<()> {
        if self.writer.documents() >= DOCUMENTS {
            self.next()?;
        }
        self.writer.begin();
        Ok(())
    }

    /// Appends tokens, and the bytes of text behind each where they are kept.
    ///
    /// # Errors
    /// As [`ShardWriter::append`].
    pub fn append(&mut self, ids: &[u32], text_bytes: &[u32]) -> Result<()> {
        let most = if self.counted { COUNTED_TOKENS } else { TOKENS };
        if !self.writer.is_empty() && self.writer.len() + ids.len() as u64 > most {
            self.next()?;
            // what follows of the document stands as one of its own in the next file
            self.writer.begin();
        }
        self.tokens += ids.len() as u64;
        self.writer.append(ids, if self.counted { text_bytes } else { &[] })
    }

    /// Finishes the last; number of tokens and of shards.
    ///
    /// # Errors
    /// As [`ShardWriter::finish`].
    pub fn finish(self) -> Result<(u64, usize)> {
        self.writer.finish()?;
        Ok((self.tokens, self.shards))
    }
}
