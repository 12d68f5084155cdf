//! Which text validates: a share of the bytes, whatever the sizes of the documents.
//!
//! Documents that are small against the wanted share are chosen by a hash of their content, so that equal ones are never on both sides;
//! the threshold is where the bytes of the chosen ones come closest to the share. Larger ones are cut: the end of each validates.

use super::text::WHOLE;

/// Buckets of the hash: the threshold is one of their borders.
const BUCKETS: usize = 1 << 14;
/// Documents of 1, 2, 4, .. [`WHOLE`] bytes at most.
const CLASSES: usize = WHOLE.ilog2() as usize + 1;

/// Bytes by size class and hash, in memory that does not grow with the corpus.
pub(crate) struct Histogram {
    bytes: Vec<u64>,
    total: u64,
}

fn bucket(hash: u64) -> usize {
    (hash >> (64 - BUCKETS.ilog2())) as usize
}

impl Histogram {
    pub fn new() -> Self {
        Histogram { bytes: vec![0; BUCKETS * CLASSES], total: 0 }
    }

    /// Adds a document by the hash of its content and its size.
    pub fn add(&mut self, hash: u64, len: u64) {
        self.total += len;
        let class = len.max(1).next_power_of_two().ilog2() as usize;
        if class < CLASSES {
            self.bytes[class * BUCKETS + bucket(hash)] += len;
        }
    }

    /// The split whose validation is nearest to `share` of the bytes.
    pub fn split(&self, share: f64) -> Split {
        let wanted = self.total as f64 * share;
        // half: the nearest choice of whole documents is off by a quarter of the share at most
        let largest = ((wanted / 2.0) as u64).min(WHOLE);
        let largest: u64 = if largest == 0 { 0 } else { 1 << largest.ilog2() };
        let classes = if largest == 0 { 0 } else { largest.ilog2() as usize + 1 };
        let of_bucket = |b: usize| (0..classes).map(|c| self.bytes[c * BUCKETS + b]).sum::<u64>();
        let small: u64 = (0..BUCKETS).map(of_bucket).sum();
        let wanted = small as f64 * share;
        let (mut sum, mut below, mut best) = (0, 0, f64::MAX);
        for b in 0..=BUCKETS {
            let off = (sum as f64 - wanted).abs();
            if off < best {
                (below, best) = (b, off);
            }
            sum += if b < BUCKETS { of_bucket(b) } else { 0 };
        }
        Split { share, largest, below }
    }
}

/// Decides for a document, and for the bytes of one that is cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Split {
    share: f64,
    /// documents of more bytes are cut
    largest: u64,
    /// buckets below validate
    below: usize,
}

/// The half of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// All of it trains.
    Train,
    /// All of it validates.
    Validation,
    /// It is parted near this byte: the rest validates.
    Parted(u64),
}

impl Split {
    /// Whether documents of this size are parted, whatever they hold.
    pub fn parts(&self, len: u64) -> bool {
        len > self.largest
    }

    /// The half of a document.
    pub fn half(&self, hash: u64, len: u64, assigned: Option<bool>) -> Half {
        match assigned {
            Some(true) => Half::Validation,
            Some(false) => Half::Train,
            None if self.parts(len) => Half::Parted(len - (len as f64 * self.share) as u64),
            None if bucket(hash) < self.below => Half::Validation,
            None => Half::Train,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xxhash_rust::xxh3::xxh3_64;

    /// Share of the bytes that validates.
    fn share(lens: &[u64], wanted: f64) -> f64 {
        let hash = |i: usize| xxh3_64(&i.to_le_bytes());
        let mut h = Histogram::new();
        lens.iter().enumerate().for_each(|(i, &n)| h.add(hash(i), n));
        let split = h.split(wanted);
        let validation: u64 = lens
            .iter()
            .enumerate()
            .map(|(i, &n)| match split.half(hash(i), n, None) {
                Half::Train => 0,
                Half::Validation => n,
                Half::Parted(at) => n - at,
            })
            .sum();
        validation as f64 / lens.iter().sum::<u64>() as f64
    }

    #[test]
    fn validation_has_its_share_whatever_the_sizes() {
        let even = vec![1000; 5000];
        let one = vec![1_000_000];
        let book_and_note = vec![36_000, 5_000];
        let skewed: Vec<u64> = (1..3000).map(|i| 30_000_000 / (i * i) + 1).collect();
        let many_small: Vec<u64> = (0..100_000).map(|i| 20 + i % 300).collect();
        for (name, lens) in
            [("even", even), ("one", one), ("two", book_and_note), ("skewed", skewed), ("small", many_small)]
        {
            for wanted in [0.05, 0.01, 0.2] {
                let got = share(&lens, wanted);
                let most = if ["even", "small"].contains(&name) { 0.02 } else { 0.25 };
                assert!((got / wanted - 1.0).abs() <= most, "{name}: {got} of {wanted}");
            }
        }
    }

    #[test]
    fn equal_documents_are_on_one_side() {
        let mut h = Histogram::new();
        (0..4000u64).for_each(|i| h.add(xxh3_64(&(i % 2000).to_le_bytes()), 500));
        let split = h.split(0.05);
        let half = |i: u64| split.half(xxh3_64(&(i % 2000).to_le_bytes()), 500, None);
        assert!((0..2000).all(|i| half(i) == half(i + 2000) && half(i) != Half::Parted(475)));
        assert!((0..2000).any(|i| half(i) == Half::Validation));
    }
}
