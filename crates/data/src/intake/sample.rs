//! The text that a vocabulary is learned from: pieces from all over the corpus, so many bytes in all, in one pass and in memory that
//! does not grow with it.

use xxhash_rust::xxh3::xxh3_64;

use super::pieces;
use super::split::{Half, Split};

/// Bytes of a piece at most.
const PIECE: usize = 16 << 10;

/// A piece and the document that it is from.
struct Candidate {
    number: u64,
    hash: u64,
    len: u64,
    at: u64,
    assigned: Option<bool>,
    text: String,
}

/// Pieces whose number has a small hash; the bound is halved when there are too many bytes.
pub(crate) struct Sample {
    wanted: usize,
    /// bytes of a piece at most
    piece: usize,
    bound: u64,
    number: u64,
    bytes: usize,
    kept: Vec<Candidate>,
    /// the first piece of the document that is being read
    first: usize,
}

fn key(number: u64) -> u64 {
    xxh3_64(&number.to_le_bytes())
}

impl Sample {
    /// Will hold up to `wanted` bytes.
    pub fn new(wanted: usize) -> Self {
        // enough of them that a sample of the smallest size is one
        let piece = (wanted / 16).clamp(64, PIECE);
        Sample { wanted, piece, bound: u64::MAX, number: 0, bytes: 0, kept: Vec::new(), first: 0 }
    }

    /// A document begins.
    pub fn begin(&mut self) {
        self.first = self.kept.len();
    }

    /// Offers a part of the document, which begins at byte `at` of it.
    pub fn offer(&mut self, at: u64, text: &str) {
        for (offset, piece) in pieces::cut_to(text, self.piece) {
            self.number += 1;
            if key(self.number) <= self.bound {
                self.bytes += piece.len();
                let (number, at) = (self.number, at + offset as u64);
                self.kept.push(Candidate { number, hash: 0, len: 0, at, assigned: None, text: piece.to_string() });
            }
        }
        while self.bytes > self.wanted.saturating_mul(2) {
            self.bound /= 2;
            let (bound, first) = (self.bound, self.first);
            let mut before = 0;
            let mut index = 0;
            self.kept.retain(|c| {
                let keep = key(c.number) <= bound;
                before += usize::from(keep && index < first);
                index += 1;
                keep
            });
            self.first = before;
            self.bytes = self.kept.iter().map(|c| c.text.len()).sum();
        }
    }

    /// The document ended: what its half will be decided by.
    pub fn end(&mut self, hash: u64, len: u64, assigned: Option<bool>) {
        for c in &mut self.kept[self.first..] {
            (c.hash, c.len, c.assigned) = (hash, len, assigned);
        }
    }

    /// The pieces that train, up to the wanted bytes, in the order of the corpus.
    pub fn texts(mut self, split: &Split) -> Vec<String> {
        self.kept.retain_mut(|c| match split.half(c.hash, c.len, c.assigned) {
            Half::Train => true,
            Half::Validation => false,
            Half::Parted(at) => {
                c.text.truncate(pieces::floor(&c.text, at.saturating_sub(c.at) as usize));
                !c.text.is_empty()
            }
        });
        self.kept.sort_unstable_by_key(|c| key(c.number));
        let mut bytes = 0;
        let within = self.kept.iter().take_while(|c| {
            bytes += c.text.len();
            bytes <= self.wanted
        });
        let count = within.count();
        self.kept.truncate(count);
        self.kept.sort_unstable_by_key(|c| c.number);
        self.kept.into_iter().map(|c| c.text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::split::Histogram;
    use super::*;

    fn sample(documents: &[String], wanted: usize) -> Vec<String> {
        let (mut s, mut h) = (Sample::new(wanted), Histogram::new());
        for d in documents {
            let hash = xxh3_64(d.as_bytes());
            s.begin();
            s.offer(0, d);
            s.end(hash, d.len() as u64, None);
            h.add(hash, d.len() as u64);
            assert!(s.bytes <= 2 * wanted);
        }
        s.texts(&h.split(0.05))
    }

    #[test]
    fn a_large_file_behind_small_ones_has_its_share_of_the_sample() {
        // README, corpus, notes: by documents, the corpus would have a third of the sample, or nothing
        let corpus = "the corpus has words of its own ".repeat(60_000);
        let documents = ["README SAYS ".repeat(5_000), corpus, "notes say ".repeat(100)];
        let texts = sample(&documents, 200_000);
        let bytes: usize = texts.iter().map(String::len).sum();
        assert!((150_000..=200_000).contains(&bytes), "{bytes}");
        let of_corpus: usize = texts.iter().filter(|t| t.contains("corpus")).map(String::len).sum();
        assert!(of_corpus * 10 > bytes * 9, "{of_corpus} of {bytes}");
    }

    #[test]
    fn a_small_corpus_is_used_up_but_for_its_validation() {
        let documents = ["one two three four five\n".repeat(1000)];
        let bytes: usize = sample(&documents, 1 << 20).iter().map(String::len).sum();
        assert!(bytes * 100 >= documents[0].len() * 90 && bytes * 100 <= documents[0].len() * 95, "{bytes}");
    }
}
