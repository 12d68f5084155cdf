//! The command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use dash_data::Tokenizer;
use dash_model::{Attention, KINDS, Model, Sampling, Windows};
use serde_json::json;

use crate::config::Config;
use crate::eval::{model_folder, sample};
use crate::failure::{Failure, Result};
use crate::run::{self, Material, Start};
use crate::signals::Interrupt;
use crate::tasks::Router;
use crate::{audit, bench, bench_ops, checkpoint, compare, export, plot, verify};

/// Pretrains small language models with DashAttention and its ablations.
///
/// Exit status: 0 done, 1 the run failed, 2 the request is wrong, 130 interrupted after saving.
#[derive(Parser)]
#[command(name = "train", version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: OptionalConfig,
    /// Continue from the newest whole checkpoint of the run
    #[arg(long)]
    resume: bool,
    /// With --resume: continue although the configuration or the data changed
    #[arg(long, requires = "resume")]
    allow_changes: bool,
}

#[derive(Args)]
struct OptionalConfig {
    /// Configuration file (TOML)
    #[arg(long)]
    config: Option<PathBuf>,
    /// Override one value, for example --set optim.lr=1e-3
    #[arg(long, value_name = "KEY=VALUE", requires = "config")]
    set: Vec<String>,
}

#[derive(Args)]
struct ConfigArgs {
    /// Configuration file (TOML)
    #[arg(long)]
    config: PathBuf,
    /// Override one value, for example --set optim.lr=1e-3
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Corpus -> tokenizer -> shards, and nothing else
    Prepare(ConfigArgs),
    /// Validation loss, perplexity, bits per byte, loss by position, router sparsity
    Eval {
        /// An exported folder, a checkpoint folder or a run folder
        #[arg(long)]
        model: PathBuf,
        /// Take data and evaluation settings from this file instead of the model's own
        #[command(flatten)]
        config: OptionalConfig,
        /// Evaluate the same weights with another attention kind
        #[arg(long = "as", value_name = "KIND")]
        kind: Option<String>,
        /// With --as topk, infllmv2 or nsa: attended chunks; the smallest number whose tokens are not below the model's own
        /// if left out
        #[arg(long, requires = "kind")]
        top: Option<usize>,
        /// With --as: tokens of a chunk; the model's own if left out
        #[arg(long, requires = "kind")]
        chunk_size: Option<usize>,
        /// Who chooses the chunks
        #[arg(long, value_enum, default_value_t)]
        router: Router,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Continue a text
    Generate {
        /// An exported folder, a checkpoint folder or a run folder
        #[arg(long)]
        model: PathBuf,
        /// Text to continue
        #[arg(long)]
        prompt: String,
        /// Tokens to generate at most
        #[arg(long, default_value_t = 128)]
        max_tokens: usize,
        /// Divides the logits; 0 takes the most likely token
        #[arg(long, default_value_t = 0.8)]
        temperature: f64,
        /// Draw from the smallest set of tokens with this probability
        #[arg(long, default_value_t = 0.95)]
        top_p: f64,
        /// Seed of the draw
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Hugging Face folder plus a proof of parity
    Export {
        /// A checkpoint folder or a run folder
        #[arg(long)]
        checkpoint: PathBuf,
        /// Folder to write
        #[arg(long)]
        out: PathBuf,
    },
    /// The same run for every arm and seed, one report
    Compare {
        #[command(flatten)]
        config: ConfigArgs,
        /// Arms of the configuration, or attention kinds
        #[arg(long, value_delimiter = ',')]
        arms: Vec<String>,
        /// Seeds of every arm
        #[arg(long)]
        seeds: Option<u64>,
        /// Arm that the others are compared with
        #[arg(long)]
        baseline: Option<String>,
        /// Folder of runs and report
        #[arg(long)]
        out: Option<PathBuf>,
        /// Runs at a time, of one thread each; 0: one a core
        #[arg(long, default_value_t = 0)]
        jobs: usize,
        /// Only write the report of the runs that are there
        #[arg(long)]
        report_only: bool,
    },
    /// The gradients against finite differences and against an independent autodiff
    Audit {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Speed of a training step on random tokens
    Bench {
        #[command(flatten)]
        config: ConfigArgs,
        /// Steps to take the median of
        #[arg(long, default_value_t = 10)]
        steps: usize,
        /// Time every room against the machine's measured limits instead of whole steps
        #[arg(long)]
        ops: bool,
        /// Time one decoder block against dfdx in this process instead of whole steps
        #[arg(long, conflicts_with = "ops")]
        peers: bool,
        /// Take a step for every line on standard input and print its milliseconds, for timing in turn with another program
        #[arg(long, conflicts_with_all = ["ops", "peers", "steps", "json"])]
        in_turn: bool,
        /// With --ops: choose gamma so that this share of the visible chunks is attended
        #[arg(long, requires = "ops")]
        density: Option<f64>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Loss and density curves of runs, as SVG files
    Plot {
        /// Run folders
        #[arg(long, required = true, num_args = 1..)]
        run: Vec<PathBuf>,
        /// Folder to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Proves on this machine that a resumed run has the same bits
    VerifyResume(ConfigArgs),
}

/// Parses, runs, reports.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match &failure {
                Failure::Request(e) | Failure::Run(e) => eprintln!("error: {e:#}"),
                Failure::Interrupted => {}
            }
            ExitCode::from(failure.status())
        }
    }
}

fn dispatch(cli: Cli) -> Result<()> {
    let load = |c: &ConfigArgs| Config::load(&c.config, &c.set);
    match cli.command {
        None => {
            let path = cli
                .config
                .config
                .ok_or_else(|| Failure::request("--config FILE is needed, for example --config configs/small.toml"))?;
            let config = Config::load(&path, &cli.config.set)?;
            run::train(&config, Start { resume: cli.resume, allow_changes: cli.allow_changes }, Interrupt::install)
        }
        Some(Command::Prepare(args)) => prepare(&load(&args)?),
        Some(Command::Eval { model, config, kind, top, chunk_size, router, json }) => {
            let other = kind.as_deref().map(|kind| Other { kind, top, chunk_size });
            eval(&model, config, other, router, json)
        }
        Some(Command::Generate { model, prompt, max_tokens, temperature, top_p, seed }) => {
            if !(temperature >= 0.0 && top_p > 0.0 && top_p <= 1.0) {
                return Err(Failure::request(
                    "--temperature must not be negative and --top-p must be above 0 and at most 1",
                ));
            }
            let loaded = Loaded::open(&model, None)?;
            let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
                Failure::request(format!(
                    "{}: was trained on a task and has no tokenizer to write text with",
                    model.display()
                ))
            })?;
            let text = sample(&loaded.model, tokenizer, &prompt, max_tokens, Sampling { temperature, top_p }, seed)?;
            println!("{prompt}{text}");
            Ok(())
        }
        Some(Command::Export { checkpoint, out }) => {
            let loaded = Loaded::open(&checkpoint, None)?;
            let set = Material::of(&loaded.config)?.validation(&loaded.config)?;
            export::export(&loaded.model, &loaded.config, loaded.tokenizer.as_ref(), set.first().0, &out)?;
            println!("exported {} to {}", loaded.folder.display(), out.display());
            Ok(())
        }
        Some(Command::Audit { json }) => audit::audit(json),
        Some(Command::Compare { config, arms, seeds, baseline, out, jobs, report_only }) => {
            let plan =
                compare::Plan::load(&config.config, &config.set, &arms, seeds, baseline.as_deref(), out.as_deref())?;
            if report_only {
                println!("{}", compare::report_only(&plan)?.display());
                return Ok(());
            }
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            compare::compare(&plan, if jobs == 0 { cores } else { jobs }, Interrupt::install)
        }
        Some(Command::Bench { config, steps, ops, peers, in_turn, density, json }) => {
            let (config, steps) = (load(&config)?, steps.max(1));
            match (ops, peers) {
                (true, _) => bench_ops::rooms(&config, steps, density, json),
                (_, true) => bench::peers(&config, steps, json),
                _ if in_turn => bench::steps_in_turn(&config),
                _ => bench::step_speed(&config, steps, json),
            }
        }
        Some(Command::Plot { run, out }) => {
            for path in plot::plot(&run, &out).map_err(Failure::Request)? {
                println!("wrote {}", path.display());
            }
            Ok(())
        }
        Some(Command::VerifyResume(args)) => verify::verify_resume(&load(&args)?),
    }
}

