//! The command line: one file a command.

mod audit;
mod bench;
mod compare;
mod config_args;
mod eval;
mod export;
mod generate;
mod plot;
mod prepare;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::console;
use crate::failure::{Failure, Result};
use crate::lab::verify::verify_resume;
use config_args::ConfigArgs;

/// Pretrains small language models with DashAttention and its ablations.
///
/// Exit status: 0 done, 1 the run failed, 2 the request is wrong, 130 interrupted after saving.
#[derive(Parser)]
#[command(name = "train", version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: train::TrainArgs,
    /// Tell no progress on standard error; errors are told, and the run folder's run.log has every line
    #[arg(long, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Corpus -> tokenizer -> shards, and nothing else
    Prepare(ConfigArgs),
    /// Validation loss, perplexity, bits per byte, loss by position, router sparsity
    Eval(eval::EvalArgs),
    /// Continue a text
    Generate(generate::GenerateArgs),
    /// Hugging Face folder plus a proof of parity
    Export(export::ExportArgs),
    /// The same run for every arm and seed, one report
    Compare(compare::CompareArgs),
    /// The gradients against finite differences and against an independent autodiff
    Audit(audit::AuditArgs),
    /// Speed of a training step on random tokens
    Bench(bench::BenchArgs),
    /// Loss and density curves of runs, as SVG files
    Plot(plot::PlotArgs),
    /// Proves on this machine that a resumed run has the same bits
    VerifyResume(ConfigArgs),
}

/// Parses, runs, reports.
pub fn main() -> ExitCode {
    crate::signals::survive_file_limits();
    let cli = Cli::parse();
    console::set_quiet(cli.quiet);
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match &failure {
                Failure::Request(e) | Failure::Run(e) => console::tell_error(format_args!("error: {e:#}")),
                Failure::Interrupted | Failure::ReaderGone => {}
            }
            ExitCode::from(failure.status())
        }
    }
}

fn dispatch(cli: &Cli) -> Result<()> {
    match &cli.command {
        None => train::run(&cli.train),
        Some(Command::Prepare(args)) => prepare::run(&args.load()?),
        Some(Command::Eval(args)) => eval::run(args),
        Some(Command::Generate(args)) => generate::run(args),
        Some(Command::Export(args)) => export::run(args),
        Some(Command::Compare(args)) => compare::run(args),
        Some(Command::Audit(args)) => audit::run(args),
        Some(Command::Bench(args)) => bench::run(args),
        Some(Command::Plot(args)) => plot::run(args),
        Some(Command::VerifyResume(args)) => verify_resume(&args.load()?),
    }
}
