//! Charts as SVG text, for reports that need no network and no font: the one way that this program draws.

mod axis;
mod drawn;
mod forest;
mod pairs;
mod svg;

pub use axis::{Axis, trimmed};
pub use drawn::Drawn;
pub use forest::{Forest, Row};
pub use pairs::{Pairs, Panel};
use svg::{Anchor, Picture, Sign, WIDTH, width_of};
pub use svg::{escape, style};

/// A point of a line. The band is drawn where low < high.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// Place.
    pub x: f64,
    /// Number.
    pub y: f64,
    /// Lower end of its interval; NaN where it has none.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Point {
    /// Without an interval.
    pub fn new(x: f64, y: f64) -> Self {
        Point { x, y, low: f64::NAN, high: f64::NAN }
    }
}

/// A line.
#[derive(Debug, Clone)]
pub struct Line {
    /// Legend.
    pub name: String,
    /// Number of its signs, the same in every chart of a report.
    pub series: usize,
    /// Whether it is a second figure of what another line of these signs shows: thin.
    pub thin: bool,
    /// Points, ascending in x.
    pub points: Vec<Point>,
    /// Single runs, thin behind the line.
    pub runs: Vec<Vec<(f64, f64)>>,
}

/// How points are joined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Join {
    /// By straight lines.
    #[default]
    Lines,
    /// Not at all.
    Dots,
}

/// What a chart looks like.
#[derive(Debug, Clone, Copy, Default)]
pub struct Style {
    /// Logarithmic x; the ticks stand at the points where there are few.
    pub log_x: bool,
    /// Logarithmic y; what is not positive is not drawn.
    pub log_y: bool,
    /// y from 0 to 1, whatever the values are.
    pub unit_y: bool,
    /// How points are joined.
    pub join: Join,
}

/// A chart before it is drawn.
#[derive(Debug, Clone)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// Name of the x axis.
    pub x: String,
    /// Name and unit of the y axis.
    pub y: String,
    /// Its lines.
    pub lines: Vec<Line>,
    /// Its look.
    pub style: Style,
}

/// Above this many lines bands and single runs over each other show nothing; the tables have the numbers.
const BANDS: usize = 4;

/// Where the plot stands in the picture.
struct Frame {
    x: Axis,
    y: Axis,
    left: f64,
    right: f64,
    bottom: f64,
}

impl Frame {
    fn at(&self, x: f64, y: f64) -> Option<(f64, f64)> {
        Some((self.x.at(x)?, self.y.at(y)?))
    }
}

impl Chart {
    /// Draws it; `None` when no line has a point to show.
    pub fn draw(&self) -> Option<Drawn> {
        let all = || self.lines.iter().flat_map(|l| &l.points).filter(|p| p.y.is_finite());
        let hide_bands = self.lines.len() > BANDS;
        let runs = self.lines.iter().flat_map(|l| &l.runs).flatten().filter(|_| !hide_bands);
        let shown = all().flat_map(|p| if hide_bands { [p.y, f64::NAN, f64::NAN] } else { [p.y, p.low, p.high] });
        let x = Axis::over(all().map(|p| p.x), self.style.log_x)?.padded(0.02);
        let mut shown: Vec<f64> = shown.chain(runs.map(|r| r.1)).collect();
        // an axis over nothing but zeros would tell a billionth
        if self.style.unit_y || (!self.style.log_y && shown.iter().all(|y| *y == 0.0 || y.is_nan())) {
            shown.extend([0.0, 1.0]);
        }
        let y = Axis::over(shown, self.style.log_y)?.padded(0.05);
        let places = legend(&self.lines);
        let rows = places.iter().map(|p| p.1 + 1).max().unwrap_or(0);
        let height = 306.0 + 17.0 * rows as f64;
        let mut picture = Picture::new(&self.title, height);
        let widest = y.ticks(5).iter().map(|t| width_of(&trimmed(*t))).fold(0.0, f64::max);
        let (left, right, top, bottom) = (widest + 16.0, WIDTH - 14.0, 46.0, 258.0);
        let frame = Frame { x: x.placed(left, right), y: y.placed(bottom, top), left, right, bottom };
        self.draw_axes(&mut picture, &frame);
        for line in &self.lines {
            self.draw_line(&mut picture, &frame, line);
        }
        for (line, (x, row)) in self.lines.iter().zip(places) {
            let (sign, y) = (Sign::of(line.series), 310.0 + 17.0 * row as f64);
            match self.style.join {
                Join::Dots => picture.dot((x + 12.0, y - 4.0), sign, 3.5),
                Join::Lines => picture.series(&[(x, y - 4.0), (x + 24.0, y - 4.0)], sign, line.thin),
            }
            picture.text((x + 29.0, y), Anchor::Start, "", &line.name);
        }
        Some(picture.into())
    }

