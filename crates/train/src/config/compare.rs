//! `[compare]`

use serde::{Deserialize, Serialize};

/// `[compare]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Compare {
    /// Runs of every arm, with seeds `run.seed`, `run.seed + 1`, ...
    pub seeds: u64,
    /// Arm that the others are compared with; empty: the first.
    pub baseline: String,
    /// The arms.
    pub arm: Vec<Arm>,
}

impl Default for Compare {
    fn default() -> Self {
        Compare { seeds: 3, baseline: String::new(), arm: Vec::new() }
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
}