fn prepare(config: &Config) -> Result<()> {
    let p = run::prepared(config)?;
    let tokens = |shards: &[std::sync::Arc<dash_data::Shard>]| shards.iter().map(|s| s.len()).sum::<usize>();
    println!("{} {}", if p.fresh { "prepared" } else { "already prepared:" }, p.folder.display());
    println!(
        "{} documents, {:.1} MB ({:.1} MB validation)",
        p.report.documents,
        p.report.bytes as f64 / 1e6,
        p.report.validation_bytes as f64 / 1e6
    );
    println!(
        "{} training and {} validation tokens, vocabulary {}",
        tokens(&p.train),
        tokens(&p.validation),
        p.tokenizer.vocab_size()
    );
    for (reason, n) in &p.report.left_out {
        println!("left out: {n} files ({reason})");
    }
    Ok(())
}

/// A model with the configuration and tokenizer that belong to it.
struct Loaded {
    folder: PathBuf,
    config: Config,
    tokenizer: Option<Tokenizer>,
    model: Model,
}

impl Loaded {
    fn open(path: &Path, data: Option<&Config>) -> Result<Self> {
        let folder = model_folder(path).map_err(Failure::Request)?;
        // an exported folder has its files beside the weights, a checkpoint two levels up
        let home = [folder.clone(), folder.join("../..")].into_iter().find(|p| p.join("config.toml").is_file());
        let home = home
            .ok_or_else(|| Failure::request(format!("{}: no config.toml belongs to this model", folder.display())))?;
        let mut config = Config::of_run(&home)?;
        if let Some(data) = data {
            (config.data, config.eval, config.run.threads) = (data.data.clone(), data.eval.clone(), data.run.threads);
            config.task = data.task.clone();
        }
        let path = home.join("tokenizer.json");
        let tokenizer = path.is_file().then(|| Tokenizer::load(&path)).transpose()?;
        if let Some(have) = tokenizer.as_ref().map(Tokenizer::vocab_size).filter(|n| *n != config.data.vocab_size) {
            let asked = config.data.vocab_size;
            return Err(Failure::request(format!(
                "data.vocab_size: {asked}, but the model's tokenizer has {have} entries"
            )));
        }
        let model = checkpoint::load_model(&folder, &config, &run::device(&config)).map_err(Failure::Request)?;
        Ok(Loaded { folder, config, tokenizer, model })
    }
}

