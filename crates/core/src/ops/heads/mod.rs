//! Queries, keys and values of attention: `x [b, t, c]` times the transposes of wq `[h d, c]`, wk and wv `[g d, c]`, cut into heads; rope
//! ([`super::rope`]) turns queries and keys. Kept for backward: x and the weights.
//!
//! One op instead of three products and two rotations, because a GPU then reads x once, makes its gradient in one product, and
//! turns heads on the way from one layout to the other. On a CPU it is those ops, one after the other.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cuda::Kind;
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ops::matmul::{linear_backward, linear_forward};
use crate::ops::rope::{RopeTable, rotate};
use crate::shape::checked_numel;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use cuda::Sizes;

/// q `[b, t, h, d]`, k and v `[b, t, g, d]` of `x [b, t, c]`, whose first token stands at position `first`, by the weights wq `[h d, c]`, wk
/// and wv `[g d, c]`, in the tape's [`crate::Compute`].
///
/// # Errors
/// When widths, element types or devices differ, the weights are no whole heads as wide as the table's, or the table has too few positions.
pub fn attention_heads(tape: &Tape, x: &Var, weights: [&Var; 3], table: &RopeTable, first: usize) -> Result<[Var; 3]> {
    let op = "attention_heads";
    let (compute, [wq, wk, wv]) = (tape.compute(), weights);
    let (sizes, shapes) = check(op, x, weights, table, first)?;
    // a card keeps the weights as it multiplied them
    let tensors = [&x.value, &wq.value, &wk.value, &wv.value, &table.angles];
    let (values, joined) = on_device!(op, tensors; Cpu<T>(_, _) => {
        let project = |i: usize| linear_forward(op, compute, &x.value, &weights[i].value, None)?.reshape(&shapes[i]);
        let turn = |y: Tensor| rotate(&y, table, first, false, compute);
        ([turn(project(0)?)?, turn(project(1)?)?, project(2)?], None)
    }, Cuda(_, [xs, wq, wk, wv, angles]) => {
        let kind = Kind::of_operands(compute, xs.dtype());
        let weights = [wq.full()?, wk.full()?, wv.full()?];
        let ([q, k, v], joined) = cuda::forward(xs.of_kind(kind)?, weights, angles.full()?, sizes)?;
        let [of_q, of_k, of_v] = &shapes;
        let values = [(of_q, q), (of_k, k), (of_v, v)].map(|(shape, x)| Tensor::from_cuda(shape, x));
        (values, Some(Tensor::from_cuda(&[sizes.width(), sizes.c], joined)))
    });
    let (x, weights, table) = (x.clone(), weights.map(Var::clone), table.clone());
    tape.record_several(op, values, move |dys, grads| {
        on_device!(op, [&x.value, joined.as_ref().unwrap_or(&x.value)]; Cpu<T>(_, _) => {
            // values first, as a tape of single ops walks back
            for (i, dy) in dys.into_iter().enumerate().rev() {
                let Some(dy) = dy else { continue };
                let dy = if i < 2 { rotate(&dy, &table, first, true, compute)? } else { dy };
                linear_backward(op, compute, &dy, &x, &weights[i], grads)?;
            }
            Ok(())
        }, Cuda(gpu, [_, joined]) => cuda::backward((gpu, compute), (dys, &x, &weights), joined, &table.angles, sizes, grads))
    })
}

/// The extents, and the shapes of q, k and v.
fn check(
    op: &'static str,
    x: &Var,
    weights: [&Var; 3],
    table: &RopeTable,
    first: usize,
) -> Result<(Sizes, [[usize; 4]; 3])> {
    let ([b, tokens, c], d) = (x.value.dims(op)?, table.width());
    let mut counts = [0; 3];
    for (count, w) in counts.iter_mut().zip(weights) {
        let [out, inner] = w.value.dims(op)?;
        let (of_x, of_w) = (x.value.shape(), w.value.shape());
        let fits = inner == c && out > 0 && out.is_multiple_of(d);
        ensure!(fits, op, "x has shape {of_x:?}, heads are {d} wide: a weight has shape {of_w:?}");
        *count = out / d;
    }
    let [heads, kv_heads, of_values] = counts;
    ensure!(kv_heads == of_values, op, "{kv_heads} heads of keys, {of_values} of values");
    let positions = table.positions();
    ensure!(first + tokens <= positions, op, "positions up to {} asked, the table has {positions}", first + tokens);
    let sizes = Sizes { rows: b * tokens, c, tokens, heads, kv_heads, d, first };
    checked_numel(op, &[sizes.rows, sizes.width()])?;
    Ok((sizes, counts.map(|n| [b, tokens, n, d])))
}
