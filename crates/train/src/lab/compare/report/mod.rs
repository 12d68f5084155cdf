//! The report of a comparison: results.csv, and report.html and report.md made from it.

mod answer;
mod charts;
mod contrasts;
mod page;
mod repeat;
mod study;
mod survival;
mod tables;
mod task;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::budget;
use super::contrast::{ENOUGH, contrasts};
use super::criteria;
use super::optimiser;
use super::plan::Plan;
use super::run::{Outcome, Run};
use super::table::{Results, Rows};
use crate::failure::{Failure, Result};
use crate::files::replace_file;
use study::{Notes, Report, Study};

impl Notes {
    fn of(plan: &Plan, runs: &[Run], rows: &Rows) -> Result<Self> {
        let tell = |run: &Run| match run.outcome() {
            Outcome::Done => None,
            Outcome::Unfinished => Some(format!(
                "{} with seed {} is not finished (step {} of {}) and not counted; the same command continues it.",
                run.arm,
                run.seed,
                run.logged(),
                run.steps
            )),
            Outcome::Failed(why) => Some(format!(
                "{} with seed {} failed: {why} Its figures are not counted; a time to solve counts it as never solved.",
                run.arm,
                run.seed,
                why = if why.ends_with('.') { why } else { why + "." }
            )),
        };
        Ok(Notes {
            unfinished: runs.iter().filter_map(tell).collect(),
            criteria: criteria::status(plan, &plan.out)?,
            builds: repeat::builds(rows),
        })
    }
}

/// Reads runs into rows.
///
/// # Errors
/// When the record of a run cannot be read.
pub fn rows(plan: &Plan, runs: &[Run]) -> Result<Rows> {
    let mut rows = Rows::default();
    for run in runs {
        if run.folder.join("metrics.jsonl").exists() {
            rows.read_run(&run.arm, run.seed, &run.folder).map_err(Failure::Request)?;
        }
        let (outcome, step) = (run.outcome(), run.logged());
        let arm = run.arm.split('@').next().unwrap_or_default();
        let rate = run.arm.split('@').nth(1).and_then(|r| r.parse().ok());
        let config = plan.arms.iter().find(|(name, _)| name == arm).map_or(plan.base(), |(_, config)| config);
        for maker in repeat::makers(run) {
            rows.push_maker(&run.arm, run.seed, step, &maker);
        }
        let mut push = |metric: &str, value: f64| rows.push_run(&run.arm, run.seed, step, metric, value);
        push("finished", (outcome == Outcome::Done) as u8 as f64);
        push("failed", matches!(outcome, Outcome::Failed(_)) as u8 as f64);
        push("steps", run.steps as f64);
        push("learning_rate", rate.unwrap_or(config.optim.lr));
        if let Ok(n) = dash_model::parameters(&config.model, config.data.vocab_size) {
            push("parameters", n as f64);
        }
    }
    Ok(rows)
}

/// Writes results.csv, report.md, report.html and plots of runs and of the tuning runs before them, which are rows already.
///
/// # Errors
/// When a record cannot be read or a file cannot be written.
pub fn write(plan: &Plan, runs: &[Run], tuning: &Rows) -> Result<PathBuf> {
    let mut all = rows(plan, runs)?;
    let notes = Notes::of(plan, runs, &all)?;
    all.0.extend_from_slice(&tuning.0);
    replace_file(&plan.out.join("results.csv"), all.csv().as_bytes())?;
    save(plan, &Report::new(plan, &Results::of(all), &notes))
}

/// Bytes of published rows at most.
const MOST_ROWS: u64 = 1 << 30;

