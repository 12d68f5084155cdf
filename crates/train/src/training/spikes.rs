//! The spike guard: leaves out an update whose gradient is an outlier, `optim.spike_guard`.
//!
//! The measure is the median of the last norms, those of updates that were left out among them: one spike does not move it, and where
//! gradients have become larger for good, half a window later they are the rule and nothing is left out any more.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Norms whose median is the measure.
const WINDOW: usize = 64;
/// Norms before which nothing is left out.
const ENOUGH: usize = WINDOW / 2;

/// What the guard has seen; in the checkpoint, so that a resumed run leaves out the same updates.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spikes {
    /// The last gradient norms, the oldest first.
    norms: VecDeque<f64>,
    /// Updates left out so far.
    pub skipped: u64,
}

impl Spikes {
    /// The median that a norm is measured by; none before there are enough.
    pub fn median(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.norms.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        (sorted.len() >= ENOUGH).then(|| sorted[sorted.len() / 2])
    }

    /// Whether the update with this norm is to be left out, because it is above `factor` medians. A norm that is not finite is no outlier
    /// but a fault, which the trainer tells.
    pub fn leaves_out(&mut self, norm: f64, factor: f64) -> bool {
        if !norm.is_finite() {
            return false;
        }
        let outlier = self.median().is_some_and(|median| norm > factor * median);
        self.norms.push_back(norm);
        if self.norms.len() > WINDOW {
            self.norms.pop_front();
        }
        self.skipped += u64::from(outlier);
        outlier
    }

    /// That the update of a step was left out, for its norm against the median before it.
    pub fn told(&self, step: u64, norm: f64, median: f64) -> String {
        format!(
            "step {step}: left out, its gradient norm {norm:.3} is an outlier, the median of the last is {median:.3}; {} so far \
             (optim.spike_guard)",
            self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_is_left_out_and_a_new_level_becomes_the_rule() {
        let mut spikes = Spikes::default();
        // nothing is known yet
        assert!((0..ENOUGH).all(|i| !spikes.leaves_out(if i == 5 { 1e3 } else { 1.0 }, 4.0)));
        assert!(!spikes.leaves_out(4.0, 4.0) && spikes.leaves_out(4.5, 4.0));
        assert!(!spikes.leaves_out(f64::NAN, 4.0) && !spikes.leaves_out(f64::INFINITY, 4.0));
        (0..WINDOW).for_each(|_| _ = spikes.leaves_out(1.0, 4.0));
        let out = (0..WINDOW).filter(|_| spikes.leaves_out(10.0, 4.0)).count();
        assert_eq!((out, spikes.skipped), (WINDOW / 2, 1 + out as u64), "half a window");
    }

    #[test]
    fn what_is_read_back_decides_alike() {
        let mut spikes = Spikes::default();
        (0..50).for_each(|i| _ = spikes.leaves_out(1.0 / (3.0 + f64::from(i)), 2.0));
        let text = serde_json::to_string(&spikes).unwrap();
        assert_eq!(serde_json::from_str::<Spikes>(&text).unwrap(), spikes);
    }
}
