//! What a model reaches on a task without ever matching a key: it knows the values of the context, crosses off those that
//! answers have shown since, and names the most frequent of the rest.

use super::{Alphabet, Example, Task};

/// Accuracy without matching a key.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortcut {
    /// Over all questions.
    pub accuracy: f64,
    /// By the number of the question in its sequence.
    pub by_question: Vec<f64>,
}

/// Tokens that are simulated at least, and the sequences that are enough: the standard error of 4096 sequences is below 0.008 for a single
/// question.
const TOKENS: usize = 1 << 19;
const SEQUENCES: usize = 4096;

/// Values of the context, each of `tokens` tokens: in a record behind its key, elsewhere every token of the range.
fn values(e: &Example, alphabet: Alphabet, tokens: usize) -> Vec<&[u32]> {
    let context = e.questions.first().map_or(0, |q| q.at + 1);
    let is_value = |id: u32| id >= alphabet.value(0) && id < alphabet.value(alphabet.size);
    let starts = |i: usize| {
        let whole = i + tokens <= context && e.inputs[i..i + tokens].iter().all(|&id| is_value(id));
        whole && (tokens == 1 || i > 0 && !is_value(e.inputs[i - 1]))
    };
    (0..context).filter(|&i| starts(i)).map(|i| &e.inputs[i..i + tokens]).collect()
}

/// The chance that the guess is right: 1 over the most frequent tokens if the answer is one of them, else 0.
fn chance(left: &[&[u32]], shown: &[u32], answer: u32) -> f64 {
    let mut counts = std::collections::BTreeMap::<u32, usize>::new();
    for value in left.iter().filter(|v| v.starts_with(shown)) {
        *counts.entry(value[shown.len()]).or_default() += 1;
    }
    let most = counts.values().copied().max().unwrap_or(0);
    let best = counts.values().filter(|&&n| n == most).count();
    if most > 0 && counts.get(&answer) == Some(&most) { 1.0 / best as f64 } else { 0.0 }
}

/// Chances of all questions of a sequence, in order.
fn chances(e: &Example, alphabet: Alphabet, tokens: usize) -> Vec<f64> {
    let mut left = values(e, alphabet, tokens);
    let mut out = Vec::with_capacity(e.questions.len());
    for answer in e.questions.chunks(tokens) {
        let whole: Vec<u32> = answer.iter().map(|q| e.targets[q.at]).collect();
        out.extend((0..whole.len()).map(|j| chance(&left, &whole[..j], whole[j])));
        let told = answer.iter().zip(&whole).all(|(q, &id)| e.inputs.get(q.at + 1) == Some(&id));
        if let Some(i) = left.iter().position(|v| told && **v == *whole) {
            left.swap_remove(i);
        }
    }
    out
}

impl Task {
    /// What a model reaches at a length that never matches a key: simulated, the same at every call. The sizes were checked.
    pub fn shortcut(&self, seq_len: usize, vocab: usize) -> Shortcut {
        let sequences = (TOKENS / seq_len.max(1)).clamp(1, SEQUENCES);
        let (mut by_question, mut sum) = (Vec::<f64>::new(), 0.0);
        for number in 0..sequences {
            let e = self.example(seq_len, vocab, SEED, number as u64);
            for (i, chance) in chances(&e, Alphabet::of(vocab), self.value_tokens).into_iter().enumerate() {
                if i == by_question.len() {
                    by_question.push(0.0);
                }
                by_question[i] += chance;
                sum += chance;
            }
        }
        let questions = (sequences * by_question.len()).max(1) as f64;
        by_question.iter_mut().for_each(|sum| *sum /= sequences as f64);
        Shortcut { accuracy: sum / questions, by_question }
    }
}

/// Of the simulated sequences.
const SEED: u64 = 0x5407;

#[cfg(test)]
mod tests {
    use super::super::{TaskKind, tests::task};
    use super::*;

