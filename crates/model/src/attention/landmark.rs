//! A softmax over chunks of softmaxes over their tokens (Landmark attention, arXiv 2305.16300; HiLS, arXiv 2607.02980): an earlier
//! chunk's tokens share the weight that its summary has against the other chosen summaries and the tokens of the own chunk. The choice of
//! the `top` best summaries is hard, but the loss reaches the summaries of the chosen chunks through their weights. Every query head chooses for itself.

use dash_core::ops::attention::{chunk_summary, landmark_bias, topk_routing_after};
use dash_core::{Error, Result, Tape};

use super::keys::{Range, Value, settings};
use super::{Attended, Chunks, Cost, Inputs, Knob, ROUTER_K, ROUTER_Q, Spec, Variant};
use crate::config::ModelConfig;
use crate::params::ParamSpec;
use crate::trace::RouterTrace;

settings! {
    /// Settings of the softmax of softmaxes.
    pub struct Landmark {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the own one included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
        /// Factor on the scores of the summaries.
        gamma: f64 = 1.0, Knob::Gamma.range();
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "landmark",
    about: "The weight of a chosen chunk is its summary's softmax, shared by its tokens: a hard choice that the loss trains (arXiv 2305.16300).",
    presets: &[],
    keys: Landmark::KEYS,
    build: |given| Landmark::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3))],
    golden: &["q", "k", "v", "summary_query"],
};

impl Variant for Landmark {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        vec![ParamSpec::indexer(config)]
    }

    /// Kept: copies of keys and values, and list and bias at a density of one half.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let (h, d) = (config.heads as f64, config.head_dim as f64);
        let chunks = t as f64 / self.chunk_size as f64;
        let candidates = (t as f64 + 1.0) / 2.0 / self.chunk_size as f64;
        Cost { candidates, kept: 2.0 * h * d + 0.25 * chunks * 4.0 * h, ..Cost::default() }
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: Some(self.top) })
    }

    fn takes_budget(&self) -> bool {
        true
    }

    fn keeps_scores(&self) -> bool {
        true
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let qbar = x.own.first().ok_or_else(|| Error::invalid("landmark", "it has no indexer"))?;
        let (q, k, s) = (tape.watch(ROUTER_Q, x.q)?, tape.watch(ROUTER_K, x.k)?, self.chunk_size);
        let kbar = x.pooled(tape, "kbar", &k, (s, s), |k| chunk_summary(tape, k, qbar, s))?;
        let kbar = x.for_each_head(tape, &kbar)?;
        let [k, v] = [x.for_each_head(tape, x.k)?, x.for_each_head(tape, x.v)?];
        let x = Inputs { k: &k, v: &v, ..*x };
        let top = x.tops(self.top)?;
        let routes = topk_routing_after(x.past(), &q.value, &kbar.value, s, top.top(), self.gamma)?;
        // those of all tokens so far
        let keys = x.pooled(tape, "all keys", &k, (1, 1), |k| Ok(k.clone()))?;
        let bias = landmark_bias(tape, [&q, &keys, &kbar], &routes, self.gamma)?;
        let (out, routes) = x.attend_to(tape, routes, Some(bias))?;
        Ok((out, Some(RouterTrace::hard(routes))))
    }
}
