//! The report of a comparison: results.csv, and report.html and report.md made from it.

mod charts;
mod measures;
mod page;
mod tables;

use std::path::PathBuf;

use anyhow::Context;
use dash_data::TaskKind;

use super::plan::Plan;
use super::run::{Outcome, Run, check_pairs};
use super::stats::ENOUGH;
use super::table::{Row, Rows};
use crate::config::Config;
use crate::failure::Result;
use crate::files::replace_file;
use crate::lab::chart::Drawn;
use crate::training::provenance;
use tables::Table;

/// Everything that a reader sees, in order.
pub struct Report {
    title: String,
    facts: Vec<String>,
    warnings: Vec<String>,
    tables: Vec<Table>,
    charts: Vec<(String, Drawn)>,
}

/// Reads the runs into rows, checks that they can be paired, and writes results.csv, report.md, report.html and plots.
///
/// # Errors
/// When finished runs saw different data or tokens, or a file cannot be written.
pub fn write(plan: &Plan, runs: &[Run], hash: &str) -> Result<PathBuf> {
    check_pairs(runs, hash)?;
    let mut rows = Rows::default();
    for run in runs {
        let outcome = run.outcome();
        if run.folder.join("metrics.jsonl").exists() {
            rows.read_run(&run.arm, run.seed, &run.folder)?;
        }
        rows.0.push(Row {
            arm: run.arm.clone(),
            seed: run.seed,
            step: run.logged(),
            split: "run".into(),
            metric: "finished".into(),
            at: String::new(),
            value: (outcome == Outcome::Done) as u8 as f64,
        });
    }
    let report = Report::new(plan, &rows, runs);
    let save = |name: &str, text: &str| replace_file(&plan.out.join(name), text.as_bytes());
    save("results.csv", &rows.csv())?;
    std::fs::create_dir_all(plan.out.join("plots")).context("plots cannot be created")?;
    for (name, drawn) in &report.charts {
        save(&format!("plots/{name}.svg"), &drawn.file)?;
    }
    save("report.md", &report.markdown())?;
    save("report.html", &report.html())?;
    Ok(plan.out.join("report.html"))
}

/// Rows of finished runs only: what means and differences are taken over.
fn finished(rows: &Rows) -> Rows {
    let done: Vec<(&str, u64)> =
        rows.of("run", "finished", "").filter(|r| r.value == 1.0).map(|r| (r.arm.as_str(), r.seed)).collect();
    Rows(rows.0.iter().filter(|r| done.contains(&(r.arm.as_str(), r.seed))).cloned().collect())
}

fn values(pairs: &[(u64, f64)]) -> Vec<f64> {
    pairs.iter().map(|p| p.1).collect()
}

/// Differences to the baseline by seed.
fn paired(arm: &[(u64, f64)], baseline: &[(u64, f64)]) -> Vec<f64> {
    let other = |seed: u64| baseline.iter().find(|(s, _)| *s == seed).map(|(_, v)| *v);
    arm.iter().filter_map(|&(seed, v)| Some(v - other(seed)?)).collect()
}

/// What was compared.
fn facts(plan: &Plan, config: &Config) -> Vec<String> {
    let (m, d) = (&config.model, &config.data);
    let mut facts = vec![
        format!(
            "{} arms x {} seeds, {} updates of {} tokens each; baseline: {}",
            plan.arms.len(),
            plan.seeds,
            config.run.steps,
            config.tokens_per_step(),
            plan.baseline
        ),
        format!(
            "Model: {} layers, width {}, {} heads, {} key/value heads, MLP {}; sequences of {} tokens",
            m.layers, m.width, m.heads, m.kv_heads, m.ffn, d.seq_len
        ),
        "Seed by seed, arms start from equal weights wherever both have a parameter and see the same sequences in the same \
            order. Intervals are 95 % of Student's t over seeds; a difference is arm minus baseline, seed by seed."
            .into(),
    ];
    if let Some(task) = &config.task {
        let kind = serde_json::to_value(task.kind).ok().and_then(|v| v.as_str().map(str::to_string));
        let records = match task.kind {
            TaskKind::PhoneBook | TaskKind::Needle => String::new(),
            _ => format!(", {} pairs", task.pairs),
        };
        facts.push(format!("Task: {}{records}, vocabulary {}", kind.unwrap_or_default(), d.vocab_size));
    }
    facts
}

/// The builds and machines that trained the runs, each once.
fn makers(runs: &[Run]) -> Vec<String> {
    // a list that cannot be read is told by `train eval`, and is no reason for no report
    let starts = runs.iter().flat_map(|run| provenance::read(&run.folder).unwrap_or_default());
    let makers: std::collections::BTreeSet<String> = starts.map(|start| start.maker()).collect();
    makers.into_iter().collect()
}

/// What a reader has to know before the numbers.
fn warnings(plan: &Plan, runs: &[Run], makers: usize) -> Vec<String> {
    let mut warnings = Vec::new();
    for run in runs {
        match run.outcome() {
            Outcome::Done => {}
            Outcome::Unfinished => warnings.push(format!(
                "{} with seed {} is not finished (step {} of {}) and not counted; the same command continues it.",
                run.arm,
                run.seed,
                run.logged(),
                run.steps
            )),
            Outcome::Failed(why) => {
                warnings.push(format!("{} with seed {} failed and is not counted: {why}", run.arm, run.seed));
            }
        }
    }
    if (plan.seeds as usize) < ENOUGH {
        warnings.push(format!("Fewer than {ENOUGH} seeds: the numbers are reported, no difference is declared."));
    }
    if makers > 1 {
        let what = "several builds or processors trained the runs; a seed has the same bits on one of them only";
        warnings.push(format!("Not one machine: {what}."));
    }
    warnings
}

