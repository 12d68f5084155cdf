//! Pictures show the numbers of the record: every point of every line, and every label of the axes, by one linear map a picture.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// Numbers after `name="` or after a letter of a path.
fn numbers(text: &str) -> Vec<f64> {
    text.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-')).filter_map(|n| n.parse().ok()).collect()
}

/// What stands between `name="` and the next quote.
fn attribute<'a>(element: &'a str, name: &str) -> &'a str {
    let start = element.find(&format!(" {name}=\"")).unwrap_or_else(|| panic!("{name} in {element}"));
    element[start + name.len() + 3..].split('"').next().unwrap()
}

/// The points of the first `count` lines, and the labels (place, number) of the y and the x axis.
struct Picture {
    lines: Vec<Vec<(f64, f64)>>,
    /// class of the colour, and whether it is of full width
    signs: Vec<(String, bool)>,
    y: Vec<(f64, f64)>,
    x: Vec<(f64, f64)>,
    text: String,
}

impl Picture {
    fn read(path: &Path, count: usize) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let pairs = |element: &str| numbers(attribute(element, "d")).chunks(2).map(|p| (p[0], p[1])).collect();
        let drawn = text.lines().filter(|l| l.starts_with("<path") && l.contains("stroke-linejoin=\"round\""));
        let drawn: Vec<&str> = drawn.take(count).collect();
        let lines: Vec<_> = drawn.iter().map(|element| pairs(element)).collect();
        let signs = drawn.iter().map(|l| (attribute(l, "class").into(), l.contains("stroke-width=\"2\""))).collect();
        // muted text: labels of y end at the axis, those of x stand in the middle below it
        let label = |l: &str| l.split('>').nth(1)?.split('<').next()?.replace('−', "-").parse::<f64>().ok();
        let labels = |anchor: &str, place: &str, shift: f64| {
            let of = text.lines().filter(|l| l.contains(&format!("text-anchor=\"{anchor}\" class=\"m\"")));
            of.filter_map(|l| Some((numbers(attribute(l, place))[0] + shift, label(l)?))).collect::<Vec<_>>()
        };
        // the base line of a text lies 4 below the middle of its digits
        Picture { lines, signs, y: labels("end", "y", -4.0), x: labels("middle", "x", 0.0), text }
    }

    /// Asserts that places follow numbers by the line through the two outer labels of each axis. Places are rounded to a tenth.
    fn shows(&self, want: &[&[(f64, f64)]]) {
        assert_eq!(self.lines.len(), want.len());
        let map = |labels: &[(f64, f64)]| {
            assert!(labels.len() >= 2, "{labels:?}");
            let (a, b) = (labels[0], labels[labels.len() - 1]);
            move |number: f64| a.0 + (number - a.1) * (b.0 - a.0) / (b.1 - a.1)
        };
        let (x, y) = (map(&self.x), map(&self.y));
        let near = |got: f64, want: f64| assert!((got - want).abs() <= 0.3, "{got}, by the labels {want}");
        self.y.iter().for_each(|&(place, number)| near(place, y(number)));
        self.x.iter().for_each(|&(place, number)| near(place, x(number)));
        for (line, want) in self.lines.iter().zip(want) {
            assert_eq!(line.len(), want.len(), "{line:?} {want:?}");
            for (&(px, py), &(wx, wy)) in line.iter().zip(want.iter()) {
                near(px, x(wx));
                near(py, y(wy));
            }
        }
        // more is higher up
        assert!(y(2.0) < y(1.0) && x(2.0) > x(1.0));
    }
}

fn record(folder: &Path, lines: &[Value]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("metrics.jsonl"), lines.iter().map(|l| format!("{l}\n")).collect::<String>()).unwrap();
}

fn plot(dir: &Path, runs: &[&str]) {
    let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
    c.arg("plot");
    runs.iter().for_each(|run| {
        c.args(["--model", run]);
    });
    let o = c.args(["--out", "pictures"]).current_dir(dir).output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
}

fn train(step: u64, loss: f64, layers: &[f64]) -> Value {
    let mean = layers.iter().sum::<f64>() / layers.len().max(1) as f64;
    let layers: Vec<Value> = layers.iter().map(|d| json!({"density": d})).collect();
    let mut line = json!({"step": step, "split": "train", "loss": loss});
    if !layers.is_empty() {
        line["density"] = json!(mean);
        line["layers"] = json!(layers);
    }
    line
}

