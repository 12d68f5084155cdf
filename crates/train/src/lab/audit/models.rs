//! Whole models against central differences.

use dash_core::rng::Rng;
use dash_core::testing::GRADIENT_ERROR;
use dash_core::{DType, Device, Result as CoreResult, Tape, Tensor, Var};
use dash_model::{Attention, Model, ModelConfig, kinds};

use super::check::{Check, DIFFERENCES};
use crate::failure::{Failure, Result};

/// Parameters of a tensor whose derivative is taken by differences.
const SAMPLED: usize = 6;

/// Tokens of a sequence, of which there are two.
const T: usize = 23;
/// Where documents begin that do not see each other: shorter than a chunk, of one, and longer.
const STARTS: [usize; 4] = [3, 7, T, T + 20];

/// Whole models of every kind that has the gradient of its function, over whole sequences and over documents that share them: every parameter
/// tensor, some elements of each.
pub fn against_differences(device: &Device) -> Result<Vec<Check>> {
    let mut out = Vec::new();
    let small = |kind| (kind, Attention::small(kind).expect("a kind"));
    for (kind, attention) in kinds().into_iter().map(small).filter(|(_, a)| a.gradient_is_exact()) {
        for (over, starts) in [("", &[][..]), (" over documents", &STARTS)] {
            let (error, worst) = largest_error(device, kind, attention, starts)?;
            let what = format!("model {kind}{over}, worst {}", worst.trim_start_matches("model."));
            // deeper than an op: the third derivative of two layers is larger, the truncation error 1e-10 x 100
            out.push(Check { what, against: DIFFERENCES, error, allowed: 10.0 * GRADIENT_ERROR });
        }
    }
    Ok(out)
}

/// The largest error of a model's gradient, and where.
fn largest_error(device: &Device, kind: &str, attention: Attention, starts: &[usize]) -> Result<(f64, String)> {
    let text = "layers=2\nwidth=12\nheads=4\nkv_heads=2\nhead_dim=4\nffn=10\ninit_std=0.4\n";
    let config: ModelConfig = toml::from_str(text).expect("a model");
    let config = ModelConfig { attention, ..config };
    let mut model = Model::new(config, 13, T, 5, device, DType::F64)?;
    let mut rng = Rng::new(6);
    // no parameter at its initial zero, which could hide a factor
    for p in model.params_mut().iter_mut().filter(|p| p.value.shape().len() == 1) {
        let moved = p.value.to_f64()?.iter().map(|x| x + 0.3 * rng.normal()).collect();
        p.value = Tensor::from_vec(device, p.value.shape(), moved)?;
    }
    let mut draw = || (0..2 * T).map(|_| rng.below(13) as u32).collect::<Vec<u32>>();
    let (ids, targets) = (model.ids(&draw(), 2)?.of_documents(starts)?, model.ids(&draw(), 2)?);
    let loss = |model: &Model, tape: &Tape| -> CoreResult<(Var, Vec<Var>)> {
        let leaves = model.leaves(tape);
        Ok((model.loss(tape, &leaves, (&ids, &targets), 2.0 * T as f64)?.0, leaves))
    };
    let tape = Tape::new();
    let (value, leaves) = loss(&model, &tape)?;
    let grads = tape.backward(&value)?;
    let mut worst = (0.0f64, String::new());
    for (i, leaf) in leaves.iter().enumerate() {
        let Some(g) = grads.get(leaf).map(Tensor::to_f64).transpose()? else {
            return Err(Failure::Run(anyhow::anyhow!(
                "{kind}: {} has no gradient",
                model.params().iter().nth(i).map_or("", |p| &p.name)
            )));
        };
        let base = leaf.value.to_f64()?;
        let scale = g.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
        for _ in 0..SAMPLED {
            let at = rng.below(base.len());
            let mut shifted = |by: f64| -> CoreResult<f64> {
                let mut data = base.clone();
                data[at] += by;
                let param = model.params_mut().iter_mut().nth(i).expect("there are as many as leaves");
                param.value = Tensor::from_vec(device, leaf.value.shape(), data)?;
                loss(&model, &Tape::inference())?.0.value.item()
            };
            let slope = (shifted(1e-5)? - shifted(-1e-5)?) / 2e-5;
            shifted(0.0)?;
            let error = (slope - g[at]).abs() / scale;
            if error >= worst.0 {
                worst = (error, model.params().iter().nth(i).map_or(String::new(), |p| p.name.clone()));
            }
        }
    }
    Ok(worst)
}
