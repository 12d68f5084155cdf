//! `eval --blimp` and `eval --hellaswag`: tests of choices that others quote, from their own files.

use std::path::{Path, PathBuf};

use clap::Args;
use dash_data::{Tokenizer, whole_text};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::console::{print_line, tell};
use crate::failure::{Failure, Result};
use crate::training::choices::{Asked, Scores, scores, share};
use crate::training::loaded::Loaded;

/// Arguments of `eval` that replace the validation.
#[derive(Args)]
pub struct ChoiceArgs {
    /// Evaluate on pairs of sentences of BLiMP (JSON lines): the share whose acceptable one is the more probable
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["hellaswag", "tokens", "text", "config", "kind", "router"])]
    pub blimp: Vec<PathBuf>,
    /// Evaluate on questions of HellaSwag (JSON lines) in the style of llm.c
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tokens", "text", "config", "kind", "router"])]
    pub hellaswag: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Pair {
    sentence_good: String,
    sentence_bad: String,
}

#[derive(Deserialize)]
struct Question {
    ctx: String,
    endings: Vec<String>,
    label: Value,
}

impl Question {
    /// The number of the right ending; `"3"` in some copies.
    fn right(&self) -> Option<usize> {
        let number = match &self.label {
            Value::String(text) => text.parse().ok(),
            other => other.as_u64(),
        };
        number.and_then(|n| usize::try_from(n).ok()).filter(|n| *n < self.endings.len())
    }
}

/// Bytes of a file at most.
const MOST: u64 = 1 << 30;

/// The objects of a file of JSON lines.
fn lines<T: DeserializeOwned>(path: &Path, what: &str) -> Result<Vec<T>> {
    let text = whole_text(path, MOST)?;
    let found = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(|(i, line)| {
        serde_json::from_str(line)
            .map_err(|e| Failure::request(format!("{}: line {} is no {what}: {e}", path.display(), i + 1)))
    });
    let found = found.collect::<Result<Vec<T>>>()?;
    if found.is_empty() {
        return Err(Failure::request(format!("{}: holds no {what}", path.display())));
    }
    Ok(found)
}

/// A sentence, scored from its first token on; `None` where it has none.
fn sentence(tokenizer: &Tokenizer, text: &str) -> Result<Option<Asked>> {
    let mut ids = tokenizer.bos().to_vec();
    if ids.is_empty() {
        ids.push(tokenizer.end_of_text());
    }
    let from = ids.len();
    ids.extend(tokenizer.encode(text)?);
    Ok(scored(Asked { ids, from }))
}

/// What an ending adds to its context: encoded alone, with a space before it. `None` where one of both is empty.
fn ending(tokenizer: &Tokenizer, context: &str, text: &str) -> Result<Option<Asked>> {
    if text.is_empty() {
        return Ok(None);
    }
    let ids = tokenizer.encode_prompt(context)?;
    let from = ids.len();
    Ok(scored(Asked { ids: [ids, tokenizer.encode(&format!(" {text}"))?].concat(), from }))
}

fn scored(asked: Asked) -> Option<Asked> {
    (asked.from > 0 && asked.from < asked.ids.len()).then_some(asked)
}

/// What an empty text is told by: `pair 3 of a.jsonl`.
fn empty(path: &Path, what: &str, i: usize) -> Failure {
    let path = path.display();
    Failure::request(format!("{path}: {what} {} holds an empty text, which cannot be scored; mend or remove it", i + 1))
}

fn least(x: &[f64]) -> Option<usize> {
    (0..x.len()).min_by(|&i, &j| x[i].total_cmp(&x[j]))
}

impl ChoiceArgs {
    /// Whether they replace the validation.
    pub fn asked(&self) -> bool {
        !self.blimp.is_empty() || self.hellaswag.is_some()
    }

    /// Evaluates.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else, or a model without a tokenizer.
    pub fn run(&self, loaded: &Loaded, json: bool) -> Result<()> {
        let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
            Failure::request("--blimp, --hellaswag: no tokenizer belongs to the model, so it reads no text")
        })?;
        if !json {
            let kind = loaded.model.config().attention.kind();
            print_line!("model {}, attention {kind}", loaded.folder.display())?;
        }
        match &self.hellaswag {
            Some(path) => hellaswag(path, (loaded, tokenizer), json),
            None => blimp(&self.blimp, (loaded, tokenizer), json),
        }
    }
}

