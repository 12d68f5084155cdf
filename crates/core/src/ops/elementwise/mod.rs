//! Elementwise primitives. Binary ones broadcast: ranks align at the right, an axis of one repeats.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::simd::simd;
use crate::error::{Result, ensure};
use crate::number::with_number;
use crate::shape::{broadcast, broadcast_strides, numel, walk};
use crate::tape::{Tape, Var};
use crate::tensor::{ELEMENTWISE, Tensor, same_dtype};

/// What two numbers become.
#[derive(Debug, Clone, Copy)]
pub enum Binary {
    /// Their sum.
    Add,
    /// Their difference.
    Sub,
    /// Their product.
    Mul,
}

simd! {
    fn binary_kernel<T>(kind: Binary, a: &[T], b: &[T], out: &mut [T]) {
        match kind {
            Binary::Add => for ((o, &x), &y) in out.iter_mut().zip(a).zip(b) { *o = x + y },
            Binary::Sub => for ((o, &x), &y) in out.iter_mut().zip(a).zip(b) { *o = x - y },
            Binary::Mul => for ((o, &x), &y) in out.iter_mut().zip(a).zip(b) { *o = x * y },
        }
    }
}

fn binary_value(op: &'static str, kind: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let shape = broadcast(op, a.shape(), b.shape())?;
    let (a, b) = (expand(a, &shape), expand(b, &shape));
    with_number!(same_dtype(op, &a, &b)?, T => {
        let (x, y) = (a.data::<T>(), b.data::<T>());
        let mut out = a.cpu().alloc::<T>(numel(&shape));
        a.cpu().for_chunks(&mut out, ELEMENTWISE, |i, o| {
            let range = i * ELEMENTWISE..i * ELEMENTWISE + o.len();
            binary_kernel(kind, &x[range.clone()], &y[range], o);
        });
        Ok(Tensor::from_buffer(&shape, out))
    })
}

/// Repeats axes of one until the shape is `shape`.
fn expand(x: &Tensor, shape: &[usize]) -> Tensor {
    if x.shape() == shape {
        return x.clone();
    }
    let stride = broadcast_strides(x.shape(), shape);
    with_number!(x.dtype(), T => {
        let mut out = x.cpu().alloc::<T>(numel(shape));
        let data = x.data::<T>();
        x.cpu().for_chunks(&mut out, ELEMENTWISE, |i, out| {
            out.iter_mut().zip(walk(shape, &stride, i * ELEMENTWISE)).for_each(|(o, from)| *o = data[from]);
        });
        Tensor::from_buffer(shape, out)
    })
}

/// The gradient of [`expand`]: sums what was repeated.
fn reduce_to(d: Tensor, shape: &[usize]) -> Tensor {
    if d.shape() == shape {
        return d;
    }
    let stride = broadcast_strides(shape, d.shape());
    with_number!(d.dtype(), T => {
        let mut out = d.cpu().zeros::<T>(numel(shape));
        for (&g, to) in d.data::<T>().iter().zip(walk(d.shape(), &stride, 0)) {
            out[to] += g;
        }
        Tensor::from_buffer(shape, out)
    })
}

/// `a + b`.
///
/// # Errors
/// When shapes do not broadcast or element types differ; so for every op of this room.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let out = binary_value("add", Binary::Add, &a.value, &b.value)?;
    let ((ia, sa), (ib, sb)) = ((a.id(), a.value.shape().to_vec()), (b.id(), b.value.shape().to_vec()));
    tape.record("add", out, move |dy, grads| {
        grads.add(ia, reduce_to(dy.clone(), &sa))?;
        grads.add(ib, reduce_to(dy, &sb))
    })
}

/// `a - b`.
///
/// # Errors
/// As [`add`].
pub fn sub(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let out = binary_value("sub", Binary::Sub, &a.value, &b.value)?;
    let ((ia, sa), (ib, sb)) = ((a.id(), a.value.shape().to_vec()), (b.id(), b.value.shape().to_vec()));
    tape.record("sub", out, move |dy, grads| {
        grads.add(ia, reduce_to(dy.clone(), &sa))?;
        grads.add(ib, reduce_to(map(&dy, |g: f64| -g), &sb))
    })
}

