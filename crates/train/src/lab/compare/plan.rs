//! What is compared: `[compare]` of a configuration, or names of kinds on the command line.

use std::path::{Path, PathBuf};

use dash_model::kinds;

use super::run::Run;
use crate::config::{Arm, Compare, Config};
use crate::failure::{Failure, Result};

/// Arms resolved to configurations.
pub struct Plan {
    /// (name, configuration with the first seed).
    pub arms: Vec<(String, Config)>,
    /// Baselines of arms that have one of their own: (arm, baseline).
    pub own_baselines: Vec<(String, String)>,
    /// Seeds of every arm.
    pub seeds: u64,
    /// Name of the baseline.
    pub baseline: String,
    /// Folder of everything.
    pub out: PathBuf,
}

/// The arms of the command line, else those of the file, else four kinds.
fn chosen(table: &Compare, arms: &[String]) -> Result<Vec<Arm>> {
    let preset = |name: &String| Arm {
        name: name.clone(),
        set: vec![format!("model.attention.kind={name}")],
        baseline: String::new(),
    };
    let known = || table.arm.iter().map(|a| a.name.as_str()).chain(kinds()).collect::<Vec<_>>().join(", ");
    match (arms.is_empty(), table.arm.is_empty()) {
        (true, true) => Ok(["dense", "topk", "dash", "dash-stopped"].map(|k| preset(&k.to_string())).to_vec()),
        (true, false) => Ok(table.arm.clone()),
        _ => {
            let find = |name: &String| match table.arm.iter().find(|a| a.name == *name) {
                Some(arm) => Ok(arm.clone()),
                None if kinds().contains(&name.as_str()) => Ok(preset(name)),
                None => Err(Failure::request(format!("--arms: {name:?} is none of {}", known()))),
            };
            arms.iter().map(find).collect()
        }
    }
}

/// Name and configuration of every arm; refuses arms that cannot run or be paired.
fn resolve(path: &Path, set: &[String], base: &Config, arms: &[Arm]) -> Result<Vec<(String, Config)>> {
    let mut resolved: Vec<(String, Config)> = Vec::new();
    for arm in arms {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if arm.name.is_empty() || arm.name.starts_with('.') || !arm.name.chars().all(plain) {
            let what = format!("arm {:?}: a name is letters, digits, '-', '_' and '.'", arm.name);
            return Err(Failure::request(what));
        }
        if resolved.iter().any(|(name, _)| *name == arm.name) {
            return Err(Failure::request(format!("arm {:?} is named twice", arm.name)));
        }
        let all: Vec<String> = set.iter().chain(&arm.set).cloned().collect();
        let config = Config::load(path, &all).map_err(|e| Failure::request(format!("arm {:?}: {e}", arm.name)))?;
        if config.data != base.data || config.task != base.task || config.run.steps != base.run.steps {
            return Err(Failure::request(format!(
                "arm {:?}: changes [data], [task] or run.steps; arms that see different data or tokens cannot be paired",
                arm.name
            )));
        }
        resolved.push((arm.name.clone(), config));
    }
    Ok(resolved)
}

impl Plan {
    /// Reads a configuration and resolves every arm, so that one that cannot run is refused before any compute.
    ///
    /// # Errors
    /// Names the arm and what is wrong with it.
    pub fn load(
        path: &Path,
        set: &[String],
        arms: &[String],
        seeds: Option<u64>,
        baseline: Option<&str>,
        out: Option<&Path>,
    ) -> Result<Self> {
        let base = Config::load(path, set)?;
        let table = base.compare.clone().unwrap_or(Compare::default());
        let chosen = chosen(&table, arms)?;
        let seeds = seeds.unwrap_or(table.seeds);
        if seeds == 0 {
            return Err(Failure::request("--seeds: is 0; every arm runs at least once"));
        }
        let resolved = resolve(path, set, &base, &chosen)?;
        let is_arm = |baseline: &str| resolved.iter().any(|(name, _)| name == baseline);
        let first = resolved[0].0.clone();
        let named = baseline.map(str::to_string).unwrap_or(table.baseline);
        let named = if named.is_empty() { first.clone() } else { named };
        // a baseline of the file that --arms left out makes way for the first arm
        let baseline = match is_arm(&named) {
            true => named,
            false if baseline.is_none() && !arms.is_empty() => first,
            false => return Err(Failure::request(format!("baseline {named:?} is none of the arms"))),
        };
        let mut own_baselines = Vec::new();
        for arm in chosen.iter().filter(|a| !a.baseline.is_empty()) {
            if is_arm(&arm.baseline) {
                own_baselines.push((arm.name.clone(), arm.baseline.clone()));
            } else if arms.is_empty() {
                let what = format!("arm {:?}: its baseline {:?} is none of the arms", arm.name, arm.baseline);
                return Err(Failure::request(what));
            }
        }
        let out = out.map_or_else(|| base.run.dir.join(format!("compare-{}", base.run.name)), Path::to_path_buf);
        Ok(Plan { arms: resolved, own_baselines, seeds, baseline, out })
    }

    /// The configuration of the first arm: data and length are those of all.
    pub fn base(&self) -> &Config {
        &self.arms[0].1
    }

    /// What an arm is compared with.
    pub fn baseline_of(&self, arm: &str) -> &str {
        self.own_baselines.iter().find(|(name, _)| name == arm).map_or(&self.baseline, |(_, b)| b)
    }

    /// All runs, seed by seed, so that an interrupted comparison has whole pairs.
    pub fn runs(&self) -> Vec<(Run, Config)> {
        let mut out = Vec::new();
        for i in 0..self.seeds {
            for (arm, config) in &self.arms {
                let seed = config.run.seed + i;
                let name = format!("{arm}-s{seed}");
                let mut config = config.clone();
                config.compare = None;
                config.run.seed = seed;
                config.run.name = name.clone();
                config.run.dir = self.out.join("runs");
                config.run.threads = 1;
                let run = Run {
                    arm: arm.clone(),
                    seed,
                    folder: config.folder(),
                    config: self.out.join("configs").join(format!("{name}.toml")),
                    log: self.out.join("logs").join(format!("{name}.log")),
                    steps: config.run.steps,
                };
                out.push((run, config));
            }
        }
        out
    }
}
