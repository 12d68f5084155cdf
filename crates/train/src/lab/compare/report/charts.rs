//! The pictures of a report.

use super::super::table::Rows;
use super::study::{Section, Study};
use crate::lab::chart::{Chart, Drawn, Join, Line, Point, Style};
use crate::lab::stats::Estimate;

/// Pictures in the making: names of files, and what is drawn.
struct Charts<'a> {
    arms: Vec<&'a str>,
    rows: &'a Rows,
    /// Whether runs stop when they are solved.
    stops: bool,
    out: Vec<(String, Drawn)>,
}

fn values(pairs: &[(u64, f64)]) -> Vec<f64> {
    pairs.iter().map(|p| p.1).collect()
}

/// Figures that are shares: all or nothing over seeds, so single runs are drawn and no band.
const SHARES: [&str; 4] = ["accuracy", "router_missed", "density", "router_share_q"];

/// A mean with the ends of its interval.
fn estimated(x: f64, values: &[f64]) -> Point {
    let e = Estimate::of(values);
    Point { x, y: e.mean, low: e.mean - e.half, high: e.mean + e.half }
}

/// As [`estimated`], without the interval for a share.
fn pointed(metric: &str, x: f64, values: &[f64]) -> Point {
    if SHARES.contains(&metric) { Point::new(x, Estimate::of(values).mean) } else { estimated(x, values) }
}

