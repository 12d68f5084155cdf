//! `generate`: continues a text.

use std::path::PathBuf;

use clap::Args;
use dash_model::Sampling;

use crate::console::print_line;
use crate::failure::{Failure, Result};
use crate::training::eval::sample;
use crate::training::loaded::Loaded;

/// Arguments.
#[derive(Args)]
pub struct GenerateArgs {
    /// An exported folder, a checkpoint folder or a run folder
    #[arg(long)]
    pub model: PathBuf,
    /// Text to continue
    #[arg(long)]
    pub prompt: String,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the most likely token
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Draw from the smallest set of tokens with this probability
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Seed of the draw
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Compute on cpu, cuda or cuda:N instead of the device of the run
    #[arg(long)]
    pub device: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// A wrong request, or a model that cannot be read.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p };
    if !(sampling.temperature >= 0.0 && sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err(Failure::request("--temperature must not be negative and --top-p must be above 0 and at most 1"));
    }
    let loaded = Loaded::open(&args.model, None, args.device.as_deref())?;
    let Some(tokenizer) = &loaded.tokenizer else {
        return Err(Failure::request(format!(
            "{}: was trained on a task and has no tokenizer to write text with",
            args.model.display()
        )));
    };
    let text = sample(&loaded.model, tokenizer, &args.prompt, args.max_tokens, sampling, args.seed)?;
    print_line!("{}{text}", args.prompt)?;
    Ok(())
}
