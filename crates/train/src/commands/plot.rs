//! `plot`: curves of runs, as SVG files.

use std::path::PathBuf;

use clap::Args;

use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::lab::plot::plot;

/// Arguments.
#[derive(Args)]
pub struct PlotArgs {
    /// Run folders
    #[arg(long, alias = "run", required = true, num_args = 1..)]
    pub model: Vec<PathBuf>,
    /// Folder to write
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When a record cannot be read or a picture cannot be written.
pub fn run(args: &PlotArgs) -> Result<()> {
    for path in plot(&args.model, &args.out).map_err(Failure::Request)? {
        print_line!("wrote {}", path.display())?;
    }
    Ok(())
}
