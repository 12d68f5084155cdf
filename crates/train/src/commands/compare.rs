//! `compare`: the same run for every arm and seed, one report.

use std::path::PathBuf;

use clap::Args;

use super::config_args::ConfigArgs;
use crate::console::print_line;
use crate::failure::Result;
use crate::lab::compare::{Jobs, Plan, compare, report_only};
use crate::signals::Interrupt;

/// Arguments.
#[derive(Args)]
pub struct CompareArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Arms of the configuration, or attention kinds
    #[arg(long, value_delimiter = ',')]
    pub arms: Vec<String>,
    /// Seeds of every arm
    #[arg(long)]
    pub seeds: Option<u64>,
    /// Arm that the others are compared with
    #[arg(long)]
    pub baseline: Option<String>,
    /// Folder of runs and report
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Runs at a time, of one thread each; 0: one a core
    #[arg(long, default_value_t = 0)]
    pub jobs: usize,
    /// Only write the report of the runs that are there
    #[arg(long)]
    pub report_only: bool,
    /// Start although memory or disk seem too small for the runs
    #[arg(long)]
    pub force: bool,
}

/// Runs the command.
///
/// # Errors
/// As [`compare`].
pub fn run(args: &CompareArgs) -> Result<()> {
    let (baseline, out) = (args.baseline.as_deref(), args.out.as_deref());
    let plan = Plan::load(&args.config.config, &args.config.set, &args.arms, args.seeds, baseline, out)?;
    if args.report_only {
        print_line!("{}", report_only(&plan)?.display())?;
        return Ok(());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = if args.jobs == 0 { cores } else { args.jobs };
    compare(&plan, Jobs { at_once: jobs, force: args.force }, Interrupt::install)
}
