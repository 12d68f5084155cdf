//! What a model is: extents, and which attention.

use dash_core::ops::attention::{Center, Pooling, RouterGradient, Span, WindowChoice};
use serde::{Deserialize, Serialize};

/// A configuration that no model can be built from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{key}: {what}")]
pub struct ConfigError {
    /// The key at fault, as written in the configuration file.
    pub key: String,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl ConfigError {
    fn new(key: &str, what: impl Into<String>) -> Self {
        ConfigError { key: format!("model.{key}"), what: what.into() }
    }
}

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
    /// To bf16, on processors that multiply it (AVX512_BF16); on others the run is f32.
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

/// The attention of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "AttentionKeys", into = "AttentionKeys")]
pub enum Attention {
    /// Causal softmax over all earlier tokens.
    Dense,
    /// The hard twin of [`Attention::Dash`]: same summaries and scores, the best chunks, no bias, no gradient.
    TopK {
        /// Tokens of a chunk.
        chunk_size: usize,
        /// Attended chunks, the own one included.
        top: usize,
        /// Factor on the scores (changes the group mean of several heads, not the order of one).
        gamma: f64,
        /// Summaries use `indexer_q`, as a model that was trained as dash has it; it gets no gradient here.
        indexer: bool,
    },
    /// DashAttention, arXiv 2605.18753.
    Dash(Dash),
    /// Dense alpha-entmax over all earlier tokens, without chunks (arXiv 1905.05702).
    TokenEntmax {
        /// In (1, 2]; larger is sparser.
        alpha: f64,
    },
    /// InfLLM v2, arXiv 2509.24663: a hard choice by scores of mean-pooled windows of keys. No parameters of its own.
    InfLlmV2(Windows),
    /// Native sparse attention, arXiv 2502.11089: compressed windows, chosen chunks and a sliding window, each with keys and
    /// values of its own, mixed by learned gates.
    Nsa(Nsa),
}

/// How chunks are chosen by the scores of overlapping windows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Windows {
    /// Tokens of a chunk.
    pub chunk_size: usize,
    /// Attended chunks, the forced ones included.
    pub top: usize,
    /// Tokens of a window.
    pub length: usize,
    /// Tokens from one window's start to the next.
    pub stride: usize,
    /// First chunks that are always attended.
    pub init: usize,
    /// Last chunks up to the query's own that are always attended.
    pub local: usize,
}

impl Windows {
    /// For the routing room.
    pub fn choice(&self, pooling: Pooling) -> WindowChoice {
        let Windows { chunk_size, top, length, stride, init, local } = *self;
        WindowChoice { chunk_size, top, length, stride, init, local, pooling }
    }

    /// The windows as keys.
    pub fn span(&self) -> Span {
        Span::Windows { length: self.length, stride: self.stride }
    }
}

/// Settings of native sparse attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nsa {
    /// Compression and choice.
    pub windows: Windows,
    /// Tokens of the sliding window, the query's own included.
    pub window: usize,
}

/// Settings of DashAttention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dash {
    /// Tokens of a chunk.
    pub chunk_size: usize,
    /// In (1, 2]; larger is sparser.
    pub alpha: f64,
    /// Factor on the routing scores; larger is sparser.
    pub gamma: f64,
    /// Divides the bias.
    pub sigma: f64,
    /// What is subtracted from log w.
    pub center: Center,
    /// What the gradient of the bias does.
    pub router_gradient: RouterGradient,
    /// A learned bias of the own chunk, one a kv head.
    pub diagonal: bool,
}

impl Default for Attention {
    fn default() -> Self {
        Attention::preset("dash").expect("a preset")
    }
}

/// Kinds and presets that `model.attention.kind` and `--arms` take.
pub const KINDS: [&str; 9] =
    ["dense", "topk", "dash", "dash-released", "dash-stopped", "dash-ste", "token-entmax", "infllmv2", "nsa"];

