//! Attention of every query to one contiguous range of keys, softmax or alpha-entmax over the range:
//! p_i = entmax_{j in span(i)}(q_i . k_j / sqrt d), o_i = sum_j p_ij v_j. Token-level entmax attention (Peters et al. 2019,
//! arXiv 1905.05702), the sliding window and the compressed windows of NSA (arXiv 2502.11089) are spans.
//!
//! A tile of queries computes its rows in full, which is what entmax needs: its threshold depends on the whole row. Scratch
//! is a tile's rows; kept for backward: q, k and v. Backward computes p again, then with r = p^(2-alpha) (softmax: r = p)
//! ds = r (dp - <r, dp> / sum r) / sqrt d.

mod cpu;
#[cfg(test)]
mod tests;

use std::ops::Range;

use super::cuda::plain::{self, Sees};
use super::{Dims, cuda};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ops::entmax::check_alpha_or_softmax;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// Itself and everything before.
    Causal,
    /// Itself and the tokens before, this many in all.
    Sliding(usize),
    /// Keys are windows of `length` tokens that start every `stride`; those whose last token is at or before the query.
    Windows {
        /// Tokens of a window.
        length: usize,
        /// Tokens from one window's start to the next.
        stride: usize,
    },
}

impl Span {
    /// The keys that the query at position `query` sees.
    pub fn of(&self, query: usize) -> Range<usize> {
        match *self {
            Span::Causal => 0..query + 1,
            Span::Sliding(width) => (query + 1).saturating_sub(width)..query + 1,
            Span::Windows { length, stride } => {
                0..(query + 1).checked_sub(length).map_or(0, |after| after / stride + 1)
            }
        }
    }

    /// Number of keys for `t` tokens.
    pub fn keys(&self, t: usize) -> usize {
        if t == 0 { 0 } else { self.of(t - 1).end }
    }

    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        match *self {
            Span::Causal => Ok(()),
            Span::Sliding(width) => {
                ensure!(width > 0, op, "the window is 0, but a query always sees itself");
                Ok(())
            }
            Span::Windows { length, stride } => {
                ensure!(
                    stride > 0 && length >= stride,
                    op,
                    "windows of {length} every {stride}: the stride is at least 1 and at most the length"
                );
                Ok(())
            }
        }
    }
}

/// Attention of `q [b, t, h, d]` to the keys and values `[b, m, g, d]` of every query's [`Span`]: `[b, t, h, d]`. `alpha` is
/// 1 for softmax, up to 2. A query that sees no key gets 0.
///
/// # Errors
/// When the shapes do not fit, m is not the span's number of keys, or alpha is not in [1, 2].
pub fn span_attention(tape: &Tape, q: &Var, k: &Var, v: &Var, span: Span, alpha: f64) -> Result<Var> {
    let op = "span_attention";
    let [b, t, h, d] = q.value.dims(op)?;
    let [bk, m, g, dk] = k.value.dims(op)?;
    span.check(op)?;
    ensure!((b, d) == (bk, dk), op, "q is {:?}, k is {:?}", q.value.shape(), k.value.shape());
    ensure!(k.value.shape() == v.value.shape(), op, "k is {:?}, v is {:?}", k.value.shape(), v.value.shape());
    ensure!(m == span.keys(t), op, "{t} tokens have {} keys of {span:?}, k has {m}", span.keys(t));
    check_alpha_or_softmax(op, alpha)?;
    let dims = Dims::new(op, [b, t, h, d], g)?;
    let compute = tape.compute();
    // the output, and lse or threshold of every row, where backward reads them
    let (out, kept) = on_device!(op, [&q.value, &k.value, &v.value]; Cpu<T>(cpu, [qs, ks, vs]) => {
        let out = cpu::forward::<T>(cpu, dims, m, (qs, ks, vs), span, alpha);
        (Tensor::from_buffer(q.value.shape(), out), None)
    }, Cuda(_, [qs, ks, vs]) => {
        if cuda::streams(compute, qs, dims, None) {
            let operands = cuda::Operands::separate(dims, qs.rounded()?, ks.rounded()?, vs.rounded()?);
            let cuda::Rows { o, rows } = cuda::span_attention(dims, operands, span, alpha)?;
            let out = Tensor::from_cuda(q.value.shape(), o);
            (out.clone(), Some((out, Tensor::from_cuda(&[b, t, h], rows))))
        } else {
            let operands = [qs.full()?, ks.full()?, vs.full()?];
            let out = plain::forward(dims, m, operands, Sees::Span(span), alpha)?;
            (Tensor::from_cuda(q.value.shape(), out), None)
        }
    });
    let (q, k, v) = (q.clone(), k.clone(), v.clone());
    let (kept, rows) = kept.unwrap_or_else(|| (q.value.clone(), q.value.clone()));
    tape.record(op, out, move |dy, grads| {
        on_device!(op, [&q.value, &k.value, &v.value, &kept, &rows, &dy]; Cpu<T>(cpu, [qs, ks, vs, _, _, dy]) => {
            let [dq, dk, dv] = cpu::backward::<T>(cpu, dims, m, (qs, ks, vs), dy, span, alpha);
            grads.add(q.id(), Tensor::from_buffer(q.value.shape(), dq))?;
            grads.add(k.id(), Tensor::from_buffer(k.value.shape(), dk))?;
            grads.add(v.id(), Tensor::from_buffer(v.value.shape(), dv))
        }, Cuda(_, [qs, ks, vs, o, rows, dy]) => {
            let d = if cuda::streams(compute, qs, dims, None) {
                let operands = cuda::Operands::separate(dims, qs.rounded()?, ks.rounded()?, vs.rounded()?);
                let kept = (o.rounded()?, rows.full()?);
                cuda::span_attention_backward(dims, operands, (span, alpha), kept, dy.rounded()?)?
            } else {
                let operands = [qs.full()?, ks.full()?, vs.full()?];
                plain::backward(dims, m, operands, Sees::Span(span), alpha, dy.full()?)?
            };
            grads.add(q.id(), Tensor::from_cuda(q.value.shape(), d.dq))?;
            grads.add(k.id(), Tensor::from_cuda(k.value.shape(), d.dk))?;
            grads.add(v.id(), Tensor::from_cuda(v.value.shape(), d.dv))
        })
    })
}
