//! Attention to a list of chunks per query with an optional bias per (query, chunk) entry: z_j = q . k_j / sqrt d + b_c(j),
//! causal inside the own chunk. db is the sum of dz over the chunk's tokens and the group's heads. Kept for backward: q,
//! k, v, bias, o and lse. Work grows with the entries, memory with the outputs.

#[cfg(test)]
mod tests;

use super::engine::{self, Outputs};
use super::{Dims, Routes};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Attention of `q [b, t, h, d]` to the listed chunks of `k`, `v [b, t, g, d]`, with `bias [entries]` added to the
/// scaled logits of an entry's tokens: `[b, t, h, d]`.
///
/// # Errors
/// When the shapes, the routes and the bias do not fit, or differ in device or element type.
pub fn block_attention(tape: &Tape, q: &Var, k: &Var, v: &Var, routes: &Routes, bias: Option<&Var>) -> Result<Var> {
    let op = "block_attention";
    let dims = Dims::check(op, &q.value, &k.value, Some(&v.value))?;
    ensure!(
        routes.extents() == (dims.b, dims.g, dims.t),
        op,
        "the list is for (batch, kv heads, queries) = {:?}, q and k have {:?}",
        routes.extents(),
        (dims.b, dims.g, dims.t)
    );
    let compute = tape.compute();
    let own_bias = bias.map_or(&q.value, |bias| &bias.value);
    let tensors = [&q.value, &k.value, &v.value, own_bias];
    let (out, lse, bias_value) = on_device!(op, tensors; Cpu<T>(cpu, [qs, ks, vs, biases]) => {
        let list = routes.on_cpu(op, cpu)?;
        let value = match bias {
            Some(bias) => {
                let shape = bias.value.shape();
                ensure!(shape == [list.len()], op, "bias {shape:?} for {} entries", list.len());
                bias.value.clone()
            }
            None => Tensor::from_buffer(&[list.len()], cpu.zeros::<T>(list.len())),
        };
        let biases = if bias.is_some() { biases } else { value.on_cpu(op, cpu)? };
        let (out, lse) = engine::forward::<T>(cpu, compute, dims, (qs, ks, vs), list, biases);
        (Tensor::from_buffer(q.value.shape(), out), Tensor::from_buffer(&[dims.b, dims.t, dims.h], lse), value)
    });
    let (q, k, v, bias_id) = (q.clone(), k.clone(), v.clone(), bias.map(Var::id));
    let (kept, routes) = (out.clone(), routes.clone());
    tape.record(op, out, move |dy, grads| {
        let tensors = [&q.value, &k.value, &v.value, &kept, &lse, &dy, &bias_value];
        on_device!(op, tensors; Cpu<T>(cpu, [qs, ks, vs, out, lse, dy, bias]) => {
            let list = routes.on_cpu(op, cpu)?;
            let lengths = list.tile_lengths();
            let d = engine::backward::<T>(cpu, compute, dims, (qs, ks, vs), Outputs { out, lse, dout: dy }, list, (bias, &lengths));
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
