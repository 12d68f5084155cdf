//! `[data]`

use std::path::PathBuf;

use dash_data::{Bos, EXTENSIONS, FIELD, Packing, Source, SpecialTokens, Validation, no_text};
use serde::{Deserialize, Serialize};

use super::error::{ConfigError, positive, wrong};
use super::word::word;

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// `cargo` (this workspace's dependencies), `text`, or `tokens`: ids in `.bin` files of llm.c, nanoGPT or Megatron, as they are.
    #[serde(default = "cargo")]
    pub source: Source,
    /// For `text`: a file, or a folder of files with one of the `extensions`, each a document. For `tokens`: a `.bin` file or a folder of
    /// them; those with `val`, `valid` or `validation` in their names validate.
    #[serde(default)]
    pub path: PathBuf,
    /// Extensions of the files of a folder that are read, without a dot, in small letters: `["py", "h"]` for sources. `jsonl`, `ndjson` and
    /// `json` have a document a line, `parquet` (in a program built with `--features parquet`) one a row. A file may be compressed with gzip or zstd, as
    /// `.jsonl.gz`, `.json.zst` or `.txt.gz`.
    #[serde(default = "extensions")]
    pub extensions: Vec<String>,
    /// The field of JSON lines, or the column of parquet, that holds the text; in parquet `a.b` is a field of a struct.
    #[serde(default = "field")]
    pub field: String,
    /// A tokenizer.json to use; empty: learn one. For `tokens` the one that they were made with, so that the model can write text; empty:
    /// none.
    #[serde(default)]
    pub tokenizer: PathBuf,
    /// For `tokens`: the id that parts documents, where it is not 50256 (GPT-2; llm.c's version 7: 128000) or that of `tokenizer`: for llm.c what that begins a text with,
    /// if it does, else what ends one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_of_text: Option<u32>,
    /// Folder for prepared corpora.
    #[serde(default = "data")]
    pub cache: PathBuf,
    /// Vocabulary size: of the one to learn, or the largest id and one of `tokenizer`.
    pub vocab_size: usize,
    /// Bytes of text, from all over the corpus, that a vocabulary is learned from at most.
    #[serde(default = "vocab_bytes")]
    pub vocab_bytes: usize,
    /// What a document begins with: `auto` what the tokenizer's post-processor puts before a text, `none` nothing.
    #[serde(default)]
    pub bos: Bos,
    /// What the name of a special token inside a text is: `text` like any other, or `parse`d to the token.
    #[serde(default)]
    pub special_tokens: SpecialTokens,
    /// What validates: `share`, or `last-file`: the last file by name and nothing else, as nanochat has it for its parquet shards. Tokens of that file beyond `validation_tokens` are left out.
    #[serde(default)]
    pub validation: Validation,
    /// Share of the bytes that validates; refused with `last-file`.
    #[serde(default = "twentieth")]
    pub validation_share: f64,
    /// Tokens of validation at most.
    #[serde(default = "ten_million")]
    pub validation_tokens: u64,
    /// Tokens to train on at most, the first of the corpus; 0: all.
    #[serde(default)]
    pub max_tokens: u64,
    /// How documents are laid out in the sequences of training: `stream` one behind the other, cut where a sequence ends, or `best-fit`, as many whole ones
    /// as fit and padding behind them, so that only those longer than a sequence are cut.
    #[serde(default)]
    pub packing: Packing,
    /// Documents of a sequence do not see each other: attention, chunks, routing and positions begin anew with each, in training and validation.
    #[serde(default)]
    pub document_mask: bool,
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

fn extensions() -> Vec<String> {
    EXTENSIONS.map(String::from).into()
}

fn field() -> String {
    FIELD.into()
}

fn cargo() -> Source {
    Source::Cargo
}

fn one() -> usize {
    1
}

fn vocab_bytes() -> usize {
    16 << 20
}

fn twentieth() -> f64 {
    0.05
}

