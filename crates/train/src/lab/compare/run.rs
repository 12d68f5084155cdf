//! One run of a comparison: its process, and what its folder tells.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context;
use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::training::checkpoint::{self, Checkpoints};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All steps.
    Done,
    /// Fewer: stopped, or not started.
    Unfinished,
    /// With this message.
    Failed(String),
}

/// One arm with one seed.
pub struct Run {
    /// Name of the arm.
    pub arm: String,
    /// Seed.
    pub seed: u64,
    /// Folder of the run.
    pub folder: PathBuf,
    /// Where its configuration was written.
    pub config: PathBuf,
    /// Where its output goes.
    pub log: PathBuf,
    /// Updates that it makes.
    pub steps: u64,
}

impl Run {
    /// `arm-sSEED`
    pub fn name(&self) -> String {
        format!("{}-s{}", self.arm, self.seed)
    }

    /// Step of the newest whole checkpoint.
    fn saved(&self) -> Option<u64> {
        let (newest, _) = Checkpoints::of(&self.folder).newest();
        checkpoint::read_state(&newest?).ok().map(|s| s.step)
    }

    /// How it ended, or where it stands.
    pub fn outcome(&self) -> Outcome {
        if self.saved() == Some(self.steps) {
            return Outcome::Done;
        }
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        match log.rfind("error: ") {
            Some(at) => Outcome::Failed(log[at + 7..].trim().to_string()),
            None => Outcome::Unfinished,
        }
    }

    /// The last step in its record.
    pub fn logged(&self) -> u64 {
        let text = std::fs::read_to_string(self.folder.join("metrics.jsonl")).unwrap_or_default();
        let last = text.lines().rev().find_map(|l| serde_json::from_str::<Value>(l).ok());
        last.and_then(|v| v["step"].as_u64()).unwrap_or(0)
    }

    /// Starts or continues it in a process of its own.
    ///
    /// # Errors
    /// When there can be no process or no log.
    pub fn start(&self) -> anyhow::Result<Child> {
        let log =
            std::fs::File::create(&self.log).with_context(|| format!("{} cannot be written", self.log.display()))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--config").arg(&self.config).stdin(Stdio::null());
        if self.folder.join("config.toml").exists() {
            command.arg("--resume");
        }
        Ok(command.stdout(log.try_clone()?).stderr(log).spawn()?)
    }
}

/// Refuses runs that did not see the same data: a paired difference would mean nothing.
///
/// # Errors
/// Names the run that saw something else.
pub fn check_pairs(runs: &[Run], hash: &str) -> Result<()> {
    let mut tokens: Option<(u64, &Path)> = None;
    for run in runs.iter().filter(|r| r.outcome() == Outcome::Done) {
        let (newest, _) = Checkpoints::of(&run.folder).newest();
        let Some(state) = newest.and_then(|p| checkpoint::read_state(&p).ok()) else { continue };
        if state.data_hash != hash {
            return Err(Failure::request(format!(
                "{}: was trained on {}, this comparison is on {hash}; runs on different data cannot be paired. Choose another --out",
                run.folder.display(),
                state.data_hash
            )));
        }
        let (seen, first) = *tokens.get_or_insert((state.tokens, &run.folder));
        if state.tokens != seen {
            return Err(Failure::request(format!(
                "{}: saw {} tokens, {} saw {seen}; runs of different length cannot be paired. Choose another --out",
                run.folder.display(),
                state.tokens,
                first.display()
            )));
        }
    }
    Ok(())
}
