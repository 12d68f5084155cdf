//! The configuration of a run: one flat TOML file, `--set key=value` on top, everything resolved before any compute.

use std::path::{Path, PathBuf};

use dash_data::{Mixture, Settings, Source, Task};
use dash_model::{Attention, ModelConfig};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::compare::Compare;
use crate::failure::{Failure, Result};
use crate::probe::ProbePlan;
use crate::router::RouterPlan;

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
    /// Looks into the router's gradient.
    #[serde(default)]
    pub probe: ProbePlan,
    /// Schedules and budget of the router.
    #[serde(default)]
    pub router: RouterPlan,
    /// The model. Last, because its table of attention settings is.
    pub model: ModelConfig,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Folder of the run inside `dir`; empty: the name of the configuration file.
    #[serde(default)]
    pub name: String,
    /// Folder of all runs.
    #[serde(default = "runs")]
    pub dir: PathBuf,
    /// Updates.
    pub steps: u64,
    /// Decides initial weights and data order.
    #[serde(default)]
    pub seed: u64,
    /// `cpu`.
    #[serde(default = "cpu")]
    pub device: String,
    /// Worker threads, 0 for one per logical core. The result does not depend on it.
    #[serde(default)]
    pub threads: usize,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// `cargo` (this workspace's dependencies) or `text`.
    #[serde(default = "cargo")]
    pub source: Source,
    /// For `text`: a file or a folder of .txt, .md, .jsonl.
    #[serde(default)]
    pub path: PathBuf,
    /// A tokenizer.json to use; empty: learn one.
    #[serde(default)]
    pub tokenizer: PathBuf,
    /// Folder for prepared corpora.
    #[serde(default = "data")]
    pub cache: PathBuf,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Sequences of a forward pass.
    pub batch_size: usize,
    /// Forward passes of an update.
    #[serde(default = "one")]
    pub grad_accum: usize,
}

/// `[optim]`: AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Peak learning rate.
    pub lr: f64,
    /// Updates of linear warmup.
    #[serde(default)]
    pub warmup_steps: u64,
    /// What follows the warmup.
    #[serde(default)]
    pub schedule: Schedule,
    /// The schedule ends at `lr * min_lr_ratio`.
    #[serde(default = "tenth")]
    pub min_lr_ratio: f64,
    /// Share of the steps that `warmup-stable-decay` decays over.
    #[serde(default = "fifth")]
    pub decay_fraction: f64,
    /// Decay of matrices.
    #[serde(default = "tenth")]
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: no clipping.
    #[serde(default = "unit")]
    pub clip: f64,
    /// Decay of the first moment.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// Decay of the second moment.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[serde(default = "adam_eps")]
    pub eps: f64,
}

/// What the learning rate does after the warmup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Half a cosine down to `min_lr_ratio`.
    #[default]
    Cosine,
    /// Flat, then linear down over the last `decay_fraction`.
    WarmupStableDecay,
    /// Flat.
    Constant,
}

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Updates between validations; 0: only at the end.
    pub every: u64,
    /// Batches of a validation.
    pub batches: usize,
    /// Tokens of the text generated at each validation; 0: none.
    pub sample_tokens: usize,
    /// What that text continues.
    pub sample_prompt: String,
}

impl Default for Eval {
    fn default() -> Self {
        Eval { every: 100, batches: 8, sample_tokens: 48, sample_prompt: "/// Returns the ".into() }
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Updates between checkpoints; 0: only at the end.
    pub every: u64,
    /// Newest ones to keep.
    pub keep_last: usize,
    /// Ones with the lowest validation loss to keep besides.
    pub keep_best: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 100, keep_last: 2, keep_best: 1 }
    }
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Updates between train lines.
    pub every: u64,
    /// Also write TensorBoard event files.
    pub tensorboard: bool,
}

impl Default for Log {
    fn default() -> Self {
        Log { every: 10, tensorboard: true }
    }
}

fn runs() -> PathBuf {
    "runs".into()
}
fn data() -> PathBuf {
    "data".into()
}
fn cpu() -> String {
    "cpu".into()
}
fn cargo() -> Source {
    Source::Cargo
}
fn one() -> usize {
    1
}
fn tenth() -> f64 {
    0.1
}
fn fifth() -> f64 {
    0.2
}
fn unit() -> f64 {
    1.0
}
fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.95
}
fn adam_eps() -> f64 {
    1e-8
}

