//! Time to solve: Kaplan-Meier curves, restricted means, log-rank tests.

use super::super::contrast::Contrast;
use super::super::text::{number, probability};
use super::study::{Section, Study};
use super::task;
use crate::lab::chart::{Chart, Drawn, Line, Point, Style};
use crate::lab::stats::{Time, kaplan_meier, median, restricted_mean};

fn times(study: &Study, i: usize, arm: &str) -> Vec<Time> {
    study.measures[i].times(study.results, arm, &study.plan.rules).into_iter().map(|t| t.1).collect()
}

/// The last planned update.
fn horizon(study: &Study) -> f64 {
    let arms = study.plan.names();
    arms.iter().flat_map(|arm| study.results.all.last(arm, "run", "steps", "")).map(|s| s.1).fold(0.0, f64::max)
}

/// The share of runs that have solved the task, as steps.
fn curves(study: &Study, i: usize) -> Option<Drawn> {
    let end = horizon(study);
    let line = |(series, arm): (usize, &&str)| {
        let curve = kaplan_meier(&times(study, i, arm));
        let mut points = Vec::new();
        let mut share = 0.0;
        for (at, left) in curve.into_iter().chain([(end, f64::NAN)]) {
            points.push(Point::new(at, share));
            share = if left.is_nan() { share } else { 1.0 - left };
            points.push(Point::new(at, share));
        }
        Line { name: arm.to_string(), series, thin: false, points, runs: Vec::new() }
    };
    let arms = study.plan.names();
    let with_runs = arms.iter().enumerate().filter(|(_, arm)| !times(study, i, arm).is_empty());
    let chart = Chart {
        title: "Runs that have solved the task".into(),
        x: "update".into(),
        y: "share of runs (1 − Kaplan-Meier)".into(),
        lines: with_runs.map(line).collect(),
        style: Style { unit_y: true, ..Style::default() },
    };
    chart.draw()
}

fn row(study: &Study, i: usize, arm: &str, contrast: Option<&Contrast>) -> Vec<String> {
    let (times, end) = (times(study, i, arm), horizon(study));
    let solved: Vec<f64> = times.iter().filter(|t| t.happened).map(|t| t.at).collect();
    let mut sorted = solved.clone();
    sorted.sort_by(f64::total_cmp);
    let list =
        if sorted.is_empty() { "-".into() } else { sorted.iter().map(f64::to_string).collect::<Vec<_>>().join(", ") };
    let test = contrast.and_then(|c| c.log_rank);
    vec![
        arm.into(),
        format!("{} of {}", solved.len(), times.len()),
        median(&times).map_or(format!("> {end}"), |m| m.to_string()),
        if times.is_empty() { "-".into() } else { number(restricted_mean(&times, end)) },
        test.map_or("-".into(), |t| format!("{} / {}", t.observed, number(t.expected))),
        test.map_or("-".into(), |t| format!("{} ({})", probability(t.p), probability(t.attainable))),
        list,
    ]
}

/// The section, where there is a task.
pub fn section(study: &Study) -> Option<Section> {
    let i = study.measures.iter().position(|m| m.key == "time-to-solve")?;
    let of = |arm: &str| study.contrasts[i].iter().find(|c| c.arm == arm);
    let rows = study.plan.names().into_iter().map(|arm| row(study, i, arm, of(arm))).collect();
    let rules = &study.plan.rules;
    let checks = match rules.checks {
        1 => "one validation".to_string(),
        n => format!("{n} validations in a row"),
    };
    let shortcut = task::shortcut(study)
        .map_or(String::new(), |a| format!("A model that never matches a key reaches {a:.3} (shortcut, simulated). "));
    let stops = rules.stop_after.map_or(String::new(), |n| {
        format!("A run stops {n} validations after it has solved the task; its last values are those of then. ")
    });
    let note = format!(
        "Solved: an accuracy of at least {} at the training length in {checks}; the time is the update of the last of them. {shortcut}{stops}A \
         run that never \
         did is censored at its last planned update, {}, and so is one that failed. Restricted mean: the mean time up to that update, the \
         area below the Kaplan-Meier curve; its differences, paired by seed, are in the table of the time to solve. Log-rank: the exact \
         unpaired test against the baseline, over all divisions of these runs into two groups; in brackets the smallest p that these \
         runs can give. It is not corrected for the number of comparisons.",
        rules.solved,
        horizon(study)
    );
    let head = ["arm", "solved", "median", "restricted mean", "events seen / expected", "log-rank p", "solved at"];
    Some(Section::new("Time to solve").with_table(head, rows).with_chart("solved", curves(study, i)).with_note(&note))
}
