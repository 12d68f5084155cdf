//! The figures that arms are judged by.

use super::super::table::Rows;
use crate::config::Config;

/// A figure that arms are judged by.
pub struct Measure {
    pub title: String,
    pub split: &'static str,
    pub metric: &'static str,
    pub at: String,
    /// smaller is better
    pub loss: bool,
    /// mean over all validations instead of the last: how fast it was learned
    pub over_run: bool,
}

impl Measure {
    /// By seed.
    pub fn values(&self, rows: &Rows, arm: &str) -> Vec<(u64, f64)> {
        match self.over_run {
            true => rows.mean(arm, self.split, self.metric, &self.at),
            false => rows.last(arm, self.split, self.metric, &self.at),
        }
    }
}

/// Those of a configuration, in the order of the report.
pub fn measures(config: &Config, rows: &Rows) -> Vec<Measure> {
    let mut out = Vec::new();
    let measure = |title: String, metric: &'static str, at: String, over_run: bool| Measure {
        title,
        split: "val",
        metric,
        at,
        loss: metric == "loss",
        over_run,
    };
    if config.task.is_some() {
        let mut lengths = rows.places("val", "accuracy");
        lengths.retain(|at| !at.contains(' '));
        for at in lengths {
            let title = format!("accuracy at {}", at.replace('=', " "));
            out.push(measure(title, "accuracy", at, false));
        }
        let t = config.data.seq_len;
        out.push(measure(
            format!("accuracy at length {t}, mean over the run"),
            "accuracy",
            format!("length={t}"),
            true,
        ));
    }
    let text = config.reads_text();
    let loss = if text { "validation loss (nats a token)" } else { "loss of the answers (nats)" };
    out.push(measure(loss.into(), "loss", String::new(), false));
    if text {
        out.push(measure(format!("{loss}, mean over the run"), "loss", String::new(), true));
    }
    out
}
