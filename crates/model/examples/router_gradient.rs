//! The switch that this project is about: the gradient through the choice of chunks, on and off, at the same forward pass.
//!
//!     cargo run -p dash-model --example router_gradient

use dash_core::ops::attention::RouterGradient;
use dash_core::rng::Rng;
use dash_core::{DType, Device, Result, Tape};
use dash_model::{Dash, Model, ModelConfig};

const VOCAB: usize = 50;
const T: usize = 64;

/// The loss of a fresh model, and the norm of the gradient that its chunk summaries get.
fn loss_and_gradient(router_gradient: RouterGradient) -> Result<(f64, f64)> {
    let config = ModelConfig {
        init_std: 0.3, // far from zero, so that the router has something to choose
        attention: Dash { chunk_size: 8, gamma: 8.0, router_gradient, ..Dash::default() }.into(),
        ..ModelConfig::new(2, 32, (4, 2), 64)
    };
    let model = Model::new(config, VOCAB, T, 1, &Device::cpu(1)?, DType::F32)?;
    let mut rng = Rng::new(2);
    let mut tokens = || (0..T).map(|_| rng.below(VOCAB) as u32).collect::<Vec<_>>();
    let (ids, targets) = (model.ids(&tokens(), 1)?, model.ids(&tokens(), 1)?);

    let tape = Tape::new();
    let leaves = model.leaves(&tape);
    let (loss, _) = model.loss(&tape, &leaves, (&ids, &targets), T as f64)?;
    let value = loss.value.item()?;
    let gradients = tape.backward(&loss)?;
    let mut squares = 0.0;
    for (param, leaf) in model.params().iter().zip(&leaves) {
        if let (true, Some(g)) = (param.name.ends_with("indexer_q"), gradients.get(leaf)) {
            squares += g.to_f64()?.iter().map(|x| x * x).sum::<f64>();
        }
    }
    Ok((value, squares.sqrt()))
}

fn main() -> Result<()> {
    for (name, switch) in [("full", RouterGradient::Full), ("stopped", RouterGradient::Stopped)] {
        let (loss, norm) = loss_and_gradient(switch)?;
        println!("{name:8} loss {loss:.9} (bits {:016x}), gradient of the chunk summaries {norm:.3e}", loss.to_bits());
    }
    Ok(())
}
