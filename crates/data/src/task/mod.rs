//! Tasks with a known answer: synthetic sequences, made when they are needed from (seed, number), that know for every
//! answer which token of the context holds it. So an evaluation can tell "the router did not look there" from "it looked and
//! read wrong".
//!
//! | kind | sequence | asked |
//! |---|---|---|
//! | `mqar` | key value pairs, then the keys again at power-law gaps in noise (Arora et al. 2023, arXiv 2312.04927) | the value at each repeated key |
//! | `recall` | records `key v1 .. vm` scattered in noise, then `queries` of the keys | all m tokens |
//! | `needle` | one record in noise, then its key; with `distractors` the key has two tokens, and so many records more have one of them | all m tokens |
//! | `phone-book` | records `name name v1 .. vm` without gaps, as many as fit, then `queries` of the names | all m tokens |
//! | `selective-copy` | `pairs` tokens scattered in noise, then a mark | the tokens in order (Gu and Dao 2023, arXiv 2312.00752) |
//! | `sort` | `pairs` different tokens scattered in noise, then a mark | the tokens in ascending order |
//!
//! The settings of the MQAR paper are a vocabulary of 8192, power 0.01, and (length, pairs) of (64, 4), (128, 8), (256, 16) and
//! (512, 64); a larger power makes larger gaps.
//!
//! Of the vocabulary, token 0 is the mark and the rest is three equal ranges: keys, values, noise. Targets that are not
//! asked are [`IGNORE`] and have no loss.

mod identity;
mod mqar;
mod order;
mod records;
mod shortcut;

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::rng::{below, choose, stream};
use records::Records;
pub use shortcut::Shortcut;

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

impl TaskKind {
    /// As a configuration writes it.
    pub fn name(self) -> &'static str {
        match self {
            TaskKind::Mqar => "mqar",
            TaskKind::Recall => "recall",
            TaskKind::Needle => "needle",
            TaskKind::PhoneBook => "phone-book",
            TaskKind::SelectiveCopy => "selective-copy",
            TaskKind::Sort => "sort",
        }
    }
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
    /// Records of `needle` beside the one that is asked: their names have one of its name's two tokens, in turn the first and the second. 0: its name has one token.
    #[serde(default)]
    pub distractors: usize,
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

/// Longest sequence of a task, and the tokens of one evaluation at most: with their targets 2 GB.
const MOST_TOKENS: usize = 1 << 28;

const MARK: u32 = 0;

/// The three ranges of a vocabulary.
#[derive(Debug, Clone, Copy)]
struct Alphabet {
    size: usize,
}

impl Alphabet {
    fn of(vocab: usize) -> Self {
        Alphabet { size: vocab.saturating_sub(1) / 3 }
    }
    fn key(self, i: usize) -> u32 {
        1 + i as u32
    }
    fn value(self, i: usize) -> u32 {
        (1 + self.size + i) as u32
    }
    fn noise(self, rng: &mut ChaCha8Rng) -> u32 {
        (1 + 2 * self.size + below(rng, self.size)) as u32
    }
}

/// A sequence in the making: noise, of which nothing is asked.
struct Sequence {
    inputs: Vec<u32>,
    targets: Vec<u32>,
    questions: Vec<Question>,
}

impl Sequence {
    fn noise(rng: &mut ChaCha8Rng, alphabet: Alphabet, len: usize) -> Self {
        let inputs = (0..len).map(|_| alphabet.noise(rng)).collect();
        Sequence { inputs, targets: vec![IGNORE; len], questions: Vec::new() }
    }

    /// Asks at `at` for the token at `evidence`.
    fn ask(&mut self, at: usize, evidence: usize) {
        self.targets[at] = self.inputs[evidence];
        self.questions.push(Question { sequence: 0, at, evidence });
    }
}

/// Ascending starts of `count` pieces of `len` in `room` tokens, every placement equally likely up to order.
fn places(rng: &mut ChaCha8Rng, room: usize, count: usize, len: usize) -> Vec<usize> {
    let mut free: Vec<usize> = choose(rng, room - count * len + count, count);
    free.sort_unstable();
    free.iter().enumerate().map(|(i, at)| at + i * (len - 1)).collect()
}

