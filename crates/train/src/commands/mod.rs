//! The command line: one file a command.

mod audit;
mod bench;
mod choices;
mod compare;
mod config_args;
mod eval;
mod export;
mod generate;
mod init;
mod plot;
mod prepare;
mod train;
mod whole;

use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};

use crate::config::sections;
use crate::console;
use crate::failure::{Failure, Result};
use crate::lab::verify::verify_resume;
use crate::program;
use crate::training::limits::check_environment;
use config_args::ConfigArgs;

/// Pretrains small language models with DashAttention and its ablations.
///
/// Exit status: 0 done, 1 the run failed, 2 the request is wrong, 130 interrupted after saving.
#[derive(Parser)]
#[command(
    name = "train",
    version = program::version(),
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    after_help = "Examples:
  train init --text books/ > mine.toml      a configuration with every key, for your own text
  train --config mine.toml                  train; Ctrl-C saves
  train --config mine.toml --resume         go on
  train --config runs/mine --resume         go on with a run, by its folder
  train config gamma                        what a key means
  train --config mine.toml --set optim.lr=1e-3 --set run.name=slower"
)]
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
    /// A commented configuration with every key, on standard output
    #[command(after_help = "Examples:
  train init > mine.toml
  train init --kind dense --text books/ > mine.toml")]
    Init(init::InitArgs),
    /// What a key of the configuration means
    #[command(after_help = "Examples:
  train config optim.lr
  train config router
  train config")]
    Config(init::ConfigKeyArgs),
    /// A completion script for a shell, on standard output
    #[command(after_help = "Examples:
  train completions bash > ~/.local/share/bash-completion/completions/train
  train completions zsh > ~/.zfunc/_train")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Corpus -> tokenizer -> shards, and nothing else
    #[command(after_help = "Examples:
  train prepare --config mine.toml
  train prepare --config mine.toml --set data.vocab_size=8192")]
    Prepare(ConfigArgs),
    /// Validation loss, perplexity, bits per byte, loss by position, router sparsity
    #[command(after_help = "Examples:
  train eval --model runs/mine
  train eval --model runs/mine --as topk --top 4
  train eval --model runs/mine --config other.toml --json
  train eval --model runs/mine --blimp blimp/data/*.jsonl")]
    Eval(eval::EvalArgs),
    /// Continue a text
    #[command(after_help = "Examples:
  train generate --model runs/mine --prompt 'Once upon'
  train generate --model runs/mine --prompt 'fn ' --temperature 0 --max-tokens 64
  train generate --model runs/mine --stdin < chapter.txt
  train generate --model runs/mine --stdin=lines --json < prompts.txt > answers.jsonl

The text comes as it is written. A model reads as many tokens as it was trained on at once; up to there each new token is computed alone, beyond
it the earliest tokens drop out and every new one takes a pass over all others.")]
    Generate(generate::GenerateArgs),
    /// Hugging Face folder plus a proof of parity
    #[command(after_help = "Examples:
  train export --model runs/mine --out hf/mine
  train export --model runs/mine/checkpoints/step-00000200 --out hf/mine-200")]
    Export(export::ExportArgs),
    /// The same run for every arm and seed, one report
    #[command(after_help = "Examples:
  train compare --config mine.toml --arms dense,dash,topk --seeds 3 --out compared
  train compare --config mine.toml --out compared --report-only")]
    Compare(compare::CompareArgs),
    /// The gradients against finite differences and against an independent autodiff
    #[command(after_help = "Examples:
  train audit
  train audit --json")]
    Audit(audit::AuditArgs),
    /// Speed of a training step on random tokens
    #[command(after_help = "Examples:
  train bench --config mine.toml
  train bench --config mine.toml --ops --density 0.25")]
    Bench(bench::BenchArgs),
    /// Curves of runs and of evaluations, as SVG files
    #[command(after_help = "Examples:
  train plot --model runs/dense runs/dash --out pictures
  train eval --model runs/mine --json > mine.json && train plot --eval mine.json --out pictures")]
    Plot(plot::PlotArgs),
    /// Proves on this machine that a resumed run has the same bits
    #[command(after_help = "Examples:
  train verify-resume --config mine.toml --set run.steps=20")]
    VerifyResume(ConfigArgs),
}

/// Parses, runs, reports.
pub fn main() -> ExitCode {
    crate::signals::survive_file_limits();
    let cli = Cli::try_parse().unwrap_or_else(|e| wrong_arguments(e));
    console::set_quiet(cli.quiet);
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match &failure {
                Failure::Request(e) | Failure::Run(e) => console::tell_error(format_args!("error: {e:#}")),
                Failure::Interrupted | Failure::ReaderGone | Failure::Elsewhere(_) => {}
            }
            ExitCode::from(failure.status())
        }
    }
}

/// Says what is wrong with the arguments, and ends the process: clap's words, and what it cannot know.
fn wrong_arguments(mut e: clap::Error) -> ! {
    let text = |value: Option<&ContextValue>| match value {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let (argument, command) = (text(e.get(ContextKind::InvalidArg)), text(e.get(ContextKind::InvalidSubcommand)));
    if e.kind() == ErrorKind::UnknownArgument && argument.starts_with("--") {
        let own = argument.trim_start_matches('-').replace('-', "_");
        let has = |s: &crate::config::reference::Section| s.keys.iter().any(|k| k.name == own);
        let tables = sections().into_iter().filter(has).map(|s| format!("--set {}.{own}=VALUE", s.place));
        let keys: Vec<String> = tables.collect();
        // `--seed` for compare's `--seeds` is a slip; what is less alike is no guess worth making
        let near = strsim::jaro_winkler(&argument, &text(e.get(ContextKind::SuggestedArg))) > 0.95;
        if !keys.is_empty() && !near {
            e.remove(ContextKind::SuggestedArg);
            e.insert(ContextKind::Usage, ContextValue::StyledStr(Cli::command().render_usage()));
            let tip = format!("`{argument}` is a key of the configuration: {}", keys.join(" or "));
            e.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
        }
    }
    if e.kind() == ErrorKind::InvalidSubcommand
        && e.get(ContextKind::SuggestedSubcommand).is_none()
        && !command.is_empty()
    {
        let names = Cli::command().get_subcommands().map(|c| c.get_name().to_string()).collect::<Vec<_>>().join(", ");
        let tip = format!("without a command it trains: `train --config FILE`; the commands are {names}");
        e.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    e.exit()
}

fn dispatch(cli: &Cli) -> Result<()> {
    check_environment()?;
    match &cli.command {
        None => train::run(&cli.train),
        Some(Command::Init(args)) => init::init(args),
        Some(Command::Config(args)) => init::config(args),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "train", &mut script);
            console::print_results(format_args!("{}", String::from_utf8_lossy(&script)))
        }
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
