//! A trained model from its folder.

use std::path::{Path, PathBuf};

use dash_data::Tokenizer;
use dash_model::Model;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checkpoint::{self, Checkpoints};
use super::device::device as open_device;
use super::eval::model_folder;
use super::places::{Found, found};
use super::provenance;
use crate::config::Config;
use crate::console::tell;
use crate::failure::{Failure, Result};

/// What a model's training was, as a checkpoint tells it and an exported folder repeats it (`dashlab.trained` in config.json).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// Updates made.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Folder name of the prepared corpus: the hash of its content and settings.
    pub data_hash: String,
    /// Validation loss of these weights in nats, where one was taken.
    pub validation_loss: Option<f64>,
    /// The program that made the checkpoint.
    pub build: String,
}

impl Trained {
    /// Of a checkpoint or an exported folder.
    fn of(folder: &Path) -> Option<Self> {
        if let Ok(s) = checkpoint::read_state(folder) {
            let (data_hash, validation_loss) = (s.data_hash, s.validation_loss);
            return Some(Trained { step: s.step, tokens: s.tokens, data_hash, validation_loss, build: s.build });
        }
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).ok()?).ok()?;
        serde_json::from_value(config["dashlab"]["trained"].clone()).ok()
    }
}

/// A model with the configuration and tokenizer that belong to it.
pub struct Loaded {
    /// Where its weights are.
    pub folder: PathBuf,
    /// The folder of the run or the export that it belongs to.
    home: PathBuf,
    /// Whether its data are those of a configuration that was given, whose paths are meant from here.
    given: bool,
    /// Its configuration.
    pub config: Config,
    /// What its training was; none in a folder that an earlier build exported.
    pub trained: Option<Trained>,
    /// What trained it, as its run folder has it; empty for an exported folder and a run of an early build.
    pub starts: Vec<provenance::Start>,
    /// Its tokenizer; none where it was trained on a task or on token ids alone.
    pub tokenizer: Option<Tokenizer>,
    /// The model.
    pub model: Model,
}

impl Loaded {
    /// Opens an exported folder, a checkpoint or a run; `data` replaces its data, evaluation settings, device and threads, and
    /// `device` the device.
    ///
    /// # Errors
    /// When a file is missing or does not fit.
    pub fn open(path: &Path, data: Option<&Config>, device: Option<&str>) -> Result<Self> {
        let checkpoints = Checkpoints::of(path);
        loop {
            let before = checkpoints.list();
            let loaded = Loaded::newest(path, data, device);
            // a run that trains makes room for newer checkpoints: those of a moment ago may be gone
            if loaded.is_ok() || checkpoints.list() == before {
                return loaded;
            }
        }
    }

    fn newest(path: &Path, data: Option<&Config>, device: Option<&str>) -> Result<Self> {
        let folder = model_folder(path).map_err(Failure::Request)?;
        // an exported folder has its files beside the weights, a checkpoint two levels up
        let home = [folder.clone(), folder.join("../..")].into_iter().find(|p| p.join("config.toml").is_file());
        let home = home
            .ok_or_else(|| Failure::request(format!("{}: no config.toml belongs to this model", folder.display())))?;
        let mut config = Config::of_run(&home)?;
        if let Some(data) = data {
            (config.data, config.eval, config.run.threads) = (data.data.clone(), data.eval.clone(), data.run.threads);
            config.task = data.task.clone();
            config.run.device.clone_from(&data.run.device);
        }
        if let Some(device) = device {
            config.run.device = device.into();
        }
        let starts = provenance::read(&home).unwrap_or_else(|e| {
            tell!("warning: {e:#}");
            Vec::new()
        });
        let path = home.join("tokenizer.json");
        let tokenizer = path.is_file().then(|| Tokenizer::load(&path, config.treatment())).transpose()?;
        if tokenizer.is_none() && config.has_tokenizer() {
            let what = "is missing: the model was trained on text; restore it, or resume its run, which writes it anew";
            return Err(Failure::request(format!("{}: {what}", path.display())));
        }
        if tokenizer.as_ref().is_some_and(|t| !provenance::trained_with(&starts, t)) {
            let what = "is not the tokenizer that the model was trained with; restore it, or resume its run, which writes it anew";
            return Err(Failure::request(format!("{}: {what}", path.display())));
        }
        if let Some(have) = tokenizer.as_ref().map(Tokenizer::vocab_size).filter(|n| !config.fits_tokenizer(*n)) {
            let asked = config.data.vocab_size;
            return Err(Failure::request(format!(
                "data.vocab_size: {asked}, but the model's tokenizer has {have} entries"
            )));
        }
        let model = checkpoint::load_model(&folder, &config, &open_device(&config)?).map_err(Failure::Request)?;
        // the values that training ended with, where a schedule or a controller moved them
        config.model = model.config().clone();
        let trained = Trained::of(&folder);
        Ok(Loaded { folder, home, given: data.is_some(), config, trained, starts, tokenizer, model })
    }

    /// Where its data are, wherever this process was started.
    pub fn places(&self) -> Found {
        if self.given {
            return Found { config: self.config.clone(), looked: String::new() };
        }
        found(&self.config, &self.home, &self.starts, self.data_hash())
    }

    /// What it was trained on, where that is known.
    pub fn data_hash(&self) -> Option<&str> {
        self.trained.as_ref().map(|t| t.data_hash.as_str())
    }
}
