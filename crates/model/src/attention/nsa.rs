//! Native sparse attention (arXiv 2502.11089): the gated sum of attention to compressed windows, to chosen chunks and to a
//! sliding window. A chunk's score is the compressed probabilities, summed over the group and weighted by overlap; the
//! choice is hard. Compression is linear in a window's keys, with a position embedding, and in its values.

use dash_core::ops::attention::{Pooling, Span, span_attention, window_routing};
use dash_core::ops::{add, index_select, matmul, mul, reshape, transpose};
use dash_core::{Error, Result, Tape, Var};

use super::infllmv2::window_tokens;
use super::{Attended, Inputs};
use crate::config::Nsa;
use crate::router::RouterTrace;

pub fn attend(tape: &Tape, x: Inputs, s: &Nsa) -> Result<Attended> {
    let own = x.nsa.as_ref().ok_or_else(|| Error::invalid("nsa", "the layer has none of the branches"))?;
    let k = compressed(tape, own.k_compressed, own.compress_k, Some(own.position), s)?;
    let v = compressed(tape, own.v_compressed, own.compress_v, None, s)?;
    let list = window_routing(&x.q.value, &k.value, s.windows.choice(Pooling::Overlap))?;
    let (chosen, list) = x.attend_to(tape, list, None)?;
    let branches = [
        span_attention(tape, x.q, &k, &v, s.windows.span(), 1.0)?,
        chosen,
        span_attention(tape, x.q, own.k_window, own.v_window, Span::Sliding(s.window), 1.0)?,
    ];
    let gated = |i: usize| mul(tape, &branches[i], &index_select(tape, own.gates, 3, &[i])?);
    let out = add(tape, &add(tape, &gated(0)?, &gated(1)?)?, &gated(2)?)?;
    Ok((out, Some(RouterTrace::hard(list))))
}

/// One key or value per window: `x [b, t, g, d]` to `[b, m, g, d]` by `weight [g * length * d, d]`.
fn compressed(tape: &Tape, x: &Var, weight: &Var, position: Option<&Var>, s: &Nsa) -> Result<Var> {
    let [b, t, g, d] = x.value.dims("nsa")?;
    let length = s.windows.length;
    let tokens = window_tokens(t, &s.windows);
    let m = tokens.len() / length;
    let windows = reshape(tape, &index_select(tape, x, 1, &tokens)?, &[b * m, length, g, d])?;
    let mut windows = transpose(tape, &windows, &[2, 0, 1, 3])?;
    if let Some(position) = position {
        windows = add(tape, &windows, &reshape(tape, position, &[g, 1, length, d])?)?;
    }
    let windows = reshape(tape, &windows, &[g, b * m, length * d])?;
    let out = matmul(tape, &windows, &reshape(tape, weight, &[g, length * d, d])?)?;
    reshape(tape, &transpose(tape, &out, &[1, 0, 2])?, &[b, m, g, d])
}
