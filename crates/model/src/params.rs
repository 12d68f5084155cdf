//! The parameters: names, shapes, groups and initialisation of all but the attention variants' own, and all of them as a list.
//!
//! | parameter | initial value |
//! |---|---|
//! | norms | 1 |
//! | `o_proj`, `down_proj` (into the residual stream) | normal, `init_std / sqrt(2 layers)` |
//! | every other matrix | normal, `init_std` |
//!
//! Each parameter draws from its own random stream, chosen by its name: two models that differ in their attention start
//! from equal values wherever both have the parameter.

use dash_core::rng::Rng;
use dash_core::{DType, Device, Tensor};

use crate::config::ModelConfig;
use crate::error::{ConfigError, ParamError};

/// The learned query `[g * d]` of the chunk summaries.
pub const INDEXER: &str = "self_attn.indexer_q";

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// At 1.
    Ones,
    /// At 0.
    Zeros,
    /// Normal with this standard deviation.
    Normal(f64),
}

/// Which parameters an optimiser treats alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// One row a token: the embedding and the output projection.
    Embedding,
    /// Every other matrix.
    Matrix,
    /// Norms, biases and the learned queries of summaries.
    Vector,
}

/// What a parameter is before it has values.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamSpec {
    /// Hugging Face name; that of a layer's parameter without `model.layers.N.`.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// Start.
    pub init: Init,
    /// Group.
    pub group: Group,
}

impl ParamSpec {
    /// A parameter.
    pub fn new(name: impl Into<String>, shape: Vec<usize>, init: Init, group: Group) -> Self {
        ParamSpec { name: name.into(), shape, init, group }
    }

    /// [`INDEXER`]. It starts at 0: the summaries are means.
    pub fn indexer(c: &ModelConfig) -> Self {
        ParamSpec::new(INDEXER, vec![c.kv_heads * c.head_dim], Init::Zeros, Group::Vector)
    }
}

/// A named tensor.
#[derive(Debug, Clone)]
pub struct Param {
    /// Hugging Face name.
    pub name: String,
    /// Value.
    pub value: Tensor,
    /// Group.
    pub group: Group,
}

/// All parameters in a fixed order.
#[derive(Debug, Clone)]
pub struct Params(Vec<Param>);

/// What queries, keys and values have besides their matrices: biases, then norms.
pub(crate) fn head_params(c: &ModelConfig) -> Vec<ParamSpec> {
    let (h, g, d) = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.head_dim);
    let bias = |name, width| ParamSpec::new(name, vec![width], Init::Zeros, Group::Vector);
    let norm = |name| ParamSpec::new(name, vec![d], Init::Ones, Group::Vector);
    let mut all = Vec::new();
    if c.qkv_bias {
        let names = [("self_attn.q_proj.bias", h), ("self_attn.k_proj.bias", g), ("self_attn.v_proj.bias", g)];
        all.extend(names.map(|(name, width)| bias(name, width)));
    }
    if c.qk_norm {
        all.extend(["self_attn.q_norm.weight", "self_attn.k_norm.weight"].map(norm));
    }
    all
}

/// The parameters of a block, in the order in which the decoder takes them apart: five, [`head_params`], those of the attention variant,
/// four.
fn block(c: &ModelConfig) -> Vec<ParamSpec> {
    let (h, g, d) = (c.heads, c.kv_heads, c.head_dim);
    let norm = |name| ParamSpec::new(name, vec![c.width], Init::Ones, Group::Vector);
    let matrix = |name, rows, cols| ParamSpec::new(name, vec![rows, cols], Init::Normal(c.init_std), Group::Matrix);
    let residual = Init::Normal(c.init_std / (2.0 * c.layers as f64).sqrt());
    let into_residual = |name, cols| ParamSpec::new(name, vec![c.width, cols], residual, Group::Matrix);
    let mut all = vec![
        norm("input_layernorm.weight"),
        matrix("self_attn.q_proj.weight", h * d, c.width),
        matrix("self_attn.k_proj.weight", g * d, c.width),
        matrix("self_attn.v_proj.weight", g * d, c.width),
        into_residual("self_attn.o_proj.weight", h * d),
    ];
    all.extend(head_params(c));
    all.extend(c.attention.params(c));
    all.extend([
        norm("post_attention_layernorm.weight"),
        matrix("mlp.gate_proj.weight", c.ffn, c.width),
        matrix("mlp.up_proj.weight", c.ffn, c.width),
        into_residual("mlp.down_proj.weight", c.ffn),
    ]);
    all
}

/// The first name that two parameters of a block have: weights are read and written by name.
pub(crate) fn twice(c: &ModelConfig) -> Option<String> {
    let mut names: Vec<String> = block(c).into_iter().map(|p| p.name).collect();
    names.sort_unstable();
    names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0].clone())
}

/// Where a layer's parameters stand in the list of all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places {
    /// of a block
    count: usize,
    /// of [`INDEXER`] in its block
    indexer: Option<usize>,
}

