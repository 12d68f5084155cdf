//! Attention of new tokens to keys and values that were kept when earlier tokens were computed: what generation does, one token
//! at a time. o_i = sum_{j in seen(i)} p_ij v_j with p_i = softmax or alpha-entmax over seen(i) of q_i . k_j / sqrt d + b_c(j).
//!
//! Work grows with the attended keys, not with the kept ones. It is for inference and has no gradient, so it takes and returns
//! plain tensors. A CPU rounds no operand; a card multiplies keys that were kept in bf16 as they are.

#[cfg(test)]
mod card_tests;
mod cpu;
pub mod cuda;
pub(in crate::ops::attention) mod lists;
#[cfg(test)]
mod tests;

use super::{Dims, Routes, Span, positions32};
use crate::device::Device;
use crate::device::cuda::{CudaData, Kind};
use crate::dispatch::on_device;
use crate::error::{Error, Result, ensure};
use crate::number::Compute;
use crate::ops::entmax::check_alpha_or_softmax;
use crate::shape::checked_numel;
use crate::tensor::Tensor;

/// Which keys a new token sees.
#[derive(Debug, Clone, Copy)]
pub enum Seen<'a> {
    /// A range of keys, with alpha-entmax over it; alpha 1 is softmax.
    Span(Span, f64),
    /// The chunks of its routes, with a bias `[entries]` where there is one, and softmax.
    Routes(&'a Routes, Option<&'a Tensor>),
}

impl Seen<'_> {
    /// Refuses what does not fit `t` queries after `past` tokens, and returns how many keys have to be kept.
    fn check(&self, op: &'static str, past: usize, dims: Dims) -> Result<usize> {
        let Dims { b, t, g, .. } = dims;
        let end = positions32(op, past, t)?;
        match *self {
            Seen::Span(span, alpha) => {
                span.check(op)?;
                check_alpha_or_softmax(op, alpha)?;
                Ok(span.keys(end))
            }
            Seen::Routes(routes, bias) => {
                let (have, want) = ((routes.first(), routes.extents()), (past, (b, g, t)));
                ensure!(
                    have == want,
                    op,
                    "the routes are of (first query, (batch, kv heads, queries)) = {have:?}, not {want:?}"
                );
                let shape = bias.map_or(&[][..], Tensor::shape);
                ensure!(bias.is_none() || shape.len() == 1, op, "the bias is {shape:?}, not one number an entry");
                Ok(end)
            }
        }
    }
}

/// Attention of `q [b, t, h, d]`, whose first query stands at position `past`, to the first rows of `k` and `v`
/// `[b, capacity, g, d]`, which hold those of the queries' own tokens too: `[b, t, h, d]`. Rows behind them are not read. A query
/// that sees no key gets 0.
///
/// # Errors
/// When shapes do not fit, there are fewer rows than are seen, or alpha is not in [1, 2].
pub fn cached_attention(q: &Tensor, k: &Tensor, v: &Tensor, past: usize, seen: Seen) -> Result<Tensor> {
    let op = "cached_attention";
    let [b, t, h, d] = q.dims(op)?;
    let [bk, capacity, g, dk] = k.dims(op)?;
    ensure!((b, d) == (bk, dk), op, "q is {:?}, k is {:?}", q.shape(), k.shape());
    ensure!(k.shape() == v.shape(), op, "k is {:?}, v is {:?}", k.shape(), v.shape());
    let dims = Dims::new(op, [b, t, h, d], g)?;
    let needed = seen.check(op, past, dims)?;
    ensure!(needed <= capacity, op, "{needed} keys are seen, {capacity} are there");
    let bias = match seen {
        Seen::Routes(_, Some(bias)) => bias,
        Seen::Routes(_, None) | Seen::Span(..) => q,
    };
    on_device!(op, [q, k, v, bias]; Cpu<T>(cpu, [qs, ks, vs, bias]) => {
        let seen = match seen {
            Seen::Span(span, alpha) => cpu::Seen::Span(span, alpha),
            Seen::Routes(routes, own) => {
                let list = routes.on_cpu(op, cpu)?;
                ensure!(own.is_none() || bias.len() == list.len(), op, "bias {} for {} entries", bias.len(), list.len());
                cpu::Seen::Routes(list, own.map(|_| bias))
            }
        };
        Ok(Tensor::from_buffer(q.shape(), cpu::forward::<T>(cpu, dims, (past, capacity), (qs, ks, vs), seen)))
    }, Cuda(gpu, [qs, ks, vs, bias]) => {
        let sees = match seen {
            Seen::Span(_, alpha) if alpha != 1.0 => {
                return Err(Error::invalid(op, "CUDA has no kernel for entmax over kept keys: generate without a cache there"));
            }
            Seen::Span(span, _) => cuda::Sees::Span(span),
            Seen::Routes(routes, own) => {
                let own = own.map(|_| bias.full()).transpose()?;
                cuda::Sees::Lists(routes.on_cuda_listed(op, gpu)?, own)
            }
        };
        let operands = if ks.is_rounded() && vs.is_rounded() && cuda::splits(dims) {
            [qs.rounded()?, ks.rounded()?, vs.rounded()?]
        } else {
            [qs.full()?, ks.full()?, vs.full()?]
        };
        Ok(Tensor::from_cuda(q.shape(), cuda::attention(dims, (past, capacity), operands, sees)?))
    })
}

