//! `[compare]`

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::{ConfigError, wrong};

/// `[compare]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Compare {
    /// Runs of every arm, with seeds `run.seed`, `run.seed + 1`, ...
    pub seeds: u64,
    /// Arm that the others are compared with; empty: the first.
    pub baseline: String,
    /// What decides: `accuracy`, `accuracy length=N`, `mean accuracy` (over the run), `time-to-solve`, `loss`, `mean loss`, or with `eval.far` `far loss` or `far control loss`. Empty: nothing is decided, every comparison explores.
    pub primary: String,
    /// Arm whose comparison with its baseline in the primary outcome is the one test without correction. Empty: all arms share Holm's correction.
    pub contrast: String,
    /// Largest difference in the primary outcome that does not matter, in its unit (updates for a time). Without it nothing is called equivalent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
    /// Error rate of each family of tests.
    pub alpha: f64,
    /// Accuracy at the training length that counts as solved.
    pub solved: f64,
    /// Validations in a row that have to reach `solved`; the run has solved the task at the last of them.
    pub checks: u64,
    /// Validations that a run goes on for after it solved its task, before it stops. Without it every run makes all its updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_after: Option<u64>,
    /// File with the criteria, written before the first run; the report tells its hash and whether it was committed and has changed.
    pub criteria: PathBuf,
    /// Seeds that settings were chosen with, here or elsewhere; none of them is a seed of the comparison.
    pub tuning_seeds: Vec<u64>,
    /// Learning rates tried for every arm with the tuning seeds; the best by the primary outcome runs with the seeds of the comparison.
    pub learning_rates: Vec<f64>,
    /// Updates of a tuning run; 0: as many as a run.
    pub tuning_steps: u64,
    /// The arms.
    pub arm: Vec<Arm>,
}

impl Default for Compare {
    fn default() -> Self {
        Compare {
            seeds: 3,
            baseline: String::new(),
            primary: String::new(),
            contrast: String::new(),
            margin: None,
            alpha: 0.05,
            solved: 0.9,
            checks: 2,
            stop_after: None,
            criteria: PathBuf::new(),
            tuning_seeds: Vec::new(),
            learning_rates: Vec::new(),
            tuning_steps: 0,
            arm: Vec::new(),
        }
    }
}

/// `[[compare.arm]]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// Name in reports and folders.
    pub name: String,
    /// Settings on top of the configuration, as `--set` takes them.
    #[serde(default)]
    pub set: Vec<String>,
    /// Arm that this one is compared with instead of the comparison's baseline.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub baseline: String,
    /// Arm whose learning rate this one takes, instead of having its own chosen by tuning runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rate_of: String,
    /// Arm whose run of the same seed gives the number of attended chunks (`router.budget_from`); it runs first.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub budget_of: String,
    /// Arm whose run of the same seed gives gamma of every update (`router.gamma_from`); it runs first.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub gamma_of: String,
}

/// More seeds than anybody runs: a slip of the keyboard lists no billion runs.
const MOST_SEEDS: u64 = 10_000;

impl Compare {
    /// What is wrong with a number of seeds, if it is.
    pub fn complaint_of_seeds(seeds: u64) -> Option<String> {
        (!(1..=MOST_SEEDS).contains(&seeds)).then(|| format!("{seeds} is not 1 to {MOST_SEEDS}"))
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if let Some(what) = Compare::complaint_of_seeds(self.seeds) {
            return wrong("compare.seeds", what);
        }
        if !(self.alpha > 0.0 && self.alpha <= 0.5) {
            return wrong("compare.alpha", format!("{} is not above 0 and at most 0.5", self.alpha));
        }
        if let Some(margin) = self.margin.filter(|m| !(*m > 0.0 && m.is_finite())) {
            return wrong(
                "compare.margin",
                format!("{margin} is not above 0; leave it out to call nothing equivalent"),
            );
        }
        if !(self.solved > 0.0 && self.solved <= 1.0) {
            return wrong("compare.solved", format!("{} is not above 0 and at most 1", self.solved));
        }
        if self.checks == 0 {
            return wrong("compare.checks", "is 0; at least one validation shows that a run has solved its task");
        }
        if let Some(rate) = self.learning_rates.iter().find(|r| !(**r > 0.0 && r.is_finite())) {
            return wrong("compare.learning_rates", format!("{rate} is not above 0"));
        }
        if let Some(i) =
            (1..self.learning_rates.len()).find(|&i| self.learning_rates[..i].contains(&self.learning_rates[i]))
        {
            return wrong("compare.learning_rates", format!("{} is named twice", self.learning_rates[i]));
        }
        for (i, seed) in self.tuning_seeds.iter().enumerate() {
            if self.tuning_seeds[..i].contains(seed) {
                return wrong("compare.tuning_seeds", format!("{seed} is named twice"));
            }
        }
        self.check_needs()
    }

    /// Keys that mean nothing without another one.
    fn check_needs(&self) -> Result<(), ConfigError> {
        let needs = |key: &'static str, what: &str| wrong(key, format!("means nothing without {what}"));
        if self.primary.is_empty() {
            match () {
                _ if self.margin.is_some() => {
                    return needs("compare.margin", "compare.primary, the outcome it belongs to");
                }
                _ if !self.contrast.is_empty() => return needs("compare.contrast", "compare.primary"),
                _ if !self.learning_rates.is_empty() => {
                    return needs("compare.learning_rates", "compare.primary, by which the best is chosen");
                }
                _ => {}
            }
        }
        if !self.learning_rates.is_empty() && self.tuning_seeds.is_empty() {
            return needs("compare.learning_rates", "compare.tuning_seeds, for example [101, 102, 103]");
        }
        if self.tuning_steps > 0 && self.learning_rates.is_empty() {
            return needs("compare.tuning_steps", "compare.learning_rates");
        }
        Ok(())
    }
}
