//! `[router]`: the attention's knobs, alpha and gamma, over the steps, and the attended share that a controller holds.

use std::path::PathBuf;

use dash_model::attention::Knob;
use dash_model::{Attention, VARIANTS};
use serde::{Deserialize, Serialize};

use super::error::{ConfigError, positive, wrong};

/// `[router]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterPlan {
    /// alpha over the steps instead of `model.attention.alpha`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<Ramp>,
    /// gamma over the steps instead of `model.attention.gamma`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<Ramp>,
    /// Attended tokens over visible tokens, (t + 1) / 2 a query, that the controller holds by changing gamma.
    #[serde(alias = "target_density", skip_serializing_if = "Option::is_none")]
    pub target_share: Option<f64>,
    /// gamma of every update as another run had it: the folder of a run that has ended. Between two updates that it logged, gamma lies on a line in its logarithm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma_from: Option<PathBuf>,
    /// As many attended chunks by layer and position as another run had at its end, in the place of `model.attention.top`: the folder of a run that has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget_from: Option<PathBuf>,
    /// In training and its validations a query that is asked something attends the chunk that holds the answer and its own, without a bias, whatever the router chose. The choice of the others stays, and has no gradient.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oracle: bool,
}

/// Linear from one value to another over the first `steps` updates, then constant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// At the first update.
    pub from: f64,
    /// After `steps` updates.
    pub to: f64,
    /// Length, at least 1.
    pub steps: u64,
}

impl Ramp {
    /// The value at update `step`, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        let done = ((step.saturating_sub(1)) as f64 / self.steps.max(1) as f64).min(1.0);
        self.from + (self.to - self.from) * done
    }
}

impl RouterPlan {
    /// The smallest and the largest target that a router can reach: entmax keeps one earlier chunk at least.
    pub fn feasible(chunk_size: usize, t: usize) -> (f64, f64) {
        (Attention::listed_at(chunk_size, 2, t) / ((t as f64 + 1.0) / 2.0), 1.0)
    }

    /// Says what cannot be followed.
    ///
    /// # Errors
    /// Key, what is wrong and what would be right.
    pub fn check(&self, attention: &Attention, t: usize) -> Result<(), ConfigError> {
        if *self == Self::default() {
            return Ok(());
        }
        let moved = [
            ("router.alpha", Knob::Alpha, self.alpha.is_some()),
            ("router.gamma", Knob::Gamma, self.gamma.is_some()),
            ("router.target_share", Knob::Gamma, self.target_share.is_some()),
            ("router.gamma_from", Knob::Gamma, self.gamma_from.is_some()),
        ];
        if let Some((key, knob, _)) = moved.iter().find(|(_, knob, on)| *on && attention.knob(*knob).is_none()) {
            let what =
                format!("moves {knob}, but the attention is {}, which has no such knob; remove it", attention.kind());
            return wrong(key, what);
        }
        self.check_sources(attention)?;
        for (key, knob, ramp) in [("router.alpha", Knob::Alpha, self.alpha), ("router.gamma", Knob::Gamma, self.gamma)]
        {
            if let Some(r) = ramp {
                positive(&format!("{key}.steps"), r.steps as usize)?;
            }
            if let Some(r) = ramp
                && ![r.from, r.to].iter().all(|x| knob.range().holds(*x))
            {
                return wrong(key, format!("{:?} to {:?} is not {} throughout", r.from, r.to, knob.range()));
            }
        }
        if let Some(target) = self.target_share {
            if self.gamma.is_some() {
                return wrong("router.gamma", "cannot be scheduled while target_share moves it; remove one of them");
            }
            let size = attention.chunk_size().unwrap_or(t);
            let (low, high) = Self::feasible(size, t);
            if !(target >= low && target <= high) {
                let what = format!(
                    "{target} is out of reach: with chunks of {size} and {t} tokens a query attends between {low:.4} (its own chunk and \
                     one more) and {high} of what it sees"
                );
                return wrong("router.target_share", what);
            }
        }
        Ok(())
    }

