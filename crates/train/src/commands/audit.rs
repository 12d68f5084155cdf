//! `audit`: the gradients against finite differences and an independent autodiff.

use clap::Args;

use crate::failure::Result;
use crate::lab::audit::audit;

/// Arguments.
#[derive(Args)]
pub struct AuditArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a check misses.
pub fn run(args: &AuditArgs) -> Result<()> {
    audit(args.json)
}