    fn recall(pairs: usize, queries: usize) -> Task {
        Task { pairs, queries, value_tokens: 1, ..task(TaskKind::Recall) }
    }

    fn close(got: f64, want: f64, error: f64) {
        assert!((got - want).abs() <= error, "{got}, not {want}");
    }

    /// docs/results/recompute.py simulates the same rule on counts of values, without sequences: 200,000 draws.
    #[test]
    fn a_question_for_every_record_gives_the_last_answer_away() {
        let s = recall(8, 8).shortcut(64, 31);
        // the error of 4096 sequences is 0.5 / 64
        for (got, want) in s.by_question.iter().zip([0.30, 0.32, 0.33, 0.36, 0.38, 0.43, 0.55, 1.00]) {
            close(*got, want, 0.02);
        }
        assert_eq!((s.by_question.len(), s.by_question[7]), (8, 1.0));
        close(s.accuracy, 0.459, 0.008);
    }

    #[test]
    fn fewer_questions_and_more_values_leave_little() {
        let s = recall(16, 4).shortcut(64, 301);
        close(s.accuracy, 0.115, 0.01);
        assert!(s.by_question.iter().all(|&a| a < 0.14), "{s:?}");
        // one record: its value is the only one there is
        assert_eq!(recall(1, 1).shortcut(64, 301).accuracy, 1.0);
    }

    /// `K v K v noise, K v K ..`: with two tokens a value, the first is guessed, and told the second follows where first tokens differ.
    #[test]
    fn values_of_several_tokens_are_guessed_token_by_token() {
        let of = |e: Example| chances(&e, Alphabet { size: 10 }, 2);
        let example = |inputs: &[u32], questions: &[(usize, usize)]| {
            let mut targets = vec![super::super::IGNORE; inputs.len()];
            let ask = |&(at, evidence): &(usize, usize)| super::super::Question { sequence: 0, at, evidence };
            questions.iter().for_each(|&(at, evidence)| targets[at] = inputs[evidence]);
            Example { inputs: inputs.to_vec(), targets, questions: questions.iter().map(ask).collect() }
        };
        // keys 1 to 10, values 11 to 20
        let e = example(&[1, 11, 12, 25, 2, 13, 14, 2, 13, 14, 1, 11, 12], &[(7, 5), (8, 6), (10, 1), (11, 2)]);
        assert_eq!(of(e), [0.5, 1.0, 1.0, 1.0]);
        let e = example(&[1, 11, 12, 25, 2, 11, 14, 2, 11, 14], &[(7, 5), (8, 6)]);
        assert_eq!(of(e), [1.0, 0.5], "both begin alike");
    }

    #[test]
    fn what_no_answer_shows_is_not_crossed_off_and_order_is_no_key() {
        let mqar = Task { pairs: 4, ..task(TaskKind::Mqar) }.shortcut(64, 301);
        // of 4 values of 100, hardly ever equal: a quarter at every question
        mqar.by_question.iter().for_each(|&a| close(a, 0.265, 0.03));
        // 6 different tokens, each shown when it was asked for
        for kind in [TaskKind::Sort, TaskKind::SelectiveCopy] {
            let s = task(kind).shortcut(64, 61);
            for (i, &a) in s.by_question.iter().enumerate() {
                close(a, 1.0 / (6 - i) as f64, 1e-9);
            }
        }
        // the value of a needle is the only one in the text
        let needle = Task { value_tokens: 1, ..task(TaskKind::Needle) };
        assert_eq!(needle.shortcut(64, 61).accuracy, 1.0);
        // of 4 draws from 10: all different 0.504, one pair 0.432, two pairs 0.027, three alike 0.036, four alike 0.001; the guess is
        // right in 1/4, 1/2, 1/2, 3/4 and all of them
        close(Task { distractors: 3, ..needle }.shortcut(64, 31).accuracy, 0.3835, 0.02);
    }
}
