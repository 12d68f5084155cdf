//! Elementwise primitives. Binary ones broadcast: ranks align at the right, an axis of one repeats.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::simd::{add_into, simd};
use crate::device::{CpuDevice, CpuNumber};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ids::Ids;
use crate::shape::{broadcast, broadcast_strides, numel, walk};
use crate::tape::{Tape, Var};
use crate::tensor::{ELEMENTWISE, Tensor};

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

/// What is done to one element, in f64.
#[derive(Clone, Copy)]
enum Unary {
    Scale(f64),
    Exp,
    Ln,
    Inverse,
    Sigmoid,
    /// y (1 - y): the slope of the sigmoid where it is y.
    SigmoidSlope,
}

impl Unary {
    fn of(self, v: f64) -> f64 {
        match self {
            Unary::Scale(factor) => v * factor,
            Unary::Exp => v.exp(),
            Unary::Ln => v.ln(),
            Unary::Inverse => 1.0 / v,
            Unary::Sigmoid => 1.0 / (1.0 + (-v).exp()),
            Unary::SigmoidSlope => v * (1.0 - v),
        }
    }

    /// What the kernel calls it, and its factor.
    fn on_cuda(self) -> (cuda::Unary, f64) {
        match self {
            Unary::Scale(factor) => (cuda::Unary::Scale, factor),
            Unary::Exp => (cuda::Unary::Exp, 1.0),
            Unary::Ln => (cuda::Unary::Ln, 1.0),
            Unary::Inverse => (cuda::Unary::Inverse, 1.0),
            Unary::Sigmoid => (cuda::Unary::Sigmoid, 1.0),
            Unary::SigmoidSlope => (cuda::Unary::Slope, 1.0),
        }
    }
}

fn binary(op: &'static str, kind: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let shape = broadcast(op, a.shape(), b.shape())?;
    on_device!(op, [a, b]; Cpu<T>(cpu, _) => {
        let (a, b) = (expand::<T>(op, cpu, a, &shape)?, expand::<T>(op, cpu, b, &shape)?);
        let (x, y) = (a.on_cpu::<T>(op, cpu)?, b.on_cpu::<T>(op, cpu)?);
        let mut out = cpu.alloc::<T>(numel(&shape));
        cpu.for_pieces(&mut out, ELEMENTWISE, |i, o| {
            let range = i * ELEMENTWISE..i * ELEMENTWISE + o.len();
            binary_kernel(kind, &x[range.clone()], &y[range], o);
        });
        Ok(Tensor::from_buffer(&shape, out))
    }, Cuda(_, [x, y]) => {
        let (out, shape) = cuda::binary(op, kind, (x.full()?, a.shape()), (y.full()?, b.shape()))?;
        Ok(Tensor::from_cuda(&shape, out))
    })
}

/// Repeats axes of one until the shape is `shape`.
fn expand<T: CpuNumber>(op: &'static str, cpu: &CpuDevice, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
    if x.shape() == shape {
        return Ok(x.clone());
    }
    let stride = broadcast_strides(x.shape(), shape);
    let data = x.on_cpu::<T>(op, cpu)?;
    let mut out = cpu.alloc::<T>(numel(shape));
    if shape.ends_with(x.shape()) && !data.is_empty() {
        // the same row again and again: a bias
        let rows = (ELEMENTWISE / data.len()).max(1);
        cpu.for_pieces(&mut out, rows * data.len(), |_, out| {
            out.chunks_exact_mut(data.len()).for_each(|row| row.copy_from_slice(data));
        });
        return Ok(Tensor::from_buffer(shape, out));
    }
    cpu.for_pieces(&mut out, ELEMENTWISE, |i, out| {
        out.iter_mut().zip(walk(shape, &stride, i * ELEMENTWISE)).for_each(|(o, from)| *o = data[from]);
    });
    Ok(Tensor::from_buffer(shape, out))
}

/// The gradient of a broadcast: sums what was repeated.
fn reduce_to(op: &'static str, d: Tensor, shape: &[usize]) -> Result<Tensor> {
    if d.shape() == shape {
        return Ok(d);
    }
    let stride = broadcast_strides(shape, d.shape());
    on_device!(op, [&d]; Cpu<T>(cpu, [gradient]) => {
        let mut out = cpu.zeros::<T>(numel(shape));
        if d.shape().ends_with(shape) && !out.is_empty() {
            gradient.chunks_exact(numel(shape)).for_each(|row| add_into(row, &mut out));
            return Ok(Tensor::from_buffer(shape, out));
        }
        for (&g, to) in gradient.iter().zip(walk(d.shape(), &stride, 0)) {
            out[to] += g;
        }
        Ok(Tensor::from_buffer(shape, out))
    }, Cuda(_, [gradient]) => Ok(Tensor::from_cuda(shape, cuda::reduce_to(gradient.full()?, d.shape(), shape)?)))
}

fn unary(op: &'static str, kind: Unary, x: &Tensor) -> Result<Tensor> {
    on_device!(op, [x]; Cpu<T>(cpu, [data]) => {
        let mut out = cpu.alloc::<T>(data.len());
        cpu.for_pieces(&mut out, ELEMENTWISE, |i, o| {
            for (o, v) in o.iter_mut().zip(&data[i * ELEMENTWISE..]) {
                *o = T::of(kind.of(v.f64()));
            }
        });
        Ok(Tensor::from_buffer(x.shape(), out))
    }, Cuda(_, [data]) => {
        let (kind, factor) = kind.on_cuda();
        Ok(Tensor::from_cuda(x.shape(), cuda::unary(op, kind, data.full()?, factor)?))
    })
}

