//! Byte-level BPE through the `tokenizers` crate, so that the file we write is the file the Python world reads.

use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Model as _, Tokenizer as Inner};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{DataError, Result};

/// Ends a document; has no bytes of its own.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Text that the merges are learned from, at most: more does not change a vocabulary of thousands.
const TRAINING_BYTES: usize = 16 << 20;

/// A tokenizer and what is derived from it.
pub struct Tokenizer {
    inner: Inner,
    json: String,
    end_of_text: u32,
}

impl Tokenizer {
    /// Learns a vocabulary of `vocab_size` entries from the first 16 MiB of an even sample of the texts.
    ///
    /// # Errors
    /// When the size is below the 256 bytes and the end-of-text token, or the text is too small to fill it.
    pub fn train(texts: &[&str], vocab_size: usize) -> Result<Self> {
        let wrong = |what: String| DataError::content("data.vocab_size", what);
        if vocab_size < 257 {
            return Err(wrong(format!("{vocab_size} is below 257: 256 bytes and {END_OF_TEXT}")));
        }
        let total: usize = texts.iter().map(|t| t.len()).sum();
        let every = total.div_ceil(TRAINING_BYTES).max(1);
        let sample = texts.iter().enumerate().filter(|(i, _)| i % every == 0).map(|(_, t)| *t);
        let mut inner = Inner::new(BPE::default());
        let bytes = ByteLevel::new(false, true, true);
        inner.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        let mut model = tokenizers::ModelWrapper::from(BPE::default());
        {
            use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer};
            let split = |text: &str| {
                let mut pre = PreTokenizedString::from(text);
                bytes.pre_tokenize(&mut pre)?;
                let words = pre.get_splits(OffsetReferential::Original, OffsetType::Byte);
                Ok(words.into_iter().map(|(s, _, _)| s.to_string()).collect())
            };
            trainer.feed(sample, split).map_err(|e| wrong(e.to_string()))?;
            let tokenizers::ModelWrapper::BPE(bpe) = &mut model else { unreachable!("made as BPE above") };
            trainer.train(bpe).map_err(|e| wrong(e.to_string()))?;
        }
        let size = model.get_vocab_size();
        if size != vocab_size {
            return Err(wrong(format!(
                "the text gives only {size} of {vocab_size} entries; ask for {size} or bring more text"
            )));
        }
        inner.with_model(model);
        inner.add_special_tokens([AddedToken::from(END_OF_TEXT, true)]).map_err(|e| wrong(e.to_string()))?;
        let json = serde_json::to_string_pretty(&inner).map_err(|e| wrong(e.to_string()))?;
        Self::from_inner(inner, json, Path::new("tokenizer.json"))
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When it cannot be read or has no end-of-text token.
    pub fn load(path: &Path) -> Result<Self> {
        let json = std::fs::read_to_string(path).map_err(DataError::io(path, "cannot be read"))?;
        // `from_str` is compiled in tokenizers already; the generic `from_bytes` would bring its deserialisers here once more
        let inner: Inner = json.parse().map_err(|e| DataError::content(path, format!("is no tokenizer.json: {e}")))?;
        Self::from_inner(inner, json, path)
    }

    fn from_inner(inner: Inner, json: String, path: &Path) -> Result<Self> {
        let end_of_text = [END_OF_TEXT, "</s>", "<|end_of_text|>", "[SEP]"].iter().find_map(|t| inner.token_to_id(t));
        let missing = || DataError::content(path, format!("has no end-of-text token such as {END_OF_TEXT}"));
        Ok(Tokenizer { end_of_text: end_of_text.ok_or_else(missing)?, inner, json })
    }

    /// The `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Hash of the `tokenizer.json`, which ties shards and checkpoints to it.
    pub fn hash(&self) -> u128 {
        xxh3_128(self.json.as_bytes())
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// Ids of a text, without an end.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let encoding = self.inner.encode_fast(text, false).expect("byte-level BPE encodes every text");
        encoding.get_ids().to_vec()
    }

    /// Text of ids; bytes that form no character become the replacement character.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).expect("a byte-level decoder takes every sequence")
    }

    /// Bytes of text behind each id: a byte-level token has one character a byte, a special token has none.
    pub fn token_bytes(&self) -> Vec<u32> {
        let special = self.inner.get_added_tokens_decoder();
        (0..self.vocab_size() as u32)
            .map(|id| match self.inner.id_to_token(id) {
                Some(token) if !special.contains_key(&id) => token.chars().count() as u32,
                _ => 0,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<String> {
        (0..300).map(|i| format!("fn number_{i}() -> u32 {{ {i} }} // näh, the {i}th of them\n")).collect()
    }

    #[test]
    fn training_is_deterministic_and_encoding_loses_nothing() {
        let text = sample();
        let texts: Vec<&str> = text.iter().map(String::as_str).collect();
        let a = Tokenizer::train(&texts, 400).unwrap();
        assert_eq!(a.json(), Tokenizer::train(&texts, 400).unwrap().json());
        assert_eq!(a.vocab_size(), 400);
        let bytes = a.token_bytes();
        for t in ["", "fn x() {}", "tabs\tand\r\n and ünïcode 漢字 🦀", texts[7]] {
            let ids = a.encode(t);
            assert_eq!(a.decode(&ids), t);
            assert_eq!(ids.iter().map(|&i| bytes[i as usize] as usize).sum::<usize>(), t.len());
        }
        assert_eq!(bytes[a.end_of_text() as usize], 0);
        assert!(a.encode(texts[7]).len() * 2 < texts[7].len());
    }

    #[test]
    fn too_little_text_and_too_small_a_vocabulary_are_told() {
        assert!(Tokenizer::train(&["ab"], 300).err().unwrap().to_string().contains("gives only"));
        assert!(Tokenizer::train(&["ab"], 100).err().unwrap().to_string().contains("below 257"));
    }
}
