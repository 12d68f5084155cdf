//! The numbers of a comparison as rows, the one thing that reports are made from: results.csv.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

/// One number of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Arm.
    pub arm: String,
    /// Seed.
    pub seed: u64,
    /// Update.
    pub step: u64,
    /// `train`, `val`, `probe` or `run`.
    pub split: String,
    /// What it is.
    pub metric: String,
    /// Where: empty, `layer=2`, `length=256` or `length=256 distance<64`; of `trained_by` build and machine, `version 0.1.0; commit ...`.
    pub at: String,
    /// The number.
    pub value: f64,
}

/// All rows, and those of finished runs: what means and differences are taken over.
pub struct Results {
    /// Of all runs, those of failed and unfinished ones included.
    pub all: Rows,
    /// Of runs that made all their updates.
    pub finished: Rows,
}

impl Results {
    /// Of these rows.
    pub fn of(all: Rows) -> Self {
        let done: BTreeSet<(&str, u64)> =
            all.of("run", "finished", "").filter(|r| r.value == 1.0).map(|r| (r.arm.as_str(), r.seed)).collect();
        let rows = all.0.iter().filter(|r| done.contains(&(r.arm.as_str(), r.seed))).cloned().collect();
        Results { finished: Rows(rows), all }
    }
}

/// All rows of a comparison.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows(pub Vec<Row>);

/// The metric of a row whose place says which build and machine trained the run.
const MAKER: &str = "trained_by";

const HEAD: &str = "arm,seed,step,split,metric,at,value";

/// Whether a run can have had this figure: none is larger than a number of 32 bits, and sums of fourth powers stay finite.
fn is_figure(value: f64) -> bool {
    value.abs() < 1e60
}

fn value_of(text: &str) -> Option<f64> {
    text.parse().ok().filter(|value| is_figure(*value))
}

impl Rows {
    /// Adds the record of a run.
    ///
    /// # Errors
    /// When there is none.
    pub fn read_run(&mut self, arm: &str, seed: u64, folder: &Path) -> anyhow::Result<()> {
        let path = folder.join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        for (i, line) in text.lines().enumerate() {
            let line = match serde_json::from_str::<Value>(line) {
                Ok(line) => line,
                // a last line that a crash cut is no JSON
                Err(_) if !text.ends_with('\n') && i + 1 == text.lines().count() => continue,
                Err(e) => {
                    let what = "take the run away, and the same command makes it again";
                    anyhow::bail!("{} is damaged: line {} is no record ({e}); {what}", path.display(), i + 1);
                }
            };
            let (Some(step), Some(split)) = (line["step"].as_u64(), line["split"].as_str()) else { continue };
            let mut push = |metric: &str, at: &str, value: &Value| {
                if let Some(value) = value.as_f64().filter(|value| is_figure(*value)) {
                    let (arm, split, metric, at) = (arm.into(), split.into(), metric.into(), at.into());
                    self.0.push(Row { arm, seed, step, split, metric, at, value });
                }
            };
            let object = |v: &Value| v.as_object().cloned().unwrap_or_default();
            for (key, value) in object(&line) {
                if !["step", "tokens_per_s", "lr"].contains(&key.as_str()) {
                    push(&key, "", &value);
                }
            }
            for layer in line["layers"].as_array().into_iter().flatten() {
                let at = format!("layer={}", layer["layer"]);
                for (key, value) in object(layer).iter().filter(|(k, _)| *k != "layer") {
                    push(key, &at, value);
                }
            }
            for (i, density) in line["layer_density"].as_array().into_iter().flatten().enumerate() {
                push("density", &format!("layer={i}"), density);
            }
            for result in line["task"].as_array().into_iter().flatten() {
                let at = format!("length={}", result["length"]);
                for (key, value) in object(result).iter().filter(|(k, _)| *k != "length") {
                    push(key, &at, value);
                }
                for (list, key) in [("by_question", "question"), ("layers", "layer")] {
                    for part in result[list].as_array().into_iter().flatten() {
                        let at = format!("{at} {key}={}", part[key]);
                        for (name, value) in object(part).iter().filter(|(k, _)| *k != key) {
                            push(name, &at, value);
                        }
                    }
                }
                for bin in result["by_distance"].as_array().into_iter().flatten() {
                    let at = format!("{at} distance<{}", bin["distance_below"]);
                    for (key, value) in object(bin).iter().filter(|(k, _)| *k != "distance_below") {
                        push(key, &at, value);
                    }
                }
            }
        }
        Ok(())
    }

    /// Rows of an earlier build say of a run only whether it finished: its length is that of the configuration.
    pub fn complete(&mut self, steps: u64) {
        let told: BTreeSet<(String, u64)> = self.of("run", "steps", "").map(|r| (r.arm.clone(), r.seed)).collect();
        let runs: BTreeSet<(String, u64)> = self.0.iter().map(|r| (r.arm.clone(), r.seed)).collect();
        for (arm, seed) in runs.difference(&told) {
            self.push_run(arm, *seed, steps, "steps", steps as f64);
        }
    }

    /// Adds a figure of a run as a whole.
    pub fn push_run(&mut self, arm: &str, seed: u64, step: u64, metric: &str, value: f64) {
        let (arm, split, metric) = (arm.into(), "run".into(), metric.into());
        self.0.push(Row { arm, seed, step, split, metric, at: String::new(), value });
    }

    /// Adds a build and machine that trained a run, in words: in the place of a number it has 1.
    pub fn push_maker(&mut self, arm: &str, seed: u64, step: u64, maker: &str) {
        // a field holds no comma and no quote
        let at = maker.replace(", ", "; ").replace([',', '"', '\n', '\r'], " ");
        let (arm, split, metric) = (arm.into(), "run".into(), MAKER.into());
        self.0.push(Row { arm, seed, step, split, metric, at, value: 1.0 });
    }