/// `a + b`.
///
/// # Errors
/// When shapes do not broadcast, or element types or devices differ; so for every op of this file.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let out = binary("add", Binary::Add, &a.value, &b.value)?;
    let ((ia, sa), (ib, sb)) = ((a.id(), a.value.shape().to_vec()), (b.id(), b.value.shape().to_vec()));
    tape.record("add", out, move |dy, grads| {
        grads.add(ia, reduce_to("add", dy.clone(), &sa)?)?;
        grads.add(ib, reduce_to("add", dy, &sb)?)
    })
}

/// `a - b`.
///
/// # Errors
/// As [`add`].
pub fn sub(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let out = binary("sub", Binary::Sub, &a.value, &b.value)?;
    let ((ia, sa), (ib, sb)) = ((a.id(), a.value.shape().to_vec()), (b.id(), b.value.shape().to_vec()));
    tape.record("sub", out, move |dy, grads| {
        grads.add(ia, reduce_to("sub", dy.clone(), &sa)?)?;
        grads.add(ib, reduce_to("sub", unary("sub", Unary::Scale(-1.0), &dy)?, &sb)?)
    })
}

/// `a * b`, element by element.
///
/// # Errors
/// As [`add`].
pub fn mul(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let out = binary("mul", Binary::Mul, &a.value, &b.value)?;
    let (a, b) = (a.clone(), b.clone());
    tape.record("mul", out, move |dy, grads| {
        grads.add(a.id(), reduce_to("mul", binary("mul", Binary::Mul, &dy, &b.value)?, a.value.shape())?)?;
        grads.add(b.id(), reduce_to("mul", binary("mul", Binary::Mul, &dy, &a.value)?, b.value.shape())?)
    })
}

/// `factor * x`.
///
/// # Errors
/// As [`add`].
pub fn scale(tape: &Tape, x: &Var, factor: f64) -> Result<Var> {
    let (id, kind) = (x.id(), Unary::Scale(factor));
    tape.record("scale", unary("scale", kind, &x.value)?, move |dy, grads| grads.add(id, unary("scale", kind, &dy)?))
}

/// `e^x`.
///
/// # Errors
/// As [`add`].
pub fn exp(tape: &Tape, x: &Var) -> Result<Var> {
    let y = unary("exp", Unary::Exp, &x.value)?;
    let (id, kept) = (x.id(), y.clone());
    tape.record("exp", y, move |dy, grads| grads.add(id, binary("exp", Binary::Mul, &dy, &kept)?))
}

/// `1 / (1 + e^-x)`.
///
/// # Errors
/// As [`add`].
pub fn sigmoid(tape: &Tape, x: &Var) -> Result<Var> {
    let y = unary("sigmoid", Unary::Sigmoid, &x.value)?;
    let (id, kept) = (x.id(), y.clone());
    tape.record("sigmoid", y, move |dy, grads| {
        let slope = unary("sigmoid", Unary::SigmoidSlope, &kept)?;
        grads.add(id, binary("sigmoid", Binary::Mul, &dy, &slope)?)
    })
}

/// Natural logarithm.
///
/// # Errors
/// As [`add`].
pub fn ln(tape: &Tape, x: &Var) -> Result<Var> {
    let x = x.clone();
    tape.record("ln", unary("ln", Unary::Ln, &x.value)?, move |dy, grads| {
        let inverse = unary("ln", Unary::Inverse, &x.value)?;
        grads.add(x.id(), binary("ln", Binary::Mul, &dy, &inverse)?)
    })
}

/// `value` where `mask` is 1, `x` where it is 0 ([`Ids::mask`]); the mask covers the last axes and repeats over the leading
/// ones. Replaced elements get no gradient.
///
/// # Errors
/// When the mask's length does not divide the number of elements, or it holds something else than 0 and 1.
pub fn mask_fill(tape: &Tape, x: &Var, mask: &Ids, value: f64) -> Result<Var> {
    let op = "mask_fill";
    ensure!(
        !mask.is_empty() && x.value.numel().is_multiple_of(mask.len()),
        op,
        "a mask of {} elements does not repeat over shape {:?}",
        mask.len(),
        x.value.shape()
    );
    mask.check_below(op, "a mask with", 2, "the largest it may hold and 1 more:")?;
    mask.check_counted(op, "elements of the mask")?;
    let (id, kept) = (x.id(), mask.clone());
    tape.record(op, fill(&x.value, mask, value)?, move |dy, grads| grads.add(id, fill(&dy, &kept, 0.0)?))
}

fn fill(x: &Tensor, mask: &Ids, value: f64) -> Result<Tensor> {
    let op = "mask_fill";
    on_device!(op, [x]; Cpu<T>(cpu, [data]) => {
        let mask = mask.on_cpu(op, cpu)?;
        let mut out = cpu.alloc::<T>(data.len());
        for ((o, &v), &m) in out.iter_mut().zip(data).zip(mask.iter().cycle()) {
            *o = if m == 1 { T::of(value) } else { v };
        }
        Ok(Tensor::from_buffer(x.shape(), out))
    }, Cuda(gpu, [data]) => {
        let mask = mask.on_cuda(op, gpu)?;
        Ok(Tensor::from_cuda(x.shape(), cuda::mask_fill(data.full()?, &mask.ids, value)?))
    })
}
