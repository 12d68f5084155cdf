//! Draws the rows `picture,line,x,y` of a CSV file as this program draws everything:
//! `cargo run -p train --example draw -- ROWS.csv PICTURE OUT.svg TITLE X Y [log]`. Rows of other pictures are left out; `log` is a logarithmic x.

use anyhow::{Context, anyhow, bail};
use train::lab::chart::{Chart, Line, Point, Style};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ([rows, picture, out, title, x, y] | [rows, picture, out, title, x, y, _]) = &args[..] else {
        bail!("usage: draw ROWS.csv PICTURE OUT.svg TITLE X Y [log]");
    };
    let text = std::fs::read_to_string(rows).with_context(|| rows.clone())?;
    let mut lines: Vec<Line> = Vec::new();
    for (i, row) in text.lines().enumerate() {
        let fields: Vec<&str> = row.split(',').collect();
        let [of, name, x, y] = fields[..] else { bail!("{rows}: line {}: not picture,line,x,y", i + 1) };
        if of != picture {
            continue;
        }
        let number = |n: &str| n.parse::<f64>().with_context(|| format!("{rows}: line {}: {n}", i + 1));
        let point = Point::new(number(x)?, number(y)?);
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line {
                name: name.into(),
                series: lines.len(),
                thin: false,
                points: vec![point],
                runs: Vec::new(),
            }),
        }
    }
    let style = Style { log_x: args.get(6).is_some_and(|word| word == "log"), ..Style::default() };
    let chart = Chart { title: title.clone(), x: x.clone(), y: y.clone(), lines, style };
    let drawn = chart.draw().ok_or_else(|| anyhow!("{rows}: no row of {picture}"))?;
    std::fs::write(out, drawn.file).with_context(|| out.clone())
}
