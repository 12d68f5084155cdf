//! Pictures of runs from their metrics.jsonl.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;

use super::picture::write;
use crate::lab::chart::{Line, Point, Style};

fn lines(run: &Path) -> anyhow::Result<Vec<Value>> {
    let path = run.join("metrics.jsonl");
    let what = "expected the folder of a run";
    let text = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read; {what}", path.display()))?;
    let all: Vec<Result<Value, _>> = text.lines().map(serde_json::from_str).collect();
    // a last line that a crash cut is no record
    let cut = usize::from(!text.ends_with('\n') && all.last().is_some_and(Result::is_err));
    let whole = all.len() - cut;
    all.into_iter().take(whole).map(|l| l.with_context(|| format!("{} is damaged", path.display()))).collect()
}

/// Adds a figure over the steps as a line with the signs of a series.
fn push(
    all: &mut Vec<Line>,
    (name, series, thin): (String, usize, bool),
    lines: &[Value],
    split: &str,
    value: impl Fn(&Value) -> Option<f64>,
) {
    let point = |l: &Value| Some(Point::new(l["step"].as_f64()?, value(l)?));
    let points = lines.iter().filter(|l| l["split"] == split).filter_map(point).collect();
    all.push(Line { name, series, thin, points, runs: Vec::new() });
}

/// Draws `loss.svg` (training and validation) and, where a run routes, `density.svg` (by layer for one run, the mean for
/// several) into the folder `out`. Several runs have each its colour and dashes in both, and training is thin. Returns what was written.
///
/// # Errors
/// When a record cannot be read or a picture cannot be written.
pub fn plot(runs: &[PathBuf], out: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (mut loss, mut density) = (Vec::new(), Vec::new());
    let one = runs.len() == 1;
    for (number, run) in runs.iter().enumerate() {
        let lines = lines(run)?;
        let name = run.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
        for (i, (split, what)) in [("train", "training"), ("val", "validation")].into_iter().enumerate() {
            let signs = if one { (i, false) } else { (number, split == "train") };
            push(&mut loss, (format!("{name}, {what}"), signs.0, signs.1), &lines, split, |l| l["loss"].as_f64());
        }
        let layers = lines.iter().find_map(|l| l["layers"].as_array().map(Vec::len)).unwrap_or(0);
        if layers == 0 {
            continue;
        }
        for i in 0..if one { layers } else { 0 } {
            let of_layer = move |l: &Value| l["layers"][i]["density"].as_f64();
            push(&mut density, (format!("layer {i}"), i, false), &lines, "train", of_layer);
        }
        let (name, series) = if one { ("mean".into(), layers) } else { (name, number) };
        push(&mut density, (name, series, false), &lines, "train", |l| l["density"].as_f64());
    }
    let mut written = vec![out.join("loss.svg")];
    write(&written[0], "cross-entropy", ("step", "nats a token"), Style::default(), loss)?;
    if !density.is_empty() {
        written.push(out.join("density.svg"));
        write(&written[1], "attended / visible chunks", ("step", "density"), Style::default(), density)?;
    }
    Ok(written)
}
