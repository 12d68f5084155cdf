//! `bench`: how fast a step, every op, or one block against dfdx.

use clap::Args;

use super::config_args::ConfigArgs;
use crate::failure::Result;
use crate::lab::{bench, bench_ops};

/// Arguments.
#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Steps to take the median of
    #[arg(long, default_value_t = 10, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub steps: usize,
    /// Time every op and attention variant against the machine's measured limits instead of whole steps
    #[arg(long)]
    pub ops: bool,
    /// Time one decoder block against dfdx in this process instead of whole steps
    #[arg(long, conflicts_with = "ops")]
    pub peers: bool,
    /// Take a step for every line on standard input and print its milliseconds, for timing in turn with another program
    #[arg(long, conflicts_with_all = ["ops", "peers", "steps", "json"])]
    pub in_turn: bool,
    /// With --ops: choose gamma so that this share of the visible chunks is attended
    #[arg(long, requires = "ops")]
    pub density: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a step fails or the request is wrong.
pub fn run(args: &BenchArgs) -> Result<()> {
    let (config, steps) = (args.config.load()?, args.steps);
    match (args.ops, args.peers, args.in_turn) {
        (true, ..) => bench_ops::ops(&config, steps, args.density, args.json),
        (_, true, _) => bench::peers(&config, steps, args.json),
        (.., true) => bench::steps_in_turn(&bench::timed(config)),
        _ => bench::step_speed(&bench::timed(config), steps, args.json),
    }
}
