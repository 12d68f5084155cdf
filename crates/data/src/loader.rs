//! Batches in a random order that a seed fixes and two numbers resume.
//!
//! A window is `seq_len + 1` tokens; windows start every `seq_len` tokens, so each token is a target once an epoch. An
//! epoch is a permutation of the windows drawn from (seed, epoch). A thread makes the next batch while this one is used.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::rng::{shuffle, stream, unit};
use crate::shard::Shard;
use crate::task::{Example, IGNORE, Question, Task};

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
    fn of(sequences: Vec<Example>, state: LoaderState) -> Self {
        let batch = sequences.len();
        let (mut inputs, mut targets, mut questions) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, e) in sequences.into_iter().enumerate() {
            inputs.extend_from_slice(&e.inputs);
            targets.extend_from_slice(&e.targets);
            questions.extend(e.questions.into_iter().map(|q| Question { sequence, ..q }));
        }
        Batch { inputs: inputs.into(), targets, batch, state, questions }
    }

    /// Sequences `0..count` of a task that no training run draws: its evaluation.
    pub fn evaluation(task: &Task, seq_len: usize, vocab: usize, batch: usize, count: usize) -> Vec<Batch> {
        let all: Vec<u64> = (0..count as u64).collect();
        let make = |numbers: &[u64]| {
            let examples = numbers.iter().map(|&n| task.example(seq_len, vocab, EVALUATION_SEED, n)).collect();
            Batch::of(examples, LoaderState::default())
        };
        all.chunks(batch).map(make).collect()
    }
}

/// Seed of the sequences that evaluations use; runs count their seeds from 0.
const EVALUATION_SEED: u64 = 0x6461_7368_6c61_6201;

struct Windows {
    shards: Vec<Arc<Shard>>,
    seq_len: usize,
    /// windows before each shard
    first: Vec<usize>,
    total: usize,
    /// `total`; an order of an epoch holds numbers of 32 bits
    count: u32,
}

/// Gives out batches for ever.
pub struct Loader {
    next: Receiver<Batch>,
}

fn windows(shards: &[Arc<Shard>], seq_len: usize) -> Result<Windows> {
    let mut first = Vec::new();
    let mut total = 0;
    for shard in shards {
        first.push(total);
        total += shard.len().saturating_sub(1) / seq_len;
    }
    if total == 0 {
        let path = shards.first().map_or_else(|| "shards".into(), |s| s.path().to_path_buf());
        let tokens: usize = shards.iter().map(|s| s.len()).sum();
        let what = format!(
            "{tokens} tokens hold no window of seq_len + 1 = {}; bring more text or shorten data.seq_len",
            seq_len.saturating_add(1)
        );
        return Err(DataError::content(path, what));
    }
    let count = u32::try_from(total).map_err(|_| {
        let what = format!("{total} windows are above the {} of an epoch; raise data.seq_len", u32::MAX);
        DataError::content(shards[0].path(), what)
    })?;
    Ok(Windows { shards: shards.to_vec(), seq_len, first, total, count })
}

impl Windows {
    fn read(&self, window: usize, out: &mut Vec<u32>) {
        let shard = self.first.partition_point(|&f| f <= window) - 1;
        self.shards[shard].read((window - self.first[shard]) * self.seq_len, self.seq_len + 1, out);
    }

    /// Bytes of the original text behind the targets of a window, where the shard knows them.
    fn target_bytes(&self, window: usize) -> Option<u64> {
        let shard = self.first.partition_point(|&f| f <= window) - 1;
        self.shards[shard].text_bytes((window - self.first[shard]) * self.seq_len + 1, self.seq_len)
    }

