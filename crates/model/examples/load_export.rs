//! Loads what `train export` wrote and continues a sequence of token ids, without the trainer.
//!
//!     cargo run -p train -- export --model runs/small --out exported
//!     cargo run -p dash-model --example load_export -- exported 12 7 99

use std::path::Path;

use dash_core::Device;
use dash_core::rng::Rng;
use dash_model::{Generation, Model, Sampling, generate};

/// The ids and the `count` most likely ones after them, each given all before it.
pub fn continued(folder: &Path, ids: &[u32], count: usize) -> Result<Vec<u32>, Box<dyn std::error::Error>> {
    let model = Model::load(folder, &Device::cpu(0)?)?;
    let likeliest = Sampling { temperature: 0.0, top_p: 1.0 };
    let how = Generation { max_tokens: count, sampling: likeliest, cache: true };
    let mut ids = ids.to_vec();
    // without temperature nothing is drawn
    generate(&model, &ids.clone(), how, &mut Rng::new(0), |id| {
        ids.push(id);
        true
    })?;
    Ok(ids)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("which folder? load_export FOLDER ID ..")?;
    let ids = args.map(|id| id.parse()).collect::<Result<Vec<u32>, _>>()?;
    println!("{:?}", continued(Path::new(&folder), &ids, 8)?);
    Ok(())
}
