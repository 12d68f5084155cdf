//! SVG text: elements, colours that follow the reader's light or dark mode, and a second sign (dashes, shapes) beside each colour,
//! so that a picture is read in grey too.

use std::fmt::Write as _;

/// Width of every picture in its own units. A phone shows it at about that many pixels, so 12 units stay legible text.
pub const WIDTH: f64 = 420.0;

/// Colours that stay apart in print and for most colour-blind readers (Okabe and Ito, darker where white is behind them), in
/// light and in dark mode.
const COLORS: [(&str, &str); 8] = [
    ("#0072b2", "#56b4e9"),
    ("#c25400", "#ff8a3c"),
    ("#00805e", "#2fd0a2"),
    ("#b0568c", "#e79ac6"),
    ("#3f3f3f", "#d8d8d8"),
    ("#9a6a00", "#f0c04a"),
    ("#5b49b8", "#a99cff"),
    ("#a33030", "#ff8080"),
];

/// Dash patterns, the second sign of a line.
const DASHES: [&str; 8] = ["", "7 3", "2 2.5", "8 3 2 3", "12 4", "5 2 1 2 1 2", "1.5 4", "10 3 4 3"];

/// The style sheet of all pictures; a page with several has it once.
pub fn style() -> String {
    let mut out = String::from(
        ".pic text{font:12px system-ui,-apple-system,\"Segoe UI\",Roboto,\"DejaVu Sans\",sans-serif;fill:#222}\
         .pic .t{font-weight:600}.pic .m{fill:#5c5c5c}.pic .p{fill:#fff}.pic .g{stroke:#e2e2e2}.pic .a{stroke:#8a8a8a}\
         .pic .z{fill:#8a8a8a;fill-opacity:.16}",
    );
    for (i, (light, _)) in COLORS.iter().enumerate() {
        let _ = write!(out, ".pic .s{i}{{stroke:{light}}}.pic .f{i}{{fill:{light}}}");
    }
    out += "@media (prefers-color-scheme:dark){.pic text{fill:#e6e6e6}.pic .m{fill:#a8a8a8}.pic .p{fill:#161616}\
        .pic .g{stroke:#333}.pic .a{stroke:#8a8a8a}";
    for (i, (_, dark)) in COLORS.iter().enumerate() {
        let _ = write!(out, ".pic .s{i}{{stroke:{dark}}}.pic .f{i}{{fill:{dark}}}");
    }
    out + "}"
}

/// The signs of a series: colour and dashes. Series from the ninth on repeat colours with other dashes.
#[derive(Debug, Clone, Copy)]
pub struct Sign {
    color: usize,
    dash: usize,
}

impl Sign {
    /// Of the series with this number.
    pub fn of(series: usize) -> Self {
        let n = COLORS.len();
        Sign { color: series % n, dash: (series % n + series / n) % n }
    }

    /// Class that strokes.
    pub fn stroke(self) -> String {
        format!("s{}", self.color)
    }

    /// Class that fills.
    pub fn fill(self) -> String {
        format!("f{}", self.color)
    }
}

/// Where text stands from its point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// To the right of it.
    Start,
    /// On both sides.
    Middle,
    /// To the left of it.
    End,
}

/// Width of a text in units, estimated: no font is at hand.
pub fn width_of(text: &str) -> f64 {
    text.chars().map(|c| if "iljt.,:;'|()[] -".contains(c) { 4.0 } else { 6.9 }).sum()
}

/// Text as it stands in XML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A point of a path, short.
fn point((x, y): (f64, f64)) -> String {
    format!("{} {}", short(x), short(y))
}