/// The seeds of `0, 1, 2`, for people.
fn listed(seeds: &BTreeSet<u64>) -> String {
    seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// Arms whose rows are of other seeds than those of the configuration.
fn other_seeds(plan: &Plan, rows: &Rows) -> Vec<String> {
    let first = plan.base().run.seed;
    let planned: BTreeSet<u64> = (first..first.saturating_add(plan.rules.seeds)).collect();
    let told = |arm: &str| {
        let found: BTreeSet<u64> = rows.0.iter().filter(|r| r.arm == arm).map(|r| r.seed).collect();
        let (found, planned) = (listed(&found), listed(&planned));
        (found != planned)
            .then(|| format!("The rows of {arm} have the seeds {found}; those of the configuration are {planned}."))
    };
    plan.names().into_iter().filter_map(told).collect()
}

/// Writes the report of published rows, compressed or not; the runs need not be there.
///
/// # Errors
/// When the file is none of ours or a file cannot be written.
pub fn write_from(plan: &Plan, path: &Path) -> Result<PathBuf> {
    let read = || -> anyhow::Result<Rows> {
        let text = dash_data::whole_text(path, MOST_ROWS)?;
        Rows::from_csv(&text).with_context(|| format!("{} is no results.csv of a comparison", path.display()))
    };
    let mut rows = read().map_err(Failure::Request)?;
    rows.complete(plan.base().run.steps);
    let results = Results::of(rows);
    let missing: Vec<&str> = plan.names().into_iter().filter(|a| !results.all.0.iter().any(|r| r.arm == *a)).collect();
    if !missing.is_empty() {
        let what = format!("{}: has no row of {}; is it of this configuration?", path.display(), missing.join(", "));
        return Err(Failure::request(what));
    }
    std::fs::create_dir_all(&plan.out).with_context(|| format!("{} cannot be created", plan.out.display()))?;
    // the record of what was declared lies beside the rows
    let folder = path.parent().unwrap_or(&plan.out);
    let own = Rows(results.all.0.iter().filter(|r| !r.arm.contains('@')).cloned().collect());
    let unfinished = other_seeds(plan, &own);
    let notes = Notes { unfinished, criteria: criteria::status(plan, folder)?, builds: repeat::builds(&own) };
    save(plan, &Report::new(plan, &results, &notes))
}

fn save(plan: &Plan, report: &Report) -> Result<PathBuf> {
    let save = |name: &str, text: &str| replace_file(&plan.out.join(name), text.as_bytes());
    std::fs::create_dir_all(plan.out.join("plots")).context("plots cannot be created")?;
    for (name, drawn) in report.charts() {
        save(&format!("plots/{name}.svg"), &drawn.file)?;
    }
    save("report.md", &report.markdown())?;
    save("report.html", &report.html())?;
    Ok(plan.out.join("report.html"))
}

/// What a reader has to know before the numbers.
fn warnings(study: &Study, notes: &Notes) -> Vec<String> {
    let mut out = notes.unfinished.clone();
    if (study.plan.rules.seeds as usize) < ENOUGH {
        out.push(format!("Fewer than {ENOUGH} seeds: the numbers are reported, nothing is decided."));
    }
    out.extend(budget::after(study.plan, &study.results.finished));
    out.extend(optimiser::warnings(study.plan));
    if notes.builds.len() > 1 {
        let what = "several builds or processors trained the runs; a seed has the same bits on one of them only";
        out.push(format!("Not one machine: {what}."));
    }
    if let Some(shortcut) = task::shortcut(study).filter(|a| *a >= study.plan.rules.solved) {
        out.push(format!(
            "compare.solved is {}, and a model that never matches a key reaches {shortcut:.3}: solved says nothing.",
            study.plan.rules.solved
        ));
    }
    for choice in study.choices.iter().filter(|c| c.at_edge() && c.tried.len() > 1) {
        out.push(format!(
            "The best learning rate of {} is {}, at the edge of those tried; a better one may lie beyond it.",
            choice.arm, choice.rate
        ));
    }
    out
}

impl Report {
    /// Of rows: every number is computed from them.
    pub fn new(plan: &Plan, results: &Results, notes: &Notes) -> Self {
        let measures = plan.measures();
        let contrasts = measures.iter().map(|m| contrasts(plan, results, m)).collect();
        let tuned = !plan.rules.learning_rates.is_empty();
        let choices = if tuned { plan.choices(results).unwrap_or_default() } else { Vec::new() };
        let study = &Study { plan, results, measures, contrasts, choices };
        let mut sections = vec![contrasts::table(study, 0), tables::seeds(study), tables::summary(study)];
        sections.extend(survival::section(study));
        sections.extend((1..study.measures.len()).map(|i| contrasts::table(study, i)));
        sections.push(tables::budget(study));
        sections.extend([task::spent(study), task::knobs(study)].into_iter().flatten());
        sections.push(tables::errors(study));
        sections.extend(task::questions(study));
        sections.extend(tables::faults(study));
        sections.extend(tables::gradients(study));
        sections.extend(tables::rates(study));
        sections.push(charts::others(study));
        sections.push(repeat::section(study, notes));
        Report {
            title: format!("Comparison: {}", plan.base().run.name),
            answer: answer::answer(study, &notes.criteria),
            forest: contrasts::forest(study).map(|drawn| ("forest".to_string(), drawn)),
            warnings: warnings(study, notes),
            sections,
        }
    }
}
