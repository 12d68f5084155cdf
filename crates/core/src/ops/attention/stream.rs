//! The engine of dense and block attention: a tile of neighbouring queries walks blocks of keys and keeps a running
//! softmax, so no t x t matrix exists.
//!
//! The rows that work on a block at once are (query, head of the group) pairs of the queries that attend it, gathered:
//! neighbours share most of their chunks, so even a sparse list gives the small products enough rows. Keys and values
//! are transposed block by block first, which makes every product's right side contiguous. A row meets its blocks in
//! ascending order, whatever its neighbours do, so its bits depend on its own list alone.
//!
//! Backward recomputes the probabilities from lse and needs five products a block. Tasks own disjoint query tiles and a
//! private dk and dv that are added in order of task. The number of tasks follows from the shape alone.

use super::Dims;
use crate::device::simd::{self, simd};
use crate::device::tile::{Mat, gemm, transpose_into};
use crate::device::{Buffer, CpuDevice};
use crate::storage::Real;

/// Queries of a tile.
pub(crate) const TILE: usize = 64;
/// Gathered rows that work on a block at once: 64 x 64 f32 scores are 16 KiB, half of the L1 cache.
const ROWS: usize = 64;
/// Tasks of a backward pass at least; the price of one more is one more copy of dk and dv.
const BACKWARD_TASKS: usize = 8;

/// Enumerates, for a tile of queries of a kv head, the key blocks in ascending order with the tile's rows that attend
/// each and the numbers of those entries (empty where there is no bias).
pub(crate) trait Visits: Sync {
    /// Keys of a block.
    fn block_size(&self) -> usize;
    /// Calls `visit(block, rows, entries)`.
    fn for_each(&self, batch: usize, kv_head: usize, tile: usize, visit: impl FnMut(usize, &[u32], &[u32]));
}

/// Blocks of rows `[b, t, g, d]` transposed to `[b, g, blocks, d, width]`, zero past the last row.
struct Transposed<T: Real> {
    data: Buffer<T>,
    blocks: usize,
    width: usize,
    d: usize,
}

impl<T: Real> Transposed<T> {
    fn new(device: &CpuDevice, x: &[T], dims: Dims, width: usize) -> Self {
        let Dims { b, t, g, d, .. } = dims;
        let blocks = t.div_ceil(width);
        let mut data = device.alloc(b * g * blocks * d * width);
        device.for_chunks(&mut data, d * width, |i, out| {
            let (bg, block) = (i / blocks, i % blocks);
            let first = block * width;
            let src = &x[(bg / g * t + first) * g * d + bg % g * d..];
            transpose_into(src, width.min(t - first), d, g * d, out, width);
        });
        Transposed { data, blocks, width, d }
    }

    fn block(&self, bg: usize, block: usize) -> &[T] {
        let size = self.d * self.width;
        &self.data[(bg * self.blocks + block) * size..][..size]
    }
}

simd! {
    /// Absorbs one row of scores into its running softmax: on return the row holds exp(z - new max), zero past `width`.
    /// Returns the factor for what was accumulated before.
    fn absorb_row<T>(s: &mut [T], width: usize, scale: T, bias: T, max: &mut T, sum: &mut T) -> T {
        let (live, dead) = s.split_at_mut(width);
        let top = simd::max(live).mul_add(scale, bias).max(*max);
        let shift = bias - top;
        for z in live.iter_mut() {
            *z = z.mul_add(scale, shift).exp();
        }
        dead.fill(T::ZERO);
        let factor = (*max - top).exp();
        *max = top;
        *sum = sum.mul_add(factor, simd::sum(live));
        factor
    }
}

simd! {
    fn rescale_add<T>(acc: &mut [T], factor: T, add: &[T]) {
        for (a, &x) in acc.iter_mut().zip(add) {
            *a = a.mul_add(factor, x);
        }
    }
}

simd! {
    fn scale_into<T>(x: &[T], factor: T, out: &mut [T]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = x * factor;
        }
    }
}

simd! {
    fn add_into<T>(x: &[T], out: &mut [T]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o += x;
        }
    }
}

