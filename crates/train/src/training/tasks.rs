//! Evaluation of a task: accuracy, and whose fault a wrong answer is.

use std::collections::BTreeMap;

use dash_core::ops::attention::HostRoutes;
use dash_data::{Batch, Question, Shortcut, Task};
use dash_model::attention::Reroute;
use dash_model::{Attention, Model, RouterTrace};
use serde_json::{Value, json};

use super::spent::{Spent, Tally};
use super::standard_error::standard_error;
use crate::config::Config;
use crate::failure::Result;

/// Who chooses the chunks in an evaluation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum RouterChoice {
    /// The model's own router
    #[default]
    Own,
    /// As many chunks as its own router chose, drawn at random
    Random,
    /// The chunk that holds the answer, where something is asked (tasks only)
    Oracle,
}

impl RouterChoice {
    /// For a batch that asks these questions.
    pub fn of(self, questions: &[Question]) -> Option<Reroute> {
        match self {
            RouterChoice::Own => None,
            RouterChoice::Random => Some(Reroute::Random(1)),
            RouterChoice::Oracle => {
                Some(Reroute::Oracle(questions.iter().map(|q| (q.sequence, q.at, q.evidence)).collect()))
            }
        }
    }
}

/// Counts over some questions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Score {
    /// Questions.
    pub asked: usize,
    /// Right answers: the most likely token is the answer.
    pub right: usize,
    /// Wrong answers where no layer's router chose the chunk that holds the answer for the asking query: the router missed.
    pub missed: usize,
    /// Wrong answers where some layer attended that chunk: the reader missed. asked = right + missed + misread.
    pub misread: usize,
    /// Questions, right or wrong, for which no layer attended that chunk.
    pub unseen: usize,
}

impl Score {
    fn add(&mut self, right: bool, seen: bool) {
        self.asked += 1;
        self.right += right as usize;
        self.missed += (!right && !seen) as usize;
        self.misread += (!right && seen) as usize;
        self.unseen += !seen as usize;
    }

    /// Right answers over questions.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.asked.max(1) as f64
    }

    fn json(&self) -> Value {
        let share = |n: usize| n as f64 / self.asked.max(1) as f64;
        json!({
            "asked": self.asked, "accuracy": self.accuracy(), "router_missed": share(self.missed),
            "reader_missed": share(self.misread), "unseen": share(self.unseen),
        })
    }
}

/// A task at one length.
#[derive(Debug, Clone)]
pub struct LengthResult {
    /// Tokens of a sequence.
    pub length: usize,
    /// Mean cross-entropy of the answers, in nats.
    pub loss: f64,
    /// Its standard error, over sequences.
    pub loss_error: Option<f64>,
    /// All questions.
    pub score: Score,
    /// By distance from the question to its evidence: key is the power of two that the distance is below.
    pub by_distance: BTreeMap<usize, Score>,
    /// By the number of the question in its sequence.
    pub by_question: Vec<Score>,
    /// What a model reaches that never matches a key.
    pub shortcut: Shortcut,
    /// What each routed layer attends, and where; empty if dense.
    pub spent: Vec<Spent>,
    /// Attended chunks / visible chunks; 1 if dense.
    pub density: f64,
    /// The same by layer; empty if dense.
    pub layers: Vec<f64>,
    /// Mean tokens in the attended chunks of a query; 0 if dense.
    pub listed: f64,
}

impl LengthResult {
    /// For metrics.jsonl and `eval --json`.
    pub fn json(&self) -> Value {
        let mut line = self.score.json();
        line["length"] = json!(self.length);
        line["loss"] = json!(self.loss);
        line["loss_error"] = json!(self.loss_error);
        line["density"] = json!(self.density);
        line["shortcut"] = json!(self.shortcut.accuracy);
        let questions = self.by_question.iter().zip(&self.shortcut.by_question).enumerate();
        line["by_question"] = questions
            .map(|(i, (score, shortcut))| {
                json!({"question": i + 1, "asked": score.asked, "accuracy": score.accuracy(), "shortcut": shortcut})
            })
            .collect();
        line["layers"] = self.spent.iter().map(Spent::json).collect();
        let rows = self.by_distance.iter().map(|(below, score)| {
            let mut row = score.json();
            row["distance_below"] = json!(below);
            row
        });
        line["by_distance"] = rows.collect();
        line
    }
}

/// Fixed sequences of one length, that training never draws.
struct Length {
    length: usize,
    batches: Vec<Batch>,
    shortcut: Shortcut,
}

/// Those of every length.
pub struct TaskSet(Vec<Length>);

/// Whether some layer attends the evidence's chunk when it asks, or its window reaches it; everything is attended where nothing
/// routes.
fn seen(attention: &Attention, lists: &[Option<HostRoutes>], q: &Question) -> bool {
    if q.at - q.evidence < attention.window() {
        return true;
    }
    lists.iter().any(|list| match list {
        None => true,
        Some(list) => {
            let chunk = (q.evidence / list.chunk_size()) as u32;
            (0..list.extents().1).any(|kv| list.chunks_of(q.sequence, kv, q.at).contains(&chunk))
        }
    })
}

