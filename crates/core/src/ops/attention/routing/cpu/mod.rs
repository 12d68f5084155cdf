//! Scores of tiles of queries, from which each rule chooses chunks; the lists of all tiles, joined in order.

mod backward;
mod choice;
mod entmax;
mod indexer;
mod landmark;
mod placebo;
mod softmax_bias;

pub use backward::backward;
pub use choice::{mass, topk, windows};
pub use entmax::forward;
pub use indexer::{indexer_kl, indexer_kl_backward};
pub use landmark::{landmark, landmark_backward};
pub use softmax_bias::{LEAST, bias_backward, bias_of};

use super::super::engine::{SCORE_TILE, scale_row};
use super::super::list::BlockList;
use super::super::{Dims, entries32};
use crate::device::cpu::matrix::{MatMut, MatRef};
use crate::device::cpu::simd::simd;
use crate::device::cpu::transpose::transpose_into;
use crate::device::{Buffer, CpuDevice, CpuElement, CpuNumber, Gemm};
use crate::error::Result;

/// Lists and numbers of one tile of one kv head, in order of query.
struct Part<T: CpuNumber> {
    counts: Buffer<u32>,
    chunks: Buffer<u32>,
    weights: Buffer<T>,
    bias: Buffer<T>,
    /// per entry, p of every head of the group
    heads: Buffer<T>,
}

impl<T: CpuNumber> Part<T> {
    fn new(device: &CpuDevice, rows: usize) -> Self {
        Part {
            counts: device.list(rows),
            chunks: device.list(rows),
            weights: device.list(rows),
            bias: device.list(rows),
            heads: device.list(rows),
        }
    }
}

/// Runs `choose(kv head, first query of the tile, scores, part)` for every tile of every kv head and returns the parts in order.
/// Row `r * group + i` of the scores, `n` wide, is head `i` of query `r`; only its first `visible(query)` are valid, a
/// number that grows with the query.
fn for_tiles<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    n: usize,
    visible: impl Fn(usize) -> usize + Sync + Send,
    (q, kbar): (&[T], &[T]),
    gamma: f64,
    choose: impl Fn(usize, usize, &mut [T], &mut Part<T>) + Sync + Send,
) -> Vec<Part<T>> {
    let Dims { b, t, h, g, d } = dims;
    let group = dims.group();
    let mut kbar_t = device.alloc::<T>(b * g * d * n);
    device.for_pieces(&mut kbar_t, (d * n).max(1), |i, out| {
        let rows = MatRef::rows(&kbar[(i / g * n * g + i % g) * d..], g * d);
        transpose_into(rows, n, d, MatMut::rows(out, n), n);
    });
    let tiles = t.div_ceil(SCORE_TILE);
    let factor = T::of(gamma / (d as f64).sqrt());
    device.map(b * g * tiles, |i| {
        let (bg, tile) = (i / tiles, i % tiles);
        let (batch, kv) = (bg / g, bg % g);
        let first = tile * SCORE_TILE;
        let rows = SCORE_TILE.min(t - first);
        let most = visible(first + rows - 1);
        let (mut qs, mut scores) = (device.alloc::<T>(rows * group * d), device.alloc::<T>(rows * group * n));
        for (r, out) in qs.chunks_exact_mut(group * d).enumerate() {
            out.copy_from_slice(&q[((batch * t + first + r) * h + kv * group) * d..][..group * d]);
        }
        if most > 0 {
            let keys = MatRef::rows(&kbar_t[bg * d * n..], n);
            Gemm::new(rows * group, most, d).run(MatRef::rows(&qs, d), keys, MatMut::rows(&mut scores, n));
        }
        for (r, row) in scores.chunks_exact_mut(n.max(1)).enumerate() {
            scale_row(&mut row[..visible(first + r / group)], factor);
        }
        let mut part = Part::new(device, rows);
        choose(kv, first, &mut scores, &mut part);
        part
    })
}

simd! {
    /// The mean of rows `n` wide, as far as `out` reaches.
    fn mean_of_rows<T>(rows: &[T], n: usize, out: &mut [T]) {
        let share = T::of(n as f64 / rows.len() as f64);
        out.fill(T::ZERO);
        for row in rows.chunks_exact(n.max(1)) {
            out.iter_mut().zip(row).for_each(|(o, &x)| *o += x);
        }
        out.iter_mut().for_each(|o| *o *= share);
    }
}

/// Where each query's entries begin, and the end.
///
/// # Errors
/// When there are 2^32 or more.
fn offsets<T: CpuNumber>(device: &CpuDevice, op: &'static str, parts: &[Part<T>]) -> Result<Buffer<u32>> {
    let mut out = device.list(1 + parts.iter().map(|p| p.counts.len()).sum::<usize>());
    let mut total = 0;
    out.push(0);
    for &count in parts.iter().flat_map(|p| &*p.counts) {
        total += count as usize;
        out.push(entries32(op, total)?);
    }
    Ok(out)
}

fn concat<E: CpuElement, P>(device: &CpuDevice, parts: &[P], field: impl Fn(&P) -> &[E]) -> Buffer<E> {
    let mut out = device.list(parts.iter().map(|p| field(p).len()).sum());
    parts.iter().for_each(|p| out.extend(field(p)));
    out
}

/// The list of all parts, in order.
///
/// # Errors
/// When it has 2^32 entries or more.
fn list_of<T: CpuNumber>(
    device: &CpuDevice,
    op: &'static str,
    dims: Dims,
    (past, chunk_size): (usize, usize),
    parts: &[Part<T>],
) -> Result<BlockList> {
    let (offsets, chunks) = (offsets(device, op, parts)?, concat(device, parts, |p| &p.chunks));
    Ok(BlockList::new(device, (dims.b, dims.g, dims.t), (past, chunk_size), offsets, chunks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cpu, device};

    #[test]
    fn entries_are_numbered_up_to_the_last_that_32_bits_count() {
        let d = device();
        let part = |counts: &[u32]| {
            let mut part = Part::<f32>::new(cpu(&d), counts.len());
            part.counts.extend(counts);
            part
        };
        let of = |parts: &[Part<f32>]| offsets(cpu(&d), "topk_routing", parts).map(|offsets| offsets.to_vec());
        assert_eq!(of(&[part(&[1, 2]), part(&[u32::MAX - 3])]).unwrap(), [0, 1, 3, u32::MAX]);
        let told = of(&[part(&[1, 2]), part(&[u32::MAX - 3, 1])]).unwrap_err().to_string();
        assert!(told.starts_with("topk_routing: 4294967296 (query, chunk) pairs (a smaller batch"), "{told}");
    }
}
