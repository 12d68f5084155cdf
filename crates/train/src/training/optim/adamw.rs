//! AdamW; the equations are in `dash_core::ops::adamw`.

use dash_core::{Error, Result, Tensor, ops};

use super::rule::{Rule, Update};

/// See [`ops::adamw()`].
pub struct AdamW;

impl Rule for AdamW {
    fn kind(&self) -> &'static str {
        "adamw"
    }

    /// First and second moment.
    fn slots(&self) -> &'static [&'static str] {
        &["m", "v"]
    }

    fn update(&self, u: &Update, param: &mut Tensor, state: &mut [Tensor], grad: &Tensor) -> Result<()> {
        let [m, v] = state else { return Err(Error::invalid("adamw", "the state is not two moments")) };
        let settings = ops::AdamW {
            lr: u.lr,
            beta1: u.settings.beta1,
            beta2: u.settings.beta2,
            eps: u.settings.eps,
            weight_decay: u.weight_decay,
            step: u.step,
        };
        ops::adamw(settings, param, m, v, grad, u.scale)
    }
}
