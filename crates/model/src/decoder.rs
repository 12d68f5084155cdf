//! Embedding, blocks, final norm, loss: the life of a token in one file. Above 400 lines: it is one life.

use std::cell::RefCell;
use std::sync::Arc;

use dash_core::ops::{
    RopeTable, add, attention_heads, embedding, index_select, linear, linear_add, linear_cross_entropy, reshape,
    rmsnorm, rope, swiglu, token_nll,
};
use dash_core::{Compute, DType, Device, Error, Ids, Result, Tape, Tensor, Var};

use crate::attention::{Attention, Inputs, Knob, Layer, Parted, Reroute, attend, attend_documents};
use crate::budget::Budget;
use crate::cache::{Cache, LayerCache};
use crate::config::ModelConfig;
use crate::params::{Params, Places, head_params, parameters};
use crate::trace::RouterTrace;

/// A decoder: configuration, parameters and rotary angles.
pub struct Model {
    config: ModelConfig,
    budget: Option<Arc<Budget>>,
    params: Params,
    places: Places,
    rope: RopeTable,
}

/// The final hidden states `[b, t, c]` and one trace per layer that routes.
pub struct Forward {
    /// After the last norm.
    pub hidden: Var,
    /// By layer; `None` where the attention is dense.
    pub routers: Vec<Option<RouterTrace>>,
}

impl Model {
    /// A fresh model for sequences of up to `positions` tokens.
    ///
    /// # Errors
    /// When the head width is odd, or the parameters are too many to count. Check the configuration first for a message
    /// that names the key.
    pub fn new(
        config: ModelConfig,
        vocab: usize,
        positions: usize,
        seed: u64,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        parameters(&config, vocab).map_err(|e| Error::invalid("model", e.to_string()))?;
        let params = Params::init(&config, vocab, seed, device, dtype)?;
        Self::with_params(config, params, positions)
    }

