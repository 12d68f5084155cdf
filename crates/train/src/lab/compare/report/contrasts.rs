//! Arms against their baselines: tables, the forest plot and the paired plot.

use super::super::budget;
use super::super::contrast::Contrast;
use super::super::measure::Kind;
use super::super::text::{probability, with_interval};
use super::study::{Section, Study, Table};
use crate::lab::chart::{Drawn, Forest, Pairs, Panel, Row, trimmed};

/// `+0.36 (0.16 to 0.56)`
fn short(c: &Contrast) -> String {
    match with_interval(c.estimate.mean, c.interval) {
        (mean, Some((low, high))) => format!("{mean} ({low} to {high})"),
        (mean, None) => mean,
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
    let (mean, ends) = with_interval(c.estimate.mean, c.interval);
    let interval = ends.zip(c.interval).map_or("-".to_string(), |((low, high), i)| {
        let level = format!("{:.1} %", 100.0 * i.level).replace(".0 %", " %");
        format!("{low} to {high} ({level})")
    });
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
        if c.pairs.is_empty() { "-".into() } else { mean },
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

/// What the columns of all tables of comparisons mean, said once, below the first one.
fn columns(study: &Study) -> String {
    let margin = study.plan.rules.margin.filter(|_| !study.plan.rules.primary.is_empty());
    let equivalent = margin.map_or(String::new(), |m| {
        format!(" Equivalent: p of two one-sided tests against the margin of {}.", trimmed(m))
    });
    format!(
        "A difference is arm minus baseline, seed by seed. Holm: p corrected for all comparisons of the table{}. Sign-flip: exact p and, in \
         brackets, the smallest that so many pairs can give.{equivalent} Could have shown: the smallest true difference found four times of \
         five, and in brackets the same where the deviation lies at the upper end of its interval.",
        if study.contrasts[0].iter().any(|c| c.declared) { " but the declared one" } else { "" },
    )
}

/// Removes the columns with these heads that hold nothing in any row.
fn without_empty(table: &mut Table, heads: &[&str]) {
    for head in heads {
        let Some(i) = table.head.iter().position(|h| h == head) else { continue };
        if table.rows.iter().all(|row| row[i] == "-") {
            table.head.remove(i);
            table.rows.iter_mut().for_each(|row| _ = row.remove(i));
        }
    }
}

/// `104 against 50.5` for every comparison, where a budget differs from its baseline's.
fn attended(study: &Study) -> Option<Vec<String>> {
    let of = |arm: &str| budget::measured(&study.results.finished, arm);
    let pairs: Vec<_> = study.contrasts[0].iter().map(|c| of(&c.arm).zip(of(&c.baseline))).collect();
    let unequal = pairs.iter().flatten().any(|(a, b)| budget::differ(*a, *b));
    let told =
        |pair: Option<(f64, f64)>| pair.map_or("-".into(), |(a, b)| format!("{} against {}", trimmed(a), trimmed(b)));
    unequal.then(|| pairs.into_iter().map(told).collect())
}

/// The comparisons by a measure.
pub fn table(study: &Study, i: usize) -> Section {
    let m = &study.measures[i];
    let primary = m.key == study.plan.rules.primary;
    let title = format!("{}: {}", if primary { "Primary outcome" } else { "Exploratory" }, m.title);
    let student = "Interval and p: Student's paired t test.";
    let how = match m.kind {
        Kind::Loss => student,
        // more pairs than can be enumerated
        Kind::Accuracy | Kind::Time if study.contrasts[i].iter().any(|c| !c.exact && c.pairs.len() > 1) => student,
        Kind::Accuracy | Kind::Time => {
            "Interval and p: exact sign-flip test, at the level that so many pairs give; a t interval would describe such values badly."
        }
    };
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
    let mut section = Section::new(&title).with_table(head, study.contrasts[i].iter().map(cells).collect());
    if let Some(table) = &mut section.table {
        without_empty(table, &["equivalent"]);
        if let Some(column) = attended(study).filter(|_| i == 0) {
            table.head.insert(3, "attended tokens".into());
            table.rows.iter_mut().zip(column).for_each(|(row, cell)| row.insert(3, cell));
        }
    }
    let name = format!("pairs-{}", m.key.replace([' ', '='], "-"));
    let charts = if i == 0 { paired(study, i) } else { None };
    let note =
        if i == 0 { format!("{} {how}", columns(study)) } else { format!("Columns as in the first table. {how}") };
    section.with_chart(&name, charts).with_note(&note)
}
