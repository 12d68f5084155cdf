//! Learning rates: every rate is tried for every arm with seeds of their own, and the best by the primary outcome runs with the
//! seeds of the comparison.

use super::measure::{Kind, Measure};
use super::plan::Plan;
use super::run::Run;
use super::table::Results;
use crate::config::Config;

/// What the rows of a tuning run call its arm. No arm's name has an `@`.
pub fn label(arm: &str, rate: f64) -> String {
    format!("{arm}@{rate}")
}

/// A learning rate tried for an arm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tried {
    /// The rate.
    pub rate: f64,
    /// Mean of the primary outcome over the tuning seeds.
    pub mean: f64,
    /// Runs that failed.
    pub failed: usize,
}

/// What an arm's rate was chosen from.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The arm.
    pub arm: String,
    /// All rates, ascending.
    pub tried: Vec<Tried>,
    /// The best one.
    pub rate: f64,
}

impl Choice {
    /// The best rate is the smallest or the largest: a better one may lie beyond.
    pub fn at_edge(&self) -> bool {
        let ends = [self.tried.first(), self.tried.last()];
        ends.iter().flatten().any(|t| t.rate == self.rate)
    }
}

impl Plan {
    /// Arms whose rates are tuned.
    fn tuned(&self) -> impl Iterator<Item = &(String, Config)> {
        let takes = |arm: &str| self.rates_of.iter().any(|(a, _)| a == arm);
        self.arms.iter().filter(move |(arm, _)| !takes(arm))
    }

    /// The runs that choose rates, seed by seed; none where no rates are tried.
    pub fn tuning_runs(&self) -> Vec<(Run, Config)> {
        let rules = &self.rules;
        let mut out = Vec::new();
        for &seed in &rules.tuning_seeds {
            for (arm, config) in self.tuned() {
                for &rate in &rules.learning_rates {
                    let mut config = config.clone();
                    config.set_seed(seed);
                    config.optim.lr = rate;
                    if rules.tuning_steps > 0 {
                        config.run.steps = rules.tuning_steps;
                    }
                    out.push(self.run(&label(arm, rate), &config, "tuning", &format!("{arm}-lr{rate}-s{seed}")));
                }
            }
        }
        out
    }

    /// What the tuning runs chose; none before all of them have ended.
    pub fn choices(&self, results: &Results) -> Option<Vec<Choice>> {
        let measures = self.measures();
        let primary = measures.iter().find(|m| m.key == self.rules.primary)?;
        let mut rates = self.rules.learning_rates.clone();
        rates.sort_by(f64::total_cmp);
        let choose = |(arm, _): &(String, Config)| {
            let tried =
                rates.iter().map(|&rate| self.tried(results, primary, arm, rate)).collect::<Option<Vec<_>>>()?;
            let better = |a: &Tried, b: &Tried| if primary.falls() { a.mean < b.mean } else { a.mean > b.mean };
            let best = tried.iter().copied().reduce(|best, t| if better(&t, &best) { t } else { best })?;
            Some(Choice { arm: arm.clone(), tried, rate: best.rate })
        };
        self.tuned().map(choose).collect()
    }

    /// How an arm did with a rate; none where a run has not ended. A failed run is worth the worst value there is.
    fn tried(&self, results: &Results, primary: &Measure, arm: &str, rate: f64) -> Option<Tried> {
        let label = label(arm, rate);
        let values = primary.values(results, &label, &self.rules);
        let failed = results.all.last(&label, "run", "failed", "").iter().filter(|f| f.1 == 1.0).count();
        let finished = results.all.last(&label, "run", "finished", "").iter().filter(|f| f.1 == 1.0).count();
        if finished + failed < self.rules.tuning_seeds.len() {
            return None;
        }
        let sum: f64 = values.iter().map(|v| v.1).sum();
        let mean = match primary.kind {
            // a time has an end of the run for a failed one
            Kind::Time => sum / values.len() as f64,
            Kind::Accuracy => sum / (finished + failed) as f64,
            Kind::Loss if failed > 0 => f64::INFINITY,
            Kind::Loss => sum / values.len() as f64,
        };
        Some(Tried { rate, mean, failed })
    }

    /// The plan with the chosen rates.
    pub fn with_rates(&self, choices: &[Choice]) -> Plan {
        let mut plan = self.clone();
        for (arm, config) in &mut plan.arms {
            let source = self.rates_of.iter().find(|(a, _)| a == arm).map_or(arm.as_str(), |(_, other)| other);
            if let Some(choice) = choices.iter().find(|c| c.arm == source) {
                config.optim.lr = choice.rate;
            }
        }
        plan
    }
}
