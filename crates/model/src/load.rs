//! A model from an exported folder: `config.json` and `model.safetensors` with Hugging Face's names for a Llama, and the attention,
//! where it is not dense, as the table `dashlab.attention` of `config.json`.

mod file;
mod tensors;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dash_core::{Device, Tensor};

use crate::config::ModelConfig;
use crate::decoder::Model;
use crate::params::{Params, parameters};
use file::File;
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

/// The frequencies of a layer's angles, which transformers wrote beside the weights before 4.32 (Llama 2 has them).
fn is_buffer_of_angles(name: &str) -> bool {
    name.starts_with("model.layers.") && name.ends_with(".self_attn.rotary_emb.inv_freq")
}

/// Whether a tensor has these frequencies: to a hundredth, and to the smallest f16, in which they may have been rounded (bf16: 2^-9).
fn has_angles(tensor: &Tensor, frequencies: &[f64]) -> bool {
    let near = |(x, f): (f64, &f64)| (x - f).abs() <= 0.01 * f + 2f64.powi(-24);
    let found = tensor.to_f64().unwrap_or_default();
    found.len() == frequencies.len() && found.into_iter().zip(frequencies).all(near)
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
        let unfit = |what: String| LoadError::Unfit { path: path.to_path_buf(), what };
        let file = File::parse(bytes, path)?;
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
        for name in tensors.keys().filter(|name| is_buffer_of_angles(name)) {
            if !has_angles(&tensors[name], &config.rope_frequencies()) {
                return Err(unfit(format!(
                    "{name} holds other rotary angles than the configuration describes; mend rope_theta, or take it out of the file"
                )));
            }
        }
        tensors.retain(|name, _| !is_buffer_of_angles(name));
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
