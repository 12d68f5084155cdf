//! Pictures of what `eval --json` printed: loss by position, and a task's accuracy by length with the router's recall beside it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

use super::picture::write;
use crate::lab::chart::{Line, Point, Style};

/// One file.
struct Evaluation {
    name: String,
    value: Value,
}

impl Evaluation {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let wrong = || format!("{}: not what `eval --json` prints, which is one JSON object", path.display());
        let value: Value = serde_json::from_str(&text).with_context(wrong)?;
        if !value.is_object() {
            bail!(wrong());
        }
        Ok(Evaluation { name: path.file_stem().map_or("eval".into(), |n| n.to_string_lossy().into_owned()), value })
    }

    fn losses(&self) -> Vec<f64> {
        self.value["loss_by_position"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
    }

    /// A figure of the task by length.
    fn by_length(&self, figure: impl Fn(&Value) -> Option<f64>) -> Vec<Point> {
        let lengths = self.value["task"].as_array().into_iter().flatten();
        let point = |row: &Value| Some(Point::new(row["length"].as_f64()?, figure(row)?));
        let mut points: Vec<Point> = lengths.filter_map(point).collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        points
    }
}

/// Mean loss over ranges of positions that grow by half an octave: late positions differ little, and single ones are noise. A point stands at the
/// middle of its range; position 1 has no token before it.
fn by_position(losses: &[f64]) -> Vec<Point> {
    let (mut points, mut from) = (Vec::new(), 0);
    while from < losses.len() {
        let to = (((from + 1) as f64 * std::f64::consts::SQRT_2).ceil() as usize - 1).clamp(from + 1, losses.len());
        let mean = losses[from..to].iter().sum::<f64>() / (to - from) as f64;
        points.push(Point::new((from + 1 + to) as f64 / 2.0, mean));
        from = to;
    }
    points
}

/// Mean over the layers that route.
fn over_layers(row: &Value, key: &str) -> Option<f64> {
    let layers: Vec<f64> = row["layers"].as_array()?.iter().filter_map(|layer| layer[key].as_f64()).collect();
    (!layers.is_empty()).then(|| layers.iter().sum::<f64>() / layers.len() as f64)
}

/// Draws into `out` what the files hold: `loss-by-position.svg` of a text; `accuracy-by-length.svg` of a task, with the share of questions for which
/// some layer attended the chunk that holds the answer; `recall-by-length.svg`, the share of the routers' lists that hold it, and what lists as long
/// would hold by chance. Returns what was written.
///
/// # Errors
/// When a file cannot be read, is something else or holds nothing to draw, or a picture cannot be written.
pub fn plot_evaluations(files: &[PathBuf], out: &Path) -> anyhow::Result<Vec<PathBuf>> {
    std::fs::create_dir_all(out).with_context(|| format!("{} cannot be created", out.display()))?;
    let all = files.iter().map(|path| Evaluation::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let (mut losses, mut accuracy, mut recall) = (Vec::new(), Vec::new(), Vec::new());
    let push = |lines: &mut Vec<Line>, name: String, points: Vec<Point>| {
        if !points.is_empty() {
            lines.push(Line { name, series: lines.len(), points, runs: Vec::new() });
        }
    };
    for e in &all {
        push(&mut losses, e.name.clone(), by_position(&e.losses()));
        push(&mut accuracy, format!("{}, accuracy", e.name), e.by_length(|row| row["accuracy"].as_f64()));
        let seen = |row: &Value| over_layers(row, "answer_recall").and(Some(1.0 - row["unseen"].as_f64()?));
        push(&mut accuracy, format!("{}, answer attended by a layer", e.name), e.by_length(seen));
        push(&mut recall, format!("{}, recall", e.name), e.by_length(|row| over_layers(row, "answer_recall")));
        push(&mut recall, format!("{}, by chance", e.name), e.by_length(|row| over_layers(row, "answer_chance")));
    }
    let shares = Style { log_x: true, unit_y: true, ..Style::default() };
    let length = "tokens of a sequence";
    let pictures = [
        (
            "loss-by-position.svg",
            "cross-entropy by position",
            ("position", "nats a token"),
            Style { unit_y: false, ..shares },
            losses,
        ),
        (
            "accuracy-by-length.svg",
            "right answers, and answers that a layer attended",
            (length, "share of questions"),
            shares,
            accuracy,
        ),
        (
            "recall-by-length.svg",
            "lists that hold the answer's chunk, mean over layers",
            (length, "share of lists"),
            shares,
            recall,
        ),
    ];
    let mut written = Vec::new();
    for (name, title, axes, style, lines) in pictures.into_iter().filter(|p| !p.4.is_empty()) {
        written.push(out.join(name));
        write(&written[written.len() - 1], title, axes, style, lines)?;
    }
    if written.is_empty() {
        bail!(
            "the files hold neither loss by position nor a task; `eval --json` without --tokens, --text, --blimp or --hellaswag gives them"
        );
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_in_one_range_and_ranges_grow() {
        let losses: Vec<f64> = (1..=100).map(f64::from).collect();
        let points = by_position(&losses);
        // position 1, 2, 3 to 4, 5 to 7, 8 to 11, ..: the mean of what counts positions is the middle
        assert_eq!(points.iter().take(5).map(|p| p.x).collect::<Vec<_>>(), [1.0, 2.0, 3.5, 6.0, 9.5]);
        points.iter().for_each(|p| assert_eq!(p.x, p.y));
        assert!(points.len() < 16 && points.last().unwrap().x > 80.0, "{points:?}");
        assert!(by_position(&[]).is_empty());
    }
}
