//! A run: its folder, where it starts or goes on, and what it starts with. The loop is a [`Session`].

use std::path::Path;
use std::time::Instant;

use anyhow::anyhow;
use dash_core::Device;
use dash_data::LoaderState;

use super::checkpoint::{self, Checkpoints, State};
use super::device::device;
use super::eval::unigram_loss;
use super::init;
use super::knobs::initial_gamma;
use super::lock::RunLock;
use super::material::Material;
use super::places::found_to_resume;
use super::preflight;
use super::provenance::{self, Begins};
use super::schedule::learning_rate;
use super::session::{Parts, Session};
use super::trainer::Trainer;
use super::yoke::Yoke;
use crate::config::{Config, Difference, Effect};
use crate::console::{self, tell};
use crate::failure::{Failure, Result};
use crate::files::replace_file;
use crate::signals::Interrupt;

/// How a run starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Start {
    /// Continue from the newest whole checkpoint.
    pub resume: Option<Resume>,
    /// Continue although configuration or data changed.
    pub allow_changes: bool,
    /// Continue although `run.steps` changed.
    pub extend: bool,
    /// Start although this machine seems too small.
    pub force: bool,
}

/// Which folders a run may continue in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Resume {
    /// One that holds a run.
    Yes,
    /// Any: one that holds no run gets one. For supervisors, which repeat one command.
    Auto,
}

struct Stand {
    trainer: Trainer,
    data: LoaderState,
    tokens: u64,
}

/// Whether the folder's run is continued. Refuses to start over a run, and to resume where there is none, before any work.
fn continues(folder: &Path, resume: Option<Resume>) -> Result<bool> {
    if !folder.join("config.toml").exists() && !Checkpoints::of(folder).list().is_empty() {
        return Err(Failure::request(format!(
            "{}: holds checkpoints of a run whose config.toml is gone; restore it to continue, or choose another name with --set run.name=NAME",
            folder.display()
        )));
    }
    match (resume, folder.join("config.toml").exists()) {
        (None, true) => Err(Failure::request(format!(
            "{}: holds a run already; continue it with --resume, or choose another name with --set run.name=NAME",
            folder.display()
        ))),
        (Some(Resume::Yes), false) => Err(Failure::request(format!(
            "{}: nothing to resume; leave out --resume to start the run, or say --resume=auto to start or continue it",
            folder.display()
        ))),
        (_, holds) => Ok(holds),
    }
}

/// Refuses an extension that is none, and says what a longer run does to the learning rate.
fn tell_extension(old: &Config, new: &Config, done: u64) -> Result<()> {
    let (from, to) = (old.run.steps, new.run.steps);
    if to <= done {
        return Err(Failure::request(format!("--extend: {to} is not above the {done} updates that the run has made")));
    }
    let rate = |c: &Config| learning_rate(&c.optim, done + 1, c.run.steps);
    let (before, after) = (rate(old), rate(new));
    // the last update of the old schedule has no next one: its rate is where the schedule ended
    if before == after {
        tell!("extending from {from} to {to} updates; the learning rate goes on at {after:.2e}");
    } else {
        let ended = learning_rate(&old.optim, done.clamp(1, from), from);
        tell!(
            "extending from {from} to {to} updates; the schedule is stretched over all of them, so the learning rate goes from {ended:.2e} \
             to {after:.2e}"
        );
    }
    Ok(())
}

/// Refuses to go on with other settings; a longer run is another request than changed settings.
fn started_differently(folder: &Path, changes: &str, (from, to): (u64, u64)) -> Failure {
    let longer = match to > from {
        true => format!("for a longer run say --extend {to} instead of --resume and leave the rest as it was; else "),
        false => String::new(),
    };
    Failure::request(format!(
        "{}: the run was started differently ({changes}); {longer}restore that, or add --allow-changes to continue anyway",
        folder.display()
    ))
}

/// A run that was extended is resumed to where it was extended to: its configuration file says what it was before.
fn as_extended(config: &Config, start: Start) -> Config {
    let mut config = config.clone();
    if start.resume.is_some() && !start.extend && !start.allow_changes {
        // what is damaged is told when this start is written down
        let starts = provenance::read(&config.folder()).unwrap_or_default();
        if let Some(steps) = starts.iter().rev().find_map(|s| s.extended).filter(|&steps| steps > config.run.steps) {
            tell!("run.steps = {steps}, to which the run was extended; its configuration says {}", config.run.steps);
            config.run.steps = steps;
        }
    }
    config
}

fn begins(resumes: bool, start: Start, steps: u64) -> Begins {
    match resumes {
        true if start.extend => Begins::Extended(steps),
        true => Begins::Resumed,
        false => Begins::Anew,
    }
}

