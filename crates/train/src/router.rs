//! `[router]`: alpha and gamma of DashAttention over the steps, and a controller that holds the attended tokens at a target.

use dash_model::{Attention, Model, RouterTrace};
use serde::{Deserialize, Serialize};

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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_density: Option<f64>,
}

/// Linear from one value to another over the first `steps` updates, then constant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// At the first update.
    pub from: f64,
    /// From update `steps` on.
    pub to: f64,
    /// Length.
    pub steps: u64,
}

impl Ramp {
    /// The value at update `step`, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        let done = ((step.saturating_sub(1)) as f64 / self.steps.max(1) as f64).min(1.0);
        self.from + (self.to - self.from) * done
    }
}

/// Gain of the controller: gamma is multiplied by (measured / target)^GAIN each update. At 0.05 an error of a factor two
/// changes gamma by 3.5 % an update; the density answers to gamma at once, so the loop has one slow pole and cannot ring.
const GAIN: f64 = 0.05;
/// Where gamma stays, so that a router that cannot reach its target does not drift without end.
pub const GAMMA: (f64, f64) = (1e-3, 1e5);

/// alpha and gamma that are in force; part of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Knobs {
    /// See `model.attention.alpha`.
    pub alpha: f64,
    /// See `model.attention.gamma`.
    pub gamma: f64,
}

impl Knobs {
    /// Those of a model, where its attention has them.
    pub fn of(attention: &Attention) -> Option<Self> {
        match attention {
            Attention::Dash(d) => Some(Knobs { alpha: d.alpha, gamma: d.gamma }),
            _ => None,
        }
    }
}

