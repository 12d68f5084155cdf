//! The command without a name: trains.

use clap::Args;

use super::config_args::OptionalConfig;
use crate::failure::{Failure, Result};
use crate::signals::Interrupt;
use crate::training::run::{Start, train};

/// Arguments.
#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    config: OptionalConfig,
    /// Continue from the newest whole checkpoint of the run
    #[arg(long)]
    resume: bool,
    /// With --resume: continue although the configuration or the data changed
    #[arg(long, requires = "resume")]
    allow_changes: bool,
}

/// Runs the command.
///
/// # Errors
/// As [`train`].
pub fn run(args: &TrainArgs) -> Result<()> {
    let needed = || Failure::request("--config FILE is needed, for example --config configs/small.toml");
    let config = args.config.load()?.ok_or_else(needed)?;
    train(&config, Start { resume: args.resume, allow_changes: args.allow_changes }, Interrupt::install)
}