    /// What is taken from another run.
    fn check_sources(&self, attention: &Attention) -> Result<(), ConfigError> {
        if self.budget_from.is_some() && !attention.takes_budget() {
            let takers = VARIANTS.iter().filter(|v| v.with(&[]).takes_budget()).map(|v| v.kind).collect::<Vec<_>>();
            let what = format!(
                "gives every query a number of chunks, but the attention is {}, which has no such number; take one of {}",
                attention.kind(),
                takers.join(", ")
            );
            return wrong("router.budget_from", what);
        }
        let other = [("router.gamma", self.gamma.is_some()), ("router.target_share", self.target_share.is_some())];
        if let (true, Some((key, _))) = (self.gamma_from.is_some(), other.iter().find(|(_, on)| *on)) {
            return wrong(key, "cannot move gamma while gamma_from replays that of another run; remove one of them");
        }
        let empty = [("router.gamma_from", &self.gamma_from), ("router.budget_from", &self.budget_from)];
        match empty.iter().find(|(_, path)| path.as_ref().is_some_and(|p| p.as_os_str().is_empty())) {
            Some((key, _)) => wrong(key, "is empty; name the folder of a run that has ended, or leave it out"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ramp_starts_ends_and_stays() {
        let r = Ramp { from: 1.25, to: 1.5, steps: 100 };
        assert_eq!([1, 51, 101, 900].map(|s| r.at(s)), [1.25, 1.375, 1.5, 1.5]);
    }

    #[test]
    fn what_is_out_of_reach_is_told_with_the_range() {
        let dash = Attention::preset("dash").unwrap();
        let plan = RouterPlan { target_share: Some(0.1), ..Default::default() };
        let ConfigError { key, what } = plan.check(&dash, 256).unwrap_err();
        // own chunk 32.5 on average, one more of 64 for the 192 later queries: (32.5 + 48) / 128.5
        assert!(key == "router.target_share" && what.contains("between 0.6265"), "{what}");
        let dense = Attention::preset("dense").unwrap();
        assert!(plan.check(&dense, 256).unwrap_err().what.contains("the attention is dense"));
        let both = RouterPlan {
            gamma: Some(Ramp { from: 1.0, to: 2.0, steps: 3 }),
            target_share: Some(0.7),
            ..Default::default()
        };
        assert_eq!(both.check(&dash, 256).unwrap_err().key, "router.gamma");
        assert!(RouterPlan::default().check(&dense, 256).is_ok());
    }

    #[test]
    fn what_cannot_be_taken_from_another_run_is_told() {
        let of = |kind: &str| Attention::preset(kind).unwrap();
        let budget = RouterPlan { budget_from: Some("runs/a".into()), ..Default::default() };
        for kind in ["topk", "topk-bias", "random"] {
            assert!(budget.check(&of(kind), 256).is_ok());
        }
        let ConfigError { key, what } = budget.check(&of("dash"), 256).unwrap_err();
        assert!(
            key == "router.budget_from" && what.contains("the attention is dash") && what.contains("topk-bias"),
            "{what}"
        );
        let gamma = RouterPlan { gamma_from: Some("runs/a".into()), ..Default::default() };
        assert!(gamma.check(&of("dash-stopped"), 256).is_ok());
        assert_eq!(gamma.check(&of("topk"), 256).unwrap_err().key, "router.gamma_from");
        let both = RouterPlan { target_share: Some(0.7), ..gamma };
        let ConfigError { key, what } = both.check(&of("dash"), 256).unwrap_err();
        assert!(key == "router.target_share" && what.contains("gamma_from"), "{what}");
        let empty = RouterPlan { budget_from: Some("".into()), ..Default::default() };
        assert!(empty.check(&of("topk"), 256).unwrap_err().what.contains("is empty"));
    }
}
