//! A run: its folder, where it starts or goes on, and what it starts with. The loop is a [`Session`].

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use dash_core::Device;
use dash_data::PackedEpoch;
use dash_model::Model;

use super::accumulate::most_processes;
use super::checkpoint::{self, Checkpoints, State};
use super::device::{device_at, folders};
use super::eval::{ValidationSet, unigram_loss};
use super::init::{self, Stand};
use super::knobs::initial_gamma;
use super::lock::RunLock;
use super::material::{Material, packing};
use super::places::found_to_resume;
use super::preflight;
use super::provenance::{self, Begins};
use super::schedule::learning_rate;
use super::session::{Parts, Session};
use super::trainer::Trainer;
use super::yoke::Yoke;
use crate::config::{Config, DeviceName, Difference, Effect};
use crate::console::{self, tell};
use crate::failure::{Failure, Result};
use crate::files::replace_file;
use crate::peers::Peers;
use crate::peers::hello::Hello;
use crate::peers::seat::Seat;
use crate::program;
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

/// Refuses to go on with other settings; a longer run, to `longer` updates, is another request than changed settings.
fn started_differently(folder: &Path, changes: &str, longer: Option<u64>) -> Failure {
    let longer = longer.map_or(String::new(), |to| {
        format!("for a longer run say --extend {to} instead of --resume and leave the rest as it was; else ")
    });
    let folder = folder.display();
    Failure::request(format!(
        "{folder}: the run was started differently ({changes}); {longer}restore that (--config {folder} without --set has the settings of the run), or \
         add --allow-changes to continue anyway"
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
    (start, resumes, peers): (Start, bool, &Peers),
    folder: &Path,
    data_hash: &str,
    device: &Device,
) -> Result<Stand> {
    if !resumes {
        return init::stand(config, device, data_hash);
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
        let longer = (!start.extend && config.run.steps > old.run.steps).then_some(config.run.steps);
        return Err(started_differently(folder, &changes, longer));
    }
    if !neutral.is_empty() {
        tell!("resuming with {}", names(neutral));
    }
    let Some(path) = newest else {
        if !damaged.is_empty() {
            return Err(Failure::Run(anyhow!("{}: no whole checkpoint is left to resume from", folder.display())));
        }
        tell!("no checkpoint yet: starting from step 0");
        return init::stand(config, device, data_hash);
    };
    let (trainer, state) = checkpoint::load(&path, config, device)?;
    if peers.is_first() {
        checkpoints.tidy(config, state.step);
    }
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

/// What this process says of itself to the others.
fn hello(config: &Config, seat: &Seat) -> Result<Hello> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "a host".into());
    let program = std::env::current_exe().and_then(std::fs::File::open).and_then(checkpoint::hash);
    let binary = program.map_err(|e| anyhow!("this program's file cannot be read: {e}"))?;
    let config = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(config.to_toml().as_bytes()));
    let token = std::env::var("DASHLAB_TOKEN").unwrap_or_default();
    let host = host.trim().to_string();
    Ok(Hello { rank: seat.rank, world: seat.world, host, build: program::build(), binary, config, token })
}

/// Refuses a number of processes that would have bits of its own.
///
/// # Errors
/// A wrong request that says which numbers do.
pub fn check_world(config: &Config, world: usize) -> Result<()> {
    let all = config.data.grad_accum;
    let most = most_processes(all);
    if most.is_multiple_of(world) {
        return Ok(());
    }
    let power = world.next_power_of_two();
    let raise = all.next_multiple_of(power);
    Err(Failure::request(format!(
        "{world} processes: data.grad_accum = {all} micro-batches an update are shared out with the same bits by {}; choose one of these, or another \
         data.grad_accum, for example {raise} for {} processes",
        worlds(most),
        power
    )))
}

/// `1, 2 or 4 processes`
fn worlds(most: usize) -> String {
    let all: Vec<String> = (0..=most.ilog2()).map(|i| (1usize << i).to_string()).collect();
    match all.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last} processes", rest.join(", ")),
        _ => "1 process".into(),
    }
}

/// Trains, alone or as one of several processes.
///
/// # Errors
/// See [`Failure`]: a wrong request, a run that failed, or one that a signal stopped after saving.
pub fn train(
    config: &Config,
    start: Start,
    seat: &Seat,
    interrupt: impl FnOnce() -> anyhow::Result<Interrupt>,
) -> Result<()> {
    check_world(config, seat.world)?;
    let on_gpu = config.run.device_name().map_err(Failure::request)? != DeviceName::Cpu;
    let patience = Duration::from_secs(config.run.peer_timeout_s);
    let peers = match seat.world {
        1 => Peers::Alone,
        _ => Peers::join(seat, &hello(config, seat)?, on_gpu, patience)?,
    };
    if !peers.is_first() {
        // one process tells; each has a log
        console::set_quiet(true);
    }
    let result = train_among(config, start, (seat, &peers), interrupt);
    peers.leave(&result);
    result
}

/// Refuses processes that begin at different places: each reads checkpoints, or what `[init] from` names, from its own disk.
fn begin_alike(trainer: &Trainer, peers: &Peers) -> Result<()> {
    let own = if peers.world() == 1 { (0, 0) } else { (trainer.optimizer.step, trainer.hash_of_weights()?) };
    let Some((rank, (step, _), (first, _))) = peers.odd_one(own)? else { return Ok(()) };
    Err(peers.alike(Failure::request(format!(
        "rank {rank} begins after step {step} and rank 0 after step {first}, with other weights; run.dir and what [init] names have to be the \
         same files for all processes: put them on a file system that all hosts share"
    ))))
}

