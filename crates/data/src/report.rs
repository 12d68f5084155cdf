//! What became of a corpus, written beside its shards.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::intake::tokens::Side;

/// Sources that are listed one by one; the bytes of more are added up.
const SOURCES: usize = 10_000;

/// The token that parts documents in imported files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndOfText {
    /// Its id.
    pub id: u32,
    /// On which side of a document it stands.
    pub side: Side,
}

/// What was kept and what was left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Texts kept.
    pub documents: u64,
    /// Bytes kept.
    pub bytes: u64,
    /// Of these, in validation.
    pub validation_bytes: u64,
    /// Tokens, beginnings and ends of documents included.
    pub train_tokens: u64,
    /// The same of validation.
    pub validation_tokens: u64,
    /// The file that validates, where `data.validation` says that the last one does.
    pub validation_file: Option<String>,
    /// Number of training shards; 0 in reports that did not say.
    pub train_shards: usize,
    /// Number of validation shards.
    pub validation_shards: usize,
    /// Bytes that the vocabulary was learned from; 0 where it was given.
    pub vocabulary_bytes: u64,
    /// Characters that the vocabulary cannot express.
    pub unknown_characters: u64,
    /// How often the name of a special token stands in the text.
    pub special_names: u64,
    /// What is worth knowing of the text, a sentence each.
    pub notes: Vec<String>,
    /// What files were read as to their number: `JSON lines, gzip of several members`. Empty in reports that did not say.
    pub read_as: BTreeMap<String, u64>,
    /// Whether the tokens are those of files of token ids, so that there may be no tokenizer. Bytes are those of the files then.
    pub imported: bool,
    /// What parts the documents of imported files, where a token does.
    pub end_of_text: Option<EndOfText>,
    /// Reason to number of files or lines left out for it.
    pub left_out: BTreeMap<String, usize>,
    /// Package or file to bytes kept.
    pub sources: BTreeMap<String, u64>,
}

impl Report {
    /// On which side of a document the token stands that parts it from others: behind a text; before, too, where no token parts imported documents.
    pub fn end_side(&self) -> Side {
        match self.end_of_text {
            Some(end) => end.side,
            None if self.imported => Side::Before,
            None => Side::After,
        }
    }

    /// Counts a text.
    pub(crate) fn keep(&mut self, source: &str, bytes: u64) {
        self.documents += 1;
        self.bytes += bytes;
        match self.sources.get_mut(source) {
            Some(sum) => *sum += bytes,
            None => {
                let key = if self.sources.len() < SOURCES { source } else { "others" };
                *self.sources.entry(key.to_string()).or_default() += bytes;
            }
        }
    }

    /// Counts something that is no text.
    pub(crate) fn leave(&mut self, reason: String) {
        *self.left_out.entry(reason).or_default() += 1;
    }
}
