//! The report of a comparison: results.csv, and report.html and report.md made from it.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Context;
use dash_data::TaskKind;

use super::chart::{Line, Style, chart, trimmed};
use super::plan::Plan;
use super::run::{Outcome, Run, check_pairs};
use super::stats::{ENOUGH, Estimate, Verdict};
use super::table::{Row, Rows};
use crate::failure::Result;
use crate::files::replace_file;

/// A figure that arms are judged by.
struct Measure {
    title: String,
    split: &'static str,
    metric: &'static str,
    at: String,
    /// smaller is better
    loss: bool,
    /// mean over all validations instead of the last: how fast it was learned
    over_run: bool,
}

impl Measure {
    /// By seed.
    fn values(&self, rows: &Rows, arm: &str) -> Vec<(u64, f64)> {
        match self.over_run {
            true => rows.mean(arm, self.split, self.metric, &self.at),
            false => rows.last(arm, self.split, self.metric, &self.at),
        }
    }
}

/// A table of text.
struct Table {
    title: String,
    note: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// Everything that a reader sees, in order.
pub struct Report {
    title: String,
    facts: Vec<String>,
    warnings: Vec<String>,
    tables: Vec<Table>,
    charts: Vec<(String, String)>,
}

fn strings<const N: usize>(x: [&str; N]) -> Vec<String> {
    x.map(str::to_string).to_vec()
}

/// `1.234 ± 0.005`
fn plus_minus(e: &Estimate) -> String {
    match e.n {
        0 => "no run finished".into(),
        1 => format!("{} (one seed)", trimmed(e.mean)),
        // equal values differ from their mean by its rounding
        _ if e.half <= 1e-12 * e.mean.abs() => format!("{} ± 0", trimmed(e.mean)),
        _ => format!("{} ± {}", trimmed(e.mean), trimmed(e.half)),
    }
}

/// The accuracy that counts as having left the plateau.
const LEFT: f64 = 0.5;
/// Or, on text, the share of the loss without context.
const LEFT_TEXT: f64 = 0.9;

/// Reads the runs into rows, checks that they can be paired, and writes results.csv, report.md, report.html and plots.
///
/// # Errors
/// When finished runs saw different data or tokens, or a file cannot be written.
pub fn write(plan: &Plan, runs: &[Run], hash: &str) -> Result<PathBuf> {
    check_pairs(runs, hash)?;
    let mut rows = Rows::default();
    for run in runs {
        let outcome = run.outcome();
        if run.folder.join("metrics.jsonl").exists() {
            rows.read_run(&run.arm, run.seed, &run.folder)?;
        }
        rows.0.push(Row {
            arm: run.arm.clone(),
            seed: run.seed,
            step: run.logged(),
            split: "run".into(),
            metric: "finished".into(),
            at: String::new(),
            value: (outcome == Outcome::Done) as u8 as f64,
        });
    }
    let report = Report::new(plan, &rows, runs)?;
    let save = |name: &str, text: &str| replace_file(&plan.out.join(name), text.as_bytes());
    save("results.csv", &rows.csv())?;
    std::fs::create_dir_all(plan.out.join("plots")).context("plots cannot be created")?;
    for (name, svg) in &report.charts {
        save(&format!("plots/{name}.svg"), svg)?;
    }
    save("report.md", &report.markdown())?;
    save("report.html", &report.html())?;
    Ok(plan.out.join("report.html"))
}

/// Rows of finished runs only: what means and differences are taken over.
fn finished(rows: &Rows) -> Rows {
    let done: Vec<(&str, u64)> =
        rows.of("run", "finished", "").filter(|r| r.value == 1.0).map(|r| (r.arm.as_str(), r.seed)).collect();
    Rows(rows.0.iter().filter(|r| done.contains(&(r.arm.as_str(), r.seed))).cloned().collect())
}

fn values(pairs: &[(u64, f64)]) -> Vec<f64> {
    pairs.iter().map(|p| p.1).collect()
}

/// Differences to the baseline by seed.
fn paired(arm: &[(u64, f64)], baseline: &[(u64, f64)]) -> Vec<f64> {
    let other = |seed: u64| baseline.iter().find(|(s, _)| *s == seed).map(|(_, v)| *v);
    arm.iter().filter_map(|&(seed, v)| Some(v - other(seed)?)).collect()
}

impl Report {
    fn new(plan: &Plan, all: &Rows, runs: &[Run]) -> Result<Self> {
        let rows = &finished(all);
        let config = plan.base();
        let arms: Vec<&str> = plan.arms.iter().map(|(name, _)| name.as_str()).collect();
        let d = &config.data;
        let mut facts = vec![
            format!(
                "{} arms x {} seeds, {} updates of {} tokens each; baseline: {}",
                arms.len(),
                plan.seeds,
                config.run.steps,
                config.tokens_per_step(),
                plan.baseline
            ),
            format!(
                "Model: {} layers, width {}, {} heads, {} key/value heads, MLP {}; sequences of {} tokens",
                config.model.layers, config.model.width, config.model.heads, config.model.kv_heads, config.model.ffn, d.seq_len
            ),
            "Seed by seed, arms start from equal weights wherever both have a parameter and see the same sequences in the same \
             order. Intervals are 95 % of Student's t over seeds; a difference is arm minus baseline, seed by seed."
                .into(),
        ];
        if let Some(task) = &config.task {
            let kind = serde_json::to_value(task.kind).ok().and_then(|v| v.as_str().map(str::to_string));
            let records = match task.kind {
                TaskKind::PhoneBook | TaskKind::Needle => String::new(),
                _ => format!(", {} pairs", task.pairs),
            };
            facts.push(format!("Task: {}{records}, vocabulary {}", kind.unwrap_or_default(), d.vocab_size));
        }
        let mut warnings = Vec::new();
        for run in runs {
            match run.outcome() {
                Outcome::Done => {}
                Outcome::Unfinished => warnings.push(format!(
                    "{} with seed {} is not finished (step {} of {}) and not counted; the same command continues it.",
                    run.arm,
                    run.seed,
                    run.logged(),
                    run.steps
                )),
                Outcome::Failed(why) => {
                    warnings.push(format!("{} with seed {} failed and is not counted: {why}", run.arm, run.seed));
                }
            }
        }
        if (plan.seeds as usize) < ENOUGH {
            warnings.push(format!("Fewer than {ENOUGH} seeds: the numbers are reported, no difference is declared."));
        }
        let measures = measures(config, rows);
        let mut tables = vec![summary(&arms, rows, &measures)];
        tables.extend(measures.iter().map(|m| differences(&arms, plan, rows, m)));
        tables.push(budget(plan, rows));
        tables.push(plateau(config, &arms, rows));
        if config.task.is_some() {
            tables.push(faults(&arms, rows));
        }
        if rows.of("probe", "router_share_q", "layer=0").next().is_some() {
            tables.push(gradients(&arms, rows));
        }
        let charts = charts(config, &arms, rows)?;
        Ok(Report { title: format!("Comparison: {}", config.run.name), facts, warnings, tables, charts })
    }

