//! What `config.json` says, and what in it asks for something else than this decoder computes.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::LoadError;
use crate::attention::{Attention, Dense};
use crate::config::ModelConfig;
use crate::rope::RopeScaling;

/// What is read of `config.json`.
#[derive(Deserialize)]
pub(super) struct File {
    model_type: String,
    pub vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    #[serde(default)]
    layer_types: Vec<String>,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    initializer_range: Option<f64>,
    dashlab: Option<DashLab>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

/// Keys that change what a model of another kind computes, with the value at which they change nothing.
const NEUTRAL: [(&str, Neutral); 18] = [
    ("rope_interleaved", Neutral::False),
    ("use_mrope", Neutral::False),
    ("qk_norm", Neutral::False),
    ("use_qk_norm", Neutral::False),
    ("quantization_config", Neutral::Null),
    ("final_logit_softcapping", Neutral::Null),
    ("attn_logit_softcapping", Neutral::Null),
    ("clip_qkv", Neutral::Null),
    ("logit_scale", Neutral::One),
    ("scale_emb", Neutral::One),
    ("partial_rotary_factor", Neutral::One),
    // transformers sees later tokens with it
    ("is_causal", Neutral::True),
    // Granite's blocks are a Llama's but for these
    ("attention_multiplier", Neutral::Null),
    ("embedding_multiplier", Neutral::One),
    ("residual_multiplier", Neutral::One),
    ("logits_scaling", Neutral::One),
    // SmolLM3 leaves the rotation out of some layers
    ("no_rope_layers", Neutral::Null),
    ("no_rope_layer_interval", Neutral::Null),
];

/// The same in the table of the rotary angles, where every other key is refused that is not read.
const NEUTRAL_ROPE: [&str; 2] = ["partial_rotary_factor", "attention_factor"];

/// A value that changes nothing; null never does.
#[derive(Clone, Copy)]
enum Neutral {
    Null,
    False,
    True,
    One,
}

impl Neutral {
    fn is(self, value: &Value) -> bool {
        value.is_null()
            || match self {
                Neutral::Null => false,
                Neutral::False => *value == Value::Bool(false),
                Neutral::True => *value == Value::Bool(true),
                Neutral::One => value.as_f64() == Some(1.0),
            }
    }

    fn told(self) -> &'static str {
        match self {
            Neutral::Null => "null",
            Neutral::False => "false",
            Neutral::True => "true",
            Neutral::One => "1.0",
        }
    }
}

/// The rotary angles: `rope_parameters` of newer files, `rope_scaling` of older ones.
#[derive(Deserialize)]
struct Rope {
    rope_type: Option<String>,
    /// The earlier name of `rope_type`, which some versions of transformers wrote beside it.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl Rope {
    /// How it stretches the angles, or what is asked for that this decoder does not compute.
    fn scaling(&self) -> Result<Option<RopeScaling>, String> {
        if let (Some(new), Some(earlier)) = (&self.rope_type, &self.r#type)
            && new != earlier
        {
            return Err(format!("rope_type is {new:?} and type, its earlier name, {earlier:?}; give one of them"));
        }
        let neutral =
            |key: &str, value: &Value| value.is_null() || NEUTRAL_ROPE.contains(&key) && Neutral::One.is(value);
        if let Some((key, value)) = self.rest.iter().find(|(key, value)| !neutral(key, value)) {
            return Err(format!(
                "{key} is {value} among the rotary angles, expected nothing: this decoder does not know it"
            ));
        }
        match self.rope_type.as_deref().or(self.r#type.as_deref()) {
            None | Some("default") if self.factor.is_none_or(|f| f == 1.0) => Ok(None),
            Some("llama3") => {
                let needed =
                    |key: &str, x: Option<f64>| x.ok_or(format!("{key} is missing, which rope_type \"llama3\" needs"));
                let original = self.original_max_position_embeddings;
                Ok(Some(RopeScaling {
                    factor: needed("factor", self.factor)?,
                    low_freq_factor: needed("low_freq_factor", self.low_freq_factor)?,
                    high_freq_factor: needed("high_freq_factor", self.high_freq_factor)?,
                    original_positions: original
                        .ok_or("original_max_position_embeddings is missing, which rope_type \"llama3\" needs")?,
                }))
            }
            other => {
                let factor = self.factor.map_or(String::new(), |f| format!(" with factor {f}"));
                let told = other.map_or("left out".to_string(), |name| format!("{name:?}"));
                Err(format!("rope_type is {told}{factor}, expected \"default\" or \"llama3\""))
            }
        }
    }
}

/// What the Llama's keys do not say.
#[derive(Deserialize)]
struct DashLab {
    attention: Attention,
    #[serde(default)]
    qkv_bias: bool,
    #[serde(default)]
    qk_norm: bool,
}

/// Kinds of models whose blocks are computed here.
const MODEL_TYPES: [&str; 4] = ["llama", "qwen2", "qwen3", "dashlab"];

/// What is read first.
#[derive(Deserialize)]
struct Kind {
    model_type: Option<String>,
}

/// What to tell of a kind of model that is none of those.
fn other_kind(kind: &str) -> Option<String> {
    let expected = "\"llama\", \"qwen2\", \"qwen3\" or \"dashlab\"";
    (!MODEL_TYPES.contains(&kind)).then(|| format!("model_type is {kind:?}, expected {expected}"))
}

impl File {
    /// From the bytes of the file; `path` names it in messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, LoadError> {
        let damaged = |e: serde_json::Error| LoadError::Damaged { path: path.to_path_buf(), what: e.to_string() };
        let kind: Kind = serde_json::from_slice(bytes).map_err(damaged)?;
        // first: of another kind of model the keys have other names
        if let Some(what) = kind.model_type.as_deref().and_then(other_kind) {
            return Err(LoadError::Unfit { path: path.to_path_buf(), what });
        }
        serde_json::from_slice(bytes).map_err(damaged)
    }

