//! Entmax routing (arXiv 2605.18753, stage 1): which earlier chunks a query attends, and the bias that the choice gives them.
//!
//! Kept for backward: q, kbar, w and each head's p, per entry.

use super::super::cached::cuda::{kind_of_kept, route as route_after};
use super::super::{Dims, Routes, cuda};
use super::{Routing, check, cpu};
use crate::device::CudaData;
use crate::device::cuda::{CudaBuffer, Kind};
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
    /// That of the equation with the opposite sign: the choice learns to be worse at what the loss asks of it.
    Flipped,
    /// For every (query, head), in the place of the gradient of its scores, a random vector of the same norm over the same chunks that
    /// adds up to zero as every gradient through entmax does: what the size of the gradient does without its direction. Drawn anew
    /// for every gradient, from a hash of its bits and place; a GPU hashes and draws otherwise than a CPU.
    Placebo,
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

impl Entmax {
    /// What the gradient of the bias is divided by on its way to log w.
    pub(in crate::ops::attention) fn backward_sigma(&self) -> f64 {
        match self.gradient {
            RouterGradient::Flipped => -self.sigma,
            RouterGradient::Full
            | RouterGradient::Stopped
            | RouterGradient::StraightThrough
            | RouterGradient::Placebo => self.sigma,
        }
    }
}

/// What a watcher of [`entmax_routing`] is told in backward: the gradient of the scores of the listed chunks, `[entries,
/// group]`, 0 for the own chunk.
pub const SCORES: &str = "router.scores";
/// And the number of (query, chunk) pairs of a kv head, listed or not, whose score has a gradient other than zero.
pub const PAIRS: &str = "router.pairs";

/// Routes `q [b, t, h, d]` over the summaries `kbar [b, n, g, d]`. `diagonal [g]` is the own chunk's bias (0 when `None`).
///
/// # Errors
/// When shapes do not fit, alpha is not in (1, 2], sigma or gamma is not positive, or there are 2^32 (query, chunk) pairs or more.
pub fn entmax_routing(tape: &Tape, q: &Var, kbar: &Var, diagonal: Option<&Var>, settings: Entmax) -> Result<Routing> {
    entmax_routing_after(0, tape, q, kbar, diagonal, settings)
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

/// After kept tokens: nothing is kept for a backward pass.
fn after_on_cuda(
    compute: Compute,
    (dims, past): (Dims, usize),
    (qs, ks): (&CudaData, &CudaData),
    own: Option<&CudaBuffer>,
    settings: Entmax,
) -> Result<Forward> {
    // summaries are rounded once and kept so
    let rounded = kind_of_kept(compute, qs.dtype(), dims) == Kind::Bf16;
    let operands = if rounded || (qs.is_operand() && ks.is_operand()) {
        (qs.rounded()?, ks.rounded()?)
    } else {
        (qs.full()?, ks.full()?)
    };
    let out = route_after(dims, past, operands, own, settings)?;
    let entries = out.lists.entries();
    let weights = Tensor::from_cuda(&[entries], out.weights);
    Ok(Forward {
        routes: Routes::cuda_lists(out.lists),
        bias: Tensor::from_cuda(&[entries], out.bias),
        rows: weights.clone(),
        weights,
        heads: None,
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
        let own = diagonal.map(|_| own.full()).transpose()?;
        match past {
            0 => forward_on_cuda(tape, (dims, n), (qs, ks), own, settings)?,
            past => after_on_cuda(tape.compute(), (dims, past), (qs, ks), own, settings)?,
        }
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
