//! AdamW over all parameters, with clipping by the global norm.

use dash_core::ops::{AdamW, adamw, clip_factor, grad_norm};
use dash_core::{Error, Result, Tensor};
use dash_model::{Param, Params};

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
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn new(params: &Params) -> Result<Self> {
        let zero = |p: &Param| Tensor::zeros(p.value.device(), p.value.shape(), p.value.dtype());
        let zeros = || params.iter().map(zero).collect::<Result<_>>();
        Ok(Optimizer { m: zeros()?, v: zeros()?, step: 0 })
    }

    /// One update. A parameter without a gradient stays as it is. Returns the gradient's norm before clipping, a scalar on the
    /// device: nothing is read on the host. If it or one of `losses`, scalars, is not finite, no parameter and no moment is
    /// changed; whoever reads that afterwards calls [`Optimizer::undo_step`].
    ///
    /// # Errors
    /// When shapes or devices differ.
    pub fn update(
        &mut self,
        params: &mut Params,
        (grads, losses): (&[Option<Tensor>], &[Tensor]),
        lr: f64,
        o: &Optim,
    ) -> Result<Tensor> {
        let first = params.iter().next().ok_or_else(|| Error::invalid("optimizer", "there are no parameters"))?;
        let norm = grad_norm(first.value.device(), grads.iter().flatten())?;
        let scale = clip_factor(&norm, o.clip, losses)?;
        self.step += 1;
        for (i, (param, grad)) in params.iter_mut().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            let settings = AdamW {
                lr,
                beta1: o.beta1,
                beta2: o.beta2,
                eps: o.eps,
                weight_decay: if param.group.decays() { o.weight_decay } else { 0.0 },
                step: self.step,
            };
            adamw(settings, &mut param.value, &mut self.m[i], &mut self.v[i], grad, &scale)?;
        }
        Ok(norm)
    }

    /// Takes the count of an update back that changed nothing.
    pub fn undo_step(&mut self) {
        self.step -= 1;
    }
}
