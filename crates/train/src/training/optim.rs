//! AdamW over all parameters, with clipping by the global norm.

use dash_core::ops::{AdamW, adamw, grad_norm};
use dash_core::{Result, Tensor};
use dash_model::Params;

use crate::config::Optim;

/// First and second moments, in the order of the parameters.
pub struct Optimizer {
    /// First moments.
    pub m: Vec<Tensor>,
    /// Second moments.
    pub v: Vec<Tensor>,
    /// Updates made.
    pub step: u64,
}

impl Optimizer {
    /// Zero moments.
    pub fn new(params: &Params) -> Self {
        let zeros =
            || params.iter().map(|p| Tensor::zeros(p.value.device(), p.value.shape(), p.value.dtype())).collect();
        Optimizer { m: zeros(), v: zeros(), step: 0 }
    }

    /// One update. A parameter without a gradient stays as it is. Returns the gradient's norm before clipping; if that is
    /// not finite nothing is changed.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn update(&mut self, params: &mut Params, grads: &[Option<Tensor>], lr: f64, o: &Optim) -> Result<f64> {
        let norm = grad_norm(grads.iter().flatten());
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.step += 1;
        // PyTorch's clip_grad_norm_
        let grad_scale = if o.clip > 0.0 { (o.clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        for (i, (param, grad)) in params.iter_mut().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            let settings = AdamW {
                lr,
                beta1: o.beta1,
                beta2: o.beta2,
                eps: o.eps,
                weight_decay: if param.group.decays() { o.weight_decay } else { 0.0 },
                step: self.step,
                grad_scale,
            };
            adamw(settings, &mut param.value, &mut self.m[i], &mut self.v[i], grad)?;
        }
        Ok(norm)
    }
}
