//! Exact inference on paired differences: the sign-flip test and the intervals that belong to it.
//!
//! If the differences are symmetric about c, flipping the sign of any of them about c is as likely as what was seen. Flipping a set S
//! gives a larger or equal sum exactly when the mean of S is at most c. So everything follows from the sorted means of all 2^n - 1
//! non-empty subsets (Hartigan 1969, "Using subsample values as typical values", JASA 64): a one-sided p is a count of them, and
//! the k-th smallest and k-th largest bound an interval of level 1 - 2k / 2^n.

use super::interval::Interval;

/// More pairs than this are not enumerated: 2^20 subsets are 8 MB.
const MOST_PAIRS: usize = 20;

/// Means of all non-empty subsets of some differences, ascending.
#[derive(Debug, Clone)]
pub struct SubsetMeans {
    sorted: Vec<f64>,
    /// numbers closer than this are the same: sums in another order
    tolerance: f64,
    zeros: usize,
    n: usize,
}

impl SubsetMeans {
    /// Of 1 to [`MOST_PAIRS`] differences; none of other numbers of them.
    pub fn of(differences: &[f64]) -> Option<Self> {
        let n = differences.len();
        if !(1..=MOST_PAIRS).contains(&n) || differences.iter().any(|d| !d.is_finite()) {
            return None;
        }
        let mut sums = vec![0.0f64; 1 << n];
        for set in 1..sums.len() {
            sums[set] = sums[set & (set - 1)] + differences[set.trailing_zeros() as usize];
        }
        let mut sorted: Vec<f64> = (1..sums.len()).map(|set| sums[set] / set.count_ones() as f64).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let tolerance = 1e-12 * differences.iter().fold(0.0f64, |m, d| m.max(d.abs()));
        let zeros = differences.iter().filter(|d| d.abs() <= tolerance).count();
        Some(SubsetMeans { sorted, tolerance, zeros, n })
    }

    fn share(&self, count: usize) -> f64 {
        // the empty set flips nothing
        (1 + count) as f64 / 2f64.powi(self.n as i32)
    }

    /// One-sided p of "not above c": small when the differences lie above it.
    pub fn p_above(&self, c: f64) -> f64 {
        self.share(self.sorted.partition_point(|m| *m <= c + self.tolerance))
    }

    /// One-sided p of "not below c".
    pub fn p_below(&self, c: f64) -> f64 {
        self.share(self.sorted.len() - self.sorted.partition_point(|m| *m < c - self.tolerance))
    }

    /// Two-sided p of "symmetric about zero".
    pub fn p(&self) -> f64 {
        (2.0 * self.p_above(0.0).min(self.p_below(0.0))).min(1.0)
    }

    /// The smallest two-sided p that so many differences can give. One of zero can be flipped without a change.
    pub fn attainable(&self) -> f64 {
        2f64.powi(1 + self.zeros as i32 - self.n as i32).min(1.0)
    }

    /// p of "not equivalent": the larger of the one-sided p against -margin and margin.
    pub fn p_equivalent(&self, margin: f64) -> f64 {
        self.p_above(-margin).max(self.p_below(margin))
    }

    /// The narrowest interval of at least this level; the range of the differences, with its own level, where so few of them have
    /// none.
    pub fn interval(&self, level: f64) -> Interval {
        let all = 2f64.powi(self.n as i32);
        let k = (((1.0 - level) * all / 2.0 + 1e-9).floor() as usize).max(1);
        let last = self.sorted.len() - 1;
        Interval { low: self.sorted[k - 1], high: self.sorted[last + 1 - k], level: 1.0 - 2.0 * k as f64 / all }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Darwin's maize, crossed minus selfed, in eighths of an inch (Fisher, The Design of Experiments, 1935, section 21): 863 of
    /// the 32768 arrangements have a sum of at least 314, so p = 1726 / 32768 = 0.0527.
    const MAIZE: [f64; 15] = [49.0, -67.0, 8.0, 16.0, 6.0, 23.0, 28.0, 41.0, 14.0, 29.0, 56.0, 24.0, 75.0, 60.0, -48.0];

    #[test]
    fn fishers_count_of_darwins_maize() {
        let s = SubsetMeans::of(&MAIZE).unwrap();
        assert_eq!(s.p_above(0.0) * 32768.0, 863.0);
        assert_eq!(s.p() * 32768.0, 1726.0);
        assert_eq!(s.attainable(), 2.0 / 32768.0);
    }

    #[test]
    fn what_is_enumerated_is_what_flipping_gives() {
        let d = [0.3, -0.1, 0.25, 0.4, 0.0, 0.05];
        let total: f64 = d.iter().sum();
        let flipped =
            |set: usize| d.iter().enumerate().map(|(i, x)| if set >> i & 1 == 1 { -x } else { *x }).sum::<f64>();
        let as_far = (0..64).filter(|&set| flipped(set).abs() >= total - 1e-12).count();
        let s = SubsetMeans::of(&d).unwrap();
        assert_eq!(s.p(), as_far as f64 / 64.0);
        assert_eq!(s.attainable(), 4.0 / 64.0);
    }

    /// Smallest two-sided p of n pairs: 3 pairs 0.25, 5 pairs 0.0625, 6 pairs 0.03125.
    #[test]
    fn few_pairs_cannot_decide() {
        for (n, least) in [(3, 0.25), (5, 0.0625), (6, 0.03125)] {
            let s = SubsetMeans::of(&vec![1.0; n]).unwrap();
            assert_eq!((s.p(), s.attainable()), (least, least));
        }
        assert_eq!(SubsetMeans::of(&[0.0; 4]).unwrap().p(), 1.0);
        assert!(SubsetMeans::of(&[]).is_none() && SubsetMeans::of(&[1.0; 21]).is_none());
    }

    /// An interval is what the test does not reject.
    #[test]
    fn the_interval_is_the_test_turned_around() {
        let s = SubsetMeans::of(&MAIZE).unwrap();
        let i = s.interval(0.95);
        assert!(i.level >= 0.95 && i.level < 0.9502, "{i:?}");
        let p = |c: f64| 2.0 * s.p_above(c).min(s.p_below(c));
        assert!(
            p(i.low - 1e-6) <= 0.05 && p(i.low + 1e-6) > 0.05 && p(i.high - 1e-6) > 0.05 && p(i.high + 1e-6) <= 0.05
        );
        // zero is inside, because p is above 0.05
        assert!(i.low < 0.0 && i.high > 0.0);
        let few = SubsetMeans::of(&[1.0, 2.0, 4.0]).unwrap().interval(0.95);
        assert_eq!(few, Interval { low: 1.0, high: 4.0, level: 0.75 });
    }

    /// Two one-sided tests: five differences inside the margin give at least 1/32, and one outside spoils it.
    #[test]
    fn equivalence_is_two_tests() {
        let s = SubsetMeans::of(&[0.01, -0.02, 0.0, 0.015, -0.005]).unwrap();
        assert_eq!(s.p_equivalent(0.05), 1.0 / 32.0);
        assert!(SubsetMeans::of(&[0.01, -0.02, 0.0, 0.06, -0.005]).unwrap().p_equivalent(0.05) > 1.0 / 32.0);
        assert!(s.p_equivalent(0.001) > 0.3);
    }
}
