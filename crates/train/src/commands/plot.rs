//! `plot`: curves of runs and of evaluations, as SVG files.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::lab::plot::{plot, plot_evaluations};

/// Arguments.
#[derive(Args)]
pub struct PlotArgs {
    /// Run folders
    #[arg(long, alias = "run", num_args = 1..)]
    pub model: Vec<PathBuf>,
    /// Files of what `eval --json` printed: loss by position, accuracy and the router's recall by length
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub eval: Vec<PathBuf>,
    /// Folder to write
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When a record cannot be read or a picture cannot be written.
pub fn run(args: &PlotArgs) -> Result<()> {
    if args.model.is_empty() && args.eval.is_empty() {
        return Err(Failure::request(
            "nothing to draw: give runs (--model DIR...), what `eval --json` printed (--eval FILE...), or both",
        ));
    }
    let (out, mut written) = (&args.out, Vec::new());
    std::fs::create_dir_all(out)
        .with_context(|| format!("{} cannot be created", out.display()))
        .map_err(Failure::Request)?;
    if !args.model.is_empty() {
        written.extend(plot(&args.model, out).map_err(Failure::Request)?);
    }
    if !args.eval.is_empty() {
        written.extend(plot_evaluations(&args.eval, out).map_err(Failure::Request)?);
    }
    for path in written {
        print_line!("wrote {}", path.display())?;
    }
    Ok(())
}
