//! Choices of a fixed number of chunks.

use super::super::super::engine::SCORE_TILE;
use super::super::super::list::BlockList;
use super::super::super::{Dims, Span};
use super::super::{Pooling, Top, WindowChoice};
use super::{Part, for_tiles, list_of, mean_of_rows};
use crate::device::{CpuDevice, CpuNumber};
use crate::error::Result;
use crate::ops::softmax::softmax_row;

/// Keeps the `count` chunks with the largest scores, ties to the lower chunk, in ascending order.
fn keep_best<T: CpuNumber>(chunks: &mut Vec<u32>, scores: &[T], count: usize) {
    if chunks.len() <= count {
        return;
    }
    chunks.sort_by(|&a, &b| {
        let (x, y) = (scores[a as usize], scores[b as usize]);
        y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
    });
    chunks.truncate(count);
    chunks.sort_unstable();
}

/// Lists the `top - 1` of the `own` earlier chunks with the largest scores, and the own chunk behind them. `order` is scratch.
fn list_best<T: CpuNumber>(part: &mut Part<T>, order: &mut Vec<u32>, scores: &[T], own: usize, top: usize) {
    order.clear();
    order.extend(0..own as u32);
    keep_best(order, scores, top - 1);
    part.counts.push(order.len() as u32 + 1);
    part.chunks.extend(&*order);
    part.chunks.push(own as u32);
}

/// For each of `n` chunks the windows that touch it, of `m`, and the whole strides that each shares with it.
fn touching_windows(n: usize, m: usize, choice: WindowChoice) -> Vec<Vec<(usize, usize)>> {
    let WindowChoice { chunk_size, length, stride, .. } = choice;
    let touching = |chunk: usize| {
        let (from, to) = (chunk * chunk_size, (chunk + 1) * chunk_size);
        let first = from.saturating_add(stride).saturating_sub(length) / stride;
        (first..m.min(to.div_ceil(stride))).filter_map(move |w| {
            let (low, high) = (from.max(w * stride), to.min((w * stride).saturating_add(length)));
            let strides = high.saturating_sub(low) / stride;
            (strides > 0).then_some((w, strides))
        })
    };
    (0..n).map(|chunk| touching(chunk).collect()).collect()
}

/// The score of a chunk from those of the windows that touch it.
fn pool<T: CpuNumber>(pooling: Pooling, touching: &[(usize, usize)], windows: &[T]) -> T {
    let mut score = T::ZERO;
    for &(w, strides) in touching {
        match pooling {
            Pooling::Max => score = score.max(windows[w]),
            Pooling::Overlap => score = T::of(strides as f64).mul_add(windows[w], score),
        }
    }
    score
}

/// The list of window routing, over `keys` of `m` windows. `past` tokens stand before the first query.
///
/// # Errors
/// When it has 2^32 entries or more.
pub fn windows<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    (past, m): (usize, usize),
    q: &[T],
    keys: &[T],
    span: Span,
    choice: WindowChoice,
) -> Result<BlockList> {
    let (group, chunk_size) = (dims.group(), choice.chunk_size);
    let n = (past + dims.t).div_ceil(chunk_size);
    let touching = touching_windows(n, m, choice);
    let visible = |query: usize| span.of(past + query).end;
    let parts = for_tiles(device, dims, m, visible, (q, keys), 1.0, |_, first, scores, part| {
        let (mut sum, mut score) = (vec![T::ZERO; m], vec![T::ZERO; n]);
        let mut chosen = Vec::with_capacity(n);
        for r in 0..SCORE_TILE.min(dims.t - first) {
            let (own, visible) = ((past + first + r) / chunk_size, visible(first + r));
            let rows = &mut scores[r * group * m..][..group * m];
            sum.fill(T::ZERO);
            for head in 0..group {
                let row = &mut rows[head * m..][..visible];
                softmax_row(row);
                sum.iter_mut().zip(&*row).for_each(|(s, &p)| *s += p);
            }
            for (score, touching) in score.iter_mut().zip(&touching).take(own + 1) {
                *score = pool(choice.pooling, touching, &sum);
            }
            let forced = |&chunk: &u32| (chunk as usize) < choice.init || own - (chunk as usize) < choice.local;
            chosen.clear();
            chosen.extend((0..=own as u32).filter(|chunk| !forced(chunk)));
            let left = choice.top - (own + 1 - chosen.len());
            keep_best(&mut chosen, &score, left);
            chosen.extend((0..=own as u32).filter(forced));
            chosen.sort_unstable();
            part.counts.push(chosen.len() as u32);
            part.chunks.extend(&chosen);
        }
    });
    list_of(device, "window_routing", dims, (past, chunk_size), &parts)
}

/// The list of the best of `n` chunks, `top` a query, the own one included. `past` tokens stand before the first query.
///
/// # Errors
/// As [`windows`].
pub fn topk<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    (past, n): (usize, usize),
    (q, kbar): (&[T], &[T]),
    (chunk_size, top): (usize, Top),
    gamma: f64,
) -> Result<BlockList> {
    let group = dims.group();
    let visible = |query: usize| (past + query) / chunk_size;
    let parts = for_tiles(device, dims, n, visible, (q, kbar), gamma, |kv, first, scores, part| {
        let (mut mean, mut order) = (device.alloc::<T>(n), Vec::with_capacity(n));
        for r in 0..SCORE_TILE.min(dims.t - first) {
            let own = visible(first + r);
            let rows = &mut scores[r * group * n..][..group * n];
            for head in 0..group {
                softmax_row(&mut rows[head * n..][..own]);
            }
            mean_of_rows(rows, n, &mut mean[..own]);
            list_best(part, &mut order, &mean, own, top.of(kv, first + r, dims.t));
        }
    });
    list_of(device, "topk_routing", dims, (past, chunk_size), &parts)
}

/// The list of the chunks with the largest share of softmax over all tokens before the own chunk, `top` a query with the own one. `past` tokens
/// stand before the first query.
///
/// # Errors
/// As [`windows`].
pub fn mass<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    past: usize,
    (q, k): (&[T], &[T]),
    (chunk_size, top): (usize, Top),
) -> Result<BlockList> {
    let (group, m) = (dims.group(), past + dims.t);
    let own = |query: usize| (past + query) / chunk_size;
    let parts = for_tiles(
        device,
        dims,
        m,
        |query| own(query) * chunk_size,
        (q, k),
        1.0,
        |kv, first, scores, part| {
            let (mut mean, mut order) = (vec![T::ZERO; m / chunk_size], Vec::new());
            for r in 0..SCORE_TILE.min(dims.t - first) {
                let own = own(first + r);
                mean.fill(T::ZERO);
                for head in 0..group {
                    let row = &mut scores[(r * group + head) * m..][..own * chunk_size];
                    softmax_row(row);
                    for (mean, tokens) in mean.iter_mut().zip(row.chunks_exact(chunk_size)) {
                        tokens.iter().for_each(|&p| *mean += p);
                    }
                }
                list_best(part, &mut order, &mean, own, top.of(kv, first + r, dims.t));
            }
        },
    );
    list_of(device, "mass_routing", dims, (past, chunk_size), &parts)
}
