//! `eval`: what a trained model costs and whose fault its errors are.

use std::path::{Path, PathBuf};

use clap::Args;
use dash_data::Tokenizer;
use dash_model::Attention;
use dash_model::attention::keys::Key;
use serde_json::json;

use super::choices::ChoiceArgs;
use super::config_args::OptionalConfig;
use super::whole::WholeArgs;
use crate::config::{Config, Far};
use crate::console::{print_line, tell};
use crate::failure::{Failure, Result};
use crate::training::convert::{Other, other_attention};
use crate::training::eval::Validation;
use crate::training::loaded::Loaded;
use crate::training::material::Material;
use crate::training::provenance;
use crate::training::tasks::{RouterChoice, Score};

/// Arguments.
#[derive(Args)]
pub struct EvalArgs {
    /// An exported folder, a checkpoint folder, a run folder, or a Llama, Qwen2 or Qwen3 of Hugging Face
    #[arg(long)]
    pub model: PathBuf,
    /// Take data and evaluation settings from this file instead of the model's own
    #[command(flatten)]
    pub config: OptionalConfig,
    /// Evaluate the same weights with another attention kind
    #[arg(long = "as", value_name = "KIND")]
    pub kind: Option<String>,
    /// With --as topk, infllmv2 or nsa: attended chunks; the smallest number whose tokens are not below the model's own
    /// if left out
    #[arg(long, requires = "kind")]
    pub top: Option<usize>,
    /// With --as: tokens of a chunk; the model's own if left out
    #[arg(long, requires = "kind")]
    pub chunk_size: Option<usize>,
    /// Who chooses the chunks
    #[arg(long, value_enum, default_value_t)]
    pub router: RouterChoice,
    /// Compute on cpu, cuda or cuda:N instead of the device of the run
    #[arg(long)]
    pub device: Option<String>,
    /// On all of a file in the place of the validation
    #[command(flatten)]
    pub whole: WholeArgs,
    /// On a test of choices in the place of the validation
    #[command(flatten)]
    pub choices: ChoiceArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A wrong request, or a model or corpus that cannot be read.
pub fn run(args: &EvalArgs) -> Result<()> {
    args.whole.check()?;
    let loaded = Loaded::open(&args.model, args.config.load()?.as_ref(), args.device.as_deref())?;
    if args.whole.asked() {
        return args.whole.run(&loaded, args.json);
    }
    if args.choices.asked() {
        return args.choices.run(&loaded, args.json);
    }
    if !loaded.own && args.config.config.is_none() {
        return Err(Failure::request(format!(
            "{}: no run trained it, so it has no validation text of its own; give --text FILE, --tokens FILE, --blimp FILE or --hellaswag FILE, or --config \
             FILE, whose [data] names a text and, as data.tokenizer, the model's tokenizer.json",
            args.model.display()
        )));
    }
    validate(args, loaded)
}

/// On the validation text and the task.
fn validate(args: &EvalArgs, loaded: Loaded) -> Result<()> {
    let (material, changed) = match args.config.config {
        None => own_material(&loaded)?,
        Some(_) => (Material::of(&loaded.config)?, false),
    };
    let hash = |t: &Option<Tokenizer>| t.as_ref().map(Tokenizer::hash);
    if material.tokenizer.is_some() && hash(&material.tokenizer) != hash(&loaded.tokenizer) {
        return Err(Failure::request(format!(
            "{}: the corpus was prepared with another tokenizer than the model's; set data.tokenizer to the model's tokenizer.json",
            material.hash
        )));
    }
    let set = material.validation(&looking_far(&loaded.config))?;
    let mut model = loaded.model;
    let trained = model.config().attention;
    if let Some(kind) = args.kind.as_deref() {
        let attended = set.run(&model, RouterChoice::Own)?.attended;
        let config = Config { model: model.config().clone(), ..loaded.config.clone() };
        let other = other_attention(&config, &Other { kind, top: args.top, chunk_size: args.chunk_size }, attended)?;
        model.set_attention(other).map_err(|e| {
            Failure::request(format!("--as {kind}: {e}; a model takes on kinds whose parameters it has. A run that begins with it (init.from) draws the others, and tells the loss with both"))
        })?;
    }
    if args.router != RouterChoice::Own && model.config().attention.chunk_size().is_none() {
        return Err(Failure::request(
            "--router: this attention has no router; add --as topk or another kind that routes",
        ));
    }
    if args.router != RouterChoice::Own && loaded.config.data.document_mask {
        return Err(Failure::request(format!(
            "--router: another router knows whole sequences only; add --config {} --set data.document_mask=false to evaluate those",
            args.model.display()
        )));
    }
    if args.router == RouterChoice::Oracle && loaded.config.task.is_none() {
        return Err(Failure::request("--router oracle: a text has no known answers; evaluate a task"));
    }
    let v = set.run(&model, args.router)?;
    if !args.json {
        print_line!("{}", evaluated(&loaded.folder, &trained, &model.config().attention, args.router))?;
        print(&v, loaded.config.data.seq_len)?;
        for line in provenance::lines(&loaded.starts) {
            print_line!("{line}")?;
        }
        return Ok(());
    }
    let line = json!({
        "model": loaded.folder, "attention": model.config().attention, "router": name(args.router),
        "loss": v.loss, "loss_error": v.loss_error, "perplexity": v.loss.exp(), "bits_per_byte": v.bits_per_byte, "tokens": v.tokens, "density": v.density,
        "far_loss": v.far.map(|f| f.loss), "far_loss_error": v.far.and_then(|f| f.error), "far_tokens": v.far.map(|f| f.tokens),
        "far_control_loss": v.far.map(|f| f.control), "far_control_tokens": v.far.map(|f| f.control_tokens),
        "layer_density": v.layers, "attended_tokens": v.attended, "loss_by_position": v.by_position,
        "corpus": material.hash, "corpus_changed": changed, "provenance": loaded.starts,
        "task": v.task.iter().map(|r| r.json()).collect::<Vec<_>>(),
    });
    print_line!("{line}")
}

/// The configuration, which looks at far targets where it says nothing of them and its sequences have some: 8 chunks back, as in chunks of 64 tokens
/// without chunks.
fn looking_far(config: &Config) -> Config {
    let mut config = config.clone();
    let far = Far::of_chunks(config.model.attention.chunk_size().unwrap_or(64));
    let whole = !config.data.document_mask;
    if config.eval.far.is_none() && whole && config.reads_text() && far.tokens + 1 < config.data.seq_len {
        config.eval.far = Some(far);
    }
    config
}

/// Who chose the chunks: `own`, `random` or `oracle`.
fn name(router: RouterChoice) -> String {
    format!("{router:?}").to_lowercase()
}

/// An attention with its keys: `dash (chunk_size 8, alpha 1.5)`.
fn described(attention: &Attention) -> String {
    let key = |key: &Key| Some(format!("{} {}", key.name, attention.value(key.name)?));
    let keys: Vec<String> = attention.keys().iter().filter_map(key).collect();
    if keys.is_empty() { attention.kind().into() } else { format!("{} ({})", attention.kind(), keys.join(", ")) }
}

/// What was evaluated: `model runs/a, attention topk (chunk_size 8, top 3) in the place of dash (...), router own`.
fn evaluated(model: &Path, trained: &Attention, with: &Attention, router: RouterChoice) -> String {
    let instead = if trained == with {
        String::new()
    } else {
        format!(" in the place of {}, which it was trained with", described(trained))
    };
    let router = name(router);
    format!("model {}, attention {}{instead}, router {router}", model.display(), described(with))
}

/// The material that the model was trained with, and whether its text has changed since.
fn own_material(loaded: &Loaded) -> Result<(Material, bool)> {
    let trained = loaded.data_hash();
    let places = loaded.places();
    let material = Material::of_trained(&places, trained)?;
    let Some(trained) = trained.filter(|hash| *hash != material.hash) else { return Ok((material, false)) };
    let stored = Material::stored(&places.config, trained)?;
    tell!(
        "warning: the corpus changed since training ({trained} -> {}); {}",
        material.hash,
        match stored {
            Some(_) => "evaluating on the text as it was then",
            None => "the validation text may be one that the model has seen",
        }
    );
    Ok((stored.unwrap_or(material), true))
}

/// `accuracy 0.5, router missed 0.3, reader missed 0.2 of 8`
fn shares(s: &Score) -> String {
    let share = |n: usize| n as f64 / s.asked.max(1) as f64;
    format!(
        "accuracy {:.3}, router missed {:.3}, reader missed {:.3} of {}",
        share(s.right),
        share(s.missed),
        share(s.misread),
        s.asked
    )
}

/// For people.
fn print(v: &Validation, seq_len: usize) -> Result<()> {
    let error = v.loss_error.map_or(String::new(), |e| format!(" (standard error {e:.4})"));
    print_line!("loss {:.4} nats{error}, {} over {} tokens", v.loss, v.summary(), v.tokens)?;
    if let Some(far) = v.far {
        let error = far.error.map_or(String::new(), |e| format!(" (standard error {e:.4})"));
        print_line!("far and rare targets: loss {:.4} nats{error} over {} tokens", far.loss, far.tokens)?;
        print_line!("  as rare, not seen before: {:.4} over {} tokens", far.control, far.control_tokens)?;
    }
    let visible = (seq_len as f64 + 1.0) / 2.0;
    let share = 100.0 * v.attended / visible;
    print_line!("attended tokens {:.1} a query, {share:.1} % of the {visible} that it sees on average", v.attended)?;
    for r in &v.task {
        print_line!("length {:>6}: {} answers, density {:.3}", r.length, shares(&r.score), r.density)?;
        print_line!("  without matching a key: accuracy {:.3}", r.shortcut.accuracy)?;
        for (i, (score, shortcut)) in r.by_question.iter().zip(&r.shortcut.by_question).enumerate() {
            print_line!(
                "  question {:>14}: accuracy {:.3}, without matching a key {shortcut:.3}",
                i + 1,
                score.accuracy()
            )?;
        }
        for s in &r.spent {
            print_line!(
                "  layer {:>17}: {:.1} tokens in the first half, {:.1} in the second, {:.1} where it asks; the answer's chunk in {:.3} of \
                 the lists, by chance {:.3}",
                s.layer,
                s.first_half,
                s.second_half,
                s.asked,
                s.recall,
                s.chance
            )?;
        }
        for (below, score) in &r.by_distance {
            print_line!("  distance below {below:>6}: {}", shares(score))?;
        }
    }
    if !v.layers.is_empty() {
        let layers: Vec<String> = v.layers.iter().map(|x| format!("{x:.3}")).collect();
        print_line!("density {:.3} (by layer {})", v.density, layers.join(" "))?;
    }
    let eighth = (v.by_position.len() / 8).max(1);
    for (i, part) in v.by_position.chunks(eighth).enumerate() {
        let (from, to) = (i * eighth, i * eighth + part.len());
        print_line!("positions {from:>5}..{to:<5} loss {:.4}", part.iter().sum::<f64>() / part.len() as f64)?;
    }
    Ok(())
}
