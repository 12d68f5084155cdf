//! Loads what `train export` wrote and continues a sequence of token ids, without the trainer.
//!
//!     cargo run -p train -- export --model runs/small --out exported
//!     cargo run -p dash-model --example load_export -- exported 12 7 99

use std::path::Path;

use dash_core::Device;
use dash_model::Model;

/// The ids and the `count` most likely ones after them, each given all before it.
pub fn continued(folder: &Path, ids: &[u32], count: usize) -> Result<Vec<u32>, Box<dyn std::error::Error>> {
    let model = Model::load(folder, &Device::cpu(0)?)?;
    let mut ids = ids.to_vec();
    for _ in 0..count {
        let logits = model.last_logits(&model.ids(&ids, 1)?)?.to_f64()?;
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        ids.push(best.ok_or("a vocabulary without tokens")? as u32);
    }
    Ok(ids)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("which folder? load_export FOLDER ID ..")?;
    let ids = args.map(|id| id.parse()).collect::<Result<Vec<u32>, _>>()?;
    println!("{:?}", continued(Path::new(&folder), &ids, 8)?);
    Ok(())
}