simd! {
    /// From scores and dp: p into `s`, scale * ds into `dp`; returns sum ds (without scale).
    fn backward_row<T>(s: &mut [T], dp: &mut [T], width: usize, scale: T, shift: T, delta: T) -> T {
        let (live, dead) = s.split_at_mut(width);
        let (dlive, ddead) = dp.split_at_mut(width);
        for (z, g) in live.iter_mut().zip(dlive.iter_mut()) {
            let p = z.mul_add(scale, shift).exp();
            *z = p;
            *g = p * (*g - delta);
        }
        let total = simd::sum(dlive);
        for g in dlive.iter_mut() {
            *g *= scale;
        }
        dead.fill(T::ZERO);
        ddead.fill(T::ZERO);
        total
    }
}

simd! {
    fn row_dot<T>(a: &[T], b: &[T]) -> T {
        simd::dot(a, b)
    }
}

/// Copies (query, head) rows of the tile's `queries` out of `[t, h, d]` rows: `[queries * group, d]`.
fn gather<T: Real>(x: &[T], queries: &[u32], stride: usize, len: usize, out: &mut [T]) {
    for (o, &r) in out.chunks_exact_mut(len).zip(queries) {
        o.copy_from_slice(&x[r as usize * stride..][..len]);
    }
}

/// Forward over `q [b, t, h, d]`, `k`, `v [b, t, g, d]`. Returns out `[b, t, h, d]` and lse `[b, t, h]`.
pub(crate) fn forward<T: Real>(
    device: &CpuDevice,
    dims: Dims,
    (q, k, v): (&[T], &[T], &[T]),
    visits: &impl Visits,
    bias: &[T],
) -> (Buffer<T>, Buffer<T>) {
    let Dims { b, t, h, g, d } = dims;
    let (group, width) = (dims.group(), visits.block_size());
    let scale = T::of(1.0 / (d as f64).sqrt());
    let kt = Transposed::new(device, k, dims, width);
    let (mut out, mut lse) = (device.alloc::<T>(b * t * h * d), device.alloc::<T>(b * t * h));
    let tiles = t.div_ceil(TILE);
    let mut pieces = Vec::with_capacity(b * tiles);
    for (batch, (o, l)) in out.chunks_mut((t * h * d).max(1)).zip(lse.chunks_mut((t * h).max(1))).enumerate() {
        for (tile, (o, l)) in o.chunks_mut(TILE * h * d).zip(l.chunks_mut(TILE * h)).enumerate() {
            pieces.push((batch, tile, o, l));
        }
    }
    device.for_each(pieces, |(batch, tile, out, lse)| {
        let first = tile * TILE;
        let rows = lse.len() / h;
        let at_once = (ROWS / group).max(1);
        let batch_rows = at_once * group;
        let (mut qs, mut os) = (device.alloc::<T>(batch_rows * d), device.alloc::<T>(batch_rows * d));
        let mut scores = device.alloc::<T>(batch_rows * width);
        let mut factors = device.alloc::<T>(batch_rows);
        let mut acc = device.alloc::<T>(rows * group * d);
        let (mut max, mut sum) = (device.alloc::<T>(rows * group), device.alloc::<T>(rows * group));
        for kv in 0..g {
            acc.fill(T::ZERO);
            max.fill(T::NEG_INF);
            sum.fill(T::ZERO);
            let q_tile = &q[((batch * t + first) * h + kv * group) * d..];
            visits.for_each(batch, kv, tile, |block, queries, entries| {
                let key0 = block * width;
                let keys = width.min(t - key0);
                let kt = kt.block(batch * g + kv, block);
                let v_block = &v[((batch * t + key0) * g + kv) * d..];
                for (i, queries) in queries.chunks(at_once).enumerate() {
                    let m = queries.len() * group;
                    gather(q_tile, queries, h * d, group * d, &mut qs[..m * d]);
                    gemm(m, width, d, Mat::rows(&qs, d), kt, width, &mut scores, width, false);
                    for r in 0..m {
                        let query = queries[r / group] as usize;
                        let slot = query * group + r % group;
                        let live = keys.min(first + query + 1 - key0);
                        let bias =
                            if entries.is_empty() { T::ZERO } else { bias[entries[i * at_once + r / group] as usize] };
                        let s = &mut scores[r * width..][..width];
                        factors[r] = absorb_row(s, live, scale, bias, &mut max[slot], &mut sum[slot]);
                    }
                    gemm(m, d, keys, Mat::rows(&scores, width), v_block, g * d, &mut os, d, false);
                    for r in 0..m {
                        let slot = queries[r / group] as usize * group + r % group;
                        rescale_add(&mut acc[slot * d..][..d], factors[r], &os[r * d..][..d]);
                    }
                }
            });
            for r in 0..rows {
                for i in 0..group {
                    let slot = r * group + i;
                    let inverse = if sum[slot] == T::ZERO { T::ZERO } else { T::ONE / sum[slot] };
                    let place = r * h + kv * group + i;
                    scale_into(&acc[slot * d..][..d], inverse, &mut out[place * d..][..d]);
                    lse[place] = max[slot] + sum[slot].ln();
                }
            }
        }
    });
    (out, lse)
}

