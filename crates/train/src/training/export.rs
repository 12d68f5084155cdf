//! A folder that the Python world loads, with the proof that it computes the same.

use std::path::Path;

use anyhow::Context;
use dash_data::Tokenizer;
use dash_model::attention::{Export, Loader};
use dash_model::{Model, ModelConfig};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::card::card;
use super::checkpoint::write_safetensors;
use super::knobs::attended_share;
use super::loaded::Loaded;
use crate::config::Config;

fn config_json(loaded: &Loaded, export: &Export, ids: &SpecialIds) -> Value {
    let config = &loaded.config;
    let m = &config.model;
    let mut json = json!({
        "architectures": [format!("{}ForCausalLM", stock(m))], "model_type": stock(m).to_lowercase(), "vocab_size": config.data.vocab_size,
        "hidden_size": m.width, "intermediate_size": m.ffn, "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads, "num_key_value_heads": m.kv_heads, "head_dim": m.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.data.seq_len, "initializer_range": m.init_std, "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta, "rope_parameters": rope(m),
        "attention_bias": false, "attention_dropout": 0.0, "mlp_bias": false, "tie_word_embeddings": m.tie_embeddings,
        "bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad, "use_cache": true,
        "torch_dtype": "float32", "dtype": "float32", "transformers_version": "4.56.0",
        "dashlab": {"attention": m.attention, "trained": loaded.trained},
    });
    if m.qkv_bias || m.qk_norm {
        (json["dashlab"]["qkv_bias"], json["dashlab"]["qk_norm"]) = (json!(m.qkv_bias), json!(m.qk_norm));
        json["use_sliding_window"] = json!(false);
    }
    if export.loader == Loader::Own {
        json["auto_map"] = json!({
            "AutoConfig": "modeling_dashlab.DashLabConfig", "AutoModelForCausalLM": "modeling_dashlab.DashLabForCausalLM",
        });
        // a name that stock transformers refuses instead of computing a dense Llama
        json["model_type"] = json!("dashlab");
        json["architectures"] = json!(["DashLabForCausalLM"]);
    }
    if m.rope_scaling.is_some() {
        // where earlier loaders look
        json["rope_scaling"] = json["rope_parameters"].clone();
    }
    for (key, value) in &export.keys {
        json[key] = json!(value);
    }
    json
}

/// The family of transformers whose block it is where the folder's own code does not load it.
fn stock(m: &ModelConfig) -> &'static str {
    if m.qk_norm { "Qwen3" } else { "Llama" }
}

/// The rotary angles under Hugging Face's names.
fn rope(m: &ModelConfig) -> Value {
    match m.rope_scaling {
        None => json!({"rope_type": "default", "rope_theta": m.rope_theta}),
        Some(s) => json!({
            "rope_type": "llama3", "rope_theta": m.rope_theta, "factor": s.factor, "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_positions,
        }),
    }
}

/// Ids of the tokens that Python asks for by their part, as training used them.
struct SpecialIds {
    bos: u32,
    eos: u32,
    pad: u32,
    unk: Option<u32>,
}

impl SpecialIds {
    /// A model without a tokenizer has none: 0. A text that begins with nothing follows the end of the one before.
    fn of(tokenizer: Option<&Tokenizer>) -> Self {
        let Some(t) = tokenizer else { return SpecialIds { bos: 0, eos: 0, pad: 0, unk: None } };
        let eos = t.end_of_text();
        SpecialIds { bos: t.bos().last().copied().unwrap_or(eos), eos, pad: t.padding(), unk: t.unknown() }
    }

    /// Their names, of which the Python world makes ids again: another name would be a new token behind the vocabulary.
    fn names(&self, tokenizer: &Tokenizer) -> Value {
        let name = |id| tokenizer.special(id).text;
        let unk = name(self.unk.unwrap_or(self.eos));
        json!({"bos_token": name(self.bos), "eos_token": name(self.eos), "pad_token": name(self.pad), "unk_token": unk})
    }
}

