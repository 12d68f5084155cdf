//! The attention ops. Queries are `[b, t, h, d]`, keys and values `[b, t, g, d]`, head `i` reads key/value head
//! `i / (h / g)`. Equations: arXiv 2605.18753; the streaming softmax is that of FlashAttention (arXiv 2205.14135).
//!
//! Which chunks a query attends is data, [`Routes`]; routing ops make it, [`block_attention`] reads it, and
//! [`dense_attention`] is the same engine walking every block. [`span_attention`] computes whole rows, for what
//! is no list of blocks: token-level entmax, sliding and compressed windows.

mod block;
pub mod cuda;
mod dense;
mod engine;
mod list;
mod routes;
mod routing;
mod span;
mod summary;

pub use block::block_attention;
pub use dense::dense_attention;
pub use routes::{HostRoutes, Routes};
pub use routing::{
    Center, Entmax, PAIRS, Pooling, RouterGradient, Routing, SCORES, WindowChoice, entmax_routing, topk_routing,
    window_routing,
};
pub use span::{Span, span_attention};
pub use summary::chunk_summary;

use crate::error::{Result, ensure};
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

    /// Checks queries against keys and, where given, values.
    pub(crate) fn check(op: &'static str, q: &Tensor, k: &Tensor, v: Option<&Tensor>) -> Result<Self> {
        let [b, t, h, d] = q.dims(op)?;
        let [bk, tk, g, dk] = k.dims(op)?;
        ensure!((b, t, d) == (bk, tk, dk), op, "q is {:?}, k is {:?}", q.shape(), k.shape());
        ensure!(g > 0 && h % g == 0, op, "{h} query heads do not divide into {g} key/value heads");
        if let Some(v) = v {
            ensure!(v.shape() == k.shape(), op, "k is {:?}, v is {:?}", k.shape(), v.shape());
        }
        Ok(Dims { b, t, h, g, d })
    }
}
