//! Primitives that move numbers without changing them: reshape, transpose, index_select (which also gathers and repeats).

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ids::Ids;
use crate::shape::{checked_numel, numel, strides, walk};
use crate::tape::{Tape, Var};
use crate::tensor::{ELEMENTWISE, Tensor};

/// The same numbers under another shape.
///
/// # Errors
/// When the number of elements differs.
pub fn reshape(tape: &Tape, x: &Var, shape: &[usize]) -> Result<Var> {
    let (id, old) = (x.id(), x.value.shape().to_vec());
    tape.record("reshape", x.value.reshape(shape)?, move |dy, grads| grads.add(id, dy.reshape(&old)?))
}

fn permute(x: &Tensor, axes: &[usize]) -> Result<Tensor> {
    let own = strides(x.shape());
    let shape: Vec<usize> = axes.iter().map(|&a| x.shape()[a]).collect();
    let stride: Vec<usize> = axes.iter().map(|&a| own[a]).collect();
    on_device!("transpose", [x]; Cpu<T>(cpu, [data]) => {
        let mut out = cpu.alloc::<T>(data.len());
        cpu.for_pieces(&mut out, ELEMENTWISE, |i, out| {
            out.iter_mut().zip(walk(&shape, &stride, i * ELEMENTWISE)).for_each(|(o, from)| *o = data[from]);
        });
        Ok(Tensor::from_buffer(&shape, out))
    }, Cuda(_, [data]) => Ok(Tensor::from_cuda(&shape, cuda::permute(data.full()?, x.shape(), axes)?)))
}

/// Axis `i` of the output is axis `axes[i]` of the input.
///
/// # Errors
/// When `axes` is not a permutation of the input's axes.
pub fn transpose(tape: &Tape, x: &Var, axes: &[usize]) -> Result<Var> {
    let mut sorted = axes.to_vec();
    sorted.sort_unstable();
    ensure!(
        sorted.iter().copied().eq(0..x.value.shape().len()),
        "transpose",
        "{axes:?} is no permutation of the axes of shape {:?}",
        x.value.shape()
    );
    let mut back = vec![0; axes.len()];
    axes.iter().enumerate().for_each(|(i, &a)| back[a] = i);
    let id = x.id();
    tape.record("transpose", permute(&x.value, axes)?, move |dy, grads| grads.add(id, permute(&dy, &back)?))
}

/// `out[.., i, ..] = x[.., index[i], ..]` along `axis`: picks, reorders or repeats.
///
/// # Errors
/// When the axis does not exist or an index is too large.
pub fn index_select(tape: &Tape, x: &Var, axis: usize, index: &Ids) -> Result<Var> {
    let shape = x.value.shape().to_vec();
    ensure!(axis < shape.len(), "index_select", "axis {axis} of shape {shape:?}");
    let n = shape[axis];
    index.check_below("index_select", "index", n, &format!("the extent of axis {axis} of shape {shape:?}:"))?;
    index.check_counted("index_select", "indices")?;
    let inner = numel(&shape[axis + 1..]);
    let mut out_shape = shape.clone();
    out_shape[axis] = index.len();
    let size = checked_numel("index_select", &out_shape)?;
    let value = on_device!("index_select", [&x.value]; Cpu<T>(cpu, [data]) => {
        let index = index.on_cpu("index_select", cpu)?;
        let mut out = cpu.alloc::<T>(size);
        let rows = (ELEMENTWISE / inner.max(1)).max(1);
        cpu.for_pieces(&mut out, rows * inner, |task, out| {
            for (r, row) in out.chunks_exact_mut(inner).enumerate() {
                let (o, j) = ((task * rows + r) / index.len(), (task * rows + r) % index.len());
                row.copy_from_slice(&data[(o * n + index[j] as usize) * inner..][..inner]);
            }
        });
        Tensor::from_buffer(&out_shape, out)
    }, Cuda(gpu, [data]) => {
        let (index, outer) = (index.on_cuda("index_select", gpu)?, numel(&shape[..axis]));
        Tensor::from_cuda(&out_shape, cuda::index_select(data.full()?, (outer, n, inner), index)?)
    });
    let (id, index) = (x.id(), index.clone());
    tape.record("index_select", value, move |dy, grads| {
        let dx = on_device!("index_select", [&dy]; Cpu<T>(cpu, [g]) => {
            let index = index.on_cpu("index_select", cpu)?;
            let mut dx = cpu.zeros::<T>(numel(&shape));
            let blocks = (ELEMENTWISE / (n * inner).max(1)).max(1);
            cpu.for_pieces(&mut dx, blocks * n * inner, |task, dx| {
                for (r, dx) in dx.chunks_exact_mut(n * inner).enumerate() {
                    for (j, &i) in index.iter().enumerate() {
                        let from = &g[((task * blocks + r) * index.len() + j) * inner..][..inner];
                        dx[i as usize * inner..][..inner].iter_mut().zip(from).for_each(|(d, &g)| *d += g);
                    }
                }
            });
            Tensor::from_buffer(&shape, dx)
        }, Cuda(gpu, [g]) => {
            let (index, outer) = (index.on_cuda("index_select", gpu)?, numel(&shape[..axis]));
            Tensor::from_cuda(&shape, cuda::index_select_backward(g.full()?, (outer, n, inner), index)?)
        });
        grads.add(id, dx)
    })
}