    /// A model with given parameters.
    ///
    /// # Errors
    /// When the head width is odd.
    pub fn with_params(config: ModelConfig, params: Params, positions: usize) -> Result<Self> {
        let first = params.iter().next().ok_or_else(|| Error::invalid("model", "there are no parameters"))?;
        let (device, dtype) = (first.value.device(), first.value.dtype());
        let rope = RopeTable::of_frequencies(device, dtype, positions, &config.rope_frequencies())?;
        let places = Places::of(&config);
        Ok(Model { config, budget: None, params, places, rope })
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Its parameters, to be updated.
    pub fn params_mut(&mut self) -> &mut Params {
        &mut self.params
    }

    /// Where its weights live.
    pub fn device(&self) -> &Device {
        self.params.iter().next().expect("a model has parameters").value.device()
    }

    /// Token ids or targets, `batch` sequences one after the other, as `[b, t]` on the model's device.
    ///
    /// # Errors
    /// When they do not divide into `batch` sequences, or the device has no memory left.
    pub fn ids(&self, ids: &[u32], batch: usize) -> Result<Ids> {
        Ids::new(self.device(), &[batch, ids.len() / batch.max(1)], ids)
    }

    /// Longest sequence it has rotary angles for.
    pub fn positions(&self) -> usize {
        self.rope.positions()
    }

    /// Evaluates with another attention: the parameters stay, those that the new variant lacks are not read.
    ///
    /// # Errors
    /// When the variant needs a parameter that the model does not have.
    pub fn set_attention(&mut self, attention: Attention) -> Result<()> {
        let mut config = self.config.clone();
        config.attention = attention;
        let find = |name: &str| self.params.get(name).cloned();
        let params = Params::from_named(&config, self.vocab(), find);
        let params = params.map_err(|e| Error::invalid("attention", e.to_string()))?;
        self.places = Places::of(&config);
        (self.config, self.params, self.budget) = (config, params, None);
        Ok(())
    }

    /// From now on queries attend as many chunks as another run did, instead of the attention's own number. Another attention ends it.
    ///
    /// # Errors
    /// When the attention has no number of chunks to change, or the budget does not fit the model.
    pub fn set_budget(&mut self, budget: Arc<Budget>) -> Result<()> {
        let (layers, kind) = (self.config.layers, self.config.attention.kind());
        let misfit = match self.config.attention.chunk_size() {
            Some(size) if self.config.attention.takes_budget() => budget.misfit(layers, size, self.positions()),
            _ => Some(format!("the attention is {kind}, which has no number of chunks to replace")),
        };
        if let Some(why) = misfit {
            return Err(Error::invalid("budget", why));
        }
        self.budget = Some(budget);
        Ok(())
    }

    /// What [`Model::set_budget`] set.
    pub fn budget(&self) -> Option<&Budget> {
        self.budget.as_deref()
    }

    /// Changes alpha and gamma where the attention has them as knobs.
    pub fn set_knobs(&mut self, alpha: Option<f64>, gamma: Option<f64>) {
        for (knob, value) in [(Knob::Alpha, alpha), (Knob::Gamma, gamma)] {
            if let (Some(knob), Some(value)) = (self.config.attention.knob_mut(knob), value) {
                *knob = value;
            }
        }
    }

    /// Where a layer's learned query of the chunk summaries stands among the parameters and their leaves.
    pub fn indexer(&self, layer: usize) -> Option<usize> {
        self.places.indexer(layer)
    }

    /// Rows of the embedding.
    pub fn vocab(&self) -> usize {
        self.params.get("model.embed_tokens.weight").map_or(0, |w| w.shape()[0])
    }

    /// Puts the parameters on a tape, in their order.
    pub fn leaves(&self, tape: &Tape) -> Vec<Var> {
        self.params.iter().map(|p| tape.leaf(p.value.clone())).collect()
    }

    /// The output projection `[v, c]`.
    pub fn head<'a>(&self, leaves: &'a [Var]) -> &'a Var {
        if self.config.tie_embeddings { &leaves[0] } else { &leaves[leaves.len() - 1] }
    }

    /// Runs the decoder on `ids [b, t]`; where they hold documents ([`Ids::of_documents`]), each as a sequence of its own.
    ///
    /// # Errors
    /// When an id is not below the vocabulary, or a sequence is longer than [`Model::positions`].
    pub fn forward(&self, tape: &Tape, leaves: &[Var], ids: &Ids) -> Result<Forward> {
        self.forward_as(tape, leaves, ids, None)
    }

    /// [`Model::forward`] with another router in every layer.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward_as(&self, tape: &Tape, leaves: &[Var], ids: &Ids, reroute: Option<&Reroute>) -> Result<Forward> {
        self.forward_after(tape, leaves, ids, reroute, Of::Choice)
    }

    /// The pass over `ids`.
    fn forward_after(
        &self,
        tape: &Tape,
        leaves: &[Var],
        ids: &Ids,
        reroute: Option<&Reroute>,
        of: Of,
    ) -> Result<Forward> {
        let c = &self.config;
        let &[batch, t] = ids.shape() else {
            return Err(Error::invalid("model", format!("token ids are [b, t], not {:?}", ids.shape())));
        };
        tape.scope(|| "model.embed_tokens".into());
        let mut x = embedding(tape, &leaves[0], ids)?;
        let mut routers = Vec::with_capacity(c.layers);
        let parted = Parted::of(ids, &c.attention, &self.rope)?;
        let recompute = c.recompute && tape.is_recording() && !tape.is_checking() && tape.watcher().is_none();
        for layer in 0..c.layers {
            let params = &leaves[self.places.block(layer)];
            let reroute = reroute.map(|r| match r {
                // every layer draws its own
                Reroute::Random(seed) => Reroute::Random(seed.wrapping_add(layer as u64)),
                oracle => oracle.clone(),
            });
            let (rope, budget) = (self.rope.clone(), self.budget.clone());
            let (loss_share, cache) = match of {
                Of::Choice => (None, None),
                Of::Loss(share) => (Some(share), None),
                Of::Cache(cache) => (None, Some(cache)),
            };
            let (config, parted) = (c.clone(), parted.clone());
            let block = Block { config, rope, budget, layer, batch, tokens: t, parted, reroute, loss_share };
            let (y, trace) = if recompute {
                block.recomputed(tape, params, &x)?
            } else {
                block.run(tape, params, &x, cache.map(|cache| cache.layer(layer)))?
            };
            routers.push(trace);
            x = y;
        }
        tape.scope(|| "model.norm".into());
        Ok(Forward { hidden: rmsnorm(tape, &x, &leaves[self.places.block(c.layers).start], c.norm_eps)?, routers })
    }

    /// The sum of the tokens' cross-entropies over `divisor`, usually the number of tokens of the global batch.
    ///
    /// # Errors
    /// As [`Model::forward`], or when a target is not below the vocabulary.
    pub fn loss(
        &self,
        tape: &Tape,
        leaves: &[Var],
        (ids, targets): (&Ids, &Ids),
        divisor: f64,
    ) -> Result<(Var, Vec<Option<RouterTrace>>)> {
        self.loss_as(tape, leaves, (ids, targets), divisor, None)
    }

    /// [`Model::loss`] with another router in every layer.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn loss_as(
        &self,
        tape: &Tape,
        leaves: &[Var],
        (ids, targets): (&Ids, &Ids),
        divisor: f64,
        reroute: Option<&Reroute>,
    ) -> Result<(Var, Vec<Option<RouterTrace>>)> {
        let share = (targets.len() - targets.ignored()) as f64 / divisor;
        let f = self.forward_after(tape, leaves, ids, reroute, Of::Loss(share))?;
        tape.scope(|| "lm_head".into());
        let loss = linear_cross_entropy(tape, &f.hidden, self.head(leaves), targets, divisor)?;
        Ok((loss, f.routers))
    }

    /// Cross-entropy of every token in nats, `[b * t]`, without gradients.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn nll(
        &self,
        (ids, targets): (&Ids, &Ids),
        reroute: Option<&Reroute>,
    ) -> Result<(Tensor, Vec<Option<RouterTrace>>)> {
        let tape = Tape::inference().computing(self.config.compute.into());
        let leaves = self.leaves(&tape);
        let f = self.forward_as(&tape, &leaves, ids, reroute)?;
        Ok((token_nll(&f.hidden.value, &self.head(&leaves).value, targets, tape.compute())?, f.routers))
    }

    /// Logits `[b, t, v]` of every position: for tests, export and generation, not for training.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn logits(&self, ids: &Ids) -> Result<Tensor> {
        let tape = Tape::inference().computing(self.config.compute.into());
        let leaves = self.leaves(&tape);
        let f = self.forward(&tape, &leaves, ids)?;
        Ok(linear(&tape, &f.hidden, self.head(&leaves))?.value)
    }

    /// Logits `[rows, v]` of some of the `b * t` positions, and what the routers chose.
    ///
    /// # Errors
    /// As [`Model::forward`], or when a row does not exist.
    pub fn logits_at(
        &self,
        ids: &Ids,
        rows: &[usize],
        reroute: Option<&Reroute>,
    ) -> Result<(Tensor, Vec<Option<RouterTrace>>)> {
        let tape = Tape::inference().computing(self.config.compute.into());
        let leaves = self.leaves(&tape);
        let f = self.forward_as(&tape, &leaves, ids, reroute)?;
        let hidden = reshape(&tape, &f.hidden, &[ids.len(), self.config.width])?;
        let logits =
            linear(&tape, &index_select(&tape, &hidden, 0, &Ids::places(ids.device(), rows)?)?, self.head(&leaves))?;
        Ok((logits.value, f.routers))
    }

    /// A cache of no token yet, for [`Model::logits_after`].
    pub fn cache(&self) -> Cache {
        Cache::new(self.config.layers)
    }

    /// Logits `[v]` of the position after one sequence: the tokens of the cache, then `ids [1, t]`, which it keeps. On a CPU operands are
    /// not rounded, whatever the model's compute.
    ///
    /// After an error the cache is of no use.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`Model::positions`] counts the tokens of the cache, too.
    pub fn logits_after(&self, cache: &mut Cache, ids: &Ids) -> Result<Tensor> {
        // on one worker, so that the ops wake no thread
        self.device().enter(|| {
            let logits = self.logits_of_last(ids, Some(cache))?;
            cache.advance(ids.len());
            Ok(logits)
        })
    }

    /// Logits `[v]` of the position after one sequence `[1, t]`. On a CPU operands are not rounded, whatever the model's compute.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn last_logits(&self, ids: &Ids) -> Result<Tensor> {
        self.device().enter(|| self.logits_of_last(ids, None))
    }

    fn logits_of_last(&self, ids: &Ids, cache: Option<&Cache>) -> Result<Tensor> {
        let compute = match self.device() {
            // products of few rows are no faster for it
            Device::Cpu(_) => Compute::Full,
            Device::Cuda(_) => self.config.compute.into(),
        };
        let tape = Tape::inference().computing(compute);
        let leaves = self.leaves(&tape);
        let f = self.forward_after(&tape, &leaves, ids, None, cache.map_or(Of::Choice, Of::Cache))?;
        let last = index_select(&tape, &f.hidden, 1, &Ids::places(ids.device(), &[ids.len().saturating_sub(1)])?)?;
        linear(&tape, &last, self.head(&leaves))?.value.reshape(&[self.vocab()])
    }
}

