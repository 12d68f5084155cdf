//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in the form of PyTorch:
//! p <- p (1 - lr decay); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
//! p <- p - lr / (1 - b1^k) * m / (sqrt(v) / sqrt(1 - b2^k) + eps), with g already multiplied by the clip factor.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::simd::simd;
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
    /// Factor on the gradient, from clipping.
    pub grad_scale: f64,
}

simd! {
    fn update<T>(s: AdamW, p: &mut [T], m: &mut [T], v: &mut [T], g: &[T]) {
        let (b1, b2) = (T::of(s.beta1), T::of(s.beta2));
        let (c1, c2) = (T::of(1.0 - s.beta1), T::of(1.0 - s.beta2));
        let keep = T::of(1.0 - s.lr * s.weight_decay);
        let step = T::of(s.lr / (1.0 - s.beta1.powf(s.step as f64)));
        let root = T::of(1.0 / (1.0 - s.beta2.powf(s.step as f64)).sqrt());
        let (eps, scale) = (T::of(s.eps), T::of(s.grad_scale));
        for ((p, &g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
            let g = g * scale;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *p = *p * keep - step * *m / ((*v).sqrt() * root + eps);
        }
    }
}

/// Updates a parameter and its moments in place.
///
/// # Errors
/// When shapes or element types differ.
pub fn adamw(settings: AdamW, param: &mut Tensor, m: &mut Tensor, v: &mut Tensor, grad: &Tensor) -> Result<()> {
    for other in [&*m, &*v, grad] {
        ensure!(
            other.shape() == param.shape() && other.dtype() == param.dtype(),
            "adamw",
            "parameter {:?} {:?}, moment or gradient {:?} {:?}",
            param.shape(),
            param.dtype(),
            other.shape(),
            other.dtype()
        );
    }
    let device = param.cpu().clone();
    with_number!(param.dtype(), T => {
        let g = grad.data::<T>();
        let len = ELEMENTWISE;
        device.for_chunks3((param.data_mut::<T>(), len), (m.data_mut(), len), (v.data_mut(), len), |i, p, m, v| {
            update(settings, p, m, v, &g[i * len..][..p.len()]);
        });
    });
    Ok(())
}
