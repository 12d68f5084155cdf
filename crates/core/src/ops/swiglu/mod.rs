//! y = silu(gate) * up, silu(x) = x / (1 + e^-x) (Shazeer 2020, arXiv 2002.05202). Kept for backward: gate and up.
//! dup = dy silu(gate), dgate = dy up s (1 + gate (1 - s)) with s = sigmoid(gate).

#[cfg(test)]
mod tests;

use crate::device::simd::simd;
use crate::error::{Result, ensure};
use crate::storage::with_real;
use crate::tape::{Tape, Var};
use crate::tensor::{ELEMENTWISE, Tensor, same_dtype};

simd! {
    fn forward<T>(gate: &[T], up: &[T], y: &mut [T]) {
        for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (T::ONE + (-g).exp()) * u;
        }
    }
}

simd! {
    fn backward<T>(dy: &[T], gate: &[T], up: &[T], dgate: &mut [T], dup: &mut [T]) {
        for (((dg, du), &d), (&g, &u)) in dgate.iter_mut().zip(dup).zip(dy).zip(gate.iter().zip(up)) {
            let s = T::ONE / (T::ONE + (-g).exp());
            *du = d * g * s;
            *dg = d * u * s * (T::ONE + g * (T::ONE - s));
        }
    }
}

/// `silu(gate) * up`, element by element.
///
/// # Errors
/// When the shapes or element types differ.
pub fn swiglu(tape: &Tape, gate: &Var, up: &Var) -> Result<Var> {
    let (sg, su) = (gate.value.shape(), up.value.shape());
    ensure!(sg == su, "swiglu", "gate is {sg:?}, up is {su:?}");
    let range = |i: usize, n: usize| i * ELEMENTWISE..i * ELEMENTWISE + n;
    let y = with_real!(same_dtype("swiglu", &gate.value, &up.value)?, T => {
        let (g, u) = (gate.value.data::<T>(), up.value.data::<T>());
        let mut y = gate.value.cpu().alloc::<T>(g.len());
        gate.value.cpu().for_chunks(&mut y, ELEMENTWISE, |i, y| {
            forward(&g[range(i, y.len())], &u[range(i, y.len())], y);
        });
        Tensor::from_buffer(sg, y)
    });
    let (gate, up) = (gate.clone(), up.clone());
    tape.record("swiglu", y, move |dy, grads| {
        let (dgate, dup) = with_real!(dy.dtype(), T => {
            let (d, g, u) = (dy.data::<T>(), gate.value.data::<T>(), up.value.data::<T>());
            let (mut dgate, mut dup) = (dy.cpu().alloc::<T>(d.len()), dy.cpu().alloc::<T>(d.len()));
            dy.cpu().for_chunks2((&mut dgate, ELEMENTWISE), (&mut dup, ELEMENTWISE), |i, dg, du| {
                let r = range(i, dg.len());
                backward(&d[r.clone()], &g[r.clone()], &u[r], dg, du);
            });
            (Tensor::from_buffer(dy.shape(), dgate), Tensor::from_buffer(dy.shape(), dup))
        });
        grads.add(gate.id(), dgate)?;
        grads.add(up.id(), dup)
    })
}
