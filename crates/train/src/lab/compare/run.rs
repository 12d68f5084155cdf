//! One run of a comparison: its process, and what its folder tells.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::Context;
use dash_data::Tokenizer;
use serde_json::Value;

use crate::config::{Config, Effect};
use crate::failure::{Failure, Result};
use crate::peers::seat::VARIABLES;
use crate::training::checkpoint::{self, Checkpoints, State};
use crate::training::material::Material;
use crate::training::stop::Watch;

/// Begins the last line of a log whose process has ended.
const ENDED: &str = "ended with ";

/// By which NVIDIA's driver hides GPUs from a process and numbers the others.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All steps, or as many as its rule to stop asks for.
    Done,
    /// Fewer: stopped, or not started.
    Unfinished,
    /// With this message.
    Failed(String),
}

/// Where the process of a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On what its configuration says.
    AsConfigured,
    /// On this GPU, as the driver numbers those that this process sees.
    Card(usize),
}

impl Place {
    /// What `CUDA_VISIBLE_DEVICES` has to be for a process that sees this GPU alone; `visible` is what it is for this one.
    fn visible(self, visible: Option<&str>) -> Option<String> {
        match (self, visible) {
            (Place::AsConfigured, _) => None,
            (Place::Card(card), None) => Some(card.to_string()),
            (Place::Card(card), Some(all)) => {
                Some(all.split(',').nth(card).map_or_else(|| card.to_string(), |one| one.trim().to_string()))
            }
        }
    }
}

/// One arm with one seed.
#[derive(Debug, Clone)]
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
    /// Updates that it makes at most.
    pub steps: u64,
    /// Names of runs that have to end first: it takes something of them.
    pub after: Vec<String>,
    /// When it stops before that.
    pub stop: Option<Watch>,
    /// What its last checkpoint says, once it was read in full and found whole: nothing follows it.
    pub last: OnceCell<State>,
}

impl Run {
    /// `arm-sSEED`
    pub fn name(&self) -> String {
        format!("{}-s{}", self.arm, self.seed)
    }

    /// What the newest whole checkpoint says, and none where there is no such one.
    ///
    /// # Errors
    /// When one was written by a later format.
    fn newest(&self) -> Result<Option<State>> {
        if let Some(last) = self.last.get() {
            return Ok(Some(last.clone()));
        }
        let (newest, _) = Checkpoints::of(&self.folder).newest().map_err(Failure::Request)?;
        let state = newest.and_then(|path| checkpoint::read_state(&path).ok());
        if let Some(state) = state.as_ref().filter(|s| s.step == self.steps) {
            let _ = self.last.set(state.clone());
        }
        Ok(state)
    }

    /// Step of the newest whole checkpoint.
    pub fn saved(&self) -> Option<u64> {
        self.newest().ok()?.map(|state| state.step)
    }

    /// How it ended, or where it stands: its checkpoint, and the exit status that [`Run::ended`] wrote down. What the run said
    /// is only quoted.
    pub fn outcome(&self) -> Outcome {
        let enough = |step: u64| self.stop.and_then(|mut watch| watch.recall(&self.folder, step)) == Some(step);
        if self.saved().is_some_and(|step| step == self.steps || enough(step)) {
            return Outcome::Done;
        }
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().next_back().unwrap_or_default();
        let Some(ended) = last.strip_prefix(ENDED) else { return Outcome::Unfinished };
        if [0, 130].iter().any(|status| ended == format!("status {status}")) {
            return Outcome::Unfinished;
        }
        let said = log[..log.len() - last.len()].trim_end();
        let said = match said.rfind("error: ").or(said.rfind("panicked at ")) {
            Some(at) => said[at..].trim_start_matches("error: "),
            None => "without a message; signal 9 is what a system out of memory sends",
        };
        Outcome::Failed(format!("{ended}: {said}"))
    }

