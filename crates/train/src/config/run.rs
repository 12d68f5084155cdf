//! `[run]`

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::{ConfigError, positive, wrong};

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Folder of the run inside `dir`; empty: the name of the configuration file.
    #[serde(default)]
    pub name: String,
    /// Folder of all runs.
    #[serde(default = "runs")]
    pub dir: PathBuf,
    /// Updates.
    pub steps: u64,
    /// Decides initial weights and data order.
    #[serde(default)]
    pub seed: u64,
    /// `cpu`.
    #[serde(default = "cpu")]
    pub device: String,
    /// Worker threads, 0 for one per logical core. The result does not depend on it.
    #[serde(default)]
    pub threads: usize,
}

fn runs() -> PathBuf {
    "runs".into()
}

fn cpu() -> String {
    "cpu".into()
}

/// Threads at most: more than any machine has cores, and few enough that a system which grants them all is not drowned.
const MOST_THREADS: usize = 1024;

impl Run {
    /// Says what cannot run.
    ///
    /// # Errors
    /// Key and reason.
    pub fn check(&self) -> Result<(), ConfigError> {
        positive("run.steps", self.steps as usize)?;
        if self.name.is_empty() || self.name.contains(['/', '\\']) || self.name.starts_with('.') {
            return wrong("run.name", format!("{:?} is no folder name", self.name));
        }
        if self.threads > MOST_THREADS {
            let what = format!("{} is above {MOST_THREADS}; 0 takes one thread a logical core", self.threads);
            return wrong("run.threads", what);
        }
        if self.device != "cpu" {
            return wrong("run.device", format!("{:?} is not available in this build; use \"cpu\"", self.device));
        }
        Ok(())
    }
}
