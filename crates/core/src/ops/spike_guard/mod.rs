//! Leaves an update out whose gradient norm n is an outlier: n > limit m, with m the median of the last [`WINDOW`] norms (of k in order, number
//! k/2 from 0), once there are [`ENOUGH`]. Norms of updates that were left out are among them: one spike does not move the median, and
//! where gradients have become larger for good, half a window later they are the rule and nothing is left out any more.
//!
//! A norm that is not finite is no outlier but a fault, which the clip factor stops: it never gets into the window. Decided in f64 on the
//! device, by the same comparisons on both, so that no step waits for the host and equal norms give equal decisions.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::{CpuDevice, Device};
use crate::error::{Result, ensure};
use crate::number::DType;
use crate::tensor::Tensor;

/// Norms whose median is the measure.
pub const WINDOW: usize = 64;
/// Norms before which nothing is left out.
pub const ENOUGH: usize = WINDOW / 2;

/// The last gradient norms, on the device.
#[derive(Debug)]
pub struct NormWindow(
    /// How many there are, then they, the oldest first: `[1 + WINDOW]` in f64.
    Tensor,
);

impl NormWindow {
    /// Of norms, the oldest first; of more than [`WINDOW`] the last.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn new(device: &Device, norms: &[f64]) -> Result<Self> {
        let last = &norms[norms.len().saturating_sub(WINDOW)..];
        let mut state = vec![last.len() as f64];
        state.extend(last);
        state.resize(1 + WINDOW, 0.0);
        Ok(NormWindow(Tensor::from_vec(device, &[1 + WINDOW], state)?))
    }

    /// The norms, the oldest first: waits for the device.
    ///
    /// # Errors
    /// When it fails.
    pub fn norms(&self) -> Result<Vec<f64>> {
        let state = self.0.to_vec::<f64>()?;
        Ok(state[1..][..state[0] as usize].to_vec())
    }
}

/// What was decided of an update: f64 scalars on the device.
#[derive(Debug, Clone)]
pub struct Decision {
    /// What gradients are to be multiplied with: the clip factor, or NaN where the update is left out and nothing may change.
    pub scale: Tensor,
    /// The median that the norm was measured by where the update is left out; else NaN.
    pub exceeded: Tensor,
}

/// Decides of the update with this norm and clip factor ([`crate::ops::clip_factor`]), and takes the norm into the window. Where the factor is
/// not finite, the window stays as it is.
///
/// # Errors
/// When norm or factor is no f64 scalar, or one lives on another device.
pub fn spike_guard(window: &mut NormWindow, norm: &Tensor, factor: &Tensor, limit: f64) -> Result<Decision> {
    let op = "spike_guard";
    for x in [norm, factor] {
        let scalar = x.numel() == 1 && x.dtype() == DType::F64;
        ensure!(scalar, op, "norm and factor are f64 scalars, not {:?} {:?}", x.dtype(), x.shape());
    }
    let of = |[scale, exceeded]: [Tensor; 2]| Decision { scale, exceeded };
    match norm.device() {
        Device::Cpu(cpu) => {
            let one = |x: &Tensor, cpu: &CpuDevice| Ok::<_, crate::error::Error>(x.on_cpu::<f64>(op, cpu)?[0]);
            let numbers = (one(norm, cpu)?, one(factor, cpu)?);
            let decided = decide(window.0.cpu_mut::<f64>(op)?, numbers, limit);
            Ok(of(decided.map(|x| Tensor::from_buffer(&[], cpu.copy(&[x])))))
        }
        Device::Cuda(gpu) => {
            let state = window.0.cuda_mut(op, gpu)?.full_mut()?;
            let numbers = [norm.on_cuda(op, gpu)?.full()?, factor.on_cuda(op, gpu)?.full()?];
            Ok(of(cuda::spike_guard(state, numbers, limit)?.map(|x| Tensor::from_cuda(&[], x))))
        }
    }
}

/// The decision of one update: its scale, and what its norm exceeded.
fn decide(state: &mut [f64], (norm, factor): (f64, f64), limit: f64) -> [f64; 2] {
    if !factor.is_finite() {
        return [factor, f64::NAN];
    }
    let count = state[0] as usize;
    let mut sorted = state[1..][..count].to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = (count >= ENOUGH).then(|| sorted[count / 2]);
    if count == WINDOW {
        state.copy_within(2.., 1);
        state[WINDOW] = norm;
    } else {
        state[1 + count] = norm;
        state[0] += 1.0;
    }
    match median.filter(|median| norm > limit * median) {
        Some(median) => [f64::NAN, median],
        None => [factor, f64::NAN],
    }
}
