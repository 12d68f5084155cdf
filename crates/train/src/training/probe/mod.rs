//! `[probe]`: a look into the router's gradient, every so many updates, on a fixed batch and a tape of its own: training does
//! not know of it and its bits do not change.
//!
//! A gradient that reaches the queries or keys of a layer came through the choice of chunks (scores, summaries) or through
//! the attention to tokens; the two are told apart where the router takes its inputs. Norms are Euclidean over the batch.

mod dead;
mod entries;
mod layer;
mod overlap;
mod split;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use dash_core::ops::attention::{PAIRS, SCORES};
use dash_core::ops::grad_norm;
use dash_core::{Result as CoreResult, Tape, Tensor, Watcher};
use dash_data::Batch;
use dash_model::attention::{Knob, ROUTER_K, ROUTER_Q};
use dash_model::{Model, RouterTrace};

pub use dead::STAYS;
pub use layer::LayerProbe;
pub use split::Split;

use super::trainer::batch_ids;
use crate::failure::Result;
use dead::Dead;
use entries::Entries;
use overlap::overlap;

/// Remembers what passes.
#[derive(Default)]
struct Recorder {
    values: RefCell<HashMap<(String, String), Tensor>>,
    gradients: RefCell<HashMap<(String, String), Tensor>>,
}

impl Watcher for Recorder {
    fn value(&self, scope: &str, name: &str, value: &Tensor) -> Option<Tensor> {
        self.values.borrow_mut().insert((scope.into(), name.into()), value.clone());
        None
    }
    fn gradient(&self, scope: &str, name: &str, gradient: &Tensor) {
        self.gradients.borrow_mut().insert((scope.into(), name.into()), gradient.clone());
    }
}

impl Recorder {
    fn value_at(&self, scope: &str, name: &str) -> CoreResult<Vec<f64>> {
        self.values.borrow()[&(scope.into(), name.into())].to_f64()
    }

    fn gradient_at(&self, scope: &str, name: &str) -> Option<Tensor> {
        self.gradients.borrow().get(&(scope.into(), name.into())).cloned()
    }
}

/// A fixed batch, and which chunks have been dead for how long.
pub struct Probe {
    batch: Batch,
    dead: Dead,
}

impl Probe {
    /// On the first `sequences` of a batch.
    pub fn new(batch: &Batch, sequences: usize) -> Self {
        Probe { batch: batch.first(sequences), dead: Dead::default() }
    }

    /// Loss of the batch, and what every layer that routes shows.
    ///
    /// # Errors
    /// When the model refuses the batch.
    pub fn run(&mut self, model: &Model) -> Result<(f64, Vec<LayerProbe>)> {
        let recorder = Rc::new(Recorder::default());
        let tape = Tape::new().computing(model.config().compute.into()).watched(recorder.clone());
        let leaves = model.leaves(&tape);
        let b = &self.batch;
        let (ids, targets) = batch_ids(model, b)?;
        let (loss, routers) = model.loss(&tape, &leaves, (&ids, &targets), b.counted().max(1) as f64)?;
        let grads = tape.backward(&loss)?;
        let mut out = Vec::new();
        for (layer, trace) in routers.iter().enumerate().filter_map(|(i, t)| Some((i, t.as_ref()?))) {
            let gradient = model.indexer(layer).and_then(|i| grads.get(&leaves[i]));
            let indexer = gradient.map_or(Ok(0.0), |g| grad_norm(g.device(), [g])?.item())?;
            out.push(self.layer(model, layer, trace, &recorder, indexer)?);
        }
        Ok((loss.value.item()?, out))
    }

    fn layer(
        &mut self,
        model: &Model,
        layer: usize,
        trace: &RouterTrace,
        seen: &Recorder,
        indexer: f64,
    ) -> Result<LayerProbe> {
        let scope = format!("model.layers.{layer}.self_attn");
        let gradient = |name: &str| seen.gradient_at(&scope, name).as_ref().map(Tensor::to_f64).transpose();
        let c = model.config();
        let (list, d) = (trace.routes()?.to_host()?, c.head_dim);
        let (b, g, t) = list.extents();
        let (h, s) = (c.heads, list.chunk_size());

        let split = |total: &str, router: &str, heads: usize| {
            let total = gradient(total)?.unwrap_or_else(|| vec![0.0; b * t * heads * d]);
            let router = gradient(router)?.unwrap_or_else(|| vec![0.0; total.len()]);
            CoreResult::Ok(Split::by_head(&router, &total, heads, d))
        };
        let (q, q_heads) = split("q", ROUTER_Q, h)?;
        let (k, k_heads) = split("k", ROUTER_K, g)?;

        let visible: usize = b * g * (s..t).map(|query| query / s).sum::<usize>();
        let pairs = gradient(PAIRS)?.map_or(0.0, |x| x[0]);
        let scores = seen.gradient_at(&scope, SCORES).map(|x| list.per_entry(&x)).transpose()?;
        let soft = trace.probabilities()?.and_then(|(w, p)| Some((w, p?)));
        let soft = soft.map(|(w, p)| CoreResult::Ok((list.per_entry(w)?, list.per_entry(p)?))).transpose()?;
        let figures = Entries {
            list: &list,
            heads: h,
            scores: scores.as_deref(),
            soft: soft.as_ref().map(|(w, p)| (w.as_slice(), p.as_slice())),
            alpha: c.attention.knob(Knob::Alpha),
        }
        .figures();
        let (dead_chunks, stay_dead) = self.dead.update(layer, &list);
        let inputs = (seen.value_at(&scope, "q")?, seen.value_at(&scope, "k")?);
        let (recall, captured_mass) = overlap(&list, (&inputs.0, &inputs.1), h, d);
        Ok(LayerProbe {
            layer,
            q,
            k,
            q_heads,
            k_heads,
            scores: figures.norms(),
            indexer,
            pairs_with_gradient: pairs / visible.max(1) as f64,
            dead_chunks,
            stay_dead,
            by_edge: figures.by_edge(),
            entropy: figures.entropy(),
            support: figures.support(),
            solver_error: figures.solver_error,
            recall,
            captured_mass,
            score_values: figures.score_values,
            weights: figures.weights,
        })
    }
}
