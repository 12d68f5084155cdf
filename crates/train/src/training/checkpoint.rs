//! Checkpoints: a folder that appears by rename, complete or not at all.
//!
//! Files are written into a hidden folder beside, synced, and the folder is renamed; `state.json` holds the hash of each
//! file, so a damaged checkpoint is found when it is read and the one before is used.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use dash_core::{Device, Tensor};
use dash_model::{Model, read_tensors};
use safetensors::tensor::{Dtype, View};
use xxhash_rust::xxh3::Xxh3;

use super::knobs::Knobs;
use super::optim::{Optimizer, rule};
use super::spikes::Guard;
use super::state::Newer;
pub use super::state::{State, read_state};
use super::trainer::Trainer;
use super::yoke::Yoke;
use crate::config::Config;
use crate::files::{sync_folder, write_synced};

/// The checkpoints of a run.
pub struct Checkpoints {
    folder: PathBuf,
}

/// A tensor whose bytes exist only while they are written: a checkpoint of a model that fills the memory must not need as
/// much again.
struct Written<'a>(&'a Tensor, Cow<'a, [f32]>);

impl<'a> Written<'a> {
    /// In host memory as it lies there, from elsewhere a copy.
    fn of(tensor: &'a Tensor) -> dash_core::Result<Self> {
        let numbers = match tensor.device() {
            Device::Cpu(_) => Cow::Borrowed(tensor.as_slice()?),
            Device::Cuda(_) => Cow::Owned(tensor.to_vec()?),
        };
        Ok(Written(tensor, numbers))
    }
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        self.0.shape()
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.1.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into()
    }
    fn data_len(&self) -> usize {
        size_of_val(&*self.1)
    }
}

/// Writes f32 tensors, with the metadata that `transformers` insists on.
///
/// # Errors
/// When a tensor is not f32 or the file cannot be written.
pub fn write_safetensors<'a>(path: &Path, tensors: impl Iterator<Item = (String, &'a Tensor)>) -> anyhow::Result<()> {
    let views: dash_core::Result<Vec<_>> = tensors.map(|(name, tensor)| Ok((name, Written::of(tensor)?))).collect();
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let write = || -> anyhow::Result<()> {
        // safetensors writes a temporary file that its owner alone may read, and renames it: give it what the umask gives
        let permissions = std::fs::File::create(path)?.metadata()?.permissions();
        safetensors::serialize_to_file(views?, Some(metadata), path).map_err(|e| match e {
            // its message and its cause are the same words
            safetensors::SafeTensorError::IoError(e) => anyhow::Error::from(e),
            e => e.into(),
        })?;
        Ok(std::fs::set_permissions(path, permissions)?)
    };
    write().with_context(|| format!("{} cannot be written", path.display()))
}

/// Makes the file survive a power failure and hashes what can be read of it.
fn sync_and_hash(path: &Path) -> anyhow::Result<String> {
    let run = || {
        let file = File::options().read(true).write(true).open(path)?;
        file.sync_all()?;
        hash(file)
    };
    run().with_context(|| format!("{} cannot be synced and read back", path.display()))
}

/// The hash of a file, piece by piece: a checkpoint may be larger than what is left of the memory.
pub fn hash(mut file: File) -> std::io::Result<String> {
    let (mut hash, mut piece) = (Xxh3::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(format!("{:032x}", hash.digest128())),
            n => hash.update(&piece[..n]),
        }
    }
}

impl Checkpoints {
    /// Those of a run folder.
    pub fn of(run: &Path) -> Self {
        Checkpoints { folder: run.join("checkpoints") }
    }

