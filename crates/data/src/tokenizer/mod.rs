//! Tokenizers through the `tokenizers` crate, so that the file we write is the file the Python world reads: a byte-level BPE of our own,
//! or anybody's `tokenizer.json`.
//!
//! What is decided here:
//! - Truncation, padding and dropout of a file are switched off and told: they are for batches and for regularisation, and would cut,
//!   fill or vary the training text.
//! - A document begins with what the file's post-processor puts before a text (`data.bos = "none"`: with nothing) and ends with what
//!   it puts behind one, or with the end-of-text token.
//! - The name of a special token inside a text is text (`data.special_tokens = "parse"`: the token). It is counted either way.
//! - What a vocabulary cannot express is counted, by character. Vocabularies that hold every byte express everything.

mod encode;
mod learn;
mod load;
mod stream;
#[cfg(test)]
mod tests;

use aho_corasick::AhoCorasick;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer as Inner;
use xxhash_rust::xxh3::xxh3_128;

use std::io::Read;
use std::path::Path;

use crate::error::{DataError, Result};
use crate::guard::guarded;
pub use encode::{Encoded, Unknown};
pub use stream::TextStream;

/// Bytes of a `tokenizer.json` at most: a device without an end (`/dev/zero`) must not fill the memory.
const MOST_BYTES: u64 = 1 << 30;

/// Ends a document; has no bytes of its own.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What a document begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bos {
    /// What the tokenizer's post-processor puts before a text, which for most is nothing.
    #[default]
    Auto,
    /// Nothing.
    None,
}

/// What the name of a special token inside a text is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpecialTokens {
    /// Text like any other: a document that mentions `<|endoftext|>` does not end there.
    #[default]
    Text,
    /// The token: for corpora that mark up their text with special tokens.
    Parse,
}

/// How a tokenizer is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Treatment {
    /// What a document begins with.
    pub bos: Bos,
    /// What the name of a special token inside a text is.
    pub special_tokens: SpecialTokens,
}

/// A special token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its id.
    pub id: u32,
    /// Its name.
    pub text: String,
}

/// A tokenizer and what is derived from it.
pub struct Tokenizer {
    inner: Inner,
    json: String,
    /// where it comes from, for messages
    origin: String,
    /// largest id + 1
    rows: usize,
    tokens: usize,
    bos: Vec<u32>,
    end_of_text: u32,
    unknown: Option<u32>,
    /// whether every text can be expressed
    closed: bool,
    /// where unknown characters leave no trace: the same tokenizer with a token for them, and its id
    witness: Option<(Inner, u32)>,
    names: Option<AhoCorasick>,
    notes: Vec<String>,
}

impl Tokenizer {
    /// Learns a byte-level BPE of `vocab_size` entries from these texts. Words (runs of letters, of digits, of other signs, of blanks) are
    /// learned from in pieces of 256 bytes: longer ones are no words, and learning takes the square of their length.
    ///
    /// # Errors
    /// When the size is below the 256 bytes and the end-of-text token, or the text is too small to fill it.
    pub fn learn<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocab_size: usize,
        treatment: Treatment,
    ) -> Result<Self> {
        let json = learn::learn(texts, vocab_size).map_err(|what| DataError::content("data.vocab_size", what))?;
        load::parse(json, Path::new("tokenizer.json"), treatment)
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When it cannot be read, has no end-of-text token, or contradicts itself.
    pub fn load(path: &Path, treatment: Treatment) -> Result<Self> {
        let mut json = String::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_string(&mut json));
        read.map_err(DataError::io(path, "cannot be read"))?;
        if json.len() as u64 > MOST_BYTES {
            return Err(DataError::content(path, format!("is larger than {} MB, no tokenizer.json", MOST_BYTES >> 20)));
        }
        // a clone without LFS has them in the place of large tokenizers
        if json.starts_with("version https://git-lfs") {
            return Err(DataError::content(
                path,
                "holds a pointer of Git LFS and not the file; bring it with git lfs pull",
            ));
        }
        load::parse(json, path, treatment)
    }

    /// A tokenizer from the text of a `tokenizer.json`; `origin` names it in messages.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn parse(json: &str, origin: &Path, treatment: Treatment) -> Result<Self> {
        load::parse(json.to_string(), origin, treatment)
    }

    /// The `tokenizer.json` that is in use: the given one, less what was switched off.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Hash of the `tokenizer.json`, which ties shards and checkpoints to it.
    pub fn hash(&self) -> u128 {
        xxh3_128(self.json.as_bytes())
    }

    /// Rows that a model needs: the largest id and one, which is more than the number of tokens where ids have holes.
    pub fn vocab_size(&self) -> usize {
        self.rows
    }

    /// Tokens: as many as rows, or fewer where ids have holes.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// What was switched off or is unusual, a sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What a document begins with; most often nothing.
    pub fn bos(&self) -> &[u32] {
        &self.bos
    }

    /// Ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// The token of an id, by the name that Python knows it under.
    pub fn special(&self, id: u32) -> SpecialToken {
        SpecialToken { id, text: self.inner.id_to_token(id).unwrap_or_default() }
    }

    /// Stands for what the vocabulary cannot express, if there is such a token.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// Fills a batch: the vocabulary's padding token, or the end-of-text token.
    pub fn padding(&self) -> u32 {
        let known = ["<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"];
        known.iter().find_map(|t| self.inner.token_to_id(t)).unwrap_or(self.end_of_text)
    }

    /// Text of ids, special tokens left out; bytes that form no character become the replacement character.
    ///
    /// # Errors
    /// When the file's decoder refuses them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let no = |e: &str| DataError::content(&self.origin, format!("cannot decode: {e}"));
        guarded(|| self.inner.decode(ids, true)).map_err(|e| no(&e))?.map_err(|e| no(&e.to_string()))
    }

    /// Text of `ids` as the continuation of `context`: decoders of whole texts drop a first blank, which is none here.
    ///
    /// # Errors
    /// When the file's decoder refuses them.
    pub fn decode_after(&self, context: &[u32], ids: &[u32]) -> Result<String> {
        let before = self.decode(context)?;
        let all = self.decode(&[context, ids].concat())?;
        match all.strip_prefix(&before) {
            Some(text) => Ok(text.to_string()),
            // a context that ends within a character: the continuation completes it
            None => self.decode(ids),
        }
    }
}
