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
    /// cpu, cuda or cuda:N. A GPU checks every op, the models and the solver with its kernels in f64
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// Runs the command.
///
/// # Errors
/// When there is no such device, or a check misses.
pub fn run(args: &AuditArgs) -> Result<()> {
    audit(&args.device, args.json)
}
