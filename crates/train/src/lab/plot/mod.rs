//! `plot`: pictures of runs and of what `eval --json` printed, as SVG files that need no font and no viewer but a browser.

mod evaluations;
mod picture;
mod runs;

pub use evaluations::plot_evaluations;
pub use runs::plot;
