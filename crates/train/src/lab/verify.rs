//! `verify-resume`: proves on this machine that a resumed run has the same bits.

use dash_data::{Loader, LoaderState};

use crate::config::Config;
use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::training::checkpoint::{self, Checkpoints, State};
use crate::training::device::device as device_of;
use crate::training::material::Material;
use crate::training::trainer::Trainer;

/// Steps before the save, and after it.
const STEPS: u64 = 4;

fn advance(
    trainer: &mut Trainer,
    config: &Config,
    loader: &mut Loader,
    steps: u64,
    mut data: LoaderState,
) -> Result<LoaderState> {
    for _ in 0..steps {
        let batches: Vec<_> = (0..config.data.grad_accum).map(|_| loader.next_batch()).collect();
        trainer.step(config, &batches, false)?;
        trainer.settle()?;
        data = batches.last().map_or(data, |b| b.state);
    }
    Ok(data)
}

/// Runs 8 steps at once, and 4, a checkpoint on disk, 4 more from it; compares every bit of weights and optimiser state.
///
/// # Errors
/// [`Failure::Run`] naming the first tensor that differs.
pub fn verify_resume(config: &Config) -> Result<()> {
    let mut config = config.clone();
    config.run.steps = 2 * STEPS;
    let material = Material::of(&config)?;
    let device = device_of(&config)?;
    let loader = |state| material.loader(&config, state);
    let scratch = std::env::temp_dir().join(format!("dashlab-verify-{}", std::process::id()));
    let result = (|| {
        let mut whole = Trainer::new(&config, &device)?;
        let mut batches = loader(LoaderState::default())?;
        let data = advance(&mut whole, &config, &mut batches, STEPS, LoaderState::default())?;
        let tokens = STEPS * config.tokens_per_step() as u64;
        let state = State::new(STEPS, tokens, config.run.seed, data, String::new());
        let path = Checkpoints::of(&scratch).save(&whole, &whole.gathered_state()?, state, &config)?;
        advance(&mut whole, &config, &mut batches, STEPS, data)?;
        let (mut resumed, state) = checkpoint::load(&path, &config, &device)?;
        advance(&mut resumed, &config, &mut loader(state.data)?, STEPS, state.data)?;
        let tensors = |t: &Trainer| -> dash_core::Result<Vec<(String, Vec<u32>)>> {
            let params = t.model.params().iter().map(|p| (p.name.clone(), &p.value));
            let all = params.chain(t.optimizer.named(t.model.params()));
            all.map(|(name, x)| Ok((name, x.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect()))).collect()
        };
        let (a, b) = (tensors(&whole)?, tensors(&resumed)?);
        match a.iter().zip(&b).find(|(x, y)| x != y) {
            Some(((name, _), _)) => Err(Failure::Run(anyhow::anyhow!("after resuming, {name} has other bits"))),
            None => {
                print_line!(
                    "resumed run is bit-equal: {} tensors after {} steps, saved and reloaded at step {STEPS}",
                    a.len(),
                    2 * STEPS
                )?;
                Ok(())
            }
        }
    })();
    let _ = std::fs::remove_dir_all(&scratch);
    result
}