    fn draw_axes(&self, picture: &mut Picture, f: &Frame) {
        for tick in f.y.ticks(5) {
            if let Some(y) = f.y.at(tick) {
                picture.path(&[(f.left, y), (f.right, y)], "g", "");
                picture.text((f.left - 6.0, y + 4.0), Anchor::End, "m", &trimmed(tick));
            }
        }
        picture.path(&[(f.left, f.bottom), (f.right, f.bottom)], "a", "");
        let mut free = f64::MIN;
        for tick in self.x_ticks(&f.x) {
            let (Some(x), text) = (f.x.at(tick), trimmed(tick)) else { continue };
            let half = width_of(&text) / 2.0;
            if x - half < free || x + half > WIDTH {
                continue;
            }
            free = x + half + 8.0;
            picture.path(&[(x, f.bottom), (x, f.bottom + 4.0)], "a", "");
            picture.text((x, f.bottom + 17.0), Anchor::Middle, "m", &text);
        }
        picture.text((10.0, 36.0), Anchor::Start, "m", &self.y);
        picture.text(((f.left + f.right) / 2.0, f.bottom + 32.0), Anchor::Middle, "m", &self.x);
    }

    /// Round numbers, or the points themselves where there is one, or few on a logarithmic axis.
    fn x_ticks(&self, x: &Axis) -> Vec<f64> {
        let mut own: Vec<f64> = self.lines.iter().flat_map(|l| &l.points).map(|p| p.x).collect();
        own.sort_by(f64::total_cmp);
        own.dedup();
        // between one number and itself there are none
        if own.len() == 1 || self.style.log_x && own.len() <= 10 { own } else { x.ticks(6) }
    }

    fn draw_line(&self, picture: &mut Picture, f: &Frame, line: &Line) {
        let sign = Sign::of(line.series);
        let points: Vec<&Point> = line.points.iter().filter(|p| f.at(p.x, p.y).is_some()).collect();
        let banded: Vec<_> = points.iter().filter(|p| p.low < p.high).collect();
        if banded.len() > 1 && self.lines.len() <= BANDS && self.style.join == Join::Lines {
            // below a logarithm's numbers the band goes to the edge
            let place =
                |p: &Point, y: f64| (f.x.at(p.x).unwrap_or(f.left), f.y.at(y).unwrap_or(f.bottom).min(f.bottom));
            let lower = banded.iter().map(|p| place(p, p.low));
            let upper = banded.iter().rev().map(|p| place(p, p.high));
            picture.area(&lower.chain(upper).collect::<Vec<_>>(), &sign.fill(), 0.14);
        }
        for run in line.runs.iter().filter(|_| self.lines.len() <= BANDS) {
            let path: Vec<(f64, f64)> = run.iter().filter_map(|&(x, y)| f.at(x, y)).collect();
            picture.path(&path, &sign.stroke(), "stroke-width=\"0.8\" stroke-opacity=\"0.5\"");
        }
        let path: Vec<(f64, f64)> = points.iter().filter_map(|p| f.at(p.x, p.y)).collect();
        if self.style.join == Join::Dots || path.len() == 1 {
            path.iter().for_each(|&p| picture.dot(p, sign, 3.0));
        } else {
            picture.series(&path, sign, line.thin);
        }
    }
}

/// Places of the legend's entries: x and row.
fn legend(lines: &[Line]) -> Vec<(f64, usize)> {
    let (mut x, mut row) = (10.0, 0);
    let place = |line: &Line| {
        let width = 29.0 + width_of(&line.name) + 16.0;
        if x > 10.0 && x + width > WIDTH {
            (x, row) = (10.0, row + 1);
        }
        let at = (x, row);
        x += width;
        at
    };
    lines.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: &[(f64, f64)], style: Style) -> Chart {
        let points = points.iter().map(|&(x, y)| Point::new(x, y)).collect();
        let lines = vec![Line { name: "a<b".into(), series: 0, thin: false, points, runs: Vec::new() }];
        Chart { title: "t".into(), x: "step".into(), y: "nats".into(), lines, style }
    }

    #[test]
    fn a_chart_without_numbers_is_none() {
        assert!(chart(&[(1.0, f64::NAN)], Style::default()).draw().is_none());
        assert!(chart(&[(1.0, -2.0)], Style { log_y: true, ..Style::default() }).draw().is_none());
    }

    #[test]
    fn an_axis_of_shares_goes_from_0_to_1_and_one_of_zeros_is_no_billionth() {
        let solved =
            chart(&[(1.0, 0.0), (2.0, 0.25)], Style { unit_y: true, ..Style::default() }).draw().unwrap().inline;
        let zeros = chart(&[(1.0, 0.0), (2.0, 0.0)], Style::default()).draw().unwrap().inline;
        for picture in [solved, zeros] {
            assert!(
                picture.contains(">0<")
                    && picture.contains(">1<")
                    && !picture.contains("e-9")
                    && !picture.contains("e-1"),
                "{picture}"
            );
        }
    }

    #[test]
    fn a_line_a_dot_and_a_legend_are_drawn() {
        let line = chart(&[(1.0, 2.0), (2.0, f64::NAN), (3.0, 4.0)], Style::default()).draw().unwrap();
        assert!(line.inline.contains("stroke-width=\"2\"") && line.inline.contains("a&lt;b"));
        assert!(!line.inline.contains("<style>") && line.file.contains("<style>") && !line.file.contains("NaN"));
        let one = chart(&[(30.0, 2.0)], Style::default()).draw().unwrap().inline;
        assert!(one.contains("<circle") && one.contains(">30<") && !one.contains(">29.9"), "{one}");
        let dots = chart(&[(1.0, 2.0), (2.0, 3.0)], Style { join: Join::Dots, ..Style::default() }).draw().unwrap();
        assert!(dots.inline.matches("<circle").count() == 3);
    }
}
