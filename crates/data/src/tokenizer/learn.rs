//! Learning a byte-level BPE.

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, Model as _, ModelWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    Tokenizer as Inner, Trainer,
};

use super::END_OF_TEXT;

/// Letters of a word that merges are learned from in one piece.
const WORD: usize = 256;

/// The `tokenizer.json` of a vocabulary.
pub(super) fn learn<'a>(texts: impl Iterator<Item = &'a str> + Send, vocab_size: usize) -> Result<String, String> {
    if vocab_size < 257 {
        return Err(format!("{vocab_size} is below 257: 256 bytes and {END_OF_TEXT}"));
    }
    let bytes = ByteLevel::new(false, true, true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .build();
    let words = |text: &str| {
        let mut pre = PreTokenizedString::from(text);
        bytes.pre_tokenize(&mut pre)?;
        let splits = pre.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(splits.into_iter().flat_map(|(word, _, _)| pieces(word)).collect())
    };
    trainer.feed(texts, words).map_err(|e| e.to_string())?;
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(|e| e.to_string())?;
    let size = model.get_vocab_size();
    if size != vocab_size {
        return Err(format!("the text gives only {size} of {vocab_size} entries; ask for {size} or bring more text"));
    }
    let mut inner = Inner::new(ModelWrapper::from(model));
    inner.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    inner.add_special_tokens([AddedToken::from(END_OF_TEXT, true)]).map_err(|e| e.to_string())?;
    serde_json::to_string_pretty(&inner).map_err(|e| e.to_string())
}

/// A word, or its pieces of [`WORD`] letters.
fn pieces(word: &str) -> Vec<String> {
    // a letter stands for a byte and takes one or two itself
    if word.len() <= WORD {
        return vec![word.to_string()];
    }
    let letters: Vec<char> = word.chars().collect();
    letters.chunks(WORD).map(|c| c.iter().collect()).collect()
}
