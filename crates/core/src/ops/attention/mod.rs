//! The attention ops. Queries are `[b, t, h, d]`, keys and values `[b, t, g, d]`, head `i` reads key/value head
//! `i / (h / g)`. Equations: arXiv 2605.18753; the streaming softmax is that of FlashAttention (arXiv 2205.14135).
//!
//! Which chunks a query attends is data, [`Routes`]; routing ops make it, [`block_attention`] reads it, and
//! [`dense_attention`] is the same engine walking every block. [`span_attention`] computes whole rows, for what
//! is no list of blocks: token-level entmax, sliding and compressed windows. [`cached_attention`] is all of them for new tokens
//! after earlier ones whose keys and values were kept.

mod block;
pub(in crate::ops) mod cached;
pub mod cuda;
mod dense;
mod engine;
mod figures;
mod host_routes;
mod list;
mod routes;
mod routing;
mod span;
mod summary;

pub use block::block_attention;
pub use cached::{Seen, cached_attention, keep_rows, room_for_keys, room_for_rows};
pub use dense::dense_attention;
pub use figures::{AskedFigures, RouteFigures};
pub use host_routes::HostRoutes;
pub use routes::Routes;
pub use routing::{
    Center, Entmax, PAIRS, Pooling, Random, RouterGradient, Routing, SCORES, Top, WindowChoice, entmax_routing,
    entmax_routing_after, indexer_kl, landmark_bias, mass_routing, random_routing, softmax_bias, topk_routing,
    topk_routing_after, window_routing, window_routing_after,
};
pub use span::{Span, span_attention};
pub use summary::chunk_summary;

use crate::error::{Result, ensure};
use crate::shape::count32;
use crate::tensor::Tensor;

/// Extents of one attention call.
#[derive(Debug, Clone, Copy)]
pub struct Dims {
    /// Batch.
    pub b: usize,
    /// Tokens.
    pub t: usize,
    /// Query heads.
    pub h: usize,
    /// Key/value heads.
    pub g: usize,
    /// Head width.
    pub d: usize,
}

impl Dims {
    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.h / self.g
    }

    /// The extents of queries `[b, t, h, d]` with `g` heads of keys.
    fn new(op: &'static str, [b, t, h, d]: [usize; 4], g: usize) -> Result<Self> {
        ensure!(g > 0 && h > 0 && h.is_multiple_of(g), op, "{h} query heads do not divide into {g} key/value heads");
        ensure!(d > 0, op, "the heads have width 0");
        count32(op, t, "tokens of a sequence")?;
        Ok(Dims { b, t, h, g, d })
    }

    /// Checks queries against keys and, where given, values.
    pub(crate) fn check(op: &'static str, q: &Tensor, k: &Tensor, v: Option<&Tensor>) -> Result<Self> {
        let [b, t, h, d] = q.dims(op)?;
        let [bk, tk, g, dk] = k.dims(op)?;
        ensure!((b, t, d) == (bk, tk, dk), op, "q is {:?}, k is {:?}", q.shape(), k.shape());
        if let Some(v) = v {
            ensure!(v.shape() == k.shape(), op, "k is {:?}, v is {:?}", k.shape(), v.shape());
        }
        Self::new(op, [b, t, h, d], g)
    }
}

/// Where `t` tokens after `past` others end: the number of a chunk has 32 bits, and a chunk may be one token.
fn positions32(op: &'static str, past: usize, t: usize) -> Result<usize> {
    let end = past.saturating_add(t);
    count32(op, end, "tokens, earlier ones included")?;
    Ok(end)
}

/// Refuses more (query, chunk) pairs than lists number; else how many there are, as they are numbered.
fn entries32(op: &'static str, n: usize) -> Result<u32> {
    count32(op, n, "(query, chunk) pairs (a smaller batch, larger chunks or a sparser router have fewer)")
}
