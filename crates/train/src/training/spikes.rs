//! The spike guard of a run, `optim.spike_guard`: leaves out an update whose gradient is an outlier (`dash_core::ops::spike_guard` decides, on
//! the device), counts and tells those.

use dash_core::Tensor;
use dash_core::ops::{Decision, NormWindow, spike_guard};
use serde::{Deserialize, Serialize};

/// What the guard has seen; in the checkpoint, so that a resumed run leaves out the same updates.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spikes {
    /// The last gradient norms, the oldest first.
    norms: Vec<f64>,
    /// Updates left out so far.
    pub skipped: u64,
}

/// The guard of a run.
#[derive(Default)]
pub struct Guard {
    /// What a checkpoint has of it, before the first update.
    before: Spikes,
    /// On the device, from the first update on.
    window: Option<NormWindow>,
    /// Updates left out so far, of those that the host has read.
    pub skipped: u64,
    /// Lines that nobody has told yet.
    untold: Vec<String>,
}

impl Guard {
    /// Goes on from what a checkpoint has.
    pub fn of(before: Spikes) -> Self {
        Guard { skipped: before.skipped, before, ..Guard::default() }
    }

    /// Decides of an update, without the host: by its norm and clip factor, against `limit` medians.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn decide(&mut self, norm: &Tensor, factor: &Tensor, limit: f64) -> dash_core::Result<Decision> {
        let window = match &mut self.window {
            Some(window) => window,
            None => self.window.insert(NormWindow::new(norm.device(), &self.before.norms)?),
        };
        spike_guard(window, norm, factor, limit)
    }

    /// What the host reads of a decision later: the norm of that step, and what it exceeded where its update was left out.
    pub fn read(&mut self, step: u64, norm: f64, exceeded: f64) {
        if exceeded.is_nan() {
            return;
        }
        self.skipped += 1;
        self.untold.push(format!(
            "step {step}: left out, its gradient norm {norm:.3} is an outlier, the median of the last is {exceeded:.3}; {} so far \
             (optim.spike_guard)",
            self.skipped
        ));
    }

    /// A line for each update left out that was read since the last call.
    pub fn take_lines(&mut self) -> Vec<String> {
        std::mem::take(&mut self.untold)
    }

    /// What it has seen, of updates that were all read. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn seen(&self) -> dash_core::Result<Spikes> {
        let norms = self.window.as_ref().map_or_else(|| Ok(self.before.norms.clone()), NormWindow::norms)?;
        Ok(Spikes { norms, skipped: self.skipped })
    }
}

#[cfg(test)]
mod tests {
    use dash_core::{DType, Device};

    use super::*;

    #[test]
    fn what_is_read_back_decides_alike() {
        let device = Device::cpu(1).unwrap();
        let scalar = |x: f64| Tensor::full(&device, &[], DType::F64, x).unwrap();
        let run = |guard: &mut Guard, steps: std::ops::Range<u64>| {
            for step in steps {
                let norm = 1.0 + (step * 7 % 5) as f64;
                let decision = guard.decide(&scalar(norm), &scalar(1.0), 1.6).unwrap();
                guard.read(step, norm, decision.exceeded.item().unwrap());
            }
        };
        let mut whole = Guard::default();
        run(&mut whole, 0..90);
        let mut first = Guard::default();
        run(&mut first, 0..50);
        let text = serde_json::to_string(&first.seen().unwrap()).unwrap();
        let mut second = Guard::of(serde_json::from_str(&text).unwrap());
        assert_eq!(second.seen().unwrap(), first.seen().unwrap(), "before any update, too");
        run(&mut second, 50..90);
        assert_eq!(second.seen().unwrap(), whole.seen().unwrap());
        assert!(first.skipped > 0 && second.skipped > first.skipped);
        let told = |guards: &mut [Guard]| guards.iter_mut().flat_map(Guard::take_lines).collect::<Vec<_>>();
        assert_eq!(told(&mut [first, second]), told(&mut [whole]));
    }
}
