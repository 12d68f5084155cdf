//! `[optim]`

use serde::{Deserialize, Serialize};
use toml::Table;

use super::error::{ConfigError, wrong};

/// `[optim]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// The optimiser.
    #[serde(default)]
    pub kind: OptimKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Updates of linear warmup.
    #[serde(default)]
    pub warmup_steps: u64,
    /// What follows the warmup.
    #[serde(default)]
    pub schedule: Schedule,
    /// The schedule ends at `lr * min_lr_ratio`; refused with `constant`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_lr_ratio: Option<f64>,
    /// Share of the steps that `warmup-stable-decay` decays over, at most what the warmup leaves, 0.2 without it; refused with other schedules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_fraction: Option<f64>,
    /// Decay of matrices.
    #[serde(default = "tenth")]
    pub weight_decay: f64,
    /// Learning rate of the embedding and the output projection, as a multiple of `lr`.
    #[serde(default = "unit")]
    pub embedding_lr: f64,
    /// Decay of the embedding and the output projection; `weight_decay` without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_weight_decay: Option<f64>,
    /// Learning rate of norms, biases and learned queries, as a multiple of `lr`.
    #[serde(default = "unit")]
    pub vector_lr: f64,
    /// Decay of norms, biases and learned queries.
    #[serde(default)]
    pub vector_weight_decay: f64,
    /// Largest global gradient norm; 0: no clipping.
    #[serde(default = "unit")]
    pub clip: f64,
    /// An update is left out whose gradient norm is above this many times the median of the last 64, once there are 32. It is told and counted; the schedule and the bias correction of the moments go on. It is decided on the device; on a GPU it is told when the host reads the step's figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spike_guard: Option<f64>,
    /// Decay of the first moment.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// Decay of the second moment.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[serde(default = "adam_eps")]
    pub eps: f64,
    /// Decay of `muon`'s momentum, 0.95 without it; refused with other kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// What `muon` makes of `lr` for a matrix: `match-rms-adamw` multiplies by 0.2 sqrt(longer side), so that `lr` means what it means to AdamW, `original` by sqrt(rows / columns) where that is above 1. Refused with other kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adjust_lr: Option<AdjustLr>,
}

/// Kinds of optimisers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimKind {
    /// AdamW (arXiv 1711.05101).
    #[default]
    Adamw,
    /// Muon for the matrices of the decoder, AdamW for the rest.
    Muon,
}

/// How `muon` fits the learning rate to a matrix, by the names of `torch.optim.Muon`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdjustLr {
    /// The root mean square of an update is 0.2 of the learning rate.
    #[default]
    MatchRmsAdamw,
    /// The published rule.
    Original,
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

impl Schedule {
    /// As a file has it.
    fn name(self) -> &'static str {
        match self {
            Schedule::Cosine => "cosine",
            Schedule::WarmupStableDecay => "warmup-stable-decay",
            Schedule::Constant => "constant",
        }
    }

    /// Keys of `[optim]` that it does not read.
    fn unread(self) -> &'static [&'static str] {
        match self {
            Schedule::Cosine => &["decay_fraction"],
            Schedule::WarmupStableDecay => &[],
            Schedule::Constant => &["min_lr_ratio", "decay_fraction"],
        }
    }
}

/// `min_lr_ratio` of a file without it.
pub const MIN_LR_RATIO: f64 = 0.1;
/// `decay_fraction` of a file without it.
pub const DECAY_FRACTION: f64 = 0.2;

/// Takes the keys out of the table `optim` that its schedule does not read: earlier builds wrote them into every run folder.
pub(super) fn drop_unread(optim: &mut Table) {
    let schedule = optim.get("schedule").and_then(|s| Schedule::deserialize(s.clone()).ok()).unwrap_or_default();
    optim.retain(|key, _| !schedule.unread().contains(&key));
}

/// `momentum` of a file without it.
pub const MOMENTUM: f64 = 0.95;

