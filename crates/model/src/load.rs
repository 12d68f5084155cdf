//! A model from an exported folder: `config.json` and `model.safetensors` with Hugging Face's names for a Llama, and the attention,
//! where it is not dense, as the table `dashlab.attention` of `config.json`.

mod tensors;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use dash_core::{Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::attention::{Attention, Dense};
use crate::config::ModelConfig;
use crate::decoder::Model;
use crate::params::{Params, parameters};
use crate::rope::RopeScaling;
use tensors::{described_by, read};
pub use tensors::{parse_tensors, read_folder, read_tensors};

/// Why a file gives no model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The system does not give it.
    #[error("{} cannot be read: {what}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        what: std::io::Error,
    },
    /// It is not what its name says.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// It describes something that this crate does not compute, or does not belong to the other file.
    #[error("{}: {what}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What was found, and what is expected.
        what: String,
    },
}

/// What is read of `config.json`.
#[derive(Deserialize)]
struct File {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
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
const NEUTRAL: [(&str, Value); 10] = [
    ("rope_interleaved", Value::Bool(false)),
    ("qk_norm", Value::Bool(false)),
    ("use_qk_norm", Value::Bool(false)),
    ("quantization_config", Value::Null),
    ("final_logit_softcapping", Value::Null),
    ("attn_logit_softcapping", Value::Null),
    ("clip_qkv", Value::Null),
    ("logit_scale", Value::Null),
    ("scale_emb", Value::Null),
    ("partial_rotary_factor", Value::Null),
];

/// The rotary angles: `rope_parameters` of newer files, `rope_scaling` of older ones.
#[derive(Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

impl Rope {
    /// How it stretches the angles, or what is asked for that this decoder does not compute.
    fn scaling(&self) -> Result<Option<RopeScaling>, String> {
        match self.rope_type.as_deref() {
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

impl File {
    /// The keys that ask for something else than this decoder computes, with what it computes.
    fn refusals(&self) -> Vec<String> {
        let found = [
            (
                "model_type",
                &*self.model_type,
                "\"llama\", \"qwen2\", \"qwen3\" or \"dashlab\"",
                MODEL_TYPES.contains(&&*self.model_type),
            ),
            (
                "hidden_act",
                self.hidden_act.as_deref().unwrap_or("silu"),
                "\"silu\"",
                matches!(self.hidden_act.as_deref(), None | Some("silu")),
            ),
        ];
        let mut out: Vec<String> = found
            .iter()
            .filter(|(.., fits)| !fits)
            .map(|(key, value, expected, _)| format!("{key} is {value:?}, expected {expected}"))
            .collect();
        out.extend(self.scaling().err());
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
                Some(value) if value != neutral && !value.is_null() => {
                    out.push(format!("{key} is {value}, expected {neutral} or nothing"));
                }
                _ => {}
            }
        }
        if self.model_type == "dashlab" && self.dashlab.is_none() {
            out.push("model_type is \"dashlab\", but there is no dashlab.attention".into());
        }
        out
    }

    fn scaling(&self) -> Result<Option<RopeScaling>, String> {
        self.rope_scaling.as_ref().or(self.rope_parameters.as_ref()).map_or(Ok(None), Rope::scaling)
    }

    fn model(&self) -> ModelConfig {
        let heads = (self.num_attention_heads, self.num_key_value_heads.unwrap_or(self.num_attention_heads));
        let usual = ModelConfig::new(self.num_hidden_layers, self.hidden_size, heads, self.intermediate_size);
        let theta = self.rope_theta.or(self.rope_parameters.as_ref().and_then(|r| r.rope_theta));
        ModelConfig {
            head_dim: self.head_dim.unwrap_or(usual.head_dim),
            rope_theta: theta.unwrap_or(usual.rope_theta),
            norm_eps: self.rms_norm_eps,
            tie_embeddings: self.tie_word_embeddings,
            init_std: self.initializer_range.unwrap_or(usual.init_std),
            // what is no scaling was refused
            rope_scaling: self.scaling().ok().flatten(),
            qkv_bias: self.model_type == "qwen2" || self.dashlab.as_ref().is_some_and(|own| own.qkv_bias),
            qk_norm: self.model_type == "qwen3" || self.dashlab.as_ref().is_some_and(|own| own.qk_norm),
            attention: self.dashlab.as_ref().map_or(Dense {}.into(), |own| own.attention),
            ..usual
        }
    }
}

/// Rotary angles of a model at most, positions times head width: 2^28 take 1 GiB in f32, for 2 million tokens with heads of 128.
const MOST_ANGLES: usize = 1 << 28;

impl Model {
    /// The model of an exported folder, for sequences of up to its `max_position_embeddings` tokens, in f32. A Llama without
    /// `dashlab` in its `config.json` has dense attention.
    ///
    /// # Errors
    /// When a file is missing or damaged, `config.json` asks for something that this decoder does not compute, or the weights
    /// are not those of that configuration.
    pub fn load(folder: &Path, device: &Device) -> Result<Self, LoadError> {
        Described::of(folder)?.load(folder, device)
    }

