//! A running run: the loop of [`super::run::train`], and what happens beside an update.

use std::time::Instant;

use dash_data::Loader;
use dash_model::{Generation, Sampling};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::budget;
use super::checkpoint::{Checkpoints, State};
use super::eval::ValidationSet;
use super::material::Material;
use super::metrics::Metrics;
use super::pace::Pace;
use super::preflight;
use super::probe::Probe;
use super::stop::Watch;
use super::tasks::RouterChoice;
use super::text::continue_text;
use super::trainer::{StepStats, Trainer};
use crate::config::Config;
use crate::console::{self, tell};
use crate::failure::{Failure, Result};
use crate::program;
use crate::signals::Interrupt;

/// What is due after an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Due {
    log: bool,
    probe: bool,
    validation: bool,
    save: bool,
}

impl Due {
    fn at(config: &Config, step: u64) -> Self {
        let every = |n: u64| n > 0 && step.is_multiple_of(n);
        let last = step == config.run.steps;
        Due {
            log: every(config.log.every) || step == 1 || last,
            probe: every(config.probe.every) || (config.probe.every > 0 && (step == 1 || last)),
            validation: every(config.eval.every) || last,
            save: every(config.checkpoint.every) || last,
        }
    }

    fn any(self) -> bool {
        self.log || self.probe || self.validation || self.save
    }
}

/// Tokens a second of the updates since something else than an update took time. Right where the last update was waited for.
struct Speed {
    start: Instant,
    tokens: usize,
}

impl Speed {
    fn new() -> Self {
        Speed { start: Instant::now(), tokens: 0 }
    }

    fn rate(&self) -> f64 {
        self.tokens as f64 / self.start.elapsed().as_secs_f64()
    }
}

/// What a session is made of, when its folder is a run.
pub(super) struct Parts<'a> {
    pub config: &'a Config,
    pub material: &'a Material,
    pub trainer: Trainer,
    pub loader: Loader,
    pub set: ValidationSet,
    /// What validation costs without context, where there is training text to count.
    pub unigram: Option<f64>,
    /// Of the last update made.
    pub state: State,
    pub interrupt: Interrupt,
    /// When the process began to work.
    pub began: Instant,
}

/// A run from the update where this process starts to its last, or to a signal.
pub(super) struct Session<'a> {
    parts: Parts<'a>,
    checkpoints: Checkpoints,
    /// The first process keeps the record.
    metrics: Option<Metrics>,
    probe: Probe,
    bar: ProgressBar,
    speed: Speed,
    /// Updates made before this process.
    first: u64,
    /// Whether the router has been looked at for leaving nothing out.
    looked: bool,
    /// Whether the run has done enough, where it has a rule for that.
    watch: Option<Watch>,
}

