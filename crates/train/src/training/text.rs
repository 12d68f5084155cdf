//! Continuing a text with a trained model.

use dash_core::rng::Rng;
use dash_data::{TextStream, Tokenizer};
use dash_model::{Generation, Model, generate};

use crate::failure::Result;

/// What a model wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// The text after the prompt.
    pub text: String,
    /// Its tokens, without one that ends it.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt, what a document begins with included.
    pub prompt_tokens: usize,
    /// Whether the model ended it.
    pub ended: bool,
}

/// Continues a prompt, as a document begins. `emit` is given what each token adds to the text, which is nothing while a character
/// lacks bytes, and returns false to stop.
///
/// # Errors
/// When the prompt cannot be encoded, or the decoder refuses what the model wrote.
pub fn continue_text(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &str,
    (how, seed): (Generation, u64),
    mut emit: impl FnMut(&str) -> bool,
) -> Result<Continuation> {
    let mut ids = tokenizer.encode_prompt(prompt)?;
    if ids.is_empty() {
        ids.push(tokenizer.end_of_text());
    }
    let mut stream = TextStream::after(tokenizer, &ids);
    let mut out = Continuation { text: String::new(), tokens: Vec::new(), prompt_tokens: ids.len(), ended: false };
    let mut refused = None;
    generate(model, &ids, how, &mut Rng::new(seed), |id| {
        if id == tokenizer.end_of_text() {
            out.ended = true;
            return false;
        }
        out.tokens.push(id);
        match stream.push(id) {
            Ok(piece) => {
                out.text += &piece;
                emit(&piece)
            }
            Err(e) => {
                refused = Some(e);
                false
            }
        }
    })?;
    if let Some(e) = refused {
        return Err(e.into());
    }
    let rest = stream.finish()?;
    if !rest.is_empty() {
        emit(&rest);
        out.text += &rest;
    }
    Ok(out)
}
