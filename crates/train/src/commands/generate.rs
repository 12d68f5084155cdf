//! `generate`: continues texts, and shows them as they come.

use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args, ValueEnum};
use dash_data::Tokenizer;
use dash_model::{Generation, Sampling, has_cache};
use serde_json::json;

use crate::console::{print_line, print_results, tell};
use crate::failure::{Failure, Result};
use crate::signals::Interrupt;
use crate::training::loaded::Loaded;
use crate::training::text::continue_text;

/// What standard input holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stdin {
    /// One prompt; a line break at its very end is left out
    Text,
    /// A prompt a line; each is continued as if it were alone
    Lines,
}

/// Arguments.
#[derive(Args)]
#[command(group(ArgGroup::new("text").required(true).args(["prompt", "stdin"])))]
pub struct GenerateArgs {
    /// An exported folder, a checkpoint folder, a run folder, or a Llama, Qwen2 or Qwen3 of Hugging Face
    #[arg(long)]
    pub model: PathBuf,
    /// Text to continue
    #[arg(long, allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Read the prompt from standard input, or with `--stdin=lines` one from each line
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stdin: Option<Stdin>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the most likely token
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Draw from the smallest set of tokens with this probability
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Seed of the draw, the same for every prompt
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Compute on cpu, cuda or cuda:N instead of the device of the run
    #[arg(long)]
    pub device: Option<String>,
    /// Print one JSON object a prompt, when it is done, and not the text as it comes
    #[arg(long)]
    json: bool,
    /// Compute all earlier tokens again for each new one: the same tokens, later
    #[arg(long)]
    no_cache: bool,
}

/// Prompts, read by a thread of their own, so that Ctrl-C ends a command that waits for one.
enum Prompts {
    Given(Option<String>),
    Read(Receiver<Result<String>>),
}

impl Prompts {
    fn of(args: &GenerateArgs) -> Self {
        let Some(what) = args.stdin else { return Prompts::Given(args.prompt.clone()) };
        let (send, receive) = sync_channel(1);
        std::thread::spawn(move || {
            let mut input = std::io::stdin().lock();
            for number in 1.. {
                let mut bytes = Vec::new();
                let read = match what {
                    Stdin::Text => input.read_to_end(&mut bytes).map(|_| 1),
                    Stdin::Lines => input.read_until(b'\n', &mut bytes),
                };
                let prompt = match read {
                    Ok(0) => return,
                    Ok(_) => prompt_of(bytes, (what == Stdin::Lines).then_some(number)),
                    Err(e) => Err(Failure::request(format!("standard input cannot be read: {e}"))),
                };
                // nobody waits for more where the command has ended
                if send.send(prompt).is_err() || what == Stdin::Text {
                    return;
                }
            }
        });
        Prompts::Read(receive)
    }

    fn next(&mut self, interrupt: &Interrupt) -> Result<Option<String>> {
        match self {
            Prompts::Given(prompt) => Ok(prompt.take()),
            Prompts::Read(receive) => loop {
                match receive.recv_timeout(Duration::from_millis(50)) {
                    Ok(prompt) => return prompt.map(Some),
                    Err(RecvTimeoutError::Disconnected) => return Ok(None),
                    Err(RecvTimeoutError::Timeout) if interrupt.requested() => return Err(Failure::Interrupted),
                    Err(RecvTimeoutError::Timeout) => {}
                }
            },
        }
    }
}

/// A prompt from bytes, without the line break at its end.
fn prompt_of(bytes: Vec<u8>, line: Option<usize>) -> Result<String> {
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let place = line.map_or(String::new(), |n| format!(", line {n}"));
        let at = e.utf8_error().valid_up_to();
        Failure::request(format!(
            "standard input{place}: byte {} is not valid UTF-8; a prompt is text in UTF-8",
            at + 1
        ))
    })?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
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
            "{}: has no tokenizer to write text with; a run on text has one, and a folder of Hugging Face with a tokenizer.json",
            args.model.display()
        )));
    };
    let how = Generation { max_tokens: args.max_tokens, sampling, cache: !args.no_cache };
    if how.cache && !has_cache(&loaded.model) {
        tell!(
            "note: {} has no kernels for what attention \"{}\" keeps of earlier tokens, so every token reads the whole text",
            loaded.model.device(),
            loaded.model.config().attention.kind()
        );
    }
    let interrupt = Interrupt::install()?;
    let mut prompts = Prompts::of(args);
    while let Some(prompt) = prompts.next(&interrupt)? {
        one(&loaded, tokenizer, &prompt, (how, args), &interrupt)?;
    }
    Ok(())
}

/// Continues one prompt.
fn one(
    loaded: &Loaded,
    tokenizer: &Tokenizer,
    prompt: &str,
    (how, args): (Generation, &GenerateArgs),
    interrupt: &Interrupt,
) -> Result<()> {
    let (given, positions) = (tokenizer.encode_prompt(prompt)?.len(), loaded.model.positions());
    if given > positions {
        tell!("the prompt has {given} tokens; the model was trained on {positions} and reads the last ones");
    }
    let show = |piece: &str| if args.json { Ok(()) } else { print_results(format_args!("{piece}")) };
    show(prompt)?;
    let (start, mut told) = (Instant::now(), Ok(()));
    let found = continue_text(&loaded.model, tokenizer, prompt, (how, args.seed), |piece| {
        told = show(piece);
        told.is_ok() && !interrupt.requested()
    })?;
    told?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let stop = match (found.ended, interrupt.requested()) {
            (true, _) => "end-of-text",
            (false, true) => "interrupted",
            (false, false) => "max-tokens",
        };
        let line = json!({
            "prompt": prompt, "text": found.text, "tokens": found.tokens, "prompt_tokens": found.prompt_tokens, "stop": stop,
            "seed": args.seed, "seconds": seconds,
        });
        print_line!("{line}")?;
    } else {
        print_line!("")?;
    }
    if interrupt.requested() { Err(Failure::Interrupted) } else { Ok(()) }
}
