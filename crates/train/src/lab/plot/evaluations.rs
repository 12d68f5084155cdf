//! Pictures of what `eval --json` printed: loss by position, and a task's accuracy by length with the router's recall beside it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

use super::picture::write;
use crate::lab::chart::{Line, Point, Style};

/// One file.
struct Evaluation {
    name: String,
    losses: Vec<f64>,
    lengths: Vec<Length>,
}

/// What a file says of a task's sequences of one length.
struct Length {
    tokens: f64,
    accuracy: Option<f64>,
    unseen: Option<f64>,
    /// Of the layer that finds the answer most often; and by chance.
    found: Option<(f64, f64)>,
}

impl Length {
    /// A figure that is missing, or null, is none; one that cannot be what it is called is refused: a picture of it would say something.
    fn of(row: &Value) -> anyhow::Result<Self> {
        let tokens = row["length"].as_f64().filter(|t| *t >= 1.0 && *t <= 2f64.powi(53));
        let tokens = tokens.with_context(|| format!("length {} is no number of tokens", row["length"]))?;
        let of_row = |key: &str| share(&row[key]).with_context(|| format!("length {tokens}: {key}"));
        Ok(Length {
            tokens,
            accuracy: of_row("accuracy")?,
            unseen: of_row("unseen")?,
            found: best_layer(&row["layers"]).with_context(|| format!("length {tokens}"))?,
        })
    }
}

/// A share of something, where there is one.
fn share(value: &Value) -> anyhow::Result<Option<f64>> {
    if value.is_null() {
        return Ok(None);
    }
    let share = value.as_f64().filter(|x| (0.0..=1.0).contains(x));
    share.map(Some).with_context(|| format!("{value} is no share, a number from 0 to 1"))
}

/// The layer whose lists hold the answer's chunk most often: its share, and what lists as long would hold by chance.
fn best_layer(layers: &Value) -> anyhow::Result<Option<(f64, f64)>> {
    let of = |layer: &Value| {
        let of_layer = |key: &str| share(&layer[key]).with_context(|| key.to_string());
        Ok(of_layer("answer_recall")?.zip(of_layer("answer_chance")?))
    };
    let all = layers.as_array().into_iter().flatten().map(of).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(all.into_iter().flatten().max_by(|a, b| a.0.total_cmp(&b.0)))
}

/// A list, none where there is nothing or null.
fn list<'a>(value: &'a Value, key: &str) -> anyhow::Result<&'a [Value]> {
    match &value[key] {
        Value::Null => Ok(&[]),
        Value::Array(all) => Ok(all),
        _ => bail!("{key} is no list"),
    }
}

impl Evaluation {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let wrong = || format!("{}: not what `eval --json` prints, which is one JSON object", path.display());
        let value: Value = serde_json::from_str(&text).with_context(wrong)?;
        if !value.is_object() {
            bail!(wrong());
        }
        let what = || format!("{}: not what `eval --json` prints", path.display());
        let name = path.file_stem().map_or("eval".into(), |n| n.to_string_lossy().into_owned());
        Ok(Evaluation {
            name,
            losses: losses(&value).with_context(what)?,
            lengths: list(&value, "task").and_then(|all| all.iter().map(Length::of).collect()).with_context(what)?,
        })
    }

    /// A figure of the task by length.
    fn by_length(&self, figure: impl Fn(&Length) -> Option<f64>) -> Vec<Point> {
        let point = |of: &Length| Some(Point::new(of.tokens, figure(of)?));
        let mut points: Vec<Point> = self.lengths.iter().filter_map(point).collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        points
    }
}

/// Every one is that of its place, so none may be left out.
fn losses(value: &Value) -> anyhow::Result<Vec<f64>> {
    // no sum of them leaves the numbers
    let loss = |(i, x): (usize, &Value)| {
        let loss = x.as_f64().filter(|loss| loss.abs() < 1e100);
        loss.with_context(|| format!("loss_by_position: {x} at position {} is no loss", i + 1))
    };
    list(value, "loss_by_position")?.iter().enumerate().map(loss).collect()
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

/// Files of one name in several folders are called by their paths.
fn tell_apart(all: &mut [Evaluation], files: &[PathBuf]) {
    let names: Vec<String> = all.iter().map(|e| e.name.clone()).collect();
    for (e, path) in all.iter_mut().zip(files) {
        if names.iter().filter(|name| **name == e.name).count() > 1 {
            e.name = path.display().to_string();
        }
    }
}

/// Draws into the folder `out` what the files hold: `loss-by-position.svg` of a text; `accuracy-by-length.svg` of a task, with the share of questions for which
/// some layer attended the chunk that holds the answer; `recall-by-length.svg`, the share of the lists that hold it, of the layer that finds it most
/// often, and what lists as long would hold by chance. Returns what was written.
///
/// # Errors
/// When a file cannot be read, is something else or holds nothing to draw, or a picture cannot be written.
pub fn plot_evaluations(files: &[PathBuf], out: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = files.iter().map(|path| Evaluation::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    tell_apart(&mut all, files);
    let (mut losses, mut accuracy, mut recall) = (Vec::new(), Vec::new(), Vec::new());
    let one = all.len() == 1;
    for (number, e) in all.iter().enumerate() {
        // several files have each its colour and dashes in all pictures, and their second figures are thin
        let push = |lines: &mut Vec<Line>, second: bool, name: String, points: Vec<Point>| {
            let (series, thin) = if one { (usize::from(second), false) } else { (number, second) };
            if !points.is_empty() {
                lines.push(Line { name, series, thin, points, runs: Vec::new() });
            }
        };
        push(&mut losses, false, e.name.clone(), by_position(&e.losses));
        push(&mut accuracy, false, format!("{}, accuracy", e.name), e.by_length(|of| of.accuracy));
        let seen = |of: &Length| of.found.and(Some(1.0 - of.unseen?));
        push(&mut accuracy, true, format!("{}, answer attended by a layer", e.name), e.by_length(seen));
        push(&mut recall, false, format!("{}, recall", e.name), e.by_length(|of| Some(of.found?.0)));
        push(&mut recall, true, format!("{}, by chance", e.name), e.by_length(|of| Some(of.found?.1)));
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
            "lists of the best layer that hold the answer's chunk",
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
