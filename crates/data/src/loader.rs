//! Batches in a random order that a seed fixes and two numbers resume.
//!
//! A window is `seq_len + 1` tokens; windows start every `seq_len` tokens, so each token is a target once an epoch. An
//! epoch is a permutation of the windows drawn from (seed, epoch). A thread makes the next batch while this one is used.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use rand::{Rng as _, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::shard::Shard;

/// Where a loader stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// Full passes made.
    pub epoch: u64,
    /// Windows of this pass already given out.
    pub cursor: u64,
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
}

struct Windows {
    shards: Vec<Arc<Shard>>,
    seq_len: usize,
    /// windows before each shard
    first: Vec<usize>,
    total: usize,
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
            seq_len + 1
        );
        return Err(DataError::content(path, what));
    }
    Ok(Windows { shards: shards.to_vec(), seq_len, first, total })
}

impl Windows {
    fn read(&self, window: usize, out: &mut Vec<u32>) {
        let shard = self.first.partition_point(|&f| f <= window) - 1;
        self.shards[shard].read((window - self.first[shard]) * self.seq_len, self.seq_len + 1, out);
    }

    fn batch(&self, batch: usize, state: LoaderState, pick: impl Iterator<Item = usize>) -> Batch {
        let (mut inputs, mut targets) =
            (Vec::with_capacity(batch * self.seq_len), Vec::with_capacity(batch * self.seq_len));
        let mut window = Vec::new();
        for i in pick {
            self.read(i, &mut window);
            inputs.extend_from_slice(&window[..self.seq_len]);
            targets.extend_from_slice(&window[1..]);
        }
        Batch { inputs: inputs.into(), targets, batch, state }
    }
}

/// The order of an epoch: Fisher-Yates over a ChaCha8 stream of our own, because a library's shuffle may change.
fn permutation(total: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch.wrapping_add(1));
    let mut order: Vec<u32> = (0..total as u32).collect();
    for i in (1..total).rev() {
        let j = ((rng.next_u64() as u128 * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
    order
}

impl Loader {
    /// Starts at `state`.
    ///
    /// # Errors
    /// When the shards hold no window.
    pub fn new(shards: &[Arc<Shard>], seq_len: usize, batch: usize, seed: u64, state: LoaderState) -> Result<Self> {
        let windows = windows(shards, seq_len)?;
        let (send, next) = sync_channel(1);
        std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || {
                let mut state = state;
                let mut order = permutation(windows.total, seed, state.epoch);
                loop {
                    let mut pick = Vec::with_capacity(batch);
                    while pick.len() < batch {
                        if state.cursor as usize >= windows.total {
                            state = LoaderState { epoch: state.epoch + 1, cursor: 0 };
                            order = permutation(windows.total, seed, state.epoch);
                        }
                        pick.push(order[state.cursor as usize] as usize);
                        state.cursor += 1;
                    }
                    if send.send(windows.batch(batch, state, pick.into_iter())).is_err() {
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
    pub fn validation(shards: &[Arc<Shard>], seq_len: usize, batch: usize, batches: usize) -> Result<Vec<Batch>> {
        let windows = windows(shards, seq_len)?;
        let wanted = (batch * batches).min(windows.total);
        let all: Vec<usize> = (0..wanted).map(|i| i * windows.total / wanted).collect();
        Ok(all.chunks(batch).map(|c| windows.batch(c.len(), LoaderState::default(), c.iter().copied())).collect())
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
            let mut w = ShardWriter::create(&path, 10_000, 0).unwrap();
            w.push(&(next..next + n as u32).collect::<Vec<_>>()).unwrap();
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
    fn too_short_a_corpus_is_told() {
        let (_dir, shards) = shards(&[8]);
        let err = Loader::new(&shards, 8, 1, 0, LoaderState::default()).err().unwrap().to_string();
        assert!(err.contains("8 tokens hold no window of seq_len + 1 = 9"), "{err}");
    }
}
