//! Validation: loss, perplexity, bits per byte, loss by position, density.

use std::path::Path;
use std::sync::Arc;

use dash_data::{Batch, Layout, Loader, Shard, Side};
use dash_model::{Model, RouterStats, RouterTrace};
use serde::{Deserialize, Serialize};

use super::far::{FarLoss, FarSet};
use super::lengths::Lengths;
use super::standard_error::standard_error;
use super::tasks::{LengthResult, RouterChoice, TaskSet};
use super::trainer::batch_ids;
use crate::config::{Config, Far, on_the_hub};
use crate::console::tell;
use crate::failure::Result;
use crate::peers::Peers;

/// What a validation found.
#[derive(Debug, Clone)]
pub struct Validation {
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Its standard error as an estimate for all text or questions of this kind, over sequences.
    pub loss_error: Option<f64>,
    /// The same per byte of the original text, in bits: comparable between tokenizers. Tokens that begin or end a document count in the
    /// numerator and have no bytes. `None` where there is no text, or shards of an old format do not know its bytes.
    pub bits_per_byte: Option<f64>,
    /// Of targets that only far tokens predict, where that is asked for and the text has such targets.
    pub far: Option<FarLoss>,
    /// A task's results, by length; `loss` is the text's where there is text, else the answers' at the training length.
    pub task: Vec<LengthResult>,
    /// Mean keys that a query attends, see [`dash_model::Attention::attended`].
    pub attended: f64,
    /// Tokens looked at.
    pub tokens: usize,
    /// Attended over visible chunks, averaged over layers, kv heads and queries with an earlier chunk; 1 if dense.
    pub density: f64,
    /// Mean cross-entropy by position in the sequence.
    pub by_position: Vec<f64>,
    /// Density by layer; empty if dense.
    pub layers: Vec<f64>,
}

/// What a model makes of a batch of text.
#[derive(Serialize, Deserialize)]
struct Figures {
    /// Of each target, in nats.
    nll: Vec<f64>,
    /// By layer; none where nothing routes.
    routers: Vec<Option<RouterStats>>,
}

impl Figures {
    fn of(model: &Model, router: RouterChoice, batch: &Batch) -> Result<Self> {
        let (ids, targets) = batch_ids(model, batch)?;
        let (nll, traces) = model.nll((&ids, &targets), router.of(&[]).as_ref())?;
        let stats = |trace: &Option<RouterTrace>| trace.as_ref().map(RouterTrace::stats).transpose();
        Ok(Figures { nll: nll.to_f64()?, routers: traces.iter().map(stats).collect::<dash_core::Result<_>>()? })
    }
}

/// Batches and byte counts, read once.
pub struct ValidationSet {
    seq_len: usize,
    /// whether a sequence is seen whole, and not document by document
    whole: bool,
    batches: Vec<Batch>,
    /// bytes of text behind all targets
    bytes: Option<u64>,
    task: Option<TaskSet>,
    far: Option<FarSet>,
}

impl Validation {
    /// For people.
    pub fn summary(&self) -> String {
        let bits = self.bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits per byte"));
        let text = (!self.by_position.is_empty()).then(|| format!("perplexity {:.2}{bits}", self.loss.exp()));
        let task = self.task.iter().map(|r| {
            let share = r.score.right as f64 / r.score.asked.max(1) as f64;
            format!("accuracy {share:.3} at length {}", r.length)
        });
        text.into_iter().chain(task).collect::<Vec<_>>().join(", ")
    }
}

/// How a configuration cuts a text into sequences.
pub fn layout(config: &Config, end: Side) -> Layout {
    let d = &config.data;
    Layout { seq_len: d.seq_len, packing: d.packing, marks_documents: d.document_mask, end }
}

impl ValidationSet {
    /// Evenly spaced windows of the text, whose documents end with a token on side `end`, and fixed sequences of the task, whichever there is.
    ///
    /// # Errors
    /// When the shards hold no window.
    pub fn new(config: &Config, shards: &[Arc<Shard>], end: Side) -> Result<Self> {
        let d = &config.data;
        let text = (!shards.is_empty())
            .then(|| Loader::validation(shards, layout(config, end), d.batch_size, config.eval.batches));
        let (batches, bytes) = text.transpose()?.map_or((Vec::new(), None), |text| (text.batches, text.bytes));
        let task = config.task.as_ref().map(|task| TaskSet::new(task, config));
        Ok(ValidationSet { seq_len: d.seq_len, whole: !d.document_mask, batches, bytes, task, far: None })
    }

    /// The same, which also tells the loss of far and rare targets; `train` is the text that tells what is rare.
    pub fn looking_far(self, rule: Far, train: &[Arc<Shard>]) -> Self {
        let far = FarSet::of(rule, self.seq_len, &self.batches, train);
        ValidationSet { far: Some(far), ..self }
    }

    /// The first batch: ids and number of sequences.
    pub fn first(&self) -> (&Arc<[u32]>, usize) {
        let batch = self.first_batch();
        (&batch.inputs, batch.batch)
    }

    /// The first batch, the task's where there is one.
    pub fn first_batch(&self) -> &Batch {
        let task = self.task.as_ref().and_then(|t| t.batches(self.seq_len).first());
        task.or(self.batches.first()).expect("a validation set holds text or a task")
    }

