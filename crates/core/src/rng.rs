//! Random numbers whose stream is part of the file format: ChaCha8 from `rand_chacha`, with shuffling and normals of our
//! own, because `rand` changed its own shuffle between releases and a checkpoint has to outlive that.

use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A seeded stream. Its state is (seed, stream, position), so it resumes exactly.
#[derive(Debug, Clone)]
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Rng(ChaCha8Rng::seed_from_u64(seed))
    }

    /// An independent stream of the same seed, for example one per parameter, so that adding a parameter moves no other.
    pub fn stream(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Rng(rng)
    }

    /// Position in the stream, in 32-bit words.
    pub fn position(&self) -> u128 {
        self.0.get_word_pos()
    }

    /// Continues from a position.
    pub fn seek(&mut self, position: u128) {
        self.0.set_word_pos(position);
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n by the high half of a product: the bias is below n / 2^64.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "below(0) has no value to give");
        ((self.bits() as u128 * n as u128) >> 64) as usize
    }

    /// Standard normal (Box-Muller, the cosine branch).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Fisher-Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_pinned() {
        // A change here breaks the data order of every existing checkpoint.
        let mut rng = Rng::new(42);
        let mut order: Vec<u32> = (0..8).collect();
        rng.shuffle(&mut order);
        assert_eq!((order, rng.bits()), (vec![4, 7, 0, 1, 3, 2, 6, 5], 14_828_835_203_913_492_612));
        // ln and cos come from the platform's math library: equal to the last digit or two
        assert!((rng.normal() - 0.123_084_125_431_102_48).abs() < 1e-15);
    }

    #[test]
    fn seek_resumes() {
        let mut a = Rng::stream(7, 3);
        for _ in 0..13 {
            a.bits();
        }
        let mut b = Rng::stream(7, 3);
        b.seek(a.position());
        assert_eq!(a.bits(), b.bits());
        assert_ne!(Rng::stream(7, 3).bits(), Rng::stream(7, 4).bits());
    }

    #[test]
    fn normals_have_unit_variance() {
        let mut rng = Rng::new(1);
        let x: Vec<f64> = (0..100_000).map(|_| rng.normal()).collect();
        let mean = x.iter().sum::<f64>() / 1e5;
        let var = x.iter().map(|v| v * v).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.015 && (var - 1.0).abs() < 0.02, "{mean} {var}");
    }
}