/// Gradients of [`forward`].
pub(crate) struct Gradients<T: Real> {
    pub dq: Buffer<T>,
    pub dk: Buffer<T>,
    pub dv: Buffer<T>,
    /// one number per entry; empty where there is no bias
    pub dbias: Buffer<T>,
}

/// What a backward task owns.
struct Task<'a, T> {
    bg: usize,
    dk: &'a mut [T],
    dv: &'a mut [T],
    /// (tile, first entry, dq of the tile [rows, group * d], dbias of the tile)
    tiles: Vec<(usize, usize, &'a mut [T], &'a mut [T])>,
}

/// Backward of [`forward`]. `entries_per_tile` lists the number of entries of every (batch, kv head, tile), in order, or
/// is empty where there is no bias.
pub(crate) fn backward<T: Real>(
    device: &CpuDevice,
    dims: Dims,
    (q, k, v): (&[T], &[T], &[T]),
    (out, lse, dout): (&[T], &[T], &[T]),
    visits: &impl Visits,
    bias: &[T],
    entries_per_tile: &[usize],
) -> Gradients<T> {
    let Dims { b, t, h, g, d } = dims;
    let (group, width) = (dims.group(), visits.block_size());
    let scale = T::of(1.0 / (d as f64).sqrt());
    let tiles = t.div_ceil(TILE);
    let splits = BACKWARD_TASKS.div_ceil(b * g).min(tiles).max(1);
    let (kt, vt) = (Transposed::new(device, k, dims, width), Transposed::new(device, v, dims, width));
    let span = t * group * d;
    let mut dq_bg = device.alloc::<T>(b * g * span);
    let mut dbias = device.alloc::<T>(bias.len());
    let (mut dk_parts, mut dv_parts) =
        (device.alloc::<T>(b * g * splits * t * d), device.alloc::<T>(b * g * splits * t * d));

    let mut tasks: Vec<Task<T>> = Vec::with_capacity(b * g * splits);
    for (i, (dk, dv)) in dk_parts.chunks_mut(t * d).zip(dv_parts.chunks_mut(t * d)).enumerate() {
        tasks.push(Task { bg: i / splits, dk, dv, tiles: Vec::new() });
    }
    let (mut rest, mut entry) = (&mut dbias[..], 0);
    for (bg, dq) in dq_bg.chunks_mut(span).enumerate() {
        for (tile, dq) in dq.chunks_mut(TILE * group * d).enumerate() {
            let n = entries_per_tile.get(bg * tiles + tile).copied().unwrap_or(0);
            let (mine, others) = std::mem::take(&mut rest).split_at_mut(n);
            rest = others;
            tasks[bg * splits + tile % splits].tiles.push((tile, entry, dq, mine));
            entry += n;
        }
    }

    device.for_each(tasks, |task| {
        let (batch, kv) = (task.bg / g, task.bg % g);
        task.dk.fill(T::ZERO);
        task.dv.fill(T::ZERO);
        let at_once = (ROWS / group).max(1);
        let m_max = at_once * group;
        let (mut qs, mut gs) = (device.alloc::<T>(m_max * d), device.alloc::<T>(m_max * d));
        let (mut p, mut ds) = (device.alloc::<T>(m_max * width), device.alloc::<T>(m_max * width));
        let mut dqs = device.alloc::<T>(m_max * d);
        let mut delta = device.alloc::<T>(TILE * group);
        for (tile, first_entry, dq, dbias) in task.tiles {
            let first = tile * TILE;
            let rows = TILE.min(t - first);
            dq.fill(T::ZERO);
            let base = (batch * t + first) * h + kv * group;
            for r in 0..rows {
                for i in 0..group {
                    let at = (base + r * h + i) * d;
                    delta[r * group + i] = row_dot(&out[at..][..d], &dout[at..][..d]);
                }
            }
            visits.for_each(batch, kv, tile, |block, queries, entries| {
                let key0 = block * width;
                let keys = width.min(t - key0);
                let (kt, vt) = (kt.block(task.bg, block), vt.block(task.bg, block));
                let k_block = &k[((batch * t + key0) * g + kv) * d..];
                for (i, queries) in queries.chunks(at_once).enumerate() {
                    let m = queries.len() * group;
                    gather(&q[base * d..], queries, h * d, group * d, &mut qs[..m * d]);
                    gather(&dout[base * d..], queries, h * d, group * d, &mut gs[..m * d]);
                    gemm(m, width, d, Mat::rows(&qs, d), kt, width, &mut p, width, false);
                    gemm(m, width, d, Mat::rows(&gs, d), vt, width, &mut ds, width, false);
                    for (j, &query) in queries.iter().enumerate() {
                        let query = query as usize;
                        let live = keys.min(first + query + 1 - key0);
                        let entry = entries.get(i * at_once + j).map(|&e| e as usize);
                        let bias = entry.map_or(T::ZERO, |e| bias[e]);
                        let mut total = T::ZERO;
                        for head in 0..group {
                            let r = j * group + head;
                            let shift = bias - lse[base + query * h + head];
                            let delta = delta[query * group + head];
                            let (p, ds) = (&mut p[r * width..][..width], &mut ds[r * width..][..width]);
                            total += backward_row(p, ds, live, scale, shift, delta);
                        }
                        if let Some(e) = entry {
                            dbias[e - first_entry] = total;
                        }
                    }
                    gemm(m, d, keys, Mat::rows(&ds, width), k_block, g * d, &mut dqs, d, false);
                    for (j, &query) in queries.iter().enumerate() {
                        let len = group * d;
                        add_into(&dqs[j * len..][..len], &mut dq[query as usize * len..][..len]);
                    }
                    gemm(keys, d, m, Mat::rows(&ds, width).t(), &qs, d, &mut task.dk[key0 * d..], d, true);
                    gemm(keys, d, m, Mat::rows(&p, width).t(), &gs, d, &mut task.dv[key0 * d..], d, true);
                }
            });
        }
    });

    let mut dq = device.alloc::<T>(b * t * h * d);
    interleave(device, &dq_bg, (b, g, t, group * d), 1, &mut dq);
    let (mut dk, mut dv) = (device.alloc::<T>(b * t * g * d), device.alloc::<T>(b * t * g * d));
    interleave(device, &dk_parts, (b, g, t, d), splits, &mut dk);
    interleave(device, &dv_parts, (b, g, t, d), splits, &mut dv);
    Gradients { dq, dk, dv, dbias }
}

/// `[b, g, splits, t, len]` summed over the splits, as `[b, t, g, len]`.
pub(crate) fn interleave<T: Real>(
    device: &CpuDevice,
    parts: &[T],
    (_, g, t, len): (usize, usize, usize, usize),
    splits: usize,
    out: &mut [T],
) {
    const TOKENS: usize = 64;
    let row = g * len;
    device.for_chunks(out, TOKENS * row, |task, out| {
        for (r, out) in out.chunks_exact_mut(row).enumerate() {
            let (batch, token) = ((task * TOKENS + r) / t, (task * TOKENS + r) % t);
            for (kv, out) in out.chunks_exact_mut(len).enumerate() {
                let part = |s: usize| &parts[(((batch * g + kv) * splits + s) * t + token) * len..][..len];
                out.copy_from_slice(part(0));
                for s in 1..splits {
                    add_into(part(s), out);
                }
            }
        }
    });
}
