//! The parameters: names, shapes, decay and initialisation, in one place.
//!
//! | parameter | initial value |
//! |---|---|
//! | norms | 1 |
//! | `self_attn.indexer_q`, `self_attn.diagonal`, `self_attn.compress_position` | 0 (mean pooling; no bias) |
//! | `self_attn.compress_k`, `self_attn.compress_v` | normal, `1 / sqrt(length d)`: a compressed key has a key's size |
//! | `o_proj`, `down_proj` (into the residual stream) | normal, `init_std / sqrt(2 layers)` |
//! | every other matrix | normal, `init_std` |
//!
//! Each parameter draws from its own random stream, chosen by its name: two models that differ in their attention start
//! from equal values wherever both have the parameter.

use dash_core::rng::Rng;
use dash_core::{DType, Device, Tensor};

use crate::config::{Attention, ModelConfig};

/// A named tensor.
#[derive(Debug, Clone)]
pub struct Param {
    /// Hugging Face name.
    pub name: String,
    /// Value.
    pub value: Tensor,
}

/// All parameters in a fixed order.
#[derive(Debug, Clone)]
pub struct Params(Vec<Param>);

/// Where each parameter stands among those of its block; see [`block_shapes`].
pub(crate) struct Slots {
    /// number of parameters of a block
    pub count: usize,
    pub input_norm: usize,
    pub q: usize,
    pub k: usize,
    pub v: usize,
    pub o: usize,
    pub indexer: Option<usize>,
    pub diagonal: Option<usize>,
    pub nsa: Option<NsaSlots>,
    pub post_norm: usize,
    pub gate: usize,
    pub up: usize,
    pub down: usize,
}

/// Parameters of native sparse attention. The chosen chunks use `k_proj` and `v_proj`; the compressed and the sliding
/// branch have their own.
pub(crate) struct NsaSlots {
    pub k_compressed: usize,
    pub v_compressed: usize,
    pub k_window: usize,
    pub v_window: usize,
    /// `[g * length * d, d]`
    pub compress_k: usize,
    pub compress_v: usize,
    /// `[g * length * d]`, added to a window's keys before they are compressed
    pub position: usize,
    /// `[3 h, c]`: logits of the gates, for each head compressed, chosen, sliding
    pub gates: usize,
}

fn block_shapes(c: &ModelConfig) -> Vec<(&'static str, Vec<usize>)> {
    let (h, g, d) = (c.heads, c.kv_heads, c.head_dim);
    let mut shapes = vec![
        ("input_layernorm.weight", vec![c.width]),
        ("self_attn.q_proj.weight", vec![h * d, c.width]),
        ("self_attn.k_proj.weight", vec![g * d, c.width]),
        ("self_attn.v_proj.weight", vec![g * d, c.width]),
        ("self_attn.o_proj.weight", vec![c.width, h * d]),
    ];
    if matches!(c.attention, Attention::Dash(_) | Attention::TopK { indexer: true, .. }) {
        shapes.push(("self_attn.indexer_q", vec![g * d]));
    }
    if let Attention::Dash(dash) = c.attention
        && dash.diagonal
    {
        shapes.push(("self_attn.diagonal", vec![g]));
    }
    if let Attention::Nsa(nsa) = c.attention {
        let window = nsa.windows.length * d;
        shapes.extend([
            ("self_attn.k_proj_compressed.weight", vec![g * d, c.width]),
            ("self_attn.v_proj_compressed.weight", vec![g * d, c.width]),
            ("self_attn.k_proj_window.weight", vec![g * d, c.width]),
            ("self_attn.v_proj_window.weight", vec![g * d, c.width]),
            ("self_attn.compress_k.weight", vec![g * window, d]),
            ("self_attn.compress_v.weight", vec![g * window, d]),
            ("self_attn.compress_position", vec![g * window]),
            ("self_attn.branch_gate.weight", vec![3 * h, c.width]),
        ]);
    }
    shapes.extend([
        ("post_attention_layernorm.weight", vec![c.width]),
        ("mlp.gate_proj.weight", vec![c.ffn, c.width]),
        ("mlp.up_proj.weight", vec![c.ffn, c.width]),
        ("mlp.down_proj.weight", vec![c.width, c.ffn]),
    ]);
    shapes
}

