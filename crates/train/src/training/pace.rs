//! How fast a run goes, and how much of a GPU it uses.

use dash_core::Device;
use dash_model::{Compute, flops};

use super::trainer::StepStats;
use crate::config::Config;

/// Products of bf16 with sums in f32 that a card does a second at most, without sparsity, in TFLOP/s, by a part of the name that the
/// driver gives it: NVIDIA's data sheets. The first that fits counts.
const PEAKS: [(&str, f64); 13] = [
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("A100", 311.9),
    ("A800", 311.9),
    ("A40", 149.7),
    ("A30", 165.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
];

/// FLOP a second that a card of this name does at most in products of bf16, where it is known.
pub fn peak_of(name: &str) -> Option<f64> {
    PEAKS.iter().find(|(part, _)| name.contains(part)).map(|(_, tera)| tera * 1e12)
}

/// The peak that a run on this device is measured against: none on a CPU, of an unknown card, or where products are not of bf16.
pub fn peak(device: &Device, compute: Compute) -> Option<f64> {
    match device {
        Device::Cuda(gpu) => peak_in(&gpu.properties().name, compute),
        Device::Cpu(_) => None,
    }
}

fn peak_in(card: &str, compute: Compute) -> Option<f64> {
    match compute {
        Compute::Bf16 => peak_of(card),
        Compute::F32 => None,
    }
}

/// Share of a peak in FLOP a second that so much work a token at so many tokens a second takes.
fn utilisation(flops_per_token: f64, tokens_per_s: f64, peak: f64) -> f64 {
    flops_per_token * tokens_per_s / peak
}

/// Keys that a query of an update attended on average, all branches together.
pub fn attended_tokens(config: &Config, s: &StepStats) -> f64 {
    let listed = s.attended.map_or(0.0, |share| share * s.lengths.visible());
    s.lengths.attended(&config.model.attention, listed)
}

/// Figures of a logged step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Tokens a second since the last step that something followed.
    pub tokens_per_s: f64,
    /// FLOP of a token, counted: see [`dash_model::flops()`].
    pub flops_per_token: f64,
    /// Share of the peak of all cards that these are, where the peak is known: model FLOP utilisation.
    pub mfu: Option<f64>,
    /// Bytes of the card's memory, the first process's, that the run had in use at its peak.
    pub memory: Option<usize>,
}

impl Pace {
    /// Of an update at so many tokens a second, on so many devices of this kind together.
    pub fn of(config: &Config, (device, devices): (&Device, usize), tokens_per_s: f64, s: &StepStats) -> Self {
        let work =
            flops(&config.model, config.data.vocab_size, config.data.seq_len, attended_tokens(config, s)).total();
        let memory = match device {
            Device::Cpu(_) => None,
            Device::Cuda(gpu) => Some(gpu.usage().peak),
        };
        let mfu = peak(device, config.model.compute).map(|peak| utilisation(work, tokens_per_s, peak * devices as f64));
        Pace { tokens_per_s, flops_per_token: work, mfu, memory }
    }
}

/// For the line of a logged step.
impl std::fmt::Display for Pace {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{:.0} tok/s", self.tokens_per_s)?;
        if let Some(mfu) = self.mfu {
            write!(f, " MFU {:.1} %", 100.0 * mfu)?;
        }
        match self.memory {
            Some(bytes) => write!(f, " {:.1} GB", bytes as f64 / 1e9),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_found_by_the_name_of_the_card() {
        assert_eq!(peak_of("NVIDIA H100 80GB HBM3"), Some(989.4e12));
        assert_eq!(peak_of("NVIDIA H100 PCIe"), Some(756e12));
        assert_eq!(peak_of("NVIDIA L40S"), Some(362e12));
        assert_eq!(peak_of("NVIDIA L4"), Some(121e12));
        assert_eq!(peak_of("NVIDIA GeForce GTX 1080"), None);
        assert_eq!(peak_in("NVIDIA H100 80GB HBM3", Compute::Bf16), Some(989.4e12));
        assert_eq!(peak_in("NVIDIA H100 80GB HBM3", Compute::F32), None);
        assert_eq!(peak(&Device::cpu(1).unwrap(), Compute::Bf16), None);
    }

    #[test]
    fn utilisation_is_work_over_the_peak() {
        // 100 M parameters: 6e8 FLOP a token, 500,000 tokens a second, of 1e15
        assert_eq!(utilisation(6e8, 5e5, 1e15), 0.3);
    }

    #[test]
    fn a_line_has_what_is_known() {
        let mut pace = Pace { tokens_per_s: 1234.4, flops_per_token: 1.0, mfu: None, memory: None };
        assert_eq!(pace.to_string(), "1234 tok/s");
        (pace.mfu, pace.memory) = (Some(0.3456), Some(5_300_000_000));
        assert_eq!(pace.to_string(), "1234 tok/s MFU 34.6 % 5.3 GB");
    }
}