    /// Writes the exit status of its process down, as the last line of its log.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn ended(&self, status: ExitStatus) -> anyhow::Result<()> {
        let how = match status.code() {
            Some(code) => format!("status {code}"),
            // "signal: 9 (SIGKILL)"
            None => status.to_string().replace("signal: ", "signal "),
        };
        let append = || File::options().append(true).open(&self.log)?.write_all(format!("\n{ENDED}{how}\n").as_bytes());
        append().with_context(|| format!("{} cannot be written", self.log.display()))
    }

    /// Refuses a folder that holds a run of another configuration, corpus or tokenizer, before anything is written: its
    /// numbers would stand under this comparison's names.
    ///
    /// # Errors
    /// Names the folder and every key that differs.
    pub fn check_same(&self, config: &Config, data: &Material) -> Result<()> {
        if !self.folder.join("config.toml").exists() {
            return Ok(());
        }
        let theirs = Config::of_run(&self.folder)?.differences(config);
        let mut differs: Vec<String> =
            theirs.into_iter().filter(|d| d.effect != Effect::Nothing).map(|d| d.text).collect();
        if let Some(state) = self.newest()?
            && state.data_hash != data.hash
        {
            differs.push(format!("prepared corpus: {} -> {}", state.data_hash, data.hash));
        }
        let theirs = self.folder.join("tokenizer.json");
        if let Some(ours) = &data.tokenizer
            && theirs.is_file()
            && Tokenizer::load(&theirs, config.treatment())?.hash() != ours.hash()
        {
            differs.push("tokenizer.json: another one".into());
        }
        if differs.is_empty() {
            return Ok(());
        }
        Err(Failure::request(format!(
            "{}: holds a run that was made differently ({}); its numbers would stand under other settings. Choose another --out, or \
             remove that folder",
            self.folder.display(),
            differs.join("; ")
        )))
    }

    /// The last step in its record, of which only the end is read: it grows with the run, and this is asked for while runs train.
    pub fn logged(&self) -> u64 {
        const END: u64 = 256 << 10;
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(self.folder.join("metrics.jsonl"))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        let last = bytes.rsplit(|b| *b == b'\n').find_map(|line| serde_json::from_slice::<Value>(line).ok());
        last.and_then(|v| v["step"].as_u64()).unwrap_or(0)
    }

    /// Starts or continues it in a process of its own. Which GPU it takes is said beside its configuration, so that it may go on
    /// another one.
    ///
    /// # Errors
    /// When there can be no process or no log.
    pub fn start(&self, place: Place, force: bool) -> anyhow::Result<Child> {
        let log =
            std::fs::File::create(&self.log).with_context(|| format!("{} cannot be written", self.log.display()))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--config").arg(&self.config).stdin(Stdio::null());
        command.arg("--with-parent").arg(std::process::id().to_string());
        // a run of a comparison is one process, whatever started the comparison
        VARIABLES.iter().for_each(|name| _ = command.env_remove(name));
        if self.folder.join("config.toml").exists() {
            command.arg("--resume");
        }
        if force {
            command.arg("--force");
        }
        if let Some(visible) = place.visible(std::env::var(VISIBLE).ok().as_deref()) {
            command.env(VISIBLE, visible);
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
        let Some(state) = run.newest()? else { continue };
        if state.data_hash != hash {
            return Err(Failure::request(format!(
                "{}: was trained on {}, this comparison is on {hash}; runs on different data cannot be paired. Choose another --out",
                run.folder.display(),
                state.data_hash
            )));
        }
        // runs may stop before their last update: what an update sees has to be the same
        let each = state.tokens / state.step.max(1);
        let (seen, first) = *tokens.get_or_insert((each, &run.folder));
        if each != seen {
            return Err(Failure::request(format!(
                "{}: saw {each} tokens an update, {} saw {seen}; runs of different length cannot be paired. Choose another --out",
                run.folder.display(),
                first.display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Place;

    #[test]
    fn a_process_sees_the_one_gpu_that_it_is_given() {
        assert_eq!(Place::Card(1).visible(None).as_deref(), Some("1"));
        assert_eq!(Place::Card(1).visible(Some("4, GPU-8932f937")).as_deref(), Some("GPU-8932f937"));
        assert_eq!(Place::Card(0).visible(Some("4")).as_deref(), Some("4"));
        assert_eq!(Place::AsConfigured.visible(Some("4")), None);
    }
}
