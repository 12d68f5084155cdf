//! Causal softmax attention over all earlier tokens.

use dash_core::ops::attention::dense_attention;
use dash_core::{Result, Tape};

use super::{Attended, Inputs};

pub fn attend(tape: &Tape, x: Inputs) -> Result<Attended> {
    Ok((dense_attention(tape, x.q, x.k, x.v)?, None))
}
