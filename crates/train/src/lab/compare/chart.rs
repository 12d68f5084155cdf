//! Charts as SVG text, with bands, for reports that need no network and no font.

use anyhow::anyhow;
use plotters::prelude::*;

/// A line: points (x, mean, low, high); the band is drawn where low < high.
pub struct Line {
    /// Legend.
    pub name: String,
    /// Number of its colour, the same in every chart of a report.
    pub color: usize,
    /// Points, ascending in x.
    pub points: Vec<(f64, f64, f64, f64)>,
}

/// What a chart looks like.
#[derive(Clone, Copy, Default)]
pub struct Style {
    /// Logarithmic x.
    pub log_x: bool,
    /// Logarithmic y: values are drawn as powers of ten, those that are not positive not at all.
    pub log_y: bool,
    /// Points instead of lines.
    pub dots: bool,
}

/// Colours that stay apart in print and for most colour-blind readers (Okabe and Ito).
const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
    RGBColor(170, 60, 60),
];

/// Draws a chart; `None` when no line has a finite point.
///
/// # Errors
/// When the drawing library refuses.
pub fn chart(title: &str, x: &str, y: &str, lines: &[Line], style: Style) -> anyhow::Result<Option<String>> {
    if style.log_y {
        let power = |v: f64| if v > 0.0 { v.log10() } else { f64::NAN };
        let line = |l: &Line| Line {
            name: l.name.clone(),
            color: l.color,
            points: l.points.iter().map(|p| (p.0, power(p.1), power(p.2), power(p.3))).collect(),
        };
        let lines: Vec<Line> = lines.iter().map(line).collect();
        return chart(title, x, &format!("{y}, power of ten"), &lines, Style { log_y: false, ..style });
    }
    let all: Vec<_> = lines.iter().flat_map(|l| &l.points).filter(|p| p.1.is_finite()).collect();
    let Some(first) = all.first() else { return Ok(None) };
    let at = |v: f64| if style.log_x { v.max(1e-12).log2() } else { v };
    let (mut left, mut right) = (at(first.0), at(first.0));
    let (mut low, mut high) = (first.1, first.1);
    for p in &all {
        (left, right) = (left.min(at(p.0)), right.max(at(p.0)));
        for v in [p.1, p.2, p.3].into_iter().filter(|v| v.is_finite()) {
            (low, high) = (low.min(v), high.max(v));
        }
    }
    let margin = ((high - low) * 0.06).max(1e-3 * high.abs()).max(1e-9);
    let side = ((right - left) * 0.02).max(1e-6);
    let mut svg = String::new();
    {
        let failed = |e: &dyn std::fmt::Display| anyhow!("chart {title}: {e}");
        let whole = SVGBackend::with_string(&mut svg, (860, 420)).into_drawing_area();
        whole.fill(&WHITE).map_err(|e| failed(&e))?;
        let (area, legend) = whole.split_horizontally(720);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(38)
            .y_label_area_size(64)
            .build_cartesian_2d(left - side..right + side, low - margin..high + margin)
            .map_err(|e| failed(&e))?;
        let log = style.log_x;
        let label = |v: &f64| if log { trimmed(v.exp2()) } else { trimmed(*v) };
        chart
            .configure_mesh()
            .x_desc(x)
            .y_desc(y)
            .x_label_formatter(&label)
            .y_label_formatter(&|v| trimmed(*v))
            .light_line_style(WHITE)
            .draw()
            .map_err(|e| failed(&e))?;
        for (i, line) in lines.iter().enumerate() {
            let color = COLORS[line.color % COLORS.len()];
            let points: Vec<_> = line.points.iter().filter(|p| p.1.is_finite()).collect();
            let band: Vec<_> = points.iter().filter(|p| p.2.is_finite() && p.2 < p.3).collect();
            // a dozen bands over each other show nothing; the tables have the intervals
            if band.len() > 1 && lines.len() <= COLORS.len() {
                let lower = band.iter().map(|p| (at(p.0), p.2));
                let upper = band.iter().rev().map(|p| (at(p.0), p.3));
                let shape = Polygon::new(lower.chain(upper).collect::<Vec<_>>(), color.mix(0.12).filled());
                chart.draw_series([shape]).map_err(|e| failed(&e))?;
            }
            // the second round of colours has dots on its lines
            let second = line.color >= COLORS.len();
            if style.dots || second || points.len() == 1 {
                let dots = points.iter().map(|p| Circle::new((at(p.0), p.1), 4, color.filled()));
                chart.draw_series(dots).map_err(|e| failed(&e))?;
            }
            let path = if style.dots { Vec::new() } else { points.iter().map(|p| (at(p.0), p.1)).collect() };
            chart.draw_series(LineSeries::new(path, color.stroke_width(2))).map_err(|e| failed(&e))?;
            // beside the plot, where it hides nothing
            let y = 60 + 18 * i as i32;
            legend.draw(&Rectangle::new([(4, y), (16, y + 8)], color.filled())).map_err(|e| failed(&e))?;
            if second {
                legend.draw(&Circle::new((10, y + 4), 2, WHITE.filled())).map_err(|e| failed(&e))?;
            }
            let text = Text::new(line.name.clone(), (22, y - 2), ("sans-serif", 13));
            legend.draw(&text).map_err(|e| failed(&e))?;
        }
        whole.present().map_err(|e| failed(&e))?;
    }
    Ok(Some(svg))
}

/// A number with four digits that matter.
pub fn trimmed(v: f64) -> String {
    if v == 0.0 {
        return "0".into();
    }
    let size = v.abs();
    if !(1e-3..1e6).contains(&size) {
        return format!("{v:.2e}");
    }
    let decimals = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{v:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}
