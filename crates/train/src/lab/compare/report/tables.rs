//! The tables of a report.

use super::super::measure::{Kind, Measure};
use super::super::text::{number, plus_minus, rounded};
use super::super::tuning::label;
use super::charts;
use super::study::{Section, Study};
use crate::lab::chart::trimmed;
use crate::lab::stats::{Estimate, Time};

fn values(pairs: &[(u64, f64)]) -> Vec<f64> {
    pairs.iter().map(|p| p.1).collect()
}

/// The last values of a figure, over seeds.
fn last(study: &Study, arm: &str, split: &str, metric: &str, at: &str) -> Estimate {
    Estimate::of(&values(&study.results.finished.last(arm, split, metric, at)))
}

fn of_arm(study: &Study, m: &Measure, arm: &str) -> Vec<(u64, f64)> {
    m.values(study.results, arm, &study.plan.rules)
}

/// A mean with the smallest and the largest value, `0.62 (0.3 to 0.95)`: for shares, which a t interval of a few seeds would put outside
/// 0 to 1, and for times.
fn spread(values: &[f64]) -> String {
    let e = Estimate::of(values);
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
    let of = |x: f64| rounded(x, e.deviation).0;
    match values.len() {
        0 => "no run finished".into(),
        1 => format!("{} (one seed)", trimmed(e.mean)),
        _ if low == high => format!("{} in all", trimmed(low)),
        _ => format!("{} ({} to {})", of(e.mean), of(low), of(high)),
    }
}

/// As [`spread`], of times of which those that nobody reached are where the runs ended: how many, or that none was.
pub(super) fn time(times: &[(u64, Time)]) -> String {
    let at: Vec<f64> = times.iter().map(|(_, t)| t.at).collect();
    match times.iter().filter(|(_, t)| !t.happened).count() {
        0 => spread(&at),
        n if n == at.len() => format!("none by {}", trimmed(at.iter().copied().fold(0.0, f64::max))),
        n => format!("{}, {n} censored", spread(&at)),
    }
}

/// Every value of the first measure, raw.
pub fn seeds(study: &Study) -> Section {
    let (m, arms) = (&study.measures[0], study.plan.names());
    let times: Vec<_> = arms.iter().map(|arm| m.times(study.results, arm, &study.plan.rules)).collect();
    let columns: Vec<_> = arms.iter().map(|arm| of_arm(study, m, arm)).collect();
    let mut seeds: Vec<u64> = columns.iter().flatten().map(|v| v.0).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let cell = |i: usize, seed: u64| {
        let never = times[i].iter().any(|(s, t)| *s == seed && !t.happened);
        let value = columns[i].iter().find(|v| v.0 == seed);
        value.map_or("-".into(), |v| if never { format!("> {}", v.1) } else { trimmed(v.1) })
    };
    let row = |&seed: &u64| {
        let cells = (0..arms.len()).map(|i| cell(i, seed));
        [seed.to_string()].into_iter().chain(cells).collect::<Vec<String>>()
    };
    let mut section =
        Section::new(&format!("Seed by seed: {}", m.title)).with_table([], seeds.iter().map(row).collect());
    if let Some(table) = &mut section.table {
        table.head = ["seed"].into_iter().chain(arms).map(str::to_string).collect();
    }
    section
}

/// Every measure of every arm.
pub fn summary(study: &Study) -> Section {
    let cell = |m: &Measure, arm: &str| {
        let v = values(&of_arm(study, m, arm));
        match m.kind {
            Kind::Loss => plus_minus(&Estimate::of(&v)),
            // a mean of all or nothing has no interval worth the name
            Kind::Accuracy => spread(&v),
            Kind::Time => time(&m.times(study.results, arm, &study.plan.rules)),
        }
    };
    let row = |arm: &str| {
        let count = study.results.all.of("run", "finished", "").filter(|r| r.arm == arm && r.value == 1.0).count();
        let cells = study.measures.iter().map(|m| cell(m, arm));
        [arm.to_string(), count.to_string()].into_iter().chain(cells).collect::<Vec<String>>()
    };
    let rows = study.plan.names().into_iter().map(row).collect();
    let mut section = Section::new("Arms").with_table([], rows).with_note(
        "Accuracies and times: mean over finished seeds, in brackets the smallest and the largest. Losses: mean ± half the 95 % interval of \
         Student's t. \"Mean over the run\" averages all validations of a seed first: how fast it was learned.",
    );
    if let Some(table) = &mut section.table {
        table.head = ["arm", "seeds"].map(str::to_string).to_vec();
        table.head.extend(study.measures.iter().map(|m| m.title.clone()));
    }
    section.charts = charts::learning(study);
    section
}

/// What every arm spends.
pub fn budget(study: &Study) -> Section {
    let row = |arm: &str| {
        let all = |split: &str, metric: &str| values(&study.results.finished.last(arm, split, metric, ""));
        let cell = |split: &str, metric: &str| spread(&all(split, metric));
        let whole = |metric: &str| number(last(study, arm, "run", metric, "").mean);
        let parameters = format!("{:.0}", last(study, arm, "run", "parameters", "").mean);
        vec![
            arm.into(),
            if parameters == "NaN" { "-".into() } else { parameters },
            whole("learning_rate"),
            cell("val", "attended_tokens"),
            cell("val", "density"),
            plus_minus(&last(study, arm, "train", "flops_per_token", "")),
        ]
    };
    let head = ["arm", "parameters", "learning rate", "attended tokens", "density", "FLOPs a token"];
    Section::new("Budget").with_table(head, study.plan.names().into_iter().map(row).collect()).with_note(
        "Mean over finished seeds, in brackets the smallest and the largest. Attended tokens: mean number of keys of a query at the last \
         validation, all branches together, averaged over layers, key/value heads and queries; dense (t + 1) / 2. Density: attended chunks / \
         visible chunks. FLOPs a token, forward and backward, at the last \
         update: 6 x matrix elements + 12 h d x layers x attended tokens + 2 h d x layers x scored chunks or windows.",
    )
}

