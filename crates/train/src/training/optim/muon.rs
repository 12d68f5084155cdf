//! Muon for the matrices of the decoder, AdamW for everything else; the equations are in `dash_core::ops::muon`.

use dash_core::{Error, Result, ops};
use dash_model::Group;

use super::adamw::AdamW;
use super::rule::{Item, Rule, Update};
use crate::config::{AdjustLr, MOMENTUM};

/// See [`ops::muon()`]. A matrix is updated whole: its momentum cannot be made orthogonal in parts.
pub struct Muon;

/// What the learning rate of a matrix `[rows, columns]` is multiplied by. Its update has singular values around 1, so a root mean
/// square of sqrt(1 / max(rows, columns)): `match-rms-adamw` (Liu et al. 2025, arXiv 2502.16982) makes that 0.2, about what AdamW's has.
fn adjustment(how: AdjustLr, shape: &[usize]) -> Result<f64> {
    let [rows, columns] = shape else {
        return Err(Error::invalid("muon", format!("a parameter of shape {shape:?} is no matrix")));
    };
    let (rows, columns) = (*rows as f64, *columns as f64);
    Ok(match how {
        AdjustLr::MatchRmsAdamw => 0.2 * rows.max(columns).sqrt(),
        AdjustLr::Original => (rows / columns).max(1.0).sqrt(),
    })
}

impl Rule for Muon {
    fn kind(&self) -> &'static str {
        "muon"
    }

    /// The momentum of a matrix; of everything else what AdamW keeps.
    fn slots(&self, group: Group) -> &'static [&'static str] {
        match group {
            Group::Matrix => &["momentum"],
            Group::Embedding | Group::Vector => AdamW.slots(group),
        }
    }

    fn update(&self, u: &Update, all: Vec<Item>) -> Result<()> {
        let (matrices, others): (Vec<Item>, Vec<Item>) = all.into_iter().partition(|item| item.group == Group::Matrix);
        AdamW.update(u, others)?;
        for Item { lr, weight_decay, param, state, grad, .. } in matrices {
            let [momentum] = state else { return Err(Error::invalid("muon", "the state is not one momentum")) };
            let adjust = adjustment(u.settings.adjust_lr.unwrap_or_default(), param.shape())?;
            let settings = ops::Muon {
                momentum: u.settings.momentum.unwrap_or(MOMENTUM),
                step: lr * adjust,
                decay: lr * weight_decay,
            };
            ops::muon(settings, param, momentum, grad, u.scale)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `torch.optim.Muon`'s `_adjust_lr`.
    #[test]
    fn a_learning_rate_is_adjusted_to_the_shape() {
        let at = |how, shape: [usize; 2]| adjustment(how, &shape).unwrap();
        assert_eq!(at(AdjustLr::Original, [400, 100]), 2.0);
        assert_eq!(at(AdjustLr::Original, [100, 400]), 1.0);
        assert_eq!(at(AdjustLr::MatchRmsAdamw, [100, 400]), 4.0);
        assert_eq!(at(AdjustLr::MatchRmsAdamw, [400, 100]), 4.0);
        assert!(adjustment(AdjustLr::Original, &[4]).unwrap_err().to_string().contains("no matrix"));
    }
}