/// A fresh start, or the newest whole checkpoint.
fn stand(
    config: &Config,
    (start, resumes): (Start, bool),
    folder: &Path,
    data_hash: &str,
    device: &Device,
) -> Result<Stand> {
    if !resumes {
        return Ok(Stand { trainer: init::trainer(config, device)?, data: LoaderState::default(), tokens: 0 });
    }
    let checkpoints = Checkpoints::of(folder);
    let old = Config::of_run(folder)?;
    let mut differences = old.differences(config);
    if start.extend {
        differences.retain(|d| !d.text.starts_with("run.steps:"));
    }
    let (matter, neutral): (Vec<_>, Vec<_>) = differences.into_iter().partition(|d| d.effect == Effect::Weights);
    let names = |d: Vec<Difference>| d.into_iter().map(|d| d.text).collect::<Vec<_>>().join("; ");
    let (newest, damaged) = checkpoints.newest().map_err(Failure::Request)?;
    for d in &damaged {
        tell!("warning: checkpoint {d}; using the one before");
    }
    let mut changes = names(matter);
    let state = newest.as_ref().map(|path| checkpoint::read_state(path)).transpose()?;
    if let Some(state) = &state
        && state.data_hash != data_hash
    {
        let separator = if changes.is_empty() { "" } else { "; " };
        changes += &format!("{separator}prepared corpus: {} -> {data_hash}", state.data_hash);
    }
    if !changes.is_empty() && !start.allow_changes {
        return Err(started_differently(folder, &changes, (old.run.steps, config.run.steps)));
    }
    if !neutral.is_empty() {
        tell!("resuming with {}", names(neutral));
    }
    let Some(path) = newest else {
        if !damaged.is_empty() {
            return Err(Failure::Run(anyhow!("{}: no whole checkpoint is left to resume from", folder.display())));
        }
        tell!("no checkpoint yet: starting from step 0");
        return Ok(Stand { trainer: init::trainer(config, device)?, data: LoaderState::default(), tokens: 0 });
    };
    let (trainer, state) = checkpoint::load(&path, config, device)?;
    checkpoints.tidy(config, state.step);
    if start.extend {
        tell_extension(&old, config, state.step)?;
    }
    if state.step < config.run.steps {
        tell!("resuming from {} (step {})", path.display(), state.step);
    }
    Ok(Stand { trainer, data: state.data, tokens: state.tokens })
}

/// Writes the tokenizer of a text into the run's folder.
fn restore_tokenizer(material: &Material, folder: &Path) -> Result<()> {
    let Some(tokenizer) = &material.tokenizer else { return Ok(()) };
    Ok(replace_file(&folder.join("tokenizer.json"), tokenizer.json().as_bytes())?)
}

/// Trains.
///
/// # Errors
/// See [`Failure`]: a wrong request, a run that failed, or one that a signal stopped after saving.
pub fn train(config: &Config, start: Start, interrupt: impl FnOnce() -> anyhow::Result<Interrupt>) -> Result<()> {
    let began = Instant::now();
    let folder = config.folder();
    if !continues(&folder, start.resume)? {
        // before anything is prepared
        Yoke::of(config)?;
    }
    let config = &as_extended(config, start);
    preflight::check_fits(config, 1, start.force)?;
    let device = device(config)?;
    preflight::check_fits_gpu(config, &device, 1, start.force)?;
    let material = match start.resume {
        None => Material::of(config)?,
        Some(_) => {
            let newest = Checkpoints::of(&folder).newest().map_err(Failure::Request)?.0;
            let trained = newest.and_then(|path| checkpoint::read_state(&path).ok()).map(|state| state.data_hash);
            Material::of_trained(&found_to_resume(config, &folder, trained.as_deref()), trained.as_deref())?
        }
    };
    let data_hash = material.hash.clone();
    let _lock = RunLock::take(&folder)?;
    // another process may have made a run of the folder while this one prepared its data
    let resumes = continues(&folder, start.resume)?;
    console::record_to(&folder.join("run.log"));
    let Stand { mut trainer, data, tokens } = stand(config, (start, resumes), &folder, &data_hash, &device)?;
    if resumes && trainer.optimizer.step >= config.run.steps {
        // a finished run may have lost it
        restore_tokenizer(&material, &folder)?;
        let (made, all) = (trainer.optimizer.step, config.run.steps);
        tell!(
            "{}: already finished, {made} of {all} updates; --extend STEPS goes on up to STEPS in all",
            folder.display()
        );
        return Ok(());
    }
    let interrupt = interrupt()?;
    let loader = material.loader(config, data)?;
    let set = material.validation(config)?;
    if trainer.optimizer.step == 0 {
        let (ids, batch) = set.first();
        initial_gamma(&mut trainer.model, &config.router, ids, batch)?;
        init::tell_jump(&trainer.model, config, &set)?;
    }
    tell!("{}", preflight::report(config, &trainer.model, &device, &material.train)?.trim_end());
    let unigram = (!material.train.is_empty()).then(|| unigram_loss(&material.train, &set, config.data.vocab_size));
    if let Some(unigram) = unigram {
        tell!("unigram   {unigram:.3} nats a token is what the validation text costs without context");
    }

    restore_tokenizer(&material, &folder)?;
    let begins = begins(resumes, start, config.run.steps);
    provenance::record(&folder, &device, trainer.optimizer.step, begins, material.tokenizer.as_ref())?;
    trainer.yoke.record(&folder)?;
    // last, because it is what makes the folder a run
    replace_file(&folder.join("config.toml"), config.to_toml().as_bytes())?;
    let state = State::new(trainer.optimizer.step, tokens, config.run.seed, data, data_hash);
    let parts = Parts { config, material: &material, trainer, loader, set, unigram, state, interrupt, began };
    Session::new(parts)?.run()
}
