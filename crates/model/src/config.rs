//! What a model is: extents, and which attention.

use serde::{Deserialize, Serialize};

use crate::attention::Attention;
use crate::error::ConfigError;
use crate::params::{parameters, twice};
use crate::rope::{RopeScaling, frequencies};

/// Extents and settings of a Llama decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Decoder blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, even; 0: `width / heads`.
    #[serde(default)]
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub ffn: usize,
    /// Base of the rotary angles.
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
    /// Inside the root of the normalisation.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// The output projection is the embedding.
    #[serde(default = "yes")]
    pub tie_embeddings: bool,
    /// Standard deviation of the initial matrices; projections into the residual stream get `init_std / sqrt(2 layers)`.
    #[serde(default = "init_std")]
    pub init_std: f64,
    /// How operands of products with parameters, and of attention to chunks, are rounded. Weights and sums stay f32.
    #[serde(default)]
    pub compute: Compute,
    /// Keep only the input of each block for backward and run the block again there: the same bits, a third more work,
    /// and a fraction of the activation memory.
    #[serde(default)]
    pub recompute: bool,
    /// Stretches the rotary angles as Llama 3 does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Adds a learned vector to queries, keys and values, as Qwen2 does. Starts at 0.
    #[serde(default)]
    pub qkv_bias: bool,
    /// Normalises every head's query and key (RMSNorm over the head, with a learned factor) before they are rotated, as Qwen3 does: scores then cannot grow with the weights.
    #[serde(default)]
    pub qk_norm: bool,
    /// Which attention.
    #[serde(default)]
    pub attention: Attention,
}

fn rope_theta() -> f64 {
    10_000.0
}
fn norm_eps() -> f64 {
    1e-6
}
fn init_std() -> f64 {
    0.02
}
fn yes() -> bool {
    true
}

/// `model.compute`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Not at all.
    #[default]
    F32,
    /// To bf16, on devices that multiply it: a GPU, and processors with AVX512_BF16. On others nothing is rounded; `train` refuses the
    /// key there.
    Bf16,
}

impl From<Compute> for dash_core::Compute {
    fn from(compute: Compute) -> Self {
        match compute {
            Compute::F32 => dash_core::Compute::Full,
            Compute::Bf16 => dash_core::Compute::Bf16,
        }
    }
}

/// What each extent may be at most. Larger ones are slips of the keyboard: the largest published models have some 200
/// layers, a width of 20,000 and an ffn of 80,000. With these bounds no product of three extents leaves 64 bits.
const LARGEST: [(&str, usize); 6] = [
    ("layers", 1 << 14),
    ("width", 1 << 20),
    ("heads", 1 << 16),
    ("kv_heads", 1 << 16),
    ("head_dim", 1 << 16),
    ("ffn", 1 << 22),
];

impl ModelConfig {
    /// A model with these extents and every other key at its default.
    pub fn new(layers: usize, width: usize, (heads, kv_heads): (usize, usize), ffn: usize) -> Self {
        let mut config = ModelConfig {
            layers,
            width,
            heads,
            kv_heads,
            head_dim: 0,
            ffn,
            rope_theta: rope_theta(),
            norm_eps: norm_eps(),
            tie_embeddings: yes(),
            init_std: init_std(),
            compute: Compute::default(),
            recompute: false,
            rope_scaling: None,
            qkv_bias: false,
            qk_norm: false,
            attention: Attention::default(),
        };
        config.resolve();
        config
    }

    /// Fills in what follows from other keys.
    pub fn resolve(&mut self) {
        if self.head_dim == 0 && self.heads > 0 {
            self.head_dim = self.width / self.heads;
        }
    }

    /// The frequencies of a head's rotary angles, in radians a position.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
    }

    /// Refuses what no model can be built from. Call after [`ModelConfig::resolve`].
    ///
    /// # Errors
    /// Names the key and what it would have to be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let extents = [self.layers, self.width, self.heads, self.kv_heads, self.head_dim, self.ffn];
        for ((key, most), n) in LARGEST.into_iter().zip(extents) {
            let wrong = |what: String| Err(ConfigError::new(format!("model.{key}"), what));
            match n {
                0 => return wrong("is 0; it must be at least 1".into()),
                n if n > most => return wrong(format!("{n} is above {most}, the largest that is taken")),
                _ => {}
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let what = format!(
                "{} does not divide heads = {}: every key/value head serves the same number of query heads",
                self.kv_heads, self.heads
            );
            return Err(ConfigError::new("model.kv_heads", what));
        }
        if !self.head_dim.is_multiple_of(2) {
            let what = format!("{} is odd; rope rotates pairs, so a head's width is even", self.head_dim);
            return Err(ConfigError::new("model.head_dim", what));
        }
        let ranges = [("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps), ("init_std", self.init_std)];
        // it computes in f32, where a smaller one is 0 and a larger one infinite
        if let Some((key, x)) = ranges.iter().find(|(_, x)| !(*x as f32 > 0.0 && (*x as f32).is_finite())) {
            return Err(ConfigError::new(
                format!("model.{key}"),
                format!("{x:?} is not a positive number in f32 (1e-45 to 3.4e38)"),
            ));
        }
        self.rope_scaling.as_ref().map_or(Ok(()), RopeScaling::check)?;
        self.attention.check_all()?;
        for (key, on) in [("qkv_bias", self.qkv_bias), ("qk_norm", self.qk_norm)] {
            if on && self.attention.kind() == "nsa" {
                let what = "means nothing to keys and values that nsa's other branches have of their own; leave it out, or choose another kind";
                return Err(ConfigError::new(format!("model.{key}"), what));
            }
        }
        if let Some(name) = twice(self) {
            let what = format!("{} has two parameters {name} in a layer", self.attention.kind());
            return Err(ConfigError::new("model.attention", what));
        }
        // a vocabulary of one token: the smallest model with these extents
        parameters(self, 1).map(|_| ())
    }
}