/// `a * b`, element by element.
///
/// # Errors
/// As [`add`].
pub fn mul(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let out = binary_value("mul", Binary::Mul, &a.value, &b.value)?;
    let (a, b) = (a.clone(), b.clone());
    tape.record("mul", out, move |dy, grads| {
        grads.add(a.id(), reduce_to(binary_value("mul", Binary::Mul, &dy, &b.value)?, a.value.shape()))?;
        grads.add(b.id(), reduce_to(binary_value("mul", Binary::Mul, &dy, &a.value)?, b.value.shape()))
    })
}

/// Applies a function in f64 to every element.
fn map(x: &Tensor, f: impl Fn(f64) -> f64 + Sync + Send) -> Tensor {
    with_number!(x.dtype(), T => {
        let data = x.data::<T>();
        let mut out = x.cpu().alloc::<T>(data.len());
        x.cpu().for_chunks(&mut out, ELEMENTWISE, |i, o| {
            for (o, v) in o.iter_mut().zip(&data[i * ELEMENTWISE..]) {
                *o = T::of(f(v.f64()));
            }
        });
        Tensor::from_buffer(x.shape(), out)
    })
}

/// `factor * x`.
///
/// # Errors
/// As [`add`].
pub fn scale(tape: &Tape, x: &Var, factor: f64) -> Result<Var> {
    let id = x.id();
    tape.record("scale", map(&x.value, |v| v * factor), move |dy, grads| grads.add(id, map(&dy, |g| g * factor)))
}

/// `e^x`.
///
/// # Errors
/// As [`add`].
pub fn exp(tape: &Tape, x: &Var) -> Result<Var> {
    let y = map(&x.value, f64::exp);
    let (id, kept) = (x.id(), y.clone());
    tape.record("exp", y, move |dy, grads| grads.add(id, binary_value("exp", Binary::Mul, &dy, &kept)?))
}

/// `1 / (1 + e^-x)`.
///
/// # Errors
/// As [`add`].
pub fn sigmoid(tape: &Tape, x: &Var) -> Result<Var> {
    let y = map(&x.value, |v| 1.0 / (1.0 + (-v).exp()));
    let (id, kept) = (x.id(), y.clone());
    tape.record("sigmoid", y, move |dy, grads| {
        let slope = map(&kept, |y| y * (1.0 - y));
        grads.add(id, binary_value("sigmoid", Binary::Mul, &dy, &slope)?)
    })
}

/// Natural logarithm.
///
/// # Errors
/// As [`add`].
pub fn ln(tape: &Tape, x: &Var) -> Result<Var> {
    let x = x.clone();
    tape.record("ln", map(&x.value, f64::ln), move |dy, grads| {
        let inverse = map(&x.value, |v| 1.0 / v);
        grads.add(x.id(), binary_value("ln", Binary::Mul, &dy, &inverse)?)
    })
}

/// `value` where `mask` is true, `x` elsewhere; the mask covers the last axes and repeats over the leading ones. Replaced
/// elements get no gradient.
///
/// # Errors
/// When the mask's length does not divide the number of elements.
pub fn mask_fill(tape: &Tape, x: &Var, mask: &[bool], value: f64) -> Result<Var> {
    ensure!(
        !mask.is_empty() && x.value.numel().is_multiple_of(mask.len()),
        "mask_fill",
        "a mask of {} elements does not repeat over shape {:?}",
        mask.len(),
        x.value.shape()
    );
    let fill = |x: &Tensor, mask: &[bool], value: f64| {
        with_number!(x.dtype(), T => {
            let mut out = x.cpu().alloc::<T>(x.numel());
            for ((o, &v), &m) in out.iter_mut().zip(x.data::<T>()).zip(mask.iter().cycle()) {
                *o = if m { T::of(value) } else { v };
            }
            Tensor::from_buffer(x.shape(), out)
        })
    };
    let (id, kept) = (x.id(), mask.to_vec());
    tape.record("mask_fill", fill(&x.value, mask, value), move |dy, grads| grads.add(id, fill(&dy, &kept, 0.0)))
}