impl TaskSet {
    /// The sequences of a configuration's task.
    pub fn new(task: &Task, config: &Config) -> Self {
        let d = &config.data;
        let mut lengths = vec![d.seq_len];
        lengths.extend(&task.eval_lengths);
        lengths.sort_unstable();
        lengths.dedup();
        let of = |length: usize| {
            let batch = (d.batch_size * d.seq_len / length).max(1);
            let batches = Batch::evaluation(task, length, d.vocab_size, batch, task.eval_sequences);
            Length { length, batches, shortcut: task.shortcut(length, d.vocab_size) }
        };
        TaskSet(lengths.into_iter().map(of).collect())
    }

    /// The sequences of the training length.
    pub fn batches(&self, length: usize) -> &[Batch] {
        self.0.iter().find(|l| l.length == length).map_or(&[], |l| &l.batches)
    }

    /// All sequences by their length.
    pub fn by_length(&self) -> impl Iterator<Item = (usize, &[Batch])> {
        self.0.iter().map(|l| (l.length, &l.batches[..]))
    }

    /// Evaluates a model.
    ///
    /// # Errors
    /// When the model has no positions for a length.
    pub fn run(&self, model: &Model, router: RouterChoice) -> Result<Vec<LengthResult>> {
        self.0.iter().map(|length| length.run(model, router)).collect()
    }
}

impl Length {
    fn run(&self, model: &Model, router: RouterChoice) -> Result<LengthResult> {
        let (c, length) = (model.config(), self.length);
        let sequences = self.batches.iter().map(|b| b.batch).sum::<usize>() as f64;
        let (mut score, mut by_distance) = (Score::default(), BTreeMap::<usize, Score>::new());
        let (mut by_question, mut spent) = (Vec::new(), vec![None; c.layers]);
        let (mut loss, mut listed, mut layers) = (0.0, 0.0, vec![0.0; c.layers]);
        // sum and number of each sequence's answers
        let mut losses = BTreeMap::<(usize, usize), (f64, f64)>::new();
        for (i, b) in self.batches.iter().enumerate() {
            let rows: Vec<usize> = b.questions.iter().map(|q| q.sequence * length + q.at).collect();
            let reroute = router.of(&b.questions);
            let (logits, routers) = model.logits_at(&model.ids(&b.inputs, b.batch)?, &rows, reroute.as_ref())?;
            let logits = logits.to_f64()?;
            let host = |trace: &Option<RouterTrace>| trace.as_ref().map(|t| t.routes()?.to_host()).transpose();
            let lists = routers.iter().map(host).collect::<dash_core::Result<Vec<_>>>()?;
            let mut number = (0, 0);
            for ((q, &row), logits) in b.questions.iter().zip(&rows).zip(logits.chunks_exact(model.vocab())) {
                let answer = b.targets[row] as usize;
                let top = logits.iter().copied().fold(f64::MIN, f64::max);
                let best = logits.iter().position(|&x| x == top);
                let nll = top + logits.iter().map(|x| (x - top).exp()).sum::<f64>().ln() - logits[answer];
                loss += nll;
                let own = losses.entry((i, q.sequence)).or_default();
                *own = (own.0 + nll, own.1 + 1.0);
                let (right, seen) = (best == Some(answer), seen(&c.attention, &lists, q));
                score.add(right, seen);
                by_distance.entry((q.at - q.evidence + 1).next_power_of_two()).or_default().add(right, seen);
                number = if number.0 == q.sequence { (q.sequence, number.1 + 1) } else { (q.sequence, 1) };
                if by_question.len() < number.1 {
                    by_question.push(Score::default());
                }
                by_question[number.1 - 1].add(right, seen);
            }
            for (layer, trace) in routers.iter().enumerate().filter_map(|(i, t)| Some((i, t.as_ref()?))) {
                let (stats, share) = (trace.stats()?, b.batch as f64 / sequences);
                layers[layer] += stats.density * share;
                listed += stats.tokens * share / c.layers as f64;
            }
            for (spent, list) in spent.iter_mut().zip(&lists) {
                let Some(list) = list else { continue };
                spent.get_or_insert_with(Tally::default).add(list, &b.questions);
            }
        }
        let spent = spent.into_iter().enumerate().filter_map(|(layer, tally)| Some(tally?.spent(layer)));
        Ok(LengthResult {
            length,
            loss: loss / score.asked.max(1) as f64,
            loss_error: standard_error(&losses.into_values().collect::<Vec<_>>()),
            score,
            by_distance,
            by_question,
            shortcut: self.shortcut.clone(),
            spent: spent.collect(),
            density: if listed == 0.0 { 1.0 } else { layers.iter().sum::<f64>() / c.layers as f64 },
            layers: if listed == 0.0 { Vec::new() } else { layers },
            listed,
        })
    }
}

#[cfg(test)]
mod tests;
