//! `compare`: the same run for every arm and seed, one report.

use std::path::PathBuf;

use clap::Args;

use super::config_args::ConfigArgs;
use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::lab::compare::{Jobs, Plan, Request, compare, report_of, report_only};
use crate::program::quoted;
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
    /// Runs at a time, of one thread each; 0: one a core, and one on a GPU. With --devices: runs at a time on each GPU
    #[arg(long, default_value_t = 0)]
    pub jobs: usize,
    /// GPUs to run on, for example 0,1; sets run.device=cuda for every run
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS")]
    pub devices: Vec<usize>,
    /// Only write the report of the runs that are there
    #[arg(long)]
    pub report_only: bool,
    /// Only write the report of this results.csv; the runs need not be there
    #[arg(long, value_name = "CSV", conflicts_with = "report_only")]
    pub rows: Option<PathBuf>,
    /// Start although memory or disk seem too small for the runs
    #[arg(long)]
    pub force: bool,
}

/// The command that repeats the comparison: what decides its numbers, not how it was run. That it ran on GPUs does, which ones
/// does not.
fn command(args: &CompareArgs, set: &[String]) -> String {
    let mut out = format!("train compare --config {}", quoted(&args.config.config.to_string_lossy()));
    let mut add = |flag: &str, value: &str| out += &format!(" {flag} {}", quoted(value));
    set.iter().for_each(|set| add("--set", set));
    if !args.arms.is_empty() {
        add("--arms", &args.arms.join(","));
    }
    args.seeds.iter().for_each(|seeds| add("--seeds", &seeds.to_string()));
    args.baseline.iter().for_each(|baseline| add("--baseline", baseline));
    out
}

/// `run.device` of runs that are given their GPU from outside.
const GPU: &str = "cuda";

/// What is set on top of the file, `--devices` among it.
fn settings(args: &CompareArgs) -> Result<Vec<String>> {
    let mut set = args.config.set.clone();
    if let Some(twice) = args.devices.iter().enumerate().find_map(|(i, d)| args.devices[..i].contains(d).then_some(d)) {
        let what = format!("--devices: {twice} is named twice; --jobs 2 has two runs at a time on each GPU");
        return Err(Failure::request(what));
    }
    let given = format!("run.device={GPU}");
    if !args.devices.is_empty() && set.last() != Some(&given) {
        set.push(given);
    }
    Ok(set)
}

/// Runs the command.
///
/// # Errors
/// As [`compare`].
pub fn run(args: &CompareArgs) -> Result<()> {
    let set = settings(args)?;
    let request = Request {
        set: &set,
        arms: &args.arms,
        seeds: args.seeds,
        baseline: args.baseline.as_deref(),
        out: args.out.as_deref(),
    };
    let plan = Plan::load(&args.config.config, &request, &command(args, &set))?;
    if let Some((arm, config)) = plan.arms.iter().find(|(_, c)| !args.devices.is_empty() && c.run.device != GPU) {
        let what =
            format!("arm {arm:?}: run.device = {:?} with --devices, which says where runs go", config.run.device);
        return Err(Failure::request(what));
    }
    let written = match &args.rows {
        Some(rows) => Some(report_of(&plan, rows)?),
        None if args.report_only => Some(report_only(&plan)?),
        None => None,
    };
    if let Some(written) = written {
        return Ok(print_line!("{}", written.display())?);
    }
    let each = match args.jobs {
        0 if plan.on_gpu() || !args.devices.is_empty() => 1,
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        jobs => jobs,
    };
    compare(&plan, &Jobs { each, cards: args.devices.clone(), force: args.force }, Interrupt::install)
}
