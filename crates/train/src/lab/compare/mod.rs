//! `compare`: the same run for every arm and seed, paired, and one report.
//!
//! Every run is the ordinary `train` command in a process of its own with one thread (a run's bits do not depend on it, and
//! independent runs use the cores better than one run does), so an arm that diverges takes nothing along, and an interrupted
//! comparison resumes run by run from their checkpoints.

mod chart;
mod plan;
mod report;
mod run;
mod stats;
mod table;

use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub use plan::Plan;
use run::{Outcome, Run};

use crate::console::tell;
use crate::failure::{Failure, Result};
use crate::files::replace_file;
use crate::signals::Interrupt;
use crate::training::lock::RunLock;
use crate::training::material::Material;
use crate::training::preflight::{check_fits, duration};

/// How runs are started.
#[derive(Debug, Clone, Copy)]
pub struct Jobs {
    /// Runs at a time.
    pub at_once: usize,
    /// Start although this machine seems too small.
    pub force: bool,
}

/// Runs a plan and writes its report.
///
/// # Errors
/// A wrong request, or an interruption after everything was saved and the report was written. An arm that fails is told in
/// the report; it is an error only when no run finished.
pub fn compare(plan: &Plan, jobs: Jobs, interrupt: impl FnOnce() -> anyhow::Result<Interrupt>) -> Result<()> {
    let began = Instant::now();
    for (_, config) in &plan.arms {
        check_fits(config, jobs.at_once.min(plan.arms.len() * plan.seeds as usize), jobs.force)?;
    }
    let data = Material::of(plan.base())?;
    let _lock = RunLock::take(&plan.out)?;
    let runs = plan.runs();
    for (run, config) in &runs {
        run.check_same(config, &data)?;
    }
    for folder in ["runs", "configs", "logs"] {
        let path = plan.out.join(folder);
        std::fs::create_dir_all(&path).with_context(|| format!("{} cannot be created", path.display()))?;
    }
    for (run, config) in &runs {
        replace_file(&run.config, config.to_toml().as_bytes())?;
    }
    let runs: Vec<Run> = runs.into_iter().map(|(run, _)| run).collect();
    let mut waiting: Vec<&Run> = runs.iter().filter(|r| r.outcome() != Outcome::Done).collect();
    tell!(
        "{} arms x {} seeds: {} runs of {} steps, {} finished already, {} at a time; {}",
        plan.arms.len(),
        plan.seeds,
        runs.len(),
        plan.base().run.steps,
        runs.len() - waiting.len(),
        jobs.at_once,
        plan.out.display()
    );
    waiting.reverse();
    let interrupt = interrupt()?;
    let total: u64 = runs.iter().map(|r| r.steps).sum();
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{bar:24} {percent}% {msg} eta {eta}").expect("a valid template"));
    let mut active: Vec<(&Run, Child)> = Vec::new();
    let mut told = false;
    loop {
        while active.len() < jobs.at_once && !interrupt.requested() {
            let Some(run) = waiting.pop() else { break };
            active.push((run, run.start(jobs.force)?));
        }
        if active.is_empty() {
            break;
        }
        if interrupt.requested() && !told {
            told = true;
            tell!("interrupted: waiting for {} runs to save", active.len());
            for (_, child) in &active {
                // a terminal has told them already; a supervisor has told only this process
                let _ = Command::new("kill").arg("-TERM").arg(child.id().to_string()).status();
            }
        }
        std::thread::sleep(Duration::from_millis(300));
        let mut still = Vec::new();
        for (run, mut child) in active {
            match child.try_wait().context("a run cannot be waited for")? {
                None => still.push((run, child)),
                Some(status) => {
                    run.ended(status)?;
                    let line = match run.outcome() {
                        Outcome::Done => format!("{} done", run.name()),
                        Outcome::Unfinished => format!("{} stopped", run.name()),
                        Outcome::Failed(why) => format!("{} FAILED: {why}", run.name()),
                    };
                    if bar.is_hidden() { tell!("{line}") } else { bar.println(line) }
                }
            }
        }
        active = still;
        let finished: u64 = runs.iter().map(Run::logged).sum();
        bar.set_position(finished);
        bar.set_message(active.iter().map(|(r, _)| r.name()).collect::<Vec<_>>().join(" "));
    }
    bar.finish_and_clear();
    let written = report::write(plan, &runs, &data.hash)?;
    tell!("{} after {}", written.display(), duration(began.elapsed().as_secs_f64()));
    if interrupt.requested() {
        return Err(Failure::Interrupted);
    }
    if !runs.iter().any(|r| r.outcome() == Outcome::Done) {
        return Err(Failure::Run(anyhow!("no run finished; {} says why", written.display())));
    }
    Ok(())
}

/// Writes the report of what a comparison's folder holds, finished or not.
///
/// # Errors
/// When runs cannot be paired.
pub fn report_only(plan: &Plan) -> Result<PathBuf> {
    let data = Material::of(plan.base())?;
    let runs = plan.runs();
    for (run, config) in &runs {
        run.check_same(config, &data)?;
    }
    let runs: Vec<Run> = runs.into_iter().map(|(run, _)| run).collect();
    report::write(plan, &runs, &data.hash)
}
