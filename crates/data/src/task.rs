//! Tasks with a known answer: synthetic sequences, made when they are needed from (seed, number), that know for every
//! answer which token of the context holds it. So an evaluation can tell "the router did not look there" from "it looked and
//! read wrong".
//!
//! | kind | sequence | asked |
//! |---|---|---|
//! | `mqar` | key value pairs, then the keys again at power-law gaps in noise (Arora et al. 2023, arXiv 2312.04927) | the value at each repeated key |
//! | `recall` | records `key v1 .. vm` scattered in noise, then `queries` of the keys | all m tokens |
//! | `needle` | one record in noise, then its key | all m tokens |
//! | `phone-book` | records `name name v1 .. vm` without gaps, as many as fit, then `queries` of the names | all m tokens |
//! | `selective-copy` | `pairs` tokens scattered in noise, then a mark | the tokens in order (Gu and Dao 2023, arXiv 2312.00752) |
//! | `sort` | `pairs` different tokens scattered in noise, then a mark | the tokens in ascending order |
//!
//! The settings of the MQAR paper are a vocabulary of 8192, power 0.01, and (length, pairs) of (64, 4), (128, 8), (256, 16) and
//! (512, 64); a larger power makes larger gaps.
//!
//! Of the vocabulary, token 0 is the mark and the rest is three equal ranges: keys, values, noise. Targets that are not
//! asked are [`IGNORE`] and have no loss.

use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The target of a position whose next token is not asked for.
pub const IGNORE: u32 = u32::MAX;

/// Which task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// Multi-query associative recall.
    Mqar,
    /// Multi-query recall of several tokens, records anywhere.
    Recall,
    /// One record anywhere.
    Needle,
    /// Records everywhere.
    PhoneBook,
    /// Data among noise, to be copied in order.
    SelectiveCopy,
    /// Data among noise, to be sorted.
    Sort,
}

/// A task and its sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Which.
    pub kind: TaskKind,
    /// Records or data tokens; `needle` has one, `phone-book` as many as fit.
    #[serde(default = "eight")]
    pub pairs: usize,
    /// Questions of `recall` and `phone-book`; 0: one for each record of `recall`, four for `phone-book`.
    #[serde(default)]
    pub queries: usize,
    /// Tokens of a value.
    #[serde(default = "one")]
    pub value_tokens: usize,
    /// Exponent of the gaps of `mqar`: gap + 1 is drawn with weight gap^(power - 1); small prefers near.
    #[serde(default = "power")]
    pub power: f64,
    /// Share of the training sequences that are the task; the others are text. 1 without a text source.
    #[serde(default = "whole")]
    pub share: f64,
    /// Lengths to evaluate at besides the training length.
    #[serde(default)]
    pub eval_lengths: Vec<usize>,
    /// Sequences of an evaluation at each length.
    #[serde(default = "many")]
    pub eval_sequences: usize,
}

fn eight() -> usize {
    8
}
fn one() -> usize {
    1
}
fn power() -> f64 {
    0.01
}
fn whole() -> f64 {
    1.0
}
fn many() -> usize {
    64
}

/// An asked token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Number of the sequence in its batch.
    pub sequence: usize,
    /// Position in the sequence whose target is the answer.
    pub at: usize,
    /// Position of the token of the context that is the answer.
    pub evidence: usize,
}

/// One sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Inputs.
    pub inputs: Vec<u32>,
    /// Targets, [`IGNORE`] where nothing is asked.
    pub targets: Vec<u32>,
    /// What is asked, ascending in `at`; `sequence` is 0.
    pub questions: Vec<Question>,
}

/// Uniform below `n`, without the bias of a remainder that a reader would have to think about.
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((rng.next_u64() as u128 * n as u128) >> 64) as usize
}

/// `count` different elements of `0..n` in random order.
fn choose(rng: &mut ChaCha8Rng, n: usize, count: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    for i in 0..count {
        let j = i + below(rng, n - i);
        all.swap(i, j);
    }
    all.truncate(count);
    all
}

/// Ascending starts of `count` pieces of `len` in `room` tokens, every placement equally likely up to order.
fn places(rng: &mut ChaCha8Rng, room: usize, count: usize, len: usize) -> Vec<usize> {
    let mut free: Vec<usize> = choose(rng, room - count * len + count, count);
    free.sort_unstable();
    free.iter().enumerate().map(|(i, at)| at + i * (len - 1)).collect()
}

const MARK: u32 = 0;

/// The three ranges of a vocabulary.
struct Alphabet {
    size: usize,
}

impl Alphabet {
    fn key(&self, i: usize) -> u32 {
        1 + i as u32
    }
    fn value(&self, i: usize) -> u32 {
        (1 + self.size + i) as u32
    }
    fn noise(&self, rng: &mut ChaCha8Rng) -> u32 {
        (1 + 2 * self.size + below(rng, self.size)) as u32
    }
}

impl Task {
    /// Tokens before the value of a record.
    fn name_tokens(&self) -> usize {
        if self.kind == TaskKind::PhoneBook { 2 } else { 1 }
    }

