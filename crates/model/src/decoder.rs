//! Embedding, blocks, final norm, loss: the life of a token in one file.

use std::sync::Arc;

use dash_core::ops::{
    RopeTable, embedding, index_select, linear, linear_add, linear_cross_entropy, reshape, rmsnorm, rope, sigmoid,
    swiglu, token_nll,
};
use dash_core::{DType, Device, Error, Result, Tape, Tensor, Var};

use crate::attention::{Branches, Inputs, Reroute, attend};
use crate::config::{Attention, ModelConfig};
use crate::params::{Params, slots};
use crate::router::RouterTrace;

/// A decoder: configuration, parameters and rotary angles.
pub struct Model {
    config: ModelConfig,
    params: Params,
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
    /// When the head width is odd. Check the configuration first for a message that names the key.
    pub fn new(
        config: ModelConfig,
        vocab: usize,
        positions: usize,
        seed: u64,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let params = Params::init(&config, vocab, seed, device, dtype);
        Self::with_params(config, params, positions)
    }

    /// A model with given parameters.
    ///
    /// # Errors
    /// When the head width is odd.
    pub fn with_params(config: ModelConfig, params: Params, positions: usize) -> Result<Self> {
        let rope = RopeTable::new(positions, config.head_dim, config.rope_theta)?;
        Ok(Model { config, params, rope })
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
        let params = Params::from_named(&config, self.vocab(), find).map_err(|e| Error::invalid("attention", e))?;
        (self.config, self.params) = (config, params);
        Ok(())
    }

    /// Changes alpha and gamma of DashAttention; another attention has neither and stays as it is.
    pub fn set_knobs(&mut self, alpha: f64, gamma: f64) {
        if let Attention::Dash(d) = &mut self.config.attention {
            (d.alpha, d.gamma) = (alpha, gamma);
        }
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

    /// Runs the decoder on `ids`, `batch` sequences one after the other.
    ///
    /// # Errors
    /// When an id is not below the vocabulary, or a sequence is longer than [`Model::positions`].
    pub fn forward(&self, tape: &Tape, leaves: &[Var], ids: &Arc<[u32]>, batch: usize) -> Result<Forward> {
        self.forward_as(tape, leaves, ids, batch, None)
    }

    /// [`Model::forward`] with another router in every layer.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward_as(
        &self,
        tape: &Tape,
        leaves: &[Var],
        ids: &Arc<[u32]>,
        batch: usize,
        reroute: Option<&Reroute>,
    ) -> Result<Forward> {
        let c = &self.config;
        let t = ids.len() / batch;
        tape.scope(|| "model.embed_tokens".into());
        let mut x = embedding(tape, &leaves[0], ids, &[batch, t])?;
        let mut routers = Vec::with_capacity(c.layers);
        let count = slots(c).count;
        let recompute = c.recompute && tape.is_recording() && !tape.is_checking() && tape.watcher().is_none();
        for layer in 0..c.layers {
            let params = &leaves[1 + layer * count..][..count];
            let reroute = reroute.map(|r| match r {
                // every layer draws its own
                Reroute::Random(seed) => Reroute::Random(seed.wrapping_add(layer as u64)),
                oracle => oracle.clone(),
            });
            let block = Block { config: c.clone(), rope: self.rope.clone(), layer, batch, tokens: t, reroute };
            let (y, trace) =
                if recompute { block.recomputed(tape, params, &x)? } else { block.run(tape, params, &x)? };
            routers.push(trace);
            x = y;
        }
        tape.scope(|| "model.norm".into());
        Ok(Forward { hidden: rmsnorm(tape, &x, &leaves[1 + c.layers * count], c.norm_eps)?, routers })
    }

    /// The sum of the tokens' cross-entropies over `divisor`, usually the number of tokens of the global batch.
    ///
    /// # Errors
    /// As [`Model::forward`], or when a target is not below the vocabulary.
    pub fn loss(
        &self,
        tape: &Tape,
        leaves: &[Var],
        (ids, targets): (&Arc<[u32]>, &[u32]),
        batch: usize,
        divisor: f64,
    ) -> Result<(Var, Vec<Option<RouterTrace>>)> {
        let f = self.forward(tape, leaves, ids, batch)?;
        tape.scope(|| "lm_head".into());
        let loss = linear_cross_entropy(tape, &f.hidden, self.head(leaves), targets, divisor)?;
        Ok((loss, f.routers))
    }

