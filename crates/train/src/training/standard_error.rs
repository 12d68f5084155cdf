//! How far the mean of a sample may be from that of all texts or questions of its kind.

/// Standard error of a mean over tokens or questions, from the sum and the number of each sequence: those of one sequence vary together, so
/// that sequences are what is independent. With mean m, sums s and numbers n of k sequences it is
/// `sqrt(k / (k - 1) sum (s - m n)^2) / sum n`; none where fewer than two of them have anything: the mean would be that of the one, without a residual.
pub fn standard_error(sequences: &[(f64, f64)]) -> Option<f64> {
    let k = sequences.len() as f64;
    let (sum, count) = sequences.iter().fold((0.0, 0.0), |(s, n), x| (s + x.0, n + x.1));
    let squares: f64 = sequences.iter().map(|(s, n)| (s - sum / count * n).powi(2)).sum();
    let with = sequences.iter().filter(|(_, n)| *n > 0.0).count();
    (with >= 2).then(|| (k / (k - 1.0) * squares).sqrt() / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_mean_counts_sequences_and_not_tokens() {
        // four tokens a sequence, all alike: as many independent values as sequences
        let (equal, k) = ([(4.0, 4.0), (8.0, 4.0), (12.0, 4.0)], 3.0f64);
        assert!((standard_error(&equal).unwrap() - 1.0 / k.sqrt()).abs() < 1e-15);
        // unequal ones weigh by their number: mean 2, residuals 1 - 2 and 7 - 6
        assert_eq!(standard_error(&[(1.0, 1.0), (7.0, 3.0)]), Some(2.0 / 4.0));
        assert_eq!(standard_error(&[(1.0, 4.0)]), None);
        assert_eq!(standard_error(&[]), None);
        assert_eq!(standard_error(&[(6.1, 1.0), (0.0, 0.0), (0.0, 0.0)]), None, "one far target is no sample");
        assert_eq!(standard_error(&[(0.0, 0.0), (0.0, 0.0)]), None);
    }
}
