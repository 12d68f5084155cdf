use super::super::super::Dims;
use super::super::super::engine::SCORE_TILE;
use super::super::super::list::BlockList;
use super::super::{Center, Entmax};
use super::{Part, concat, for_tiles, list_of, mean_of_rows};
use crate::device::cpu::simd::{self, simd};
use crate::device::{Buffer, CpuDevice, CpuNumber};
use crate::error::Result;
use crate::ops::entmax::entmax_row;

pub struct Forward<T: CpuNumber> {
    pub list: BlockList,
    pub weights: Buffer<T>,
    pub bias: Buffer<T>,
    pub head_weights: Buffer<T>,
}

simd! {
    /// Writes the chunks with a weight above zero to the front of `chunks`, ascending, and returns their number. Without a
    /// branch, which weights that follow no pattern would have guessed wrong.
    fn support<T>(weights: &[T], chunks: &mut [u32]) -> usize {
        let mut count = 0;
        for (c, &w) in weights.iter().enumerate() {
            chunks[count] = c as u32;
            count += (w > T::ZERO) as usize;
        }
        count
    }
}

/// What a tile computes with, for one query: the group's mean over chunks, and of the chunks of its support and its own their
/// numbers, weights, and p of every head.
struct Scratch<T: CpuNumber> {
    group: usize,
    mean: Buffer<T>,
    listed: Buffer<u32>,
    kept: Buffer<T>,
    heads: Buffer<T>,
}

/// Appends the entries of a query in chunk `own` to its part. `scores` are rows of its heads, `n` wide; `diagonal` is the bias of
/// the own chunk.
fn route<T: CpuNumber>(
    scores: &mut [T],
    (n, own): (usize, usize),
    diagonal: T,
    settings: Entmax,
    s: &mut Scratch<T>,
    part: &mut Part<T>,
) {
    let group = s.group;
    for head in 0..group {
        entmax_row(&mut scores[head * n..][..own], settings.alpha);
    }
    mean_of_rows(scores, n, &mut s.mean[..own]);
    let count = support(&s.mean[..own], &mut s.listed);
    s.listed[count] = own as u32;
    for (e, heads) in s.heads.chunks_exact_mut(group).enumerate().take(count) {
        let chunk = s.listed[e] as usize;
        s.kept[e] = s.mean[chunk];
        heads.iter_mut().enumerate().for_each(|(head, p)| *p = scores[head * n + chunk]);
    }
    s.kept[count] = T::ZERO;
    s.heads[count * group..][..group].fill(T::ZERO);
    part.counts.push(count as u32 + 1);
    part.chunks.extend(&s.listed[..=count]);
    part.weights.extend(&s.kept[..=count]);
    part.heads.extend(&s.heads[..(count + 1) * group]);
    s.kept[count] = diagonal;
    let logs = &mut s.kept[..count];
    logs.iter_mut().for_each(|w| *w = w.ln());
    let mean = match settings.center {
        Center::Mean | Center::MeanDetached if !logs.is_empty() => simd::sum(logs) / T::of(logs.len() as f64),
        _ => T::ZERO,
    };
    logs.iter_mut().for_each(|b| *b = (*b - mean) / T::of(settings.sigma));
    part.bias.extend(&s.kept[..=count]);
}

/// The list of entmax routing over `n` chunks, and the numbers of its entries. `past` tokens stand before the first query.
///
/// # Errors
/// When it has 2^32 entries or more.
pub fn forward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    (past, n): (usize, usize),
    q: &[T],
    kbar: &[T],
    diagonal: Option<&[T]>,
    settings: Entmax,
) -> Result<Forward<T>> {
    let (group, chunk_size) = (dims.group(), settings.chunk_size);
    let visible = |query: usize| (past + query) / chunk_size;
    let parts = for_tiles(device, dims, n, visible, (q, kbar), settings.gamma, |kv, first, scores, part| {
        let mut scratch = Scratch {
            group,
            mean: device.alloc(n),
            listed: device.alloc(n + 1),
            kept: device.alloc(n + 1),
            heads: device.alloc((n + 1) * group),
        };
        let diagonal = diagonal.map_or(T::ZERO, |diagonal| diagonal[kv]);
        for r in 0..SCORE_TILE.min(dims.t - first) {
            let (own, scores) = (visible(first + r), &mut scores[r * group * n..][..group * n]);
            route(scores, (n, own), diagonal, settings, &mut scratch, part);
        }
    });
    Ok(Forward {
        list: list_of(device, "entmax_routing", dims, (past, chunk_size), &parts)?,
        weights: concat(device, &parts, |p| &p.weights),
        bias: concat(device, &parts, |p| &p.bias),
        head_weights: concat(device, &parts, |p| &p.heads),
    })
}
