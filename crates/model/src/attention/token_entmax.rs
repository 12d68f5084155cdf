//! Dense alpha-entmax attention over all earlier tokens (Peters et al. 2019, arXiv 1905.05702): sparse weights, no chunks.

use dash_core::ops::attention::{Span, span_attention};
use dash_core::{Result, Tape};

use super::{Attended, Inputs};

pub fn attend(tape: &Tape, x: Inputs, alpha: f64) -> Result<Attended> {
    Ok((span_attention(tape, x.q, x.k, x.v, Span::Causal, alpha)?, None))
}
