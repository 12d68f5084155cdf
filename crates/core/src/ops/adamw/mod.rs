//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in the form of PyTorch:
//! p <- p (1 - lr decay); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
//! p <- p - lr / (1 - b1^k) * m / (sqrt(v) / sqrt(1 - b2^k) + eps), with g already multiplied by the clip factor.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Device;
use crate::device::cpu::simd::simd;
use crate::dispatch::same_place;
use crate::error::{Result, ensure};
use crate::number::with_number;
use crate::tensor::{ELEMENTWISE, Tensor};

/// Settings of one update.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; the caller passes 0 for anything that is not a matrix.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
}

simd! {
    fn update<T>(s: AdamW, grad_scale: f64, p: &mut [T], m: &mut [T], v: &mut [T], g: &[T]) {
        let (b1, b2) = (T::of(s.beta1), T::of(s.beta2));
        let (c1, c2) = (T::of(1.0 - s.beta1), T::of(1.0 - s.beta2));
        let keep = T::of(1.0 - s.lr * s.weight_decay);
        let step = T::of(s.lr / (1.0 - s.beta1.powf(s.step as f64)));
        let root = T::of(1.0 / (1.0 - s.beta2.powf(s.step as f64)).sqrt());
        let (eps, scale) = (T::of(s.eps), T::of(grad_scale));
        for ((p, &g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
            let g = g * scale;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *p = *p * keep - step * *m / ((*v).sqrt() * root + eps);
        }
    }
}

/// A parameter's part in an update.
#[derive(Debug)]
pub struct Moments<'a> {
    /// Rates may differ from parameter to parameter, the rest is the same for all of an update.
    pub settings: AdamW,
    /// The parameter.
    pub param: &'a mut Tensor,
    /// First moment.
    pub m: &'a mut Tensor,
    /// Second moment.
    pub v: &'a mut Tensor,
    /// Gradient.
    pub grad: &'a Tensor,
}

/// Updates a parameter and its moments in place; see [`adamw_all`].
///
/// # Errors
/// As [`adamw_all`].
pub fn adamw(
    settings: AdamW,
    param: &mut Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    grad: &Tensor,
    scale: &Tensor,
) -> Result<()> {
    adamw_all(vec![Moments { settings, param, m, v, grad }], scale)
}

/// Updates parameters and their moments in place, on a card in one launch. `scale` is an f64 scalar that the gradients are multiplied with
/// ([`crate::ops::clip_factor`]); where it is not finite, nothing changes.
///
/// # Errors
/// When shapes, element types or devices differ.
pub fn adamw_all(items: Vec<Moments>, scale: &Tensor) -> Result<()> {
    let op = "adamw";
    ensure!(scale.numel() == 1, op, "the scale is one number, not {:?}", scale.shape());
    for Moments { param, m, v, grad, .. } in &items {
        for other in [&**m, &**v, grad] {
            let shape = param.shape();
            ensure!(other.shape() == shape, op, "parameter {shape:?}, moment or gradient {:?}", other.shape());
            same_place(op, param, other)?;
        }
        same_place(op, items[0].grad, grad)?;
    }
    match scale.device() {
        Device::Cpu(cpu) => {
            let scale = scale.on_cpu::<f64>(op, cpu)?[0];
            for Moments { settings, param, m, v, grad } in items {
                with_number!(grad.dtype(), T => {
                    let (g, len) = (grad.on_cpu::<T>(op, cpu)?, ELEMENTWISE);
                    if scale.is_finite() {
                        let (p, m, v) = (param.cpu_mut::<T>(op)?, m.cpu_mut(op)?, v.cpu_mut(op)?);
                        cpu.for_pieces3((p, len), (m, len), (v, len), |i, p, m, v| {
                            update(settings, scale, p, m, v, &g[i * len..][..p.len()]);
                        });
                    }
                });
            }
            Ok(())
        }
        Device::Cuda(gpu) => {
            let of = |Moments { settings, param, m, v, grad }| {
                let g = grad.on_cuda(op, gpu)?.full()?;
                let (p, operand) = param.cuda_mut(op, gpu)?.both_mut()?;
                let state = [p, m.cuda_mut(op, gpu)?.full_mut()?, v.cuda_mut(op, gpu)?.full_mut()?];
                Ok(cuda::Item { settings, state, g, operand })
            };
            let mut items = items.into_iter().map(of).collect::<Result<Vec<_>>>()?;
            cuda::adamw(&mut items, Some(scale.on_cuda(op, gpu)?.full()?))
        }
    }
}