impl Config {
    /// Reads a file, applies `key=value` settings, fills in defaults and refuses what cannot run.
    ///
    /// # Errors
    /// [`Failure::Request`] that names file, key, what was expected and, for a misspelt key, the nearest one.
    pub fn load(path: &Path, set: &[String]) -> Result<Self> {
        let place = path.display();
        let text =
            std::fs::read_to_string(path).map_err(|e| Failure::request(format!("{place}: cannot be read: {e}")))?;
        let explain =
            |e: &toml::de::Error| Failure::request(format!("{place}: {}", with_suggestion(e.to_string().trim_end())));
        let mut table: Table = text.parse().map_err(|e| explain(&e))?;
        if set.is_empty() {
            // from the text, so that a message shows the line
            let config: Config = toml::from_str(&text).map_err(|e| explain(&e))?;
            return config.resolve(path, &place.to_string());
        }
        for assignment in set {
            apply(&mut table, assignment)?;
        }
        let where_ = format!("{place} with --set {}", set.join(" --set "));
        let config: Config = Value::Table(table).try_into().map_err(|e: toml::de::Error| {
            Failure::request(format!("{where_}: {}", with_suggestion(e.to_string().trim_end())))
        })?;
        config.resolve(path, &where_)
    }

    /// Reads the resolved configuration of a run folder.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn of_run(folder: &Path) -> Result<Self> {
        Config::load(&folder.join("config.toml"), &[])
    }

    fn resolve(mut self, path: &Path, place: &str) -> Result<Self> {
        self.model.resolve();
        if self.run.name.is_empty() {
            self.run.name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        }
        let wrong = |key: &str, what: String| Err(Failure::request(format!("{place}: {key}: {what}")));
        if let Err(e) = self.model.check() {
            return Err(Failure::request(format!("{place}: {e}")));
        }
        let positive = [
            ("run.steps", self.run.steps as usize),
            ("data.seq_len", self.data.seq_len),
            ("data.batch_size", self.data.batch_size),
            ("data.grad_accum", self.data.grad_accum),
            ("eval.batches", self.eval.batches),
            ("checkpoint.keep_last", self.checkpoint.keep_last),
            ("log.every", self.log.every as usize),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, n)| *n == 0) {
            return wrong(key, "is 0; it must be at least 1".into());
        }
        if self.run.name.is_empty() || self.run.name.contains(['/', '\\']) || self.run.name.starts_with('.') {
            return wrong("run.name", format!("{:?} is no folder name", self.run.name));
        }
        if self.run.device != "cpu" {
            return wrong("run.device", format!("{:?} is not available in this build; use \"cpu\"", self.run.device));
        }
        if self.data.vocab_size < 2 {
            return wrong("data.vocab_size", format!("{} is below 2", self.data.vocab_size));
        }
        if self.reads_text() && self.data.source == Source::Text && self.data.path.as_os_str().is_empty() {
            return wrong(
                "data.path",
                "is needed for data.source = \"text\": a file or a folder of .txt, .md or .jsonl".into(),
            );
        }
        let o = &self.optim;
        if !(o.lr > 0.0 && o.lr.is_finite()) {
            return wrong("optim.lr", format!("{} is not a positive number", o.lr));
        }
        let unit = [("optim.min_lr_ratio", o.min_lr_ratio), ("optim.decay_fraction", o.decay_fraction)];
        if let Some((key, x)) = unit.iter().find(|(_, x)| !(0.0..=1.0).contains(x)) {
            return wrong(key, format!("{x} is not between 0 and 1"));
        }
        if let Some((key, x)) =
            [("optim.beta1", o.beta1), ("optim.beta2", o.beta2)].iter().find(|(_, x)| !(0.0..1.0).contains(x))
        {
            return wrong(key, format!("{x} is not at least 0 and below 1"));
        }
        if let Some((key, x)) = [("optim.weight_decay", o.weight_decay), ("optim.clip", o.clip), ("optim.eps", o.eps)]
            .iter()
            .find(|(_, x)| !(*x >= 0.0))
        {
            return wrong(key, format!("{x} is negative"));
        }
        let chunks = self.model.attention.chunk_size().map(|s| self.data.seq_len.div_ceil(s));
        if let (Some(s), Some(1)) = (self.model.attention.chunk_size(), chunks) {
            let what = format!(
                "seq_len {} with chunk_size {s} leaves nothing to route: every query attends its own chunk only; use a chunk_size \
                 below {} or kind = \"dense\"",
                self.data.seq_len, self.data.seq_len
            );
            return wrong("model.attention.chunk_size", what);
        }
        if let (Some(top), Some(n)) = (self.model.attention.top(), chunks)
            && top > n
        {
            return wrong("model.attention.top", format!("{top} is above the {n} chunks of a sequence; use 1 to {n}"));
        }
        let of_task = self.task.as_ref().map(|task| {
            let lengths = task.eval_lengths.iter().chain([&self.data.seq_len]);
            lengths.map(|&t| task.check(t, self.data.vocab_size)).find(std::result::Result::is_err).unwrap_or(Ok(()))
        });
        if let Some(Err((key, what))) = of_task {
            return wrong(&format!("task.{key}"), what);
        }
        if let Err((key, what)) = self.router.check(&self.model.attention, self.data.seq_len) {
            return wrong(key, what);
        }
        Ok(self)
    }

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

    /// What the data crate has to prepare.
    pub fn data_settings(&self) -> Settings {
        let here = || std::env::current_dir().unwrap_or_else(|_| ".".into());
        Settings {
            source: self.data.source,
            path: if self.data.source == Source::Cargo { here() } else { self.data.path.clone() },
            vocab_size: self.data.vocab_size,
            tokenizer: (!self.data.tokenizer.as_os_str().is_empty()).then(|| self.data.tokenizer.clone()),
            cache: self.data.cache.clone(),
        }
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

    /// Keys in which two configurations differ, as `key: this, that`, and whether the difference can change the weights.
    pub fn differences(&self, other: &Config) -> Vec<(String, bool)> {
        let flat = |c: &Config| {
            let mut out = std::collections::BTreeMap::new();
            // through the text, so that settings are compiled for one serialiser
            flatten("", &Value::Table(c.to_toml().parse().expect("a configuration is TOML")), &mut out);
            out
        };
        let (mut a, mut b) = (flat(self), flat(other));
        a.retain(|k, _| !k.starts_with("compare"));
        b.retain(|k, _| !k.starts_with("compare"));
        let neutral = [
            "run.threads",
            "run.dir",
            "run.name",
            "data.cache",
            "log.",
            "eval.",
            "checkpoint.",
            "probe.",
            "model.recompute",
        ];
        let keys: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
        let text = |v: Option<&String>| v.map_or("nothing".to_string(), Clone::clone);
        keys.into_iter()
            .filter(|k| a.get(*k) != b.get(*k))
            .map(|k| {
                let matters = !neutral.iter().any(|n| k.starts_with(n));
                (format!("{k}: {} -> {}", text(a.get(k)), text(b.get(k))), matters)
            })
            .collect()
    }
}