fn short(x: f64) -> String {
    let text = format!("{x:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_string)
}

/// A picture in the making.
pub struct Picture {
    body: String,
    height: f64,
    title: String,
}

impl Picture {
    /// An empty one of this height; the title is also what a screen reader says.
    pub fn new(title: &str, height: f64) -> Self {
        let mut picture = Picture { body: String::new(), height, title: title.into() };
        picture.text((10.0, 18.0), Anchor::Start, "t", title);
        picture
    }

    /// Text with a class: `t` title, `m` muted.
    pub fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let _ =
            writeln!(self.body, "<text x=\"{}\" y=\"{}\"{anchor}{class}>{}</text>", short(x), short(y), escape(text));
    }

    /// A line through points: `more` are attributes beside the class.
    pub fn path(&mut self, points: &[(f64, f64)], class: &str, more: &str) {
        if points.len() < 2 {
            return;
        }
        let all: Vec<String> = points.iter().map(|&p| point(p)).collect();
        let _ = writeln!(self.body, "<path class=\"{class}\" fill=\"none\" d=\"M{}\" {more}/>", all.join("L"));
    }

    /// The line of a series, with its dashes.
    pub fn series(&mut self, points: &[(f64, f64)], sign: Sign, thin: bool) {
        let dash = match DASHES[sign.dash] {
            "" => String::new(),
            dash => format!("stroke-dasharray=\"{dash}\" "),
        };
        let width = if thin { "0.9" } else { "2" };
        self.path(points, &sign.stroke(), &format!("stroke-width=\"{width}\" stroke-linejoin=\"round\" {dash}"));
    }

    /// A filled outline.
    pub fn area(&mut self, points: &[(f64, f64)], class: &str, opacity: f64) {
        let all: Vec<String> = points.iter().map(|&p| point(p)).collect();
        let _ = writeln!(self.body, "<path class=\"{class}\" fill-opacity=\"{opacity}\" d=\"M{}Z\"/>", all.join("L"));
    }

    /// A rectangle.
    pub fn bar(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), class: &str) {
        let (x, y, w, h) = (short(x), short(y), short(w), short(h));
        let _ = writeln!(self.body, "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\"/>");
    }

    /// A hollow dot of a series.
    pub fn ring(&mut self, (x, y): (f64, f64), sign: Sign) {
        let (class, x, y) = (sign.stroke(), short(x), short(y));
        let _ = writeln!(
            self.body,
            "<circle class=\"{class}\" fill=\"none\" stroke-opacity=\"0.65\" cx=\"{x}\" cy=\"{y}\" r=\"2.6\"/>"
        );
    }

    /// A dot of a series: the shape is its second sign.
    pub fn dot(&mut self, (x, y): (f64, f64), sign: Sign, size: f64) {
        let (class, r) = (sign.fill(), size);
        let corners: &[(f64, f64)] = match sign.dash % 4 {
            1 => &[(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
            2 => &[(0.0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
            3 => &[(0.0, -1.4), (1.4, 0.0), (0.0, 1.4), (-1.4, 0.0)],
            _ => &[],
        };
        if corners.is_empty() {
            let _ =
                writeln!(self.body, "<circle class=\"{class}\" cx=\"{}\" cy=\"{}\" r=\"{r}\"/>", short(x), short(y));
        } else {
            let points: Vec<_> = corners.iter().map(|(dx, dy)| (x + r * dx, y + r * dy)).collect();
            self.area(&points, &class, 1.0);
        }
    }

    /// The picture as text: for a page, whose style sheet has [`style`].
    pub fn inline(&self) -> String {
        self.framed("")
    }

    fn framed(&self, style: &str) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"pic\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {}\">\n{style}\
             <rect class=\"p\" width=\"{WIDTH}\" height=\"{}\"/>\n{}</svg>\n",
            escape(&self.title),
            short(self.height),
            short(self.height),
            self.body
        )
    }

    /// The picture as a file of its own, at twice its units.
    pub fn file(&self) -> String {
        let sized = format!("<svg width=\"{}\" height=\"{}\" ", 2.0 * WIDTH, short(2.0 * self.height));
        self.framed(&format!("<style>{}</style>\n", style())).replacen("<svg ", &sized, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_series_have_sixteen_signs() {
        let signs: std::collections::BTreeSet<(usize, usize)> =
            (0..16).map(|i| (Sign::of(i).color, Sign::of(i).dash)).collect();
        assert_eq!(signs.len(), 16);
    }

    #[test]
    fn what_a_name_holds_is_no_markup() {
        let picture = Picture::new("a < b & \"c\"", 50.0).file();
        assert!(picture.contains("a &lt; b &amp; &quot;c&quot;") && !picture.contains("a < b"));
        assert!(picture.contains("prefers-color-scheme:dark"));
    }
}