/// What a pass is of.
#[derive(Clone, Copy)]
enum Of<'a> {
    /// Hidden states, and what the routers choose.
    Choice,
    /// A loss, of which the pass has this share of the tokens.
    Loss(f64),
    /// Tokens that follow those of the cache.
    Cache(&'a Cache),
}

/// One decoder block, with what it needs to run again during backward.
struct Block {
    config: ModelConfig,
    rope: RopeTable,
    budget: Option<Arc<Budget>>,
    layer: usize,
    batch: usize,
    tokens: usize,
    parted: Option<Parted>,
    reroute: Option<Reroute>,
    loss_share: Option<f64>,
}

impl Block {
    /// `x [b, t, c]` to `[b, t, c]` with the block's parameters, in their order.
    fn run(
        &self,
        tape: &Tape,
        params: &[Var],
        x: &Var,
        cache: Option<&RefCell<LayerCache>>,
    ) -> Result<(Var, Option<RouterTrace>)> {
        let (c, layer) = (&self.config, self.layer);
        let [input_norm, wq, wk, wv, wo, own @ .., post_norm, gate, up, down] = params else {
            return Err(Error::invalid("block", format!("{} parameters are too few", params.len())));
        };
        tape.scope(|| format!("model.layers.{layer}.self_attn"));
        let a = rmsnorm(tape, x, input_norm, c.norm_eps)?;
        let first = cache.map_or(0, |cache| cache.borrow().past());
        let (besides, own) = own.split_at(head_params(c).len());
        let of = Layer { x: &a, params: own, config: c, rope: &self.rope, first };
        let [q, k, v] = self.heads(tape, &a, ([wq, wk, wv], besides), first)?;
        let (budget, reroute) = (self.budget.as_deref(), self.reroute.as_ref());
        let loss_share = self.loss_share;
        let inputs = Inputs { q: &q, k: &k, v: &v, own: &[], layer, budget, reroute, loss_share, cache };
        let (o, trace) = match &self.parted {
            Some(parted) => attend_documents(tape, &c.attention, &inputs, &of, &parted.documents)?,
            None => attend(tape, &c.attention, &Inputs { own: &c.attention.project(tape, &of)?, ..inputs })?,
        };
        let o = reshape(tape, &o, &[self.batch, self.tokens, c.heads * c.head_dim])?;
        let x = linear_add(tape, &o, wo, x)?;
        tape.scope(|| format!("model.layers.{layer}.mlp"));
        let m = rmsnorm(tape, &x, post_norm, c.norm_eps)?;
        Ok((swiglu(tape, &m, [gate, up, down], Some(&x))?, trace))
    }