fn flatten(prefix: &str, value: &Value, out: &mut std::collections::BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, out);
            }
        }
        other => {
            out.insert(prefix.to_string(), other.to_string());
        }
    }
}

/// Keys that hold text: `--set run.name=7` and `--set run.name=nan` mean what they say.
const TEXT_KEYS: [&str; 7] =
    ["run.name", "run.dir", "run.device", "data.path", "data.tokenizer", "data.cache", "eval.sample_prompt"];

/// Writes `a.b = value` into the table; another attention kind drops the knobs that it does not have. The value is read as TOML and, failing that or where the key holds text, as a
/// string.
fn apply(table: &mut Table, assignment: &str) -> Result<()> {
    let wrong = |what: &str| {
        Failure::request(format!("--set {assignment}: {what}; write --set key=value, for example --set optim.lr=1e-3"))
    };
    let (key, value) = assignment.split_once('=').ok_or_else(|| wrong("has no ="))?;
    let (key, value) = (key.trim(), value.trim());
    let parsed: Option<Table> = format!("x = {value}").parse().ok();
    let parsed = parsed.and_then(|mut t| t.remove("x")).filter(|v| v.is_str() || !TEXT_KEYS.contains(&key));
    let value = parsed.unwrap_or_else(|| Value::String(value.to_string()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().filter(|k| !k.is_empty()).ok_or_else(|| wrong("has no key"))?;
    let mut place = table;
    for part in parts {
        let next = place.entry(part).or_insert_with(|| Value::Table(Table::new()));
        place = next.as_table_mut().ok_or_else(|| wrong("names a table that is a value"))?;
    }
    if key == "model.attention.kind"
        && let Some(kind) = value.as_str()
    {
        // knobs of another kind in the file would be refused; what both kinds have stays
        place.retain(|knob, _| Attention::size_keys(kind).contains(&knob));
    }
    place.insert(last.to_string(), value);
    Ok(())
}

/// Adds the nearest expected key to serde's complaint about an unknown one.
fn with_suggestion(message: &str) -> String {
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>();
    let Some(at) = message.find("unknown field").or_else(|| message.find("unknown variant")) else {
        return message.to_string();
    };
    let names = quoted(&message[at..]);
    let Some((given, expected)) = names.split_first() else { return message.to_string() };
    let nearest =
        expected.iter().max_by(|a, b| strsim::jaro_winkler(given, a).total_cmp(&strsim::jaro_winkler(given, b)));
    match nearest {
        Some(key) if strsim::jaro_winkler(given, key) > 0.7 => format!("{message}; did you mean `{key}`?"),
        _ => message.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dash_core::ops::attention::RouterGradient;

    const MINIMAL: &str = "[run]\nsteps = 3\n[data]\nvocab_size = 300\nseq_len = 64\nbatch_size = 2\n\
        [optim]\nlr = 1e-3\n[model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n\
        [model.attention]\nkind = \"dash\"\nchunk_size = 8\n";

    fn load(text: &str, set: &[&str]) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    fn error(text: &str, set: &[&str]) -> String {
        match load(text, set) {
            Err(Failure::Request(e)) => e.to_string(),
            other => panic!("expected a wrong request, got {other:?}"),
        }
    }

    #[test]
    fn what_is_written_out_reads_back_equal() {
        let config = load(MINIMAL, &["optim.lr=3e-4", "run.name=b", "model.attention.gamma=2.0"]).unwrap();
        assert_eq!((config.optim.lr, config.run.name.as_str(), config.model.head_dim), (3e-4, "b", 8));
        assert_eq!(load(&config.to_toml(), &[]).unwrap(), config);
        let dense = load(MINIMAL, &["model.attention.kind=dense"]).unwrap();
        assert_eq!(dense.model.attention, Attention::Dense);
        let stopped = load(MINIMAL, &["model.attention.sigma=2.0", "model.attention.kind=dash-stopped"]).unwrap();
        let Attention::Dash(d) = stopped.model.attention else { panic!() };
        assert_eq!((d.chunk_size, d.sigma, d.router_gradient), (8, 1.0, RouterGradient::Stopped));
        assert_eq!(load(MINIMAL, &["run.name=nan"]).unwrap().run.name, "nan");
        assert_eq!(load(MINIMAL, &["run.name=\"7\""]).unwrap().run.name, "7");
    }

    #[test]
    fn bad_requests_are_told() {
        let swap = |a: &str, b: &str| MINIMAL.replace(a, b);
        assert!(error(&swap("steps = 3", "stpes = 3"), &[]).contains("did you mean `steps`?"));
        assert!(error(&swap("chunk_size = 8", "chunksize = 8"), &[]).contains("did you mean `chunk_size`?"));
        assert!(error(MINIMAL, &["optim.learning=1"]).contains("unknown field `learning`"));
        assert!(error(&swap("steps = 3", "steps = \"x\""), &[]).contains("invalid type: string \"x\", expected u64"));
        assert!(
            error(&swap("heads = 2", "heads = 3"), &["model.head_dim=8", "model.kv_heads=2"])
                .contains("model.kv_heads: 2 does not divide heads = 3")
        );
        assert!(error(MINIMAL, &["model.head_dim=7"]).contains("model.head_dim: 7 is odd"));
        assert!(
            error(MINIMAL, &["model.attention.chunk_size=64"])
                .contains("seq_len 64 with chunk_size 64 leaves nothing to route")
        );
        assert!(error(MINIMAL, &["model.attention.alpha=2.5"]).contains("model.attention.alpha: 2.5 is not above 1"));
        assert!(
            error(MINIMAL, &["model.attention={kind=\"topk\",chunk_size=8,top=9}"]).contains("9 is above the 8 chunks")
        );
        assert!(error(MINIMAL, &["data.source=text"]).contains("data.path: is needed"));
        assert!(error(MINIMAL, &["nonsense"]).contains("has no ="));
        assert!(error(MINIMAL, &["run.device=cuda"]).contains("not available in this build"));
    }

    #[test]
    fn differences_name_keys_and_whether_they_matter() {
        let a = load(MINIMAL, &[]).unwrap();
        let b = load(MINIMAL, &["optim.lr=2e-3", "run.threads=2"]).unwrap();
        assert_eq!(
            a.differences(&b),
            [("optim.lr: 0.001 -> 0.002".into(), true), ("run.threads: 0 -> 2".into(), false)]
        );
    }
}
