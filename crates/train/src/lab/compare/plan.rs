//! What is compared: `[compare]` of a configuration, or names of kinds on the command line.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use dash_model::attention::Knob;
use dash_model::kinds;

use super::measure::{Measure, measures};
use super::run::Run;
use crate::config::{Arm, Compare, Config, DeviceName, Stop, nearest};
use crate::failure::{Failure, Result};
use crate::training::stop::Watch;

/// Arms resolved to configurations.
#[derive(Debug, Clone)]
pub struct Plan {
    /// (name, configuration with the first seed).
    pub arms: Vec<(String, Config)>,
    /// Baselines of arms that have one of their own: (arm, baseline).
    pub own_baselines: Vec<(String, String)>,
    /// Arms that take the learning rate of another one: (arm, the other).
    pub rates_of: Vec<(String, String)>,
    /// Arms that take something of another one's run of the same seed.
    pub yokes: Vec<YokedArm>,
    /// `[compare]`, with the seeds and the baseline of the command line.
    pub rules: Compare,
    /// Folder of everything.
    pub out: PathBuf,
    /// The command that was given, to repeat it.
    pub command: String,
}

/// An arm whose runs take something of those of another one.
#[derive(Debug, Clone)]
pub struct YokedArm {
    /// The arm.
    pub arm: String,
    /// The arm it takes from.
    pub of: String,
    /// What it takes.
    pub takes: Takes,
}

/// What an arm takes of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// The number of attended chunks.
    Budget,
    /// gamma of every update.
    Gamma,
}

impl Takes {
    /// Its key in `[[compare.arm]]`.
    fn key(self) -> &'static str {
        match self {
            Takes::Budget => "budget_of",
            Takes::Gamma => "gamma_of",
        }
    }

    /// Names the run in a configuration.
    fn set(self, config: &mut Config, run: PathBuf) {
        match self {
            Takes::Budget => config.router.budget_from = Some(run),
            Takes::Gamma => config.router.gamma_from = Some(run),
        }
    }

    /// Why an arm of the first configuration can take nothing of one of the second, or `None`.
    fn misfit(self, own: &Config, other: &Config) -> Option<String> {
        let kind = other.model.attention.kind();
        match self {
            Takes::Budget => match (own.model.attention.chunk_size(), other.model.attention.chunk_size()) {
                (_, None) => Some(format!("has {kind} attention, which chooses no chunks")),
                (Some(own), Some(other)) if own != other => {
                    Some(format!("has chunks of {other} tokens, the arm of {own}"))
                }
                _ if own.model.layers != other.model.layers => {
                    Some(format!("has {} layers, the arm {}", other.model.layers, own.model.layers))
                }
                _ => None,
            },
            Takes::Gamma => {
                let mut attention = other.model.attention;
                attention.knob_mut(Knob::Gamma).is_none().then(|| format!("has {kind} attention, which has no gamma"))
            }
        }
    }
}

/// What the command line asks for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// `--set`.
    pub set: &'a [String],
    /// Names of arms or kinds; empty: those of the file.
    pub arms: &'a [String],
    /// Instead of `compare.seeds`.
    pub seeds: Option<u64>,
    /// Instead of `compare.baseline`.
    pub baseline: Option<&'a str>,
    /// Instead of `runs/compare-NAME`.
    pub out: Option<&'a Path>,
}

