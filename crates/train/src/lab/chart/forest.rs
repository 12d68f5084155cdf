//! A forest plot: differences with their intervals, a row each, around zero.

use super::axis::{Axis, trimmed};
use super::drawn::{Drawn, clipped};
use super::svg::{Anchor, Picture, Sign, WIDTH, width_of};

/// A difference.
#[derive(Debug, Clone)]
pub struct Row {
    /// What differs from what.
    pub name: String,
    /// Number, interval and word.
    pub text: String,
    /// The mean difference.
    pub mean: f64,
    /// Ends of its interval, where it has one.
    pub interval: Option<(f64, f64)>,
    /// One dot a seed.
    pub dots: Vec<f64>,
    /// Number of its signs.
    pub series: usize,
}

/// A forest plot before it is drawn.
#[derive(Debug, Clone)]
pub struct Forest {
    /// What it shows.
    pub title: String,
    /// What the axis measures.
    pub axis: String,
    /// What lies on the left and on the right of zero.
    pub sides: (String, String),
    /// Differences up to this do not matter: a shaded band.
    pub margin: Option<f64>,
    /// Its rows.
    pub rows: Vec<Row>,
}

const ROW: f64 = 44.0;
const TOP: f64 = 44.0;
/// Height of a row's name and number, above its interval.
const WORDS: f64 = 19.0;

impl Forest {
    /// Draws it; `None` without a number to show.
    pub fn draw(&self) -> Option<Drawn> {
        let numbers = |r: &Row| {
            let ends = r.interval.map_or([f64::NAN; 2], |(low, high)| [low, high]);
            r.dots.iter().copied().chain(ends).chain([r.mean]).collect::<Vec<f64>>()
        };
        let all: Vec<f64> = self.rows.iter().flat_map(numbers).collect();
        all.iter().find(|x| x.is_finite())?;
        let margin = self.margin.unwrap_or(0.0);
        let axis = Axis::over(all.into_iter().chain([0.0, margin, -margin]), false)?.padded(0.04);
        let axis = axis.placed(14.0, WIDTH - 14.0);
        let bottom = TOP + ROW * self.rows.len() as f64;
        let mut picture = Picture::new(&self.title, bottom + 40.0);
        self.draw_axis(&mut picture, &axis, bottom);
        for (i, row) in self.rows.iter().enumerate() {
            draw_row(&mut picture, &axis, row, TOP + ROW * i as f64);
        }
        Some(picture.into())
    }

    fn draw_axis(&self, picture: &mut Picture, axis: &Axis, bottom: f64) {
        let at = |x: f64| axis.at(x).unwrap_or(0.0);
        if let Some(margin) = self.margin {
            let (left, right) = (at(-margin), at(margin));
            picture.bar((left, TOP - 6.0), (right - left, bottom - TOP + 6.0), "z");
        }
        // beside each row's words, not through them
        for i in 0..self.rows.len() {
            let top = TOP + ROW * i as f64;
            picture.path(&[(at(0.0), top + WORDS), (at(0.0), top + ROW)], "a", "");
        }
        // at the edges, where neither is cut, however near an edge zero lies
        let room = WIDTH / 2.0 - 20.0;
        picture.text((14.0, 36.0), Anchor::Start, "m", &clipped(&format!("← {}", self.sides.0), room));
        picture.text((WIDTH - 14.0, 36.0), Anchor::End, "m", &clipped(&format!("{} →", self.sides.1), room));
        picture.path(&[(14.0, bottom), (WIDTH - 14.0, bottom)], "a", "");
        for tick in axis.ticks(5) {
            picture.path(&[(at(tick), bottom), (at(tick), bottom + 4.0)], "a", "");
            picture.text((at(tick), bottom + 17.0), Anchor::Middle, "m", &trimmed(tick));
        }
        picture.text((WIDTH / 2.0, bottom + 33.0), Anchor::Middle, "m", &self.axis);
    }
}

fn draw_row(picture: &mut Picture, axis: &Axis, row: &Row, top: f64) {
    let (sign, y) = (Sign::of(row.series), top + 27.0);
    let room = WIDTH - 36.0 - width_of(&row.text);
    picture.text((14.0, top + 14.0), Anchor::Start, "", &clipped(&row.name, room));
    picture.text((WIDTH - 14.0, top + 14.0), Anchor::End, "", &row.text);
    if let Some((low, high)) = row.interval
        && let (Some(a), Some(b)) = (axis.at(low), axis.at(high))
    {
        picture.path(&[(a, y), (b, y)], &sign.stroke(), "stroke-width=\"2\"");
        for end in [a, b] {
            picture.path(&[(end, y - 4.0), (end, y + 4.0)], &sign.stroke(), "stroke-width=\"2\"");
        }
    }
    for x in row.dots.iter().filter_map(|d| axis.at(*d)) {
        picture.ring((x, y), sign);
    }
    if let Some(x) = axis.at(row.mean) {
        let corners = [(0.0, -6.0), (6.0, 0.0), (0.0, 6.0), (-6.0, 0.0)];
        picture.area(&corners.map(|(dx, dy)| (x + dx, y + dy)), &sign.fill(), 1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_an_interval_are_drawn_and_none_without_a_number() {
        let row = |mean| Row {
            name: "dash − dash-stopped".into(),
            text: "0.36, undecided".into(),
            mean,
            interval: None,
            dots: vec![0.1, 0.6],
            series: 0,
        };
        let forest = |mean: f64, dots: Vec<f64>| Forest {
            title: "t".into(),
            axis: "accuracy".into(),
            sides: ("worse".into(), "better".into()),
            margin: Some(0.05),
            rows: vec![Row { dots, ..row(mean) }],
        };
        let drawn = forest(0.35, vec![0.1, 0.6]).draw().unwrap();
        assert_eq!(drawn.inline.matches("<circle").count(), 2);
        assert!(drawn.inline.contains("class=\"z\"") && !drawn.inline.contains("NaN"));
        assert!(forest(f64::NAN, Vec::new()).draw().is_none());
        // zero at the edge of the axis cuts neither side's word, and its line begins below the row's words
        let far = forest(0.9, vec![0.8, 1.0]).draw().unwrap().inline;
        assert!(far.contains("← worse") && far.contains("better →"), "{far}");
        let zero = far.lines().find(|l| l.starts_with("<path class=\"a\"")).unwrap();
        assert!(zero.contains(&format!(" {}L", TOP + WORDS)), "{zero}");
    }
}