/// What a check found: the key inside `[task]`, and what is wrong and would be right.
type Wrong = (&'static str, String);

impl Task {
    /// Records of a sequence, for the tasks that have some.
    fn records(&self, seq_len: usize) -> Records {
        let name = if self.kind == TaskKind::PhoneBook || self.distractors > 0 { 2 } else { 1 };
        let mut records = Records { name, value: self.value_tokens, count: 1, asked: 1 };
        match self.kind {
            TaskKind::Recall => {
                records.count = self.pairs;
                records.asked = if self.queries == 0 { self.pairs } else { self.queries };
            }
            TaskKind::Needle => records.count = self.distractors.saturating_add(1),
            TaskKind::PhoneBook => {
                records.asked = if self.queries == 0 { 4 } else { self.queries };
                records.count = (seq_len / records.len()).saturating_sub(records.asked);
            }
            _ => {}
        }
        records
    }

    /// Says what no sequence can be made from, and keys that mean nothing to the kind.
    ///
    /// # Errors
    /// (key, what is wrong and what would be right).
    pub fn check(&self, seq_len: usize, vocab: usize) -> Result<(), Wrong> {
        self.check_meaning()?;
        self.check_ranges(seq_len)?;
        self.check_room(seq_len, vocab)
    }

    /// A key that the kind does not read has to have its default, which a resolved configuration writes out.
    fn check_meaning(&self) -> Result<(), Wrong> {
        let records = matches!(self.kind, TaskKind::Recall | TaskKind::Needle | TaskKind::PhoneBook);
        let unread = [
            ("pairs", self.pairs != eight() && matches!(self.kind, TaskKind::Needle | TaskKind::PhoneBook)),
            ("queries", self.queries != 0 && !matches!(self.kind, TaskKind::Recall | TaskKind::PhoneBook)),
            ("distractors", self.distractors != 0 && self.kind != TaskKind::Needle),
            ("value_tokens", self.value_tokens != one() && !records),
            ("power", self.power != power() && self.kind != TaskKind::Mqar),
        ];
        match unread.iter().find(|(_, set)| *set) {
            Some((key, _)) => Err((key, format!("means nothing to kind \"{}\"; remove it", self.kind.name()))),
            None => Ok(()),
        }
    }

    fn check_ranges(&self, seq_len: usize) -> Result<(), Wrong> {
        for (key, n) in
            [("pairs", self.pairs), ("value_tokens", self.value_tokens), ("eval_sequences", self.eval_sequences)]
        {
            if n == 0 {
                return Err((key, "is 0; it must be at least 1".into()));
            }
        }
        if !(self.power > 0.0 && self.power <= 16.0) {
            return Err(("power", format!("{:?} is not above 0 and at most 16", self.power)));
        }
        if !(self.share > 0.0 && self.share <= 1.0) {
            return Err(("share", format!("{:?} is not above 0 and at most 1", self.share)));
        }
        if self.eval_sequences.saturating_mul(seq_len) > MOST_TOKENS {
            let most = MOST_TOKENS / seq_len.max(1);
            let what = match most {
                0 => format!("sequences of {seq_len} tokens are above the {MOST_TOKENS} tokens of an evaluation"),
                _ => format!(
                    "{} sequences of {seq_len} tokens are above the {MOST_TOKENS} tokens of an evaluation; use {most} at most",
                    self.eval_sequences
                ),
            };
            return Err(("eval_sequences", what));
        }
        Ok(())
    }

    /// Whether the sequence has room for what it should hold and the vocabulary for its names.
    fn check_room(&self, seq_len: usize, vocab: usize) -> Result<(), Wrong> {
        let size = Alphabet::of(vocab).size;
        let r = self.records(seq_len);
        let (key, need, names) = match self.kind {
            TaskKind::Mqar => ("pairs", self.pairs.saturating_mul(4), self.pairs),
            TaskKind::Recall => ("pairs", r.count.saturating_add(r.asked).saturating_mul(r.len()), r.count),
            TaskKind::Needle if self.distractors > 0 => {
                ("distractors", r.count.saturating_add(1).saturating_mul(r.len()), r.count / 2 + 1)
            }
            TaskKind::Needle => ("value_tokens", r.len().saturating_mul(2), r.count),
            TaskKind::PhoneBook => ("queries", r.asked.saturating_mul(2).saturating_mul(r.len()), r.count),
            TaskKind::SelectiveCopy | TaskKind::Sort => {
                ("pairs", self.pairs.saturating_mul(2).saturating_add(1), self.pairs)
            }
        };
        if need > seq_len {
            return Err((key, format!("a sequence needs {need} tokens, but a length of {seq_len} is asked for")));
        }
        if r.asked > r.count {
            let what = format!("{} questions about {} records; each is asked once at most", r.asked, r.count);
            return Err(("queries", what));
        }
        let distinct = if self.kind == TaskKind::PhoneBook { size.saturating_mul(size) } else { size };
        if names > distinct {
            let what =
                format!("{names} different names from {size} keys (a third of the vocabulary); raise data.vocab_size");
            return Err((key, what));
        }
        Ok(())
    }

    /// Sequence number `number` of a seed; the same at every call. The sizes were checked.
    pub fn example(&self, seq_len: usize, vocab: usize, seed: u64, number: u64) -> Example {
        let mut rng = stream(seed, number.wrapping_add(1 << 32));
        let (rng, alphabet) = (&mut rng, Alphabet::of(vocab));
        let mut s = Sequence::noise(rng, alphabet, seq_len);
        let records = self.records(seq_len);
        match self.kind {
            TaskKind::Mqar => mqar::fill(&mut s, rng, alphabet, self.pairs, self.power),
            TaskKind::Recall => records.recall(&mut s, rng, alphabet),
            TaskKind::Needle => records.needle(&mut s, rng, alphabet),
            TaskKind::PhoneBook => records.phone_book(&mut s, rng, alphabet),
            TaskKind::SelectiveCopy => order::selective_copy(&mut s, rng, alphabet, self.pairs),
            TaskKind::Sort => order::sort(&mut s, rng, alphabet, self.pairs),
        }
        Example { inputs: s.inputs, targets: s.targets, questions: s.questions }
    }
}

#[cfg(test)]
mod tests;
