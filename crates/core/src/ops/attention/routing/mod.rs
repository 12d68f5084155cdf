//! Routing (arXiv 2605.18753, stage 1): which earlier chunks a query attends, and the bias that the choice gives them.
//!
//! Scores s_hc = gamma q_h . kbar_c / sqrt d over the complete chunks before the query's own; a distribution per head; the
//! mean over the group, w. [`entmax_routing`]: alpha-entmax, every chunk with w > 0, bias (log w - mu) / sigma, with a
//! gradient. [`topk_routing`]: softmax, the `top` best chunks with the own one, no bias and no gradient. [`window_routing`]:
//! the hard choice of InfLLM v2 and NSA, by scores of overlapping windows.
//!
//! Scores exist for one tile of queries at a time. Kept for backward of entmax: q, kbar, w and each head's p, per entry.

mod cpu;
#[cfg(test)]
mod tests;

use super::{Dims, Routes, Span, cuda};
use crate::device::CudaData;
use crate::device::cuda::CudaBuffer;
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::number::Compute;
use crate::ops::entmax::check_alpha;
use crate::ops::grad_norm::cuda::root_of_sum;
use crate::tape::{ScalarCell, Tape, Var};
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

/// What a watcher of [`entmax_routing`] is told in backward: the gradient of the scores of the listed chunks, `[entries,
/// group]`, 0 for the own chunk.
pub const SCORES: &str = "router.scores";
/// And the number of (query, chunk) pairs of a kv head, listed or not, whose score has a gradient other than zero.
pub const PAIRS: &str = "router.pairs";

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
    ensure!(
        (b, d, (past + t) / chunk_size) == (bk, dk, n),
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
    cuda::streams(compute, q, dims, Some(chunk)) && cuda::scores_fit(q.device(), dims.d, n, beside)
}

/// Routes `q [b, t, h, d]` over the summaries `kbar [b, n, g, d]`. `diagonal [g]` is the own chunk's bias (0 when `None`).
///
/// # Errors
/// When shapes do not fit, alpha is not in (1, 2], sigma or gamma is not positive, or there are 2^32 (query, chunk) pairs or more.
pub fn entmax_routing(tape: &Tape, q: &Var, kbar: &Var, diagonal: Option<&Var>, settings: Entmax) -> Result<Routing> {
    entmax_routing_after(0, tape, q, kbar, diagonal, settings)
}

fn check_no_past(op: &'static str, past: usize) -> Result<()> {
    ensure!(past == 0, op, "no kernel of this GPU routes after {past} kept tokens");
    Ok(())
}

/// What the forward pass of [`entmax_routing`] leaves.
struct Forward {
    routes: Routes,
    bias: Tensor,
    weights: Tensor,
    /// For the backward pass: each head's p of every entry, or each head's threshold where the scores are computed again.
    rows: Tensor,
    heads: Option<Tensor>,
}

fn forward_on_cuda(
    tape: &Tape,
    (dims, n): (Dims, usize),
    (qs, ks): (&CudaData, &CudaData),
    own: Option<&CudaBuffer>,
    settings: Entmax,
) -> Result<Forward> {
    if !cuda::routes_stream(tape.compute(), qs, dims, settings.chunk_size) {
        let out = cuda::plain::entmax_routing(dims, n, (qs.full()?, ks.full()?), own, settings)?;
        let entries = out.mask.entries();
        let heads = Tensor::from_cuda(&[entries, dims.group()], out.heads);
        return Ok(Forward {
            routes: Routes::cuda(out.mask),
            bias: Tensor::from_cuda(&[entries], out.bias),
            weights: Tensor::from_cuda(&[entries], out.weights),
            rows: heads.clone(),
            heads: Some(heads),
        });
    }
    let queries = (qs.rounded()?, 0, dims.h * dims.d);
    let out = cuda::entmax_routing(dims, queries, ks.rounded()?, own, settings)?;
    let entries = out.mask.entries();
    // only a watcher reads them
    let heads = tape.watcher().map(|_| cuda::head_weights(dims, queries, ks.rounded()?, &out, settings));
    let heads = heads.transpose()?.map(|heads| Tensor::from_cuda(&[entries, dims.group()], heads));
    Ok(Forward {
        routes: Routes::cuda(out.mask),
        bias: Tensor::from_cuda(&[entries], out.bias),
        weights: Tensor::from_cuda(&[entries], out.weights),
        rows: Tensor::from_cuda(&[dims.b, dims.t, dims.h], out.taus),
        heads,
    })
}