    fn record(&self) -> usize {
        self.name_tokens() + self.value_tokens
    }

    /// (records or data tokens, questions) of a sequence.
    fn counts(&self, seq_len: usize) -> (usize, usize) {
        match self.kind {
            TaskKind::Needle => (1, 1),
            TaskKind::Recall => (self.pairs, if self.queries == 0 { self.pairs } else { self.queries }),
            TaskKind::PhoneBook => {
                let queries = if self.queries == 0 { 4 } else { self.queries };
                ((seq_len / self.record()).saturating_sub(queries), queries)
            }
            _ => (self.pairs, self.pairs),
        }
    }

    /// Says what no sequence can be made from.
    ///
    /// # Errors
    /// (key, what is wrong and what would be right).
    pub fn check(&self, seq_len: usize, vocab: usize) -> Result<(), (&'static str, String)> {
        let size = (vocab - 1) / 3;
        if self.pairs == 0 || self.value_tokens == 0 || self.eval_sequences == 0 {
            return Err(("pairs", "pairs, value_tokens and eval_sequences are at least 1".into()));
        }
        if !(self.power > 0.0 && self.power.is_finite()) {
            return Err(("power", format!("{} is not a positive number", self.power)));
        }
        if !(self.share > 0.0 && self.share <= 1.0) {
            return Err(("share", format!("{} is not above 0 and at most 1", self.share)));
        }
        let (records, questions) = self.counts(seq_len);
        let need = match self.kind {
            TaskKind::Mqar => 4 * self.pairs,
            TaskKind::Recall | TaskKind::Needle => (records + questions) * self.record(),
            TaskKind::PhoneBook => (2 * questions) * self.record(),
            TaskKind::SelectiveCopy | TaskKind::Sort => 2 * self.pairs + 1,
        };
        if need > seq_len {
            return Err(("pairs", format!("a sequence needs {need} tokens, but a length of {seq_len} is asked for")));
        }
        if questions > records {
            return Err((
                "queries",
                format!("{questions} questions about {records} records; each is asked once at most"),
            ));
        }
        let distinct = if self.kind == TaskKind::PhoneBook { size * size } else { size };
        if records > distinct {
            let what = format!(
                "{records} different names from {size} keys (a third of the vocabulary); raise data.vocab_size"
            );
            return Err(("pairs", what));
        }
        Ok(())
    }