    fn sequence(&self, i: usize) -> Example {
        let mut window = Vec::new();
        self.read(i, &mut window);
        let targets = window[1..].to_vec();
        window.truncate(self.seq_len);
        Example { inputs: window, targets, questions: Vec::new() }
    }
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
    fn next(&mut self) -> Example {
        let (number, alone) = (self.state.drawn, self.windows.is_none());
        self.state.drawn += 1;
        if let Some(example) = self.mixture.as_ref().and_then(|m| m.take(self.seed, number, alone)) {
            return example;
        }
        let windows = self.windows.as_ref().expect("a stream without a task has text");
        if self.state.cursor as usize >= windows.total {
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
    pub fn new(shards: &[Arc<Shard>], seq_len: usize, batch: usize, seed: u64, state: LoaderState) -> Result<Self> {
        Self::start(Some(windows(shards, seq_len)?), None, batch, seed, state)
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
        let text = if shards.is_empty() { None } else { Some(windows(shards, mixture.seq_len)?) };
        Self::start(text, Some(mixture), batch, seed, state)
    }

    fn start(
        windows: Option<Windows>,
        mixture: Option<Mixture>,
        batch: usize,
        seed: u64,
        state: LoaderState,
    ) -> Result<Self> {
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
        Ok(Loader { next })
    }

    /// The next batch.
    pub fn next_batch(&mut self) -> Batch {
        self.next.recv().expect("the loader thread lives as long as the loader")
    }

    /// Up to `batches` batches of evenly spaced windows in file order, the same at every call: validation. The last may
    /// be smaller; a short corpus gives fewer.
    ///
    /// # Errors
    /// When the shards hold no window.
    pub fn validation(shards: &[Arc<Shard>], seq_len: usize, batch: usize, batches: usize) -> Result<ValidationText> {
        let windows = windows(shards, seq_len)?;
        let wanted = batch.saturating_mul(batches).min(windows.total);
        let all: Vec<usize> = (0..wanted).map(|i| i * windows.total / wanted).collect();
        let bytes = all.iter().map(|&i| windows.target_bytes(i)).sum();
        let make = |c: &[usize]| Batch::of(c.iter().map(|&i| windows.sequence(i)).collect(), LoaderState::default());
        Ok(ValidationText { batches: all.chunks(batch).map(make).collect(), bytes })
    }

    /// Windows of an epoch.
    ///
    /// # Errors
    /// When there is none.
    pub fn epoch_windows(shards: &[Arc<Shard>], seq_len: usize) -> Result<usize> {
        Ok(windows(shards, seq_len)?.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardWriter;

    fn shards(lengths: &[usize]) -> (tempfile::TempDir, Vec<Arc<Shard>>) {
        let dir = tempfile::tempdir().unwrap();
        let mut next = 0;
        let shards = lengths.iter().enumerate().map(|(i, &n)| {
            let path = dir.path().join(format!("{i}.shard"));
            let mut w = ShardWriter::create(&path, 10_000, 0, false).unwrap();
            w.begin();
            w.append(&(next..next + n as u32).collect::<Vec<_>>(), &[]).unwrap();
            w.finish().unwrap();
            next += n as u32;
            Arc::new(Shard::open(&path).unwrap())
        });
        let shards = shards.collect();
        (dir, shards)
    }

    #[test]
    fn an_epoch_gives_every_target_once_and_targets_follow_inputs() {
        let (_dir, shards) = shards(&[41, 25]);
        let mut loader = Loader::new(&shards, 4, 4, 9, LoaderState::default()).unwrap();
        let mut targets = Vec::new();
        for _ in 0..4 {
            let b = loader.next_batch();
            assert!(b.inputs.iter().zip(&b.targets).all(|(x, y)| x + 1 == *y));
            targets.extend(b.targets);
        }
        targets.sort_unstable();
        assert_eq!(targets, (1..=40).chain(42..=65).collect::<Vec<_>>());
    }

    #[test]
    fn resuming_continues_the_order_across_epochs() {
        let (_dir, shards) = shards(&[100]);
        let mut whole = Loader::new(&shards, 6, 5, 3, LoaderState::default()).unwrap();
        let batches: Vec<Batch> = (0..12).map(|_| whole.next_batch()).collect();
        for k in 0..11 {
            let mut resumed = Loader::new(&shards, 6, 5, 3, batches[k].state).unwrap();
            assert_eq!(resumed.next_batch(), batches[k + 1]);
        }
        assert!(batches[11].state.epoch > 1);
    }

    #[test]
    fn a_mixture_resumes_keeps_its_share_and_reads_the_text_in_the_same_order() {
        let (_dir, shards) = shards(&[400]);
        let task = Task {
            kind: crate::TaskKind::Needle,
            pairs: 1,
            queries: 0,
            distractors: 0,
            value_tokens: 1,
            power: 0.01,
            share: 0.25,
            eval_lengths: vec![],
            eval_sequences: 1,
        };
        let mixture = Mixture { task, seq_len: 8, vocab: 32 };
        let start = |state| Loader::with_task(&shards, mixture.clone(), 5, 3, state).unwrap();
        let mut whole = start(LoaderState::default());
        let batches: Vec<Batch> = (0..40).map(|_| whole.next_batch()).collect();
        for k in [0, 7, 20] {
            assert_eq!(start(batches[k].state).next_batch(), batches[k + 1]);
        }
        let tasks: usize = batches.iter().map(|b| b.questions.len()).sum();
        // 200 sequences at a share of a quarter: 50, standard deviation 6
        assert!((30..=70).contains(&tasks), "{tasks}");
        let text = |batches: &[Batch]| -> Vec<u32> {
            let rows = batches.iter().flat_map(|b| b.targets.chunks(8).map(<[u32]>::to_vec).collect::<Vec<_>>());
            rows.filter(|r| !r.contains(&IGNORE)).flatten().collect()
        };
        let mut plain = Loader::new(&shards, 8, 5, 3, LoaderState::default()).unwrap();
        let want = text(&(0..40).map(|_| plain.next_batch()).collect::<Vec<_>>());
        let got = text(&batches);
        assert_eq!(got, want[..got.len()]);
    }

    #[test]
    fn too_short_a_corpus_is_told() {
        let (_dir, shards) = shards(&[8]);
        let err = Loader::new(&shards, 8, 1, 0, LoaderState::default()).err().unwrap().to_string();
        assert!(err.contains("8 tokens hold no window of seq_len + 1 = 9"), "{err}");
    }
}
