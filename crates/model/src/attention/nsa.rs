//! Native sparse attention (arXiv 2502.11089): the gated sum of attention to compressed windows, to chosen chunks and to a
//! sliding window. A chunk's score is the compressed probabilities, summed over the group and weighted by overlap; the
//! choice is hard. Compression is linear in a window's keys, with a position embedding, and in its values.
//!
//! The chosen chunks use `k_proj` and `v_proj`; the compressed and the sliding branch have their own. The defaults are sizes
//! for small models in the published proportions. (Published: chunks of 64, top 16 with 1 first and 2 last, a window of 512.)

use dash_core::ops::attention::{Pooling, Span, WindowChoice, window_routing_after};
use dash_core::ops::{add, gated_sum, index_select, linear, matmul, reshape, sigmoid, transpose};
use dash_core::{Error, Ids, Result, Tape, Var};

use super::keys::{Range, Value, settings};
use super::{Attended, Chunks, Cost, Inputs, Layer, Spec, Variant, windows};
use crate::config::ModelConfig;
use crate::error::ConfigError;
use crate::params::{Group, Init, ParamSpec};
use crate::trace::RouterTrace;

settings! {
    /// Settings of native sparse attention.
    pub struct Nsa {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the forced ones included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
        /// Tokens of a compressed window.
        length: usize = (chunk_size / 2).max(1), Range::at_least(1, "a window has at least one token");
        /// Tokens from one compressed window's start to the next.
        stride: usize = (chunk_size / 4).max(1), Range::at_least(1, "windows start at different tokens");
        /// First chunks that are always attended.
        init: usize = 1, Range::at_least(0, "");
        /// Last chunks up to the query's own that are always attended.
        local: usize = 2, Range::at_least(1, "a query always attends its own chunk");
        /// Tokens of the sliding window, the query's own included.
        window: usize = (top.saturating_mul(chunk_size) / 2).max(1), Range::at_least(1, "a query always sees itself");
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "nsa",
    about: "Native sparse attention: compressed windows, chosen chunks and a sliding window, mixed by gates (arXiv 2502.11089).",
    presets: &[],
    keys: Nsa::KEYS,
    build: |given| Nsa::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3)), ("window", Value::Size(5))],
    golden: &["q", "k_slc", "v_slc", "k_cmp", "v_cmp", "k_win", "v_win", "w_k", "w_v", "pe", "gates"],
};

impl Nsa {
    /// For the op that routes.
    fn choice(&self) -> WindowChoice {
        let Nsa { chunk_size, top, length, stride, init, local, .. } = *self;
        WindowChoice { chunk_size, top, length, stride, init, local, pooling: Pooling::Overlap }
    }

    /// One key or value per window: `x [b, t, g, d]` to `[b, m, g, d]` by `weight [g * length * d, d]`, after
    /// `position [g * length * d]` is added to the window.
    fn compressed(&self, tape: &Tape, x: &Var, weight: &Var, position: Option<&Var>) -> Result<Var> {
        let [b, t, g, d] = x.value.dims("nsa")?;
        let length = self.length;
        let tokens = windows::tokens(t, &self.choice());
        let m = tokens.len() / length;
        let tokens = Ids::places(x.value.device(), &tokens)?;
        let windows = reshape(tape, &index_select(tape, x, 1, &tokens)?, &[b * m, length, g, d])?;
        let mut windows = transpose(tape, &windows, &[2, 0, 1, 3])?;
        if let Some(position) = position {
            windows = add(tape, &windows, &reshape(tape, position, &[g, 1, length, d])?)?;
        }
        let windows = reshape(tape, &windows, &[g, b * m, length * d])?;
        let out = matmul(tape, &windows, &reshape(tape, weight, &[g, length * d, d])?)?;
        reshape(tape, &transpose(tape, &out, &[1, 0, 2])?, &[b, m, g, d])
    }
}

impl Variant for Nsa {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn check(&self) -> std::result::Result<(), ConfigError> {
        windows::check(&self.choice())
    }

