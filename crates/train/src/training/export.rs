//! A folder that the Python world loads, with the proof that it computes the same.

use std::path::Path;

use anyhow::Context;
use dash_core::ops::attention::Center;
use dash_data::Tokenizer;
use dash_model::{Attention, Dash, Model};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::checkpoint::write_safetensors;
use crate::config::Config;

/// Why the public `dash_attn` package cannot run a model, if it cannot.
fn beyond_public_package(a: &Attention, head_dim: usize, positions: usize) -> Option<String> {
    let Attention::Dash(d) = a else { return Some("its attention is not DashAttention".into()) };
    let power = |n: usize| n >= 16 && n.is_power_of_two();
    if d.alpha != 1.5 {
        return Some(format!("alpha is {}, the package has 1.5", d.alpha));
    }
    if d.diagonal {
        return Some("it has a learned diagonal".into());
    }
    if d.center == Center::None && d.sigma != 1.0 {
        return Some(format!("sigma is {} without centring, the package has 1", d.sigma));
    }
    if !power(d.chunk_size) || !power(head_dim) {
        return Some(format!(
            "chunk size {} and head width {head_dim} must be powers of two, 16 or more",
            d.chunk_size
        ));
    }
    (positions.div_ceil(d.chunk_size) > 512).then(|| "it has more than 512 chunks".into())
}

fn config_json(config: &Config, end_of_text: u32) -> Value {
    let m = &config.model;
    let mut json = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.data.vocab_size,
        "hidden_size": m.width, "intermediate_size": m.ffn, "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads, "num_key_value_heads": m.kv_heads, "head_dim": m.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.data.seq_len, "initializer_range": m.init_std, "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta, "rope_scaling": null,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "attention_bias": false, "attention_dropout": 0.0, "mlp_bias": false, "tie_word_embeddings": m.tie_embeddings,
        "bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text, "use_cache": true,
        "torch_dtype": "float32", "dtype": "float32", "transformers_version": "4.56.0",
        "dashlab": {"attention": m.attention},
    });
    if m.attention != Attention::Dense {
        json["auto_map"] = json!({
            "AutoConfig": "modeling_dashlab.DashLabConfig", "AutoModelForCausalLM": "modeling_dashlab.DashLabForCausalLM",
        });
        if !matches!(m.attention, Attention::Dash(_)) {
            // no public loader knows these: a name that stock transformers refuses instead of computing a dense Llama
            json["model_type"] = json!("dashlab");
            json["architectures"] = json!(["DashLabForCausalLM"]);
        }
    }
    if let Attention::Dash(Dash { chunk_size, gamma, sigma, center, .. }) = m.attention {
        json["chunk_size"] = json!(chunk_size);
        json["scaling_factor"] = json!(gamma);
        json["sigma"] = json!(sigma);
        json["estimate_diagonal"] = json!(center != Center::None);
    }
    json
}

fn readme(config: &Config) -> String {
    let m = &config.model;
    let how = match (&m.attention, beyond_public_package(&m.attention, m.head_dim, config.data.seq_len)) {
        (Attention::Dense, _) => "This is a dense Llama: `transformers.LlamaForCausalLM.from_pretrained(folder)` computes the logits \
            in `parity.safetensors`."
            .to_string(),
        (Attention::Dash(_), None) => "This is a DashAttention model. The public `dash_attn` package loads it \
            (`dash_attn.models.llama.LlamaForCausalLM`), and `AutoModelForCausalLM.from_pretrained(folder, \
            trust_remote_code=True)` with the `modeling_dashlab.py` beside this file. Stock `transformers` without \
            `trust_remote_code` loads it too, as a dense Llama that ignores `self_attn.indexer_q`: that is another function, \
            and its logits differ from `parity.safetensors`."
            .to_string(),
        (a, why) => format!(
            "This is a model with {} attention{}. `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` computes \
             the logits in `parity.safetensors` with the `modeling_dashlab.py` beside this file; no other public loader knows it.",
            a.kind(),
            why.map_or(String::new(), |why| format!(" ({why})"))
        ),
    };
    format!(
        "# {}\n\nExported by DashLab from `config.toml` beside this file.\n\n{how}\n\n`parity.safetensors` holds `ids` [1, t] and the \
         `logits` [1, t, vocab] that this engine computes for them in f32; `oracle/check_export.py` of DashLab compares.\n",
        config.run.name
    )
}

/// Writes the folder.
///
/// # Errors
/// When a file cannot be written.
pub fn export(
    model: &Model,
    config: &Config,
    tokenizer: Option<&Tokenizer>,
    sample: &[u32],
    out: &Path,
) -> anyhow::Result<()> {
    // the values that training ended with, where a schedule or a controller moved them
    let config = &Config { model: model.config().clone(), ..config.clone() };
    std::fs::create_dir_all(out).with_context(|| format!("{} cannot be created", out.display()))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("{} cannot be written", path.display()))
    };
    let pretty = |v: Value| serde_json::to_vec_pretty(&v);
    let end = dash_data::END_OF_TEXT;
    let end_id = tokenizer.map_or(0, Tokenizer::end_of_text);
    write_safetensors(&out.join("model.safetensors"), model.params().iter().map(|p| (p.name.clone(), &p.value)))?;
    write("config.json", &pretty(config_json(config, end_id))?)?;
    if config.model.attention != Attention::Dense {
        write("modeling_dashlab.py", include_bytes!("../modeling_dashlab.py"))?;
    }
    write("config.toml", config.to_toml().as_bytes())?;
    let special = json!({"bos_token": end, "eos_token": end, "pad_token": end, "unk_token": end});
    let mut tokenizer_config = special.clone();
    tokenizer_config["tokenizer_class"] = json!("PreTrainedTokenizerFast");
    tokenizer_config["model_max_length"] = json!(config.data.seq_len);
    tokenizer_config["clean_up_tokenization_spaces"] = json!(false);
    if let Some(tokenizer) = tokenizer {
        write("tokenizer.json", tokenizer.json().as_bytes())?;
        write("tokenizer_config.json", &pretty(tokenizer_config)?)?;
        write("special_tokens_map.json", &pretty(special)?)?;
    }
    let generation = json!({
        "_from_model_config": true, "bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id,
        "transformers_version": "4.56.0",
    });
    write("generation_config.json", &pretty(generation)?)?;
    write("parity.safetensors", &parity(model, config, sample)?)?;
    write("README.md", readme(config).as_bytes())
}

/// ids and logits of a text of several chunks, ragged at the end where the sequence allows it.
fn parity(model: &Model, config: &Config, sample: &[u32]) -> anyhow::Result<Vec<u8>> {
    let chunk = config.model.attention.chunk_size().unwrap_or(32);
    let t = (4 * chunk + chunk / 2 + 1).min(config.data.seq_len);
    let ids = &sample[..t];
    let logits = model.logits(&ids.into(), 1)?;
    let ids: Vec<u8> = ids.iter().flat_map(|&id| (id as i64).to_le_bytes()).collect();
    let values: Vec<u8> = logits.as_slice::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect();
    let views = [
        ("ids", TensorView::new(Dtype::I64, vec![1, t], &ids)?),
        ("logits", TensorView::new(Dtype::F32, logits.shape().to_vec(), &values)?),
    ];
    Ok(safetensors::serialize(views, Some([("format".to_string(), "pt".to_string())].into()))?)
}
