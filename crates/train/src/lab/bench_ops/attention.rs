//! Attention, dense and routed.
//!
//! Per query head and attended key: forward has two products over head_dim, backward four (dv, dp, dq, dk), two operations an
//! element: 12 head_dim. Scores computed again in backward are not counted.

use dash_core::ops::attention::{
    Entmax, Routing, Span, block_attention, chunk_summary, dense_attention, entmax_routing, span_attention,
};
use dash_core::{DType, Result as CoreResult, Tape, Tensor, Var};
use dash_model::attention::keys::{Given, Value};
use dash_model::{Attention, Dash};

use super::bench::{Bench, Cost, Sizes};
use crate::failure::{Failure, Result};
use crate::training::knobs::{GAMMA, gamma_for};

/// Random queries, keys and values.
pub struct Qkv {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

/// How much the random queries attend.
#[derive(Debug, Clone, Copy)]
pub struct Attended {
    /// Attended over visible chunks.
    pub density: f64,
    /// Attended chunks of a query.
    pub chunks_a_query: f64,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// The router's gamma.
    pub gamma: f64,
}

impl Qkv {
    pub fn new(bench: &mut Bench) -> CoreResult<Self> {
        let Sizes { batch, tokens, heads, kv_heads, head_dim, .. } = bench.sizes;
        let q = bench.normal(&[batch, tokens, heads, head_dim])?;
        let mut keys = || bench.normal(&[batch, tokens, kv_heads, head_dim]);
        Ok(Qkv { q, k: keys()?, v: keys()? })
    }

    fn all(&self) -> [Tensor; 3] {
        [self.q.clone(), self.k.clone(), self.v.clone()]
    }
}

/// Of so many (query head, query, attended key) triples. q, k, v, the output and their gradients pass three times in all.
pub fn attention_cost(s: Sizes, triples: f64) -> Cost {
    Cost { flops: 12.0 * triples * s.head_dim as f64, elements: 3.0 * (2.0 * s.q() + 2.0 * s.k()) }
}

/// Keys that a query sees on average.
fn mean_keys(s: Sizes) -> f64 {
    (s.tokens as f64 + 1.0) / 2.0
}

/// Attention that does not route.
pub fn time(bench: &mut Bench, qkv: &Qkv) -> Result<()> {
    let s = bench.sizes;
    let queries = (s.rows() * s.heads) as f64;
    let cost = attention_cost(s, queries * mean_keys(s));
    bench.time("dense attention", cost, &qkv.all(), |t, v| dense_attention(t, &v[0], &v[1], &v[2]))?;
    let window = Span::Sliding(512.min(s.tokens));
    let seen: usize = (0..s.tokens).map(|i| window.of(i).len()).sum();
    let cost = attention_cost(s, (s.batch * seen * s.heads) as f64);
    bench.time("span attention (512)", cost, &qkv.all(), |t, v| span_attention(t, &v[0], &v[1], &v[2], window, 1.0))
}

/// The keys that the entmax router has and the configured attention, too; those that it lacks as in a fresh [`Dash`], with a gamma
/// at which random queries leave something out.
pub fn router(configured: &Attention) -> Dash {
    let own = Dash::KEYS.iter().filter_map(|key| Some((key.name, configured.value(key.name)?)));
    Dash::from_given(&own.fold(Given::of(&[("gamma", Value::Number(4.0))]), |mut given, (key, value)| {
        given.set(key, value);
        given
    }))
}

/// Summaries, routing, and attention to what is routed.
pub fn time_routed(bench: &mut Bench, qkv: &Qkv, configured: &Attention, density: Option<f64>) -> Result<Attended> {
    let s = bench.sizes;
    let chunk = configured.chunk_size().unwrap_or(64).min(s.tokens / 2).max(1);
    let mut settings = Dash { chunk_size: chunk, ..router(configured) }.entmax();
    let qbar = Tensor::zeros(&bench.device, &[s.kv_heads * s.head_dim], DType::F32)?;
    // scores and weighted sum, 2 d a key each, backward twice that, and a softmax
    let cost = Cost { flops: 14.0 * s.k(), elements: 4.0 * s.k() };
    let inputs = [qkv.k.clone(), qbar];
    bench.time("chunk summary", cost, &inputs, |t, v| chunk_summary(t, &v[0], &v[1], chunk))?;

    let tape = Tape::inference().computing(bench.compute);
    let [k, qbar] = inputs.map(|x| tape.leaf(x));
    let (q, kbar) = (tape.leaf(qkv.q.clone()), chunk_summary(&tape, &k, &qbar, chunk)?);
    let route = |settings| entmax_routing(&tape, &q, &kbar, None, settings);
    let visible = (s.batch * s.kv_heads) as f64 * (0..s.tokens).map(|i| (i / chunk + 1) as f64).sum::<f64>();
    if let Some(target) = density {
        settings.gamma = gamma_of(target, |gamma| {
            CoreResult::Ok(route(Entmax { gamma, ..settings })?.routes.to_host()?.len() as f64 / visible)
        })?;
    }
    let Routing { routes, bias, .. } = route(settings)?;
    let entries = routes.to_host()?.len() as f64;

    let group = (s.heads / s.kv_heads) as f64;
    let cost = routing_cost(s, chunk, entries);
    let inputs = [qkv.q.clone(), kbar.value];
    bench.time("entmax routing", cost, &inputs, |t, v| Ok(entmax_routing(t, &v[0], &v[1], None, settings)?.bias))?;
    let [q, k, v] = qkv.all();
    let op = |t: &Tape, v: &[Var]| block_attention(t, &v[0], &v[1], &v[2], &routes, Some(&v[3]));
    let cost = attention_cost(s, entries * chunk as f64 * group);
    bench.time("block attention", cost, &[q, k, v, bias.value], op)?;
    let chunks_a_query = entries / (s.rows() * s.kv_heads) as f64;
    Ok(Attended { density: entries / visible, chunks_a_query, chunk, gamma: settings.gamma })
}

/// Forward scores every visible summary, 2 d; backward has two products of 2 d for every listed (chunk, query head). q is read
/// twice and its gradient written; an entry has a place, a weight, a bias, and p of its group.
fn routing_cost(s: Sizes, chunk: usize, entries: f64) -> Cost {
    let group = (s.heads / s.kv_heads) as f64;
    Cost {
        flops: 2.0 * s.q() * mean_keys(s) / chunk as f64 + 4.0 * entries * group * s.head_dim as f64,
        elements: 3.0 * s.q() + entries * (3.0 + group),
    }
}

/// gamma at which this share of the visible chunks is attended.
fn gamma_of(target: f64, share: impl Fn(f64) -> CoreResult<f64>) -> Result<f64> {
    let (most, least) = (share(GAMMA.0)?, share(GAMMA.1)?);
    if !(least..=most).contains(&target) {
        return Err(Failure::request(format!(
            "--density {target}: with these sizes between {least:.3} and {most:.3} of the visible chunks can be attended"
        )));
    }
    Ok(gamma_for(target, 24, share)?)
}
