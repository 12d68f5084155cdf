//! Muon (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon>) of one matrix W, in the form of PyTorch's `torch.optim.Muon`:
//! M <- b M + (1 - b) G; X = b M + (1 - b) G (Nesterov); X <- X / max(|X|, 1e-7); five times, over the shorter side,
//! A = X X^T, B = -4.775 A + 2.0315 A A, X <- 3.4445 X + B X; W <- W (1 - lr decay) - step X, with G already multiplied by the clip factor.
//!
//! The five Newton-Schulz steps move all singular values of X to between 0.7 and 1.2, so the size of a gradient does not reach the
//! weights, only its direction. They are computed in the element type (PyTorch: bf16). Nothing is read on the host.

pub mod cuda;
#[cfg(test)]
mod tests;

use super::grad_norm::grad_norm;
use super::matmul;
use crate::device::cpu::simd::simd;
use crate::device::cpu::{MatMut, MatRef};
use crate::device::cuda::Operand;
use crate::device::{Accumulate, Device, Gemm};
use crate::dispatch::{on_device, same_place};
use crate::error::{Result, ensure};
use crate::number::{Compute, with_number};
use crate::tensor::{ELEMENTWISE, Tensor};

/// Settings of one update of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct Muon {
    /// Decay of the momentum.
    pub momentum: f64,
    /// What the orthogonalised momentum is multiplied by: the learning rate in its form for this shape.
    pub step: f64,
    /// What the weights lose of themselves: learning rate times decay.
    pub decay: f64,
}

/// Coefficients of the quintic iteration, and how often it is made.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
const STEPS: usize = 5;

/// A norm below this divides as this.
const SMALLEST_NORM: f64 = 1e-7;

simd! {
    fn nesterov_kernel<T>(b: f64, grad_scale: f64, m: &mut [T], x: &mut [T], g: &[T]) {
        let (b, rest, scale) = (T::of(b), T::of(1.0 - b), T::of(grad_scale));
        for ((m, x), &g) in m.iter_mut().zip(x).zip(g) {
            let g = g * scale;
            *m = b * *m + rest * g;
            *x = b * *m + rest * g;
        }
    }
}

simd! {
    /// y <- keep y + add x
    fn blend_kernel<T>(keep: f64, add: f64, y: &mut [T], x: &[T]) {
        let (keep, add) = (T::of(keep), T::of(add));
        for (y, &x) in y.iter_mut().zip(x) {
            *y = keep * *y + add * x;
        }
    }
}

/// Updates a matrix and its momentum in place. `scale` is an f64 scalar that the gradient is multiplied with
/// ([`crate::ops::clip_factor`]); where it is not finite, nothing changes.
///
/// # Errors
/// When the parameter is no matrix, or shapes, element types or devices differ.
pub fn muon(s: Muon, param: &mut Tensor, momentum: &mut Tensor, grad: &Tensor, scale: &Tensor) -> Result<()> {
    let op = "muon";
    param.dims::<2>(op)?;
    ensure!(scale.numel() == 1, op, "the scale is one number, not {:?}", scale.shape());
    for other in [&*momentum, grad] {
        let shape = param.shape();
        ensure!(other.shape() == shape, op, "parameter {shape:?}, momentum or gradient {:?}", other.shape());
        same_place(op, param, other)?;
    }
    if let Device::Cpu(cpu) = scale.device()
        && !scale.on_cpu::<f64>(op, cpu)?[0].is_finite()
    {
        return Ok(());
    }
    let x = orthogonal(nesterov(s.momentum, momentum, grad, scale)?)?;
    apply(s, param, &x, scale)
}

/// The new momentum, and what Nesterov's rule makes of it and the gradient.
fn nesterov(b: f64, momentum: &mut Tensor, grad: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (op, shape) = ("muon", grad.shape());
    on_device!(op, [grad]; Cpu<T>(cpu, [g]) => {
        let scale = scale.on_cpu::<f64>(op, cpu)?[0];
        let (mut x, m) = (cpu.alloc::<T>(g.len()), momentum.cpu_mut::<T>(op)?);
        cpu.for_pieces2((m, ELEMENTWISE), (&mut x[..], ELEMENTWISE), |i, m, x| {
            nesterov_kernel(b, scale, m, x, &g[i * ELEMENTWISE..]);
        });
        Ok(Tensor::from_buffer(shape, x))
    }, Cuda(gpu, [g]) => {
        let m = momentum.cuda_mut(op, gpu)?.full_mut()?;
        Ok(Tensor::from_cuda(shape, cuda::nesterov(b, m, g.full()?, scale.on_cuda(op, gpu)?.full()?)?))
    })
}

