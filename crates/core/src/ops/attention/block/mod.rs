//! Attention to a list of chunks per query with an optional bias per (query, chunk) entry: z_j = q . k_j / sqrt d + b_c(j),
//! causal inside the own chunk. db is the sum of dz over the chunk's tokens and the group's heads. Kept for backward: q,
//! k, v, bias, o and lse. Work grows with the entries, memory with the outputs.

#[cfg(test)]
mod tests;

use super::cuda::plain::{self, Sees};
use super::engine::{self, Outputs};
use super::{Dims, Routes, cuda};
use crate::dispatch::on_device;
use crate::error::{Error, Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Attention of `q [b, t, h, d]` to the listed chunks of `k`, `v [b, t, g, d]`, with `bias [entries]` added to the
/// scaled logits of an entry's tokens: `[b, t, h, d]`.
///
/// # Errors
/// When the shapes, the routes and the bias do not fit, or differ in device or element type.
// Above 60 lines: the passes of both devices share what is checked and kept here.
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
    ensure!(routes.first() == 0, op, "the routes are of queries after {} kept tokens", routes.first());
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
    }, Cuda(gpu, [qs, ks, vs, biases]) => {
        let mask = routes.on_cuda(op, gpu)?;
        if let Some(bias) = bias {
            let shape = bias.value.shape();
            ensure!(shape == [mask.entries()], op, "bias {shape:?} for {} entries", mask.entries());
        }
        let biases = bias.map(|_| biases.full()).transpose()?;
        if cuda::streams(compute, qs, dims, Some(mask.chunk_size())) {
            let operands = cuda::Operands::separate(dims, qs.rounded()?, ks.rounded()?, vs.rounded()?);
            let (out, lse) = cuda::forward(dims, operands, Some(mask), biases)?;
            let lse = Tensor::from_cuda(&[dims.b, dims.t, dims.h], lse);
            (Tensor::from_cuda(q.value.shape(), out), lse, own_bias.clone())
        } else {
            let operands = [qs.full()?, ks.full()?, vs.full()?];
            let out = plain::forward(dims, dims.t, operands, Sees::Listed(mask, biases), 1.0)?;
            let out = Tensor::from_cuda(q.value.shape(), out);
            (out.clone(), out, own_bias.clone())
        }
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
        }, Cuda(gpu, [qs, ks, vs, out, lse, dy, bias]) => {
            let mask = routes.on_cuda(op, gpu)?;
            let bias = bias_id.map(|_| bias.full()).transpose()?;
            let d = if cuda::streams(compute, qs, dims, Some(mask.chunk_size())) {
                let operands = cuda::Operands::separate(dims, qs.rounded()?, ks.rounded()?, vs.rounded()?);
                cuda::backward(dims, operands, Some(mask), bias, (out.rounded()?, lse.full()?), dy.rounded()?)?
            } else {
                let operands = [qs.full()?, ks.full()?, vs.full()?];
                plain::backward(dims, dims.t, operands, Sees::Listed(mask, bias), 1.0, dy.full()?)?
            };
            grads.add(q.id(), Tensor::from_cuda(q.value.shape(), d.dq))?;
            grads.add(k.id(), Tensor::from_cuda(k.value.shape(), d.dk))?;
            grads.add(v.id(), Tensor::from_cuda(v.value.shape(), d.dv))?;
            match (bias_id, d.dbias) {
                (Some(id), Some(d)) => grads.add(id, Tensor::from_cuda(&[mask.entries()], d)),
                (Some(_), None) => Err(Error::invalid(op, "the gradient of the bias was not computed")),
                (None, _) => Ok(()),
            }
        })
    })
}
