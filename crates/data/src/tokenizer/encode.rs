//! Text to ids, with an account of every byte.

use std::collections::BTreeSet;

use rayon::prelude::*;
use tokenizers::{Encoding, Tokenizer as Inner};

use super::Tokenizer;
use crate::error::{DataError, Result};
use crate::guard::guarded;
use crate::intake::pieces;
use crate::threads;

/// Characters that are named in a message at most.
const EXAMPLES: usize = 8;

/// Text that a vocabulary cannot express: an unknown token stands for it, or nothing does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unknown {
    /// Characters. Blanks count where the unknown token stands for them, and not where no token does: most tokenizers of words leave them out.
    pub characters: u64,
    /// Characters looked at.
    pub of: u64,
    /// Some of them.
    pub examples: BTreeSet<char>,
}

impl Unknown {
    fn add(&mut self, text: impl Iterator<Item = char>) {
        for c in text {
            self.characters += 1;
            if self.examples.len() < EXAMPLES {
                self.examples.insert(c);
            }
        }
    }

    /// For people: how much, and what.
    pub fn describe(&self) -> String {
        let examples: Vec<String> = self.examples.iter().map(|c| format!("{c:?}")).collect();
        let share = 100.0 * self.characters as f64 / self.of.max(1) as f64;
        format!("{} characters ({share:.2} %), such as {}", self.characters, examples.join(" "))
    }

    /// Adds another account.
    pub fn merge(&mut self, other: &Unknown) {
        self.characters += other.characters;
        self.of += other.of;
        for &c in &other.examples {
            if self.examples.len() < EXAMPLES {
                self.examples.insert(c);
            }
        }
    }
}

/// Ids of a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub ids: Vec<u32>,
    /// Bytes of the text behind each id, which add up to the text; empty unless asked for. (Where a BPE drops what it does not know, the
    /// dropped bytes are with the last one.) The bytes of a character that takes several
    /// tokens are with its first one, those that no token stands for with the next token, or with the last one at the end.
    pub text_bytes: Vec<u32>,
    /// What the vocabulary cannot express.
    pub unknown: Unknown,
}

/// Bytes behind each id.
fn text_bytes(text: &str, encoding: &Encoding) -> Vec<u32> {
    let mut at = 0;
    let mut bytes: Vec<u32> = encoding
        .get_offsets()
        .iter()
        .map(|&(_, end)| {
            let end = end.clamp(at, text.len());
            (end - std::mem::replace(&mut at, end)) as u32
        })
        .collect();
    if let Some(last) = bytes.last_mut() {
        *last += (text.len() - at) as u32;
    }
    bytes
}

/// What no token stands for, or the unknown one.
fn account(text: &str, encoding: &Encoding, unknown: Option<u32>) -> Unknown {
    let (mut found, mut at) = (Unknown::default(), 0);
    let letters = |range| text.get(range).unwrap_or("").chars().filter(|c: &char| !c.is_whitespace());
    for (&id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
        let (start, end) = (start.clamp(at, text.len()), end.clamp(at, text.len()));
        found.add(letters(at..start));
        if Some(id) == unknown {
            found.add(text.get(start..end).unwrap_or("").chars());
        }
        at = end;
    }
    found.add(letters(at..text.len()));
    found.of = text.chars().count() as u64;
    found
}

impl Tokenizer {
    /// Ids of a text, without beginning and end.
    ///
    /// # Errors
    /// When the vocabulary cannot express it and has no token for that.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = guarded(|| self.inner.encode_fast(text, false).map(|e| e.get_ids().to_vec()));
        ids.map_err(|e| self.failed(&e))?.map_err(|e| self.refused(&*e))
    }

    /// Ids of a prompt: as a document begins.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        Ok([self.bos.clone(), self.encode(text)?].concat())
    }

    /// Ids of a text with the account that preparing needs; `counted`: with the bytes behind each id.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_accounted(&self, text: &str, counted: bool) -> Result<Encoded> {
        if self.closed && !counted {
            return Ok(Encoded { ids: self.encode(text)?, ..Encoded::default() });
        }
        let encode = |inner: &Inner| {
            let encoding = guarded(|| inner.encode(text, false)).map_err(|e| self.failed(&e))?;
            encoding.map_err(|e| self.refused(&*e))
        };
        let encoding = encode(&self.inner)?;
        let unknown = match &self.witness {
            _ if self.closed => Unknown::default(),
            Some((inner, unknown)) => account(text, &encode(inner)?, Some(*unknown)),
            None => account(text, &encoding, self.unknown),
        };
        let text_bytes = if counted { text_bytes(text, &encoding) } else { Vec::new() };
        Ok(Encoded { ids: encoding.get_ids().to_vec(), text_bytes, unknown })
    }

    /// The same of a text of any length, on all cores and without the bytes behind each id, in the pieces in which a corpus is encoded: the ids are what
    /// grows with it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], or when the system gives no threads.
    pub fn encode_long(&self, text: &str) -> Result<Encoded> {
        threads::start()?;
        let pieces: Vec<&str> = pieces::cut(text).map(|(_, piece)| piece).collect();
        let encoded = pieces.par_iter().map(|piece| self.encode_accounted(piece, false));
        let mut all = Encoded::default();
        for of_piece in encoded.collect::<Result<Vec<_>>>()? {
            all.ids.extend(of_piece.ids);
            all.unknown.merge(&of_piece.unknown);
        }
        Ok(all)
    }

    /// How often the name of a special token stands in a text.
    pub fn special_names(&self, text: &str) -> u64 {
        self.names.as_ref().map_or(0, |names| names.find_iter(text).count() as u64)
    }

    fn failed(&self, e: &str) -> DataError {
        DataError::content(&self.origin, format!("cannot encode the text: {e}"))
    }

    fn refused(&self, e: &dyn std::fmt::Display) -> DataError {
        let what =
            format!("cannot encode the text: {e}; a vocabulary needs a token for what it does not know, or all bytes");
        DataError::content(&self.origin, what)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Treatment;
    use super::*;

    #[test]
    fn a_long_text_has_the_ids_and_the_account_of_one_that_is_encoded_at_once() {
        let line = |i: usize| format!("line {i}: {} sheep, \u{e4} \u{6f22}\u{1f980}\n\n\tand more.  ", i * i % 997);
        let text: String = (0..8000).map(line).collect();
        assert!(text.len() > 4 * pieces::PIECE);
        let learned = Tokenizer::learn([&text[..40_000]].into_iter(), 400, Treatment::default()).unwrap();
        assert_eq!(learned.encode_long(&text).unwrap().ids, learned.encode(&text).unwrap());
        let json = r#"{"version":"1.0","added_tokens":[],"pre_tokenizer":{"type":"Whitespace"},
            "model":{"type":"WordLevel","vocab":{"[UNK]":0,"sheep":1,"line":2,"</s>":3},"unk_token":"[UNK]"}}"#;
        let words = Tokenizer::parse(json, std::path::Path::new("words.json"), Treatment::default()).unwrap();
        let (long, whole) = (words.encode_long(&text).unwrap(), words.encode_accounted(&text, false).unwrap());
        assert_eq!((&long.ids, long.unknown.characters), (&whole.ids, whole.unknown.characters));
        assert_eq!((long.unknown.of, long.text_bytes.len()), (text.chars().count() as u64, 0));
        assert_eq!(learned.encode_long("").unwrap(), Encoded::default());
    }
}
