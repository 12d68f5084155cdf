//! Routing (arXiv 2605.18753, stage 1): which earlier chunks a query attends, and the bias that the choice gives them.
//!
//! Scores s_hc = gamma q_h . kbar_c / sqrt d over the complete chunks before the query's own; a distribution per head; the
//! mean over the group, w. [`entmax_routing`]: alpha-entmax, every chunk with w > 0, bias (log w - mu) / sigma, with a
//! gradient. [`topk_routing`]: softmax, the `top` best chunks with the own one, no bias and no gradient.
//!
//! Scores exist for one tile of queries at a time. Kept for backward of entmax: q, kbar, w and each head's p, per entry.

mod cpu;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use super::{BlockList, Dims};
use crate::error::{Result, ensure};
use crate::ops::entmax::check_alpha;
use crate::storage::{DType, with_real};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// What is subtracted from log w before it is divided by sigma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Center {
    /// Nothing.
    None,
    /// The mean of log w over the support, differentiated: singular at the support edge for every sigma.
    Mean,
    /// The same value, a constant to the gradient.
    MeanDetached,
}

/// What the gradient of the bias does. The forward value never depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterGradient {
    /// The gradient of the equation.
    Full,
    /// The bias is a constant, as a hard choice with the same values would train.
    Stopped,
    /// As if w were the group mean of the softmax of the same scores, for the chunks of the support.
    StraightThrough,
}

/// Settings of [`entmax_routing`].
#[derive(Debug, Clone, Copy)]
pub struct Entmax {
    /// Tokens of a chunk.
    pub chunk_size: usize,
    /// In (1, 2]; larger is sparser.
    pub alpha: f64,
    /// Factor on the scores; larger is sparser.
    pub gamma: f64,
    /// Divides the bias; infinity would be a hard threshold.
    pub sigma: f64,
    /// See [`Center`].
    pub center: Center,
    /// See [`RouterGradient`].
    pub gradient: RouterGradient,
}

/// What [`entmax_routing`] returns.
pub struct Routing {
    /// The chunks of every query, its own last.
    pub list: Arc<BlockList>,
    /// `[entries]`: the bias of every (query, chunk) pair.
    pub bias: Var,
    /// `[entries]`: w, 0 for the own chunk.
    pub weights: Tensor,
    /// Set by backward: the norm of the gradient that reaches the scores of this call.
    pub score_gradient: Rc<Cell<f64>>,
}

fn check(op: &'static str, q: &Tensor, kbar: &Tensor, chunk_size: usize) -> Result<(Dims, usize, DType)> {
    let [b, t, h, d] = q.dims(op)?;
    let [bk, n, g, dk] = kbar.dims(op)?;
    ensure!(chunk_size > 0, op, "a chunk has at least one token");
    ensure!(
        (b, d, t / chunk_size) == (bk, dk, n),
        op,
        "q is {:?}, summaries of chunks of {chunk_size} are {:?}",
        q.shape(),
        kbar.shape()
    );
    ensure!(g > 0 && h % g == 0, op, "{h} query heads do not divide into {g} key/value heads");
    Ok((Dims { b, t, h, g, d }, n, crate::tensor::same_dtype(op, q, kbar)?))
}

/// Routes `q [b, t, h, d]` over the summaries `kbar [b, n, g, d]`. `diagonal [g]` is the own chunk's bias (0 when `None`).
///
/// # Errors
/// When shapes do not fit, alpha is not in (1, 2], or sigma or gamma is not positive.
pub fn entmax_routing(tape: &Tape, q: &Var, kbar: &Var, diagonal: Option<&Var>, settings: Entmax) -> Result<Routing> {
    let op = "entmax_routing";
    let (dims, n, dtype) = check(op, &q.value, &kbar.value, settings.chunk_size)?;
    check_alpha(op, settings.alpha)?;
    ensure!(settings.sigma > 0.0, op, "sigma is {}, it divides the bias and must be positive", settings.sigma);
    ensure!(settings.gamma > 0.0, op, "gamma is {}, it must be positive", settings.gamma);
    if let Some(diagonal) = diagonal {
        let shape = diagonal.value.shape();
        ensure!(shape == [dims.g], op, "diagonal is {shape:?}, there are {} key/value heads", dims.g);
    }
    let device = q.value.cpu();
    with_real!(dtype, T => {
        let own = diagonal.map(|d| d.value.data::<T>());
        let out = cpu::forward::<T>(device, dims, n, q.value.data(), kbar.value.data(), own, settings);
        let entries = out.list.len();
        let bias = Tensor::from_buffer(&[entries], device.adopt(out.bias));
        let weights = Tensor::from_buffer(&[entries], device.adopt(out.weights));
        let list = Arc::new(out.list);
        let (q, kbar, diagonal) = (q.clone(), kbar.clone(), diagonal.map(Var::id));
        let kept = (list.clone(), weights.clone(), out.head_weights);
        let score_gradient = Rc::new(Cell::new(0.0));
        let norm = score_gradient.clone();
        let bias = tape.record(op, bias, move |dy, grads| {
            let (list, weights, heads) = kept;
            let d = cpu::backward::<T>(
                dy.cpu(), dims, n, (q.value.data(), kbar.value.data()), (&list, weights.data(), &heads), dy.data(), settings,
            );
            norm.set(d.squares.sqrt());
            if let Some(id) = diagonal {
                grads.add(id, Tensor::from_buffer(&[dims.g], d.diagonal))?;
            }
            if settings.gradient != RouterGradient::Stopped {
                grads.add(q.id(), Tensor::from_buffer(q.value.shape(), d.dq))?;
                grads.add(kbar.id(), Tensor::from_buffer(kbar.value.shape(), d.dkbar))?;
            }
            Ok(())
        })?;
        Ok(Routing { list, bias, weights, score_gradient })
    })
}

/// The `top` best chunks of every query, its own included, by the group mean of softmax probabilities; ties go to the
/// lower chunk. A choice without a gradient, so it takes and returns no variable.
///
/// # Errors
/// When shapes do not fit or `top` is 0.
pub fn topk_routing(q: &Tensor, kbar: &Tensor, chunk_size: usize, top: usize, gamma: f64) -> Result<Arc<BlockList>> {
    let op = "topk_routing";
    let (dims, n, dtype) = check(op, q, kbar, chunk_size)?;
    ensure!(top > 0, op, "top is 0, but a query always attends its own chunk");
    with_real!(dtype, T => {
        Ok(Arc::new(cpu::topk::<T>(q.cpu(), dims, n, q.data(), kbar.data(), chunk_size, top, gamma)))
    })
}
