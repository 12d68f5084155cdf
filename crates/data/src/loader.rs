//! Batches in a random order that a seed fixes and two numbers resume.
//!
//! A window is `seq_len + 1` tokens; windows start every `seq_len` tokens, so each token is a target once an epoch. An
//! epoch is a permutation of the windows, or of the sequences that documents were packed into, drawn from (seed, epoch). A thread makes the next
//! batch while this one is used.

mod packing;
mod windows;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::rng::{shuffle, stream, unit};
use crate::shard::Shard;
use crate::task::{Example, IGNORE, Question, Task};
pub use windows::{Layout, PackedEpoch, Packing};
use windows::{Sequence, Windows};

/// Where a loader stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// Full passes made.
    pub epoch: u64,
    /// Windows of this pass already given out.
    pub cursor: u64,
    /// Sequences already given out, of text and of a task.
    pub drawn: u64,
}

/// `batch` sequences of inputs and their successors.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Inputs, `batch * seq_len`.
    pub inputs: Arc<[u32]>,
    /// Targets, `batch * seq_len`.
    pub targets: Vec<u32>,
    /// Number of sequences.
    pub batch: usize,
    /// The loader's state after this batch.
    pub state: LoaderState,
    /// What a task asks, where sequences are a task's.
    pub questions: Vec<Question>,
    /// Where documents begin among the inputs that must not see each other, ascending; one begins with every sequence. None where a sequence
    /// is seen whole.
    pub documents: Vec<usize>,
}

/// The text of a validation.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidationText {
    /// The batches.
    pub batches: Vec<Batch>,
    /// Bytes of the original text behind all targets; `None` where the shards do not know them.
    pub bytes: Option<u64>,
}

impl Batch {
    /// Targets that count: all of a text, the asked ones of a task.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORE).count()
    }

    /// Puts sequences one after the other.
    fn of(sequences: Vec<Sequence>, state: LoaderState) -> Self {
        let batch = sequences.len();
        let (mut inputs, mut targets, mut questions, mut documents) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (sequence, Sequence { example: e, documents: of }) in sequences.into_iter().enumerate() {
            let first = inputs.len();
            documents.extend(of.into_iter().map(|at| first + at));
            inputs.extend_from_slice(&e.inputs);
            targets.extend_from_slice(&e.targets);
            questions.extend(e.questions.into_iter().map(|q| Question { sequence, ..q }));
        }
        Batch { inputs: inputs.into(), targets, batch, state, questions, documents }
    }

    /// Tokens of each document, or of each sequence that is seen whole, in order.
    pub fn lengths(&self) -> Vec<usize> {
        let t = self.inputs.len() / self.batch.max(1);
        let mut starts: Vec<usize> = (0..self.batch).map(|sequence| sequence * t).collect();
        starts.extend(&self.documents);
        starts.sort_unstable();
        starts.dedup();
        let ends = starts.iter().skip(1).copied().chain([self.inputs.len()]);
        starts.iter().zip(ends).map(|(start, end)| end - start).collect()
    }

    /// The first `count` sequences, at least one and at most all.
    pub fn first(&self, count: usize) -> Self {
        let batch = count.clamp(1, self.batch);
        let tokens = batch * (self.inputs.len() / self.batch);
        Batch {
            inputs: self.inputs[..tokens].into(),
            targets: self.targets[..tokens].to_vec(),
            batch,
            state: self.state,
            questions: self.questions.iter().filter(|q| q.sequence < batch).copied().collect(),
            documents: self.documents.iter().filter(|&&at| at < tokens).copied().collect(),
        }
    }

    /// Sequences `0..count` of a task that no training run draws: its evaluation.
    pub fn evaluation(task: &Task, seq_len: usize, vocab: usize, batch: usize, count: usize) -> Vec<Batch> {
        let all: Vec<u64> = (0..count as u64).collect();
        let make = |numbers: &[u64]| {
            let examples = numbers.iter().map(|&n| task.example(seq_len, vocab, EVALUATION_SEED, n).into()).collect();
            Batch::of(examples, LoaderState::default())
        };
        all.chunks(batch).map(make).collect()
    }
}

/// Seed of the sequences that evaluations use; runs count their seeds from 0.
const EVALUATION_SEED: u64 = 0x6461_7368_6c61_6201;

/// Gives out batches for ever.
pub struct Loader {
    next: Receiver<Batch>,
    packed: Option<PackedEpoch>,
}

/// A task in a stream of sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    /// The task.
    pub task: Task,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Vocabulary size.
    pub vocab: usize,
}