impl Attention {
    /// A kind with its defaults, or a preset: `dash-released` has sigma 1e6 and a centred bias, as the released
    /// checkpoints; `dash-stopped` and `dash-ste` are `dash` with another router gradient. `infllmv2` and `nsa` come with
    /// sizes for small models in the published proportions: windows of half a chunk, every quarter of a chunk. (Published:
    /// chunks of 64; InfLLM v2 top 96 with 1 first and 32 last, NSA top 16 with 1 first and 2 last and a window of 512.)
    pub fn preset(kind: &str) -> Option<Self> {
        let dash = Dash {
            chunk_size: 64,
            alpha: 1.5,
            gamma: 1.0,
            sigma: 1.0,
            center: Center::None,
            router_gradient: RouterGradient::Full,
            diagonal: false,
        };
        let windows = Windows { chunk_size: 64, top: 4, length: 32, stride: 16, init: 1, local: 2 };
        Some(match kind {
            "dense" => Attention::Dense,
            "topk" => Attention::TopK { chunk_size: 64, top: 4, gamma: 1.0, indexer: false },
            "dash" => Attention::Dash(dash),
            "token-entmax" => Attention::TokenEntmax { alpha: 1.5 },
            "infllmv2" => Attention::InfLlmV2(Windows { local: 1, ..windows }),
            "nsa" => Attention::Nsa(Nsa { windows, window: 128 }),
            "dash-released" => Attention::Dash(Dash { sigma: 1e6, center: Center::Mean, ..dash }),
            "dash-stopped" => Attention::Dash(Dash { router_gradient: RouterGradient::Stopped, ..dash }),
            "dash-ste" => Attention::Dash(Dash { router_gradient: RouterGradient::StraightThrough, ..dash }),
            _ => return None,
        })
    }

    /// The keys of sizes that a kind or preset takes: what stays when a configuration is given another kind. (What makes a
    /// preset, sigma, centring, gradient and diagonal, does not stay.)
    pub fn size_keys(kind: &str) -> &'static [&'static str] {
        match Attention::preset(kind) {
            Some(Attention::TopK { .. }) => &["chunk_size", "gamma", "top"],
            Some(Attention::Dash(_)) => &["chunk_size", "gamma", "alpha"],
            Some(Attention::TokenEntmax { .. }) => &["alpha"],
            Some(Attention::InfLlmV2(_)) => &["chunk_size", "top", "length", "stride", "init", "local"],
            Some(Attention::Nsa(_)) => &["chunk_size", "top", "length", "stride", "init", "local", "window"],
            Some(Attention::Dense) | None => &[],
        }
    }

    /// The kind without the preset: `dense`, `topk`, `dash`, `token-entmax`, `infllmv2` or `nsa`.
    pub fn kind(&self) -> &'static str {
        match self {
            Attention::Dense => "dense",
            Attention::TopK { .. } => "topk",
            Attention::Dash(_) => "dash",
            Attention::TokenEntmax { .. } => "token-entmax",
            Attention::InfLlmV2(_) => "infllmv2",
            Attention::Nsa(_) => "nsa",
        }
    }

    /// Tokens of a chunk, where there are chunks.
    pub fn chunk_size(&self) -> Option<usize> {
        match self {
            Attention::Dense | Attention::TokenEntmax { .. } => None,
            Attention::TopK { chunk_size, .. } | Attention::Dash(Dash { chunk_size, .. }) => Some(*chunk_size),
            Attention::InfLlmV2(w) | Attention::Nsa(Nsa { windows: w, .. }) => Some(w.chunk_size),
        }
    }

    /// Mean number of keys that a query of a sequence of `t` tokens attends, all branches together, when its chunks hold
    /// `listed` tokens: dense (t+1)/2, NSA the chunks, the sliding window and the visible compressed windows.
    pub fn attended(&self, t: usize, listed: f64) -> f64 {
        let mean = |span: Span| (0..t).map(|q| span.of(q).len()).sum::<usize>() as f64 / t.max(1) as f64;
        match self {
            Attention::Dense | Attention::TokenEntmax { .. } => (t as f64 + 1.0) / 2.0,
            Attention::TopK { .. } | Attention::Dash(_) | Attention::InfLlmV2(_) => listed,
            Attention::Nsa(n) => listed + mean(Span::Sliding(n.window)) + mean(n.windows.span()),
        }
    }

    /// Mean number of tokens in a query's chunks when it has at most `top`: (q mod s) + 1 of its own chunk and s of each
    /// of min(top - 1, q / s) earlier ones.
    pub fn listed_at(chunk_size: usize, top: usize, t: usize) -> f64 {
        let of = |q: usize| q % chunk_size + 1 + chunk_size * (top - 1).min(q / chunk_size);
        (0..t).map(of).sum::<usize>() as f64 / t.max(1) as f64
    }

    /// Attended chunks at most, where the choice is hard.
    pub fn top(&self) -> Option<usize> {
        match self {
            Attention::TopK { top, .. } => Some(*top),
            Attention::InfLlmV2(w) | Attention::Nsa(Nsa { windows: w, .. }) => Some(w.top),
            _ => None,
        }
    }
}