impl Places {
    pub(crate) fn of(c: &ModelConfig) -> Self {
        let block = block(c);
        Places { count: block.len(), indexer: block.iter().position(|p| p.name == INDEXER) }
    }

    /// Of a layer.
    pub(crate) fn block(&self, layer: usize) -> std::ops::Range<usize> {
        let first = 1 + layer * self.count;
        first..first + self.count
    }

    /// Of a layer's indexer.
    pub(crate) fn indexer(&self, layer: usize) -> Option<usize> {
        self.indexer.map(|i| self.block(layer).start + i)
    }
}

/// Every parameter of a model, in order: embedding, blocks, final norm, and the output projection where it is not the
/// embedding.
pub(crate) fn specs(c: &ModelConfig, vocab: usize) -> Vec<ParamSpec> {
    let table = |name| ParamSpec::new(name, vec![vocab, c.width], Init::Normal(c.init_std), Group::Embedding);
    let mut all = vec![table("model.embed_tokens.weight")];
    let block = block(c);
    for layer in 0..c.layers {
        let in_layer = |p: &ParamSpec| ParamSpec { name: format!("model.layers.{layer}.{}", p.name), ..p.clone() };
        all.extend(block.iter().map(in_layer));
    }
    all.push(ParamSpec::new("model.norm.weight", vec![c.width], Init::Ones, Group::Vector));
    if !c.tie_embeddings {
        all.push(table("lm_head.weight"));
    }
    all
}

/// Scalars of a model at most: 2^40 take 16 TiB with their gradients and moments in f32.
const MOST_PARAMETERS: usize = 1 << 40;

/// Number of scalars of a model, from extents that [`ModelConfig::check`] has accepted.
///
/// # Errors
/// When they are more than 2^40: no machine that this program knows holds them.
pub fn parameters(c: &ModelConfig, vocab: usize) -> Result<usize, ConfigError> {
    counted(c, vocab, |_| true)
}

/// Those of a group.
///
/// # Errors
/// As [`parameters`].
pub fn parameters_in(c: &ModelConfig, vocab: usize, group: Group) -> Result<usize, ConfigError> {
    counted(c, vocab, |of| of == group)
}

fn counted(c: &ModelConfig, vocab: usize, counts: impl Fn(Group) -> bool) -> Result<usize, ConfigError> {
    let numel = |p: &ParamSpec| p.shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    let sum = |specs: &[ParamSpec]| {
        let mut counted = specs.iter().filter(|p| counts(p.group));
        counted.try_fold(0usize, |sum, p| sum.checked_add(numel(p)?))
    };
    // without the list of all layers, which may be long
    let once = sum(&specs(&ModelConfig { layers: 0, ..c.clone() }, vocab));
    let all = sum(&block(c)).and_then(|n| n.checked_mul(c.layers)).and_then(|n| n.checked_add(once?));
    all.filter(|&n| n <= MOST_PARAMETERS).ok_or_else(|| {
        let count = all.map_or("more than 2^64".to_string(), |n| format!("{:.1e}", n as f64));
        let what = format!(
            "{} with {} layers, {} heads of {}, ffn {} and {vocab} tokens makes {count} parameters; at most 2^40 (1.1e12) are \
             taken",
            c.width, c.layers, c.heads, c.head_dim, c.ffn
        );
        ConfigError::new("model.width", what)
    })
}

/// FNV-1a: a fixed map from a name to a random stream.
fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3))
}

impl Params {
    /// Fresh values from a seed.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn init(c: &ModelConfig, vocab: usize, seed: u64, device: &Device, dtype: DType) -> dash_core::Result<Self> {
        let fresh = |ParamSpec { name, shape, init, group }: ParamSpec| {
            let value = match init {
                Init::Ones => Tensor::full(device, &shape, dtype, 1.0),
                Init::Zeros => Tensor::zeros(device, &shape, dtype),
                Init::Normal(std) => {
                    Tensor::normal(device, &shape, dtype, std, &mut Rng::stream(seed, stream_of(&name)))
                }
            };
            Ok(Param { name, value: value?, group })
        };
        Ok(Params(specs(c, vocab).into_iter().map(fresh).collect::<dash_core::Result<_>>()?))
    }

    /// Takes values by name.
    ///
    /// # Errors
    /// Names the first parameter that is missing or has another shape.
    pub fn from_named(
        c: &ModelConfig,
        vocab: usize,
        mut find: impl FnMut(&str) -> Option<Tensor>,
    ) -> Result<Self, ParamError> {
        let mut list = Vec::new();
        for ParamSpec { name, shape, group, .. } in specs(c, vocab) {
            let value = match find(&name) {
                Some(value) if value.shape() == shape => value,
                Some(value) => {
                    let what = format!("has shape {:?}, the configuration asks for {shape:?}", value.shape());
                    return Err(ParamError { name, what });
                }
                None => return Err(ParamError { name, what: "is missing".into() }),
            };
            list.push(Param { name, value, group });
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
