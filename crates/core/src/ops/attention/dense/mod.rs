//! Causal softmax attention: o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt d) v_j. Kept for backward: q, k, v, o and lse.

#[cfg(test)]
mod tests;

use super::cuda::plain::{self, Sees};
use super::engine::{self, Outputs, QUERY_TILE, Visits};
use super::{Dims, Span, cuda};
use crate::dispatch::on_device;
use crate::error::Result;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Keys of a block.
const KEY_BLOCK: usize = 64;

/// Every block up to the tile's own, attended by all queries that have reached it.
struct All {
    rows: Vec<u32>,
    queries: usize,
}

impl Visits for All {
    fn block_size(&self) -> usize {
        KEY_BLOCK
    }
    fn for_each(&self, _: usize, _: usize, tile: usize, mut visit: impl FnMut(usize, &[u32], &[u32])) {
        let first = tile * QUERY_TILE;
        let rows = QUERY_TILE.min(self.queries - first);
        for block in 0..(first + rows).div_ceil(KEY_BLOCK) {
            visit(block, &self.rows[(block * KEY_BLOCK).saturating_sub(first)..rows], &[]);
        }
    }
}

/// Causal attention of `q [b, t, h, d]` to `k`, `v [b, t, g, d]`: `[b, t, h, d]`.
///
/// # Errors
/// When the shapes do not fit or h is no multiple of g.
pub fn dense_attention(tape: &Tape, q: &Var, k: &Var, v: &Var) -> Result<Var> {
    let op = "dense_attention";
    let dims = Dims::check(op, &q.value, &k.value, Some(&v.value))?;
    let all = All { rows: (0..QUERY_TILE as u32).collect(), queries: dims.t };
    let compute = tape.compute();
    let (out, lse) = on_device!(op, [&q.value, &k.value, &v.value]; Cpu<T>(cpu, [qs, ks, vs]) => {
        let (out, lse) = engine::forward::<T>(cpu, compute, dims, (qs, ks, vs), &all, &[]);
        (Tensor::from_buffer(q.value.shape(), out), Tensor::from_buffer(&[dims.b, dims.t, dims.h], lse))
    }, Cuda(_, [qs, ks, vs]) => {
        if cuda::streams(compute, qs, dims, None) {
            let operands = cuda::Operands::separate(dims, qs.rounded()?, ks.rounded()?, vs.rounded()?);
            let (out, lse) = cuda::forward(dims, operands, None, None)?;
            (Tensor::from_cuda(q.value.shape(), out), Tensor::from_cuda(&[dims.b, dims.t, dims.h], lse))
        } else {
            let operands = [qs.full()?, ks.full()?, vs.full()?];
            let out = plain::forward(dims, dims.t, operands, Sees::Span(Span::Causal), 1.0)?;
            let out = Tensor::from_cuda(q.value.shape(), out);
            (out.clone(), out)
        }
    });
    let (q, k, v, kept) = (q.clone(), k.clone(), v.clone(), out.clone());
    tape.record(op, out, move |dy, grads| {
        let tensors = [&q.value, &k.value, &v.value, &kept, &lse, &dy];
        on_device!(op, tensors; Cpu<T>(cpu, [qs, ks, vs, out, lse, dy]) => {
            let d = engine::backward::<T>(cpu, compute, dims, (qs, ks, vs), Outputs { out, lse, dout: dy }, &all, (&[], &[]));
            grads.add(q.id(), Tensor::from_buffer(q.value.shape(), d.dq))?;
            grads.add(k.id(), Tensor::from_buffer(k.value.shape(), d.dk))?;
            grads.add(v.id(), Tensor::from_buffer(v.value.shape(), d.dv))
        }, Cuda(_, [qs, ks, vs, out, lse, dy]) => {
            let d = if cuda::streams(compute, qs, dims, None) {
                let operands = cuda::Operands::separate(dims, qs.rounded()?, ks.rounded()?, vs.rounded()?);
                cuda::backward(dims, operands, None, None, (out.rounded()?, lse.full()?), dy.rounded()?)?
            } else {
                let operands = [qs.full()?, ks.full()?, vs.full()?];
                plain::backward(dims, dims.t, operands, Sees::Span(Span::Causal), 1.0, dy.full()?)?
            };
            grads.add(q.id(), Tensor::from_cuda(q.value.shape(), d.dq))?;
            grads.add(k.id(), Tensor::from_cuda(k.value.shape(), d.dk))?;
            grads.add(v.id(), Tensor::from_cuda(v.value.shape(), d.dv))
        })
    })
}