fn val(step: u64, loss: f64) -> Value {
    json!({"step": step, "split": "val", "loss": loss, "density": 0.9})
}

#[test]
fn a_run_is_drawn_as_its_record_says() {
    let dir = tempfile::tempdir().unwrap();
    let lines = [
        train(1, 6.0, &[1.0, 0.9]),
        train(50, 4.25, &[0.8, 0.3]),
        val(50, 4.5),
        train(75, 4.75, &[0.5, 0.6]),
        train(100, 3.0, &[0.4, 0.2]),
        val(100, 3.5),
    ];
    record(&dir.path().join("one"), &lines);
    plot(dir.path(), &["one"]);
    let loss = Picture::read(&dir.path().join("pictures/loss.svg"), 2);
    loss.shows(&[&[(1.0, 6.0), (50.0, 4.25), (75.0, 4.75), (100.0, 3.0)], &[(50.0, 4.5), (100.0, 3.5)]]);
    assert!(["one, training", "one, validation", "nats a token", "step"].iter().all(|t| loss.text.contains(t)));
    let density = Picture::read(&dir.path().join("pictures/density.svg"), 3);
    density.shows(&[
        &[(1.0, 1.0), (50.0, 0.8), (75.0, 0.5), (100.0, 0.4)],
        &[(1.0, 0.9), (50.0, 0.3), (75.0, 0.6), (100.0, 0.2)],
        &[(1.0, 0.95), (50.0, 0.55), (75.0, 0.55), (100.0, 0.3)],
    ]);
    assert!(["layer 0", "layer 1", "mean", "attended / visible chunks"].iter().all(|t| density.text.contains(t)));
}

#[test]
fn several_runs_share_a_picture_and_dense_ones_have_no_density() {
    let dir = tempfile::tempdir().unwrap();
    record(
        &dir.path().join("a"),
        &[train(1, 5.0, &[0.5, 0.7]), train(20, 4.0, &[0.3, 0.1]), val(1, 5.5), val(20, 4.5)],
    );
    record(&dir.path().join("b"), &[train(1, 6.0, &[]), train(20, 3.0, &[]), val(1, 6.5), val(20, 3.5)]);
    plot(dir.path(), &["a", "b"]);
    let loss = Picture::read(&dir.path().join("pictures/loss.svg"), 4);
    // a run has one colour, its training is thin
    let signs: Vec<_> = loss.signs.iter().map(|(class, full)| (class.as_str(), *full)).collect();
    assert_eq!(signs, [("s0", false), ("s0", true), ("s1", false), ("s1", true)]);
    let line = |first: f64, last: f64| [(1.0, first), (20.0, last)];
    loss.shows(&[&line(5.0, 4.0), &line(5.5, 4.5), &line(6.0, 3.0), &line(6.5, 3.5)]);
    let density = Picture::read(&dir.path().join("pictures/density.svg"), 1);
    density.shows(&[&line(0.6, 0.2)]);
    assert!(density.text.contains(">a<") && !density.text.contains(">b<") && !density.text.contains("layer 0"));
}

/// What `plot` with these arguments says in a folder.
fn plot_with(dir: &Path, args: &[&str]) -> std::process::Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_train"));
    c.arg("plot").args(args).args(["--out", "pictures"]).current_dir(dir).output().unwrap()
}

