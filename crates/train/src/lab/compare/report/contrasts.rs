//! Arms against their baselines: tables, the forest plot and the paired plot.

use super::super::contrast::Contrast;
use super::super::measure::Kind;
use super::super::text::{number, probability, rounded};
use super::study::{Section, Study};
use crate::lab::chart::{Drawn, Forest, Pairs, Panel, Row, trimmed};

/// `+0.36 (0.16 to 0.56)`
fn short(c: &Contrast) -> String {
    match c.interval.filter(|i| i.high > i.low) {
        Some(i) => {
            let error = (i.high - i.low) / 2.0;
            let of = |x: f64| rounded(x, error).0;
            format!("{} ({} to {})", of(c.estimate.mean), of(i.low), of(i.high))
        }
        None => number(c.estimate.mean),
    }
}

/// Differences of the first measure around zero.
pub fn forest(study: &Study) -> Option<Drawn> {
    let (all, m) = (&study.contrasts[0], &study.measures[0]);
    let row = |c: &Contrast| Row {
        name: format!("{} − {}", c.arm, c.baseline),
        text: format!("{}, {}", short(c), c.word.text()),
        mean: c.estimate.mean,
        interval: c.interval.map(|i| (i.low, i.high)),
        dots: c.differences(),
        series: study.series(&c.arm),
    };
    let (good, bad) = ("better".to_string(), "worse".to_string());
    let forest = Forest {
        title: "Paired differences".into(),
        axis: m.title.clone(),
        sides: if m.falls() { (good, bad) } else { (bad, good) },
        margin: study.plan.rules.margin.filter(|_| m.key == study.plan.rules.primary),
        rows: all.iter().filter(|c| !c.pairs.is_empty()).map(row).collect(),
    };
    forest.draw()
}

fn paired(study: &Study, i: usize) -> Option<Drawn> {
    let panel = |c: &Contrast| Panel {
        left: c.baseline.clone(),
        right: c.arm.clone(),
        pairs: c.pairs.iter().map(|(_, a, b)| (*b, *a)).collect(),
        series: study.series(&c.arm),
    };
    let panels = study.contrasts[i].iter().map(panel).collect();
    Pairs { title: "Seed by seed".into(), y: study.measures[i].title.clone(), panels }.draw()
}

fn cells(c: &Contrast) -> Vec<String> {
    let interval = c.interval.map_or("-".to_string(), |i| {
        let error = (i.high - i.low) / 2.0;
        let level = format!("{:.1} %", 100.0 * i.level).replace(".0 %", " %");
        format!("{} to {} ({level})", rounded(i.low, error).0, rounded(i.high, error).0)
    });
    let half = c.interval.map_or(f64::NAN, |i| (i.high - i.low) / 2.0);
    let detectable = match c.detectable {
        (low, high) if low.is_finite() => format!("{} ({})", trimmed(low), trimmed(high)),
        _ => "-".into(),
    };
    let mut word = c.word.text().to_string();
    if c.within_margin {
        word += ", within the margin";
    }
    if c.declared {
        word += " (declared)";
    }
    let above = c.differences().iter().filter(|d| **d > 0.0).count();
    vec![
        c.arm.clone(),
        c.baseline.clone(),
        word,
        if c.pairs.is_empty() { "-".into() } else { rounded(c.estimate.mean, half).0 },
        interval,
        probability(c.p),
        if c.declared { "-".into() } else { probability(c.adjusted) },
        c.flip.map_or("-".into(), |(p, least)| format!("{} ({})", probability(p), probability(least))),
        c.equivalent.map_or("-".into(), probability),
        c.pairs.len().to_string(),
        format!("{above} of {}", c.pairs.len()),
        detectable,
    ]
}

/// The comparisons by a measure.
pub fn table(study: &Study, i: usize) -> Section {
    let m = &study.measures[i];
    let primary = m.key == study.plan.rules.primary;
    let title = format!("{}: {}", if primary { "Primary outcome" } else { "Exploratory" }, m.title);
    let student = "The interval and p are of Student's paired t test.";
    let how = match m.kind {
        Kind::Loss => student,
        // more pairs than can be enumerated
        Kind::Accuracy | Kind::Time if study.contrasts[i].iter().any(|c| !c.exact && c.pairs.len() > 1) => student,
        Kind::Accuracy | Kind::Time => {
            "The interval and p are of the exact sign-flip test; the interval has the level that so many pairs give, and a t \
             interval would describe such values badly."
        }
    };
    let note = format!(
        "A difference is arm minus baseline, seed by seed. {how} Holm: p corrected for all comparisons of this table{}. Sign-flip: exact \
         p and, in brackets, the smallest that so many pairs can give. Equivalent: p of two one-sided tests against the margin{}. Could \
         have shown: the smallest true difference found four times of five, and in brackets the same where the deviation lies at the upper \
         end of its interval.",
        if study.contrasts[i].iter().any(|c| c.declared) { " but the declared one" } else { "" },
        study
            .plan
            .rules
            .margin
            .filter(|_| primary)
            .map_or(" (none is declared)".into(), |m| format!(" of {}", trimmed(m))),
    );
    let head = [
        "arm",
        "against",
        "reading",
        "difference",
        "interval",
        "p",
        "Holm",
        "sign-flip",
        "equivalent",
        "pairs",
        "higher in",
        "could have shown",
    ];
    let section = Section::new(&title).with_table(head, study.contrasts[i].iter().map(cells).collect());
    let name = format!("pairs-{}", m.key.replace([' ', '='], "-"));
    let charts = if i == 0 { paired(study, i) } else { None };
    section.with_chart(&name, charts).with_note(&note)
}
