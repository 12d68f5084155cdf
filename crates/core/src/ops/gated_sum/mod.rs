//! y = sum_i gate_i x_i, of three branches with a gate for each row: how native sparse attention mixes compressed, chosen and sliding attention
//! (arXiv 2502.11089, equation 5). Kept for backward: gates and branches. dx_i = gate_i dy, dgate_i = <x_i, dy>.
//!
//! One op instead of three products and two sums, which on a GPU wait for memory alone: it reads every branch once.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::simd;
use crate::device::cuda::{CudaBuffer, CudaData};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The sum of `branches [.., d]`, each times its gate of `gates [.., 3]`.
///
/// # Errors
/// When shapes or element types differ.
pub fn gated_sum(tape: &Tape, gates: &Var, branches: [&Var; 3]) -> Result<Var> {
    let op = "gated_sum";
    let (rows, width) = (gates.value.numel() / 3, branches[0].value.rows().1);
    let shape = branches[0].value.shape();
    for branch in branches {
        ensure!(branch.value.shape() == shape, op, "branches of shapes {shape:?} and {:?}", branch.value.shape());
    }
    let of = gates.value.shape();
    let fits = !shape.is_empty() && of.len() == shape.len() && of.split_last() == Some((&3, &shape[..shape.len() - 1]));
    ensure!(fits, op, "gates of shape {of:?} for branches of {shape:?}: a gate for each of three in each row");
    let [a, b, c] = branches.map(|x| &x.value);
    let y = on_device!(op, [&gates.value, a, b, c]; Cpu<T>(cpu, [gates, a, b, c]) => {
        let mut y = cpu.alloc::<T>(rows * width);
        cpu.for_pieces(&mut y, width.max(1), |i, row| {
            let [p, q, r] = [gates[3 * i], gates[3 * i + 1], gates[3 * i + 2]];
            let [a, b, c] = [a, b, c].map(|x| &x[i * width..][..width]);
            for (((y, &a), &b), &c) in row.iter_mut().zip(a).zip(b).zip(c) {
                *y = a * p + b * q + c * r;
            }
        });
        Tensor::from_buffer(shape, y)
    }, Cuda(_, [gates, a, b, c]) => {
        Tensor::from_cuda(shape, cuda::forward(gates.full()?, in_one_kind([a, b, c])?, width)?)
    });
    let (gates, branches) = (gates.clone(), branches.map(Var::clone));
    tape.record(op, y, move |dy, grads| {
        let [a, b, c] = branches.each_ref().map(|x| &x.value);
        let (dgates, dx) = on_device!(op, [&dy, &gates.value, a, b, c]; Cpu<T>(cpu, [dy, of, a, b, c]) => {
            let mut dgates = cpu.alloc::<T>(3 * rows);
            cpu.for_pieces(&mut dgates, 3, |i, three| {
                for (d, x) in three.iter_mut().zip([a, b, c]) {
                    *d = simd::dot(&x[i * width..][..width], &dy[i * width..][..width]);
                }
            });
            let dx = [0, 1, 2].map(|branch| {
                let mut dx = cpu.copy::<T>(dy);
                cpu.for_pieces(&mut dx, width.max(1), |i, row| row.iter_mut().for_each(|d| *d *= of[3 * i + branch]));
                Tensor::from_buffer(a_shape(&branches), dx)
            });
            (Tensor::from_buffer(gates.value.shape(), dgates), dx)
        }, Cuda(_, [dy, of, a, b, c]) => {
            let (dgates, dx) = cuda::backward(dy.full()?, of.full()?, in_one_kind([a, b, c])?, width)?;
            (Tensor::from_cuda(gates.value.shape(), dgates), dx.map(|dx| Tensor::from_cuda(a_shape(&branches), dx)))
        });
        grads.add(gates.id(), dgates)?;
        branches.iter().zip(dx).try_for_each(|(x, dx)| grads.add(x.id(), dx))
    })
}

/// Branches as attention made them: rounded where all are that alone, else in full.
fn in_one_kind(x: [&CudaData; 3]) -> Result<[&CudaBuffer; 3]> {
    let rounded = x.iter().all(|x| x.is_operand());
    let [a, b, c] = x.map(|x| if rounded { x.rounded() } else { x.full() });
    Ok([a?, b?, c?])
}

/// The shape that all branches have.
fn a_shape(branches: &[Var; 3]) -> &[usize] {
    branches[0].value.shape()
}