/// `[model.attention]` as written: a kind or preset, and the knobs that override it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AttentionKeys {
    kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gamma: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sigma: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    center: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    router_gradient: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diagonal: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    indexer: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    length: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stride: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    init: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<usize>,
}

const CENTERS: [(&str, Center); 3] =
    [("none", Center::None), ("mean", Center::Mean), ("mean-detached", Center::MeanDetached)];
const GRADIENTS: [(&str, RouterGradient); 3] = [
    ("full", RouterGradient::Full),
    ("stopped", RouterGradient::Stopped),
    ("straight-through", RouterGradient::StraightThrough),
];

fn choose<T: Copy>(key: &str, value: &str, options: &[(&str, T)]) -> Result<T, ConfigError> {
    let names: Vec<_> = options.iter().map(|o| format!("{:?}", o.0)).collect();
    let what = || format!("{value:?} is none of {}", names.join(", "));
    options.iter().find(|o| o.0 == value).map(|o| o.1).ok_or_else(|| ConfigError::new(key, what()))
}

fn name_of<T: PartialEq>(value: T, options: &[(&str, T)]) -> Option<String> {
    options.iter().find(|o| o.1 == value).map(|o| o.0.to_string())
}

impl TryFrom<AttentionKeys> for Attention {
    type Error = ConfigError;

    fn try_from(keys: AttentionKeys) -> Result<Self, ConfigError> {
        let kind = keys.kind.as_deref().unwrap_or("dash");
        let Some(mut attention) = Attention::preset(kind) else {
            return Err(ConfigError::new("attention.kind", format!("{kind:?} is none of {}", KINDS.join(", "))));
        };
        let mut unused: Vec<&str> = Vec::new();
        let mut given = |name, is: bool, used: bool| {
            if is && !used {
                unused.push(name);
            }
        };
        let (dash, nsa) = (matches!(attention, Attention::Dash(_)), matches!(attention, Attention::Nsa(_)));
        let windows = nsa || matches!(attention, Attention::InfLlmV2(_));
        let entmax = dash || matches!(attention, Attention::TokenEntmax { .. });
        given("chunk_size", keys.chunk_size.is_some(), attention.chunk_size().is_some());
        given("gamma", keys.gamma.is_some(), dash || attention.kind() == "topk");
        given("top", keys.top.is_some(), attention.top().is_some());
        given("alpha", keys.alpha.is_some(), entmax);
        given("indexer", keys.indexer.is_some(), attention.kind() == "topk");
        given("length", keys.length.is_some(), windows);
        given("stride", keys.stride.is_some(), windows);
        given("init", keys.init.is_some(), windows);
        given("local", keys.local.is_some(), windows);
        given("window", keys.window.is_some(), nsa);
        given("sigma", keys.sigma.is_some(), dash);
        given("center", keys.center.is_some(), dash);
        given("router_gradient", keys.router_gradient.is_some(), dash);
        given("diagonal", keys.diagonal.is_some(), dash);
        if let Some(key) = unused.first() {
            return Err(ConfigError::new(
                &format!("attention.{key}"),
                format!("means nothing to kind {kind:?}; remove it"),
            ));
        }
        let fill = |w: &mut Windows| {
            w.chunk_size = keys.chunk_size.unwrap_or(w.chunk_size);
            w.top = keys.top.unwrap_or(w.top);
            w.length = keys.length.unwrap_or((w.chunk_size / 2).max(1));
            w.stride = keys.stride.unwrap_or((w.chunk_size / 4).max(1));
            w.init = keys.init.unwrap_or(w.init);
            w.local = keys.local.unwrap_or(w.local);
        };
        match &mut attention {
            Attention::Dense => {}
            Attention::TokenEntmax { alpha } => *alpha = keys.alpha.unwrap_or(*alpha),
            Attention::InfLlmV2(w) => fill(w),
            Attention::Nsa(n) => {
                fill(&mut n.windows);
                n.window = keys.window.unwrap_or((n.windows.top * n.windows.chunk_size / 2).max(1));
            }
            Attention::TopK { chunk_size, top, gamma, indexer } => {
                *indexer = keys.indexer.unwrap_or(*indexer);
                *chunk_size = keys.chunk_size.unwrap_or(*chunk_size);
                *top = keys.top.unwrap_or(*top);
                *gamma = keys.gamma.unwrap_or(*gamma);
            }
            Attention::Dash(d) => {
                d.chunk_size = keys.chunk_size.unwrap_or(d.chunk_size);
                d.alpha = keys.alpha.unwrap_or(d.alpha);
                d.gamma = keys.gamma.unwrap_or(d.gamma);
                d.sigma = keys.sigma.unwrap_or(d.sigma);
                d.diagonal = keys.diagonal.unwrap_or(d.diagonal);
                if let Some(center) = &keys.center {
                    d.center = choose("attention.center", center, &CENTERS)?;
                }
                if let Some(gradient) = &keys.router_gradient {
                    d.router_gradient = choose("attention.router_gradient", gradient, &GRADIENTS)?;
                }
            }
        }
        Ok(attention)
    }
}

