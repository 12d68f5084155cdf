//! Attention of every query to one range of keys on a CUDA device: softmax, or entmax over the range. A row of entmax needs its threshold
//! before any weight is known, so the scores are computed once a step of Newton; no row of scores is kept, and a row may have any length.

use super::pass::Pass;
use super::{Gradients, Operands};
use crate::device::cuda::{CudaBuffer, Kind};
use crate::error::Result;
use crate::ops::attention::{Dims, Span};

/// What [`span_attention`] keeps for backward.
#[derive(Debug)]
pub struct Rows {
    /// `[b, t, h, d]`, bf16.
    pub o: CudaBuffer,
    /// `[b, t, h]`, f32: lse (natural logarithm) of softmax, the threshold on (alpha - 1) times the scores of entmax.
    pub rows: CudaBuffer,
}

/// The op `span_attention` on operands in bf16, keys and values `[b, span.keys(t), g, d]`. A query that sees no key gets 0.
///
/// # Errors
/// When extents do not fit, alpha is not in [1, 2], or there is no kernel for the head width.
pub fn span_attention(dims: Dims, operands: Operands, span: Span, alpha: f64) -> Result<Rows> {
    let pass = Pass::span("span_attention", dims, operands, span, alpha)?;
    let (device, count) = (operands.q.0.device(), dims.b * dims.t * dims.h);
    if pass.sees_nothing() {
        let o = device.zeros(pass.op, Kind::Bf16, count * dims.d)?;
        return Ok(Rows { o, rows: device.zeros(pass.op, Kind::F32, count)? });
    }
    let rows = if alpha > 1.0 { pass.solve()? } else { device.alloc(pass.op, Kind::F32, count)? };
    Ok(Rows { o: pass.forward(&rows)?, rows })
}

/// Gradients of [`span_attention`], from what it returned and the gradient of its output (bf16).
///
/// # Errors
/// As [`span_attention`].
pub fn span_attention_backward(
    dims: Dims,
    operands: Operands,
    (span, alpha): (Span, f64),
    (o, rows): (&CudaBuffer, &CudaBuffer),
    dout: &CudaBuffer,
) -> Result<Gradients> {
    let pass = Pass::span("span_attention", dims, operands, span, alpha)?;
    if pass.sees_nothing() {
        let zeros = |len| dout.device().zeros(pass.op, Kind::F32, len);
        return Ok(Gradients { dq: zeros(dout.len())?, dk: zeros(0)?, dv: zeros(0)?, dbias: None });
    }
    let delta = if alpha > 1.0 { pass.means(rows, dout)? } else { pass.delta(o, dout)? };
    pass.backward(rows, &delta, dout)
}

#[cfg(test)]
#[path = "span_tests.rs"]
mod tests;
