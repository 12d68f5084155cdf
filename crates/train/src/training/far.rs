//! Loss where a model can gain by looking far back (after Arora et al. 2023, arXiv 2312.04927, who split losses by whether a bigram was seen
//! before): the targets of pairs of tokens whose last occurrence in the sequence is far away and which training has hardly shown. Beside them a control:
//! pairs as rare at places as late that the sequence has not shown before.

use std::collections::HashMap;
use std::sync::Arc;

use dash_data::{Batch, Shard};

use super::standard_error::standard_error;
use crate::config::Far;

/// A token and its successor as one number.
fn pair(first: u32, second: u32) -> u64 {
    (first as u64) << 32 | second as u64
}

/// A target that is looked at.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Among the targets of its batch.
    at: usize,
    far: bool,
    /// Of its pair's number in training: counts of one class lie within a factor of two.
    class: usize,
}

/// The targets that are looked at, batch by batch.
pub struct FarSet {
    seq_len: usize,
    batches: Vec<Vec<Place>>,
}

/// What a validation found there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FarLoss {
    /// Mean cross-entropy of the far targets that have a control, in nats.
    pub loss: f64,
    /// Its standard error, over sequences.
    pub error: Option<f64>,
    /// Their number.
    pub tokens: usize,
    /// Mean cross-entropy of the control, each class of rarity with the weight that it has among the far targets.
    pub control: f64,
    /// Targets of the control.
    pub control_tokens: usize,
}

/// What is added up of the targets of a validation.
pub struct Sums<'a> {
    set: &'a FarSet,
    /// By class: sum and number of the far targets, then of the control.
    classes: Vec<[(f64, usize); 2]>,
    /// By sequence and class: sum and number of the far targets.
    sequences: Vec<Vec<(f64, usize)>>,
}

/// 0 for none, then a class for each power of two: 1 and 2, 3 to 6, 7 to 14.
fn class(count: u64) -> usize {
    (count + 1).ilog2() as usize
}

/// (place among the targets of a sequence, pair, whether it is far) of every target more than `far` tokens behind the first whose pair did not
/// occur before, or so far before.
fn candidates(inputs: &[u32], targets: &[u32], far: usize) -> Vec<(usize, u64, bool)> {
    let (mut last, mut out) = (HashMap::new(), Vec::new());
    for (i, (&x, &y)) in inputs.iter().zip(targets).enumerate() {
        match last.insert(pair(x, y), i) {
            Some(before) if i - before > far => out.push((i, pair(x, y), true)),
            None if i > far => out.push((i, pair(x, y), false)),
            _ => {}
        }
    }
    out
}

/// How often each of the pairs occurs in the shards.
fn count(counts: &mut HashMap<u64, u64>, train: &[Arc<Shard>]) {
    for shard in train {
        // pieces overlap by a token, so that each pair is in one
        shard.pieces(1, |ids| {
            for two in ids.windows(2) {
                if let Some(n) = counts.get_mut(&pair(two[0], two[1])) {
                    *n += 1;
                }
            }
        });
    }
}

impl FarSet {
    /// Of a validation's batches of sequences of `seq_len` tokens, rare by their number in `train`.
    pub fn of(rule: Far, seq_len: usize, batches: &[Batch], train: &[Arc<Shard>]) -> Self {
        let found: Vec<Vec<(usize, u64, bool)>> = batches
            .iter()
            .map(|b| {
                let sequences = b.inputs.chunks(seq_len).zip(b.targets.chunks(seq_len)).enumerate();
                let of = |(s, (inputs, targets))| {
                    candidates(inputs, targets, rule.tokens)
                        .into_iter()
                        .map(move |(i, pair, far)| (s * seq_len + i, pair, far))
                };
                sequences.flat_map(of).collect()
            })
            .collect();
        let mut counts: HashMap<u64, u64> = found.iter().flatten().map(|(_, pair, _)| (*pair, 0)).collect();
        count(&mut counts, train);
        let place = |&(at, pair, far): &(usize, u64, bool)| {
            let n = counts[&pair];
            (n <= rule.rare).then(|| Place { at, far, class: class(n) })
        };
        FarSet { seq_len, batches: found.iter().map(|b| b.iter().filter_map(place).collect()).collect() }
    }

    /// Nothing yet.
    pub fn sums(&self) -> Sums<'_> {
        Sums { set: self, classes: Vec::new(), sequences: Vec::new() }
    }
}

