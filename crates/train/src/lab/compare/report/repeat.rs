//! How to repeat the comparison: command, builds, machines, criteria.

use std::collections::{BTreeMap, BTreeSet};

use super::super::run::Run;
use super::super::table::Rows;
use super::study::{Notes, Section, Study};
use crate::config::word;
use crate::training::provenance;
use dash_data::TaskKind;

/// Builds and machines that trained a run, as its folder says: a run that went on elsewhere has several. A list that cannot be read
/// is told by `train eval`.
pub fn makers(run: &Run) -> BTreeSet<String> {
    let starts = provenance::read(&run.folder).unwrap_or_default();
    starts.iter().map(provenance::Start::maker).collect()
}

/// Builds and machines of runs whose rows say so, with the number of runs of each.
pub fn builds(rows: &Rows) -> Vec<String> {
    let mut counts = BTreeMap::<String, usize>::new();
    rows.makers().for_each(|build| *counts.entry(build).or_default() += 1);
    let told =
        |(build, n): (String, usize)| format!("Trained by {build} ({n} {})", if n == 1 { "run" } else { "runs" });
    counts.into_iter().map(told).collect()
}

/// What was compared, and how to do it again.
pub fn section(study: &Study, notes: &Notes) -> Section {
    let (plan, config) = (study.plan, study.plan.base());
    let (m, d, rules) = (&config.model, &config.data, &plan.rules);
    let first = config.run.seed;
    let mut lines = vec![
        plan.command.clone(),
        format!(
            "{} arms, seeds {first} to {}, {} updates of {} tokens; baseline {}",
            plan.arms.len(),
            first + rules.seeds - 1,
            config.run.steps,
            config.tokens_per_step(),
            rules.baseline
        ),
        format!(
            "model: {} layers, width {}, {} heads, {} kv heads, MLP {}; sequences of {} tokens",
            m.layers, m.width, m.heads, m.kv_heads, m.ffn, d.seq_len
        ),
    ];
    if let Some(task) = &config.task {
        let records = match task.kind {
            TaskKind::Needle if task.distractors > 0 => format!(", {} distractors", task.distractors),
            TaskKind::PhoneBook | TaskKind::Needle => String::new(),
            _ => format!(", {} pairs", task.pairs),
        };
        lines.push(format!("task: {}{records}, vocabulary {}", word(&task.kind), d.vocab_size));
    }
    if !rules.tuning_seeds.is_empty() {
        let seeds = rules.tuning_seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        lines.push(format!("tuning seeds, none of which is a seed of the comparison: {seeds}"));
    }
    match notes.builds.is_empty() {
        true => lines.push("build and machine: not recorded".into()),
        false => lines.extend(notes.builds.iter().cloned()),
    }
    let mut section = Section::new("How to repeat it").with_note(&format!(
        "{} Seed by seed, arms start from equal weights wherever both have a parameter, and see the same sequences in the same order. Every \
         number here is computed from results.csv beside this file, which names build and machine, too; `--rows results.csv` with the \
         command above makes the report again from it and, where criteria were declared, criteria.json beside it. Thin lines in pictures are single runs, bands 95 % intervals over seeds.",
        notes.criteria.file
    ));
    section.lines = lines;
    section
}
