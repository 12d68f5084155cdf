//! InfLLM v2 (arXiv 2509.24663): keys averaged over overlapping windows give the scores, a chunk has the largest of the
//! windows that touch it, and the choice is hard.

use dash_core::ops::attention::{Pooling, window_routing};
use dash_core::ops::{index_select, reshape, scale, sum_axis};
use dash_core::{Result, Tape, Tensor};

use super::{Attended, Inputs};
use crate::config::Windows;
use crate::router::RouterTrace;

pub fn attend(tape: &Tape, x: Inputs, w: &Windows) -> Result<Attended> {
    let list = window_routing(&x.q.value, &pooled(&x.k.value, w)?, w.choice(Pooling::Max))?;
    let (out, list) = x.attend_to(tape, list, None)?;
    Ok((out, Some(RouterTrace::hard(list))))
}

/// The tokens of every window, one window after the other.
pub(super) fn window_tokens(tokens: usize, w: &Windows) -> Vec<usize> {
    (0..w.span().keys(tokens)).flat_map(|i| (0..w.length).map(move |j| i * w.stride + j)).collect()
}

/// Mean keys of the windows, `[b, m, g, d]`, without a gradient.
fn pooled(k: &Tensor, w: &Windows) -> Result<Tensor> {
    let [b, t, g, d] = k.dims("infllmv2")?;
    let tape = Tape::inference();
    let tokens = window_tokens(t, w);
    let windows = index_select(&tape, &tape.leaf(k.clone()), 1, &tokens)?;
    let windows = reshape(&tape, &windows, &[b, tokens.len() / w.length, w.length, g, d])?;
    Ok(scale(&tape, &sum_axis(&tape, &windows, 2)?, 1.0 / w.length as f64)?.value)
}