/// Mean attended tokens of the routed layers over the visible ones, (t + 1) / 2 a query; `None` where no layer routes.
pub fn attended_share(traces: &[Option<RouterTrace>]) -> Option<f64> {
    let of = |trace: &RouterTrace| {
        let (_, _, t) = trace.list().extents();
        trace.list().mean_tokens() / ((t as f64 + 1.0) / 2.0)
    };
    let all: Vec<f64> = traces.iter().flatten().map(of).collect();
    (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
}

impl RouterPlan {
    /// The smallest and the largest target that a router can reach: entmax keeps one earlier chunk at least.
    pub fn feasible(chunk_size: usize, t: usize) -> (f64, f64) {
        (Attention::listed_at(chunk_size, 2, t) / ((t as f64 + 1.0) / 2.0), 1.0)
    }

    /// Says what cannot be followed.
    ///
    /// # Errors
    /// (key, what is wrong and what would be right).
    pub fn check(&self, attention: &Attention, t: usize) -> Result<(), (&'static str, String)> {
        if *self == Self::default() {
            return Ok(());
        }
        let Attention::Dash(dash) = attention else {
            let what =
                format!("steers alpha and gamma of dash, but the attention is {}; remove the table", attention.kind());
            return Err(("router", what));
        };
        if let Some(a) = self.alpha
            && ![a.from, a.to].iter().all(|x| *x > 1.0 && *x <= 2.0)
        {
            return Err(("router.alpha", format!("{} to {} leaves the range above 1 and at most 2", a.from, a.to)));
        }
        if let Some(g) = self.gamma
            && ![g.from, g.to].iter().all(|x| *x > 0.0 && x.is_finite())
        {
            return Err(("router.gamma", format!("{} to {} are not both positive", g.from, g.to)));
        }
        if let Some(target) = self.target_density {
            if self.gamma.is_some() {
                return Err((
                    "router.gamma",
                    "cannot be scheduled while target_density moves it; remove one of them".into(),
                ));
            }
            let (low, high) = Self::feasible(dash.chunk_size, t);
            if !(target >= low && target <= high) {
                let what = format!(
                    "{target} is out of reach: with chunks of {} and {t} tokens a query attends between {low:.4} (its own chunk and \
                     one more) and {high} of what it sees",
                    dash.chunk_size
                );
                return Err(("router.target_density", what));
            }
        }
        Ok(())
    }

    /// Before update `step`: what the schedules say, on top of what is in force.
    pub fn apply(&self, model: &mut Model, step: u64) {
        let Some(mut knobs) = Knobs::of(&model.config().attention) else { return };
        knobs.alpha = self.alpha.map_or(knobs.alpha, |r| r.at(step));
        knobs.gamma = self.gamma.map_or(knobs.gamma, |r| r.at(step));
        model.set_knobs(knobs.alpha, knobs.gamma);
    }

    /// After an update: moves gamma towards the target.
    pub fn control(&self, model: &mut Model, traces: &[Option<RouterTrace>]) {
        let (Some(target), Some(share)) = (self.target_density, attended_share(traces)) else { return };
        let Some(knobs) = Knobs::of(&model.config().attention) else { return };
        let gamma = knobs.gamma * (GAIN * (share / target).ln()).exp();
        model.set_knobs(knobs.alpha, gamma.clamp(GAMMA.0, GAMMA.1));
    }
}

/// Tokens that the starting gamma is found on, at least, where there are as many: a fresh model routes all text alike.
const START_TOKENS: usize = 1024;
/// Halvings of the range of gamma (18 in its logarithm): to 0.1 %.
const HALVINGS: usize = 14;

/// Gamma, by bisection on its logarithm, at which `share` of it is `target`. `share` falls with gamma.
///
/// # Errors
/// Those of `share`.
pub fn gamma_for<E>(target: f64, halvings: usize, mut share: impl FnMut(f64) -> Result<f64, E>) -> Result<f64, E> {
    let (mut low, mut high) = (GAMMA.0.ln(), GAMMA.1.ln());
    for _ in 0..halvings {
        let middle = 0.5 * (low + high);
        if share(middle.exp())? > target {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok((0.5 * (low + high)).exp())
}

/// Gamma at which a fresh model attends the target share of the first sequences of `ids`: where the controller
/// starts, so that the first updates are not spent on finding it.
///
/// # Errors
/// When the model refuses the ids.
pub fn initial_gamma(
    model: &mut Model,
    plan: &RouterPlan,
    ids: &std::sync::Arc<[u32]>,
    batch: usize,
) -> dash_core::Result<()> {
    let (Some(target), Some(knobs)) = (plan.target_density, Knobs::of(&model.config().attention)) else {
        return Ok(());
    };
    let alpha = plan.alpha.map_or(knobs.alpha, |r| r.from);
    let length = ids.len() / batch;
    let batch = START_TOKENS.div_ceil(length).min(batch);
    let ids = &ids[..batch * length].into();
    let gamma = gamma_for(target, HALVINGS, |gamma| {
        model.set_knobs(alpha, gamma);
        let tape = dash_core::Tape::inference();
        let leaves = model.leaves(&tape);
        Ok::<_, dash_core::Error>(attended_share(&model.forward(&tape, &leaves, ids, batch)?.routers).unwrap_or(1.0))
    })?;
    model.set_knobs(alpha, gamma);
    Ok(())
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
        let plan = RouterPlan { target_density: Some(0.1), ..Default::default() };
        let (key, what) = plan.check(&dash, 256).unwrap_err();
        // own chunk 32.5 on average, one more of 64 for the 192 later queries: (32.5 + 48) / 128.5
        assert!(key == "router.target_density" && what.contains("between 0.6265"), "{what}");
        assert!(plan.check(&Attention::Dense, 256).unwrap_err().1.contains("the attention is dense"));
        let both = RouterPlan {
            gamma: Some(Ramp { from: 1.0, to: 2.0, steps: 3 }),
            target_density: Some(0.7),
            ..Default::default()
        };
        assert_eq!(both.check(&dash, 256).unwrap_err().0, "router.gamma");
        assert!(RouterPlan::default().check(&Attention::Dense, 256).is_ok());
    }
}
