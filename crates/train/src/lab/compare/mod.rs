//! `compare`: the same run for every arm and seed, paired, and one report.
//!
//! Every run is the ordinary `train` command in a process of its own with one thread (a run's bits do not depend on it, and
//! independent runs use the cores better than one run does) or on a GPU, so an arm that diverges takes nothing along, and an interrupted
//! comparison resumes run by run from their checkpoints.
mod budget;
mod contrast;
mod criteria;
mod measure;
mod optimiser;
mod plan;
mod report;
mod run;
mod table;
mod text;
mod tuning;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub use plan::{Plan, Request};
pub use run::Place;
use run::{Outcome, Run, check_pairs};
use table::{Results, Rows};

use crate::config::Config;
use crate::console::tell;
use crate::failure::{Failure, Result};
use crate::files::replace_file;
use crate::signals::Interrupt;
use crate::training::checkpoint::Checkpoints;
use crate::training::device::device;
use crate::training::lock::RunLock;
use crate::training::material::Material;
use crate::training::preflight::{check_fits, check_fits_gpu, duration};

/// How runs are started.
#[derive(Debug, Clone)]
pub struct Jobs {
    /// Runs at a time, on each of the GPUs where some are named.
    pub each: usize,
    /// GPUs to run on, by the driver's number; none: every run where its configuration says.
    pub cards: Vec<usize>,
    /// Start although this machine seems too small.
    pub force: bool,
}

impl Jobs {
    /// Runs at a time.
    fn at_once(&self) -> usize {
        self.each * self.cards.len().max(1)
    }

    /// Where a run can go on: an entry a run at a time, every GPU once before one has two.
    fn places(&self) -> Vec<Place> {
        let round = match self.cards.as_slice() {
            [] => vec![Place::AsConfigured],
            cards => cards.iter().map(|&card| Place::Card(card)).collect(),
        };
        round.repeat(self.each)
    }

    /// Refuses GPUs that are not there, or that cannot hold the runs, before any run starts.
    fn check_cards(&self, plan: &Plan) -> Result<()> {
        // where none is named and one run goes on at a time, the run asks its GPU itself
        if self.cards.is_empty() && self.each > 1 && plan.on_gpu() {
            for (_, config) in &plan.arms {
                check_fits_gpu(config, &device(config)?, self.each, self.force)?;
            }
        }
        for card in &self.cards {
            let mut config = plan.base().clone();
            config.run.device = format!("cuda:{card}");
            let device = device(&config)?;
            for (_, config) in &plan.arms {
                check_fits_gpu(config, &device, self.each, self.force)?;
            }
        }
        Ok(())
    }
}

/// Refuses runs that differ from what their folders hold already.
fn check(runs: &[(Run, Config)], data: &Material) -> Result<()> {
    runs.iter().try_for_each(|(run, config)| run.check_same(config, data))
}

/// The runs of a plan; what is known of the same folders stays known, so that no checkpoint is read twice.
fn runs_of(plan: &Plan, known: &[(Run, Config)]) -> Vec<(Run, Config)> {
    let mut runs = plan.runs();
    for (run, _) in &mut runs {
        if let Some((same, _)) = known.iter().find(|(k, _)| k.folder == run.folder) {
            run.last = same.last.clone();
        }
    }
    runs
}

fn without_configs(runs: Vec<(Run, Config)>) -> Vec<Run> {
    runs.into_iter().map(|(run, _)| run).collect()
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

/// Runs that wait and places that are free, the next one last, and processes of runs that go on.
struct Pool<'a> {
    waiting: Vec<&'a Run>,
    active: Vec<(&'a Run, Child, Place)>,
    free: Vec<Place>,
    force: bool,
}

impl<'a> Pool<'a> {
    /// Starts as many as there is room for, none after a signal.
    fn fill(&mut self, interrupt: &Interrupt) -> Result<()> {
        while !interrupt.requested() && !self.free.is_empty() {
            let Some(run) = self.next() else { break };
            let place = self.free.pop().expect("one is free");
            self.active.push((run, run.start(place, self.force)?, place));
        }
        Ok(())
    }

    /// The next run none of whose sources waits or goes on. One whose source failed starts, and says what it lacks.
    fn next(&mut self) -> Option<&'a Run> {
        let ended = |name: &String| {
            !self.waiting.iter().copied().chain(self.active.iter().map(|(run, ..)| *run)).any(|run| run.name() == *name)
        };
        let at = self.waiting.iter().rposition(|run| run.after.iter().all(ended))?;
        Some(self.waiting.remove(at))
    }

    /// Asks all to save and end.
    fn stop(&self) {
        tell!("interrupted: waiting for {} runs to save", self.active.len());
        for (_, child, _) in &self.active {
            // a terminal has told them already; a supervisor has told only this process
            let _ = Command::new("kill").arg("-TERM").arg(child.id().to_string()).status();
        }
    }

    /// Lets go of those that ended, and tells how.
    fn collect(&mut self, bar: &ProgressBar) -> Result<()> {
        for (run, mut child, place) in std::mem::take(&mut self.active) {
            let Some(status) = child.try_wait().context("a run cannot be waited for")? else {
                self.active.push((run, child, place));
                continue;
            };
            self.free.push(place);
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
            bar.set_message(self.active.iter().map(|(r, ..)| r.name()).collect::<Vec<_>>().join(" "));
        }
        bar.finish_and_clear();
        Ok(())
    }
}