    /// Queries, keys and values `[b, t, heads, d]`.
    fn heads(&self, tape: &Tape, a: &Var, weights: ([&Var; 3], &[Var]), first: usize) -> Result<[Var; 3]> {
        let Some(Parted { rope, .. }) = &self.parted else {
            return self.heads_at(tape, a, weights, (&self.rope, first));
        };
        // one row of tokens, each with the angles of its place in its document
        let row = reshape(tape, a, &[1, self.batch * self.tokens, self.config.width])?;
        let [q, k, v] = self.heads_at(tape, &row, weights, (rope, 0))?;
        let back = |x: Var| {
            let [_, _, heads, d] = x.value.dims("heads")?;
            reshape(tape, &x, &[self.batch, self.tokens, heads, d])
        };
        Ok([back(q)?, back(k)?, back(v)?])
    }

    /// The same: with biases and norms by single ops, without them by the one that does all at once.
    fn heads_at(
        &self,
        tape: &Tape,
        a: &Var,
        (weights, besides): ([&Var; 3], &[Var]),
        (rope_table, first): (&RopeTable, usize),
    ) -> Result<[Var; 3]> {
        if besides.is_empty() {
            return attention_heads(tape, a, weights, rope_table, first);
        }
        let c = &self.config;
        let [b, t, _] = a.value.dims("heads")?;
        let (biases, norms) = besides.split_at(if c.qkv_bias { 3 } else { 0 });
        let head = |i: usize, count: usize| {
            let mut y = linear(tape, a, weights[i])?;
            if let Some(bias) = biases.get(i) {
                y = add(tape, &y, bias)?;
            }
            y = reshape(tape, &y, &[b, t, count, c.head_dim])?;
            if let Some(norm) = norms.get(i) {
                y = rmsnorm(tape, &y, norm, c.norm_eps)?;
            }
            if i < 2 { rope(tape, &y, rope_table, first) } else { Ok(y) }
        };
        Ok([head(0, c.heads)?, head(1, c.kv_heads)?, head(2, c.kv_heads)?])
    }

