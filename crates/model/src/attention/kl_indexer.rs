//! A hard choice by an indexer that learns from its layer's own attention and from nothing else: the router of DSA (arXiv 2512.02556) and MSA
//! (arXiv 2606.13392). The indexer has a query and a key of its own for each token and kv head, made of a constant copy of the layer's input; a chunk's
//! score is what their softmax puts on its tokens. It is trained by the KL divergence from what attention puts on each attended chunk to what the indexer
//! puts on it; the language-modelling loss does not reach it, and its loss reaches nothing else. (DSA mixes heads by ReLU and compares tokens; MSA
//! takes the largest token of a chunk as its score.)

use dash_core::ops::attach;
use dash_core::ops::attention::{Top, indexer_kl, mass_routing};
use dash_core::{Error, Result, Tape, Var};

use super::keys::{Range, Value, settings};
use super::{Attended, Attention, Chunks, Cost, Inputs, Layer, Spec, Variant};
use crate::config::ModelConfig;
use crate::params::{Group, Init, ParamSpec};
use crate::trace::RouterTrace;

settings! {
    /// Settings of the choice by an indexer.
    pub struct KlIndexer {
        /// Tokens of a chunk.
        chunk_size: usize = 64, Range::at_least(1, "a chunk has at least one token");
        /// Attended chunks, the own one included.
        top: usize = 4, Range::at_least(1, "a query always attends its own chunk");
        /// Factor on the indexer's loss of each layer: a mean over sequences, kv heads and queries, in nats.
        weight: f64 = 1.0, Range::positive("without its loss an indexer learns nothing");
        /// The indexer's loss is over all visible chunks in the place of the attended ones, as in the warmup of DSA; every score is computed.
        all_chunks: bool = false, Range::ANY;
    }
}

/// See [`Spec`].
pub static SPEC: Spec = Spec {
    kind: "kl-indexer",
    about: "A hard choice by an indexer that learns where attention goes, from nothing but their KL divergence (arXiv 2512.02556, 2606.13392).",
    presets: &[],
    keys: KlIndexer::KEYS,
    build: |given| KlIndexer::from_given(given).into(),
    small: &[("chunk_size", Value::Size(4)), ("top", Value::Size(3))],
    golden: &["q", "k", "v", "index_q", "index_k"],
};

/// Names of the indexer's projections in a layer.
const PROJECTIONS: [&str; 2] = ["self_attn.index_q_proj.weight", "self_attn.index_k_proj.weight"];

impl Variant for KlIndexer {
    fn spec(&self) -> &'static Spec {
        &SPEC
    }

    fn params(&self, c: &ModelConfig) -> Vec<ParamSpec> {
        let shape = vec![c.kv_heads * c.head_dim, c.width];
        PROJECTIONS.map(|name| ParamSpec::new(name, shape.clone(), Init::Normal(c.init_std), Group::Matrix)).to_vec()
    }

    /// Scored: every earlier token by the indexer, and the listed ones again by indexer and attention for the loss. Kept: the indexer's queries and
    /// keys, and the list at a density of one half.
    fn cost(&self, c: &ModelConfig, t: usize) -> Cost {
        let (g, visible) = (c.kv_heads as f64, (t as f64 + 1.0) / 2.0);
        let compared = if self.all_chunks { visible } else { Attention::listed_at(self.chunk_size, self.top, t) };
        let share = g / c.heads as f64;
        let width = g * c.head_dim as f64;
        Cost {
            products: 2.0 * c.width as f64 * width,
            candidates: visible * share + compared * (1.0 + share),
            kept: 2.0 * width + 0.25 * t as f64 / self.chunk_size as f64 * 3.0 * g,
        }
    }

    fn keeps_scores(&self) -> bool {
        true
    }

    fn chunks(&self) -> Option<Chunks> {
        Some(Chunks { size: self.chunk_size, top: Some(self.top) })
    }

    fn takes_budget(&self) -> bool {
        true
    }

    fn has_own_loss(&self) -> bool {
        true
    }

    /// The indexer's gradient is that of its own loss, which the model's does not contain.
    fn gradient_is_exact(&self) -> bool {
        false
    }

    /// The indexer's queries and keys, of a constant.
    fn project(&self, tape: &Tape, layer: &Layer) -> Result<Vec<Var>> {
        let [q, k] = layer.params else {
            return Err(Error::invalid("kl-indexer", format!("{} parameters, not 2", layer.params.len())));
        };
        let x = tape.leaf(layer.x.value.clone());
        let constant = Layer { x: &x, ..*layer };
        let heads = layer.config.kv_heads;
        Ok(vec![constant.rotated_heads(tape, q, heads)?, constant.rotated_heads(tape, k, heads)?])
    }

    fn attend(&self, tape: &Tape, x: &Inputs) -> Result<Attended> {
        let [index_q, index_k] = x.own else {
            return Err(Error::invalid("kl-indexer", format!("{} inputs besides q, k and v, not 2", x.own.len())));
        };
        let constants = Tape::inference();
        // those of all tokens so far
        let keys = x.pooled(&constants, "index keys", index_k, (1, 1), |k| Ok(k.clone()))?;
        let chosen = |top: Top| mass_routing(x.past(), &index_q.value, &keys.value, self.chunk_size, top);
        let top = x.tops(self.top)?;
        let (out, routes) = x.attend_to(tape, chosen(top.top())?, None)?;
        let Some(share) = x.loss_share else { return Ok((out, Some(RouterTrace::hard(routes)))) };
        let compared = if self.all_chunks { chosen(Top::All(usize::MAX))? } else { routes.clone() };
        let loss = indexer_kl(tape, [index_q, index_k], [&x.q.value, &x.k.value], &compared)?;
        let out = attach(tape, &out, &loss, self.weight * share)?;
        Ok((out, Some(RouterTrace::hard(routes).with_indexer_loss(loss.value))))
    }
}
