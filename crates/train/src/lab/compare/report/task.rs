//! What a task and a router add to a report: accuracy by question beside what needs no key, where the budget goes, the controller.

use super::super::text::number;
use super::study::{Section, Study};
use crate::lab::stats::Estimate;

/// Mean over finished seeds of the last value; `-` where there is none.
fn last(study: &Study, arm: &str, split: &str, metric: &str, at: &str) -> String {
    let values: Vec<f64> = study.results.finished.last(arm, split, metric, at).iter().map(|v| v.1).collect();
    if values.is_empty() { "-".into() } else { number(Estimate::of(&values).mean) }
}

/// The places of a figure at the training length that name a `key`.
fn places(study: &Study, metric: &str, key: &str) -> Vec<String> {
    let mut all = study.results.finished.places("val", metric);
    all.retain(|at| at.contains(&format!(" {key}=")));
    all
}

/// What is behind the sign: `2` of `length=64 question=2`.
fn behind(at: &str) -> &str {
    at.rsplit('=').next().unwrap_or_default()
}

/// What a model reaches at the training length that never matches a key, where there is a task.
pub fn shortcut(study: &Study) -> Option<f64> {
    let c = study.plan.base();
    Some(c.task.as_ref()?.shortcut(c.data.seq_len, c.data.vocab_size).accuracy)
}

/// Accuracy by the number of the question, where runs wrote it.
pub fn questions(study: &Study) -> Option<Section> {
    let own = format!("length={} ", study.plan.base().data.seq_len);
    let places: Vec<String> =
        places(study, "shortcut", "question").into_iter().filter(|at| at.starts_with(&own)).collect();
    if places.is_empty() {
        return None;
    }
    let row = |name: &str, metric: &str, arm: &str| {
        let cells = places.iter().map(|at| last(study, arm, "val", metric, at));
        [name.to_string()].into_iter().chain(cells).collect::<Vec<String>>()
    };
    let arms = study.plan.names();
    let mut rows = vec![row("without matching a key", "shortcut", arms[0])];
    rows.extend(arms.iter().map(|arm| row(arm, "accuracy", arm)));
    let mut section = Section::new("Accuracy by question").with_table([], rows).with_note(
        "Means over finished seeds, at the last validation. First row: a model that counts the values of the sequence, crosses off those that \
         answers have shown since, and names the most frequent of the rest; simulated.",
    );
    if let Some(table) = &mut section.table {
        let numbers = places.iter().map(|at| format!("question {}", behind(at)));
        table.head = ["arm".to_string()].into_iter().chain(numbers).collect();
    }
    Some(section)
}

/// Where the attended tokens are, by length, layer and half, where runs wrote it.
pub fn spent(study: &Study) -> Option<Section> {
    const FIGURES: [&str; 5] =
        ["tokens_first_half", "tokens_second_half", "tokens_asked", "answer_recall", "answer_chance"];
    let mut rows = Vec::new();
    for at in places(study, "tokens_asked", "layer") {
        for arm in study.plan.names() {
            let cells = FIGURES.map(|metric| last(study, arm, "val", metric, &at));
            if cells.iter().any(|cell| cell != "-") {
                rows.push([at.replace('=', " "), arm.to_string()].into_iter().chain(cells).collect());
            }
        }
    }
    let head = ["place", "arm", "first half", "second half", "where it asks", "answer's chunk", "by chance"];
    (!rows.is_empty()).then(|| {
        Section::new("Where the budget goes").with_table(head, rows).with_note(
            "Mean tokens in the attended chunks of a query in the first and in the second half of the positions, and of one that asks; then \
             the share of lists (one a key/value head) of asking queries that hold the chunk of the answer, where that is not the own one, and \
             what lists of the same lengths would hold if they were drawn at random. Means over finished seeds, last validation.",
        )
    })
}

/// gamma over the run and how often the gradient was clipped, from the logged updates.
pub fn knobs(study: &Study) -> Option<Section> {
    let rows = &study.results.finished;
    let row = |arm: &str| -> Option<Vec<String>> {
        let clip = study.plan.arms.iter().find(|(name, _)| name == arm)?.1.optim.clip;
        let norms: Vec<f64> = rows.of("train", "grad_norm", "").filter(|r| r.arm == arm).map(|r| r.value).collect();
        let clipped = norms.iter().filter(|n| clip > 0.0 && **n > clip).count() as f64 / norms.len() as f64;
        let gamma = |part: f64| {
            let of =
                |curve: Vec<(f64, f64)>| curve.get((part * (curve.len() as f64 - 1.0)).round() as usize).map(|p| p.1);
            let values: Vec<f64> = rows.curves(arm, "train", "gamma", "").into_iter().filter_map(of).collect();
            if values.is_empty() { "-".into() } else { number(Estimate::of(&values).mean) }
        };
        (!norms.is_empty()).then(|| vec![arm.into(), gamma(0.0), gamma(0.5), gamma(1.0), number(clipped)])
    };
    let table: Vec<Vec<String>> = study.plan.names().into_iter().filter_map(row).collect();
    let head = ["arm", "gamma, start", "middle", "end", "clipped"];
    (!table.is_empty()).then(|| {
        Section::new("Gamma and clipping").with_table(head, table).with_note(
            "gamma at the first, the middle and the last logged update of a run, mean over finished seeds. Clipped: share of logged updates \
             whose gradient norm was above optim.clip.",
        )
    })
}