/// The nearest matrix with singular values around 1.
fn orthogonal(mut x: Tensor) -> Result<Tensor> {
    let [rows, columns] = x.dims("muon")?;
    let norm = grad_norm(x.device(), [&x])?;
    divide(&mut x, &norm)?;
    let [a, b, c] = COEFFICIENTS;
    let wide = rows <= columns;
    let short = rows.min(columns);
    for _ in 0..STEPS {
        // over the shorter side: X X^T of a wide matrix, X^T X of a tall one
        let gram = product((short, short, rows.max(columns)), (&x, !wide), (&x, wide))?;
        let mut update = product((short, short, short), (&gram, false), (&gram, false))?;
        blend(&mut update, c, &gram, b)?;
        let (left, right) = if wide { (&update, &x) } else { (&x, &update) };
        let mut next = product((rows, columns, short), (left, false), (right, false))?;
        blend(&mut next, 1.0, &x, a)?;
        x = next;
    }
    Ok(x)
}

/// The product `[m, n]` over k terms of two matrices, each read transposed where its flag says so.
fn product((m, n, k): (usize, usize, usize), a: (&Tensor, bool), b: (&Tensor, bool)) -> Result<Tensor> {
    let (op, width) = ("muon", |x: &Tensor| x.rows().1);
    let (wa, wb) = (width(a.0), width(b.0));
    on_device!(op, [a.0, b.0]; Cpu<T>(cpu, [x, y]) => {
        let (x, y) = (MatRef::<T>::rows(x, wa), MatRef::<T>::rows(y, wb));
        let (x, y) = (if a.1 { x.t() } else { x }, if b.1 { y.t() } else { y });
        let mut out = cpu.alloc::<T>(m * n);
        let size = Gemm::new(m, n, k).with(Accumulate::Overwrite);
        matmul::gemm(cpu, Compute::Full, size, x, y, MatMut::rows(&mut out, n));
        Ok(Tensor::from_buffer(&[m, n], out))
    }, Cuda(_, [x, y]) => {
        let (x, y) = (Operand::rows(x.full()?, wa), Operand::rows(y.full()?, wb));
        let (x, y) = (if a.1 { x.t() } else { x }, if b.1 { y.t() } else { y });
        let size = Gemm::new(m, n, k).with(Accumulate::Overwrite);
        Ok(Tensor::from_cuda(&[m, n], matmul::cuda::product(op, size, x, y)?))
    })
}

/// y <- keep y + add x
fn blend(y: &mut Tensor, keep: f64, x: &Tensor, add: f64) -> Result<()> {
    let op = "muon";
    on_device!(op, [x]; Cpu<T>(cpu, [x]) => {
        cpu.for_pieces(y.cpu_mut::<T>(op)?, ELEMENTWISE, |i, y| blend_kernel(keep, add, y, &x[i * ELEMENTWISE..]));
        Ok(())
    }, Cuda(gpu, [x]) => cuda::blend(y.cuda_mut(op, gpu)?.full_mut()?, keep, x.full()?, add))
}

/// x <- x / max(norm, [`SMALLEST_NORM`])
fn divide(x: &mut Tensor, norm: &Tensor) -> Result<()> {
    let op = "muon";
    match norm.device() {
        Device::Cpu(cpu) => {
            let by = 1.0 / norm.on_cpu::<f64>(op, cpu)?[0].max(SMALLEST_NORM);
            with_number!(x.dtype(), T => {
                cpu.for_pieces(x.cpu_mut::<T>(op)?, ELEMENTWISE, |_, x| x.iter_mut().for_each(|x| *x *= T::of(by)));
            });
            Ok(())
        }
        Device::Cuda(gpu) => cuda::divide(x.cuda_mut(op, gpu)?.full_mut()?, norm.on_cuda(op, gpu)?.full()?),
    }
}

fn apply(s: Muon, param: &mut Tensor, x: &Tensor, scale: &Tensor) -> Result<()> {
    let op = "muon";
    on_device!(op, [x]; Cpu<T>(cpu, [x]) => {
        let p = param.cpu_mut::<T>(op)?;
        cpu.for_pieces(p, ELEMENTWISE, |i, p| blend_kernel(1.0 - s.decay, -s.step, p, &x[i * ELEMENTWISE..]));
        Ok(())
    }, Cuda(gpu, [x]) => {
        let (p, operand) = param.cuda_mut(op, gpu)?.both_mut()?;
        cuda::apply(s, p, operand, x.full()?, scale.on_cuda(op, gpu)?.full()?)
    })
}