    /// The model of a configuration with the weights of a `model.safetensors`, for sequences of up to `positions` tokens. The file has
    /// every parameter and nothing else; with tied embeddings `lm_head.weight` may be stored once more.
    ///
    /// # Errors
    /// When the file is missing or damaged, or its tensors are not the parameters of that configuration.
    pub fn from_file(
        weights: &Path,
        config: &ModelConfig,
        vocab: usize,
        positions: usize,
        device: &Device,
    ) -> Result<Self, LoadError> {
        Described { config: config.clone(), vocab, positions }.model(&read(weights)?, weights, device)
    }
}

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Whether two tensors hold the same numbers, bit by bit.
fn equal(a: &Tensor, b: &Tensor) -> bool {
    let bits = |x: &Tensor| x.to_vec::<f32>().map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<_>>()).ok();
    a.shape() == b.shape() && bits(a) == bits(b)
}

/// A model before it has weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// Extents and attention.
    pub config: ModelConfig,
    /// Tokens.
    pub vocab: usize,
    /// Longest sequence.
    pub positions: usize,
}

impl Described {
    /// From the bytes of a `config.json`; `path` names it in messages.
    ///
    /// # Errors
    /// When it is no such file, or asks for something that this decoder does not compute.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, LoadError> {
        let file = serde_json::from_slice::<File>(bytes);
        let file = file.map_err(|e| LoadError::Damaged { path: path.to_path_buf(), what: e.to_string() })?;
        let unfit = |what: String| LoadError::Unfit { path: path.to_path_buf(), what };
        let refusals = file.refusals();
        if !refusals.is_empty() {
            return Err(unfit(refusals.join("; ")));
        }
        let config = file.model();
        config.check().map_err(|e| unfit(e.to_string()))?;
        parameters(&config, file.vocab_size).map_err(|e| unfit(e.to_string()))?;
        let positions = file.max_position_embeddings;
        let most = MOST_ANGLES / config.head_dim;
        if !(1..=most).contains(&positions) {
            return Err(unfit(format!(
                "max_position_embeddings is {positions}, expected 1 to {most} with heads of {}; a smaller one serves all texts up to its \
                 length",
                config.head_dim
            )));
        }
        Ok(Described { config, vocab: file.vocab_size, positions })
    }

    /// Of an exported folder or one of Hugging Face.
    ///
    /// # Errors
    /// As [`Described::parse`], or when there is no `config.json`.
    pub fn of(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("config.json");
        Described::parse(&read(&path)?, &path)
    }

    /// With the weights of a folder: `model.safetensors`, or the files that its index names.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load(self, folder: &Path, device: &Device) -> Result<Model, LoadError> {
        self.with(read_folder(folder, device)?, &described_by(folder))
    }

    /// With the bytes of a `model.safetensors`; `path` names it in messages.
    ///
    /// # Errors
    /// As [`Model::from_file`].
    pub fn model(self, bytes: &[u8], path: &Path, device: &Device) -> Result<Model, LoadError> {
        let tensors = parse_tensors(bytes, path, device)?;
        self.with(tensors, path)
    }

    /// With tensors by name, all of which are used; `path` names them in messages.
    fn with(self, mut tensors: HashMap<String, Tensor>, path: &Path) -> Result<Model, LoadError> {
        let unfit = |what: String| LoadError::Unfit { path: path.to_path_buf(), what };
        let Described { config, vocab, positions } = self;
        let params = Params::from_named(&config, vocab, |name| tensors.remove(name));
        let params = params.map_err(|e| unfit(e.to_string()))?;
        if config.tie_embeddings
            // some writers store the embedding once more under this name
            && let Some(head) = tensors.remove(HEAD)
            && !params.get(EMBEDDING).is_some_and(|embedding| equal(embedding, &head))
        {
            return Err(unfit(format!(
                "{HEAD} is not {EMBEDDING}, though the configuration ties them; set tie_word_embeddings to false to keep both, or take \
                 {HEAD} out of the file"
            )));
        }
        if let Some(name) = tensors.keys().min() {
            return Err(unfit(format!("{name} belongs to no parameter of the model that the configuration describes")));
        }
        if let Some(bad) = params.iter().find(|p| p.value.is_finite() == Ok(false)) {
            let what = "holds a number that is not finite (NaN or infinity), so that nothing can be computed with it";
            return Err(unfit(format!("{} {what}; take the weights of an earlier checkpoint", bad.name)));
        }
        Model::with_params(config, params, positions).map_err(|e| unfit(e.to_string()))
    }
}
