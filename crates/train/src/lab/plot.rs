//! `plot`: pictures of runs from their metrics.jsonl, as SVG files that need no font and no viewer but a browser.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use plotters::prelude::*;
use serde_json::Value;

/// One line of a chart.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

fn lines(run: &Path) -> anyhow::Result<Vec<Value>> {
    let path = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    text.lines().map(|l| serde_json::from_str(l).with_context(|| format!("{} is damaged", path.display()))).collect()
}

fn series(name: String, lines: &[Value], split: &str, value: impl Fn(&Value) -> Option<f64>) -> Series {
    let point = |l: &Value| Some((l["step"].as_f64()?, value(l)?));
    Series { name, points: lines.iter().filter(|l| l["split"] == split).filter_map(point).collect() }
}

/// Writes one chart.
fn chart(path: &Path, title: &str, y: &str, all: &[Series]) -> anyhow::Result<()> {
    let points = || all.iter().flat_map(|s| &s.points).filter(|p| p.1.is_finite());
    let fold = |f: fn(f64, f64) -> f64, start, get: fn(&(f64, f64)) -> f64| points().map(get).fold(start, f);
    if points().next().is_none() {
        return Err(anyhow!("{}: the runs hold no figure for it", path.display()));
    }
    let right = fold(f64::max, 1.0, |p| p.0);
    let (low, high) = (fold(f64::min, f64::MAX, |p| p.1), fold(f64::max, f64::MIN, |p| p.1));
    let margin = ((high - low) * 0.05).max(1e-3);
    let failed = |e: &dyn std::fmt::Display| anyhow!("{} cannot be drawn: {e}", path.display());
    let area = SVGBackend::new(path, (760, 420)).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(38)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..right, (low - margin).max(if low >= 0.0 { 0.0 } else { f64::MIN })..high + margin)
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_desc(y)
        .light_line_style(WHITE)
        .draw()
        .map_err(|e| failed(&e))?;
    for (i, s) in all.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(s.points.iter().copied(), color.stroke_width(2)))
            .map_err(|e| failed(&e))?
            .label(&s.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    let labels = chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw();
    labels.map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}

/// Draws `loss.svg` (training and validation) and, where a run routes, `density.svg` (by layer for one run, the mean for
/// several) into `out`. Returns what was written.
///
/// # Errors
/// When a record cannot be read or a picture cannot be written.
pub fn plot(runs: &[PathBuf], out: &Path) -> anyhow::Result<Vec<PathBuf>> {
    std::fs::create_dir_all(out).with_context(|| format!("{} cannot be created", out.display()))?;
    let (mut loss, mut density) = (Vec::new(), Vec::new());
    for run in runs {
        let lines = lines(run)?;
        let name = run.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
        for (split, what) in [("train", "training"), ("val", "validation")] {
            loss.push(series(format!("{name}, {what}"), &lines, split, |l| l["loss"].as_f64()));
        }
        let layers = lines.iter().find_map(|l| l["layers"].as_array().map(Vec::len)).unwrap_or(0);
        if layers == 0 {
            continue;
        }
        if runs.len() == 1 {
            for i in 0..layers {
                density
                    .push(series(format!("layer {i}"), &lines, "train", move |l| l["layers"][i]["density"].as_f64()));
            }
        }
        density.push(series(if runs.len() == 1 { "mean".into() } else { name }, &lines, "train", |l| {
            l["density"].as_f64()
        }));
    }
    let mut written = vec![out.join("loss.svg")];
    chart(&written[0], "cross-entropy", "nats a token", &loss)?;
    if !density.is_empty() {
        written.push(out.join("density.svg"));
        chart(&written[1], "attended share of the visible chunks", "density", &density)?;
    }
    Ok(written)
}
