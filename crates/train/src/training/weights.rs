//! What is checked of weights before they reach a checkpoint: that they are finite, and the same in all processes.

use super::trainer::Trainer;
use crate::failure::{Failure, Result};

impl Trainer {
    /// Refuses updates, weights or optimizer state that are not finite: they must not reach a checkpoint, because a run that continues
    /// from there never recovers. A gradient can be finite and its update not, for example with a learning rate beyond f32.
    ///
    /// # Errors
    /// A failed run that names the first parameter and the step of the checkpoint that is good; or the process whose weights are not those of
    /// the first.
    pub fn check_weights(&mut self, step: u64, saved: Option<u64>) -> Result<()> {
        self.settle()?;
        let mut bad = None;
        for (i, p) in self.model.params().iter().enumerate() {
            if !(p.value.is_finite()? && self.optimizer.is_finite(i)?) {
                bad = Some(i);
                break;
            }
        }
        // state is with its owner
        let bad = self.peers().concat(vec![bad])?.into_iter().flatten().min();
        let Some(bad) = bad else { return self.check_alike(step) };
        let bad = &self.model.params().iter().as_slice()[bad].name;
        let kept = match saved {
            Some(step) => format!("The checkpoint of step {step} is kept; resume from it with"),
            None => "There is no checkpoint yet; start again with".to_string(),
        };
        Err(self.peers().alike(Failure::Run(anyhow::anyhow!(
            "step {step}: parameter {bad} is not finite after the update, so nothing was saved. {kept} a lower optim.lr, a longer \
             optim.warmup_steps or a larger optim.eps"
        ))))
    }

    /// Of the bits of all weights. Waits for the device.
    ///
    /// # Errors
    /// When it fails.
    pub fn hash_of_weights(&self) -> dash_core::Result<u64> {
        let (mut hash, mut bytes) = (xxhash_rust::xxh3::Xxh3::new(), Vec::new());
        for p in self.model.params().iter() {
            // piece by piece: a call for each number would take most of the time
            for piece in p.value.to_vec::<f32>()?.chunks(1 << 14) {
                bytes.clear();
                bytes.extend(piece.iter().flat_map(|x| x.to_le_bytes()));
                hash.update(&bytes);
            }
        }
        Ok(hash.digest())
    }

    /// Refuses weights that differ from process to process: a fault of hardware or libraries that a loss would show much later.
    fn check_alike(&self, step: u64) -> Result<()> {
        if self.peers().world() == 1 {
            return Ok(());
        }
        let Some((rank, ..)) = self.peers().odd_one(self.hash_of_weights()?)? else { return Ok(()) };
        Err(self.peers().alike(Failure::Run(anyhow::anyhow!(
            "step {step}: rank {rank} has other weights than rank 0, which must not be: its memory, its device or a library of it is not as that \
             of rank 0. Nothing was saved; start again with --resume=auto from the last checkpoint"
        ))))
    }
}