/// The arms of the command line, else those of the file, else four kinds.
fn chosen(table: &Compare, arms: &[String]) -> Result<Vec<Arm>> {
    let preset = |name: &String| Arm {
        name: name.clone(),
        set: vec![format!("model.attention.kind={name}")],
        baseline: String::new(),
        rate_of: String::new(),
        budget_of: String::new(),
        gamma_of: String::new(),
    };
    let known = || table.arm.iter().map(|a| a.name.as_str()).chain(kinds()).collect::<Vec<_>>().join(", ");
    match (arms.is_empty(), table.arm.is_empty()) {
        (true, true) => Ok(["dense", "topk", "dash", "dash-stopped"].map(|k| preset(&k.to_string())).to_vec()),
        (true, false) => Ok(table.arm.clone()),
        _ => {
            let find = |name: &String| match table.arm.iter().find(|a| a.name == *name) {
                Some(arm) => Ok(arm.clone()),
                None if kinds().contains(&name.as_str()) => Ok(preset(name)),
                None => {
                    let arms = || table.arm.iter().map(|a| a.name.as_str());
                    let meant = nearest(name, arms().chain(kinds()).collect::<Vec<_>>().into_iter());
                    let meant = meant.map_or(String::new(), |m| format!("; did you mean {m}?"));
                    Err(Failure::request(format!("--arms: {name:?} is none of {}{meant}", known())))
                }
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
        if config.run.seed != base.run.seed {
            return Err(Failure::request(format!(
                "arm {:?}: changes run.seed; arms with different seeds cannot be paired. Set it for all of them in [run]",
                arm.name
            )));
        }
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

/// (arm, another arm) of a key that names one. An arm that `--arms` left out is nobody's.
fn others(chosen: &[Arm], all: bool, key: &str, of: impl Fn(&Arm) -> &str) -> Result<Vec<(String, String)>> {
    let mut out = Vec::new();
    for arm in chosen.iter().filter(|a| !of(a).is_empty()) {
        if chosen.iter().any(|a| a.name == of(arm)) {
            out.push((arm.name.clone(), of(arm).to_string()));
        } else if all {
            let what = format!("arm {:?}: its {key} {:?} is none of the arms", arm.name, of(arm));
            return Err(Failure::request(what));
        }
    }
    Ok(out)
}

/// Arms that take something of another one. The other one may be left out by `--arms`, where its runs are there.
fn yoked(chosen: &[Arm], rules: &Compare, resolved: &[(String, Config)]) -> Result<Vec<YokedArm>> {
    let mut out = Vec::new();
    let takes = |arm: &Arm| [(Takes::Budget, arm.budget_of.clone()), (Takes::Gamma, arm.gamma_of.clone())];
    for (arm, (takes, of)) in chosen.iter().flat_map(|arm| takes(arm).map(|what| (arm, what))) {
        if of.is_empty() {
            continue;
        }
        let (name, key) = (&arm.name, takes.key());
        let refuse = |what: String| Err(Failure::request(format!("arm {name:?}: its {key} {of:?} {what}")));
        let Some(other) = chosen.iter().chain(&rules.arm).find(|a| a.name == of) else {
            return refuse("is none of the arms".into());
        };
        if of == *name || !(other.budget_of.is_empty() && other.gamma_of.is_empty()) {
            return refuse("takes something of another arm itself; name one that does not".into());
        }
        if !rules.learning_rates.is_empty() && arm.rate_of.is_empty() {
            return refuse(
                "has one run a seed, at one learning rate; give the arm a rate_of instead of tuning it".into(),
            );
        }
        let config_of = |arm: &str| resolved.iter().find(|(name, _)| name == arm).map(|(_, config)| config);
        if let Some(config) = config_of(name) {
            // one that --arms leaves out has ended, and its run tells
            if let Some(what) = config_of(&of).and_then(|other| takes.misfit(config, other)) {
                return refuse(what);
            }
            let mut config = config.clone();
            takes.set(&mut config, of.clone().into());
            config.check().map_err(|e| Failure::request(format!("arm {name:?}: {key}: {e}")))?;
        }
        out.push(YokedArm { arm: name.clone(), of, takes });
    }
    Ok(out)
}

/// Refuses declarations that no run can satisfy.
fn check_rules(rules: &Compare, first_seed: u64, measured: &[Measure]) -> Result<()> {
    if let Some(what) = Compare::complaint_of_seeds(rules.seeds) {
        return Err(Failure::request(format!("--seeds: {what}")));
    }
    let Some(last) = first_seed.checked_add(rules.seeds - 1) else {
        let what = format!("run.seed: {first_seed} leaves no room for {} seeds below 2^64", rules.seeds);
        return Err(Failure::request(what));
    };
    let test = first_seed..=last;
    if let Some(seed) = rules.tuning_seeds.iter().find(|s| test.contains(s)) {
        return Err(Failure::request(format!(
            "compare.tuning_seeds: {seed} is a seed of the comparison, too ({} to {}); what settings were chosen with cannot test \
             them. Take other seeds, for example from {} on",
            test.start(),
            test.end(),
            (last / 100).saturating_add(1).saturating_mul(100).saturating_add(1)
        )));
    }
    if !rules.primary.is_empty() && !measured.iter().any(|m| m.key == rules.primary) {
        let known = measured.iter().map(|m| format!("{:?}", m.key)).collect::<Vec<_>>().join(", ");
        return Err(Failure::request(format!(
            "compare.primary: {:?} is measured by no arm; this configuration measures {known}",
            rules.primary
        )));
    }
    if rules.stop_after.is_some() && !measured.iter().any(|m| m.key == "time-to-solve") {
        return Err(Failure::request("compare.stop_after: means nothing without [task]; a text is never solved"));
    }
    check_criteria(&rules.criteria)
}

/// A file of criteria that is named says something.
fn check_criteria(file: &Path) -> Result<()> {
    let what = match std::fs::metadata(file) {
        _ if file.as_os_str().is_empty() => return Ok(()),
        Ok(found) if found.is_file() && found.len() > 0 => return Ok(()),
        Ok(found) if found.is_file() => "is empty",
        _ => "is no file",
    };
    let path = file.display();
    Err(Failure::request(format!(
        "compare.criteria: {path} {what}; write what would count for and against down before the first run"
    )))
}

impl Plan {
    /// Reads a configuration and resolves every arm, so that one that cannot run is refused before any compute.
    ///
    /// # Errors
    /// Names the arm or the key and what is wrong with it.
    pub fn load(path: &Path, request: &Request, command: &str) -> Result<Self> {
        let base = Config::load(path, request.set)?;
        let mut rules = base.compare.clone().unwrap_or_default();
        let chosen = chosen(&rules, request.arms)?;
        rules.seeds = request.seeds.unwrap_or(rules.seeds);
        check_rules(&rules, base.run.seed, &measures(&base))?;
        let resolved = resolve(path, request.set, &base, &chosen)?;
        let is_arm = |name: &str| resolved.iter().any(|(arm, _)| arm == name);
        let all = request.arms.is_empty();
        let first = resolved[0].0.clone();
        let named = request.baseline.map_or(rules.baseline, str::to_string);
        let named = if named.is_empty() { first.clone() } else { named };
        // a baseline of the file that --arms left out makes way for the first arm
        rules.baseline = match is_arm(&named) {
            true => named,
            false if request.baseline.is_none() && !all => first,
            false => return Err(Failure::request(format!("baseline {named:?} is none of the arms"))),
        };
        let own_baselines = others(&chosen, all, "baseline", |a| &a.baseline)?;
        let rates_of = others(&chosen, all, "rate_of", |a| &a.rate_of)?;
        if let Some((arm, other)) = rates_of.iter().find(|(_, o)| rates_of.iter().any(|(a, _)| a == o)) {
            let what = format!("arm {arm:?}: its rate_of {other:?} has no learning rate of its own");
            return Err(Failure::request(what));
        }
        let yokes = yoked(&chosen, &rules, &resolved)?;
        let out = || base.run.dir.join(format!("compare-{}", base.run.name));
        let out = request.out.map_or_else(out, Path::to_path_buf);
        if out.exists() && !out.is_dir() {
            return Err(Failure::request(format!("--out {}: is no folder; name another place", out.display())));
        }
        let plan = Plan { arms: resolved, own_baselines, rates_of, yokes, rules, out, command: command.into() };
        plan.check_contrast()?;
        Ok(plan)
    }

    /// The declared contrast is one of an arm with another one. An arm that `--arms` left out is not compared this time.
    fn check_contrast(&self) -> Result<()> {
        let arm = &self.rules.contrast;
        let runs = self.arms.iter().any(|(name, _)| name == arm);
        if arm.is_empty() || (!runs && self.rules.arm.iter().any(|a| a.name == *arm)) {
            return Ok(());
        }
        if !runs {
            let arms = self.names().join(", ");
            return Err(Failure::request(format!("compare.contrast: {arm:?} is none of the arms {arms}")));
        }
        if self.baseline_of(arm) == arm {
            return Err(Failure::request(format!(
                "compare.contrast: {arm:?} is the baseline; name the arm that is compared with it"
            )));
        }
        Ok(())
    }

    /// The configuration of the first arm: data and length are those of all.
    pub fn base(&self) -> &Config {
        &self.arms[0].1
    }

    /// Whether an arm runs on a GPU.
    pub fn on_gpu(&self) -> bool {
        let on_gpu = |config: &Config| match config.run.device_name() {
            Ok(DeviceName::Cuda(_)) => true,
            // a name that is none is refused before any run
            Ok(DeviceName::Cpu) | Err(_) => false,
        };
        self.arms.iter().any(|(_, config)| on_gpu(config))
    }

    /// Names of the arms.
    pub fn names(&self) -> Vec<&str> {
        self.arms.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// What the arms measure, the primary outcome first.
    pub fn measures(&self) -> Vec<Measure> {
        measures(self.base())
    }

    /// What an arm is compared with.
    pub fn baseline_of(&self, arm: &str) -> &str {
        self.own_baselines.iter().find(|(name, _)| name == arm).map_or(&self.rules.baseline, |(_, b)| b)
    }

    /// A run of an arm with this name in a folder of the comparison.
    pub fn run(&self, arm: &str, config: &Config, folder: &str, name: &str) -> (Run, Config) {
        let mut config = config.clone();
        config.compare = None;
        config.run.name = name.into();
        config.run.dir = self.out.join(folder);
        config.run.threads = 1;
        if let Some(after) = self.rules.stop_after {
            config.eval.stop = Some(Stop { accuracy: self.rules.solved, checks: self.rules.checks, after });
        }
        let run = Run {
            arm: arm.into(),
            seed: config.run.seed,
            folder: config.folder(),
            config: self.out.join("configs").join(format!("{name}.toml")),
            log: self.out.join("logs").join(format!("{name}.log")),
            steps: config.run.steps,
            after: Vec::new(),
            stop: Watch::of(&config),
            last: OnceCell::new(),
        };
        (run, config)
    }

    /// All runs, seed by seed, so that an interrupted comparison has whole pairs.
    pub fn runs(&self) -> Vec<(Run, Config)> {
        let mut out = Vec::new();
        for i in 0..self.rules.seeds {
            for (arm, config) in &self.arms {
                let mut config = config.clone();
                config.set_seed(config.run.seed + i);
                let seed = config.run.seed;
                let mut after = Vec::new();
                for yoke in self.yokes.iter().filter(|y| y.arm == *arm) {
                    let source = format!("{}-s{seed}", yoke.of);
                    yoke.takes.set(&mut config, self.out.join("runs").join(&source));
                    after.push(source);
                }
                let (mut run, config) = self.run(arm, &config, "runs", &format!("{arm}-s{seed}"));
                run.after = after;
                out.push((run, config));
            }
        }
        out
    }
}
