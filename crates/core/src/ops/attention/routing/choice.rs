//! Choices of a fixed number of chunks, which have no gradient.

use super::super::{Dims, Routes, Span, cuda, positions32};
use super::{check, check_no_past, cpu, streams};
use crate::device::cuda::{CudaBuffer, CudaDevice};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::tensor::Tensor;

/// How many chunks a query attends at most, its own included.
#[derive(Debug, Clone, Copy)]
pub enum Top<'a> {
    /// The same number for every query.
    All(usize),
    /// `[g, t]`: by kv head and query, for every sequence of the batch.
    Each(&'a [u32]),
}

impl Top<'_> {
    /// Of a query of a kv head, of `t` queries.
    pub(in crate::ops::attention) fn of(self, kv_head: usize, query: usize, t: usize) -> usize {
        match self {
            Top::All(top) => top,
            Top::Each(tops) => tops[kv_head * t + query] as usize,
        }
    }

    /// The largest number.
    pub(in crate::ops::attention) fn most(self) -> usize {
        match self {
            Top::All(top) => top,
            Top::Each(tops) => tops.iter().copied().max().unwrap_or(1) as usize,
        }
    }

    /// The numbers on a card, where each query has its own.
    pub(in crate::ops::attention) fn upload(self, device: &CudaDevice) -> Result<Option<CudaBuffer>> {
        match self {
            Top::All(_) => Ok(None),
            Top::Each(tops) => device.upload("top", tops).map(Some),
        }
    }

    pub(in crate::ops::attention) fn check(self, op: &'static str, kv_heads: usize, t: usize) -> Result<()> {
        let least = match self {
            Top::All(top) => top,
            Top::Each(tops) => {
                ensure!(
                    tops.len() == kv_heads * t,
                    op,
                    "{} numbers for {kv_heads} kv heads of {t} queries",
                    tops.len()
                );
                tops.iter().copied().min().unwrap_or(1) as usize
            }
        };
        ensure!(least > 0, op, "top is 0, but a query always attends its own chunk");
        Ok(())
    }
}

/// The `top` best chunks of every query, its own included, by the group mean of softmax probabilities; ties go to the
/// lower chunk. A choice without a gradient, so it takes and returns no variable.
///
/// # Errors
/// When shapes do not fit, `top` is 0, or there are 2^32 (query, chunk) pairs or more.
pub fn topk_routing(q: &Tensor, kbar: &Tensor, chunk_size: usize, top: usize, gamma: f64) -> Result<Routes> {
    topk_routing_after(0, q, kbar, chunk_size, Top::All(top), gamma)
}

/// [`topk_routing`] where `past` tokens stand before the first query, and each query may have a number of its own; `kbar` has the
/// summaries of all complete chunks.
///
/// # Errors
/// As [`topk_routing`], or when there is not one number a query.
pub fn topk_routing_after(
    past: usize,
    q: &Tensor,
    kbar: &Tensor,
    chunk_size: usize,
    top: Top,
    gamma: f64,
) -> Result<Routes> {
    let op = "topk_routing";
    let (dims, n) = check(op, q, kbar, past, chunk_size)?;
    top.check(op, dims.g, dims.t)?;
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

/// The chunks that hold most of each query's attention: softmax of q . k / sqrt d over the tokens of the complete chunks before its own,
/// added up by chunk, the mean over the group; the `top` best with the own one, ties to the lower chunk. `k [b, past + t, g, d]` has the keys of
/// the `past` tokens before the first query, too. The choice that a perfect router would make of a fixed number (the naive form of
/// arXiv 2607.02980); it computes every score, and has no gradient.
///
/// # Errors
/// When shapes do not fit, there is not one number above 0 a query, or there are 2^32 (query, chunk) pairs or more.
pub fn mass_routing(past: usize, q: &Tensor, k: &Tensor, chunk_size: usize, top: Top) -> Result<Routes> {
    let op = "mass_routing";
    let [b, t, h, d] = q.dims(op)?;
    let [bk, m, g, dk] = k.dims(op)?;
    ensure!(chunk_size > 0, op, "a chunk has at least one token");
    ensure!(
        (b, d, positions32(op, past, t)?) == (bk, dk, m),
        op,
        "q is {:?} after {past} tokens, k is {:?}",
        q.shape(),
        k.shape()
    );
    let dims = Dims::new(op, [b, t, h, d], g)?;
    top.check(op, g, t)?;
    on_device!(op, [q, k]; Cpu<T>(cpu, [q, k]) => {
        Ok(Routes::cpu(cpu::mass::<T>(cpu, dims, past, (q, k), (chunk_size, top))?))
    }, Cuda(_, [q, k]) => {
        check_no_past(op, past)?;
        Ok(Routes::cuda(cuda::plain::mass(dims, (q.full()?, k.full()?), (chunk_size, top))?))
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
        (b, d, span.keys(positions32(op, past, t)?)) == (bk, dk, m),
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
