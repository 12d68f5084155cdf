//! Routing (arXiv 2605.18753, stage 1): which earlier chunks a query attends, and the bias that the choice gives them.
//!
//! Scores s_hc = gamma q_h . kbar_c / sqrt d over the complete chunks before the query's own; a distribution per head; the
//! mean over the group, w. [`entmax_routing`]: alpha-entmax, every chunk with w > 0, bias (log w - mu) / sigma, with a
//! gradient. [`topk_routing`]: softmax, the `top` best chunks with the own one, no bias and no gradient. [`window_routing`]:
//! the hard choice of InfLLM v2 and NSA, by scores of overlapping windows.
//!
//! Scores exist for one tile of queries at a time. Kept for backward of entmax: q, kbar, w and each head's p, per entry.

#[cfg(test)]
mod arm_tests;
mod choice;
mod cpu;
mod entmax;
mod indexer_kl;
mod landmark_bias;
mod random;
#[cfg(test)]
mod score_tests;
mod softmax_bias;
#[cfg(test)]
mod tests;

pub use choice::{
    Pooling, Top, WindowChoice, mass_routing, topk_routing, topk_routing_after, window_routing, window_routing_after,
};
pub use entmax::{Center, Entmax, PAIRS, RouterGradient, SCORES, entmax_routing, entmax_routing_after};
pub use indexer_kl::indexer_kl;
pub use landmark_bias::landmark_bias;
pub use random::{Random, random_routing};
pub use softmax_bias::softmax_bias;

pub(in crate::ops::attention) use cpu::LEAST;

use super::{Dims, Routes, cuda, positions32};
use crate::device::CudaData;
use crate::error::{Result, ensure};
use crate::number::Compute;
use crate::tape::{ScalarCell, Var};
use crate::tensor::Tensor;

/// What [`entmax_routing`] returns.
pub struct Routing {
    /// The chunks of every query. The numbers below are in the order of their entries.
    pub routes: Routes,
    /// `[entries]`: the bias of every (query, chunk) pair.
    pub bias: Var,
    /// `[entries]`: w, 0 for the own chunk.
    pub weights: Tensor,
    /// `[entries, group]`: p of every head of the group, 0 for the own chunk, where the device keeps them.
    pub heads: Option<Tensor>,
    /// Set by backward: the norm of the gradient that reaches the scores of this call, an f64 scalar.
    pub score_gradient: ScalarCell,
}

fn check(op: &'static str, q: &Tensor, kbar: &Tensor, past: usize, chunk_size: usize) -> Result<(Dims, usize)> {
    let [b, t, h, d] = q.dims(op)?;
    let [bk, n, g, dk] = kbar.dims(op)?;
    ensure!(chunk_size > 0, op, "a chunk has at least one token");
    let end = positions32(op, past, t)?;
    ensure!(
        (b, d, end / chunk_size) == (bk, dk, n),
        op,
        "q is {:?} after {past} tokens, summaries of chunks of {chunk_size} are {:?}",
        q.shape(),
        kbar.shape()
    );
    Ok((Dims::new(op, [b, t, h, d], g)?, n))
}

/// Whether the kernels that keep a query's `n` scores in shared memory take the queries of a choice. It has no tape that says the
/// precision: that of whoever made the queries counts.
fn streams(q: &CudaData, (dims, n): (Dims, usize), chunk: usize, beside: usize) -> bool {
    let compute = if q.is_rounded() { Compute::Bf16 } else { Compute::Full };
    cuda::streams(compute, q, dims, Some(chunk)) && cuda::scores_fit(q.device(), dims.d, n, |_| beside)
}

fn check_no_past(op: &'static str, past: usize) -> Result<()> {
    ensure!(past == 0, op, "no kernel of this GPU routes after {past} kept tokens");
    Ok(())
}