    /// Builds and machines of all runs, one a run and build.
    pub fn makers(&self) -> impl Iterator<Item = String> + '_ {
        let own = self.0.iter().filter(|r| r.split == "run" && r.metric == MAKER);
        own.map(|r| r.at.replace("; ", ", "))
    }

    /// As CSV. No field holds a comma or a quote: arms are checked, the rest is ours.
    pub fn csv(&self) -> String {
        let mut out = format!("{HEAD}\n");
        for r in &self.0 {
            out += &format!("{},{},{},{},{},{},{}\n", r.arm, r.seed, r.step, r.split, r.metric, r.at, r.value);
        }
        out
    }

    /// Reads [`Rows::csv`] back.
    ///
    /// # Errors
    /// When a line has other columns, no number where one belongs, or the figure of an earlier line.
    pub fn from_csv(text: &str) -> anyhow::Result<Self> {
        let mut lines = text.lines();
        anyhow::ensure!(lines.next() == Some(HEAD), "the first line is not {HEAD}");
        let (mut rows, mut seen) = (Vec::new(), HashSet::new());
        for (i, line) in lines.enumerate() {
            let fields: Vec<&str> = line.split(',').collect();
            let read = match fields[..] {
                [arm, seed, step, split, metric, at, value] => {
                    let numbers = seed.parse().ok().zip(step.parse().ok()).zip(value_of(value));
                    numbers.map(|((seed, step), value)| Row {
                        arm: arm.into(),
                        seed,
                        step,
                        split: split.into(),
                        metric: metric.into(),
                        at: at.into(),
                        value,
                    })
                }
                _ => None,
            };
            let number = i + 2;
            let Some(row) = read else {
                anyhow::bail!(
                    "line {number} is {line:?}, expected {HEAD} with finite numbers for seed, step and value; bring the whole file"
                );
            };
            let figure = line.rsplit_once(',').map_or(line, |(figure, _)| figure);
            anyhow::ensure!(seen.insert(figure), "line {number} has {figure} once more; a run counts once");
            rows.push(row);
        }
        Ok(Rows(rows))
    }

    /// Rows of one figure.
    pub fn of<'a>(&'a self, split: &'a str, metric: &'a str, at: &'a str) -> impl Iterator<Item = &'a Row> + 'a {
        self.0.iter().filter(move |r| r.split == split && r.metric == metric && r.at == at)
    }

    /// The last value of a figure of every seed of an arm.
    pub fn last(&self, arm: &str, split: &str, metric: &str, at: &str) -> Vec<(u64, f64)> {
        let mut out: Vec<(u64, f64)> = Vec::new();
        for r in self.of(split, metric, at).filter(|r| r.arm == arm) {
            match out.iter_mut().find(|(seed, _)| *seed == r.seed) {
                Some(entry) => entry.1 = r.value,
                None => out.push((r.seed, r.value)),
            }
        }
        out.sort_by_key(|(seed, _)| *seed);
        out
    }

    /// The mean over all steps of a figure of every seed of an arm.
    pub fn mean(&self, arm: &str, split: &str, metric: &str, at: &str) -> Vec<(u64, f64)> {
        let mut sums = std::collections::BTreeMap::<u64, (f64, f64)>::new();
        for r in self.of(split, metric, at).filter(|r| r.arm == arm) {
            let sum = sums.entry(r.seed).or_default();
            *sum = (sum.0 + r.value, sum.1 + 1.0);
        }
        sums.into_iter().map(|(seed, (sum, n))| (seed, sum / n)).collect()
    }

    /// Values of a figure by step, over the seeds of an arm.
    pub fn curve(&self, arm: &str, split: &str, metric: &str, at: &str) -> Vec<(u64, Vec<f64>)> {
        let mut out = std::collections::BTreeMap::<u64, Vec<f64>>::new();
        for r in self.of(split, metric, at).filter(|r| r.arm == arm) {
            out.entry(r.step).or_default().push(r.value);
        }
        out.into_iter().collect()
    }

    /// The same where runs stop at different updates: a run that has stopped keeps its last value up to the last step of any arm.
    pub fn held_curve(&self, arm: &str, split: &str, metric: &str, at: &str) -> Vec<(u64, Vec<f64>)> {
        let steps: BTreeSet<u64> = self.of(split, metric, at).map(|r| r.step).collect();
        let runs = self.curves(arm, split, metric, at);
        let value = |run: &[(f64, f64)], step: u64| run.iter().rev().find(|p| p.0 <= step as f64).map(|p| p.1);
        let all =
            steps.into_iter().map(|step| (step, runs.iter().filter_map(|run| value(run, step)).collect::<Vec<_>>()));
        all.filter(|(_, values)| !values.is_empty()).collect()
    }

    /// The same seed by seed, for pictures: (step, value).
    pub fn curves(&self, arm: &str, split: &str, metric: &str, at: &str) -> Vec<Vec<(f64, f64)>> {
        let mut out = std::collections::BTreeMap::<u64, Vec<(f64, f64)>>::new();
        for r in self.of(split, metric, at).filter(|r| r.arm == arm) {
            out.entry(r.seed).or_default().push((r.step as f64, r.value));
        }
        out.into_values().collect()
    }

    /// The different places of a figure, in order of appearance.
    pub fn places(&self, split: &str, metric: &str) -> Vec<String> {
        let mut out: Vec<String> = Vec::new();
        for r in self.0.iter().filter(|r| r.split == split && r.metric == metric && !r.at.is_empty()) {
            if !out.contains(&r.at) {
                out.push(r.at.clone());
            }
        }
        out
    }
}
