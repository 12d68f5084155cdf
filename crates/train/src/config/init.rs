//! `[init]`

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `[init]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Init {
    /// Folder with the weights that the run starts from: a Llama of Hugging Face, an exported model, a checkpoint or a run. `[model]` may
    /// then leave out what that folder says, all but the attention.
    pub from: PathBuf,
    /// Goes on from a checkpoint of ours as if it were the run's own: with the optimiser's moments, the number of updates, the schedule at that place, and the position in the data where they are the same and cut alike. `run.steps` counts the updates before, too.
    #[serde(default)]
    pub moments: bool,
    /// `model.rope_theta` and `model.rope_scaling` may be other than in that folder: its weights go on with other rotary angles, as for longer
    /// sequences (`configs/long.toml`).
    #[serde(default)]
    pub change_rope: bool,
}