impl Sums<'_> {
    /// Adds the cross-entropies of a batch, in order.
    pub fn add(&mut self, batch: usize, nll: &[f64]) {
        let first = self.sequences.len();
        self.sequences.resize(first + nll.len() / self.set.seq_len.max(1), Vec::new());
        for place in &self.set.batches[batch] {
            if self.classes.len() <= place.class {
                self.classes.resize(place.class + 1, Default::default());
            }
            let sum = &mut self.classes[place.class][usize::from(!place.far)];
            *sum = (sum.0 + nll[place.at], sum.1 + 1);
            if place.far {
                let sequence = &mut self.sequences[first + place.at / self.set.seq_len];
                sequence.resize(sequence.len().max(place.class + 1), (0.0, 0));
                let sum = &mut sequence[place.class];
                *sum = (sum.0 + nll[place.at], sum.1 + 1);
            }
        }
    }

    /// The means, over the classes that both have; none where there is no such class.
    pub fn finish(self) -> Option<FarLoss> {
        let both = |class: usize| self.classes[class].iter().all(|(_, n)| *n > 0);
        let matched: Vec<usize> = (0..self.classes.len()).filter(|&c| both(c)).collect();
        let total = |which: usize| {
            matched
                .iter()
                .fold((0.0, 0), |sum, &c| (sum.0 + self.classes[c][which].0, sum.1 + self.classes[c][which].1))
        };
        let ((far, tokens), (_, control_tokens)) = (total(0), total(1));
        let share = |c: usize| self.classes[c][0].1 as f64 / tokens as f64;
        let mean = |c: usize| self.classes[c][1].0 / self.classes[c][1].1 as f64;
        let of_sequence = |s: &Vec<(f64, usize)>| {
            let own = matched.iter().filter_map(|&c| s.get(c));
            own.fold((0.0, 0.0), |sum, x| (sum.0 + x.0, sum.1 + x.1 as f64))
        };
        let sequences: Vec<(f64, f64)> = self.sequences.iter().map(of_sequence).collect();
        (tokens > 0).then(|| FarLoss {
            loss: far / tokens as f64,
            error: standard_error(&sequences),
            tokens,
            control: matched.iter().map(|&c| share(c) * mean(c)).sum(),
            control_tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_far_by_its_last_occurrence() {
        // 5 6 stands at 0, 2 and 6: 2 back, then 4 back; 5 5 at 4 and 5 follows itself
        let inputs = [5, 6, 5, 6, 5, 5, 5, 6];
        let targets = [6, 5, 6, 5, 5, 5, 6, 7];
        let of = |far| candidates(&inputs, &targets, far);
        assert_eq!(of(3), [(4, pair(5, 5), false), (6, pair(5, 6), true), (7, pair(6, 7), false)]);
        assert_eq!(of(4), [(7, pair(6, 7), false)]);
        assert_eq!(pair(1, u32::MAX), 0x1_ffff_ffff);
        assert_eq!([0, 1, 2, 3, 6, 7].map(class), [0, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn a_pair_across_two_pieces_of_a_shard_counts_once() {
        let (dir, piece) = (tempfile::tempdir().unwrap(), 1 << 20);
        let path = dir.path().join("a.shard");
        let mut w = dash_data::ShardWriter::create(&path, 9, 0, false).unwrap();
        w.begin();
        // 1 2 at the start, and where the first piece ends
        w.append(&[vec![1, 2], vec![0; piece - 3], vec![1, 2, 3]].concat(), &[]).unwrap();
        w.finish().unwrap();
        let mut counts: HashMap<u64, u64> = [(pair(1, 2), 0), (pair(2, 3), 0), (pair(3, 1), 0)].into();
        count(&mut counts, &[Arc::new(Shard::open(&path).unwrap())]);
        assert_eq!([pair(1, 2), pair(2, 3), pair(3, 1)].map(|p| counts[&p]), [2, 1, 0]);
    }

    /// Two batches, of two sequences of three targets and of one. Class 0 has both halves, class 1 no control, class 2 nothing far, class
    /// 3 nothing at all, class 4 both.
    #[test]
    fn means_of_matched_classes_and_an_error_over_sequences() {
        let place = |at: usize, far: bool, class: usize| Place { at, far, class };
        let first =
            vec![place(0, true, 0), place(1, true, 1), place(2, true, 4), place(3, false, 0), place(4, true, 0)];
        let second = vec![place(0, false, 2), place(1, true, 0), place(2, false, 4)];
        let set = FarSet { seq_len: 3, batches: vec![first, second] };
        let mut sums = set.sums();
        sums.add(0, &[1.0, 50.0, 3.0, 4.0, 2.0, 60.0]);
        sums.add(1, &[70.0, 6.0, 9.0]);
        let found = sums.finish().unwrap();
        assert_eq!((found.tokens, found.control_tokens), (4, 2));
        assert_eq!(found.loss, (1.0 + 2.0 + 6.0 + 3.0) / 4.0);
        // three of class 0, one of class 4
        assert_eq!(found.control, 0.75 * 4.0 + 0.25 * 9.0);
        // sequences have 1 + 3 of two, 2 of one and 6 of one, the mean is 3: sqrt(3 / 2 (4 + 1 + 9)) / 4
        assert_eq!(found.error, Some(21f64.sqrt() / 4.0));
        // no class has both
        let one = FarSet { seq_len: 3, batches: vec![vec![place(0, true, 0), place(1, false, 1)]] };
        let mut sums = one.sums();
        sums.add(0, &[1.0, 2.0, 3.0]);
        assert_eq!(sums.finish(), None);
    }
}