    /// The same bits, keeping only `x`: backward runs the block again on a tape of its own (Chen et al. 2016, arXiv
    /// 1604.06174).
    fn recomputed(self, tape: &Tape, params: &[Var], x: &Var) -> Result<(Var, Option<RouterTrace>)> {
        let (y, trace) = self.run(&Tape::inference().computing(tape.compute()), params, x, None)?;
        let (params, x) = (params.to_vec(), x.clone());
        let (compute, told) = (tape.compute(), trace.as_ref().map_or(Vec::new(), RouterTrace::gradient_cells));
        let y = tape.record("block", y.value, move |dy, grads| {
            let inner = Tape::new().computing(compute);
            let input = inner.leaf(x.value.clone());
            let leaves: Vec<Var> = params.iter().map(|p| inner.leaf(p.value.clone())).collect();
            let (y, trace) = self.run(&inner, &leaves, &input, None)?;
            let mut found = inner.backward_from(&y, dy)?;
            for (outer, leaf) in params.iter().zip(&leaves).chain([(&x, &input)]) {
                if let Some(d) = found.take(leaf) {
                    grads.add(outer.id(), d)?;
                }
            }
            for (told, found) in told.iter().zip(trace.map_or(Vec::new(), |trace| trace.gradient_cells())) {
                found.get().into_iter().for_each(|norm| told.set(norm));
            }
            Ok(())
        })?;
        Ok((y, trace))
    }
}
