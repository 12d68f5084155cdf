//! The frequencies of the rotary angles, and how models stretch them for longer texts.

use dash_core::ops::rope_frequencies;
use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Llama 3's stretching of the rotary angles (Llama Team 2024, arXiv 2407.21783, section 3.4.3; `rope_type = "llama3"` in Hugging Face's
/// files): pairs whose wave is longer than `original_positions / low_freq_factor` turn `factor` times more slowly, pairs whose wave is
/// shorter than `original_positions / high_freq_factor` as before, those between in between.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeScaling {
    /// How many times more slowly the long waves turn.
    pub factor: f64,
    /// Waves above `original_positions` over this many are long.
    pub low_freq_factor: f64,
    /// Waves below `original_positions` over this many are short.
    pub high_freq_factor: f64,
    /// Positions that the model was trained on before it was stretched.
    pub original_positions: usize,
}

impl RopeScaling {
    /// Refuses what gives no angles.
    ///
    /// # Errors
    /// Names the key and what it would have to be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, what: String| Err(ConfigError::new(format!("model.rope_scaling.{key}"), what));
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        if !(self.factor >= 1.0 && self.factor.is_finite()) {
            return wrong("factor", format!("{:?} is not a number of at least 1", self.factor));
        }
        if !(low > 0.0 && low.is_finite()) {
            return wrong("low_freq_factor", format!("{low:?} is not a positive number"));
        }
        if !(high > low && high.is_finite()) {
            return wrong("high_freq_factor", format!("{high:?} is not above low_freq_factor = {low:?}"));
        }
        if self.original_positions == 0 {
            return wrong("original_positions", "is 0; it must be at least 1".into());
        }
        Ok(())
    }

    /// A frequency in radians a position, stretched.
    fn stretched(&self, frequency: f64) -> f64 {
        let wave = std::f64::consts::TAU / frequency;
        // how many waves the original text holds
        let waves = self.original_positions as f64 / wave;
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        if waves < low {
            return frequency / self.factor;
        }
        if waves > high {
            return frequency;
        }
        let kept = (waves - low) / (high - low);
        (1.0 - kept) * frequency / self.factor + kept * frequency
    }
}

/// The `head_dim / 2` frequencies of a head's pairs, in radians a position.
pub fn frequencies(head_dim: usize, theta: f64, scaling: Option<RopeScaling>) -> Vec<f64> {
    let plain = rope_frequencies(head_dim, theta);
    match scaling {
        Some(scaling) => plain.into_iter().map(|f| scaling.stretched(f)).collect(),
        None => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: RopeScaling =
        RopeScaling { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 };

    #[test]
    fn short_waves_stay_and_long_ones_turn_more_slowly() {
        let (plain, scaled) = (frequencies(64, 5e5, None), frequencies(64, 5e5, Some(LLAMA)));
        let waves = |f: f64| 8192.0 * f / std::f64::consts::TAU;
        let mut seen = [0; 3];
        for (a, b) in plain.iter().zip(&scaled) {
            match waves(*a) {
                w if w > 4.0 => {
                    seen[0] += 1;
                    assert_eq!(a, b);
                }
                w if w < 1.0 => {
                    seen[1] += 1;
                    assert_eq!(a / 32.0, *b);
                }
                w => {
                    seen[2] += 1;
                    // by hand: a third of the way from 1 to 4 waves keeps a third
                    let kept = (w - 1.0) / 3.0;
                    assert!((b / a - (kept + (1.0 - kept) / 32.0)).abs() < 1e-12);
                }
            }
        }
        assert!(seen.iter().all(|&n| n > 0), "{seen:?}");
    }

    #[test]
    fn what_gives_no_angles_is_refused() {
        let wrong = [
            RopeScaling { factor: 0.5, ..LLAMA },
            RopeScaling { factor: f64::NAN, ..LLAMA },
            RopeScaling { low_freq_factor: 0.0, ..LLAMA },
            RopeScaling { high_freq_factor: 1.0, ..LLAMA },
            RopeScaling { original_positions: 0, ..LLAMA },
        ];
        assert!(wrong.iter().all(|s| s.check().is_err()) && LLAMA.check().is_ok());
    }
}
