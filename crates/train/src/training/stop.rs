//! When a run has done enough: counts validations that solved its task, in the record of the run.

use std::path::Path;

use serde_json::Value;

use super::tasks::LengthResult;
use crate::config::{Config, Stop};

/// Counts validations of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Watch {
    rule: Stop,
    length: usize,
    /// Validations in a row that reached the accuracy.
    row: u64,
    /// Validations since the task was solved.
    since: Option<u64>,
}

impl Watch {
    /// Of a configuration that has a rule.
    pub fn of(config: &Config) -> Option<Self> {
        config.eval.stop.map(|rule| Watch { rule, length: config.data.seq_len, row: 0, since: None })
    }

    /// A validation's accuracy at the training length.
    fn count(&mut self, accuracy: f64) {
        match &mut self.since {
            Some(n) => *n += 1,
            None => {
                self.row = if accuracy >= self.rule.accuracy { self.row + 1 } else { 0 };
                self.since = (self.row >= self.rule.checks).then_some(0);
            }
        }
    }

    /// Takes a validation in.
    pub fn saw(&mut self, results: &[LengthResult]) {
        if let Some(own) = results.iter().find(|r| r.length == self.length) {
            self.count(own.score.accuracy());
        }
    }

    /// Whether the run has done enough.
    pub fn ended(&self) -> bool {
        self.since.is_some_and(|n| n >= self.rule.after)
    }

    /// Takes in what a run's metrics.jsonl holds up to an update; the update at which the run has done enough, where it has.
    pub fn recall(&mut self, folder: &Path, last: u64) -> Option<u64> {
        let text = std::fs::read(folder.join("metrics.jsonl")).unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines() {
            let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
            let Some(step) = line["step"].as_u64().filter(|&step| step <= last && line["split"] == "val") else {
                continue;
            };
            let own = line["task"].as_array().and_then(|all| all.iter().find(|r| r["length"] == self.length));
            if let Some(own) = own {
                self.count(own["accuracy"].as_f64().unwrap_or(0.0));
            }
            if self.ended() {
                return Some(step);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(checks: u64, after: u64) -> Watch {
        Watch { rule: Stop { accuracy: 0.9, checks, after }, length: 64, row: 0, since: None }
    }

    /// Number of the validation, from 1, at which a run ends.
    fn ends(mut watch: Watch, accuracies: &[f64]) -> Option<usize> {
        let ended = |a: &f64| {
            watch.count(*a);
            watch.ended()
        };
        accuracies.iter().position(ended).map(|i| i + 1)
    }

    #[test]
    fn a_run_ends_after_checks_in_a_row_and_some_more() {
        let told = [0.1, 0.9, 0.89, 0.9, 0.95, 0.2, 1.0, 1.0];
        assert_eq!(ends(watch(1, 0), &told), Some(2));
        assert_eq!(ends(watch(2, 0), &told), Some(5));
        assert_eq!(ends(watch(2, 2), &told), Some(7), "what comes after it does not have to be solved");
        assert_eq!(ends(watch(3, 0), &told), None);
        assert_eq!(ends(watch(2, 4), &told), None);
    }

    #[test]
    fn a_record_says_the_same_as_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let line = |step: u64, split: &str, accuracy: f64| {
            let task = serde_json::json!([{"length": 128, "accuracy": 1.0}, {"length": 64, "accuracy": accuracy}]);
            serde_json::json!({"step": step, "split": split, "task": task}).to_string()
        };
        let lines =
            [line(10, "val", 0.9), line(10, "train", 0.0), line(20, "val", 0.9), line(30, "val", 0.9), "{\"st".into()];
        std::fs::write(dir.path().join("metrics.jsonl"), lines.join("\n")).unwrap();
        assert_eq!(watch(2, 0).recall(dir.path(), 100), Some(20));
        assert_eq!(watch(2, 1).recall(dir.path(), 100), Some(30));
        assert_eq!(watch(2, 0).recall(dir.path(), 19), None, "what a resumed run makes again");
        let mut half = watch(2, 1);
        assert_eq!(half.recall(dir.path(), 20), None);
        half.count(0.0);
        assert!(half.ended());
        assert_eq!(watch(1, 0).recall(&dir.path().join("nowhere"), 100), None);
    }
}