/// What the run learns from: the first process prepares it, the others find it.
fn material(config: &Config, start: Start, peers: &Peers) -> Result<Material> {
    let folder = config.folder();
    let own = peers.in_turn(|| match start.resume {
        None => Material::of(config),
        Some(_) => {
            let newest = Checkpoints::of(&folder).newest().map_err(Failure::Request)?.0;
            let trained = newest.and_then(|path| checkpoint::read_state(&path).ok()).map(|state| state.data_hash);
            Material::of_trained(&found_to_resume(config, &folder, trained.as_deref()), trained.as_deref())
        }
    })?;
    match peers.odd_one(own.hash.clone())? {
        None => Ok(own),
        Some((rank, hash, first)) => Err(peers.alike(Failure::request(format!(
            "rank {rank}: prepared corpus {hash}, rank 0 has {first}; give all processes the same files"
        )))),
    }
}

fn train_among(
    config: &Config,
    start: Start,
    (seat, peers): (&Seat, &Peers),
    interrupt: impl FnOnce() -> anyhow::Result<Interrupt>,
) -> Result<()> {
    let began = Instant::now();
    let folder = config.folder();
    peers.first(|| {
        if !continues(&folder, start.resume)? {
            // before anything is prepared
            Yoke::of(config)?;
        }
        Ok(())
    })?;
    let config = &as_extended(config, start);
    let device = peers.all((|| {
        preflight::check_fits(config, seat.local_world, start.force)?;
        let device = device_at(config, seat)?;
        preflight::check_fits_gpu(config, &device, 1, start.force)?;
        Ok(device)
    })())?;
    peers.connect(&device, &folders())?;
    let material = material(config, start, peers)?;
    let data_hash = material.hash.clone();
    let _lock = peers.all(if peers.is_first() { RunLock::take(&folder).map(Some) } else { Ok(None) })?;
    // another process may have made a run of the folder while this one prepared its data
    let resumes = peers.first(|| continues(&folder, start.resume))?;
    let log = if peers.is_first() { "run.log".into() } else { format!("rank-{}.log", peers.rank()) };
    console::record_to(&folder.join(log));
    let stood = peers.in_turn(|| stand(config, (start, resumes, peers), &folder, &data_hash, &device))?;
    let Stand { mut trainer, data, tokens } = stood;
    trainer.share(peers);
    begin_alike(&trainer, peers)?;
    if resumes && trainer.optimizer.step >= config.run.steps {
        // a finished run may have lost it
        peers.first(|| restore_tokenizer(&material, &folder))?;
        let (made, all) = (trainer.optimizer.step, config.run.steps);
        tell!(
            "{}: already finished, {made} of {all} updates; --extend STEPS goes on up to STEPS in all",
            folder.display()
        );
        return Ok(());
    }
    let interrupt = interrupt()?;
    let loader = material.loader(config, data)?;
    loader.packed().iter().filter(|_| peers.is_first()).for_each(|packed| tell!("{}", packing(config, packed)));
    let set = material.validation(config)?;
    if trainer.optimizer.step == 0 {
        initial_gamma(&mut trainer.model, &config.router, set.first_batch())?;
        peers.first(|| init::tell_jump(&trainer.model, config, &set))?;
    }
    let unigram = tell_cost(config, (&trainer.model, &device), (&material, &set, loader.packed()), peers)?;
    let processes = (&device, peers.world());
    peers.first(|| write_down(config, &trainer, &material, processes, begins(resumes, start, config.run.steps)))?;
    let state = State::new(trainer.optimizer.step, tokens, config.run.seed, data, data_hash);
    let parts = Parts { config, material: &material, trainer, loader, set, unigram, state, interrupt, began };
    Session::new(parts)?.run()
}

/// What makes a folder that of a run.
fn write_down(
    config: &Config,
    trainer: &Trainer,
    material: &Material,
    processes: (&Device, usize),
    begins: Begins,
) -> Result<()> {
    let folder = config.folder();
    restore_tokenizer(material, &folder)?;
    provenance::record(&folder, processes, trainer.optimizer.step, begins, material.tokenizer.as_ref())?;
    trainer.yoke.record(&folder)?;
    // last, because it is what makes the folder a run
    Ok(replace_file(&folder.join("config.toml"), config.to_toml().as_bytes())?)
}

/// What the run will cost, before it begins; the loss without context, where there is text.
fn tell_cost(
    config: &Config,
    of: (&Model, &Device),
    (material, set, packed): (&Material, &ValidationSet, Option<PackedEpoch>),
    peers: &Peers,
) -> Result<Option<f64>> {
    if !peers.is_first() {
        return Ok(None);
    }
    tell!("{}", preflight::report(config, of, (&material.train, packed))?.trim_end());
    let (world, all) = (peers.world(), config.data.grad_accum);
    if world > 1 || all > 1 {
        let same = worlds(most_processes(all));
        tell!(
            "processes {world}; an update of {all} micro-batches, {} tokens, has the same bits with {same}",
            config.tokens_per_step()
        );
    }
    let unigram = (!material.train.is_empty()).then(|| unigram_loss(&material.train, set, config.data.vocab_size));
    if let Some(unigram) = unigram {
        tell!("unigram   {unigram:.3} nats a token is what the validation text costs without context");
    }
    Ok(unigram)
}
