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
}
