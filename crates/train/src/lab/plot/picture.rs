//! One picture in one file.

use std::path::Path;

use anyhow::anyhow;

use crate::files::replace_file;
use crate::lab::chart::{Chart, Line, Style};

/// Writes one chart.
pub fn write(path: &Path, title: &str, (x, y): (&str, &str), style: Style, lines: Vec<Line>) -> anyhow::Result<()> {
    let chart = Chart { title: title.into(), x: x.into(), y: y.into(), lines, style };
    let drawn = chart.draw().ok_or_else(|| anyhow!("{}: there is no figure for it", path.display()))?;
    replace_file(path, drawn.file.as_bytes())
}