/// Zeros like keys or values `x [b, t, g, d]` of so many query heads, with `rows` in the place of t: rounded to bf16 where a card's attention to a whole
/// text rounds its operands, so that a kept row is multiplied as it was in its own pass, and in full where it does not.
///
/// # Errors
/// When the heads do not fit, or the device has no memory left.
pub fn room_for_keys(x: &Tensor, rows: usize, heads: usize, compute: Compute) -> Result<Tensor> {
    let op = "room_for_keys";
    let [b, t, g, d] = x.dims(op)?;
    let dims = Dims::new(op, [b, t, heads, d], g)?;
    room(op, x, rows, |_| cuda::kind_of_kept(compute, x.dtype(), dims))
}

/// Zeros like `x [b, t, ..]`, with `rows` in the place of t, in the form that a card made it in: room for [`keep_rows`].
///
/// # Errors
/// When x has no such axis, or the device has no memory left.
pub fn room_for_rows(x: &Tensor, rows: usize) -> Result<Tensor> {
    room("room_for_rows", x, rows, |data| data.as_made().kind())
}

/// Zeros like `x [b, t, ..]`, with `rows` in the place of t; on a card of that kind.
fn room(op: &'static str, x: &Tensor, rows: usize, kind: impl FnOnce(&CudaData) -> Kind) -> Result<Tensor> {
    let mut shape = x.shape().to_vec();
    ensure!(shape.len() > 1, op, "{shape:?} has no rows");
    shape[1] = rows;
    match x.device() {
        Device::Cpu(_) => Tensor::zeros(x.device(), &shape, x.dtype()),
        Device::Cuda(gpu) => {
            let kind = kind(x.on_cuda(op, gpu)?);
            Ok(Tensor::from_cuda(&shape, gpu.zeros(op, kind, checked_numel(op, &shape)?)?))
        }
    }
}

/// Writes `rows [1, n, ..]` over those of `kept [1, capacity, ..]` from row `at` on, in place where nothing else shares it.
///
/// # Errors
/// When the rows have another size or type than those kept, or there is no room for them.
pub fn keep_rows(kept: &mut Tensor, at: usize, rows: &Tensor) -> Result<()> {
    let op = "keep_rows";
    let (to, from) = (kept.shape(), rows.shape());
    ensure!(
        to.len() > 1 && from.len() == to.len() && (to[0], from[0]) == (1, 1) && to[2..] == from[2..],
        op,
        "rows {from:?} do not fit into {to:?}"
    );
    let (n, capacity) = (from[1], to[1]);
    ensure!(
        at.checked_add(n).is_some_and(|end| end <= capacity),
        op,
        "{n} rows from {at} on do not fit into {capacity}"
    );
    let width: usize = to[2..].iter().product();
    on_device!(op, [rows]; Cpu<T>(_, [x]) => {
        kept.cpu_mut::<T>(op)?[at * width..(at + n) * width].copy_from_slice(x);
        Ok(())
    }, Cuda(gpu, [x]) => {
        let to = kept.cuda_mut(op, gpu)?.made_mut();
        let kind = to.kind();
        to.copy_at(at * width, x.of_kind(kind)?)
    })
}