/// What `--as` asks for.
struct Other<'a> {
    kind: &'a str,
    top: Option<usize>,
    chunk_size: Option<usize>,
}

/// The kind, with the sizes of the model's own attention and, where it chooses a number of chunks, that number.
fn other_attention(config: &Config, asked: &Other, attended: f64) -> Result<Attention> {
    let kind = asked.kind;
    let own = &config.model.attention;
    let Some(mut other) = Attention::preset(kind) else {
        return Err(Failure::request(format!("--as: {kind:?} is none of {}", KINDS.join(", "))));
    };
    let t = config.data.seq_len;
    let size = asked.chunk_size.or(own.chunk_size()).or(other.chunk_size()).unwrap_or(1).max(1);
    let chunks = t.div_ceil(size);
    let nearest = (1..=chunks).find(|&n| Attention::listed_at(size, n, t) >= attended).unwrap_or(chunks);
    let wanted = asked.top.unwrap_or(nearest);
    if other.chunk_size().is_some() && chunks < 2 {
        let what = format!("--chunk-size: {size} leaves nothing to route in sequences of {t}; give one below {t}");
        return Err(Failure::request(what));
    }
    if other.top().is_some() && !(1..=chunks).contains(&wanted) {
        return Err(Failure::request(format!(
            "--top: {wanted} is not between 1 and the {chunks} chunks of a sequence"
        )));
    }
    match (&mut other, own) {
        (Attention::Dash(d), Attention::Dash(mine)) => {
            (d.chunk_size, d.alpha, d.gamma, d.diagonal) = (size, mine.alpha, mine.gamma, mine.diagonal);
        }
        (Attention::Dash(d), _) => d.chunk_size = size,
        (Attention::TopK { chunk_size, top, gamma, indexer }, own) => {
            (*chunk_size, *top) = (size, wanted);
            if let Attention::Dash(mine) = own {
                (*gamma, *indexer) = (mine.gamma, true);
            }
        }
        (Attention::InfLlmV2(w), _) => {
            *w = Windows {
                chunk_size: size,
                top: wanted,
                length: (size / 2).max(1),
                stride: (size / 4).max(1),
                init: 0,
                local: 1,
            };
        }
        _ => {}
    }
    Ok(other)
}