/// Name and shape of every parameter, in order.
pub(crate) fn shapes(c: &ModelConfig, vocab: usize) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![("model.embed_tokens.weight".to_string(), vec![vocab, c.width])];
    for layer in 0..c.layers {
        all.extend(block_shapes(c).into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    all.push(("model.norm.weight".into(), vec![c.width]));
    if !c.tie_embeddings {
        all.push(("lm_head.weight".into(), vec![vocab, c.width]));
    }
    all
}

/// Number of scalars of a model.
pub fn parameters(c: &ModelConfig, vocab: usize) -> usize {
    shapes(c, vocab).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

/// Where the parameters of a block stand; block `layer` starts at parameter `1 + layer * count`.
pub(crate) fn slots(c: &ModelConfig) -> Slots {
    let names: Vec<_> = block_shapes(c).into_iter().map(|(name, _)| name).collect();
    let find = |name: &str| names.iter().position(|n| *n == name);
    let must = |name: &str| find(name).expect("every block has it");
    Slots {
        count: names.len(),
        input_norm: must("input_layernorm.weight"),
        q: must("self_attn.q_proj.weight"),
        k: must("self_attn.k_proj.weight"),
        v: must("self_attn.v_proj.weight"),
        o: must("self_attn.o_proj.weight"),
        indexer: find("self_attn.indexer_q"),
        diagonal: find("self_attn.diagonal"),
        nsa: find("self_attn.k_proj_compressed.weight").map(|_| NsaSlots {
            k_compressed: must("self_attn.k_proj_compressed.weight"),
            v_compressed: must("self_attn.v_proj_compressed.weight"),
            k_window: must("self_attn.k_proj_window.weight"),
            v_window: must("self_attn.v_proj_window.weight"),
            compress_k: must("self_attn.compress_k.weight"),
            compress_v: must("self_attn.compress_v.weight"),
            position: must("self_attn.compress_position"),
            gates: must("self_attn.branch_gate.weight"),
        }),
        post_norm: must("post_attention_layernorm.weight"),
        gate: must("mlp.gate_proj.weight"),
        up: must("mlp.up_proj.weight"),
        down: must("mlp.down_proj.weight"),
    }
}

/// FNV-1a: a fixed map from a name to a random stream.
fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3))
}

impl Params {
    /// Fresh values from a seed.
    pub fn init(c: &ModelConfig, vocab: usize, seed: u64, device: &Device, dtype: DType) -> Self {
        let residual = c.init_std / (2.0 * c.layers as f64).sqrt();
        let value = |name: &str, shape: &[usize]| {
            let std = match name.rsplit('.').nth(1).unwrap_or("") {
                "o_proj" | "down_proj" => residual,
                "compress_k" | "compress_v" => (c.kv_heads as f64 / shape[0] as f64).sqrt(),
                _ => c.init_std,
            };
            if name.ends_with("norm.weight") {
                Tensor::full(device, shape, dtype, 1.0)
            } else if shape.len() == 1 {
                Tensor::zeros(device, shape, dtype)
            } else {
                Tensor::normal(device, shape, dtype, std, &mut Rng::stream(seed, stream_of(name)))
            }
        };
        let named = shapes(c, vocab).into_iter().map(|(name, shape)| Param { value: value(&name, &shape), name });
        Params(named.collect())
    }

    /// Takes values by name.
    ///
    /// # Errors
    /// Names the first parameter that is missing or has another shape, or the first value that is no parameter.
    pub fn from_named(
        c: &ModelConfig,
        vocab: usize,
        mut find: impl FnMut(&str) -> Option<Tensor>,
    ) -> Result<Self, String> {
        let mut list = Vec::new();
        for (name, shape) in shapes(c, vocab) {
            let value = find(&name).ok_or_else(|| format!("parameter {name} is missing"))?;
            if value.shape() != shape {
                return Err(format!(
                    "parameter {name} has shape {:?}, the configuration asks for {shape:?}",
                    value.shape()
                ));
            }
            list.push(Param { name, value });
        }
        Ok(Params(list))
    }

    /// All parameters, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Param> {
        self.0.iter()
    }

    /// All parameters, to be updated in place.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, Param> {
        self.0.iter_mut()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// No parameter at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.iter().find(|p| p.name == name).map(|p| &p.value)
    }

    /// Number of scalars.
    pub fn numel(&self) -> usize {
        self.0.iter().map(|p| p.value.numel()).sum()
    }
}

impl Param {
    /// Weight decay applies to matrices only: norms, biases and the indexer keep their scale.
    pub fn decays(&self) -> bool {
        self.value.shape().len() == 2
    }
}