    /// Complete ones, oldest first.
    pub fn list(&self) -> Vec<(u64, PathBuf)> {
        let mut found: Vec<(u64, PathBuf)> = std::fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| Some((step_of(&e.path())?, e.path())))
            .collect();
        found.sort();
        found
    }

    /// Finishes what a process that was killed left: half-written folders, and checkpoints up to step `whole`, the newest whole one, that
    /// need not be kept. Only for whoever holds the run's lock.
    pub fn tidy(&self, config: &Config, whole: u64) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".tmp-") {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        self.prune(config, whole);
    }

    /// Writes one and removes those that need not be kept: all but the `keep_last` newest and the `keep_best` with the
    /// lowest validation loss. `moments` is [`Trainer::gathered_state`].
    ///
    /// # Errors
    /// When it cannot be written; the older ones are untouched then.
    pub fn save(
        &self,
        trainer: &Trainer,
        moments: &[(String, Tensor)],
        mut state: State,
        config: &Config,
    ) -> anyhow::Result<PathBuf> {
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("{} cannot be created", self.folder.display()))?;
        let name = format!("step-{:08}", state.step);
        let aside = self.folder.join(format!(".tmp-{name}"));
        let _ = std::fs::remove_dir_all(&aside);
        state.optimizer = trainer.optimizer.kind().into();
        state.spikes = config.optim.spike_guard.map(|_| trainer.spikes.seen()).transpose()?;
        state.knobs = Knobs::of(&trainer.model.config().attention);
        let written = self.write(&aside, (trainer, moments), &mut state);
        if let Err(e) = written {
            let _ = std::fs::remove_dir_all(&aside);
            return Err(e.context("the checkpoint could not be saved; earlier checkpoints are kept"));
        }
        let place = self.folder.join(&name);
        if place.exists() {
            // only a damaged one of the same step can stand here: it was passed over when the run was resumed
            std::fs::remove_dir_all(&place)?;
        }
        std::fs::rename(&aside, &place).with_context(|| format!("{} cannot be renamed into place", aside.display()))?;
        sync_folder(&self.folder)?;
        self.prune(config, state.step);
        Ok(place)
    }

    fn write(
        &self,
        aside: &Path,
        (trainer, moments): (&Trainer, &[(String, Tensor)]),
        state: &mut State,
    ) -> anyhow::Result<()> {
        std::fs::create_dir(aside).with_context(|| format!("{} cannot be created", aside.display()))?;
        let params = trainer.model.params();
        let model = params.iter().map(|p| (p.name.clone(), &p.value));
        let [model_file, optimizer_file] = ["model.safetensors", "optimizer.safetensors"];
        write_safetensors(&aside.join(model_file), model)?;
        write_safetensors(&aside.join(optimizer_file), moments.iter().map(|(name, x)| (name.clone(), x)))?;
        for name in [model_file, optimizer_file] {
            state.files.insert(name.into(), sync_and_hash(&aside.join(name))?);
        }
        write_synced(&aside.join("state.json"), &serde_json::to_vec_pretty(&state)?)?;
        sync_folder(aside)
    }

    /// Of the checkpoints up to `step`, which is a whole one. Later ones are damaged and were passed over: they take no place of a
    /// whole one, and the run replaces them when it gets there.
    fn prune(&self, config: &Config, step: u64) {
        let mut all = self.list();
        all.retain(|(s, _)| *s <= step);
        let newest = all.iter().rev().take(config.checkpoint.keep_last).map(|(step, _)| *step);
        let mut scored: Vec<(f64, u64)> =
            all.iter().filter_map(|(step, path)| Some((read_state(path).ok()?.validation_loss?, *step))).collect();
        scored.sort_by(|a, b| a.0.total_cmp(&b.0));
        let best = scored.into_iter().take(config.checkpoint.keep_best).map(|(_, step)| step);
        let keep: std::collections::HashSet<u64> = newest.chain(best).collect();
        for (step, path) in all {
            if !keep.contains(&step) {
                // Renamed first, so that a crash in the middle leaves no half-removed folder under a finished name.
                let trash = self.folder.join(format!(".tmp-removed-{step}"));
                // of a crash before: a folder cannot be renamed onto it
                let _ = std::fs::remove_dir_all(&trash);
                if std::fs::rename(&path, &trash).is_ok() {
                    let _ = std::fs::remove_dir_all(&trash);
                }
            }
        }
    }

    /// The newest checkpoint that is whole, and a line about each newer one that is not.
    ///
    /// # Errors
    /// When one was written by a later format: to go on from the one before would lose it.
    pub fn newest(&self) -> anyhow::Result<(Option<PathBuf>, Vec<String>)> {
        let mut damaged = Vec::new();
        for (_, path) in self.list().into_iter().rev() {
            match verify(&path) {
                Ok(()) => return Ok((Some(path), damaged)),
                Err(e) if e.is::<Newer>() => return Err(e),
                Err(e) => damaged.push(format!("{}: {e:#}", path.display())),
            }
        }
        Ok((None, damaged))
    }
}

/// The step that a checkpoint's folder is called after.
fn step_of(folder: &Path) -> Option<u64> {
    folder.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

fn verify(folder: &Path) -> anyhow::Result<()> {
    let state = read_state(folder)?;
    // the name orders the checkpoints, the state goes on from its own step: they have to agree
    if step_of(folder).is_some_and(|step| step != state.step) {
        bail!("its state.json is of step {}", state.step);
    }
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let path = folder.join(name);
        let expected = state.files.get(name).ok_or_else(|| anyhow!("state.json lists no {name}"))?;
        let found = File::open(&path).and_then(hash).with_context(|| format!("{} cannot be read", path.display()))?;
        if found != *expected {
            bail!("{name} does not match its hash");
        }
    }
    Ok(())
}

/// Weights of a folder that holds `model.safetensors`, and nothing but weights of this model.
///
/// # Errors
/// When the file is damaged or does not fit the configuration.
pub fn load_model(folder: &Path, config: &Config, device: &Device) -> anyhow::Result<Model> {
    let weights = folder.join("model.safetensors");
    let mut model = Model::from_file(&weights, &config.model, config.data.vocab_size, config.positions(), device)?;
    // an exported folder has no state, and its configuration has the final values
    if folder.join("state.json").exists()
        && let Some(knobs) = read_state(folder)?.knobs
    {
        model.set_knobs(knobs.alpha, knobs.gamma);
    }
    // a replayed gamma is among the knobs
    if config.router.budget_from.is_some() {
        Yoke::taken(folder, config)?.set(&mut model)?;
    }
    Ok(model)
}

/// Weights, optimiser state and the rest of a checkpoint folder.
///
/// # Errors
/// When a file is damaged or does not fit the configuration.
pub fn load(folder: &Path, config: &Config, device: &Device) -> anyhow::Result<(Trainer, State)> {
    let state = read_state(folder)?;
    let kind = rule(config.optim.kind).kind();
    if state.optimizer != kind {
        bail!(
            "{}: holds the state of optimiser {}, the configuration asks for optim.kind = \"{kind}\"",
            folder.display(),
            state.optimizer
        );
    }
    let model = load_model(folder, config, device)?;
    let path = folder.join("optimizer.safetensors");
    let mut tensors = read_tensors(&path, device)?;
    let optimizer = Optimizer::from_named(&config.optim, model.params(), state.step, |name| tensors.remove(name));
    let optimizer = optimizer.map_err(|e| anyhow!("{}: {e}", path.display()))?;
    if let Some(name) = tensors.keys().min() {
        bail!("{}: {name} belongs to no parameter of this model", path.display());
    }
    let yoke = Yoke::taken(folder, config)?;
    let mut trainer = Trainer::of(model, optimizer);
    trainer.yoke = yoke;
    trainer.spikes = Guard::of(state.spikes.clone().unwrap_or_default());
    Ok((trainer, state))
}