fn eval(path: &Path, config: OptionalConfig, other: Option<Other>, router: Router, as_json: bool) -> Result<()> {
    let data = config.config.map(|c| Config::load(&c, &config.set)).transpose()?;
    let loaded = Loaded::open(path, data.as_ref())?;
    let material = Material::of(&loaded.config)?;
    let hash = |t: &Option<Tokenizer>| t.as_ref().map(Tokenizer::hash);
    if material.tokenizer.is_some() && hash(&material.tokenizer) != hash(&loaded.tokenizer) {
        return Err(Failure::request(format!(
            "{}: the corpus was prepared with another tokenizer than the model's; set data.tokenizer to the model's tokenizer.json",
            material.hash
        )));
    }
    let set = material.validation(&loaded.config)?;
    let mut model = loaded.model;
    if let Some(asked) = other {
        let kind = asked.kind;
        let attended = set.run(&model, Router::Own)?.attended;
        let config = Config { model: model.config().clone(), ..loaded.config.clone() };
        let other = other_attention(&config, &asked, attended)?;
        model.set_attention(other).map_err(|e| Failure::request(format!("--as {kind}: {e}")))?;
    }
    if router != Router::Own && model.config().attention.chunk_size().is_none() {
        return Err(Failure::request(
            "--router: this attention has no router; add --as topk or another kind that routes",
        ));
    }
    if router == Router::Oracle && loaded.config.task.is_none() {
        return Err(Failure::request("--router oracle: a text has no known answers; evaluate a task"));
    }
    let v = set.run(&model, router)?;
    if as_json {
        let line = json!({
            "model": loaded.folder, "attention": model.config().attention, "router": format!("{router:?}").to_lowercase(), "loss": v.loss, "perplexity": v.loss.exp(), "bits_per_byte": v.bits_per_byte,
            "tokens": v.tokens, "density": v.density, "layer_density": v.layers, "attended_tokens": v.attended, "loss_by_position": v.by_position,
            "task": v.task.iter().map(|r| r.json()).collect::<Vec<_>>(),
        });
        println!("{line}");
        return Ok(());
    }
    println!("loss {:.4} nats, {} over {} tokens", v.loss, v.summary(), v.tokens);
    for r in &v.task {
        let share = |n: usize| n as f64 / r.score.asked.max(1) as f64;
        println!(
            "length {:>6}: accuracy {:.3}, router missed {:.3}, reader missed {:.3} of {} answers, density {:.3}",
            r.length,
            share(r.score.right),
            share(r.score.missed),
            share(r.score.misread),
            r.score.asked,
            r.density
        );
        for (below, s) in &r.by_distance {
            let share = |n: usize| n as f64 / s.asked.max(1) as f64;
            println!(
                "  distance below {below:>6}: accuracy {:.3}, router missed {:.3}, reader missed {:.3} of {}",
                share(s.right),
                share(s.missed),
                share(s.misread),
                s.asked
            );
        }
    }
    if !v.layers.is_empty() {
        let layers: Vec<String> = v.layers.iter().map(|x| format!("{x:.3}")).collect();
        println!("density {:.3} (by layer {})", v.density, layers.join(" "));
    }
    let eighth = (v.by_position.len() / 8).max(1);
    for (i, part) in v.by_position.chunks(eighth).enumerate() {
        println!(
            "positions {:>5}..{:<5} loss {:.4}",
            i * eighth,
            i * eighth + part.len(),
            part.iter().sum::<f64>() / part.len() as f64
        );
    }
    Ok(())
}
