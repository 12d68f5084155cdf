//! Chunks at random: the own one and others that a hash of the place chooses, whatever they hold. No bias, no gradient, no router. The
//! control of every router: what is learned although nothing is routed (arXiv 2603.02227).

use dash_core::ops::attention::{Random, random_routing};
use dash_core::{Result, Tape};

use super::keys::{Range, Value, settings};
use super::{Attended, Chunks, Cost, Inputs, Spec, Variant};
use crate::config::ModelConfig;
use crate::trace::RouterTrace;

settings! {
    /// Settings of the random choice.
    pub struct RandomChunks {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the own one included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
        /// What the choice follows from, besides layer, kv head, position and chunk; 0 is the seed of the run.
        seed: usize = 0, Range::ANY;
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "random",
    about: "The own chunk and others at random, the same ones at a position in every sequence and update; no bias, no router.",
    presets: &[],
    keys: RandomChunks::KEYS,
    build: |given| RandomChunks::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3)), ("seed", Value::Size(1))],
    golden: &["q", "k", "v"],
};

impl Variant for RandomChunks {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    /// Kept: the list, at a density of one half.
    fn cost(&self, config: &ModelConfig, t: usize) -> Cost {
        let chunks = t as f64 / self.chunk_size as f64;
        Cost { kept: 0.25 * chunks * 3.0 * config.kv_heads as f64, ..Cost::default() }
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: Some(self.top) })
    }

    fn seed_mut(&mut self) -> Option<&mut usize> {
        Some(&mut self.seed)
    }

    fn takes_budget(&self) -> bool {
        true
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let [b, t, _, _] = x.q.value.dims("random")?;
        let extents = (b, x.k.value.shape()[2], t);
        let random = Random { seed: self.seed as u64, layer: x.layer, chunk_size: self.chunk_size };
        let routes = random_routing(x.q.value.device(), extents, x.past(), random, x.tops(self.top)?.top())?;
        let (out, routes) = x.attend_to(tape, routes, None)?;
        Ok((out, Some(RouterTrace::hard(routes))))
    }
}
