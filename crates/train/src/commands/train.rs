//! The command without a name: trains.

use clap::Args;

use super::config_args::OptionalConfig;
use crate::config::DeviceName;
use crate::failure::{Failure, Result};
use crate::peers::seat::{self, Asked};
use crate::peers::spawn;
use crate::signals::{Interrupt, end_with_parent};
use crate::training::run::{Resume, Start, check_world, train};

/// Arguments.
#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    config: OptionalConfig,
    /// Continue from the newest whole checkpoint of the run; --resume=auto starts the run where there is none yet
    #[arg(long, value_name = "auto", num_args = 0..=1, require_equals = true, default_missing_value = "yes")]
    resume: Option<Resume>,
    /// With --resume: continue although the configuration or the data changed
    #[arg(long, requires = "resume")]
    allow_changes: bool,
    /// Continue a run up to this many updates in all, and say what that does to the schedule
    #[arg(long, value_name = "STEPS", conflicts_with = "resume", requires = "config", value_parser = 1..i64::MAX)]
    extend: Option<i64>,
    /// Start although memory or disk seem too small for the run
    #[arg(long)]
    force: bool,
    /// Train with this many processes on this host, one a GPU; several hosts, and CPUs, need a launcher (docs/SCALING.md)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    processes: Option<u16>,
    /// Save and stop when this process, which started the run, is gone
    #[arg(long, value_name = "PID", hide = true)]
    with_parent: Option<u32>,
}

/// Runs the command.
///
/// # Errors
/// As [`train`].
pub fn run(args: &TrainArgs) -> Result<()> {
    if let Some(parent) = args.with_parent {
        end_with_parent(parent);
    }
    let needed = || {
        Failure::request(
            "--config is needed: a file, for example --config configs/small.toml, or the folder of a run to continue, for example --config \
             runs/small --resume",
        )
    };
    let mut config = args.config.load()?.ok_or_else(needed)?;
    let resume = if args.extend.is_some() { Some(Resume::Yes) } else { args.resume };
    if let Some(steps) = args.extend {
        config.run.steps = steps.unsigned_abs();
    }
    let start = Start { resume, allow_changes: args.allow_changes, extend: args.extend.is_some(), force: args.force };
    let on_gpu = config.run.device_name().map_err(Failure::request)? != DeviceName::Cpu;
    match seat::asked(&|name| std::env::var(name).ok())? {
        Asked::Spawn(brood) => {
            // before as many processes find it, each in its own words
            check_world(&config, brood.world)?;
            spawn::run(&brood)
        }
        Asked::Sit(seat) if seat.world > 1 && on_gpu && spawn::lacks_settings() => spawn::again_with_settings(),
        Asked::Sit(seat) => match args.processes.map_or(1, usize::from) {
            1 => train(&config, start, &seat, Interrupt::install),
            n if seat.world > 1 => Err(Failure::request(format!(
                "--processes {n}: a launcher has started {} already; leave it out",
                seat.world
            ))),
            n if !on_gpu => Err(Failure::request(format!(
                "--processes {n} is for GPUs (run.device = \"cuda\"). Threads use all cores of a CPU (run.threads); processes on CPUs are started \
                 by MPI: mpirun -n {n} --bind-to none train ..., of a program built with --features mpi"
            ))),
            n => {
                check_world(&config, n)?;
                spawn::run(&spawn::of_this_host(n)?)
            }
        },
    }
}