    /// Cross-entropy of every token in nats, in order, without gradients.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn nll(
        &self,
        (ids, targets): (&Arc<[u32]>, &[u32]),
        batch: usize,
        reroute: Option<&Reroute>,
    ) -> Result<(Vec<f64>, Vec<Option<RouterTrace>>)> {
        let tape = Tape::inference().computing(self.config.compute.into());
        let leaves = self.leaves(&tape);
        let f = self.forward_as(&tape, &leaves, ids, batch, reroute)?;
        Ok((token_nll(&f.hidden.value, &self.head(&leaves).value, targets, tape.compute())?, f.routers))
    }

    /// Logits `[b, t, v]` of every position: for tests, export and generation, not for training.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn logits(&self, ids: &Arc<[u32]>, batch: usize) -> Result<Tensor> {
        let tape = Tape::inference().computing(self.config.compute.into());
        let leaves = self.leaves(&tape);
        let f = self.forward(&tape, &leaves, ids, batch)?;
        Ok(linear(&tape, &f.hidden, self.head(&leaves))?.value)
    }

    /// Logits `[rows, v]` of some of the `batch * t` positions, and what the routers chose.
    ///
    /// # Errors
    /// As [`Model::forward`], or when a row does not exist.
    pub fn logits_at(
        &self,
        ids: &Arc<[u32]>,
        batch: usize,
        rows: &[usize],
        reroute: Option<&Reroute>,
    ) -> Result<(Tensor, Vec<Option<RouterTrace>>)> {
        let tape = Tape::inference().computing(self.config.compute.into());
        let leaves = self.leaves(&tape);
        let f = self.forward_as(&tape, &leaves, ids, batch, reroute)?;
        let hidden = reshape(&tape, &f.hidden, &[ids.len(), self.config.width])?;
        let logits = linear(&tape, &index_select(&tape, &hidden, 0, rows)?, self.head(&leaves))?;
        Ok((logits.value, f.routers))
    }

    /// Logits `[v]` of the position after one sequence.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn last_logits(&self, ids: &Arc<[u32]>) -> Result<Tensor> {
        let tape = Tape::inference().computing(self.config.compute.into());
        let leaves = self.leaves(&tape);
        let f = self.forward(&tape, &leaves, ids, 1)?;
        let last = index_select(&tape, &f.hidden, 1, &[ids.len() - 1])?;
        linear(&tape, &last, self.head(&leaves))?.value.reshape(&[self.vocab()])
    }
}

/// One decoder block, with what it needs to run again during backward.
struct Block {
    config: ModelConfig,
    rope: RopeTable,
    layer: usize,
    batch: usize,
    tokens: usize,
    reroute: Option<Reroute>,
}

impl Block {
    /// `x [b, t, c]` to `[b, t, c]` with the block's parameters, in their order.
    fn run(&self, tape: &Tape, params: &[Var], x: &Var) -> Result<(Var, Option<RouterTrace>)> {
        let (c, p, layer) = (&self.config, slots(&self.config), self.layer);
        let (batch, t) = (self.batch, self.tokens);
        tape.scope(|| format!("model.layers.{layer}.self_attn"));
        let a = rmsnorm(tape, x, &params[p.input_norm], c.norm_eps)?;
        let heads = |w: usize, n: usize| reshape(tape, &linear(tape, &a, &params[w])?, &[batch, t, n, c.head_dim]);
        let q = rope(tape, &heads(p.q, c.heads)?, &self.rope, 0)?;
        let k = rope(tape, &heads(p.k, c.kv_heads)?, &self.rope, 0)?;
        let v = heads(p.v, c.kv_heads)?;
        let own = |slot: Option<usize>| slot.map(|i| &params[i]);
        let inputs = Inputs {
            q: &q,
            k: &k,
            v: &v,
            indexer: own(p.indexer),
            diagonal: own(p.diagonal),
            nsa: None,
            reroute: self.reroute.as_ref(),
        };
        let (o, trace) = match &p.nsa {
            None => attend(tape, &c.attention, inputs)?,
            Some(n) => {
                let rotated = |w: usize| rope(tape, &heads(w, c.kv_heads)?, &self.rope, 0);
                let (k_compressed, k_window) = (rotated(n.k_compressed)?, rotated(n.k_window)?);
                let (v_compressed, v_window) = (heads(n.v_compressed, c.kv_heads)?, heads(n.v_window, c.kv_heads)?);
                let gates = sigmoid(tape, &linear(tape, &a, &params[n.gates])?)?;
                let nsa = Branches {
                    k_compressed: &k_compressed,
                    v_compressed: &v_compressed,
                    k_window: &k_window,
                    v_window: &v_window,
                    compress_k: &params[n.compress_k],
                    compress_v: &params[n.compress_v],
                    position: &params[n.position],
                    gates: &reshape(tape, &gates, &[batch, t, c.heads, 3])?,
                };
                attend(tape, &c.attention, Inputs { nsa: Some(nsa), ..inputs })?
            }
        };
        let x = linear_add(tape, &reshape(tape, &o, &[batch, t, c.heads * c.head_dim])?, &params[p.o], x)?;
        tape.scope(|| format!("model.layers.{layer}.mlp"));
        let m = rmsnorm(tape, &x, &params[p.post_norm], c.norm_eps)?;
        let weights = [p.gate, p.up, p.down].map(|w| &params[w]);
        Ok((swiglu(tape, &m, weights, Some(&x))?, trace))
    }

    /// The same bits, keeping only `x`: backward runs the block again on a tape of its own (Chen et al. 2016, arXiv
    /// 1604.06174).
    fn recomputed(self, tape: &Tape, params: &[Var], x: &Var) -> Result<(Var, Option<RouterTrace>)> {
        let (y, trace) = self.run(&Tape::inference().computing(tape.compute()), params, x)?;
        let (params, x) = (params.to_vec(), x.clone());
        let (compute, told) = (tape.compute(), trace.as_ref().map(RouterTrace::gradient_cell));
        let y = tape.record("block", y.value, move |dy, grads| {
            let inner = Tape::new().computing(compute);
            let input = inner.leaf(x.value.clone());
            let leaves: Vec<Var> = params.iter().map(|p| inner.leaf(p.value.clone())).collect();
            let (y, trace) = self.run(&inner, &leaves, &input)?;
            let mut found = inner.backward_from(&y, dy)?;
            for (outer, leaf) in params.iter().zip(&leaves).chain([(&x, &input)]) {
                if let Some(d) = found.take(leaf) {
                    grads.add(outer.id(), d)?;
                }
            }
            if let (Some(told), Some(trace)) = (told, trace) {
                told.set(trace.gradient_cell().get());
            }
            Ok(())
        })?;
        Ok((y, trace))
    }
}
