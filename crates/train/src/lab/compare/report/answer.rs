//! The answer, in a sentence.

use super::super::contrast::{Contrast, Word};
use super::super::criteria::Status;
use super::super::text::{probability, rounded, with_interval};
use super::study::Study;
use crate::lab::stats::Estimate;

/// `0.36 (95 % interval 0.16 to 0.56)`, or without an interval where there is none.
pub fn difference(c: &Contrast) -> String {
    match (with_interval(c.estimate.mean, c.interval), c.interval) {
        ((mean, Some((low, high))), Some(i)) => {
            let level = format!("{:.3}", 100.0 * i.level);
            let level = level.trim_end_matches('0').trim_end_matches('.');
            format!("{mean} ({level} % interval {low} to {high})")
        }
        ((mean, _), _) => mean,
    }
}

/// What an arm and its baseline reached: `0.98 against 0.62`.
fn against(c: &Contrast) -> String {
    let of = |f: fn(&(u64, f64, f64)) -> f64| Estimate::of(&c.pairs.iter().map(f).collect::<Vec<_>>()).mean;
    let error = c.estimate.deviation / (c.pairs.len() as f64).sqrt();
    format!("{} against {}", rounded(of(|p| p.1), error).0, rounded(of(|p| p.2), error).0)
}

/// One comparison in a sentence.
fn one(c: &Contrast, title: &str, alpha: f64) -> String {
    if c.pairs.is_empty() {
        return format!("No seed of both {} and {} has finished.", c.arm, c.baseline);
    }
    let test = if c.exact { "exact sign-flip test" } else { "paired t test" };
    let (arm, base, n) = (&c.arm, &c.baseline, c.pairs.len());
    let pairs = if n == 1 { "1 pair".to_string() } else { format!("{n} pairs") };
    let numbers =
        format!("{}, difference {}, {pairs}, {test} p = {}", against(c), difference(c), probability(c.adjusted));
    match c.word {
        Word::Undecided => {
            let least = c.flip.filter(|(_, least)| c.exact && *least > alpha);
            let cannot = least.map_or(String::new(), |(_, least)| {
                format!("; so few pairs cannot give a p below {}", probability(least))
            });
            format!("It is undecided whether {arm} differs from {base} in {title}: {numbers}{cannot}.")
        }
        Word::Equivalent => format!("{arm} is equivalent to {base} in {title}: {numbers}."),
        word => {
            let small = if c.within_margin { ", by less than the margin" } else { "" };
            format!("{arm} is {} than {base} in {title}{small}: {numbers}.", word.text())
        }
    }
}

/// All comparisons of a measure, by word.
fn many(all: &[Contrast], title: &str) -> String {
    let groups = [Word::Better, Word::Worse, Word::Equivalent, Word::Undecided].map(|word| {
        let of = all.iter().filter(|c| c.word == word);
        let short = |c: &Contrast| match c.pairs.len() {
            0 => "no pair".to_string(),
            _ => difference(c).split(" (").next().unwrap_or_default().to_string(),
        };
        let names: Vec<String> = of.map(|c| format!("{} ({})", c.arm, short(c))).collect();
        (word, names)
    });
    let told: Vec<String> =
        groups.iter().filter(|(_, n)| !n.is_empty()).map(|(w, n)| format!("{}: {}", w.text(), n.join(", "))).collect();
    let first = &all[0].baseline;
    let base = if all.iter().all(|c| c.baseline == *first) { first.as_str() } else { "their baselines" };
    format!("In {title}, against {base}, after Holm's correction for {}: {}.", comparisons(all.len()), told.join("; "))
}

fn comparisons(n: usize) -> String {
    if n == 1 { "one comparison".into() } else { format!("{n} comparisons") }
}

/// The first words of the report.
pub fn answer(study: &Study, criteria: &Status) -> String {
    let (all, m) = (&study.contrasts[0], &study.measures[0]);
    let declared = all.iter().find(|c| c.declared).or(if all.len() == 1 { all.first() } else { None });
    let finding = match declared {
        _ if all.is_empty() => format!("There is one arm, {}, so nothing is compared.", study.plan.rules.baseline),
        Some(c) => one(c, &m.title, study.plan.rules.alpha),
        None => many(all, &m.title),
    };
    let changed = match criteria.changed.is_empty() {
        true => String::new(),
        false => {
            format!("Criteria were changed after the first run ({}), so this explores. ", criteria.changed.join("; "))
        }
    };
    let contrast = &study.plan.rules.contrast;
    let left_out = match contrast.is_empty() || all.iter().any(|c| c.declared) {
        true => String::new(),
        false => format!("The declared contrast, {contrast}, is not among these arms, so this explores. "),
    };
    let open = match study.plan.rules.primary.is_empty() {
        true => " No primary outcome was declared (compare.primary), so this explores and decides nothing.",
        false => "",
    };
    format!("{changed}{left_out}{finding}{open}")
}