/// What an export computes with.
pub struct Sample {
    /// A sequence at least.
    pub ids: Vec<u32>,
    /// Whether they are of the validation, and not drawn because the text is gone.
    pub validates: bool,
}

/// Writes the folder.
///
/// # Errors
/// When a file cannot be written.
pub fn export(loaded: &Loaded, sample: &Sample, out: &Path) -> anyhow::Result<()> {
    let (config, model) = (&loaded.config, &loaded.model);
    let tokenizer = loaded.tokenizer.as_ref();
    let export = config.model.attention.export(&config.model, config.data.seq_len);
    std::fs::create_dir_all(out).with_context(|| format!("{} cannot be created", out.display()))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("{} cannot be written", path.display()))
    };
    let pretty = |v: Value| serde_json::to_vec_pretty(&v);
    let ids = SpecialIds::of(tokenizer);
    write_safetensors(&out.join("model.safetensors"), model.params().iter().map(|p| (p.name.clone(), &p.value)))?;
    write("config.json", &pretty(config_json(loaded, &export, &ids))?)?;
    if export.loader == Loader::Own {
        write("modeling_dashlab.py", include_bytes!("../modeling_dashlab.py"))?;
    }
    write("config.toml", config.to_toml().as_bytes())?;
    if let Some(tokenizer) = tokenizer {
        let special = ids.names(tokenizer);
        let mut tokenizer_config = special.clone();
        tokenizer_config["tokenizer_class"] = json!("PreTrainedTokenizerFast");
        tokenizer_config["model_max_length"] = json!(config.data.seq_len);
        tokenizer_config["clean_up_tokenization_spaces"] = json!(false);
        // a text is continued at its end, and the model takes no token types
        tokenizer_config["padding_side"] = json!("left");
        tokenizer_config["model_input_names"] = json!(["input_ids", "attention_mask"]);
        write("tokenizer.json", tokenizer.json().as_bytes())?;
        write("tokenizer_config.json", &pretty(tokenizer_config)?)?;
        write("special_tokens_map.json", &pretty(special)?)?;
    }
    let generation = json!({
        "bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad,
        "transformers_version": "4.56.0",
    });
    write("generation_config.json", &pretty(generation)?)?;
    write("parity.safetensors", &parity(model, config, &sample.ids)?)?;
    let attended = if sample.validates { Some(attended(model, &sample.ids[..config.data.seq_len])?) } else { None };
    write("README.md", card(loaded, &export, attended).as_bytes())
}

/// Mean keys that a query of a sequence attends.
fn attended(model: &Model, ids: &[u32]) -> dash_core::Result<f64> {
    let (t, ids) = (ids.len(), model.ids(ids, 1)?);
    let (_, traces) = model.nll((&ids, &ids), None)?;
    let listed = attended_share(&traces)?.map_or(0.0, |share| share * (t as f64 + 1.0) / 2.0);
    Ok(model.config().attention.attended(t, listed))
}

/// ids and logits of a text of several chunks, ragged at the end where the sequence allows it.
fn parity(model: &Model, config: &Config, sample: &[u32]) -> anyhow::Result<Vec<u8>> {
    let chunk = config.model.attention.chunk_size().unwrap_or(32);
    let t = (4 * chunk + chunk / 2 + 1).min(config.data.seq_len);
    let ids = &sample[..t];
    let logits = model.logits(&model.ids(ids, 1)?)?;
    let ids: Vec<u8> = ids.iter().flat_map(|&id| (id as i64).to_le_bytes()).collect();
    let values: Vec<u8> = logits.to_vec::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect();
    let views = [
        ("ids", TensorView::new(Dtype::I64, vec![1, t], &ids)?),
        ("logits", TensorView::new(Dtype::F32, logits.shape().to_vec(), &values)?),
    ];
    Ok(safetensors::serialize(views, Some([("format".to_string(), "pt".to_string())].into()))?)
}