/// [`entmax_routing`] where `past` tokens stand before the first query and `kbar` has the summaries of all complete chunks, theirs
/// too.
///
/// # Errors
/// As [`entmax_routing`], or when `past` is not 0 on a tape that records: the tokens before have no gradient.
// Above 60 lines: the passes of both devices share what is checked and kept here.
pub fn entmax_routing_after(
    past: usize,
    tape: &Tape,
    q: &Var,
    kbar: &Var,
    diagonal: Option<&Var>,
    settings: Entmax,
) -> Result<Routing> {
    let op = "entmax_routing";
    let (dims, n) = check(op, &q.value, &kbar.value, past, settings.chunk_size)?;
    ensure!(past == 0 || !tape.is_recording(), op, "{past} tokens before the first query, but the tape records");
    check_alpha(op, settings.alpha)?;
    ensure!(settings.sigma > 0.0, op, "sigma is {}, it divides the bias and must be positive", settings.sigma);
    ensure!(settings.gamma > 0.0, op, "gamma is {}, it must be positive", settings.gamma);
    if let Some(diagonal) = diagonal {
        let shape = diagonal.value.shape();
        ensure!(shape == [dims.g], op, "diagonal is {shape:?}, there are {} key/value heads", dims.g);
    }
    let own = diagonal.map_or(&q.value, |diagonal| &diagonal.value);
    let tensors = [&q.value, &kbar.value, own];
    let Forward { routes, bias, weights, rows, heads } = on_device!(op, tensors; Cpu<T>(cpu, [qs, ks, own]) => {
        let out = cpu::forward::<T>(cpu, dims, (past, n), qs, ks, diagonal.map(|_| own), settings)?;
        let entries = out.list.len();
        let heads = Tensor::from_buffer(&[entries, dims.group()], out.head_weights);
        Forward {
            routes: Routes::cpu(out.list),
            bias: Tensor::from_buffer(&[entries], out.bias),
            weights: Tensor::from_buffer(&[entries], out.weights),
            rows: heads.clone(),
            heads: Some(heads),
        }
    }, Cuda(_, [qs, ks, own]) => {
        check_no_past(op, past)?;
        forward_on_cuda(tape, (dims, n), (qs, ks), diagonal.map(|_| own.full()).transpose()?, settings)?
    });
    let (q, kbar, diagonal) = (q.clone(), kbar.clone(), diagonal.map(Var::id));
    let kept = (routes.clone(), weights.clone(), rows);
    let compute = tape.compute();
    let watch = tape.watcher().map(|w| (w.clone(), tape.scope_name()));
    let score_gradient = ScalarCell::default();
    let norm = score_gradient.clone();
    let bias = tape.record(op, bias, move |dy, grads| {
        let (routes, weights, rows) = kept;
        let tensors = [&q.value, &kbar.value, &weights, &rows, &dy];
        on_device!(op, tensors; Cpu<T>(cpu, [qs, ks, weights, heads, dbias]) => {
            let list = routes.on_cpu(op, cpu)?;
            let entries = (list, weights, heads, dbias);
            let d = cpu::backward::<T>(cpu, dims, n, (qs, ks), entries, settings, watch.is_some());
            norm.set(Tensor::from_buffer(&[], cpu.copy(&[d.squares.sqrt()])));
            if let Some((watcher, scope)) = watch {
                let shape = [list.len(), dims.group()];
                watcher.gradient(&scope, SCORES, &Tensor::from_buffer(&shape, d.scores));
                watcher.gradient(&scope, PAIRS, &Tensor::from_buffer(&[], cpu.copy(&[d.pairs as f64])));
            }
            if let Some(id) = diagonal {
                grads.add(id, Tensor::from_buffer(&[dims.g], d.diagonal))?;
            }
            if settings.gradient != RouterGradient::Stopped {
                grads.add(q.id(), Tensor::from_buffer(q.value.shape(), d.dq))?;
                grads.add(kbar.id(), Tensor::from_buffer(kbar.value.shape(), d.dkbar))?;
            }
            Ok(())
        }, Cuda(gpu, [qs, ks, weights, rows, dbias]) => {
            let mask = routes.on_cuda(op, gpu)?;
            let d = if cuda::routes_stream(compute, qs, dims, settings.chunk_size) {
                let kept = cuda::Kept { mask, weights: weights.full()?, taus: rows.full()? };
                let q = (qs.rounded()?, 0, dims.h * dims.d);
                cuda::entmax_routing_backward(dims, q, ks.rounded()?, kept, dbias.full()?, settings, watch.is_some())?
            } else {
                let operands = (qs.full()?, ks.full()?);
                cuda::plain::entmax_backward(dims, n, operands, mask, dbias.full()?, settings, watch.is_some())?
            };
            norm.set(Tensor::from_cuda(&[], root_of_sum(&d.squares)?));
            if let (Some((watcher, scope)), Some((scores, pairs))) = (watch, d.watched) {
                watcher.gradient(&scope, SCORES, &Tensor::from_cuda(&[mask.entries(), dims.group()], scores));
                watcher.gradient(&scope, PAIRS, &Tensor::from_cuda(&[], pairs));
            }
            if let Some(id) = diagonal {
                grads.add(id, Tensor::from_cuda(&[dims.g], d.diagonal))?;
            }
            if let Some((dq, dkbar)) = d.operands {
                grads.add(q.id(), Tensor::from_cuda(q.value.shape(), dq))?;
                grads.add(kbar.id(), Tensor::from_cuda(kbar.value.shape(), dkbar))?;
            }
            Ok(())
        })
    })?;
    Ok(Routing { routes, bias, weights, heads, score_gradient })
}