    /// The keys that ask for something else than this decoder computes, with what it computes.
    pub fn refusals(&self) -> Vec<String> {
        let mut out = Vec::new();
        if let Some(other) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            out.push(format!("hidden_act is {other:?}, expected \"silu\""));
        }
        out.extend(self.scaling().err());
        out.extend(self.theta().err());
        let biases = [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)];
        out.extend(biases.iter().filter(|(_, on)| *on).map(|(key, _)| format!("{key} is true, expected false")));
        // Qwen names a window in every file, and says beside it whether it is used
        match (self.sliding_window, self.use_sliding_window) {
            (_, Some(true)) => out.push("use_sliding_window is true, expected false or nothing".into()),
            (Some(n), None) => out.push(format!("sliding_window is {n}, expected null or nothing")),
            (_, Some(false)) | (None, None) => {}
        }
        if let Some(kind) = self.layer_types.iter().find(|kind| *kind != "full_attention") {
            out.push(format!("layer_types has {kind:?}, expected \"full_attention\" everywhere"));
        }
        for (key, neutral) in &NEUTRAL {
            match self.rest.get(*key) {
                Some(value) if !neutral.is(value) => {
                    out.push(format!("{key} is {value}, expected {} or nothing", neutral.told()));
                }
                _ => {}
            }
        }
        if self.model_type == "dashlab" && self.dashlab.is_none() {
            out.push("model_type is \"dashlab\", but there is no dashlab.attention".into());
        }
        out
    }

    /// The tables of the rotary angles: files have one, or one under both names.
    fn ropes(&self) -> impl Iterator<Item = &Rope> {
        self.rope_scaling.iter().chain(&self.rope_parameters)
    }

    fn scaling(&self) -> Result<Option<RopeScaling>, String> {
        let all = self.ropes().map(Rope::scaling).collect::<Result<Vec<_>, _>>()?;
        match all.windows(2).all(|two| two[0] == two[1]) {
            true => Ok(all.first().copied().flatten()),
            false => Err("rope_scaling and rope_parameters stretch the angles differently; give one of them".into()),
        }
    }

    /// The base of the angles, where it is said; it may be said in several places.
    fn theta(&self) -> Result<Option<f64>, String> {
        let all: Vec<f64> = self.rope_theta.into_iter().chain(self.ropes().filter_map(|r| r.rope_theta)).collect();
        match all.iter().find(|theta| **theta != all[0]) {
            Some(other) => Err(format!("rope_theta is {} and {other}; give one of them", all[0])),
            None => Ok(all.first().copied()),
        }
    }

    /// The model that it describes, where nothing is refused.
    pub fn model(&self) -> ModelConfig {
        let heads = (self.num_attention_heads, self.num_key_value_heads.unwrap_or(self.num_attention_heads));
        let usual = ModelConfig::new(self.num_hidden_layers, self.hidden_size, heads, self.intermediate_size);
        ModelConfig {
            head_dim: self.head_dim.unwrap_or(usual.head_dim),
            rope_theta: self.theta().ok().flatten().unwrap_or(usual.rope_theta),
            norm_eps: self.rms_norm_eps,
            tie_embeddings: self.tie_word_embeddings,
            init_std: self.initializer_range.unwrap_or(usual.init_std),
            rope_scaling: self.scaling().ok().flatten(),
            qkv_bias: self.model_type == "qwen2" || self.dashlab.as_ref().is_some_and(|own| own.qkv_bias),
            qk_norm: self.model_type == "qwen3" || self.dashlab.as_ref().is_some_and(|own| own.qk_norm),
            attention: self.dashlab.as_ref().map_or(Dense {}.into(), |own| own.attention),
            ..usual
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Described;
    use super::*;

    /// The `config.json` of a small Llama 3 as transformers saved it, changed.
    fn read(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, String> {
        let mut value: Value =
            serde_json::from_slice(include_bytes!("../../tests/fixtures/llama3-f32/config.json")).unwrap();
        change(&mut value);
        let read = Described::parse(value.to_string().as_bytes(), Path::new("config.json"));
        read.map(|d| d.config).map_err(|e| e.to_string())
    }

    /// Moves the angles to where versions 4 of transformers have them.
    fn earlier(value: &mut Value) {
        let mut rope = value["rope_parameters"].take();
        value["rope_theta"] = rope.as_object_mut().unwrap().remove("rope_theta").unwrap();
        value["rope_scaling"] = rope;
    }

    #[test]
    fn angles_are_those_of_every_version_of_transformers() {
        let plain = read(|_| {}).unwrap();
        assert_eq!((plain.rope_theta, plain.rope_scaling.unwrap().original_positions), (500.0, 16));
        let same: [fn(&mut Value); 6] = [
            earlier,
            // 4.43 to 4.57 keep the earlier name beside the new one
            |v| {
                earlier(v);
                v["rope_scaling"]["type"] = json!("llama3");
            },
            |v| {
                earlier(v);
                let rope = v["rope_scaling"].as_object_mut().unwrap();
                let name = rope.remove("rope_type").unwrap();
                rope.insert("type".into(), name);
            },
            |v| v["rope_scaling"] = v["rope_parameters"].clone(),
            |v| v["rope_theta"] = json!(500),
            |v| {
                v["partial_rotary_factor"] = json!(1.0);
                v["rope_parameters"]["partial_rotary_factor"] = json!(1);
                v["rope_parameters"]["attention_factor"] = Value::Null;
            },
        ];
        for (i, change) in same.into_iter().enumerate() {
            assert_eq!(read(change).as_ref(), Ok(&plain), "{i}");
        }
        let default = read(|v| v["rope_parameters"] = json!({"rope_type": "default", "type": "default"})).unwrap();
        assert_eq!((default.rope_theta, default.rope_scaling), (1e4, None));
    }

    #[test]
    fn angles_that_are_not_computed_or_contradict_each_other_are_refused() {
        let told = |change: fn(&mut Value), what: &str| {
            let e = read(change).unwrap_err();
            assert!(e.starts_with("config.json: ") && e.contains(what), "{e}");
        };
        told(|v| v["rope_parameters"]["partial_rotary_factor"] = json!(0.5), "partial_rotary_factor is 0.5 among the");
        told(|v| v["rope_parameters"]["attention_factor"] = json!(1.2), "attention_factor is 1.2 among the rotary");
        told(|v| v["partial_rotary_factor"] = json!(0.5), "partial_rotary_factor is 0.5, expected 1.0 or nothing");
        told(|v| v["use_mrope"] = json!(true), "use_mrope is true, expected false or nothing");
        // angles by kind of layer
        told(|v| v["rope_parameters"] = json!({"full_attention": v["rope_parameters"].clone()}), "full_attention is {");
        told(
            |v| v["rope_parameters"]["type"] = json!("yarn"),
            "rope_type is \"llama3\" and type, its earlier name, \"yarn\"",
        );
        told(|v| v["rope_theta"] = json!(1e4), "rope_theta is 10000 and 500; give one of them");
        let unlike = |v: &mut Value| v["rope_scaling"] = json!({"rope_type": "default"});
        told(unlike, "rope_scaling and rope_parameters stretch the angles differently");
    }

    #[test]
    fn keys_of_other_decoders_are_refused_unless_they_change_nothing() {
        for (key, neutral, changes) in [
            ("is_causal", json!(true), json!(false)),
            ("embedding_multiplier", json!(1.0), json!(12.0)),
            ("residual_multiplier", json!(1), json!(0.22)),
            ("logits_scaling", Value::Null, json!(8)),
            ("attention_multiplier", Value::Null, json!(0.015625)),
            ("no_rope_layers", Value::Null, json!([1, 1, 1, 0])),
        ] {
            assert!(read(|v| v[key] = neutral.clone()).is_ok(), "{key} = {neutral}");
            let told = read(|v| v[key] = changes.clone()).unwrap_err();
            assert!(told.contains(&format!("{key} is {changes}, expected")), "{told}");
        }
    }

    #[test]
    fn another_kind_of_model_is_told_by_its_name() {
        let gpt2 = json!({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257});
        let e = read(|v| *v = gpt2).unwrap_err();
        assert!(e.starts_with("config.json: model_type is \"gpt2\", expected \"llama\", \"qwen2\""), "{e}");
        let e = read(|v| *v = json!({"vocab_size": 3})).unwrap_err();
        assert!(e.contains("is damaged: missing field `model_type`"), "{e}");
    }
}
