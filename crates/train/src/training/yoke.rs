//! What a run takes from another one that has ended: how many chunks are attended (`router.budget_from`), and gamma from update to
//! update (`router.gamma_from`). A run keeps what it took in its own folder, so that nothing which happens to the other one changes it.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use dash_model::{Budget, Model};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::budget;
use super::knobs::GAMMA;
use crate::config::Config;
use crate::failure::{Failure, Result};
use crate::files::replace_file;

/// The file of a run that holds what it took.
const FILE: &str = "yoke.json";

/// What a run took from others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Yoke {
    /// Attended chunks by length, layer and position.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// gamma of every update, from the first on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<Vec<f64>>,
}

impl Yoke {
    /// From the runs that a configuration names.
    ///
    /// # Errors
    /// When one of them is missing, has not ended, or differs in shape.
    pub fn of(config: &Config) -> Result<Self> {
        let plan = &config.router;
        let budget = plan.budget_from.as_deref().map(|run| taken_budget(config, run)).transpose()?;
        let gamma = plan.gamma_from.as_deref().map(|run| taken_gamma(config, run)).transpose()?;
        Ok(Yoke { budget, gamma })
    }

    /// What the run in `folder`, or of the checkpoint `folder`, took when it began.
    ///
    /// # Errors
    /// When it took something and its record of that is gone or damaged.
    pub fn taken(folder: &Path, config: &Config) -> anyhow::Result<Self> {
        let plan = &config.router;
        if plan.budget_from.is_none() && plan.gamma_from.is_none() {
            return Ok(Yoke::default());
        }
        let places = [folder.join(FILE), folder.join("../..").join(FILE)];
        let path = places.iter().find(|p| p.is_file()).ok_or_else(|| {
            anyhow!(
                "{}: has no {FILE}, in which a run keeps what it took from another one; restore it",
                folder.display()
            )
        })?;
        let bytes = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let yoke: Yoke = serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
        let lacks = [
            ("budget_from", plan.budget_from.is_some() && yoke.budget.is_none()),
            ("gamma_from", plan.gamma_from.is_some() && yoke.gamma.is_none()),
        ];
        match lacks.iter().find(|(_, lacks)| *lacks) {
            Some((key, _)) => {
                Err(anyhow!("router.{key}: the run took nothing like it when it began; start another run for it"))
            }
            None => Ok(yoke),
        }
    }

    /// Writes it into the folder of the run; nothing where nothing was taken.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn record(&self, folder: &Path) -> anyhow::Result<()> {
        if *self == Yoke::default() {
            return Ok(());
        }
        replace_file(&folder.join(FILE), &serde_json::to_vec(self)?)
    }

    /// Gives a model the budget.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn set(&self, model: &mut Model) -> dash_core::Result<()> {
        self.budget.iter().try_for_each(|budget| model.set_budget(Arc::new(budget.clone())))
    }

    /// gamma of update `step`, counted from 1.
    pub fn gamma_at(&self, step: u64) -> Option<f64> {
        let all = self.gamma.as_ref()?;
        all.get(step.saturating_sub(1) as usize).or(all.last()).copied()
    }
}

/// Refuses a folder that is no run.
fn check_run(key: &str, run: &Path) -> Result<Config> {
    if !run.join("config.toml").is_file() {
        return Err(Failure::request(format!(
            "{key}: {} holds no run (there is no config.toml); name the folder of a run that has ended",
            run.display()
        )));
    }
    Ok(Config::of_run(run)?)
}

fn taken_budget(config: &Config, run: &Path) -> Result<Budget> {
    let key = "router.budget_from";
    check_run(key, run)?;
    let read = budget::read(run).map_err(|e| {
        Failure::request(format!(
            "{key}: {e:#}; remove that file and end the run again with --resume, or name another run"
        ))
    })?;
    let Some(budget) = read else {
        return Err(Failure::request(format!(
            "{key}: {} has no {}, which a run that routes writes at its end; end it with --resume",
            run.display(),
            budget::FILE
        )));
    };
    let (layers, chunk) = (config.model.layers, config.model.attention.chunk_size().unwrap_or(0));
    if let Some(why) = budget.misfit(layers, chunk, config.positions()) {
        return Err(Failure::request(format!("{key}: {} does not fit: {why}", run.display())));
    }
    Ok(budget)
}

/// gamma of every update up to the configuration's last; between two logged updates on a line in its logarithm.
fn taken_gamma(config: &Config, run: &Path) -> Result<Vec<f64>> {
    let key = "router.gamma_from";
    let source = check_run(key, run)?;
    let path = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let logged = logged_gamma(&text);
    let Some(&(last, _)) = logged.last() else {
        return Err(Failure::request(format!(
            "{key}: {} logged no gamma; name a run whose attention has one, for example of kind \"dash\"",
            run.display()
        )));
    };
    // one that ended because it had solved its task keeps its last gamma
    let solved = source.eval.stop.is_some() && budget::read(run)?.is_some();
    if last < config.run.steps && !solved {
        return Err(Failure::request(format!(
            "{key}: {} logged gamma up to update {last}, this run has {}; let it end, or lower run.steps",
            run.display(),
            config.run.steps
        )));
    }
    if let Some((step, gamma)) = logged.iter().find(|(_, gamma)| !(*gamma >= GAMMA.0 && *gamma <= GAMMA.1)) {
        return Err(Failure::request(format!(
            "{key}: {} logged gamma {gamma} at update {step}; it must be {} to {}",
            run.display(),
            GAMMA.0,
            GAMMA.1
        )));
    }
    Ok((1..=config.run.steps).map(|step| between(&logged, step)).collect())
}

/// (update, gamma) of the train lines of a metrics.jsonl, ascending.
fn logged_gamma(text: &str) -> Vec<(u64, f64)> {
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let train = lines.filter(|line| line["split"] == "train");
    train.filter_map(|line| Some((line["step"].as_u64()?, line["gamma"].as_f64()?))).collect()
}

fn between(logged: &[(u64, f64)], step: u64) -> f64 {
    let after = logged.partition_point(|(s, _)| *s < step);
    let (s1, g1) = logged[after.min(logged.len() - 1)];
    if s1 <= step || after == 0 {
        return g1;
    }
    let (s0, g0) = logged[after - 1];
    let share = (step - s0) as f64 / (s1 - s0) as f64;
    (g0.ln() + share * (g1 / g0).ln()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gamma_between_logged_updates_lies_on_a_line_in_its_logarithm() {
        let text = "{\"split\":\"train\",\"step\":1,\"gamma\":2.0}\n{\"split\":\"val\",\"step\":1}\nhalf a line\n\
                    {\"split\":\"train\",\"step\":5,\"gamma\":8.0}\n{\"split\":\"train\",\"step\":6,\"gamma\":4.0}\n";
        let logged = logged_gamma(text);
        assert_eq!(logged, [(1, 2.0), (5, 8.0), (6, 4.0)]);
        assert_eq!([1, 5, 6, 9].map(|step| between(&logged, step)), [2.0, 8.0, 4.0, 4.0]);
        assert!((between(&logged, 3) - 4.0).abs() < 1e-12, "half way from 2 to 8");
        let yoke = Yoke { gamma: Some(vec![2.0, 3.0]), budget: None };
        assert_eq!([1, 2, 3].map(|step| yoke.gamma_at(step)), [Some(2.0), Some(3.0), Some(3.0)]);
        assert_eq!(Yoke::default().gamma_at(1), None);
    }
}
