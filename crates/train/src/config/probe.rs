//! `[probe]`

use serde::{Deserialize, Serialize};

/// `[probe]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProbePlan {
    /// Updates between probes; 0: none.
    pub every: u64,
    /// Sequences of the fixed batch, at most those of a validation batch.
    pub sequences: usize,
}

impl Default for ProbePlan {
    fn default() -> Self {
        ProbePlan { every: 0, sequences: 4 }
    }
}