/// The `top` best chunks of every query, its own included, by the group mean of softmax probabilities; ties go to the
/// lower chunk. A choice without a gradient, so it takes and returns no variable.
///
/// # Errors
/// When shapes do not fit, `top` is 0, or there are 2^32 (query, chunk) pairs or more.
pub fn topk_routing(q: &Tensor, kbar: &Tensor, chunk_size: usize, top: usize, gamma: f64) -> Result<Routes> {
    topk_routing_after(0, q, kbar, chunk_size, top, gamma)
}

/// [`topk_routing`] where `past` tokens stand before the first query; `kbar` has the summaries of all complete chunks.
///
/// # Errors
/// As [`topk_routing`].
pub fn topk_routing_after(
    past: usize,
    q: &Tensor,
    kbar: &Tensor,
    chunk_size: usize,
    top: usize,
    gamma: f64,
) -> Result<Routes> {
    let op = "topk_routing";
    let (dims, n) = check(op, q, kbar, past, chunk_size)?;
    ensure!(top > 0, op, "top is 0, but a query always attends its own chunk");
    on_device!(op, [q, kbar]; Cpu<T>(cpu, [q, kbar]) => {
        Ok(Routes::cpu(cpu::topk::<T>(cpu, dims, (past, n), (q, kbar), (chunk_size, top), gamma)?))
    }, Cuda(_, [q, kbar]) => {
        check_no_past(op, past)?;
        Ok(Routes::cuda(if streams(q, (dims, n), chunk_size, 0) {
            let queries = (q.rounded()?, 0, dims.h * dims.d);
            cuda::topk_routing(dims, queries, kbar.rounded()?, chunk_size, top, gamma)?
        } else {
            cuda::plain::topk(dims, n, (q.full()?, kbar.full()?), (chunk_size, top), gamma)?
        }))
    })
}

/// How the scores of windows become the score of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The largest of the windows that touch it (InfLLM v2, arXiv 2509.24663).
    Max,
    /// The sum, each window weighted by the strides it shares with the chunk (NSA, arXiv 2502.11089, equation 9).
    Overlap,
}

/// Settings of [`window_routing`].
#[derive(Debug, Clone, Copy)]
pub struct WindowChoice {
    /// Tokens of a chunk.
    pub chunk_size: usize,
    /// Attended chunks, forced ones included.
    pub top: usize,
    /// Tokens of a window.
    pub length: usize,
    /// Tokens from one window's start to the next.
    pub stride: usize,
    /// First chunks that are always attended.
    pub init: usize,
    /// Last chunks up to the query's own that are always attended, at least 1.
    pub local: usize,
    /// See [`Pooling`].
    pub pooling: Pooling,
}

/// The chunks of every query by the scores of overlapping windows: softmax over the visible windows of `keys [b, m, g, d]`
/// per head, summed over the group, pooled to chunks; the forced chunks first, then the best, ties to the lower chunk. A
/// choice without a gradient.
///
/// # Errors
/// When shapes do not fit, `local` is 0, the forced chunks are more than `top`, or there are 2^32 (query, chunk) pairs or more.
pub fn window_routing(q: &Tensor, keys: &Tensor, choice: WindowChoice) -> Result<Routes> {
    window_routing_after(0, q, keys, choice)
}

/// [`window_routing`] where `past` tokens stand before the first query; `keys` are those of all complete windows.
///
/// # Errors
/// As [`window_routing`].
pub fn window_routing_after(past: usize, q: &Tensor, keys: &Tensor, choice: WindowChoice) -> Result<Routes> {
    let op = "window_routing";
    let [b, t, h, d] = q.dims(op)?;
    let [bk, m, g, dk] = keys.dims(op)?;
    ensure!(choice.chunk_size > 0, op, "a chunk has at least one token");
    let span = Span::Windows { length: choice.length, stride: choice.stride };
    span.check(op)?;
    ensure!(
        (b, d, span.keys(past + t)) == (bk, dk, m),
        op,
        "q is {:?} after {past} tokens, keys of windows of {} every {} are {:?}",
        q.shape(),
        choice.length,
        choice.stride,
        keys.shape()
    );
    ensure!(choice.local > 0, op, "local is 0, but a query always attends its own chunk");
    ensure!(
        choice.top >= choice.init.saturating_add(choice.local),
        op,
        "top is {}, but {} first and {} last chunks are always attended",
        choice.top,
        choice.init,
        choice.local
    );
    let dims = Dims::new(op, [b, t, h, d], g)?;
    on_device!(op, [q, keys]; Cpu<T>(cpu, [q, keys]) => {
        Ok(Routes::cpu(cpu::windows::<T>(cpu, dims, (past, m), q, keys, span, choice)?))
    }, Cuda(_, [q, keys]) => {
        check_no_past(op, past)?;
        let beside = cuda::window_scratch(t, choice.chunk_size);
        Ok(Routes::cuda(if streams(q, (dims, m), choice.chunk_size, beside) {
            cuda::window_routing(dims, (q.rounded()?, 0, dims.h * dims.d), keys.rounded()?, choice)?
        } else {
            cuda::plain::windows(dims, m, (q.full()?, keys.full()?), choice)?
        }))
    })
}
