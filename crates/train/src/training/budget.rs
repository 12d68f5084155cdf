//! How many chunks a run attends by length, layer and position: written at its end, for another run to attend as many.

use std::path::Path;

use anyhow::Context;
use dash_core::Tape;
use dash_data::Batch;
use dash_model::{Budget, Model, Profile};

use crate::failure::Result;
use crate::files::replace_file;

/// The file of a run that holds them.
pub const FILE: &str = "budget.json";

/// Those of a run.
///
/// # Errors
/// When the file is damaged.
pub fn read(run: &Path) -> anyhow::Result<Option<Budget>> {
    let path = run.join(FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    serde_json::from_slice(&bytes).map(Some).with_context(|| format!("{} is damaged", path.display()))
}

/// Writes those of a model whose run has ended, over the sequences of each length, where it routes; those of an earlier end go.
///
/// # Errors
/// When the model refuses the validation's sequences, or the file cannot be written.
pub fn record(folder: &Path, model: &Model, by_length: &[(usize, Vec<&Batch>)]) -> Result<()> {
    let Some(chunk_size) = model.config().attention.chunk_size() else { return Ok(()) };
    let lengths = by_length.iter().map(|(t, batches)| profile(model, *t, batches));
    let budget = Budget { chunk_size, lengths: lengths.collect::<dash_core::Result<_>>()? };
    Ok(replace_file(&folder.join(FILE), &serde_json::to_vec(&budget).context("numbers are JSON")?)?)
}

/// The means over sequences of `t` tokens.
fn profile(model: &Model, t: usize, batches: &[&Batch]) -> dash_core::Result<Profile> {
    let layers = model.config().layers;
    let (mut sums, mut rows, mut sequences) = (vec![vec![0u64; t]; layers], 0u64, 0);
    for b in batches {
        let tape = Tape::inference().computing(model.config().compute.into());
        let f = model.forward(&tape, &model.leaves(&tape), &model.ids(&b.inputs, b.batch)?)?;
        for (layer, trace) in f.routers.iter().enumerate().filter_map(|(i, t)| Some((i, t.as_ref()?))) {
            let counts = trace.routes().figures(None)?.counts;
            rows += if layer == 0 { (counts.len() / t) as u64 } else { 0 };
            counts.iter().enumerate().for_each(|(i, &n)| sums[layer][i % t] += u64::from(n));
        }
        sequences += b.batch;
    }
    let mean = |layer: Vec<u64>| layer.into_iter().map(|n| n as f64 / rows.max(1) as f64).collect();
    Ok(Profile { length: t, sequences, layers: sums.into_iter().map(mean).collect() })
}
