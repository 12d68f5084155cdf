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

/// Writes those of a model whose run has ended, over the sequences of each length, where it routes; those of an earlier end go. Of none, nothing.
///
/// # Errors
/// When the model refuses the validation's sequences, or the file cannot be written.
pub fn record(folder: &Path, model: &Model, by_length: &[(usize, Vec<&Batch>)]) -> Result<()> {
    let Some(chunk_size) = model.config().attention.chunk_size() else { return Ok(()) };
    if by_length.is_empty() {
        return Ok(());
    }
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
            let counts = trace.routes()?.counts()?;
            rows += if layer == 0 { (counts.len() / t) as u64 } else { 0 };
            counts.iter().enumerate().for_each(|(i, &n)| sums[layer][i % t] += u64::from(n));
        }
        sequences += b.batch;
    }
    let mean = |layer: Vec<u64>| layer.into_iter().map(|n| n as f64 / rows.max(1) as f64).collect();
    Ok(Profile { length: t, sequences, layers: sums.into_iter().map(mean).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::handmade::{Pull, reader};
    use dash_model::{Dense, TopK};

    fn batch(sequences: usize, t: usize) -> Batch {
        let ids = vec![1; sequences * t];
        Batch {
            inputs: ids.clone().into(),
            targets: ids,
            batch: sequences,
            state: Default::default(),
            questions: Vec::new(),
            documents: Vec::new(),
        }
    }

    #[test]
    fn what_a_model_attends_is_written_by_length_layer_and_position() {
        let folder = tempfile::tempdir().unwrap();
        let flat = Pull { q: &[], k: &[] };
        let topk = TopK { chunk_size: 2, top: 3, ..TopK::default() };
        let (two, one, short) = (batch(2, 8), batch(1, 8), batch(3, 5));
        let by_length = [(5, vec![&short]), (8, vec![&two, &one])];
        record(folder.path(), &reader(topk.into(), 3, 8, &flat), &by_length).unwrap();
        let profile = |length: usize, means: &[f64]| Profile { length, sequences: 3, layers: vec![means.to_vec(); 3] };
        // the own chunk and the earlier ones, three at most
        let eight = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0];
        let want = Budget { chunk_size: 2, lengths: vec![profile(5, &eight[..5]), profile(8, &eight)] };
        assert_eq!(read(folder.path()).unwrap(), Some(want));
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().ends_with("budget.json is damaged"));
    }

    #[test]
    fn dense_attention_has_no_budget() {
        let folder = tempfile::tempdir().unwrap();
        let model = reader(Dense {}.into(), 1, 8, &Pull { q: &[], k: &[] });
        record(folder.path(), &model, &[(8, vec![&batch(1, 8)])]).unwrap();
        assert_eq!(read(folder.path()).unwrap(), None);
    }
}
