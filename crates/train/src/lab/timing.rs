//! Times of repeated runs.

/// (smallest, median, largest) of some times.
pub fn spread(mut times: Vec<f64>) -> (f64, f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2], times[times.len() - 1])
}