    /// All sequences that are seen whole by their length, ascending: where documents do not see each other, a position in a sequence says little of
    /// what is seen there.
    pub fn by_length(&self) -> Vec<(usize, Vec<&Batch>)> {
        let mut all: Vec<(usize, Vec<&Batch>)> =
            self.task.iter().flat_map(TaskSet::by_length).map(|(t, batches)| (t, batches.iter().collect())).collect();
        if self.whole && !self.batches.is_empty() {
            match all.iter_mut().find(|(t, _)| *t == self.seq_len) {
                Some((_, batches)) => batches.extend(&self.batches),
                None => all.push((self.seq_len, self.batches.iter().collect())),
            }
        }
        all.sort_by_key(|(t, _)| *t);
        all
    }

    /// Evaluates a model.
    ///
    /// # Errors
    /// When a token is not below the model's vocabulary.
    pub fn run(&self, model: &Model, router: RouterChoice) -> Result<Validation> {
        self.run_among(model, router, &Peers::Alone)
    }

    /// As [`ValidationSet::run`], with the batches of text shared out among processes that all have the model; all get the result, which has
    /// the bits of one process. Each evaluates a task's sequences, which are few.
    ///
    /// # Errors
    /// Those of [`ValidationSet::run`], and when another process does not answer.
    pub fn run_among(&self, model: &Model, router: RouterChoice, peers: &Peers) -> Result<Validation> {
        let task = self.task.as_ref().map(|t| t.run(model, router)).transpose()?.unwrap_or_default();
        if self.batches.is_empty() {
            let own = task.iter().find(|r| r.length == self.seq_len).expect("the training length is evaluated");
            return Ok(Validation {
                loss: own.loss,
                loss_error: own.loss_error,
                bits_per_byte: None,
                far: None,
                tokens: own.score.asked,
                density: own.density,
                attended: model.config().attention.attended(self.seq_len, own.listed),
                by_position: Vec::new(),
                layers: own.layers.clone(),
                task,
            });
        }
        let seq_len = self.seq_len;
        // tokens in the attended chunks, of a sequence each: the last batch may be smaller
        let (mut listed, mut routed) = (0.0, 0usize);
        let (mut sum, mut tokens, mut sequences) = (0.0, 0usize, Vec::new());
        let mut by_position = vec![0.0; seq_len];
        let (mut layers, mut rows) = (vec![0.0; model.config().layers], 0u64);
        let mut far = self.far.as_ref().map(FarSet::sums);
        let own = &self.batches[peers.block(self.batches.len())];
        let own = own.iter().map(|batch| Figures::of(model, router, batch)).collect::<Result<Vec<_>>>()?;
        for (number, (b, Figures { nll, routers })) in self.batches.iter().zip(peers.concat(own)?).enumerate() {
            sequences.extend(nll.chunks_exact(seq_len).map(|nll| (nll.iter().sum::<f64>(), seq_len as f64)));
            far.iter_mut().for_each(|far| far.add(number, &nll));
            sum += nll.iter().sum::<f64>();
            tokens += nll.len();
            for (i, x) in nll.iter().enumerate() {
                by_position[i % seq_len] += x;
            }
            for (layer, stats) in routers.iter().enumerate().filter_map(|(i, s)| Some((i, s.as_ref()?))) {
                layers[layer] += stats.density * stats.rows as f64;
                listed += stats.tokens * b.batch as f64;
                routed += b.batch;
                rows += if layer == 0 { stats.rows } else { 0 };
            }
        }
        by_position.iter_mut().for_each(|x| *x /= sequences.len() as f64);
        layers.iter_mut().for_each(|x| *x /= rows.max(1) as f64);
        let density = if rows == 0 { 1.0 } else { layers.iter().sum::<f64>() / layers.len() as f64 };
        Ok(Validation {
            loss: sum / tokens as f64,
            loss_error: standard_error(&sequences),
            bits_per_byte: self.bytes.filter(|&n| n > 0).map(|n| sum / std::f64::consts::LN_2 / n as f64),
            far: far.and_then(|far| far.finish()),
            task,
            attended: Lengths::of(&self.batches).attended(&model.config().attention, listed / routed.max(1) as f64),
            tokens,
            density,
            by_position,
            layers: if rows == 0 { Vec::new() } else { layers },
        })
    }
}

/// Loss of the best prediction without context: the entropy of the validation targets under the training frequencies.
pub fn unigram_loss(train: &[Arc<Shard>], set: &ValidationSet, vocab: usize) -> f64 {
    let mut counts = vec![1.0f64; vocab];
    for shard in train {
        shard.pieces(0, |ids| ids.iter().for_each(|&id| counts[id as usize] += 1.0));
    }
    let total: f64 = counts.iter().sum();
    let (mut sum, mut n) = (0.0, 0usize);
    for b in &set.batches {
        sum -= b.targets.iter().map(|&t| (counts[t as usize] / total).ln()).sum::<f64>();
        n += b.targets.len();
    }
    sum / n as f64
}

/// The folder that holds a model's files: an exported folder, a checkpoint, or the newest whole checkpoint of a run.
///
/// # Errors
/// When it is none of the three.
pub fn model_folder(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    // a folder with checkpoints is a run, whatever else lies in it
    if path.join("model.safetensors").is_file() && !path.join("checkpoints").is_dir() {
        return Ok(path.to_path_buf());
    }
    let (newest, damaged) = super::checkpoint::Checkpoints::of(path).newest()?;
    damaged.iter().for_each(|d| tell!("warning: {d}; trying the one before"));
    newest.ok_or_else(|| match damaged.len() {
        0 => anyhow::anyhow!(
            "{}: {}; expected an exported folder, a checkpoint folder, a run folder, or that of a model of Hugging Face{}",
            path.display(),
            if path.exists() { "holds no model" } else { "is no folder here" },
            on_the_hub(path)
        ),
        n => anyhow::anyhow!("{}: none of its {n} checkpoints is whole", path.display()),
    })
}

#[cfg(test)]
mod tests;
