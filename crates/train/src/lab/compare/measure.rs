//! The figures that arms are judged by.

use super::table::{Results, Rows};
use crate::config::{Compare, Config};
use crate::lab::stats::Time;

/// How a figure is taken from the rows of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Take {
    /// The last validation.
    Last,
    /// The mean over all validations: how fast it was learned.
    Mean,
    /// The update at which the task was solved, or the last one where it was not.
    Time,
}

/// What values look like, and so how they are tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nearly normal over seeds: Student's t.
    Loss,
    /// Bounded and often all or nothing: exact tests only.
    Accuracy,
    /// Censored at the end of the run: exact tests only.
    Time,
}

/// A figure that arms are judged by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measure {
    /// What `compare.primary` calls it.
    pub key: String,
    /// What a reader calls it.
    pub title: String,
    /// How it is tested.
    pub kind: Kind,
    metric: &'static str,
    /// Its standard error within one validation, where it is a loss.
    error: &'static str,
    at: String,
    take: Take,
}

impl Measure {
    /// Whether smaller is better.
    pub fn falls(&self) -> bool {
        self.kind != Kind::Accuracy
    }

    /// Of every seed of an arm that has one. A run that never solved its task has the length of the run as its time.
    pub fn values(&self, results: &Results, arm: &str, rules: &Compare) -> Vec<(u64, f64)> {
        let rows = &results.finished;
        match self.take {
            Take::Last => rows.last(arm, "val", self.metric, &self.at),
            Take::Mean => rows.mean(arm, "val", self.metric, &self.at),
            Take::Time => {
                times(&results.all, arm, &self.at, rules).into_iter().map(|(seed, time)| (seed, time.at)).collect()
            }
        }
    }

    /// Times of every seed of an arm; none for other measures.
    pub fn times(&self, results: &Results, arm: &str, rules: &Compare) -> Vec<(u64, Time)> {
        match self.take {
            Take::Time => times(&results.all, arm, &self.at, rules),
            _ => Vec::new(),
        }
    }

    /// The standard error that the sample of one validation alone gives a run, the root of the mean square over seeds, and what it is of;
    /// none for figures of several validations, and for losses in records of earlier builds.
    pub fn evaluation_error(&self, results: &Results, arm: &str) -> Option<(f64, String)> {
        if self.take != Take::Last {
            return None;
        }
        let last = |metric: &str| results.finished.last(arm, "val", metric, &self.at);
        let root = |squares: &[f64]| (squares.iter().sum::<f64>() / squares.len() as f64).sqrt();
        match self.kind {
            Kind::Accuracy => {
                let asked = last("asked").first()?.1;
                let squares: Vec<f64> = last(self.metric).iter().map(|(_, p)| p * (1.0 - p) / asked).collect();
                Some((root(&squares), format!("{asked} questions")))
            }
            Kind::Loss => {
                let squares: Vec<f64> = last(self.error).iter().map(|(_, error)| error * error).collect();
                (!squares.is_empty()).then(|| (root(&squares), "over sequences".to_string()))
            }
            Kind::Time => None,
        }
    }
}

/// When each seed of an arm solved its task: the last of `checks` validations in a row with at least `solved`. A run that failed
/// never did, up to its last planned update; one that is not finished says nothing yet.
fn times(rows: &Rows, arm: &str, at: &str, rules: &Compare) -> Vec<(u64, Time)> {
    let one = |split: &'static str, metric: &'static str| rows.last(arm, split, metric, "");
    let is = |flags: &[(u64, f64)], seed: u64| flags.iter().any(|(s, v)| *s == seed && *v == 1.0);
    let (finished, failed) = (one("run", "finished"), one("run", "failed"));
    let ends = one("run", "steps");
    let mut out = Vec::new();
    for (seed, end) in ends.into_iter().filter(|(s, _)| is(&finished, *s) || is(&failed, *s)) {
        let (mut row, mut time) = (0, Time { at: end, happened: false });
        for r in rows.of("val", "accuracy", at).filter(|r| r.arm == arm && r.seed == seed) {
            row = if r.value >= rules.solved { row + 1 } else { 0 };
            if row >= rules.checks {
                time = Time { at: r.step as f64, happened: true };
                break;
            }
        }
        out.push((seed, time));
    }
    out
}

/// What the arms of a configuration measure, in the order of the report: the primary outcome first.
pub fn measures(config: &Config) -> Vec<Measure> {
    let measure = |key: &str, title: String, kind: Kind, at: String, take: Take| {
        let metric = if kind == Kind::Loss { "loss" } else { "accuracy" };
        Measure { key: key.into(), title, kind, metric, error: "loss_error", at, take }
    };
    let mut out = Vec::new();
    if let Some(task) = &config.task {
        let t = config.data.seq_len;
        let own = format!("length={t}");
        out.push(measure("accuracy", format!("accuracy at length {t}"), Kind::Accuracy, own.clone(), Take::Last));
        out.push(measure("time-to-solve", "time to solve (updates)".into(), Kind::Time, own.clone(), Take::Time));
        let mut lengths: Vec<usize> = task.eval_lengths.iter().copied().filter(|l| *l != t).collect();
        lengths.sort_unstable();
        lengths.dedup();
        for l in lengths {
            let (key, title) = (format!("accuracy length={l}"), format!("accuracy at length {l}"));
            out.push(measure(&key, title, Kind::Accuracy, format!("length={l}"), Take::Last));
        }
        let title = format!("accuracy at length {t}, mean over the run");
        out.push(measure("mean accuracy", title, Kind::Accuracy, own, Take::Mean));
    }
    let text = config.reads_text();
    let loss = if text { "validation loss (nats a token)" } else { "loss of the answers (nats)" };
    out.push(measure("loss", loss.into(), Kind::Loss, String::new(), Take::Last));
    out.push(measure("mean loss", format!("{loss}, mean over the run"), Kind::Loss, String::new(), Take::Mean));
    if config.eval.far.is_some() {
        let far = |key: &str, title: &str, metric, error| Measure {
            metric,
            error,
            ..measure(key, title.into(), Kind::Loss, String::new(), Take::Last)
        };
        let title = "loss of far and rare targets (nats a token)";
        out.push(far("far loss", title, "far_loss", "far_loss_error"));
        let title = "loss of targets as rare without an earlier occurrence (nats a token)";
        out.push(far("far control loss", title, "far_control_loss", ""));
    }
    // runs that stop when they are solved have means over different updates
    if config.compare.as_ref().is_some_and(|c| c.stop_after.is_some()) || config.eval.stop.is_some() {
        out.retain(|m| m.take != Take::Mean);
    }
    let primary = config.compare.as_ref().map_or("", |c| c.primary.as_str());
    // stable: the others keep their order
    out.sort_by_key(|m| m.key != primary);
    out
}