impl From<Attention> for AttentionKeys {
    fn from(attention: Attention) -> Self {
        let kind = Some(attention.kind().to_string());
        let windows = |w: Windows, window: Option<usize>| AttentionKeys {
            kind: kind.clone(),
            chunk_size: Some(w.chunk_size),
            top: Some(w.top),
            length: Some(w.length),
            stride: Some(w.stride),
            init: Some(w.init),
            local: Some(w.local),
            window,
            ..Default::default()
        };
        match attention {
            Attention::TokenEntmax { alpha } => AttentionKeys { kind, alpha: Some(alpha), ..Default::default() },
            Attention::InfLlmV2(w) => windows(w, None),
            Attention::Nsa(n) => windows(n.windows, Some(n.window)),
            Attention::Dense => AttentionKeys { kind, ..Default::default() },
            Attention::TopK { chunk_size, top, gamma, indexer } => AttentionKeys {
                kind,
                indexer: indexer.then_some(true),
                chunk_size: Some(chunk_size),
                top: Some(top),
                gamma: Some(gamma),
                ..Default::default()
            },
            Attention::Dash(d) => AttentionKeys {
                kind,
                chunk_size: Some(d.chunk_size),
                alpha: Some(d.alpha),
                gamma: Some(d.gamma),
                sigma: Some(d.sigma),
                center: name_of(d.center, &CENTERS),
                router_gradient: name_of(d.router_gradient, &GRADIENTS),
                diagonal: Some(d.diagonal),
                ..Default::default()
            },
        }
    }
}

impl ModelConfig {
    /// Fills in what follows from other keys.
    pub fn resolve(&mut self) {
        if self.head_dim == 0 && self.heads > 0 {
            self.head_dim = self.width / self.heads;
        }
    }

