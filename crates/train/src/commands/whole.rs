//! `eval --tokens` and `eval --text`: the loss of all of a file.

use std::path::{Path, PathBuf};

use clap::Args;
use dash_data::{COMPRESSED, Tokenizer, token_ids, whole_text};
use serde_json::json;

use crate::console::{print_line, tell};
use crate::failure::{Failure, Result};
use crate::training::loaded::Loaded;
use crate::training::whole::{Cut, Sequence, whole};

/// Arguments of `eval` that replace the validation.
#[derive(Args)]
pub struct WholeArgs {
    /// Evaluate on this file of token ids of llm.c, nanoGPT or Megatron, which the model's tokenizer made
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "config", "kind", "router"])]
    pub tokens: Option<PathBuf>,
    /// Evaluate on all of these files of text, each a document
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["config", "kind", "router"])]
    pub text: Vec<PathBuf>,
    /// With --tokens: predict so many from the file's beginning on; 10485760, as the speed runs of GPT-2 on FineWeb do, if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_tokens: Option<u64>,
    /// With --tokens or --text: tokens of a window, up to as many as the model was made for; data.seq_len of its run, or of a model of Hugging Face 2048 at
    /// most, if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub seq_len: Option<u64>,
    /// With --tokens or --text: tokens by which a window moves on; those before serve as context. A whole window if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub stride: Option<u64>,
}

/// Tokens of a file that are predicted where `--max-tokens` is not given: those of the speed runs of GPT-2 on FineWeb.
const PREDICTED: u64 = 10_485_760;

/// Bytes of a text file at most.
const MOST_TEXT: u64 = 1 << 30;

/// JSON lines hold texts in records: the loss of the records would be that of their syntax, too.
fn refuse_records(path: &Path) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let open = match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("gz" | "gzip") => "gzip -dc",
        Some("zst" | "zstd") => "zstd -dc",
        _ => "cat",
    };
    while let Some((inner, extension)) = name.rsplit_once('.')
        && COMPRESSED.contains(&extension)
    {
        name = inner.to_string();
    }
    // a single .json is lines to a corpus, too
    if ![".jsonl", ".ndjson", ".json"].iter().any(|extension| name.ends_with(extension)) {
        return Ok(());
    }
    let path = path.display();
    Err(Failure::request(format!(
        "--text {path}: holds records and no plain text; write the texts to a file of their own, for example with {open} < {path} | jq -r .text"
    )))
}

/// A document: what it begins with is context.
fn document(path: &Path, tokenizer: &Tokenizer) -> Result<Sequence> {
    refuse_records(path)?;
    let text = whole_text(path, MOST_TEXT)?;
    let encoded = tokenizer.encode_long(&text)?;
    if encoded.ids.is_empty() {
        return Err(Failure::request(format!("--text {}: holds no text", path.display())));
    }
    if encoded.unknown.characters > 0 {
        let what = encoded.unknown.describe();
        tell!("warning: {}: the tokenizer has no tokens for {what}", path.display());
    }
    let mut ids = tokenizer.bos().to_vec();
    if ids.is_empty() {
        // as behind the document before
        ids.push(tokenizer.end_of_text());
    }
    // of several tokens that begin a document, the last one is the context
    ids.drain(..ids.len() - 1);
    ids.extend(encoded.ids);
    Ok(Sequence { ids, bytes: Some(text.len() as u64) })
}

/// What is evaluated, and in words.
fn read(args: &WholeArgs, loaded: &Loaded) -> Result<(Vec<Sequence>, String)> {
    if let Some(path) = &args.tokens {
        // one more: the first is context
        let found =
            token_ids(path, loaded.config.data.vocab_size, args.max_tokens.unwrap_or(PREDICTED).saturating_add(1))?;
        if found.ids.len() < 2 {
            let what = "holds no two tokens, of which the second could be predicted; give a longer file";
            return Err(Failure::request(format!("--tokens {}: {what}", path.display())));
        }
        let what = format!("{} ({}, {} tokens)", path.display(), found.layout, found.of);
        return Ok((vec![Sequence { ids: found.ids, bytes: None }], what));
    }
    let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
        Failure::request("--text: no tokenizer belongs to the model; evaluate token ids with --tokens FILE")
    })?;
    let all = args.text.iter().map(|path| document(path, tokenizer)).collect::<Result<Vec<_>>>()?;
    let names: Vec<String> = args.text.iter().map(|path| path.display().to_string()).collect();
    Ok((all, names.join(", ")))
}

impl WholeArgs {
    /// Refuses what goes with `--tokens` or `--text` alone, where it would mean nothing.
    ///
    /// # Errors
    /// Names the argument.
    pub fn check(&self) -> Result<()> {
        if self.max_tokens.is_some() && self.tokens.is_none() {
            return Err(Failure::request("--max-tokens: goes with --tokens FILE; all of anything else is evaluated"));
        }
        let windows = [("--stride", self.stride), ("--seq-len", self.seq_len)];
        if let Some((name, _)) = windows.iter().find(|(_, n)| n.is_some() && !self.asked()) {
            let what = "has windows of its own; leave it out, or evaluate --tokens FILE or --text FILE";
            return Err(Failure::request(format!("{name}: what is evaluated {what}")));
        }
        Ok(())
    }

    /// Tokens of a window.
    fn length(&self, loaded: &Loaded) -> Result<usize> {
        let Some(asked) = self.seq_len else { return Ok(loaded.config.data.seq_len) };
        let most = loaded.model.positions();
        usize::try_from(asked).ok().filter(|n| *n <= most).ok_or_else(|| {
            Failure::request(format!("--seq-len: {asked} is above the {most} tokens that the model was made for"))
        })
    }

    /// Whether they replace the validation.
    pub fn asked(&self) -> bool {
        self.tokens.is_some() || !self.text.is_empty()
    }

    /// Evaluates.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged or is not of the model's vocabulary.
    pub fn run(&self, loaded: &Loaded, json: bool) -> Result<()> {
        let length = self.length(loaded)?;
        let stride = self.stride.map_or(length, |n| usize::try_from(n).unwrap_or(length));
        if stride > length {
            return Err(Failure::request(format!(
                "--stride: {stride} is above the {length} tokens of a window (--seq-len, or else data.seq_len)"
            )));
        }
        let (sequences, what) = read(self, loaded)?;
        let cut = Cut { length, stride, batch: loaded.config.data.batch_size };
        let found = whole(&loaded.model, &sequences, &cut)?;
        let kind = loaded.model.config().attention.kind();
        if json {
            let line = json!({
                "model": loaded.folder, "attention": kind, "of": what, "loss": found.loss, "loss_error": found.loss_error,
                "perplexity": found.loss.exp(), "bits_per_byte": found.bits_per_byte, "tokens": found.tokens,
                "windows": found.windows, "seq_len": length, "stride": stride,
            });
            return print_line!("{line}");
        }
        print_line!("model {}, attention {kind}, on {what}", loaded.folder.display())?;
        let error = found.loss_error.map_or(String::new(), |e| format!(" (standard error {e:.4})"));
        let bits = found.bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits per byte"));
        print_line!(
            "loss {:.4} nats{error}, perplexity {:.2}{bits} over {} tokens",
            found.loss,
            found.loss.exp(),
            found.tokens
        )?;
        match found.windows {
            1 => print_line!("1 window of at most {length} tokens"),
            many => print_line!("{many} windows of {length} tokens, {stride} further each"),
        }
    }
}
