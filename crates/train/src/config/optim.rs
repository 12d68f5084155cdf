//! `[optim]`

use serde::{Deserialize, Serialize};

use super::error::{ConfigError, wrong};

/// `[optim]`: AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Peak learning rate.
    pub lr: f64,
    /// Updates of linear warmup.
    #[serde(default)]
    pub warmup_steps: u64,
    /// What follows the warmup.
    #[serde(default)]
    pub schedule: Schedule,
    /// The schedule ends at `lr * min_lr_ratio`.
    #[serde(default = "tenth")]
    pub min_lr_ratio: f64,
    /// Share of the steps that `warmup-stable-decay` decays over.
    #[serde(default = "fifth")]
    pub decay_fraction: f64,
    /// Decay of matrices.
    #[serde(default = "tenth")]
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: no clipping.
    #[serde(default = "unit")]
    pub clip: f64,
    /// Decay of the first moment.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// Decay of the second moment.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[serde(default = "adam_eps")]
    pub eps: f64,
}

/// What the learning rate does after the warmup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Half a cosine down to `min_lr_ratio`.
    #[default]
    Cosine,
    /// Flat, then linear down over the last `decay_fraction`.
    WarmupStableDecay,
    /// Flat.
    Constant,
}

fn tenth() -> f64 {
    0.1
}

fn fifth() -> f64 {
    0.2
}

fn unit() -> f64 {
    1.0
}

fn beta1() -> f64 {
    0.9
}

fn beta2() -> f64 {
    0.95
}

fn adam_eps() -> f64 {
    1e-8
}

impl Optim {
    /// Says what no optimiser can follow.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return wrong("optim.lr", format!("{} is not a positive number", self.lr));
        }
        for (key, x) in [("optim.min_lr_ratio", self.min_lr_ratio), ("optim.decay_fraction", self.decay_fraction)] {
            if !(0.0..=1.0).contains(&x) {
                return wrong(key, format!("{x} is not between 0 and 1"));
            }
        }
        for (key, x) in [("optim.beta1", self.beta1), ("optim.beta2", self.beta2)] {
            if !(0.0..1.0).contains(&x) {
                return wrong(key, format!("{x} is not at least 0 and below 1"));
            }
        }
        // where a gradient is 0, an eps that is 0 in f32 makes the update 0 / 0
        if !(self.eps as f32 > 0.0 && self.eps.is_finite()) {
            return wrong("optim.eps", format!("{} is not above 0 in f32 (1e-45 is the smallest)", self.eps));
        }
        if self.lr as f32 == f32::INFINITY {
            return wrong("optim.lr", format!("{} is beyond f32 (3.4e38)", self.lr));
        }
        for (key, x) in [("optim.weight_decay", self.weight_decay), ("optim.clip", self.clip)] {
            if !(x >= 0.0) {
                return wrong(key, format!("{x} is negative"));
            }
        }
        Ok(())
    }
}