#[test]
fn evaluations_are_drawn_by_position_and_by_length() {
    let dir = tempfile::tempdir().unwrap();
    let row = |length: u64, accuracy: f64, unseen: f64, recall: [f64; 2]| {
        let layers: Vec<Value> = recall.iter().map(|r| json!({"answer_recall": r, "answer_chance": r / 2.0})).collect();
        json!({"length": length, "accuracy": accuracy, "unseen": unseen, "layers": layers})
    };
    let long = json!({
        "loss_by_position": [6.0, 4.0, 2.0],
        "task": [row(64, 1.0, 0.0, [0.9, 0.7]), row(256, 0.5, 0.25, [0.6, 0.2])],
    });
    fs::write(dir.path().join("long.json"), long.to_string()).unwrap();
    let dense = json!({"loss_by_position": [6.0, 5.0, 3.0], "task": [{"length": 64, "accuracy": 0.75, "unseen": 0.0, "layers": []}]});
    fs::write(dir.path().join("dense.json"), dense.to_string()).unwrap();
    let o = plot_with(dir.path(), &["--eval", "long.json", "dense.json"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let read = |name: &str, lines: usize| Picture::read(&dir.path().join("pictures").join(name), lines);
    let log = |points: &[(f64, f64)]| points.iter().map(|p| (p.0.log2(), p.1)).collect::<Vec<_>>();
    let mut losses = read("loss-by-position.svg", 2);
    losses.x.iter_mut().for_each(|(_, number)| *number = number.log2());
    losses.shows(&[&log(&[(1.0, 6.0), (2.0, 4.0), (3.0, 2.0)]), &log(&[(1.0, 6.0), (2.0, 5.0), (3.0, 3.0)])]);
    let mut accuracy = read("accuracy-by-length.svg", 2);
    accuracy.x.iter_mut().for_each(|(_, number)| *number = number.log2());
    accuracy.shows(&[&log(&[(64.0, 1.0), (256.0, 0.5)]), &log(&[(64.0, 1.0), (256.0, 0.75)])]);
    // a dense model attends everything: no line of its own says so
    assert!(accuracy.text.contains(">dense, accuracy<") && !accuracy.text.contains("dense, answer"));
    let mut recall = read("recall-by-length.svg", 2);
    recall.x.iter_mut().for_each(|(_, number)| *number = number.log2());
    recall.shows(&[&log(&[(64.0, 0.9), (256.0, 0.6)]), &log(&[(64.0, 0.45), (256.0, 0.3)])]);
    assert_eq!(recall.signs.iter().map(|s| s.0.as_str()).collect::<Vec<_>>(), ["s0", "s0"]);
    assert_eq!(accuracy.signs.iter().map(|s| s.1).collect::<Vec<_>>(), [true, false]);
    // a layer that does not route has no recall; files of one name are told apart
    for folder in ["a", "b"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
        let some = json!({"task": [{"length": 64, "accuracy": 0.5, "unseen": 0.5, "layers": [{"answer_recall": null}, {"answer_recall": 0.5}]}]});
        fs::write(dir.path().join(folder).join("eval.json"), some.to_string()).unwrap();
    }
    let o = plot_with(dir.path(), &["--eval", "a/eval.json", "b/eval.json"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let text = read("accuracy-by-length.svg", 2).text;
    assert!(text.contains(">a/eval.json, accuracy<") && text.contains(">b/eval.json, accuracy<"), "{text}");
}

#[test]
fn what_would_be_drawn_as_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |args: &[&str], what: &[&str]| {
        let o = plot_with(dir.path(), args);
        let told = String::from_utf8_lossy(&o.stderr).into_owned();
        assert_eq!(o.status.code(), Some(2), "{told}");
        what.iter().for_each(|w| assert!(told.contains(w), "{w}: {told}"));
    };
    refused(&[], &["--model DIR", "--eval FILE"]);
    refused(&["--eval", "nowhere.json"], &["nowhere.json"]);
    fs::write(dir.path().join("list.json"), "[1]").unwrap();
    refused(&["--eval", "list.json"], &["list.json", "eval --json"]);
    fs::write(dir.path().join("other.json"), "{}").unwrap();
    refused(&["--eval", "other.json"], &["neither loss by position nor a task"]);
    let wrong = [
        (json!({"loss_by_position": [6.0, null, 2.0]}), "loss_by_position: null at position 2 is no loss"),
        (json!({"loss_by_position": ["6.0"]}), "loss_by_position: \"6.0\" at position 1 is no loss"),
        (json!({"loss_by_position": {"1": 6.0}}), "loss_by_position is no list"),
        (json!({"task": [{"length": 64, "accuracy": 7.5}]}), "length 64: accuracy: 7.5 is no share"),
        (json!({"task": [{"length": -5, "accuracy": 0.5}]}), "length -5 is no number of tokens"),
        (json!({"task": [{"length": 64, "layers": [{"answer_recall": "1"}]}]}), "answer_recall: \"1\" is no share"),
    ];
    for (file, what) in wrong {
        fs::write(dir.path().join("wrong.json"), file.to_string()).unwrap();
        refused(&["--eval", "wrong.json"], &["wrong.json", what]);
    }
}
