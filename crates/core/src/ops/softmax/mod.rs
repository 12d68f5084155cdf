//! y = softmax(x) over the last axis. Minus infinity gives exactly 0; a row of nothing else gives all zeros. Kept for
//! backward: y. dx = y (dy - <y, dy>).

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::simd::{self, simd};
use crate::dispatch::on_device;
use crate::error::Result;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

simd! {
    /// In place; a row whose largest element is minus infinity becomes zero.
    pub(crate) fn softmax_row<T>(row: &mut [T]) {
        let top = simd::max(row);
        if top == T::NEG_INF {
            row.fill(T::ZERO);
            return;
        }
        for x in row.iter_mut() {
            *x = (*x - top).exp();
        }
        let inverse = T::ONE / simd::sum(row);
        for x in row.iter_mut() {
            *x *= inverse;
        }
    }
}

/// Softmax over the last axis.
///
/// # Errors
/// Never for a valid variable.
pub fn softmax(tape: &Tape, x: &Var) -> Result<Var> {
    let (_, width) = x.value.rows();
    let y = on_device!("softmax", [&x.value]; Cpu<T>(cpu, [numbers]) => {
        let mut out = cpu.copy::<T>(numbers);
        cpu.for_pieces(&mut out, width.max(1), |_, row| softmax_row(row));
        Tensor::from_buffer(x.value.shape(), out)
    }, Cuda(_, [numbers]) => Tensor::from_cuda(x.value.shape(), cuda::forward(numbers.full()?, width)?));
    let (id, kept) = (x.id(), y.clone());
    tape.record("softmax", y, move |dy, grads| {
        let dx = on_device!("softmax", [&dy, &kept]; Cpu<T>(cpu, [g, p]) => {
            let mut dx = cpu.alloc::<T>(g.len());
            cpu.for_pieces(&mut dx, width.max(1), |i, row| {
                let (g, p) = (&g[i * width..][..width], &p[i * width..][..width]);
                let inner = simd::dot(g, p);
                for ((d, &g), &p) in row.iter_mut().zip(g).zip(p) {
                    *d = p * (g - inner);
                }
            });
            Tensor::from_buffer(dy.shape(), dx)
        }, Cuda(_, [g, p]) => Tensor::from_cuda(dy.shape(), cuda::backward(g.full()?, p.full()?, width)?));
        grads.add(id, dx)
    })
}
