//! `[data]`

use std::path::PathBuf;

use dash_data::Source;
use serde::{Deserialize, Serialize};

use super::error::{ConfigError, positive, wrong};

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// `cargo` (this workspace's dependencies) or `text`.
    #[serde(default = "cargo")]
    pub source: Source,
    /// For `text`: a file or a folder of .txt, .md, .jsonl.
    #[serde(default)]
    pub path: PathBuf,
    /// A tokenizer.json to use; empty: learn one.
    #[serde(default)]
    pub tokenizer: PathBuf,
    /// Folder for prepared corpora.
    #[serde(default = "data")]
    pub cache: PathBuf,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Sequences of a forward pass.
    pub batch_size: usize,
    /// Forward passes of an update.
    #[serde(default = "one")]
    pub grad_accum: usize,
}

fn data() -> PathBuf {
    "data".into()
}

fn cargo() -> Source {
    Source::Cargo
}

fn one() -> usize {
    1
}

/// Tokens of an update at most, so that no product of sizes wraps.
const MOST_TOKENS: usize = 1 << 40;

impl Data {
    /// Says what cannot be read. `reads_text` where any training sequence is text.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self, reads_text: bool) -> Result<(), ConfigError> {
        positive("data.seq_len", self.seq_len)?;
        positive("data.batch_size", self.batch_size)?;
        positive("data.grad_accum", self.grad_accum)?;
        let tokens = self.seq_len.checked_mul(self.batch_size).and_then(|n| n.checked_mul(self.grad_accum));
        if tokens.is_none_or(|n| n > MOST_TOKENS) {
            let sizes =
                format!("{} x data.seq_len {} x data.grad_accum {}", self.batch_size, self.seq_len, self.grad_accum);
            return wrong("data.batch_size", format!("{sizes} is more than 2^40 (1.1e12) tokens an update"));
        }
        if self.vocab_size > u32::MAX as usize {
            return wrong("data.vocab_size", format!("{} is above 2^32 - 1, the largest id", self.vocab_size));
        }
        if self.vocab_size < 2 {
            return wrong("data.vocab_size", format!("{} is below 2", self.vocab_size));
        }
        if reads_text && self.source == Source::Text && self.path.as_os_str().is_empty() {
            let what = "is needed for data.source = \"text\": a file or a folder of .txt, .md or .jsonl";
            return wrong("data.path", what);
        }
        Ok(())
    }
}