    /// A compressed key has a key's size: a window's weights start with variance 1 / (length d). The gates' logits are
    /// `[3 h, c]`: for each head compressed, chosen, sliding.
    fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        let (h, g, d, c) = (config.heads, config.kv_heads, config.head_dim, config.width);
        let window = self.length * d;
        let small = Init::Normal((1.0 / window as f64).sqrt());
        let matrix = |name, shape, init| ParamSpec::new(name, shape, init, Group::Matrix);
        let usual = Init::Normal(config.init_std);
        vec![
            matrix("self_attn.k_proj_compressed.weight", vec![g * d, c], usual),
            matrix("self_attn.v_proj_compressed.weight", vec![g * d, c], usual),
            matrix("self_attn.k_proj_window.weight", vec![g * d, c], usual),
            matrix("self_attn.v_proj_window.weight", vec![g * d, c], usual),
            matrix("self_attn.compress_k.weight", vec![g * window, d], small),
            matrix("self_attn.compress_v.weight", vec![g * window, d], small),
            ParamSpec::new("self_attn.compress_position", vec![g * window], Init::Zeros, Group::Vector),
            matrix("self_attn.branch_gate.weight", vec![3 * h, c], usual),
        ]
    }

    /// Products: two more pairs of keys and values, the gates, and a window's key and value every `stride` tokens. Kept: the
    /// list, the other branches' keys, values, outputs and gated outputs, and the windows' tokens.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let (h, g, d) = (config.heads as f64, config.kv_heads as f64, config.head_dim as f64);
        let (c, repeated) = (config.width as f64, self.length as f64 / self.stride as f64);
        Cost {
            products: 4.0 * c * g * d + 3.0 * c * h + 2.0 * g * repeated * d * d,
            candidates: (t as f64 + 1.0) / 2.0 / self.stride as f64,
            kept: self.top as f64 * 3.0 * g + 4.0 * g * d + 5.0 * h * d + 3.0 * repeated * g * d,
        }
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: Some(self.top) })
    }

    fn window(&self) -> usize {
        self.window
    }

    /// The chunks, the sliding window and the visible compressed windows.
    fn attended(&self, t: usize, listed: f64) -> f64 {
        let mean = |span: Span| (0..t).map(|q| span.of(q).len()).sum::<usize>() as f64 / t.max(1) as f64;
        listed + mean(Span::Sliding(self.window)) + mean(windows::span(&self.choice()))
    }

    /// Keys and values of the compressed branch, of the sliding branch, the compression as it is, and gates in (0, 1)
    /// `[b, t, h, 3]`.
    fn project(&self, tape: &Tape, layer: &Layer) -> Result<Vec<Var>> {
        let [k_compressed, v_compressed, k_window, v_window, compress_k, compress_v, position, gates] = layer.params
        else {
            return Err(Error::invalid("nsa", format!("{} parameters, not 8", layer.params.len())));
        };
        let (h, g) = (layer.config.heads, layer.config.kv_heads);
        let k_compressed = layer.rotated_heads(tape, k_compressed, g)?;
        let k_window = layer.rotated_heads(tape, k_window, g)?;
        let (v_compressed, v_window) = (layer.heads(tape, v_compressed, g)?, layer.heads(tape, v_window, g)?);
        let gates = sigmoid(tape, &linear(tape, layer.x, gates)?)?;
        let [b, t, _] = gates.value.dims("nsa")?;
        let gates = reshape(tape, &gates, &[b, t, h, 3])?;
        let (compress_k, compress_v, position) = (compress_k.clone(), compress_v.clone(), position.clone());
        Ok(vec![k_compressed, v_compressed, k_window, v_window, compress_k, compress_v, position, gates])
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let [k_compressed, v_compressed, k_window, v_window, compress_k, compress_v, position, gates] = x.own else {
            return Err(Error::invalid("nsa", format!("{} inputs besides q, k and v, not 8", x.own.len())));
        };
        let w = self.choice();
        let windows = (w.length, w.stride);
        let k = |k: &Var| self.compressed(tape, k, compress_k, Some(position));
        let k = x.pooled(tape, "k_compressed", k_compressed, windows, k)?;
        let v = |v: &Var| self.compressed(tape, v, compress_v, None);
        let v = x.pooled(tape, "v_compressed", v_compressed, windows, v)?;
        let routes = window_routing_after(x.past(), &x.q.value, &k.value, w)?;
        let (chosen, routes) = x.attend_to(tape, routes, None)?;
        let branches = [
            x.attend_windows(tape, (&k, &v), windows::span(&w))?,
            chosen,
            x.attend_span_of(tape, ["k_window", "v_window"], (k_window, v_window), Span::Sliding(self.window), 1.0)?,
        ];
        Ok((gated_sum(tape, gates, branches.each_ref())?, Some(RouterTrace::hard(routes))))
    }
}
