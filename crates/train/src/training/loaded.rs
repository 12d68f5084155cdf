//! A trained model from its folder: of a run, a checkpoint or an export of ours, or one of Hugging Face.

use std::path::{Path, PathBuf};

use dash_data::Tokenizer;
use dash_model::{Described, Model};
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

/// Tokens that a model of Hugging Face reads at once at most, if nobody says how many: some are made for more than fit into memory.
const WINDOW: usize = 2048;

/// Puts data, evaluation settings, device and threads of another configuration, and then another device, in the place of a model's own.
fn replace(config: &mut Config, data: Option<&Config>, device: Option<&str>) {
    if let Some(data) = data {
        (config.data, config.eval, config.run.threads) = (data.data.clone(), data.eval.clone(), data.run.threads);
        config.task = data.task.clone();
        config.run.device.clone_from(&data.run.device);
    }
    if let Some(device) = device {
        config.run.device = device.into();
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
    /// Whether a run of ours trained it, so that there is a validation text of its own.
    pub own: bool,
    /// Its tokenizer; none where it was trained on a task or on token ids alone.
    pub tokenizer: Option<Tokenizer>,
    /// The model.
    pub model: Model,
}

impl Loaded {
    /// Opens an exported folder, a checkpoint, a run or a model of Hugging Face; `data` replaces its data, evaluation settings, device and threads, and
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
        if path.join("config.json").is_file() && !path.join("config.toml").exists() {
            return Loaded::of_others(path, data, device);
        }
        let folder = model_folder(path).map_err(Failure::Request)?;
        // an exported folder has its files beside the weights, a checkpoint two levels up
        let home = [folder.clone(), folder.join("../..")].into_iter().find(|p| p.join("config.toml").is_file());
        let home = home
            .ok_or_else(|| Failure::request(format!("{}: no config.toml belongs to this model", folder.display())))?;
        let mut config = Config::of_run(&home)?;
        replace(&mut config, data, device);
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
        Ok(Loaded { folder, home, given: data.is_some(), config, trained, starts, own: true, tokenizer, model })
    }

    /// A model of Hugging Face that this decoder computes. It brings no text to validate on, and reads as many tokens at once as it was made for, but at most
    /// [`WINDOW`] where nobody says how many.
    fn of_others(folder: &Path, data: Option<&Config>, device: Option<&str>) -> Result<Self> {
        let mut described = Described::of(folder).map_err(Failure::request)?;
        let path = folder.join("tokenizer.json");
        let text = |path: &Path| toml::Value::String(path.to_string_lossy().into_owned()).to_string();
        let (source, window) = (if path.is_file() { "text" } else { "tokens" }, described.positions.min(WINDOW));
        let file = format!(
            "run.steps = 1\noptim.lr = 1e-3\ninit.from = {from}\nmodel.attention.kind = \"dense\"\n[data]\nsource = {source:?}\npath = {from}\nseq_len \
             = {window}\nbatch_size = 1\n",
            from = text(folder)
        );
        let mut config = Config::from_text(&file, &[], folder)?;
        replace(&mut config, data, device);
        let tokenizer = path.is_file().then(|| Tokenizer::load(&path, config.treatment())).transpose()?;
        let (asked, have) = (config.data.vocab_size, described.vocab);
        if asked != have {
            let folder = folder.display();
            return Err(Failure::request(format!(
                "data.vocab_size: {asked}, but {folder} has {have}; set it to {have}"
            )));
        }
        if let Some(entries) = tokenizer.as_ref().map(Tokenizer::vocab_size).filter(|n| *n > have) {
            let what =
                format!("has {entries} entries, the model beside it has {have} rows; give the tokenizer of that model");
            return Err(Failure::request(format!("{}: {what}", path.display())));
        }
        let (made_for, read) = (described.positions, config.positions());
        if read > made_for {
            tell!("warning: {} was made for {made_for} tokens, this evaluation reads {read}", folder.display());
        }
        described.positions = made_for.max(read);
        let model = described.load(folder, &open_device(&config)?).map_err(Failure::request)?;
        config.model = model.config().clone();
        let (folder, home) = (folder.to_path_buf(), folder.to_path_buf());
        let (given, trained, starts) = (data.is_some(), None, Vec::new());
        Ok(Loaded { folder, home, given, config, trained, starts, own: false, tokenizer, model })
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
