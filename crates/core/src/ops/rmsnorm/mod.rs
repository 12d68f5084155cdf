//! y = x / sqrt(mean(x^2) + eps) * w over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467). Kept for backward:
//! x, w and rstd, one number a row. dx = rstd (dy w - x <dy w, x> rstd^2 / c).

mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

use crate::error::{Result, ensure};
use crate::number::with_number;
use crate::tape::{Tape, Var};
use crate::tensor::{Tensor, same_dtype};

/// Normalises the rows of `x [.., c]` and multiplies with `w [c]`.
///
/// # Errors
/// When `w` is not as wide as the last axis.
pub fn rmsnorm(tape: &Tape, x: &Var, w: &Var, eps: f64) -> Result<Var> {
    let (rows, width) = x.value.rows();
    ensure!(w.value.shape() == [width], "rmsnorm", "weight is {:?}, last axis is {width}", w.value.shape());
    let (y, rstd) = with_number!(same_dtype("rmsnorm", &x.value, &w.value)?, T => {
        let device = x.value.cpu();
        let (mut y, mut rstd) = (device.alloc::<T>(rows * width), device.alloc::<T>(rows));
        cpu::forward(device, x.value.data(), w.value.data(), eps, &mut y, &mut rstd);
        (Tensor::from_buffer(x.value.shape(), y), Tensor::from_buffer(&[rows], rstd))
    });
    let (x, w) = (x.clone(), w.clone());
    tape.record("rmsnorm", y, move |dy, grads| {
        let (dx, dw) = with_number!(dy.dtype(), T => {
            // the residual stream's gradient has been begun: adding to it here saves a pass over it
            let (mut dx, add) = grads.begin::<T>(&x);
            let numbers = (dy.data(), x.value.data(), w.value.data(), rstd.data());
            let dw = cpu::backward::<T>(dy.cpu(), numbers, dx.data_mut(), add);
            (dx, Tensor::from_buffer(&[width], dw))
        });
        grads.add(x.id(), dx)?;
        grads.add(w.id(), dw)
    })
}