impl Mixture {
    /// Sequence number `number`, if it is the task's turn: by a coin that seed and number decide.
    fn take(&self, seed: u64, number: u64, alone: bool) -> Option<Example> {
        let turn = alone || unit(&mut stream(seed ^ EVALUATION_SEED, number)) < self.task.share;
        turn.then(|| self.task.example(self.seq_len, self.vocab, seed, number))
    }
}

/// What a loader draws its sequences from.
struct Stream {
    windows: Option<Windows>,
    mixture: Option<Mixture>,
    seed: u64,
    state: LoaderState,
    order: Vec<u32>,
}

impl Stream {
    fn next(&mut self) -> Sequence {
        let (number, alone) = (self.state.drawn, self.windows.is_none());
        self.state.drawn += 1;
        if let Some(example) = self.mixture.as_ref().and_then(|m| m.take(self.seed, number, alone)) {
            return example.into();
        }
        let windows = self.windows.as_ref().expect("a stream without a task has text");
        if self.state.cursor >= u64::from(windows.count) {
            self.state = LoaderState { epoch: self.state.epoch + 1, cursor: 0, ..self.state };
            self.order = permutation(windows.count, self.seed, self.state.epoch);
        }
        self.state.cursor += 1;
        windows.sequence(self.order[self.state.cursor as usize - 1] as usize)
    }
}

/// The order of an epoch.
fn permutation(total: u32, seed: u64, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..total).collect();
    shuffle(&mut stream(seed, epoch.wrapping_add(1)), &mut order);
    order
}

impl Loader {
    /// Starts at `state`.
    ///
    /// # Errors
    /// When the shards hold no window.
    pub fn new(shards: &[Arc<Shard>], layout: Layout, batch: usize, seed: u64, state: LoaderState) -> Result<Self> {
        Self::start(Some(Windows::of(shards, layout)?), None, batch, seed, state)
    }

    /// A task, alone or, with shards, mixed into their text at its share.
    ///
    /// # Errors
    /// When shards are given and hold no window.
    pub fn with_task(
        shards: &[Arc<Shard>],
        mixture: Mixture,
        batch: usize,
        seed: u64,
        state: LoaderState,
    ) -> Result<Self> {
        let stream = Layout::stream(mixture.seq_len);
        let text = if shards.is_empty() { None } else { Some(Windows::of(shards, stream)?) };
        Self::start(text, Some(mixture), batch, seed, state)
    }

    fn start(
        windows: Option<Windows>,
        mixture: Option<Mixture>,
        batch: usize,
        seed: u64,
        state: LoaderState,
    ) -> Result<Self> {
        let packed = windows.as_ref().and_then(Windows::packed_epoch);
        let (send, next) = sync_channel(1);
        std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || {
                let order = windows.as_ref().map_or(Vec::new(), |w| permutation(w.count, seed, state.epoch));
                let mut stream = Stream { windows, mixture, seed, state, order };
                loop {
                    let sequences = (0..batch).map(|_| stream.next()).collect();
                    if send.send(Batch::of(sequences, stream.state)).is_err() {
                        return; // the loader was dropped
                    }
                }
            })
            .map_err(DataError::io("loader", "thread cannot be started"))?;
        Ok(Loader { next, packed })
    }

    /// The next batch.
    pub fn next_batch(&mut self) -> Batch {
        self.next.recv().expect("the loader thread lives as long as the loader")
    }

    /// What packing made of the text, where documents are packed.
    pub fn packed(&self) -> Option<PackedEpoch> {
        self.packed
    }

    /// Up to `batches` batches of evenly spaced windows in file order, the same at every call: validation. The last may
    /// be smaller; a short corpus gives fewer. They are of the stream however documents are laid out for training, so that all layouts are asked for
    /// the same targets.
    ///
    /// # Errors
    /// When the shards hold no window.
    pub fn validation(shards: &[Arc<Shard>], layout: Layout, batch: usize, batches: usize) -> Result<ValidationText> {
        let windows = Windows::of(shards, Layout { packing: Packing::Stream, ..layout })?;
        let total = windows.count as usize;
        let wanted = batch.saturating_mul(batches).min(total);
        let all: Vec<usize> = (0..wanted).map(|i| i * total / wanted).collect();
        let bytes = all.iter().map(|&i| windows.target_bytes(i)).sum();
        let make = |c: &[usize]| Batch::of(c.iter().map(|&i| windows.sequence(i)).collect(), LoaderState::default());
        Ok(ValidationText { batches: all.chunks(batch).map(make).collect(), bytes })
    }
}

#[cfg(test)]
mod tests;
