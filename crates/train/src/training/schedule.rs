//! The learning rate as a function of the step.

use crate::config::{DECAY_FRACTION, MIN_LR_RATIO, Optim, Schedule};

/// Learning rate of update `step` (from 1) of `steps`. Warmup is linear and reaches the peak at `warmup_steps`; the last
/// update has `lr * min_lr_ratio`.
pub fn learning_rate(o: &Optim, step: u64, steps: u64) -> f64 {
    if step <= o.warmup_steps {
        return o.lr * step as f64 / o.warmup_steps as f64;
    }
    let rest = (steps - o.warmup_steps.min(steps)).max(1) as f64;
    let done = (step - o.warmup_steps) as f64;
    let low = o.lr * o.min_lr_ratio.unwrap_or(MIN_LR_RATIO);
    match o.schedule {
        Schedule::Constant => o.lr,
        Schedule::Cosine => low + (o.lr - low) * 0.5 * (1.0 + (std::f64::consts::PI * (done / rest).min(1.0)).cos()),
        Schedule::WarmupStableDecay => {
            let left = steps as f64 - step as f64;
            low + (o.lr - low) * (left / decay(o, steps)).clamp(0.0, 1.0)
        }
    }
}

/// The update after which the decay of `warmup-stable-decay` begins, of `steps`.
pub fn decay_from(o: &Optim, steps: u64) -> u64 {
    // a share of the steps may end within one, which then decays; a whole number of them may be off by a rounding
    (steps as f64 - decay(o, steps) + 1e-6).floor().max(0.0) as u64
}

/// Updates that `warmup-stable-decay` decays over, of `steps`: none of the warmup, at whose end the rate would fall at once.
fn decay(o: &Optim, steps: u64) -> f64 {
    let rest = steps.saturating_sub(o.warmup_steps).max(1) as f64;
    (steps as f64 * o.decay_fraction.unwrap_or(DECAY_FRACTION)).clamp(1.0, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optim(schedule: Schedule) -> Optim {
        let mut o: Optim = toml::from_str("lr = 1.0\nwarmup_steps = 10").unwrap();
        o.schedule = schedule;
        o
    }

    #[test]
    fn schedules_pass_through_their_corners() {
        for s in [Schedule::Cosine, Schedule::WarmupStableDecay, Schedule::Constant] {
            let at = |step| learning_rate(&optim(s), step, 110);
            assert!((at(1) - 0.1).abs() < 1e-12 && at(10) == 1.0);
            let (middle, end) = match s {
                Schedule::Cosine => (0.55, 0.1),
                Schedule::WarmupStableDecay => (1.0, 0.1),
                Schedule::Constant => (1.0, 1.0),
            };
            assert!((at(60) - middle).abs() < 1e-12 && (at(110) - end).abs() < 1e-12, "{s:?}: {} {}", at(60), at(110));
        }
        let decays = optim(Schedule::WarmupStableDecay);
        assert!((learning_rate(&decays, 99, 110) - 0.55).abs() < 1e-12);
        let from = decay_from(&decays, 110);
        assert!(from == 88 && learning_rate(&decays, from, 110) == 1.0 && learning_rate(&decays, from + 1, 110) < 1.0);
        // 7.5 of 10 updates do not decay: the eighth does
        let half = Optim { warmup_steps: 1, decay_fraction: Some(0.25), ..decays.clone() };
        assert!(decay_from(&half, 10) == 7 && learning_rate(&half, 7, 10) == 1.0 && learning_rate(&half, 8, 10) < 1.0);
        // all of it decays: from the peak at the end of the warmup on
        let all = Optim { decay_fraction: Some(1.0), min_lr_ratio: Some(0.0), ..decays };
        assert_eq!([10, 11, 60, 109, 110].map(|step| learning_rate(&all, step, 110)), [1.0, 0.99, 0.5, 0.01, 0.0]);
        assert_eq!(decay_from(&all, 110), 10);
    }
}
