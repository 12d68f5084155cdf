//! Records of a name and a value, and questions by name: recall, needle, phone book.

use rand_chacha::ChaCha8Rng;

use super::{Alphabet, Sequence, places};
use crate::rng::{below, choose};

/// Sizes of the records of a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Records {
    /// Tokens of a name: 1 or 2.
    pub name: usize,
    /// Tokens of a value.
    pub value: usize,
    /// Records.
    pub count: usize,
    /// Questions, at the end of the sequence.
    pub asked: usize,
}

impl Records {
    /// Tokens of a record.
    pub fn len(self) -> usize {
        self.name.saturating_add(self.value)
    }

    /// Tokens before the questions.
    fn room(self, s: &Sequence) -> usize {
        s.inputs.len() - self.asked * self.len()
    }

    /// Records anywhere.
    pub fn recall(self, s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet) {
        let starts = places(rng, self.room(s), self.count, self.len());
        self.fill(s, rng, alphabet, &starts);
    }

    /// One record anywhere; with distractors a name of two tokens, and each distractor anywhere, too, with one of them in its place: in turn the
    /// first and the second.
    pub fn needle(self, s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet) {
        if self.count == 1 {
            return self.recall(s, rng, alphabet);
        }
        let starts = places(rng, self.room(s), self.count, self.len());
        // the first of each is the needle's
        let [first, second] = [self.count.div_ceil(2), self.count / 2 + 1].map(|n| choose(rng, alphabet.size, n));
        let order = choose(rng, self.count, self.count);
        for (i, &record) in order.iter().enumerate() {
            // 1 keeps the first token, 2 the second, 3 the first
            let (x, y) = if i % 2 == 1 { (0, i.div_ceil(2)) } else { (i / 2, 0) };
            let start = starts[record];
            s.inputs[start] = alphabet.key(first[x]);
            s.inputs[start + 1] = alphabet.key(second[y]);
            for j in 0..self.value {
                s.inputs[start + 2 + j] = alphabet.value(below(rng, alphabet.size));
            }
        }
        self.question(s, 0, starts[order[0]]);
    }

    /// Records without gaps.
    pub fn phone_book(self, s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet) {
        let starts: Vec<usize> = (0..self.count).map(|i| i * self.len()).collect();
        self.fill(s, rng, alphabet, &starts);
    }

    /// Writes the records at their starts and the questions at the end.
    fn fill(self, s: &mut Sequence, rng: &mut ChaCha8Rng, alphabet: Alphabet, starts: &[usize]) {
        let names = self.name;
        let distinct = if names == 2 { alphabet.size * alphabet.size } else { alphabet.size };
        let keys = choose(rng, distinct, self.count);
        for (&start, &key) in starts.iter().zip(&keys) {
            s.inputs[start] = alphabet.key(key % alphabet.size);
            if names == 2 {
                s.inputs[start + 1] = alphabet.key(key / alphabet.size);
            }
            for j in 0..self.value {
                s.inputs[start + names + j] = alphabet.value(below(rng, alphabet.size));
            }
        }
        for (i, record) in choose(rng, self.count, self.asked).into_iter().enumerate() {
            self.question(s, i, starts[record]);
        }
    }

    /// Question `i` about the record that starts at `from`.
    fn question(self, s: &mut Sequence, i: usize, from: usize) {
        let to = self.room(s) + i * self.len();
        s.inputs.copy_within(from..from + self.len(), to);
        for j in 0..self.value {
            s.ask(to + self.name - 1 + j, from + self.name + j);
        }
    }
}
