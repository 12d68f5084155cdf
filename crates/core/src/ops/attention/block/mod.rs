//! Attention to a list of chunks per query with an optional bias per (query, chunk) entry: z_j = q . k_j / sqrt d + b_c(j),
//! causal inside the own chunk. db is the sum of dz over the chunk's tokens and the group's heads. Kept for backward: q,
//! k, v, bias, o and lse. Work grows with the entries, memory with the outputs.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::Dims;
use super::engine::{self, Outputs};
use super::list::BlockList;
use crate::error::{Result, ensure};
use crate::number::with_number;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Attention of `q [b, t, h, d]` to the listed chunks of `k`, `v [b, t, g, d]`, with `bias [entries]` added to the
/// scaled logits of an entry's tokens: `[b, t, h, d]`.
///
/// # Errors
/// When the shapes, the list and the bias do not fit.
pub fn block_attention(
    tape: &Tape,
    q: &Var,
    k: &Var,
    v: &Var,
    list: &Arc<BlockList>,
    bias: Option<&Var>,
) -> Result<Var> {
    let op = "block_attention";
    let (dims, dtype) = Dims::check(op, &q.value, &k.value, Some(&v.value))?;
    ensure!(
        list.extents() == (dims.b, dims.g, dims.t),
        op,
        "the list is for (batch, kv heads, queries) = {:?}, q and k have {:?}",
        list.extents(),
        (dims.b, dims.g, dims.t)
    );
    if let Some(bias) = bias {
        ensure!(bias.value.shape() == [list.len()], op, "bias {:?} for {} entries", bias.value.shape(), list.len());
    }
    let zeros = || Tensor::zeros(q.value.device(), &[list.len()], dtype);
    let bias_value = bias.map_or_else(zeros, |b| b.value.clone());
    let compute = tape.compute();
    let (out, lse) = with_number!(dtype, T => {
        let inputs = (q.value.data::<T>(), k.value.data::<T>(), v.value.data::<T>());
        let (out, lse) = engine::forward(q.value.cpu(), compute, dims, inputs, &**list, bias_value.data());
        (Tensor::from_buffer(q.value.shape(), out), Tensor::from_buffer(&[dims.b, dims.t, dims.h], lse))
    });
    let (q, k, v, bias_id) = (q.clone(), k.clone(), v.clone(), bias.map(Var::id));
    let (kept, list) = (out.clone(), list.clone());
    tape.record(op, out, move |dy, grads| {
        with_number!(dtype, T => {
            let inputs = (q.value.data::<T>(), k.value.data::<T>(), v.value.data::<T>());
            let outputs = Outputs { out: kept.data::<T>(), lse: lse.data::<T>(), dout: dy.data::<T>() };
            let lengths = list.tile_lengths();
            let d = engine::backward(dy.cpu(), compute, dims, inputs, outputs, &*list, (bias_value.data(), &lengths));
            grads.add(q.id(), Tensor::from_buffer(q.value.shape(), d.dq))?;
            grads.add(k.id(), Tensor::from_buffer(k.value.shape(), d.dk))?;
            grads.add(v.id(), Tensor::from_buffer(v.value.shape(), d.dv))?;
            match bias_id {
                Some(id) => grads.add(id, Tensor::from_buffer(&[list.len()], d.dbias)),
                None => Ok(()),
            }
        })
    })
}