    /// Sequence number `number` of a seed; the same at every call. The sizes were checked.
    pub fn example(&self, seq_len: usize, vocab: usize, seed: u64, number: u64) -> Example {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number.wrapping_add(1 << 32));
        let alphabet = Alphabet { size: (vocab - 1) / 3 };
        let mut inputs: Vec<u32> = (0..seq_len).map(|_| alphabet.noise(&mut rng)).collect();
        let mut targets = vec![IGNORE; seq_len];
        let mut questions = Vec::new();
        let mut ask = |targets: &mut [u32], inputs: &[u32], at: usize, evidence: usize| {
            targets[at] = inputs[evidence];
            questions.push(Question { sequence: 0, at, evidence });
        };
        let (records, asked) = self.counts(seq_len);
        match self.kind {
            TaskKind::Mqar => {
                let keys = choose(&mut rng, alphabet.size, records);
                for (i, &key) in keys.iter().enumerate() {
                    inputs[2 * i] = alphabet.key(key);
                    inputs[2 * i + 1] = alphabet.value(below(&mut rng, alphabet.size));
                }
                // places of two tokens after the pairs, drawn without replacement by the power law
                let room = (seq_len - 2 * records) / 2;
                let mut weights: Vec<f64> = (1..=room).map(|gap| (gap as f64).powf(self.power - 1.0)).collect();
                let mut drawn: Vec<(usize, usize)> = Vec::with_capacity(records);
                for i in 0..records {
                    let mut left = rng.next_u64() as f64 / 2f64.powi(64) * weights.iter().sum::<f64>();
                    let mut place = weights.iter().position(|&w| w > 0.0).expect("there are more places than pairs");
                    for (j, &w) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                        place = j;
                        left -= w;
                        if left < 0.0 {
                            break;
                        }
                    }
                    weights[place] = 0.0;
                    drawn.push((2 * records + 2 * place, i));
                }
                drawn.sort_unstable();
                for (at, i) in drawn {
                    inputs[at] = inputs[2 * i];
                    ask(&mut targets, &inputs, at, 2 * i + 1);
                }
            }
            TaskKind::Recall | TaskKind::Needle | TaskKind::PhoneBook => {
                let (names, len) = (self.name_tokens(), self.record());
                let room = seq_len - asked * len;
                let starts = match self.kind {
                    TaskKind::PhoneBook => (0..records).map(|i| i * len).collect(),
                    _ => places(&mut rng, room, records, len),
                };
                let distinct = if names == 2 { alphabet.size * alphabet.size } else { alphabet.size };
                let keys = choose(&mut rng, distinct, records);
                for (&start, &key) in starts.iter().zip(&keys) {
                    inputs[start] = alphabet.key(key % alphabet.size);
                    if names == 2 {
                        inputs[start + 1] = alphabet.key(key / alphabet.size);
                    }
                    for j in 0..self.value_tokens {
                        inputs[start + names + j] = alphabet.value(below(&mut rng, alphabet.size));
                    }
                }
                for (i, record) in choose(&mut rng, records, asked).into_iter().enumerate() {
                    let (from, to) = (starts[record], room + i * len);
                    inputs.copy_within(from..from + len, to);
                    for j in 0..self.value_tokens {
                        ask(&mut targets, &inputs, to + names - 1 + j, from + names + j);
                    }
                }
            }
            TaskKind::SelectiveCopy | TaskKind::Sort => {
                let mark = seq_len - records - 1;
                let mut from = places(&mut rng, mark, records, 1);
                let values = choose(&mut rng, alphabet.size, records.min(alphabet.size));
                for (i, &at) in from.iter().enumerate() {
                    inputs[at] = alphabet.value(values[i]);
                }
                if self.kind == TaskKind::Sort {
                    from.sort_by_key(|&at| inputs[at]);
                }
                inputs[mark] = MARK;
                for (i, &evidence) in from.iter().enumerate() {
                    inputs[mark + 1 + i] = inputs[evidence];
                    ask(&mut targets, &inputs, mark + i, evidence);
                }
            }
        }
        Example { inputs, targets, questions }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(kind: TaskKind) -> Task {
        Task {
            kind,
            pairs: 6,
            queries: 3,
            value_tokens: 3,
            power: 0.01,
            share: 1.0,
            eval_lengths: vec![],
            eval_sequences: 1,
        }
    }

    const KINDS: [TaskKind; 6] = [
        TaskKind::Mqar,
        TaskKind::Recall,
        TaskKind::Needle,
        TaskKind::PhoneBook,
        TaskKind::SelectiveCopy,
        TaskKind::Sort,
    ];

    #[test]
    fn the_evidence_is_the_answer_and_lies_before_the_question() {
        for kind in KINDS {
            let task = task(kind);
            task.check(100, 64).unwrap();
            for number in 0..50 {
                let e = task.example(100, 64, 7, number);
                assert_eq!(e, task.example(100, 64, 7, number));
                let asked = e.targets.iter().filter(|&&t| t != IGNORE).count();
                assert_eq!(asked, e.questions.len(), "{kind:?}");
                assert!(asked > 0);
                for q in &e.questions {
                    assert!(q.evidence < q.at, "{kind:?}");
                    assert_eq!(e.targets[q.at], e.inputs[q.evidence], "{kind:?}");
                }
                assert!(e.inputs.iter().all(|&id| id < 64));
                let next = e.questions.windows(2).filter(|w| w[1].at == w[0].at + 1);
                // an answer is the next input where the next token is asked too
                for pair in next.filter(|_| kind != TaskKind::Mqar) {
                    assert_eq!(e.inputs[pair[1].at], e.targets[pair[0].at], "{kind:?}");
                }
            }
            assert_ne!(task.example(100, 64, 7, 0), task.example(100, 64, 8, 0));
        }
    }

    #[test]
    fn the_name_determines_the_answer() {
        for kind in [TaskKind::Recall, TaskKind::PhoneBook, TaskKind::Mqar] {
            let task = Task { value_tokens: 1, ..task(kind) };
            let names = task.name_tokens();
            for number in 0..50 {
                let e = task.example(90, 40, 3, number);
                for q in &e.questions {
                    let name = &e.inputs[q.at + 1 - names..=q.at];
                    let found: Vec<usize> = (names..q.evidence.max(names) + 40)
                        .filter(|&i| i < 90 && i <= q.at && e.inputs[i - names..i] == *name)
                        .collect();
                    assert_eq!(found[0], q.evidence, "{kind:?}: the first place after the name");
                }
            }
        }
    }

    #[test]
    fn sorted_answers_ascend_and_copied_ones_keep_their_order() {
        for number in 0..20 {
            let e = task(TaskKind::Sort).example(60, 64, 1, number);
            assert!(e.questions.windows(2).all(|w| e.targets[w[0].at] < e.targets[w[1].at]));
            let e = task(TaskKind::SelectiveCopy).example(60, 64, 1, number);
            assert!(e.questions.windows(2).all(|w| w[0].evidence < w[1].evidence));
        }
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let err = |t: Task, len, vocab| t.check(len, vocab).unwrap_err().1;
        assert!(err(task(TaskKind::Recall), 30, 64).contains("needs 36 tokens"));
        assert!(err(Task { queries: 7, ..task(TaskKind::Recall) }, 100, 64).contains("7 questions about 6 records"));
        assert!(err(task(TaskKind::Recall), 100, 16).contains("6 different names from 5 keys"));
        assert!(err(Task { share: 0.0, ..task(TaskKind::Sort) }, 100, 64).contains("above 0"));
    }
}
