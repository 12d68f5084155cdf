//! `compare`: the same run for every arm and seed, paired, and one report.
//!
//! Every run is the ordinary `train` command in a process of its own with one thread (a run's bits do not depend on it, and
//! independent runs use the cores better than one run does), so an arm that diverges takes nothing along, and an interrupted
//! comparison resumes run by run from their checkpoints.

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

use crate::config::Config;
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

/// The runs of a plan, none of which differs from what its folder may hold already.
fn checked(plan: &Plan, data: &Material) -> Result<Vec<(Run, Config)>> {
    let runs = plan.runs();
    for (run, config) in &runs {
        run.check_same(config, data)?;
    }
    Ok(runs)
}

/// Writes the configurations of all runs.
fn lay_out(plan: &Plan, runs: &[(Run, Config)]) -> Result<()> {
    for folder in ["runs", "configs", "logs"] {
        let path = plan.out.join(folder);
        std::fs::create_dir_all(&path).with_context(|| format!("{} cannot be created", path.display()))?;
    }
    for (run, config) in runs {
        replace_file(&run.config, config.to_toml().as_bytes())?;
    }
    Ok(())
}

/// Runs that wait, the next one last, and processes of runs that go on.
struct Pool<'a> {
    waiting: Vec<&'a Run>,
    active: Vec<(&'a Run, Child)>,
    jobs: Jobs,
}

impl Pool<'_> {
    /// Starts as many as there is room for, none after a signal.
    fn fill(&mut self, interrupt: &Interrupt) -> Result<()> {
        while self.active.len() < self.jobs.at_once && !interrupt.requested() {
            let Some(run) = self.waiting.pop() else { break };
            self.active.push((run, run.start(self.jobs.force)?));
        }
        Ok(())
    }

    /// Asks all to save and end.
    fn stop(&self) {
        tell!("interrupted: waiting for {} runs to save", self.active.len());
        for (_, child) in &self.active {
            // a terminal has told them already; a supervisor has told only this process
            let _ = Command::new("kill").arg("-TERM").arg(child.id().to_string()).status();
        }
    }

    /// Lets go of those that ended, and tells how.
    fn collect(&mut self, bar: &ProgressBar) -> Result<()> {
        for (run, mut child) in std::mem::take(&mut self.active) {
            let Some(status) = child.try_wait().context("a run cannot be waited for")? else {
                self.active.push((run, child));
                continue;
            };
            run.ended(status)?;
            let line = match run.outcome() {
                Outcome::Done => format!("{} done", run.name()),
                Outcome::Unfinished => format!("{} stopped", run.name()),
                Outcome::Failed(why) => format!("{} FAILED: {why}", run.name()),
            };
            if bar.is_hidden() { tell!("{line}") } else { bar.println(line) }
        }
        Ok(())
    }

    /// Until no run is left, or until those that go on have ended after a signal.
    fn run(mut self, runs: &[Run], interrupt: &Interrupt) -> Result<()> {
        let total: u64 = runs.iter().map(|r| r.steps).sum();
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template("{bar:24} {percent}% {msg} eta {eta}").expect("a valid template"));
        let mut told = false;
        loop {
            self.fill(interrupt)?;
            if self.active.is_empty() {
                break;
            }
            if interrupt.requested() && !told {
                told = true;
                self.stop();
            }
            std::thread::sleep(Duration::from_millis(300));
            self.collect(&bar)?;
            let finished: u64 = runs.iter().map(Run::logged).sum();
            bar.set_position(finished);
            bar.set_message(self.active.iter().map(|(r, _)| r.name()).collect::<Vec<_>>().join(" "));
        }
        bar.finish_and_clear();
        Ok(())
    }
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
    let runs = checked(plan, &data)?;
    lay_out(plan, &runs)?;
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
    Pool { waiting, active: Vec::new(), jobs }.run(&runs, &interrupt)?;
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
    let runs: Vec<Run> = checked(plan, &data)?.into_iter().map(|(run, _)| run).collect();
    report::write(plan, &runs, &data.hash)
}