/// Runs, in order, those that are not finished.
fn run_all(plan: &Plan, runs: Vec<(Run, Config)>, jobs: &Jobs, interrupt: &Interrupt, what: &str) -> Result<Vec<Run>> {
    lay_out(plan, &runs)?;
    let runs = without_configs(runs);
    let mut waiting: Vec<&Run> = runs.iter().filter(|r| r.outcome() != Outcome::Done).collect();
    tell!(
        "{what}: {} runs of {} steps, {} finished already, {} at a time; {}",
        runs.len(),
        runs.first().map_or(0, |r| r.steps),
        runs.len() - waiting.len(),
        jobs.at_once(),
        plan.out.display()
    );
    waiting.reverse();
    let free = jobs.places().into_iter().rev().collect();
    Pool { waiting, active: Vec::new(), free, force: jobs.force }.run(&runs, interrupt)?;
    Ok(runs)
}

/// The plan with the learning rates that its tuning runs chose, and the rows of those runs; the plan as it is where it tries none.
fn tuned(plan: &Plan, tuning: &[Run]) -> Result<(Plan, Rows)> {
    if tuning.is_empty() {
        return Ok((plan.clone(), Rows::default()));
    }
    let results = Results::of(report::rows(plan, tuning)?);
    let Some(choices) = plan.choices(&results) else {
        return Err(Failure::request(format!(
            "{}: the tuning runs have not all ended, so no learning rate is chosen; the same command without --report-only continues \
             them",
            plan.out.display()
        )));
    };
    for c in &choices {
        tell!("learning rate of {}: {}", c.arm, c.rate);
    }
    Ok((plan.with_rates(&choices), results.all))
}

/// Waits for runs of a comparison that was killed, and finishes what they left.
fn settle(runs: &[(Run, Config)]) {
    for (run, config) in runs {
        // it saves and stops, or goes on where the system cannot tell it
        let free = RunLock::wait(&run.folder, || tell!("waiting for {}, on which another process works", run.name()));
        if let (Some(_), Some(step)) = (&free, run.saved()) {
            // one that was killed after its last checkpoint is not started again
            Checkpoints::of(&run.folder).tidy(config, step);
        }
    }
}

/// Runs a plan and writes its report.
///
/// # Errors
/// A wrong request, or an interruption after everything was saved and the report was written. An arm that fails is told in
/// the report; it is an error only when no run finished.
pub fn compare(plan: &Plan, jobs: &Jobs, interrupt: impl FnOnce() -> anyhow::Result<Interrupt>) -> Result<()> {
    let began = Instant::now();
    let seeds = plan.rules.seeds as usize;
    for (_, config) in &plan.arms {
        check_fits(config, jobs.at_once().min(plan.arms.len() * seeds), jobs.force)?;
    }
    if ["metrics.jsonl", "checkpoints", "parity.safetensors"].iter().any(|name| plan.out.join(name).exists()) {
        return Err(Failure::request(format!(
            "--out {}: is a run or an export; choose another folder",
            plan.out.display()
        )));
    }
    jobs.check_cards(plan)?;
    budget::before(plan).iter().chain(&optimiser::warnings(plan)).for_each(|what| tell!("warning: {what}"));
    let data = Material::of(plan.base())?;
    let _lock = RunLock::take(&plan.out)?;
    let (trials, planned) = (plan.tuning_runs(), plan.runs());
    [&trials, &planned].into_iter().for_each(|runs| settle(runs));
    // before anything is written, so that a refused comparison changes nothing; tuning decides what the other runs are
    check(if trials.is_empty() { &planned } else { &trials }, &data)?;
    criteria::record(plan, &without_configs([planned.clone(), trials.clone()].concat()))?;
    let interrupt = interrupt()?;
    let tuning = match trials.is_empty() {
        true => Vec::new(),
        false => run_all(plan, trials, jobs, &interrupt, "learning rates")?,
    };
    if interrupt.requested() && !tuning.is_empty() {
        return Err(Failure::Interrupted);
    }
    let (plan, trials) = &tuned(plan, &tuning)?;
    let planned = runs_of(plan, &planned);
    check(&planned, &data)?;
    let runs = run_all(plan, planned, jobs, &interrupt, &format!("{} arms x {seeds} seeds", plan.arms.len()))?;
    check_pairs(&runs, &data.hash)?;
    let written = report::write(plan, &runs, trials)?;
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
    if !plan.out.join("runs").is_dir() {
        return Err(Failure::request(format!("--out {}: holds no comparison", plan.out.display())));
    }
    let data = Material::of(plan.base())?;
    let trials = plan.tuning_runs();
    check(&trials, &data)?;
    let (plan, trials) = &tuned(plan, &without_configs(trials))?;
    let planned = plan.runs();
    check(&planned, &data)?;
    let runs = without_configs(planned);
    check_pairs(&runs, &data.hash)?;
    report::write(plan, &runs, trials)
}

/// Writes the report of published rows, without the runs that they came from.
///
/// # Errors
/// When the file is no results.csv of this configuration.
pub fn report_of(plan: &Plan, rows: &Path) -> Result<PathBuf> {
    report::write_from(plan, rows)
}
