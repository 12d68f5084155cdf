//! Paired values: a line a seed from the baseline to the arm, a panel an arm.

use super::axis::{Axis, trimmed};
use super::drawn::{Drawn, clipped};
use super::svg::{Anchor, Picture, Sign, WIDTH, width_of};

/// An arm beside its baseline.
#[derive(Debug, Clone)]
pub struct Panel {
    /// The baseline.
    pub left: String,
    /// The arm.
    pub right: String,
    /// (baseline, arm) of every seed.
    pub pairs: Vec<(f64, f64)>,
    /// Number of the arm's signs.
    pub series: usize,
}

/// A paired plot before it is drawn.
#[derive(Debug, Clone)]
pub struct Pairs {
    /// What it shows.
    pub title: String,
    /// What is measured.
    pub y: String,
    /// Its panels, on one scale.
    pub panels: Vec<Panel>,
}

const HEIGHT: f64 = 150.0;
const STRIDE: f64 = HEIGHT + 46.0;
const A_ROW: usize = 3;

impl Pairs {
    /// Draws it; `None` without a pair.
    pub fn draw(&self) -> Option<Drawn> {
        let all = self.panels.iter().flat_map(|p| &p.pairs).flat_map(|(a, b)| [*a, *b]);
        let axis = Axis::over(all, false)?.padded(0.06);
        let rows = self.panels.len().div_ceil(A_ROW);
        let mut picture = Picture::new(&self.title, 46.0 + STRIDE * rows as f64);
        picture.text((10.0, 36.0), Anchor::Start, "m", &self.y);
        let left = axis.ticks(4).iter().map(|t| width_of(&trimmed(*t))).fold(0.0, f64::max) + 16.0;
        let width = (WIDTH - left - 8.0) / A_ROW.min(self.panels.len()).max(2) as f64;
        for row in 0..rows {
            let top = 46.0 + STRIDE * row as f64;
            let axis = axis.placed(top + HEIGHT, top);
            for tick in axis.ticks(4) {
                if let Some(y) = axis.at(tick) {
                    picture.path(&[(left, y), (WIDTH - 8.0, y)], "g", "");
                    picture.text((left - 6.0, y + 4.0), Anchor::End, "m", &trimmed(tick));
                }
            }
            for (i, panel) in self.panels.iter().skip(row * A_ROW).take(A_ROW).enumerate() {
                panel.draw(&mut picture, &axis, (left + width * i as f64, width), top + HEIGHT);
            }
        }
        Some(picture.into())
    }
}

impl Panel {
    fn draw(&self, picture: &mut Picture, axis: &Axis, (x, width): (f64, f64), bottom: f64) {
        let sign = Sign::of(self.series);
        let (from, to) = (x + width * 0.22, x + width * 0.78);
        for (a, b) in &self.pairs {
            let (Some(a), Some(b)) = (axis.at(*a), axis.at(*b)) else { continue };
            picture.path(&[(from, a), (to, b)], &sign.stroke(), "stroke-width=\"1.2\" stroke-opacity=\"0.7\"");
            picture.dot((from, a), sign, 2.4);
            picture.dot((to, b), sign, 2.4);
        }
        let middle = x + width / 2.0;
        picture.text((middle, bottom + 17.0), Anchor::Middle, "m", &clipped(&self.left, width - 6.0));
        picture.text((middle, bottom + 32.0), Anchor::Middle, "", &clipped(&format!("→ {}", self.right), width - 6.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_a_line_with_two_ends() {
        let panel = Panel { left: "a".into(), right: "b".into(), pairs: vec![(0.1, 0.9), (0.2, 1.0)], series: 0 };
        let pairs = Pairs { title: "t".into(), y: "accuracy".into(), panels: vec![panel.clone(), panel] };
        let drawn = pairs.draw().unwrap().inline;
        assert_eq!((drawn.matches("stroke-opacity").count(), drawn.matches("<circle").count()), (4, 8));
        assert!(Pairs { panels: Vec::new(), ..pairs }.draw().is_none());
    }
}