fn ten_million() -> u64 {
    10_000_000
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
        if !(1 << 10..=1 << 30).contains(&self.vocab_bytes) {
            return wrong("data.vocab_bytes", format!("{} is not between 1024 and {}", self.vocab_bytes, 1 << 30));
        }
        if !(self.validation_share > 0.0 && self.validation_share <= 0.5) {
            return wrong(
                "data.validation_share",
                format!("{:?} is not above 0 and at most 0.5", self.validation_share),
            );
        }
        if self.validation_tokens == 0 {
            return wrong("data.validation_tokens", "is 0; it must be at least 1");
        }
        self.check_extensions()?;
        if self.field.is_empty() {
            return wrong("data.field", "is empty; name the field that holds the text, for example \"text\"");
        }
        self.check_source()?;
        if self.source == Source::Cargo && !self.path.as_os_str().is_empty() {
            let what = "means nothing to data.source = \"cargo\"; remove it, or set data.source = \"text\"";
            return wrong("data.path", what);
        }
        if (!self.tokenizer.as_os_str().is_empty() || self.source == Source::Tokens)
            && self.vocab_bytes != vocab_bytes()
        {
            return wrong("data.vocab_bytes", "means nothing where no vocabulary is learned; remove it");
        }
        if reads_text && self.path.as_os_str().is_empty() {
            let what = match self.source {
                Source::Cargo => return Ok(()),
                Source::Text => "is needed for data.source = \"text\": a file or a folder of .txt, .md or .jsonl",
                Source::Tokens => "is needed for data.source = \"tokens\": a .bin file or a folder of them",
            };
            return wrong("data.path", what);
        }
        Ok(())
    }

    /// Refuses keys that mean nothing to the source.
    fn check_source(&self) -> Result<(), ConfigError> {
        let word = word(&self.source);
        let nothing = |key: &str| {
            let what = format!("means nothing to data.source = \"{word}\"; remove it, or set data.source = \"text\"");
            wrong(key, what)
        };
        if self.source != Source::Text && self.field != FIELD {
            return nothing("data.field");
        }
        if self.source != Source::Text && self.extensions != extensions() {
            return nothing("data.extensions");
        }
        if self.source == Source::Cargo && self.validation != Validation::default() {
            return nothing("data.validation");
        }
        if self.validation == Validation::LastFile && self.validation_share != twentieth() {
            let what = "means nothing to data.validation = \"last-file\"; remove one of them";
            return wrong("data.validation_share", what);
        }
        if self.source == Source::Tokens && self.bos != Bos::default() {
            return nothing("data.bos");
        }
        if self.source == Source::Tokens && self.special_tokens != SpecialTokens::default() {
            return nothing("data.special_tokens");
        }
        if self.source != Source::Tokens && self.end_of_text.is_some() {
            let what = "means nothing where text is encoded; remove it, or set data.source = \"tokens\"";
            return wrong("data.end_of_text", what);
        }
        if let Some(id) = self.end_of_text.filter(|id| *id as usize >= self.vocab_size) {
            let what = format!("{id} is not below data.vocab_size = {}, so that no token has it", self.vocab_size);
            return wrong("data.end_of_text", what);
        }
        Ok(())
    }

    fn check_extensions(&self) -> Result<(), ConfigError> {
        let key = "data.extensions";
        if self.extensions.is_empty() {
            return wrong(key, "is empty; name at least one extension, for example [\"txt\"]");
        }
        for (i, extension) in self.extensions.iter().enumerate() {
            let plain = |c: char| !c.is_uppercase() && !c.is_whitespace() && !c.is_control() && !"./\\".contains(c);
            if extension.is_empty() || !extension.chars().all(plain) {
                return wrong(
                    key,
                    format!("{extension:?} is no extension: small letters without a dot, for example \"py\""),
                );
            }
            if let Some(remedy) = no_text(extension) {
                return wrong(key, format!("files in .{extension} are no text; {remedy}"));
            }
            if self.extensions[..i].contains(extension) {
                return wrong(key, format!("{extension:?} is named twice"));
            }
        }
        Ok(())
    }
}
