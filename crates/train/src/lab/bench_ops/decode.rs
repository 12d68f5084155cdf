//! One token of each sequence after kept ones, as generation computes it: forward alone, dense and routed with its routing.

use std::hint::black_box;
use std::time::Instant;

use dash_core::ops::attention::{
    Entmax, Seen, Span, cached_attention, chunk_summary, dense_attention, entmax_routing_after,
};
use dash_core::{DType, Result as CoreResult, Tape, Tensor};
use dash_model::{Attention, Dash};

use super::attention::{Attended, Qkv, router};
use super::bench::{Bench, Cost, median};
use super::ceilings::wait;
use crate::failure::Result;

/// Runs in a row that are timed together: one takes less than waiting for it does.
const IN_A_ROW: usize = 32;

/// The last token of each sequence, after all others.
pub fn time(bench: &mut Bench, qkv: &Qkv, configured: &Attention, routed: Attended) -> Result<()> {
    let s = bench.sizes;
    let (past, chunk) = (s.tokens - 1, routed.chunk);
    if past == 0 {
        return Ok(());
    }
    let tape = Tape::inference().computing(bench.compute);
    let [q, k, v] = [&qkv.q, &qkv.k, &qkv.v].map(|x| tape.leaf(x.clone()));
    // leaves the operands as generation keeps them: rounded where products round theirs
    black_box(dense_attention(&tape, &q, &k, &v)?);
    let q = bench.normal(&[s.batch, 1, s.heads, s.head_dim])?;
    let flops = |keys: f64| 4.0 * (s.batch * s.heads * s.head_dim) as f64 * keys;
    let all = 2.0 * s.k();
    let seconds = median_of(bench, || {
        cached_attention(&q, &qkv.k, &qkv.v, past, Seen::Span(Span::Causal, 1.0)).map(|out| _ = black_box(out))
    })?;
    bench.add("decode, dense", seconds, Cost { flops: flops(s.tokens as f64), elements: all });

    let qbar = tape.leaf(Tensor::zeros(&bench.device, &[s.kv_heads * s.head_dim], DType::F32)?);
    let kbar = chunk_summary(&tape, &k, &qbar, chunk)?;
    let settings = Entmax { gamma: routed.gamma, ..Dash { chunk_size: chunk, ..router(configured) }.entmax() };
    let query = tape.leaf(q.clone());
    let route = || entmax_routing_after(past, &tape, &query, &kbar, None, settings);
    let listed: f64 = route()?.routes.counts()?.into_iter().map(f64::from).sum();
    let seconds = median_of(bench, || {
        let of = route()?;
        let seen = Seen::Routes(&of.routes, Some(&of.bias.value));
        cached_attention(&q, &qkv.k, &qkv.v, past, seen).map(|out| _ = black_box(out))
    })?;
    let (keys, summaries) = (listed * chunk as f64 / (s.batch * s.kv_heads) as f64, s.k() / chunk as f64);
    let elements = all * keys / s.tokens as f64 + summaries;
    bench.add(
        "decode, routed",
        seconds,
        Cost { flops: flops(keys) + flops(s.tokens as f64 / chunk as f64) / 2.0, elements },
    );
    Ok(())
}

/// Median seconds of a run.
fn median_of(bench: &Bench, run: impl Fn() -> CoreResult<()>) -> Result<f64> {
    median(bench.steps, || {
        let start = Instant::now();
        (0..IN_A_ROW).try_for_each(|_| run())?;
        wait(&bench.device)?;
        Ok(start.elapsed().as_secs_f64() / IN_A_ROW as f64)
    })
}