/// Scores texts by a model's own sizes.
fn ask(loaded: &Loaded, asked: Vec<Asked>) -> Result<Scores> {
    let (data, all) = (&loaded.config.data, asked.len());
    let found = scores(&loaded.model, asked, (data.seq_len, data.batch_size))?;
    if found.cut > 0 {
        tell!("warning: {} of {all} texts are above {} tokens: their beginning was left out", found.cut, data.seq_len);
    }
    Ok(found)
}

fn blimp(paths: &[PathBuf], (loaded, tokenizer): (&Loaded, &Tokenizer), json: bool) -> Result<()> {
    let (mut right, mut of, mut by_file) = (0, 0, Vec::new());
    for path in paths {
        let mut asked = Vec::new();
        for (i, pair) in lines::<Pair>(path, "pair of BLiMP (sentence_good, sentence_bad)")?.iter().enumerate() {
            for text in [&pair.sentence_good, &pair.sentence_bad] {
                asked.push(sentence(tokenizer, text)?.ok_or_else(|| empty(path, "pair", i))?);
            }
        }
        let nats = ask(loaded, asked)?.nats;
        let (these, pairs) = (nats.chunks_exact(2).filter(|x| x[0] < x[1]).count(), nats.len() / 2);
        (right, of) = (right + these, of + pairs);
        by_file.push((path, share(these, pairs), pairs));
    }
    let (accuracy, error) = share(right, of);
    if json {
        let files: Vec<Value> = by_file
            .iter()
            .map(|(path, (p, e), n)| json!({"file": path, "accuracy": p, "error": e, "pairs": n}))
            .collect();
        let line = json!({
            "model": loaded.folder, "test": "blimp", "accuracy": accuracy, "error": error, "pairs": of, "files": files,
        });
        return print_line!("{line}");
    }
    for (path, (p, e), n) in by_file.iter().filter(|_| by_file.len() > 1) {
        print_line!("{}: accuracy {p:.4} (standard error {e:.4}) of {n} pairs", path.display())?;
    }
    print_line!("BLiMP: accuracy {accuracy:.4} (standard error {error:.4}) of {of} pairs, by chance 0.5")
}

fn hellaswag(path: &Path, (loaded, tokenizer): (&Loaded, &Tokenizer), json: bool) -> Result<()> {
    let questions = lines::<Question>(path, "question of HellaSwag (ctx, endings, label)")?;
    let (mut asked, mut rights) = (Vec::new(), Vec::new());
    for (i, q) in questions.iter().enumerate() {
        let right = q.right().ok_or_else(|| {
            let (label, n) = (&q.label, q.endings.len());
            Failure::request(format!("{}: question {}: label {label} names none of {n} endings", path.display(), i + 1))
        })?;
        if q.endings.len() < 2 {
            let what = format!("question {} has one ending, so there is nothing to choose", i + 1);
            return Err(Failure::request(format!("{}: {what}", path.display())));
        }
        rights.push(right);
        for text in &q.endings {
            asked.push(ending(tokenizer, &q.ctx, text)?.ok_or_else(|| empty(path, "question", i))?);
        }
    }
    let Scores { nats, tokens, .. } = ask(loaded, asked)?;
    let (mut at, mut by_sum, mut by_mean) = (0, 0, 0);
    for (q, right) in questions.iter().zip(rights) {
        let to = at + q.endings.len();
        let means: Vec<f64> = (at..to).map(|i| nats[i] / tokens[i] as f64).collect();
        by_sum += usize::from(least(&nats[at..to]) == Some(right));
        by_mean += usize::from(least(&means) == Some(right));
        at = to;
    }
    let n = questions.len();
    let ((sum, sum_error), (mean, mean_error)) = (share(by_sum, n), share(by_mean, n));
    if json {
        let line = json!({
            "model": loaded.folder, "test": "hellaswag", "style": "llm.c", "accuracy": sum, "error": sum_error,
            "accuracy_norm": mean, "error_norm": mean_error, "questions": n,
        });
        return print_line!("{line}");
    }
    print_line!(
        "HellaSwag in the style of llm.c: accuracy {sum:.4} (standard error {sum_error:.4}), normalised by tokens {mean:.4} ({mean_error:.4}), \
         of {n} {}",
        if n == 1 { "question" } else { "questions" }
    )
}
