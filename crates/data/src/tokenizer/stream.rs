//! Text of ids as they come, one at a time: only whole characters leave.

use super::Tokenizer;
use crate::error::Result;

/// Ids before the new ones that are decoded with them, so that decoders which treat a first token otherwise (they drop its
/// blank) see none.
const CONTEXT: usize = 8;

/// Decodes the continuation of a context.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// ids from `context` to `shown` are decoded again with the new ones; the text up to `shown` is out
    context: usize,
    shown: usize,
}

impl<'a> TextStream<'a> {
    /// For ids that follow `context`.
    pub fn after(tokenizer: &'a Tokenizer, context: &[u32]) -> Self {
        let ids = context[context.len().saturating_sub(CONTEXT)..].to_vec();
        TextStream { tokenizer, context: 0, shown: ids.len(), ids }
    }

    /// What an id adds to the text; nothing while a character lacks bytes.
    ///
    /// # Errors
    /// When the file's decoder refuses the ids.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        // what looks like an unfinished character is told at the end, or when more has come
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.context = self.shown;
        self.shown = self.ids.len();
        Ok(text)
    }

    /// What is left: bytes that form no character become the replacement character.
    ///
    /// # Errors
    /// As [`TextStream::push`].
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    /// The text of the ids that are not out.
    fn pending(&self) -> Result<String> {
        self.tokenizer.decode_after(&self.ids[self.context..self.shown], &self.ids[self.shown..])
    }
}
