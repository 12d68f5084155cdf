//! A whole configuration file, and what follows from several of its tables.

use std::path::PathBuf;

use dash_data::{Mixture, Settings, Source, Task, Treatment};
use dash_model::ModelConfig;
use serde::{Deserialize, Serialize};

use super::compare::Compare;
use super::data::Data;
use super::eval::{Checkpoint, Eval, Log};
use super::init::Init;
use super::optim::Optim;
use super::probe::ProbePlan;
use super::router::RouterPlan;
use super::run::Run;

/// Everything that defines a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The run itself.
    pub run: Run,
    /// What it trains on.
    pub data: Data,
    /// The optimiser.
    pub optim: Optim,
    /// Validation.
    #[serde(default)]
    pub eval: Eval,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// Logs.
    #[serde(default)]
    pub log: Log,
    /// What `compare` compares; no part of a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compare: Option<Compare>,
    /// A task with a known answer, instead of the text or mixed into it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// The model that it starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// Looks into the router's gradient.
    #[serde(default)]
    pub probe: ProbePlan,
    /// Schedules and budget of the router.
    #[serde(default)]
    pub router: RouterPlan,
    /// The model. Last, because its table of attention settings is.
    pub model: ModelConfig,
}

impl Config {
    /// Whether any training sequence is text.
    pub fn reads_text(&self) -> bool {
        self.task.as_ref().is_none_or(|task| task.share < 1.0)
    }

    /// The task for a loader.
    pub fn mixture(&self) -> Option<Mixture> {
        let task = self.task.clone()?;
        Some(Mixture { task, seq_len: self.data.seq_len, vocab: self.data.vocab_size })
    }

    /// The longest sequence that is trained on or evaluated.
    pub fn positions(&self) -> usize {
        let longer = self.task.iter().flat_map(|t| &t.eval_lengths).copied();
        longer.chain([self.data.seq_len]).max().unwrap_or(0)
    }

    /// Whether what it trains on comes with a tokenizer: a task has none, token ids have the one that is given.
    pub fn has_tokenizer(&self) -> bool {
        let given = !self.data.tokenizer.as_os_str().is_empty();
        self.reads_text() && (given || self.data.source != Source::Tokens)
    }

    /// What the data crate has to prepare.
    pub fn data_settings(&self) -> Settings {
        let here = || std::env::current_dir().unwrap_or_else(|_| ".".into());
        Settings {
            source: self.data.source,
            path: if self.data.path.as_os_str().is_empty() { here() } else { self.data.path.clone() },
            extensions: self.data.extensions.clone(),
            field: self.data.field.clone(),
            vocab_size: self.data.vocab_size,
            vocab_bytes: self.data.vocab_bytes,
            end_of_text: self.data.end_of_text,
            treatment: self.treatment(),
            validation: self.data.validation,
            validation_share: self.data.validation_share,
            validation_tokens: self.data.validation_tokens,
            max_tokens: self.data.max_tokens,
            tokenizer: (!self.data.tokenizer.as_os_str().is_empty()).then(|| self.data.tokenizer.clone()),
            padded: self.init.is_some(),
            cache: self.data.cache.clone(),
        }
    }

    /// How the tokenizer is used.
    pub fn treatment(&self) -> Treatment {
        Treatment { bos: self.data.bos, special_tokens: self.data.special_tokens }
    }

    /// Whether a tokenizer of `have` entries is one of the model's. A model that was padded has more rows than its tokenizer has entries.
    pub fn fits_tokenizer(&self, have: usize) -> bool {
        have == self.data.vocab_size || have < self.data.vocab_size && self.init.is_some()
    }

    /// `<run.dir>/<run.name>`
    pub fn folder(&self) -> PathBuf {
        self.run.dir.join(&self.run.name)
    }

    /// Tokens of an update.
    pub fn tokens_per_step(&self) -> usize {
        self.data.seq_len * self.data.batch_size * self.data.grad_accum
    }

    /// As TOML, every default written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a configuration is TOML")
    }
}