    /// Refuses what no model can be built from. Call after [`ModelConfig::resolve`].
    ///
    /// # Errors
    /// Names the key and what it would have to be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            ("layers", self.layers),
            ("width", self.width),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("ffn", self.ffn),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, n)| *n == 0) {
            return Err(ConfigError::new(key, "is 0; it must be at least 1"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let what = format!(
                "{} does not divide heads = {}: every key/value head serves the same number of query heads",
                self.kv_heads, self.heads
            );
            return Err(ConfigError::new("kv_heads", what));
        }
        if !self.head_dim.is_multiple_of(2) {
            let what = format!("{} is odd; rope rotates pairs, so a head's width is even", self.head_dim);
            return Err(ConfigError::new("head_dim", what));
        }
        let ranges = [("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps), ("init_std", self.init_std)];
        if let Some((key, x)) = ranges.iter().find(|(_, x)| !(*x > 0.0 && x.is_finite())) {
            return Err(ConfigError::new(key, format!("{x} is not a positive number")));
        }
        match self.attention {
            Attention::Dense => Ok(()),
            Attention::TokenEntmax { alpha } => Self::check_alpha(alpha),
            Attention::InfLlmV2(w) => Self::check_windows(w),
            Attention::Nsa(n) => {
                if n.window == 0 {
                    return Err(ConfigError::new("attention.window", "is 0, but a query always sees itself"));
                }
                Self::check_windows(n.windows)
            }
            Attention::TopK { chunk_size, top, gamma, .. } => {
                Self::check_knobs(chunk_size, gamma)?;
                if top == 0 {
                    return Err(ConfigError::new("attention.top", "is 0, but a query always attends its own chunk"));
                }
                Ok(())
            }
            Attention::Dash(d) => {
                Self::check_knobs(d.chunk_size, d.gamma)?;
                Self::check_alpha(d.alpha)?;
                if !(d.sigma > 0.0 && d.sigma.is_finite()) {
                    let what = format!("{} is not a positive number; it divides the bias", d.sigma);
                    return Err(ConfigError::new("attention.sigma", what));
                }
                Ok(())
            }
        }
    }

    fn check_alpha(alpha: f64) -> Result<(), ConfigError> {
        if !(alpha > 1.0 && alpha <= 2.0) {
            let what = format!("{alpha} is not above 1 (softmax) and at most 2 (sparsemax)");
            return Err(ConfigError::new("attention.alpha", what));
        }
        Ok(())
    }

    fn check_windows(w: Windows) -> Result<(), ConfigError> {
        Self::check_knobs(w.chunk_size, 1.0)?;
        let wrong = |key: &str, what: String| Err(ConfigError::new(&format!("attention.{key}"), what));
        if w.stride == 0 || w.length < w.stride {
            return wrong("stride", format!("{} is not between 1 and length = {}", w.stride, w.length));
        }
        if w.local == 0 {
            return wrong("local", "is 0, but a query always attends its own chunk; use at least 1".into());
        }
        if w.top < w.init + w.local {
            let what = format!(
                "{} is below init + local = {}, the chunks that are always attended; raise it or lower those",
                w.top,
                w.init + w.local
            );
            return wrong("top", what);
        }
        Ok(())
    }

    fn check_knobs(chunk_size: usize, gamma: f64) -> Result<(), ConfigError> {
        if chunk_size == 0 {
            return Err(ConfigError::new("attention.chunk_size", "is 0; a chunk has at least one token"));
        }
        if !(gamma > 0.0 && gamma.is_finite()) {
            return Err(ConfigError::new("attention.gamma", format!("{gamma} is not a positive number")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(f: impl FnOnce(&mut AttentionKeys)) -> Result<Attention, ConfigError> {
        let mut keys = AttentionKeys::default();
        f(&mut keys);
        keys.try_into()
    }

    #[test]
    fn presets_and_overrides() {
        let Attention::Dash(d) = keys(|k| k.kind = Some("dash-released".into())).unwrap() else { panic!() };
        assert_eq!((d.sigma, d.center, d.router_gradient), (1e6, Center::Mean, RouterGradient::Full));
        let released = |k: &mut AttentionKeys| (k.kind, k.sigma) = (Some("dash-released".into()), Some(2.0));
        let Attention::Dash(d) = keys(released).unwrap() else { panic!() };
        assert_eq!((d.sigma, d.center), (2.0, Center::Mean));
        for kind in KINDS {
            let a = Attention::preset(kind).unwrap();
            assert_eq!(
                Attention::try_from(AttentionKeys::from(a)).unwrap(),
                a,
                "{kind} survives being written and read"
            );
        }
    }

    #[test]
    fn a_knob_of_another_kind_is_refused() {
        let err = keys(|k| (k.kind, k.top) = (Some("dash".into()), Some(3))).unwrap_err();
        assert_eq!(err.to_string(), "model.attention.top: means nothing to kind \"dash\"; remove it");
        let err = keys(|k| k.kind = Some("dahs".into())).unwrap_err();
        assert!(err.to_string().contains("is none of dense, topk"), "{err}");
        assert!(keys(|k| k.center = Some("median".into())).unwrap_err().to_string().contains("\"mean-detached\""));
    }
}
