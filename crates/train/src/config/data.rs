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

impl Data {
    /// Says what cannot be read. `reads_text` where any training sequence is text.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self, reads_text: bool) -> Result<(), ConfigError> {
        positive("data.seq_len", self.seq_len)?;
        positive("data.batch_size", self.batch_size)?;
        positive("data.grad_accum", self.grad_accum)?;
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