impl<'a> Session<'a> {
    /// Opens the record of the run.
    pub fn new(parts: Parts<'a>) -> Result<Self> {
        let (config, first) = (parts.config, parts.trainer.optimizer.step);
        let folder = config.folder();
        let is_first = parts.trainer.peers().is_first();
        let mut metrics = is_first.then(|| Metrics::open(&folder, first, config.log.tensorboard)).transpose()?;
        if first == 0 {
            metrics.iter_mut().for_each(|metrics| metrics.config(config));
        }
        let target = if console::is_quiet() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(config.run.steps), target);
        let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} eta {eta}").expect("a valid template");
        bar.set_style(style);
        bar.set_position(first);
        bar.reset_eta();
        let probe = Probe::new(parts.set.first_batch(), config.probe.sequences);
        let checkpoints = Checkpoints::of(&folder);
        let mut watch = Watch::of(config);
        watch.iter_mut().for_each(|watch| _ = watch.recall(&folder, first));
        Ok(Session { checkpoints, metrics, probe, bar, speed: Speed::new(), first, looked: false, watch, parts })
    }

    /// Whether the run has done enough before its last update.
    fn enough(&self) -> bool {
        self.watch.is_some_and(|watch| watch.ended())
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// See [`Failure`]: a run that failed, or one that a signal stopped after saving.
    pub fn run(mut self) -> Result<()> {
        let config = self.parts.config;
        self.parts.trainer.peers().expect_updates(true);
        while self.parts.trainer.optimizer.step < config.run.steps && !self.enough() {
            let step = self.parts.trainer.optimizer.step + 1;
            let mut due = Due::at(config, step);
            if let Some(stats) = self.update(step, due.log)?.filter(|_| due.log) {
                self.log(&stats);
            }
            if due.probe {
                self.parts.trainer.settle()?;
                if let Some(metrics) = &mut self.metrics {
                    let (loss, layers) = self.probe.run(&self.parts.trainer.model)?;
                    metrics.probe(step, loss, &layers);
                }
            }
            let stop = self.parts.trainer.peers().any(self.parts.interrupt.requested())?;
            due.save |= stop;
            if due.validation || due.save {
                self.parts.trainer.check_weights(step, self.checkpoints.list().last().map(|c| c.0))?;
                self.parts.trainer.spikes.take_lines().into_iter().for_each(|line| say(&self.bar, line));
            }
            if due.validation {
                self.validate()?;
            }
            due.save |= self.enough();
            if step == config.run.steps || self.enough() {
                // before the checkpoint that says that the run has ended
                self.record_budget()?;
            }
            if due.save {
                self.save()?;
            }
            if due.any() {
                self.speed = Speed::new();
            }
            if stop && step < config.run.steps && !self.enough() {
                self.bar.finish_and_clear();
                tell!("interrupted at step {step}, saved; continue with: {}", program::command_to_resume());
                return Err(Failure::Interrupted);
            }
        }
        self.bar.finish_and_clear();
        // a run that an earlier build ended
        if self.parts.trainer.peers().first(|| Ok(budget::read(&config.folder())?.is_none()))? {
            self.record_budget()?;
        }
        self.tell_end();
        Ok(())
    }

    fn tell_end(&self) {
        let (made, all) = (self.parts.trainer.optimizer.step, self.parts.config.run.steps);
        let solved = format!(" of {all}, enough because the task is solved (eval.stop)");
        let solved = if made < all { &solved } else { "" };
        tell!(
            "done: {made} steps{solved} in {}, {}",
            preflight::duration(self.parts.began.elapsed().as_secs_f64()),
            self.parts.config.folder().display()
        );
    }

    fn record_budget(&self) -> Result<()> {
        let Parts { config, trainer, set, .. } = &self.parts;
        trainer.peers().first(|| budget::record(&config.folder(), &trainer.model, &set.by_length()))
    }

    /// One update, and the state after it; its figures where they were read.
    fn update(&mut self, step: u64, logged: bool) -> Result<Option<StepStats>> {
        let Parts { config, trainer, loader, state, began, .. } = &mut self.parts;
        let batches: Vec<_> = (0..config.data.grad_accum).map(|_| loader.next_batch()).collect();
        let stats = trainer.step(config, &batches, logged);
        trainer.spikes.take_lines().into_iter().for_each(|line| say(&self.bar, line));
        let stats = stats?;
        if step == self.first + 1 {
            trainer.settle()?;
            say(&self.bar, format!("first step after {:.1} s", began.elapsed().as_secs_f64()));
        }
        self.speed.tokens += config.tokens_per_step();
        (state.step, state.validation_loss) = (step, None);
        state.tokens += config.tokens_per_step() as u64;
        if let Some(batch) = batches.last() {
            state.data = batch.state;
        }
        self.bar.inc(1);
        Ok(stats)
    }

    /// The figures of the last update, to metrics and console.
    fn log(&mut self, stats: &StepStats) {
        let Parts { config, state, .. } = &self.parts;
        let pace = Pace::of(config, self.parts.trainer.devices(), self.speed.rate(), stats);
        self.metrics.iter_mut().for_each(|m| m.train(config, (state.step, state.tokens), &pace, stats));
        if !self.looked && settled_at(config).is_some_and(|settled| state.step >= settled) {
            self.looked = true;
            if let Some(warning) = hardly_sparse(config, state.step, stats) {
                say(&self.bar, warning);
            }
        }
        let target = config.router.target_share;
        tell_step(&self.bar, (self.first, state.step, config.run.steps), stats, (&pace, target));
    }

    /// Validation loss, and a sample where one is asked for.
    fn validate(&mut self) -> Result<()> {
        let Parts { config, material, trainer, set, unigram, state, .. } = &mut self.parts;
        let step = state.step;
        let chooses = if config.router.oracle { RouterChoice::Oracle } else { RouterChoice::Own };
        let v = set.run_among(&trainer.model, chooses, trainer.peers())?;
        state.validation_loss = Some(v.loss);
        self.watch.iter_mut().for_each(|watch| watch.saw(&v.task));
        let Some(metrics) = &mut self.metrics else { return Ok(()) };
        let sample = match (config.eval.sample_tokens, &material.tokenizer) {
            (0, _) | (_, None) => None,
            (n, Some(tokenizer)) => {
                let sampling = Sampling { temperature: 0.8, top_p: 0.95 };
                let how = Generation { max_tokens: n, sampling, cache: true };
                let prompt = prompt(config, material)?;
                let told = continue_text(&trainer.model, tokenizer, &prompt, (how, config.run.seed + step), |_| true)?;
                Some((prompt, told.text))
            }
        };
        metrics.validation(step, state.tokens, &v, *unigram, sample.as_ref().map(|(_, text)| text.as_str()));
        let density = if config.model.attention.chunk_size().is_some() {
            format!(", attends {:.0} % of chunks", 100.0 * v.density)
        } else {
            String::new()
        };
        say(&self.bar, format!("step {step}: validation loss {:.4}, {}{density}", v.loss, v.summary()));
        if let Some((prompt, text)) = sample {
            say(&self.bar, format!("  {prompt:?} -> {text:?}"));
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        let Parts { config, trainer, state, .. } = &self.parts;
        let moments = trainer.gathered_state()?;
        let save = || Ok(self.checkpoints.save(trainer, &moments, state.clone(), config).map(|_| ())?);
        trainer.peers().first(save)
    }
}

/// Tokens of the validation text that a sample continues where the configuration has no prompt.
const PROMPT_TOKENS: usize = 8;

/// What a sample continues: the configured text, or the beginning of the validation text.
fn prompt(config: &Config, material: &Material) -> Result<String> {
    let (given, mut ids) = (&config.eval.sample_prompt, Vec::new());
    match (&material.tokenizer, material.validation.first()) {
        (Some(tokenizer), Some(shard)) if given.is_empty() => {
            shard.read(0, PROMPT_TOKENS.min(shard.len()), &mut ids);
            Ok(tokenizer.decode(&ids)?)
        }
        _ => Ok(given.clone()),
    }
}

fn say(bar: &ProgressBar, line: String) {
    if bar.is_hidden() {
        tell!("{line}");
    } else {
        console::record_line(format_args!("{line}"));
        bar.println(line);
    }
}

/// Attended chunks over visible chunks, mean over the layers; nothing where no layer routes.
fn chunk_density(s: &StepStats) -> Option<f64> {
    let n = s.routers.len();
    (n > 0).then(|| s.routers.iter().map(|l| l.router.density).sum::<f64>() / n as f64)
}

/// Above this share of the chunks a router saves nothing worth its cost.
const HARDLY_SPARSE: f64 = 0.9;

/// Updates that a soft router takes to show what it does, however short the warmup.
const SETTLED: u64 = 50;

/// The update from which a router's density says something about the run; none in a run that ends before. A number of chunks does not
/// depend on the weights. A soft choice does: a fresh router scores all chunks alike and attends nearly all of them, so it is looked at
/// when learning rate, alpha and gamma are where the configuration leads them.
fn settled_at(config: &Config) -> Option<u64> {
    if config.model.attention.top().is_some() {
        return Some(1);
    }
    let ramps = [config.router.alpha, config.router.gamma].into_iter().flatten().map(|ramp| ramp.steps);
    let settled = ramps.chain([config.optim.warmup_steps, SETTLED]).max().unwrap_or(SETTLED);
    (settled <= config.run.steps).then_some(settled)
}

/// What to do about a run whose router leaves nothing out.
fn hardly_sparse(config: &Config, step: u64, s: &StepStats) -> Option<String> {
    let density = chunk_density(s).filter(|d| *d > HARDLY_SPARSE)?;
    let attention = &config.model.attention;
    let chunks = attention.chunk_size().map_or(0, |size| config.data.seq_len.div_ceil(size));
    let what = match (attention.top(), config.router.target_share) {
        (Some(_), _) => "lower model.attention.top or chunk_size".to_string(),
        (None, Some(target)) => {
            format!("wait: the controller is to bring it to {:.0} % of tokens and has not yet", 100.0 * target)
        }
        (None, None) => "raise model.attention.gamma, lower chunk_size, or set router.target_share".to_string(),
    };
    Some(format!(
        "attends {:.0} % of chunks at step {step}: hardly sparse. That is the mean over layers and queries of attended over visible chunks, \
         {chunks} at the end of a sequence; the share of tokens is the same of single tokens. To change it, {what}",
        100.0 * density
    ))
}

/// The line of a logged step; `first` is the step that this process started from.
fn tell_step(
    bar: &ProgressBar,
    (first, step, steps): (u64, u64, u64),
    s: &StepStats,
    (pace, target): (&Pace, Option<f64>),
) {
    let mut attends = String::new();
    if let Some(share) = s.attended {
        attends = format!(" attends {:.0} % of tokens", 100.0 * share);
        if let Some(target) = target {
            attends += &format!(" (target {:.0} %)", 100.0 * target);
        }
    }
    if let Some(chunks) = chunk_density(s) {
        let word = if attends.is_empty() { " attends" } else { "," };
        attends += &format!("{word} {:.0} % of chunks", 100.0 * chunks);
    }
    let message = format!("loss {:.4}{attends} {pace}", s.loss);
    let left = (steps - step) as f64 * bar.elapsed().as_secs_f64() / (step - first).max(1) as f64;
    let line = format!("step {step}/{steps} {message} eta {}", preflight::duration(left));
    if bar.is_hidden() {
        tell!("{line}");
    } else {
        console::record_line(format_args!("{line}"));
        bar.set_message(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Ramp;
    use crate::config::reference::SMALLEST;
    use std::path::Path;

    fn config(set: &[&str]) -> Config {
        let set: Vec<String> =
            ["run.steps=400", "optim.warmup_steps=20"].iter().chain(set).map(|s| s.to_string()).collect();
        Config::from_text(SMALLEST, &set, Path::new("small.toml")).unwrap()
    }

    #[test]
    fn a_soft_router_is_looked_at_when_nothing_leads_it_any_more() {
        let dash = config(&["model.attention.kind=dash"]);
        assert_eq!(settled_at(&dash), Some(SETTLED));
        let mut long = dash.clone();
        long.optim.warmup_steps = 120;
        assert_eq!(settled_at(&long), Some(120));
        long.router.alpha = Some(Ramp { from: 1.25, to: 1.5, steps: 300 });
        assert_eq!(settled_at(&long), Some(300));
        long.run.steps = 299;
        assert_eq!(settled_at(&long), None, "a run that ends on the way");
        // the number of chunks is in the configuration
        assert_eq!(settled_at(&config(&["model.attention.kind=topk"])), Some(1));
    }
}