fn tenth() -> f64 {
    0.1
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
    /// Fills in the defaults that depend on other keys.
    pub fn resolve(&mut self) {
        let unread = self.schedule.unread();
        for (key, value, default) in [
            ("min_lr_ratio", &mut self.min_lr_ratio, MIN_LR_RATIO),
            ("decay_fraction", &mut self.decay_fraction, DECAY_FRACTION),
        ] {
            if !unread.contains(&key) {
                value.get_or_insert(default);
            }
        }
        if self.kind == OptimKind::Muon {
            self.momentum.get_or_insert(MOMENTUM);
            self.adjust_lr.get_or_insert_default();
        }
    }

    /// Keys of `muon` in a file of another kind, or out of range.
    fn check_muon(&self) -> Result<(), ConfigError> {
        for (key, given) in [("optim.momentum", self.momentum.is_some()), ("optim.adjust_lr", self.adjust_lr.is_some())]
        {
            if given && self.kind != OptimKind::Muon {
                return wrong(key, "means nothing to optim.kind = \"adamw\"; remove it, or set optim.kind = \"muon\"");
            }
        }
        match self.momentum {
            Some(x) if !(0.0..1.0).contains(&x) => {
                wrong("optim.momentum", format!("{x:?} is not at least 0 and below 1"))
            }
            _ => Ok(()),
        }
    }

    /// Says what no optimiser can follow.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return wrong("optim.lr", format!("{:?} is not a positive number", self.lr));
        }
        for (key, x) in [("optim.min_lr_ratio", self.min_lr_ratio), ("optim.decay_fraction", self.decay_fraction)] {
            let Some(x) = x else { continue };
            if self.schedule.unread().iter().any(|unread| key.ends_with(unread)) {
                let what = format!("means nothing to optim.schedule = \"{}\"; remove it", self.schedule.name());
                return wrong(key, what);
            }
            if !(0.0..=1.0).contains(&x) {
                return wrong(key, format!("{x:?} is not between 0 and 1"));
            }
        }
        for (key, x) in [("optim.beta1", self.beta1), ("optim.beta2", self.beta2)] {
            if !(0.0..1.0).contains(&x) {
                return wrong(key, format!("{x:?} is not at least 0 and below 1"));
            }
        }
        self.check_muon()?;
        if let Some(x) = self.spike_guard.filter(|x| !(*x > 1.0 && x.is_finite())) {
            return wrong(
                "optim.spike_guard",
                format!("{x:?} is not above 1: every other gradient is above the median"),
            );
        }
        // where a gradient is 0, an eps that is 0 in f32 makes the update 0 / 0
        if !(self.eps as f32 > 0.0 && self.eps.is_finite()) {
            return wrong("optim.eps", format!("{:?} is not above 0 in f32 (1e-45 is the smallest)", self.eps));
        }
        if self.lr as f32 == f32::INFINITY {
            return wrong("optim.lr", format!("{:?} is beyond f32 (3.4e38)", self.lr));
        }
        for (key, factor) in [("optim.embedding_lr", self.embedding_lr), ("optim.vector_lr", self.vector_lr)] {
            if !(factor >= 0.0 && ((self.lr * factor) as f32).is_finite()) {
                return wrong(key, format!("{factor:?} is negative, or optim.lr times it is beyond f32 (3.4e38)"));
            }
        }
        for (key, x) in [
            ("optim.weight_decay", self.weight_decay),
            ("optim.embedding_weight_decay", self.embedding_weight_decay.unwrap_or(0.0)),
            ("optim.vector_weight_decay", self.vector_weight_decay),
            ("optim.clip", self.clip),
        ] {
            if !(x >= 0.0) {
                return wrong(key, format!("{x:?} is negative"));
            }
            // a norm above which nothing is clipped may be any
            if key != "optim.clip" && x as f32 == f32::INFINITY {
                return wrong(key, format!("{x:?} is beyond f32 (3.4e38)"));
            }
        }
        Ok(())
    }
}