    /// For people who read text.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n", self.title);
        self.facts.iter().for_each(|f| _ = writeln!(out, "- {f}"));
        self.warnings.iter().for_each(|w| _ = writeln!(out, "\n**Attention:** {w}"));
        for t in &self.tables {
            let _ = write!(out, "\n## {}\n\n", t.title);
            let _ = writeln!(out, "| {} |\n|{}", t.head.join(" | "), "---|".repeat(t.head.len()));
            t.rows.iter().for_each(|r| _ = writeln!(out, "| {} |", r.join(" | ")));
            if !t.note.is_empty() {
                let _ = writeln!(out, "\n{}", t.note);
            }
        }
        out += "\n## Pictures\n";
        self.charts.iter().for_each(|(name, _)| _ = write!(out, "\n![{name}](plots/{name}.svg)\n"));
        out += "\nEvery number here is computed from `results.csv` beside this file.\n";
        out
    }

    /// One page without network, readable on a phone.
    pub fn html(&self) -> String {
        let text = |s: &str| s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, \
             initial-scale=1\">\n<title>{0}</title>\n<style>{STYLE}</style></head><body><main>\n<h1>{0}</h1>\n<ul>",
            text(&self.title)
        );
        self.facts.iter().for_each(|f| _ = write!(out, "<li>{}</li>", text(f)));
        out += "</ul>\n";
        self.warnings.iter().for_each(|w| _ = writeln!(out, "<p class=\"warning\">{}</p>", text(w)));
        let mut charts = self.charts.iter();
        for (i, t) in self.tables.iter().enumerate() {
            let _ = write!(out, "<h2>{}</h2>\n<div class=\"wide\"><table><thead><tr>", text(&t.title));
            t.head.iter().for_each(|h| _ = write!(out, "<th>{}</th>", text(h)));
            out += "</tr></thead><tbody>\n";
            for row in &t.rows {
                out += "<tr>";
                row.iter().for_each(|c| _ = write!(out, "<td>{}</td>", text(c)));
                out += "</tr>\n";
            }
            let _ = writeln!(out, "</tbody></table></div><p class=\"note\">{}</p>", text(&t.note));
            if i == 0 {
                charts
                    .by_ref()
                    .take(2)
                    .for_each(|(name, svg)| _ = writeln!(out, "<figure id=\"{name}\">{svg}</figure>"));
            }
        }
        out += "<h2>Pictures</h2>\n";
        charts.for_each(|(name, svg)| _ = writeln!(out, "<figure id=\"{name}\">{svg}</figure>"));
        out += "<p class=\"note\">Bands are 95 % intervals over seeds. Every number here is computed from results.csv beside this \
            file.</p>\n</main></body></html>\n";
        out
    }
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#222;background:#fff}main{max-width:820px;margin:0 auto;\
    padding:1rem}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;font-size:.9rem;\
    font-variant-numeric:tabular-nums}th,td{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #ddd;white-space:nowrap}\
    .wide{overflow-x:auto}.note{color:#555;font-size:.9rem}.warning{background:#fff3cd;border-left:4px solid #d90;padding:.5rem .8rem}\
    figure{margin:1rem 0;overflow-x:auto}svg{width:100%;min-width:600px;height:auto}";

fn measures(config: &crate::config::Config, rows: &Rows) -> Vec<Measure> {
    let mut out = Vec::new();
    let measure = |title: String, metric: &'static str, at: String, over_run: bool| Measure {
        title,
        split: "val",
        metric,
        at,
        loss: metric == "loss",
        over_run,
    };
    if config.task.is_some() {
        let mut lengths = rows.places("val", "accuracy");
        lengths.retain(|at| !at.contains(' '));
        for at in lengths {
            let title = format!("accuracy at {}", at.replace('=', " "));
            out.push(measure(title, "accuracy", at, false));
        }
        let t = config.data.seq_len;
        out.push(measure(
            format!("accuracy at length {t}, mean over the run"),
            "accuracy",
            format!("length={t}"),
            true,
        ));
    }
    let text = config.reads_text();
    let loss = if text { "validation loss (nats a token)" } else { "loss of the answers (nats)" };
    out.push(measure(loss.into(), "loss", String::new(), false));
    if text {
        out.push(measure(format!("{loss}, mean over the run"), "loss", String::new(), true));
    }
    out
}

fn summary(arms: &[&str], rows: &Rows, measures: &[Measure]) -> Table {
    let mut head = strings(["arm", "seeds"]);
    head.extend(measures.iter().map(|m| m.title.clone()));
    let row = |arm: &&str| {
        let count = rows.of("run", "finished", "").filter(|r| r.arm == *arm).count();
        let mut cells = vec![arm.to_string(), count.to_string()];
        let estimate = |m: &Measure| Estimate::of(&values(&m.values(rows, arm)));
        cells.extend(measures.iter().map(|m| plus_minus(&estimate(m))));
        cells
    };
    Table {
        title: "At the end".into(),
        note: "Mean over finished seeds ± half the 95 % interval. \"Mean over the run\" averages all validations of a seed first: how \
            fast it was learned."
            .into(),
        head,
        rows: arms.iter().map(row).collect(),
    }
}

fn differences(arms: &[&str], plan: &Plan, rows: &Rows, m: &Measure) -> Table {
    let row = |arm: &&str| {
        let base = m.values(rows, plan.baseline_of(arm));
        let e = Estimate::of(&paired(&m.values(rows, arm), &base));
        let (low, high) = e.interval();
        let words = match (e.verdict(), m.loss) {
            (Verdict::TooFew, _) => "too few seeds",
            (Verdict::Tie, _) => "tie",
            (Verdict::Higher, false) | (Verdict::Lower, true) => "better",
            _ => "worse",
        };
        let number = |x: f64| if x.is_finite() { trimmed(x) } else { "-".into() };
        vec![
            arm.to_string(),
            plan.baseline_of(arm).to_string(),
            e.n.to_string(),
            if e.n == 0 { "-".into() } else { trimmed(e.mean) },
            if e.n < 2 { "-".into() } else { format!("{} to {}", trimmed(low), trimmed(high)) },
            words.into(),
            number(e.detectable()),
        ]
    };
    Table {
        title: format!("Paired differences: {}", m.title),
        note: "Paired by seed. An interval that contains zero is a tie. The last column is the smallest true difference that this \
            many seeds find with a probability of 80 %."
            .into(),
        head: strings(["arm", "against", "pairs", "difference", "95 % interval", "reading", "could have shown"]),
        rows: arms.iter().filter(|a| **a != plan.baseline_of(a)).map(row).collect(),
    }
}

fn budget(plan: &Plan, rows: &Rows) -> Table {
    let row = |(arm, config): &(String, crate::config::Config)| {
        let mean = |split: &str, metric: &str| Estimate::of(&values(&rows.last(arm, split, metric, "")));
        let params = dash_model::parameters(&config.model, config.data.vocab_size);
        vec![
            arm.clone(),
            params.map_or("too many to count".into(), |n| n.to_string()),
            plus_minus(&mean("val", "attended_tokens")),
            plus_minus(&mean("val", "density")),
            plus_minus(&mean("train", "flops_per_token")),
        ]
    };
    Table {
        title: "Budget".into(),
        note: "Attended tokens: mean number of keys of a query at the last validation, all branches together, averaged over layers, \
            key/value heads and queries; dense (t + 1) / 2. Density: attended chunks / visible chunks. FLOPs a token, forward and \
            backward, at the last update: 6 x matrix elements + 12 h d x layers x attended tokens + 2 h d x layers x scored chunks or \
            windows."
            .into(),
        head: strings(["arm", "parameters", "attended tokens", "density", "FLOPs a token"]),
        rows: plan.arms.iter().map(row).collect(),
    }
}

/// The first validation that shows that a seed left the plateau.
fn left_at(config: &crate::config::Config, rows: &Rows, arm: &str, seed: u64) -> Option<u64> {
    let own = |r: &&Row| r.arm == arm && r.seed == seed;
    let length = format!("length={}", config.data.seq_len);
    if config.task.is_some() {
        return rows.of("val", "accuracy", &length).filter(own).find(|r| r.value >= LEFT).map(|r| r.step);
    }
    let unigram = rows.of("val", "unigram_loss", "").find(own)?.value;
    rows.of("val", "loss", "").filter(own).find(|r| r.value <= LEFT_TEXT * unigram).map(|r| r.step)
}

fn plateau(config: &crate::config::Config, arms: &[&str], rows: &Rows) -> Table {
    let row = |arm: &&str| {
        let seeds: Vec<u64> = rows.of("run", "finished", "").filter(|r| r.arm == *arm).map(|r| r.seed).collect();
        let mut steps: Vec<u64> = seeds.iter().filter_map(|&s| left_at(config, rows, arm, s)).collect();
        steps.sort_unstable();
        let list = steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        vec![
            arm.to_string(),
            format!("{} of {}", steps.len(), seeds.len()),
            if list.is_empty() { "-".into() } else { list },
        ]
    };
    let what = match config.task {
        Some(_) => format!("an accuracy of {LEFT} at the training length"),
        None => format!("a validation loss of {LEFT_TEXT} times that of unigrams"),
    };
    Table {
        title: "Leaving the plateau".into(),
        note: format!("The first validation with {what}, seed by seed in order of step."),
        head: strings(["arm", "seeds that left", "at step"]),
        rows: arms.iter().map(row).collect(),
    }
}

fn faults(arms: &[&str], rows: &Rows) -> Table {
    let mut lengths = rows.places("val", "accuracy");
    lengths.retain(|at| !at.contains(' '));
    let mut out = Vec::new();
    for at in &lengths {
        for arm in arms {
            let cell = |metric: &str| plus_minus(&Estimate::of(&values(&rows.last(arm, "val", metric, at))));
            let mut row = vec![at.replace('=', " "), arm.to_string()];
            row.extend(["accuracy", "router_missed", "reader_missed", "unseen"].map(cell));
            out.push(row);
        }
    }
    Table {
        title: "Whose fault".into(),
        note: "Shares of all questions. Router missed: wrong, and no layer attended the chunk that holds the answer when it was asked. \
            Reader missed: wrong although some layer did. Unseen: no layer did, right or wrong."
            .into(),
        head: strings(["length", "arm", "right", "router missed", "reader missed", "unseen"]),
        rows: out,
    }
}

/// Figures of the probes that the gradient table shows.
const PROBED: [(&str, &str); 7] = [
    ("score_grad_norm", "norm of dL/ds"),
    ("router_share_q", "share of dL/dq"),
    ("router_share_k", "share of dL/dk"),
    ("cosine_q", "cosine, q"),
    ("pairs_with_gradient", "pairs with gradient"),
    ("dead_chunks", "dead chunks"),
    ("captured_mass", "captured mass"),
];

fn gradients(arms: &[&str], rows: &Rows) -> Table {
    let mut out = Vec::new();
    for at in rows.places("probe", "router_share_q") {
        for arm in arms {
            let e = |metric: &str| Estimate::of(&values(&rows.last(arm, "probe", metric, &at)));
            if e("captured_mass").n == 0 {
                continue;
            }
            let cell = |(metric, _): &(&str, &str)| if e(metric).n == 0 { "-".into() } else { plus_minus(&e(metric)) };
            let mut row = vec![at.replace('=', " "), arm.to_string()];
            row.extend(PROBED.iter().map(cell));
            out.push(row);
        }
    }
    let mut head = strings(["layer", "arm"]);
    head.extend(PROBED.iter().map(|(_, name)| name.to_string()));
    Table {
        title: "Gradient through the router, last probe".into(),
        note: "Share: |through the router| / (|through the router| + |through the tokens|). Cosine between the two. Pairs with gradient: \
            share of the visible (query, earlier chunk) pairs whose score has one. Dead chunks: share of chunks that no later query \
            chose. Captured mass: share of dense attention's probability that lies in the chosen chunks."
            .into(),
        head,
        rows: out,
    }
}

/// Where a band may go: shares stay between 0 and 1, losses and norms above 0.
fn within(metric: &str, x: f64) -> f64 {
    let share = ["accuracy", "router_missed", "density", "router_share_q"].contains(&metric);
    if share { x.clamp(0.0, 1.0) } else { x.max(0.0) }
}

/// Curves of a figure, one line an arm, with bands.
fn curves(arms: &[&str], rows: &Rows, split: &str, metric: &str, at: &str) -> Vec<Line> {
    let line = |(color, arm): (usize, &&str)| {
        let point = |(step, v): (u64, Vec<f64>)| {
            let e = Estimate::of(&v);
            (step as f64, e.mean, within(metric, e.mean - e.half), within(metric, e.mean + e.half))
        };
        let points = rows.curve(arm, split, metric, at).into_iter().map(point).collect();
        Line { name: arm.to_string(), color, points }
    };
    arms.iter().enumerate().map(line).filter(|l| !l.points.is_empty()).collect()
}

/// The last value of a figure over places with a number in them, one line an arm.
fn profile(arms: &[&str], rows: &Rows, metric: &str, places: &[(f64, String)]) -> Vec<Line> {
    let line = |(color, arm): (usize, &&str)| {
        let point = |(x, at): &(f64, String)| {
            let e = Estimate::of(&values(&rows.last(arm, "val", metric, at)));
            (*x, e.mean, within(metric, e.mean - e.half), within(metric, e.mean + e.half))
        };
        let points = places.iter().map(point).filter(|p| p.1.is_finite()).collect();
        Line { name: arm.to_string(), color, points }
    };
    arms.iter().enumerate().map(line).filter(|l| !l.points.is_empty()).collect()
}

fn charts(config: &crate::config::Config, arms: &[&str], rows: &Rows) -> Result<Vec<(String, String)>> {
    let mut out: Vec<(String, String)> = Vec::new();
    let mut draw = |name: String, title: &str, x: &str, y: &str, lines: Vec<Line>, style: Style| -> Result<()> {
        if let Some(svg) = chart(title, x, y, &lines, style)? {
            out.push((name, svg));
        }
        Ok(())
    };
    let plain = Style::default();
    let length = format!("length={}", config.data.seq_len);
    if config.task.is_some() {
        let lines = curves(arms, rows, "val", "accuracy", &length);
        draw("accuracy".into(), "accuracy at the training length", "step", "accuracy", lines, plain)?;
    }
    let lines = curves(arms, rows, "val", "loss", "");
    draw("loss".into(), "validation loss", "step", "nats", lines, plain)?;
    draw("training-loss".into(), "training loss", "step", "nats", curves(arms, rows, "train", "loss", ""), plain)?;
    let layers: Vec<String> = rows.places("val", "density").into_iter().filter(|at| at.starts_with("layer=")).collect();
    for at in layers {
        let title = format!("density of {}", at.replace('=', " "));
        let lines = curves(arms, rows, "val", "density", &at);
        draw(at.replace("layer=", "density-layer"), &title, "step", "attended / visible chunks", lines, plain)?;
    }
    let probed = |metric: &str| rows.places("probe", metric);
    for at in probed("router_share_q") {
        let layer = at.replace('=', " ");
        let lines = curves(arms, rows, "probe", "router_share_q", &at);
        let title = format!("share of dL/dq through the router, {layer}");
        draw(at.replace("layer=", "share-layer"), &title, "step", "share", lines, plain)?;
    }
    for at in probed("router_share_q") {
        // bins of u = p^(alpha - 1): 1, 1/2, 1/4, ...; a mean over all probes, because a solved task has no gradient left
        let bins: Vec<f64> = (0..8).map(|i| 0.5f64.powi(i)).rev().collect();
        let line = |(color, arm): (usize, &&str)| {
            let point = |&u: &f64| {
                let metric = format!("edge_u<={u}");
                let e = Estimate::of(&values(&rows.mean(arm, "probe", &metric, &at)));
                (u, e.mean, e.mean - e.half, e.mean + e.half)
            };
            Line { name: arm.to_string(), color, points: bins.iter().map(point).collect() }
        };
        let lines = arms.iter().enumerate().map(line).filter(|l| l.points.iter().any(|p| p.1 > 0.0)).collect();
        let style = Style { log_x: true, log_y: true, ..plain };
        let title = format!("score gradient by distance to the support edge, {}", at.replace('=', " "));
        draw(at.replace("layer=", "edge-layer"), &title, "u at most", "mean |dL/ds|", lines, style)?;
    }
    if config.task.is_some() {
        let number = |at: &str, key: &str| at.rsplit(key).next().and_then(|n| n.parse::<f64>().ok());
        let all = rows.places("val", "accuracy");
        let lengths: Vec<(f64, String)> = all
            .iter()
            .filter(|at| !at.contains(' '))
            .filter_map(|at| Some((number(at, "length=")?, at.clone())))
            .collect();
        if lengths.len() > 1 {
            let lines = profile(arms, rows, "accuracy", &lengths);
            let style = Style { log_x: true, ..plain };
            draw("accuracy-by-length".into(), "accuracy by length", "tokens", "accuracy", lines, style)?;
        }
        for (length, own) in &lengths {
            let start = format!("{own} ");
            let mut places: Vec<(f64, String)> = all
                .iter()
                .filter(|at| at.starts_with(&start))
                .filter_map(|at| Some((number(at, "distance<")?, at.clone())))
                .collect();
            places.sort_by(|a, b| a.0.total_cmp(&b.0));
            let style = Style { log_x: true, ..plain };
            let title = format!("accuracy by distance at length {length}");
            let lines = profile(arms, rows, "accuracy", &places);
            draw(format!("accuracy-by-distance-{length}"), &title, "distance below", "accuracy", lines, style)?;
            let title = format!("router missed by distance at length {length}");
            let lines = profile(arms, rows, "router_missed", &places);
            draw(format!("missed-by-distance-{length}"), &title, "distance below", "share", lines, style)?;
        }
    }
    let scatter = |(color, arm): (usize, &&str)| {
        let loss = rows.last(arm, "val", "loss", "");
        let tokens = rows.last(arm, "val", "attended_tokens", "");
        let points = loss.iter().zip(&tokens).map(|((_, l), (_, t))| (*t, *l, f64::NAN, f64::NAN)).collect();
        Line { name: arm.to_string(), color, points }
    };
    let lines = arms.iter().enumerate().map(scatter).collect();
    let style = Style { dots: true, ..plain };
    draw(
        "loss-by-budget".into(),
        "loss against attended tokens, a dot a seed",
        "attended tokens",
        "nats",
        lines,
        style,
    )?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const CONFIG: &str = "[run]\nsteps = 30\n[data]\nvocab_size = 40\nseq_len = 64\nbatch_size = 2\n[task]\nkind = \"recall\"\n\
        pairs = 4\n[optim]\nlr = 1e-3\n[model]\nlayers = 1\nwidth = 16\nheads = 2\nkv_heads = 1\nffn = 24\n\
        [model.attention]\nkind = \"dash\"\nchunk_size = 8\n";

    /// Accuracies by arm and seed, at two steps.
    fn rows(accuracies: &[(&str, &[f64])]) -> Rows {
        let mut all = Rows::default();
        for (arm, values) in accuracies {
            for (seed, &value) in values.iter().enumerate() {
                let mut push = |split: &str, metric: &str, at: &str, step: u64, value: f64| {
                    let (arm, split, metric, at) = (arm.to_string(), split.into(), metric.into(), at.into());
                    all.0.push(Row { arm, seed: seed as u64, step, split, metric, at, value });
                };
                push("val", "accuracy", "length=64", 10, 0.1);
                push("val", "accuracy", "length=64", 30, value);
                push("val", "accuracy", "length=64 distance<32", 30, value);
                push("val", "loss", "", 30, 1.0 - value);
                push("val", "attended_tokens", "", 30, 20.0);
                push("run", "finished", "", 30, 1.0);
            }
        }
        all
    }

    fn report(accuracies: &[(&str, &[f64])]) -> (Report, Rows) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, CONFIG).unwrap();
        let config = Config::load(&path, &[]).unwrap();
        let arms: Vec<(String, Config)> =
            accuracies.iter().map(|(name, _)| (name.to_string(), config.clone())).collect();
        let seeds = accuracies[0].1.len() as u64;
        let plan =
            Plan { arms, own_baselines: Vec::new(), seeds, baseline: accuracies[0].0.into(), out: dir.path().into() };
        let rows = rows(accuracies);
        // what a reader has: the rows as they come back from the file
        let read = Rows::from_csv(&rows.csv()).unwrap();
        assert_eq!(read, rows);
        (Report::new(&plan, &read, &[]).unwrap(), read)
    }

    fn cell(report: &Report, title: &str, arm: &str, column: &str) -> String {
        let table = report.tables.iter().find(|t| t.title.starts_with(title)).unwrap();
        let i = table.head.iter().position(|h| h == column).unwrap();
        table.rows.iter().find(|r| r[0] == arm).unwrap()[i].clone()
    }

    #[test]
    fn every_number_follows_from_the_csv() {
        let (r, _) = report(&[("a", &[0.2, 0.3, 0.4]), ("b", &[0.6, 0.8, 0.7]), ("c", &[0.1, 0.5, 0.3])]);
        // b: mean 0.7, deviation 0.1, t(0.975, 2) = 4.30265, half 0.248
        assert_eq!(cell(&r, "At the end", "b", "accuracy at length 64"), "0.7 ± 0.2484");
        // differences 0.4, 0.5, 0.3 and -0.1, 0.2, -0.1
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "difference"), "0.4");
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "95 % interval"), "0.1516 to 0.6484");
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "reading"), "better");
        assert_eq!(cell(&r, "Paired differences: accuracy", "c", "reading"), "tie");
        assert_eq!(cell(&r, "Paired differences: loss", "b", "reading"), "better");
        assert_eq!(cell(&r, "Leaving the plateau", "b", "seeds that left"), "3 of 3");
        assert_eq!(cell(&r, "Leaving the plateau", "c", "seeds that left"), "1 of 3");
        let (page, text) = (r.html(), r.markdown());
        for number in ["0.7 ± 0.2484", "0.1516 to 0.6484"] {
            assert!(page.contains(number) && text.contains(number));
        }
        assert!(page.contains("<svg") && !page.replace("http://www.w3.org/2000/svg", "").contains("http"));
        assert!(!page.contains("<script") && !page.contains("href="), "a page of its own");
    }

    #[test]
    fn two_seeds_declare_no_winner() {
        let (r, _) = report(&[("a", &[0.2, 0.2]), ("b", &[0.9, 0.9001])]);
        assert_eq!(cell(&r, "Paired differences: accuracy", "b", "reading"), "too few seeds");
        assert!(r.markdown().contains("Fewer than 3 seeds"));
    }
}
