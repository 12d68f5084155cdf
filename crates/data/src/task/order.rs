//! Tokens among noise, asked after a mark in the order of the text (Gu and Dao 2023, arXiv 2312.00752) or of their size.

use rand_chacha::ChaCha8Rng;

use super::{Alphabet, MARK, Sequence, places};
use crate::rng::choose;

/// Asks `count` tokens in their order.
pub(super) fn selective_copy(s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet, count: usize) {
    let from = scatter(s, rng, alphabet, count);
    ask_all(s, &from);
}

/// Asks `count` tokens in ascending order.
pub(super) fn sort(s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet, count: usize) {
    let mut from = scatter(s, rng, alphabet, count);
    from.sort_by_key(|&at| s.inputs[at]);
    ask_all(s, &from);
}

/// Places of `count` different tokens before the mark.
fn scatter(s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet, count: usize) -> Vec<usize> {
    let from = places(rng, s.inputs.len() - count - 1, count, 1);
    let values = choose(rng, alphabet.size, count);
    for (&at, &value) in from.iter().zip(&values) {
        s.inputs[at] = alphabet.value(value);
    }
    from
}

/// The mark, then the tokens of these places.
fn ask_all(s: &mut Sequence, from: &[usize]) {
    let mark = s.inputs.len() - from.len() - 1;
    s.inputs[mark] = MARK;
    for (i, &evidence) in from.iter().enumerate() {
        s.inputs[mark + 1 + i] = s.inputs[evidence];
        s.ask(mark + i, evidence);
    }
}
