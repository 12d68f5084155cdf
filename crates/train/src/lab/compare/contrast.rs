//! An arm against its baseline in one measure: tests, intervals and the word for it.

use super::measure::{Kind, Measure};
use super::plan::Plan;
use super::table::Results;
use crate::lab::stats::{Estimate, Interval, LogRank, Student, SubsetMeans, Time, holm, log_rank};

/// Fewer pairs than this decide nothing: two values always lie apart, and the t interval of one degree of freedom is thirteen
/// standard errors wide.
pub const ENOUGH: usize = 3;

/// What a comparison says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// p at most alpha, on the good side of the baseline.
    Better,
    /// p at most alpha, on the bad side.
    Worse,
    /// Two one-sided tests put the difference within the margin.
    Equivalent,
    /// None of these.
    Undecided,
}

impl Word {
    /// As readers see it.
    pub fn text(self) -> &'static str {
        match self {
            Word::Better => "better",
            Word::Worse => "worse",
            Word::Equivalent => "equivalent",
            Word::Undecided => "undecided",
        }
    }
}

/// An arm against its baseline, paired by seed.
#[derive(Debug, Clone)]
pub struct Contrast {
    /// The arm.
    pub arm: String,
    /// What it is compared with.
    pub baseline: String,
    /// (seed, arm, baseline) of every seed that both finished.
    pub pairs: Vec<(u64, f64, f64)>,
    /// Of arm minus baseline.
    pub estimate: Estimate,
    /// Of the mean difference: where `exact` with the level that so many pairs give, else Student's.
    pub interval: Option<Interval>,
    /// Whether the exact sign-flip test decides: not for losses, nor for more pairs than can be enumerated.
    pub exact: bool,
    /// Two-sided p of the test that decides: sign-flip where `exact`, else Student's. NaN where there is none.
    pub p: f64,
    /// After Holm's correction in its family; the same as `p` for the one declared contrast.
    pub adjusted: f64,
    /// p of the sign-flip test and the smallest that so many pairs can give.
    pub flip: Option<(f64, f64)>,
    /// p of "not equivalent" after the correction, where there is a margin.
    pub equivalent: Option<f64>,
    /// The declared primary contrast: a family of its own.
    pub declared: bool,
    /// Smallest true difference found four times of five: at the deviation seen, and at the upper end of its interval.
    pub detectable: (f64, f64),
    /// Times only: the unpaired exact log-rank test.
    pub log_rank: Option<LogRank>,
    /// The word for it.
    pub word: Word,
    /// Better or worse, but two one-sided tests put it within the margin.
    pub within_margin: bool,
}

impl Contrast {
    /// Differences, seed by seed.
    pub fn differences(&self) -> Vec<f64> {
        self.pairs.iter().map(|(_, a, b)| a - b).collect()
    }

    fn of(plan: &Plan, results: &Results, m: &Measure, arm: &str) -> Self {
        let (baseline, rules) = (plan.baseline_of(arm), &plan.rules);
        let (ours, theirs) = (m.values(results, arm, rules), m.values(results, baseline, rules));
        let other = |seed: u64| theirs.iter().find(|(s, _)| *s == seed).map(|(_, v)| *v);
        let pairs: Vec<(u64, f64, f64)> = ours.iter().filter_map(|&(s, v)| Some((s, v, other(s)?))).collect();
        let differences: Vec<f64> = pairs.iter().map(|(_, a, b)| a - b).collect();
        let (estimate, subsets) = (Estimate::of(&differences), SubsetMeans::of(&differences));
        let (student, level) = (Student(estimate), 1.0 - rules.alpha);
        let margin = rules.margin.filter(|_| m.key == rules.primary);
        // more pairs than can be enumerated are enough for Student's test of a mean
        let exact = subsets.as_ref().filter(|_| m.kind != Kind::Loss);
        let p = exact.map_or(student.p(), SubsetMeans::p);
        let equivalent = margin.map(|m| exact.map_or(student.p_equivalent(m), |s| s.p_equivalent(m)));
        let interval = match exact {
            Some(s) => Some(s.interval(level)),
            None => (estimate.n >= 2).then(|| student.interval(level)),
        };
        let log_rank = {
            let times = |arm: &str| m.times(results, arm, rules).into_iter().map(|t| t.1).collect::<Vec<Time>>();
            log_rank(&times(arm), &times(baseline))
        };
        Contrast {
            arm: arm.into(),
            baseline: baseline.into(),
            pairs,
            estimate,
            interval,
            exact: exact.is_some(),
            p,
            adjusted: p,
            flip: subsets.as_ref().map(|s| (s.p(), s.attainable())),
            equivalent,
            declared: m.key == rules.primary && arm == rules.contrast,
            detectable: (student.detectable(rules.alpha), student.detectable_at_most(rules.alpha)),
            log_rank,
            word: Word::Undecided,
            within_margin: false,
        }
    }

    fn decide(&mut self, falls: bool, alpha: f64) {
        let few = self.pairs.len() < ENOUGH;
        let differs = !few && self.adjusted <= alpha;
        let equivalent = !few && self.equivalent.is_some_and(|p| p <= alpha);
        self.within_margin = differs && equivalent;
        self.word = match (differs, equivalent) {
            (true, _) if (self.estimate.mean < 0.0) == falls => Word::Better,
            (true, _) => Word::Worse,
            (false, true) => Word::Equivalent,
            (false, false) => Word::Undecided,
        };
    }
}

/// All arms against their baselines. The declared contrast stands alone; the others share Holm's correction.
pub fn contrasts(plan: &Plan, results: &Results, m: &Measure) -> Vec<Contrast> {
    let arms = plan.arms.iter().map(|(name, _)| name.as_str()).filter(|a| *a != plan.baseline_of(a));
    let mut all: Vec<Contrast> = arms.map(|arm| Contrast::of(plan, results, m, arm)).collect();
    let family: Vec<usize> = (0..all.len()).filter(|&i| !all[i].declared).collect();
    let adjusted = holm(&family.iter().map(|&i| all[i].p).collect::<Vec<_>>());
    let equivalent = holm(&family.iter().map(|&i| all[i].equivalent.unwrap_or(f64::NAN)).collect::<Vec<_>>());
    for (k, &i) in family.iter().enumerate() {
        all[i].adjusted = adjusted[k];
        all[i].equivalent = all[i].equivalent.map(|_| equivalent[k]);
    }
    all.iter_mut().for_each(|c| c.decide(m.falls(), plan.rules.alpha));
    all
}
