//! The chunks that hold most of a query's own attention: what a perfect router of a fixed number would choose (the naive block-sparse
//! attention of arXiv 2607.02980). There is no router to train, and every score is computed. No bias.

use dash_core::ops::attention::mass_routing;
use dash_core::{Result, Tape};

use super::keys::{Range, Value, settings};
use super::{Attended, Chunks, Cost, Inputs, Spec, Variant};
use crate::config::ModelConfig;
use crate::trace::RouterTrace;

settings! {
    /// Settings of the choice by mass.
    pub struct Mass {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the own one included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "mass",
    about: "The chunks that hold most of the query's softmax over all earlier tokens: a router that is always right, at the cost of every score.",
    presets: &[],
    keys: Mass::KEYS,
    build: |given| Mass::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3))],
    golden: &["q", "k", "v"],
};

impl Variant for Mass {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    /// Every earlier token is scored. Kept: the list, at a density of one half.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let chunks = t as f64 / self.chunk_size as f64;
        Cost { candidates: (t as f64 + 1.0) / 2.0, kept: 0.25 * chunks * 3.0 * config.kv_heads as f64, ..Cost::default() }
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
        let constants = Tape::inference();
        // those of all tokens so far
        let keys = x.pooled(&constants, "all keys", x.k, (1, 1), |k| Ok(k.clone()))?;
        let top = x.tops(self.top)?;
        let routes = mass_routing(x.past(), &x.q.value, &keys.value, self.chunk_size, top.top())?;
        let (out, routes) = x.attend_to(tape, routes, None)?;
        Ok((out, Some(RouterTrace::hard(routes))))
    }
}
