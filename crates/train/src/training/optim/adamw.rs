//! AdamW; the equations are in `dash_core::ops::adamw`.

use dash_core::{Error, Result, ops};
use dash_model::Group;

use super::rule::{Item, Rule, Update};

/// See [`ops::adamw()`].
pub struct AdamW;

impl Rule for AdamW {
    fn kind(&self) -> &'static str {
        "adamw"
    }

    /// First and second moment.
    fn slots(&self, _: Group) -> &'static [&'static str] {
        &["m", "v"]
    }

    fn update(&self, u: &Update, all: Vec<Item>) -> Result<()> {
        let of = |Item { lr, weight_decay, param, state, grad, .. }| {
            let [m, v] = state else { return Err(Error::invalid("adamw", "the state is not two moments")) };
            let settings = ops::AdamW {
                lr,
                beta1: u.settings.beta1,
                beta2: u.settings.beta2,
                eps: u.settings.eps,
                weight_decay,
                step: u.step,
            };
            Ok(ops::Moments { settings, param, m, v, grad })
        };
        ops::adamw_all(all.into_iter().map(of).collect::<Result<_>>()?, u.scale)
    }
}