impl Charts<'_> {
    /// Draws a line for every arm that has points.
    fn draw(
        &mut self,
        name: &str,
        title: &str,
        (x, y): (&str, &str),
        style: Style,
        points: impl Fn(&str) -> Vec<Point>,
    ) {
        self.draw_runs(name, title, (x, y), style, points, |_| Vec::new());
    }

    /// The same with single runs behind the lines.
    fn draw_runs(
        &mut self,
        name: &str,
        title: &str,
        (x, y): (&str, &str),
        style: Style,
        points: impl Fn(&str) -> Vec<Point>,
        runs: impl Fn(&str) -> Vec<Vec<(f64, f64)>>,
    ) {
        let line = |(series, arm): (usize, &&str)| Line {
            name: arm.to_string(),
            series,
            thin: false,
            points: points(arm),
            runs: runs(arm),
        };
        let lines: Vec<Line> = self.arms.iter().enumerate().map(line).filter(|l| !l.points.is_empty()).collect();
        let chart = Chart { title: title.into(), x: x.into(), y: y.into(), lines, style };
        self.out.extend(chart.draw().map(|drawn| (name.to_string(), drawn)));
    }

    /// A figure over the updates.
    fn curves(&mut self, name: &str, title: &str, y: &str, (split, metric, at): (&str, &str, &str)) {
        let (rows, stops) = (self.rows, self.stops);
        let points = |arm: &str| {
            let curve = match stops {
                true => rows.held_curve(arm, split, metric, at),
                false => rows.curve(arm, split, metric, at),
            };
            curve.into_iter().map(|(step, v)| pointed(metric, step as f64, &v)).collect()
        };
        let runs = |arm: &str| {
            if SHARES.contains(&metric) { rows.curves(arm, split, metric, at) } else { Vec::new() }
        };
        self.draw_runs(name, title, ("update", y), Style::default(), points, runs);
    }

    /// The last value of a figure over places with a number in them.
    fn profile(&mut self, name: &str, title: &str, (x, y): (&str, &str), metric: &str, places: &[(f64, String)]) {
        let rows = self.rows;
        let style = Style { log_x: true, ..Style::default() };
        self.draw(name, title, (x, y), style, |arm| {
            let point = |(x, at): &(f64, String)| pointed(metric, *x, &values(&rows.last(arm, "val", metric, at)));
            places.iter().map(point).filter(|p| p.y.is_finite()).collect()
        });
    }

    fn densities(&mut self) {
        for at in self.rows.places("val", "density").into_iter().filter(|at| at.starts_with("layer=")) {
            let title = format!("density of {}", at.replace('=', " "));
            let name = at.replace("layer=", "density-layer");
            self.curves(&name, &title, "attended / visible chunks", ("val", "density", &at));
        }
    }

    fn gradients(&mut self) {
        let rows = self.rows;
        let layers = rows.places("probe", "router_share_q");
        for at in &layers {
            let title = format!("share of dL/dq through the router, {}", at.replace('=', " "));
            self.curves(&at.replace("layer=", "share-layer"), &title, "share", ("probe", "router_share_q", at));
        }
        // bins of u = p^(alpha - 1): 1, 1/2, 1/4, ...; a mean over all probes, because a solved task has no gradient left
        let bins: Vec<f64> = (0..8).map(|i| 0.5f64.powi(i)).rev().collect();
        let style = Style { log_x: true, log_y: true, ..Style::default() };
        for at in &layers {
            let title = format!("score gradient by distance to the support edge, {}", at.replace('=', " "));
            self.draw(&at.replace("layer=", "edge-layer"), &title, ("u at most", "mean |dL/ds|"), style, |arm| {
                let mean = |u: f64| values(&rows.mean(arm, "probe", &format!("edge_u<={u}"), at));
                let points: Vec<Point> = bins.iter().map(|&u| estimated(u, &mean(u))).collect();
                if points.iter().any(|p| p.y > 0.0) { points } else { Vec::new() }
            });
        }
    }

    /// Accuracy by length and by distance, and what the router missed.
    fn task(&mut self) {
        let number = |at: &str, key: &str| at.rsplit(key).next().and_then(|n| n.parse::<f64>().ok());
        let all = self.rows.places("val", "accuracy");
        let plain = all.iter().filter(|at| !at.contains(' '));
        let lengths: Vec<(f64, String)> = plain.filter_map(|at| Some((number(at, "length=")?, at.clone()))).collect();
        if lengths.len() > 1 {
            self.profile("accuracy-by-length", "accuracy by length", ("tokens", "accuracy"), "accuracy", &lengths);
        }
        for (length, own) in &lengths {
            let start = format!("{own} ");
            let bins = all.iter().filter(|at| at.starts_with(&start));
            let mut places: Vec<(f64, String)> =
                bins.filter_map(|at| Some((number(at, "distance<")?, at.clone()))).collect();
            places.sort_by(|a, b| a.0.total_cmp(&b.0));
            for (metric, short, what, y) in [
                ("accuracy", "accuracy", "accuracy", "accuracy"),
                ("router_missed", "missed", "router missed", "share"),
            ] {
                let title = format!("{what} by distance at length {length}");
                let name = format!("{short}-by-distance-{length}");
                self.profile(&name, &title, ("distance below", y), metric, &places);
            }
        }
    }

    fn budget(&mut self) {
        let rows = self.rows;
        let style = Style { join: Join::Dots, ..Style::default() };
        let axes = ("attended tokens", "nats");
        self.draw("loss-by-budget", "loss against attended tokens, a dot a seed", axes, style, |arm| {
            let (loss, tokens) = (rows.last(arm, "val", "loss", ""), rows.last(arm, "val", "attended_tokens", ""));
            loss.iter().zip(&tokens).map(|((_, l), (_, t))| Point::new(*t, *l)).collect()
        });
    }
}

/// Accuracy and loss over the updates.
pub fn learning(study: &Study) -> Vec<(String, Drawn)> {
    let mut charts = Charts {
        arms: study.plan.names(),
        rows: &study.results.finished,
        stops: study.plan.rules.stop_after.is_some(),
        out: Vec::new(),
    };
    if study.plan.base().task.is_some() {
        let length = format!("length={}", study.plan.base().data.seq_len);
        charts.curves("accuracy", "accuracy at the training length", "accuracy", ("val", "accuracy", &length));
    }
    charts.curves("loss", "validation loss", "nats", ("val", "loss", ""));
    charts.out
}

/// All other pictures.
pub fn others(study: &Study) -> Section {
    let mut charts = Charts {
        arms: study.plan.names(),
        rows: &study.results.finished,
        stops: study.plan.rules.stop_after.is_some(),
        out: Vec::new(),
    };
    charts.curves("training-loss", "training loss", "nats", ("train", "loss", ""));
    charts.curves("gamma", "gamma", "factor on the routing scores", ("train", "gamma", ""));
    charts.densities();
    charts.gradients();
    if study.plan.base().task.is_some() {
        charts.task();
    }
    charts.budget();
    let mut section = Section::new("Pictures");
    section.charts = charts.out;
    section
}