impl Report {
    fn new(plan: &Plan, all: &Rows, runs: &[Run]) -> Self {
        let rows = &finished(all);
        let config = plan.base();
        let arms: Vec<&str> = plan.arms.iter().map(|(name, _)| name.as_str()).collect();
        let measures = measures::measures(config, rows);
        let mut all = vec![tables::summary(&arms, rows, &measures)];
        all.extend(measures.iter().map(|m| tables::differences(&arms, plan, rows, m)));
        all.push(tables::budget(plan, rows));
        all.push(tables::plateau(config, &arms, rows));
        if config.task.is_some() {
            all.push(tables::faults(&arms, rows));
        }
        if rows.of("probe", "router_share_q", "layer=0").next().is_some() {
            all.push(tables::gradients(&arms, rows));
        }
        let makers = makers(runs);
        let mut facts = facts(plan, config);
        facts.extend(makers.iter().map(|maker| format!("Trained by {maker}")));
        Report {
            title: format!("Comparison: {}", config.run.name),
            facts,
            warnings: warnings(plan, runs, makers.len()),
            tables: all,
            charts: charts::charts(config, &arms, rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const CONFIG: &str = "[run]\nsteps = 30\n[data]\nvocab_size = 40\nseq_len = 64\nbatch_size = 2\n[task]\nkind = \"recall\"\n\
        pairs = 4\n[optim]\nlr = 1e-3\n[model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n\
        [model.attention]\nkind = \"dash\"\nchunk_size = 8\n";

    /// Accuracies by arm and seed, at two steps.
    fn rows(accuracies: &[(&str, &[f64])]) -> Rows {
        let mut all = Rows::default();
        for (arm, values) in accuracies {
            for (seed, &value) in values.iter().enumerate() {
                let mut push = |split: &str, metric: &str, at: &str, step: u64, value: f64| {
                    let (arm, split, metric, at) = (arm.to_string(), split.into(), metric.into(), at.into());
                    all.0.push(Row { arm, seed: seed as u64, step, split, metric, at, value });
                };
                push("val", "accuracy", "length=64", 10, 0.1);
                push("val", "accuracy", "length=64", 30, value);
                push("val", "accuracy", "length=64 distance<32", 30, value);
                push("val", "loss", "", 30, 1.0 - value);
                push("val", "attended_tokens", "", 30, 20.0);
                push("run", "finished", "", 30, 1.0);
            }
        }
        all
    }

    fn report(accuracies: &[(&str, &[f64])]) -> (Report, Rows) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, CONFIG).unwrap();
        let config = Config::load(&path, &[]).unwrap();
        let arms: Vec<(String, Config)> =
            accuracies.iter().map(|(name, _)| (name.to_string(), config.clone())).collect();
        let seeds = accuracies[0].1.len() as u64;
        let plan =
            Plan { arms, own_baselines: Vec::new(), seeds, baseline: accuracies[0].0.into(), out: dir.path().into() };
        let rows = rows(accuracies);
        // what a reader has: the rows as they come back from the file
        let read = Rows::from_csv(&rows.csv()).unwrap();
        assert_eq!(read, rows);
        (Report::new(&plan, &read, &[]), read)
    }

    fn cell(report: &Report, title: &str, arm: &str, column: &str) -> String {
        let table = report.tables.iter().find(|t| t.title.starts_with(title)).unwrap();
        let i = table.head.iter().position(|h| h == column).unwrap();
        table.rows.iter().find(|r| r[0] == arm).unwrap()[i].clone()
    }

    #[test]
    fn every_number_follows_from_the_csv() {
        let (r, _) = report(&[("a", &[0.2, 0.3, 0.4]), ("b", &[0.6, 0.8, 0.7]), ("c", &[0.1, 0.5, 0.3])]);
        // b: mean 0.7, deviation 0.1, t(0.975, 2) = 4.30265, half 0.248
        assert_eq!(cell(&r, "At the end", "b", "accuracy at length 64"), "0.7 ± 0.2484");
        // differences 0.4, 0.5, 0.3 and -0.1, 0.2, -0.1
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "difference"), "0.4");
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "95 % interval"), "0.1516 to 0.6484");
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "reading"), "better");
        assert_eq!(cell(&r, "Paired differences: accuracy", "c", "reading"), "tie");
        assert_eq!(cell(&r, "Paired differences: loss", "b", "reading"), "better");
        assert_eq!(cell(&r, "Leaving the plateau", "b", "seeds that left"), "3 of 3");
        assert_eq!(cell(&r, "Leaving the plateau", "c", "seeds that left"), "1 of 3");
        let (page, text) = (r.html(), r.markdown());
        for number in ["0.7 ± 0.2484", "0.1516 to 0.6484"] {
            assert!(page.contains(number) && text.contains(number));
        }
        assert!(page.contains("<svg") && !page.replace("http://www.w3.org/2000/svg", "").contains("http"));
        assert!(!page.contains("<script") && !page.contains("href="), "a page of its own");
    }

    #[test]
    fn two_seeds_declare_no_winner() {
        let (r, _) = report(&[("a", &[0.2, 0.2]), ("b", &[0.9, 0.9001])]);
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "reading"), "too few seeds");
        assert!(r.markdown().contains("Fewer than 3 seeds"));
    }
}
