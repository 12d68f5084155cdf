//! A trained model from its folder.

use std::path::{Path, PathBuf};

use dash_data::Tokenizer;
use dash_model::Model;

use super::checkpoint;
use super::device::device as open_device;
use super::eval::model_folder;
use super::provenance;
use crate::config::Config;
use crate::console::tell;
use crate::failure::{Failure, Result};

/// A model with the configuration and tokenizer that belong to it.
pub struct Loaded {
    /// Where its weights are.
    pub folder: PathBuf,
    /// Its configuration.
    pub config: Config,
    /// What it was trained on, as its checkpoint names it; an exported folder does not know.
    pub data_hash: Option<String>,
    /// What trained it, as its run folder has it; empty for an exported folder and a run of an early build.
    pub starts: Vec<provenance::Start>,
    /// Its tokenizer; none where it was trained on a task.
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
        if let Some(have) = tokenizer.as_ref().map(Tokenizer::vocab_size).filter(|n| *n != config.data.vocab_size) {
            let asked = config.data.vocab_size;
            return Err(Failure::request(format!(
                "data.vocab_size: {asked}, but the model's tokenizer has {have} entries"
            )));
        }
        let model = checkpoint::load_model(&folder, &config, &open_device(&config)?).map_err(Failure::Request)?;
        let data_hash = checkpoint::read_state(&folder).ok().map(|state| state.data_hash);
        Ok(Loaded { folder, config, data_hash, starts, tokenizer, model })
    }
}
