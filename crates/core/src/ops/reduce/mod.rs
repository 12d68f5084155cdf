//! Sums: over one axis, over everything.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::shape::numel;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Sum over `axis`, which disappears.
///
/// # Errors
/// When the axis does not exist.
pub fn sum_axis(tape: &Tape, x: &Var, axis: usize) -> Result<Var> {
    let shape = x.value.shape().to_vec();
    ensure!(axis < shape.len(), "sum_axis", "axis {axis} of shape {shape:?}");
    let (outer, n, inner) = (numel(&shape[..axis]), shape[axis], numel(&shape[axis + 1..]));
    let mut out_shape = shape.clone();
    out_shape.remove(axis);
    let value = on_device!("sum_axis", [&x.value]; Cpu<T>(cpu, [data]) => {
        let mut out = cpu.zeros::<T>(outer * inner);
        for o in 0..outer {
            for i in 0..n {
                let from = &data[(o * n + i) * inner..][..inner];
                out[o * inner..][..inner].iter_mut().zip(from).for_each(|(s, &v)| *s += v);
            }
        }
        Tensor::from_buffer(&out_shape, out)
    }, Cuda(_, [data]) => Tensor::from_cuda(&out_shape, cuda::sum_axis(data.full()?, (outer, n, inner))?));
    let id = x.id();
    tape.record("sum_axis", value, move |dy, grads| {
        let dx = on_device!("sum_axis", [&dy]; Cpu<T>(cpu, [dy]) => {
            let mut dx = cpu.alloc::<T>(numel(&shape));
            for (k, row) in dx.chunks_mut(inner.max(1)).enumerate() {
                row.copy_from_slice(&dy[k / n * inner..][..inner]);
            }
            Tensor::from_buffer(&shape, dx)
        }, Cuda(_, [dy]) => Tensor::from_cuda(&shape, cuda::sum_axis_backward(dy.full()?, (outer, n, inner))?));
        grads.add(id, dx)
    })
}

/// Sum of all elements, a scalar of shape [].
///
/// # Errors
/// Never for a valid variable.
pub fn sum_all(tape: &Tape, x: &Var) -> Result<Var> {
    let flat = crate::ops::reshape(tape, x, &[x.value.numel()])?;
    sum_axis(tape, &flat, 0)
}
