//! y = x / sqrt(mean(x^2) + eps) * w over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467). Kept for backward:
//! x, w and rstd, one number a row. dx = rstd (dy w - x <dy w, x> rstd^2 / c).

mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cuda::Kind;
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Normalises the rows of `x [.., c]` and multiplies with `w [c]`.
///
/// # Errors
/// When `w` is not as wide as the last axis, or the inputs differ in element type or device; so for every op.
pub fn rmsnorm(tape: &Tape, x: &Var, w: &Var, eps: f64) -> Result<Var> {
    let (rows, width) = x.value.rows();
    ensure!(width > 0, "rmsnorm", "rows of x have no elements: its shape is {:?}", x.value.shape());
    ensure!(w.value.shape() == [width], "rmsnorm", "weight is {:?}, last axis is {width}", w.value.shape());
    let (y, rstd) = on_device!("rmsnorm", [&x.value, &w.value]; Cpu<T>(cpu, [xs, ws]) => {
        let (mut y, mut rstd) = (cpu.alloc::<T>(rows * width), cpu.alloc::<T>(rows));
        cpu::forward(cpu, xs, ws, eps, &mut y, &mut rstd);
        (Tensor::from_buffer(x.value.shape(), y), Tensor::from_buffer(&[rows], rstd))
    }, Cuda(_, [xs, ws]) => {
        // y is an operand of products and nothing else: in bf16 where they round
        let kind = Kind::of_operands(tape.compute(), xs.dtype());
        let (y, rstd) = cuda::forward(xs.full()?, ws.full()?, eps, kind)?;
        (Tensor::from_cuda(x.value.shape(), y), Tensor::from_cuda(&[rows], rstd))
    });
    let (x, w, compute) = (x.clone(), w.clone(), tape.compute());
    tape.record("rmsnorm", y, move |dy, grads| {
        // the residual stream's gradient has been begun: adding to it here saves a pass over it
        let (mut dx, add) = grads.begin(&x)?;
        let dw = on_device!("rmsnorm", [&dy, &x.value, &w.value, &rstd]; Cpu<T>(cpu, [dy, x, w, rstd]) => {
            let dw = cpu::backward::<T>(cpu, (dy, x, w, rstd), dx.cpu_mut("rmsnorm")?, add);
            Tensor::from_buffer(&[width], dw)
        }, Cuda(gpu, [dy, x, w, rstd]) => {
            // the layer below multiplies with this gradient
            let round = Kind::of_operands(compute, x.dtype()) == Kind::Bf16;
            let (into, rstd) = (dx.cuda_mut("rmsnorm", gpu)?, rstd.full()?);
            let to = into.full_mut()?;
            let (dw, rounded) = cuda::backward(dy.as_made(), x.full()?, w.full()?, rstd, to, add, round)?;
            into.keep_rounded(rounded);
            Tensor::from_cuda(&[width], dw)
        });
        grads.add(x.id(), dx)?;
        grads.add(w.id(), dw)
    })
}
