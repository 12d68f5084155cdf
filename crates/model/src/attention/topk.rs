//! The hard twin of DashAttention: same summaries and scores, softmax, group mean, the best `top` chunks with the own
//! one, no bias, and no gradient into the choice. Summaries are means, which is what DashAttention's learned query starts
//! as; given a query (`indexer`), they use it.

use dash_core::ops::attention::{chunk_summary, topk_routing_after};
use dash_core::{Result, Tape, Tensor};

use super::keys::{Range, Value, settings};
use super::{Attended, Attention, Chunks, Cost, Inputs, Knob, Preset, Spec, Variant};
use crate::config::ModelConfig;
use crate::params::{INDEXER, ParamSpec};
use crate::trace::RouterTrace;

settings! {
    /// Settings of the hard twin.
    pub struct TopK {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the own one included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
        /// Factor on the scores (changes the group mean of several heads, not the order of one).
        gamma: f64 = 1.0, Knob::Gamma.range();
        /// Summaries use `indexer_q`, as a model that was trained as dash has it; it gets no gradient here.
        indexer: bool = false, Range::ANY;
        /// Every query head chooses chunks of its own; keys and values are copied for it.
        per_head: bool = false, Range::ANY;
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "topk",
    about: "The hard twin of dash: same summaries and scores, the best chunks, no bias, no gradient.",
    presets: &[Preset {
        name: "moba",
        about: "The gate of MoBA (arXiv 2502.13189): every query head has the chunks whose mean key it likes best.",
        values: &[("per_head", Value::Flag(true))],
    }],
    keys: TopK::KEYS,
    build: |given| TopK::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3))],
    golden: &["q", "k", "v", "summary_query"],
};

impl Variant for TopK {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn params(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        if self.indexer { vec![ParamSpec::indexer(config)] } else { Vec::new() }
    }

    /// Kept: the list, at a density of one half.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let chunks = t as f64 / self.chunk_size as f64;
        let candidates = (t as f64 + 1.0) / 2.0 / self.chunk_size as f64;
        Cost { candidates, kept: 0.25 * chunks * 3.0 * config.kv_heads as f64, ..Cost::default() }
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: Some(self.top) })
    }

    fn takes_budget(&self) -> bool {
        true
    }

    fn adopt(&mut self, _own: &Attention, has: &dyn Fn(&str) -> bool) {
        self.indexer = has(INDEXER);
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let k = &x.k.value;
        let constants = Tape::inference();
        let zeros = || Tensor::zeros(k.device(), &[k.shape()[2] * k.shape()[3]], k.dtype());
        let qbar = constants.leaf(x.own.first().map_or_else(zeros, |q| Ok(q.value.clone()))?);
        let s = self.chunk_size;
        let kbar = x.pooled(&constants, "kbar", x.k, (s, s), |k| chunk_summary(&constants, k, &qbar, s))?;
        if self.per_head {
            let kbar = x.for_each_head(&constants, &kbar)?.value;
            let [k, v] = [x.for_each_head(tape, x.k)?, x.for_each_head(tape, x.v)?];
            let x = Inputs { k: &k, v: &v, ..*x };
            let routes = topk_routing_after(x.past(), &x.q.value, &kbar, s, x.tops(self.top)?.top(), self.gamma)?;
            let (out, routes) = x.attend_to(tape, routes, None)?;
            return Ok((out, Some(RouterTrace::hard(routes))));
        }
        let routes = topk_routing_after(x.past(), &x.q.value, &kbar.value, s, x.tops(self.top)?.top(), self.gamma)?;
        let (out, routes) = x.attend_to(tape, routes, None)?;
        Ok((out, Some(RouterTrace::hard(routes))))
    }
}
