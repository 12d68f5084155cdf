//! The tables of a report.

use super::super::plan::Plan;
use super::super::stats::{Estimate, Verdict};
use super::super::table::{Row, Rows};
use super::measures::Measure;
use super::{paired, values};
use crate::config::Config;
use crate::lab::chart::trimmed;

/// A table of text.
pub struct Table {
    pub title: String,
    pub note: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

fn strings<const N: usize>(x: [&str; N]) -> Vec<String> {
    x.map(str::to_string).to_vec()
}

/// `1.234 ± 0.005`
fn plus_minus(e: &Estimate) -> String {
    match e.n {
        0 => "no run finished".into(),
        1 => format!("{} (one seed)", trimmed(e.mean)),
        // equal values differ from their mean by its rounding
        _ if e.half <= 1e-12 * e.mean.abs() => format!("{} ± 0", trimmed(e.mean)),
        _ => format!("{} ± {}", trimmed(e.mean), trimmed(e.half)),
    }
}

/// The accuracy that counts as having left the plateau.
const LEFT: f64 = 0.5;
/// Or, on text, the share of the loss without context.
const LEFT_TEXT: f64 = 0.9;

/// Every measure of every arm.
pub fn summary(arms: &[&str], rows: &Rows, measures: &[Measure]) -> Table {
    let mut head = strings(["arm", "seeds"]);
    head.extend(measures.iter().map(|m| m.title.clone()));
    let row = |arm: &&str| {
        let count = rows.of("run", "finished", "").filter(|r| r.arm == *arm).count();
        let mut cells = vec![arm.to_string(), count.to_string()];
        let estimate = |m: &Measure| Estimate::of(&values(&m.values(rows, arm)));
        cells.extend(measures.iter().map(|m| plus_minus(&estimate(m))));
        cells
    };
    Table {
        title: "At the end".into(),
        note: "Mean over finished seeds ± half the 95 % interval. \"Mean over the run\" averages all validations of a seed first: how \
            fast it was learned."
            .into(),
        head,
        rows: arms.iter().map(row).collect(),
    }
}

/// Paired differences in one measure.
pub fn differences(arms: &[&str], plan: &Plan, rows: &Rows, m: &Measure) -> Table {
    let row = |arm: &&str| {
        let base = m.values(rows, plan.baseline_of(arm));
        let e = Estimate::of(&paired(&m.values(rows, arm), &base));
        let (low, high) = e.interval();
        let words = match (e.verdict(), m.loss) {
            (Verdict::TooFew, _) => "too few seeds",
            (Verdict::Tie, _) => "tie",
            (Verdict::Higher, false) | (Verdict::Lower, true) => "better",
            _ => "worse",
        };
        let number = |x: f64| if x.is_finite() { trimmed(x) } else { "-".into() };
        vec![
            arm.to_string(),
            plan.baseline_of(arm).to_string(),
            e.n.to_string(),
            if e.n == 0 { "-".into() } else { trimmed(e.mean) },
            if e.n < 2 { "-".into() } else { format!("{} to {}", trimmed(low), trimmed(high)) },
            words.into(),
            number(e.detectable()),
        ]
    };
    Table {
        title: format!("Paired differences: {}", m.title),
        note: "Paired by seed. An interval that contains zero is a tie. The last column is the smallest true difference that this \
            many seeds find with a probability of 80 %."
            .into(),
        head: strings(["arm", "against", "pairs", "difference", "95 % interval", "reading", "could have shown"]),
        rows: arms.iter().filter(|a| **a != plan.baseline_of(a)).map(row).collect(),
    }
}

/// What every arm spends.
pub fn budget(plan: &Plan, rows: &Rows) -> Table {
    let row = |(arm, config): &(String, Config)| {
        let mean = |split: &str, metric: &str| Estimate::of(&values(&rows.last(arm, split, metric, "")));
        let params = dash_model::parameters(&config.model, config.data.vocab_size);
        vec![
            arm.clone(),
            params.map_or("too many to count".into(), |n| n.to_string()),
            plus_minus(&mean("val", "attended_tokens")),
            plus_minus(&mean("val", "density")),
            plus_minus(&mean("train", "flops_per_token")),
        ]
    };
    Table {
        title: "Budget".into(),
        note: "Attended tokens: mean number of keys of a query at the last validation, all branches together, averaged over layers, \
            key/value heads and queries; dense (t + 1) / 2. Density: attended chunks / visible chunks. FLOPs a token, forward and \
            backward, at the last update: 6 x matrix elements + 12 h d x layers x attended tokens + 2 h d x layers x scored chunks or \
            windows."
            .into(),
        head: strings(["arm", "parameters", "attended tokens", "density", "FLOPs a token"]),
        rows: plan.arms.iter().map(row).collect(),
    }
}

/// The first validation that shows that a seed left the plateau.
fn left_at(config: &Config, rows: &Rows, arm: &str, seed: u64) -> Option<u64> {
    let own = |r: &&Row| r.arm == arm && r.seed == seed;
    let length = format!("length={}", config.data.seq_len);
    if config.task.is_some() {
        return rows.of("val", "accuracy", &length).filter(own).find(|r| r.value >= LEFT).map(|r| r.step);
    }
    let unigram = rows.of("val", "unigram_loss", "").find(own)?.value;
    rows.of("val", "loss", "").filter(own).find(|r| r.value <= LEFT_TEXT * unigram).map(|r| r.step)
}

/// When seeds left the plateau.
pub fn plateau(config: &Config, arms: &[&str], rows: &Rows) -> Table {
    let row = |arm: &&str| {
        let seeds: Vec<u64> = rows.of("run", "finished", "").filter(|r| r.arm == *arm).map(|r| r.seed).collect();
        let mut steps: Vec<u64> = seeds.iter().filter_map(|&s| left_at(config, rows, arm, s)).collect();
        steps.sort_unstable();
        let list = steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        vec![
            arm.to_string(),
            format!("{} of {}", steps.len(), seeds.len()),
            if list.is_empty() { "-".into() } else { list },
        ]
    };
    let what = match config.task {
        Some(_) => format!("an accuracy of {LEFT} at the training length"),
        None => format!("a validation loss of {LEFT_TEXT} times that of unigrams"),
    };
    Table {
        title: "Leaving the plateau".into(),
        note: format!("The first validation with {what}, seed by seed in order of step."),
        head: strings(["arm", "seeds that left", "at step"]),
        rows: arms.iter().map(row).collect(),
    }
}

/// Whose fault wrong answers are, by length.
pub fn faults(arms: &[&str], rows: &Rows) -> Table {
    let mut lengths = rows.places("val", "accuracy");
    lengths.retain(|at| !at.contains(' '));
    let mut out = Vec::new();
    for at in &lengths {
        for arm in arms {
            let cell = |metric: &str| plus_minus(&Estimate::of(&values(&rows.last(arm, "val", metric, at))));
            let mut row = vec![at.replace('=', " "), arm.to_string()];
            row.extend(["accuracy", "router_missed", "reader_missed", "unseen"].map(cell));
            out.push(row);
        }
    }
    Table {
        title: "Whose fault".into(),
        note: "Shares of all questions. Router missed: wrong, and no layer attended the chunk that holds the answer when it was asked. \
            Reader missed: wrong although some layer did. Unseen: no layer did, right or wrong."
            .into(),
        head: strings(["length", "arm", "right", "router missed", "reader missed", "unseen"]),
        rows: out,
    }
}

/// Figures of the probes that the gradient table shows.
const PROBED: [(&str, &str); 7] = [
    ("score_grad_norm", "norm of dL/ds"),
    ("router_share_q", "share of dL/dq"),
    ("router_share_k", "share of dL/dk"),
    ("cosine_q", "cosine, q"),
    ("pairs_with_gradient", "pairs with gradient"),
    ("dead_chunks", "dead chunks"),
    ("captured_mass", "captured mass"),
];

/// What the last probe saw.
pub fn gradients(arms: &[&str], rows: &Rows) -> Table {
    let mut out = Vec::new();
    for at in rows.places("probe", "router_share_q") {
        for arm in arms {
            let e = |metric: &str| Estimate::of(&values(&rows.last(arm, "probe", metric, &at)));
            if e("captured_mass").n == 0 {
                continue;
            }
            let cell = |(metric, _): &(&str, &str)| if e(metric).n == 0 { "-".into() } else { plus_minus(&e(metric)) };
            let mut row = vec![at.replace('=', " "), arm.to_string()];
            row.extend(PROBED.iter().map(cell));
            out.push(row);
        }
    }
    let mut head = strings(["layer", "arm"]);
    head.extend(PROBED.iter().map(|(_, name)| name.to_string()));
    Table {
        title: "Gradient through the router, last probe".into(),
        note: "Share: |through the router| / (|through the router| + |through the tokens|). Cosine between the two. Pairs with gradient: \
            share of the visible (query, earlier chunk) pairs whose score has one. Dead chunks: share of chunks that no later query \
            chose. Captured mass: share of dense attention's probability that lies in the chosen chunks."
            .into(),
        head,
        rows: out,
    }
}
