//! The model card of an export: README.md with the front matter that the Hugging Face Hub reads.

use std::fmt::Write;

use dash_data::Source;
use dash_model::attention::{Export, Loader};

use super::loaded::Loaded;
use crate::config::word;

/// What the Hub sorts models by. The licence is the user's to choose: it depends on the text, which this program does not know.
fn front_matter(loaded: &Loaded) -> String {
    let kind = loaded.config.model.attention.kind();
    let mut out = String::from(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n# license: apache-2.0   (yours to choose: it depends on the \
         text, too)\n# language: en\ntags:\n- dashlab\n- pretrained\n",
    );
    let sparse = if kind == "dense" { "" } else { "- sparse-attention\n" };
    _ = writeln!(out, "- {kind}\n{sparse}---");
    out
}

/// How to use it, in Python.
fn usage(export: &Export) -> String {
    let trust = if export.loader == Loader::Stock { "" } else { ", trust_remote_code=True" };
    format!(
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\ntokenizer = \
         AutoTokenizer.from_pretrained(folder{trust})\nmodel = AutoModelForCausalLM.from_pretrained(folder{trust})\ninputs = \
         tokenizer([\"Once\", \"A longer prompt\"], return_tensors=\"pt\", padding=True)\nprint(tokenizer.batch_decode(\
         model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True))\n```\n"
    )
}

/// What it was trained on and how, as a table.
fn training(loaded: &Loaded, attended: Option<f64>) -> String {
    let (c, m) = (&loaded.config, &loaded.config.model);
    let data = match (&c.task, c.data.source) {
        (Some(task), _) => format!("synthetic task `{}`", word(&task.kind)),
        (None, Source::Cargo) => "source code of the Rust packages that DashLab depends on".to_string(),
        (None, Source::Text) => "text given by the user".to_string(),
        (None, Source::Tokens) => "token ids given by the user".to_string(),
    };
    let mut rows = vec![("data", data)];
    rows.extend(c.init.as_ref().map(|init| ("weights before", format!("`{}`", init.from.display()))));
    if let Some(t) = &loaded.trained {
        rows.push(("data_hash", format!("`{}`", t.data_hash)));
        rows.push(("updates, tokens", format!("{}, {}", t.step, t.tokens)));
        if let Some(loss) = t.validation_loss {
            rows.push(("validation loss", format!("{loss:.4} nats a token (perplexity {:.2})", loss.exp())));
        }
        rows.push(("trained by", t.build.clone()));
    }
    let o = &c.optim;
    rows.extend([
        ("sequence, tokens an update", format!("{}, {}", c.data.seq_len, c.tokens_per_step())),
        ("optimiser", {
            let (kind, schedule) = (word(&o.kind), word(&o.schedule));
            format!(
                "{kind}, lr {:e}, {schedule}, {} warmup updates, weight decay {}, clip {}",
                o.lr, o.warmup_steps, o.weight_decay, o.clip
            )
        }),
        ("seed", c.run.seed.to_string()),
        ("parameters", loaded.model.params().numel().to_string()),
        (
            "layers, width, heads, kv heads, ffn",
            format!("{}, {}, {}, {}, {}", m.layers, m.width, m.heads, m.kv_heads, m.ffn),
        ),
        ("vocabulary", c.data.vocab_size.to_string()),
        ("attention", {
            let key =
                |k: &dash_model::attention::keys::Key| m.attention.value(k.name).map(|v| format!("{} = {v}", k.name));
            let keys: Vec<String> = m.attention.keys().iter().filter_map(key).collect();
            format!("`{}` {}", m.attention.kind(), keys.join(", "))
        }),
    ]);
    if let Some(attended) = attended {
        let visible = (c.data.seq_len as f64 + 1.0) / 2.0;
        let share = 100.0 * attended / visible;
        rows.push((
            "attended tokens",
            format!(
                "{attended:.1} a query, {share:.1} % of the {visible} that it sees on average, in a validation sequence"
            ),
        ));
    }
    rows.iter().fold("| | |\n|---|---|\n".to_string(), |mut out, (name, value)| {
        _ = writeln!(out, "| {name} | {} |", value.replace('|', "\\|"));
        out
    })
}

/// The whole README.md. `attended` is the mean number of keys that a query of a validation sequence attends, where there is one.
pub fn card(loaded: &Loaded, export: &Export, attended: Option<f64>) -> String {
    let (c, positions) = (&loaded.config, loaded.config.data.seq_len);
    let limits = match &c.init {
        None => format!("Trained from scratch on sequences of {positions} tokens: positions beyond were never seen."),
        Some(init) => format!(
            "Trained on sequences of {positions} tokens from the weights of `{}`, whose limits, and whose licence, go on; positions beyond \
             were not seen in this training.",
            init.from.display()
        ),
    };
    format!(
        "{}\n# {}\n\n{}\n\n## Use\n\n{}\n## Training\n\n{}\nEvery setting is in `config.toml`.\n\n## Limits\n\n{limits} It continues text; nothing taught it to answer, to \
         refuse or to be right. It may repeat what its text holds.\n\n## Proof of parity\n\n`parity.safetensors` holds `ids` [1, t] and the \
         `logits` [1, t, vocab] that DashLab computes for them in f32; `oracle/check_export.py` and `oracle/check_generation.py` of \
         DashLab compare.\n",
        front_matter(loaded),
        c.run.name.replace('\n', " "),
        export.note,
        usage(export),
        training(loaded, attended),
    )
}
