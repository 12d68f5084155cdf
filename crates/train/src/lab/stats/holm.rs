//! Holm's correction for many comparisons.

/// Adjusted p values (Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics
/// 6), in the order given. What is not a number, a comparison that could not be made, does not count and stays.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).filter(|&i| p[i].is_finite()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let (mut out, mut running) = (p.to_vec(), 0.0f64);
    for (rank, &i) in order.iter().enumerate() {
        running = running.max(p[i] * (order.len() - rank) as f64).min(1.0);
        out[i] = running;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the article "Holm-Bonferroni method" of Wikipedia: 0.01, 0.04, 0.03, 0.005 give 0.03, 0.06, 0.06, 0.02.
    #[test]
    fn the_textbook_example() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.005, f64::NAN]);
        for (a, b) in adjusted.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((a - b).abs() < 1e-12, "{adjusted:?}");
        }
        assert!(adjusted[4].is_nan());
        assert_eq!(holm(&[0.6, 0.7]), [1.0, 1.0]);
    }
}