/// How far values vary over seeds, and how much of it the evaluation could do alone.
pub fn errors(study: &Study) -> Section {
    let mut rows = Vec::new();
    for m in study.measures.iter().filter(|m| m.kind != Kind::Time) {
        for arm in study.plan.names() {
            let e = Estimate::of(&values(&of_arm(study, m, arm)));
            let evaluation = match m.evaluation_error(study.results, arm) {
                Some((error, of)) => format!("{} ({of})", number(error)),
                None => "not known".into(),
            };
            rows.push(vec![m.title.clone(), arm.into(), number(e.deviation), evaluation]);
        }
    }
    let head = ["measure", "arm", "deviation between seeds", "standard error of one evaluation"];
    Section::new("Seed error and evaluation error").with_table(head, rows).with_note(
        "Every run is evaluated on the same questions and the same text. The error of an accuracy is that of a proportion of so many \
         questions; where it is as large as the deviation between seeds, more questions help more than more seeds. The error of a loss says how far \
         it may be from that of all such text: the root of the mean square over seeds of the standard error over sequences. Easy and hard \
         sequences are so for all arms, so that most of it cancels in a difference of arms.",
    )
}

/// Whose fault wrong answers are, by length; where there is a task.
pub fn faults(study: &Study) -> Option<Section> {
    study.plan.base().task.as_ref()?;
    let mut lengths = study.results.finished.places("val", "accuracy");
    lengths.retain(|at| !at.contains(' '));
    let mut rows = Vec::new();
    for at in &lengths {
        for arm in study.plan.names() {
            let cell = |metric: &str| spread(&values(&study.results.finished.last(arm, "val", metric, at)));
            let mut row = vec![at.replace('=', " "), arm.to_string()];
            row.extend(["accuracy", "router_missed", "reader_missed", "unseen"].map(cell));
            rows.push(row);
        }
    }
    let head = ["length", "arm", "right", "router missed", "reader missed", "unseen"];
    Some(Section::new("Whose fault").with_table(head, rows).with_note(
        "Shares of all questions: mean over finished seeds, in brackets the smallest and the largest. Router missed: wrong, and no layer attended the chunk that holds the answer \
         when it was asked. Reader missed: wrong although some layer did. Unseen: no layer did, right or wrong.",
    ))
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

/// What the last probe saw, where a router was probed.
pub fn gradients(study: &Study) -> Option<Section> {
    let mut rows = Vec::new();
    for at in study.results.finished.places("probe", "router_share_q") {
        for arm in study.plan.names() {
            let of = |metric: &str| values(&study.results.finished.last(arm, "probe", metric, &at));
            if of("captured_mass").is_empty() {
                continue;
            }
            let cell = |(metric, _): &(&str, &str)| match of(metric).as_slice() {
                [] => "-".into(),
                all => spread(all),
            };
            let mut row = vec![at.replace('=', " "), arm.to_string()];
            row.extend(PROBED.iter().map(cell));
            rows.push(row);
        }
    }
    if rows.is_empty() {
        return None;
    }
    let mut section = Section::new("Gradient through the router, last probe").with_table([], rows).with_note(
        "Mean over finished seeds, in brackets the smallest and the largest. Share: |through the router| / (|through the router| + |through the tokens|). Cosine between the two. Pairs with gradient: share of \
         the visible (query, earlier chunk) pairs whose score has one. Dead chunks: share of chunks that no later query chose. Captured mass: \
         share of dense attention's probability that lies in the chosen chunks.",
    );
    if let Some(table) = &mut section.table {
        table.head = ["layer", "arm"].into_iter().chain(PROBED.map(|(_, name)| name)).map(str::to_string).collect();
    }
    Some(section)
}

/// All learning rates tried, where some were.
pub fn rates(study: &Study) -> Option<Section> {
    let (plan, m) = (study.plan, &study.measures[0]);
    let mut rows = Vec::new();
    for choice in &study.choices {
        for tried in &choice.tried {
            let of = |arm: &str| m.values(study.results, &label(arm, tried.rate), &plan.rules);
            let (ours, base) = (of(&choice.arm), of(plan.baseline_of(&choice.arm)));
            let other = |seed: u64| base.iter().find(|(s, _)| *s == seed).map(|(_, v)| *v);
            let pairs: Vec<f64> = ours.iter().filter_map(|&(s, v)| Some(v - other(s)?)).collect();
            let is_baseline = plan.baseline_of(&choice.arm) == choice.arm;
            rows.push(vec![
                choice.arm.clone(),
                tried.rate.to_string(),
                number(tried.mean),
                ours.iter().map(|v| trimmed(v.1)).collect::<Vec<_>>().join(", "),
                tried.failed.to_string(),
                if is_baseline || pairs.is_empty() { "-".into() } else { number(Estimate::of(&pairs).mean) },
                if tried.rate == choice.rate { "chosen".into() } else { String::new() },
            ]);
        }
    }
    if rows.is_empty() {
        return None;
    }
    let head = ["arm", "learning rate", "mean", "by tuning seed", "failed", "minus baseline at this rate", ""];
    Some(Section::new(&format!("Learning rates tried: {}", m.title)).with_table(head, rows).with_note(&format!(
        "Tuning seeds {}, none of which is a seed of the comparison. The best mean was taken. A contrast that shows at one rate only may be one of \
         rates and not of arms.",
        plan.rules.tuning_seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
    )))
}
