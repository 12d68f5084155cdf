//! InfLLM v2 (arXiv 2509.24663): keys averaged over overlapping windows give the scores, a chunk has the largest of the
//! windows that touch it, and the choice is hard. No parameters of its own.
//!
//! The defaults are sizes for small models in the published proportions: windows of half a chunk, every quarter of a chunk.
//! (Published: chunks of 64, top 96 with 1 first and 32 last.)

use dash_core::ops::attention::{Pooling, WindowChoice, window_routing_after};
use dash_core::ops::{index_select, reshape, scale, sum_axis};
use dash_core::{Ids, Result, Tape, Tensor, Var};

use super::keys::{Range, Value, settings};
use super::{Attended, Attention, Chunks, Cost, Inputs, Spec, Variant, windows};
use crate::config::ModelConfig;
use crate::error::ConfigError;
use crate::trace::RouterTrace;

settings! {
    /// Settings of InfLLM v2.
    pub struct InfLlmV2 {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the forced ones included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
        /// Tokens of a window.
        length: usize = (chunk_size / 2).max(1), Range::at_least(1, "a window has at least one token");
        /// Tokens from one window's start to the next.
        stride: usize = (chunk_size / 4).max(1), Range::at_least(1, "windows start at different tokens");
        /// First chunks that are always attended.
        init: usize = 1, Range::at_least(0, "");
        /// Last chunks up to the query's own that are always attended.
        local: usize = 1, Range::at_least(1, "a query always attends its own chunk");
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "infllmv2",
    about: "InfLLM v2: a hard choice by scores of mean-pooled windows of keys (arXiv 2509.24663).",
    presets: &[],
    keys: InfLlmV2::KEYS,
    build: |given| InfLlmV2::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3))],
    golden: &["q", "k", "v"],
};

impl InfLlmV2 {
    /// For the op that routes.
    fn choice(&self) -> WindowChoice {
        let InfLlmV2 { chunk_size, top, length, stride, init, local } = *self;
        WindowChoice { chunk_size, top, length, stride, init, local, pooling: Pooling::Max }
    }
}

impl Variant for InfLlmV2 {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn check(&self) -> std::result::Result<(), ConfigError> {
        windows::check(&self.choice())
    }

    /// Kept: the list.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let candidates = (t as f64 + 1.0) / 2.0 / self.stride as f64;
        Cost { candidates, kept: self.top as f64 * 3.0 * config.kv_heads as f64, ..Cost::default() }
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: Some(self.top) })
    }

    /// A model that was trained without forced first chunks has none here, so that `top` counts what its own router chose.
    fn adopt(&mut self, own: &Attention, _has: &dyn Fn(&str) -> bool) {
        if own.value("init").is_none() {
            self.init = 0;
        }
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let w = self.choice();
        let pool = |k: &Var| Ok(tape.leaf(pooled(&k.value, &w)?));
        let keys = x.pooled(tape, "windows", x.k, (w.length, w.stride), pool)?;
        let routes = window_routing_after(x.past(), &x.q.value, &keys.value, w)?;
        let (out, routes) = x.attend_to(tape, routes, None)?;
        Ok((out, Some(RouterTrace::hard(routes))))
    }
}

/// Mean keys of the windows, `[b, m, g, d]`, without a gradient.
fn pooled(k: &Tensor, w: &WindowChoice) -> Result<Tensor> {
    let [b, t, g, d] = k.dims("infllmv2")?;
    let tape = Tape::inference();
    let tokens = windows::tokens(t, w);
    let windows = index_select(&tape, &tape.leaf(k.clone()), 1, &Ids::places(k.device(), &tokens)?)?;
    let windows = reshape(&tape, &windows, &[b, tokens.len() / w.length, w.length, g, d])?;
    Ok(scale(&tape, &sum_axis(&tape, &windows, 2)?, 1.0 / w.length as f64)?.value)
}
