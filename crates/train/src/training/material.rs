//! What a run reads and what it runs on.

use std::sync::Arc;
use std::time::Duration;

use dash_core::Device;
use dash_data::{Loader, LoaderState, Prepared, Progress, Shard, Tokenizer, prepare};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::eval::ValidationSet;
use crate::config::Config;
use crate::console::tell;
use crate::failure::{Failure, Result};

/// Prepares the corpus of a configuration, telling on standard error where it stands.
///
/// # Errors
/// As [`dash_data::prepare`].
pub fn prepared(config: &Config) -> Result<Prepared> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("a valid template"));
    let mut told = String::new();
    let prepared = prepare(&config.data_settings(), |p| {
        let message = match p {
            Progress::Reading => "reading the corpus".to_string(),
            Progress::Training(bytes) => {
                format!("learning a vocabulary of {} from {:.1} MB", config.data.vocab_size, bytes as f64 / 1e6)
            }
            Progress::Encoding(done, all) => {
                bar.set_message(format!("encoding {:.1} of {:.1} MB", done as f64 / 1e6, all as f64 / 1e6));
                "encoding".into()
            }
            Progress::Verifying => "checking the shards".into(),
        };
        if message != told {
            if bar.is_hidden() {
                tell!("{message}");
            }
            told = message.clone();
            bar.set_message(message);
            bar.enable_steady_tick(Duration::from_millis(200));
        }
    });
    bar.finish_and_clear();
    Ok(prepared?)
}

/// The device of a configuration.
///
/// # Errors
/// When the operating system refuses the threads that `run.threads` asks for.
pub fn device(config: &Config) -> Result<Device> {
    Device::cpu(config.run.threads).map_err(|e| Failure::request(format!("run.threads = {}: {e}", config.run.threads)))
}

/// What a run reads: text, a task, or both.
pub struct Material {
    /// Training shards; none where the task is alone.
    pub train: Vec<Arc<Shard>>,
    /// Validation shards.
    pub validation: Vec<Arc<Shard>>,
    /// The text's tokenizer.
    pub tokenizer: Option<Tokenizer>,
    /// What identifies it, for resuming and for pairing runs.
    pub hash: String,
}

impl Material {
    /// Prepares the text of a configuration, where it reads any.
    ///
    /// # Errors
    /// As [`prepared`], or when the tokenizer has another size than the configuration.
    pub fn of(config: &Config) -> Result<Self> {
        let task = config.task.as_ref().map(|t| serde_json::to_string(t).expect("a task is JSON"));
        let task = task.map(|t| format!("task-{:016x}", xxhash_rust::xxh3::xxh3_64(t.as_bytes())));
        if !config.reads_text() {
            let hash = task.unwrap_or_default();
            return Ok(Material { train: Vec::new(), validation: Vec::new(), tokenizer: None, hash });
        }
        let p = prepared(config)?;
        if p.tokenizer.vocab_size() != config.data.vocab_size {
            let (have, asked) = (p.tokenizer.vocab_size(), config.data.vocab_size);
            return Err(Failure::request(format!(
                "data.vocab_size: {asked}, but the tokenizer has {have} entries; set it to {have}"
            )));
        }
        let text = p.folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let hash = task.map_or(text.clone(), |task| format!("{text}+{task}"));
        Ok(Material { train: p.train, validation: p.validation, tokenizer: Some(p.tokenizer), hash })
    }

    /// Training batches from `state` on.
    ///
    /// # Errors
    /// When the text holds no window.
    pub fn loader(&self, config: &Config, state: LoaderState) -> Result<Loader> {
        let d = &config.data;
        Ok(match config.mixture() {
            Some(mixture) => Loader::with_task(&self.train, mixture, d.batch_size, config.run.seed, state)?,
            None => Loader::new(&self.train, d.seq_len, d.batch_size, config.run.seed, state)?,
        })
    }

    /// What validations look at.
    ///
    /// # Errors
    /// When the text holds no window.
    pub fn validation(&self, config: &Config) -> Result<ValidationSet> {
        ValidationSet::new(config, &self.validation, self.tokenizer.as_ref())
    }
}
