//! A model from an exported folder: `config.json` and `model.safetensors` with Hugging Face's names for a Llama, and the attention,
//! where it is not dense, as the table `dashlab.attention` of `config.json`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dash_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;

use crate::attention::{Attention, Dense};
use crate::config::ModelConfig;
use crate::decoder::Model;
use crate::params::{Params, parameters};

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

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|what| LoadError::Read { path: path.to_path_buf(), what })
}

/// The tensors of a safetensors file, by name.
///
/// # Errors
/// When the file cannot be read or is no safetensors file, a tensor is not f32, or the device has no memory left.
pub fn read_tensors(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>, LoadError> {
    parse_tensors(&read(path)?, path, device)
}

/// As [`read_tensors`], from the bytes of the file; `path` names it in messages.
///
/// # Errors
/// As [`read_tensors`].
pub fn parse_tensors(bytes: &[u8], path: &Path, device: &Device) -> Result<HashMap<String, Tensor>, LoadError> {
    let damaged = |what: String| LoadError::Damaged { path: path.to_path_buf(), what };
    let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))?;
    let mut out = HashMap::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(damaged(format!("tensor {name} is {:?}, expected F32", view.dtype())));
        }
        let data: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let tensor =
            Tensor::from_vec(device, view.shape(), data).map_err(|e| damaged(format!("tensor {name}: {e}")))?;
        out.insert(name, tensor);
    }
    Ok(out)
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
    #[serde(default)]
    rope_scaling: Value,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    initializer_range: Option<f64>,
    dashlab: Option<DashLab>,
}

/// Where newer loaders look for the rotary angles.
#[derive(Deserialize)]
struct Rope {
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

/// What the Llama's keys do not say.
#[derive(Deserialize)]
struct DashLab {
    attention: Attention,
}

impl File {
    /// The keys that ask for something else than this decoder computes, with what it computes.
    fn refusals(&self) -> Vec<String> {
        let rope_type = self.rope_parameters.as_ref().and_then(|r| r.rope_type.as_deref());
        let found = [
            (
                "model_type",
                &*self.model_type,
                "\"llama\" or \"dashlab\"",
                ["llama", "dashlab"].contains(&&*self.model_type),
            ),
            (
                "hidden_act",
                self.hidden_act.as_deref().unwrap_or("silu"),
                "\"silu\"",
                matches!(self.hidden_act.as_deref(), None | Some("silu")),
            ),
            ("rope_type", rope_type.unwrap_or("default"), "\"default\"", matches!(rope_type, None | Some("default"))),
        ];
        let mut out: Vec<String> = found
            .iter()
            .filter(|(.., fits)| !fits)
            .map(|(key, value, expected, _)| format!("{key} is {value:?}, expected {expected}"))
            .collect();
        if !self.rope_scaling.is_null() {
            out.push(format!("rope_scaling is {}, expected null", self.rope_scaling));
        }
        let biases = [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)];
        out.extend(biases.iter().filter(|(_, on)| *on).map(|(key, _)| format!("{key} is true, expected false")));
        if self.model_type == "dashlab" && self.dashlab.is_none() {
            out.push("model_type is \"dashlab\", but there is no dashlab.attention".into());
        }
        out
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
        let (path, weights) = (folder.join("config.json"), folder.join("model.safetensors"));
        let described = Described::parse(&read(&path)?, &path)?;
        described.model(&read(&weights)?, &weights, device)
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

    /// With the bytes of a `model.safetensors`; `path` names it in messages.
    ///
    /// # Errors
    /// As [`Model::from_file`].
    pub fn model(self, bytes: &[u8], path: &Path, device: &Device) -> Result<Model, LoadError> {
        let unfit = |what: String| LoadError::Unfit { path: path.to_path_buf(), what };
        let Described { config, vocab, positions } = self;
        let mut tensors = parse_tensors(bytes, path, device)?;
        let params = Params::from_named(&config, vocab, |name| tensors.remove(name));
        let params = params.map_err(|e| unfit(e.to_string()))?;
        if config.tie_embeddings {
            // some writers store the embedding once more under this name
            tensors.remove("lm_head.weight");
        }
        if let Some(name) = tensors.keys().min() {
            return Err(unfit(format!("{name} belongs to no parameter of the model that the configuration describes")));
        }
        Model::with_params(config, params, positions).map_err(|e| unfit(e.to_string()))
    }
}
