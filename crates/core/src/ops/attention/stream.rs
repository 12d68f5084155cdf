//! The engine of dense and block attention: a tile of neighbouring queries walks blocks of keys and keeps a running
//! softmax, so no t x t matrix exists.
//!
//! The rows that work on a block at once are (query, head of the group) pairs of the queries that attend it, gathered:
//! neighbours share most of their chunks, so even a sparse list gives the small products enough rows. A row meets its blocks
//! in ascending order, whatever its neighbours do, so its bits depend on its own list alone.
//!
//! Backward recomputes the probabilities from lse and needs five products a block. Tasks own disjoint query tiles and a
//! private dk and dv that are added in order of task. The number of tasks follows from the shape alone.

use super::Dims;
use super::products::{Products, Right};
use crate::device::simd::{self, add_into, simd};
use crate::device::tile::Mat;
use crate::device::{Buffer, CpuDevice};
use crate::storage::{Compute, Real};

/// Queries of a tile whose scores are computed in full: routing and spans.
pub(crate) const TILE: usize = 64;
/// Queries of a tile of this engine: the more, the fewer times every block of keys is read, and the more rows share it.
pub(crate) const QUERIES: usize = 128;
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

/// A gathered row: where its running state stands, how many keys of the block it sees, and its bias.
#[derive(Clone, Copy)]
struct Row<T> {
    slot: usize,
    live: usize,
    bias: T,
}

simd! {
    /// Absorbs rows of scores, `keys` of a `width`, into their running softmax: on return they hold exp(z - new max), zero
    /// past the live keys. `factors` are for what was accumulated before.
    fn absorb<T>(
        rows: &[Row<T>],
        s: &mut [T],
        shape: (usize, usize),
        scale: T,
        max: &mut [T],
        sum: &mut [T],
        factors: &mut [T],
    ) {
        let (width, keys) = shape;
        for ((row, s), factor) in rows.iter().zip(s.chunks_exact_mut(width)).zip(factors) {
            let (live, dead) = s[..keys].split_at_mut(row.live);
            let before = max[row.slot];
            let top = simd::max(live).mul_add(scale, row.bias).max(before);
            let shift = row.bias - top;
            let mut lanes = [T::ZERO; simd::LANES];
            let mut chunks = live.chunks_exact_mut(simd::LANES);
            for z in &mut chunks {
                for l in 0..simd::LANES {
                    z[l] = z[l].mul_add(scale, shift).exp();
                    lanes[l] += z[l];
                }
            }
            for (z, lane) in chunks.into_remainder().iter_mut().zip(&mut lanes) {
                *z = z.mul_add(scale, shift).exp();
                *lane += *z;
            }
            dead.fill(T::ZERO);
            *factor = (before - top).exp();
            max[row.slot] = top;
            sum[row.slot] = sum[row.slot].mul_add(*factor, simd::sum_lanes(lanes));
        }
    }
}

simd! {
    /// Adds the rows' new outputs, `d` wide, to what they accumulated.
    fn accumulate<T>(rows: &[Row<T>], factors: &[T], new: &[T], d: usize, acc: &mut [T]) {
        for ((row, &factor), new) in rows.iter().zip(factors).zip(new.chunks_exact(d)) {
            for (a, &x) in acc[row.slot * d..][..d].iter_mut().zip(new) {
                *a = a.mul_add(factor, x);
            }
        }
    }
}

simd! {
    /// Scores times a factor.
    pub(crate) fn scale_row<T>(row: &mut [T], factor: T) {
        for x in row.iter_mut() {
            *x *= factor;
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
    /// From scores and dp: p into `s`, scale * ds into `dp`, and sum ds (without scale) of each row into `totals`. The
    /// rows' bias is bias - lse here.
    fn differentiate<T>(
        rows: &[Row<T>],
        s: &mut [T],
        dp: &mut [T],
        shape: (usize, usize),
        scale: T,
        delta: &[T],
        totals: &mut [T],
    ) {
        let (width, keys) = shape;
        let values = s.chunks_exact_mut(width).zip(dp.chunks_exact_mut(width));
        for ((row, (s, dp)), total) in rows.iter().zip(values).zip(totals) {
            let (live, dead) = s[..keys].split_at_mut(row.live);
            let (dlive, ddead) = dp[..keys].split_at_mut(row.live);
            let delta = delta[row.slot];
            let mut lanes = [T::ZERO; simd::LANES];
            let (mut zs, mut gs) = (live.chunks_exact_mut(simd::LANES), dlive.chunks_exact_mut(simd::LANES));
            for (z, g) in (&mut zs).zip(&mut gs) {
                for l in 0..simd::LANES {
                    let p = z[l].mul_add(scale, row.bias).exp();
                    let d = p * (g[l] - delta);
                    z[l] = p;
                    lanes[l] += d;
                    g[l] = d * scale;
                }
            }
            for ((z, g), lane) in zs.into_remainder().iter_mut().zip(gs.into_remainder()).zip(&mut lanes) {
                let p = z.mul_add(scale, row.bias).exp();
                let d = p * (*g - delta);
                *z = p;
                *lane += d;
                *g = d * scale;
            }
            *total = simd::sum_lanes(lanes);
            dead.fill(T::ZERO);
            ddead.fill(T::ZERO);
        }
    }
}

simd! {
    fn row_dot<T>(a: &[T], b: &[T]) -> T {
        simd::dot(a, b)
    }
}

/// Copies the queries of a tile of one kv head out of `[t, h, d]`, `stride` apart, as `[queries, len]`.
pub(crate) fn take_tile<T: Real>(x: &[T], stride: usize, len: usize, out: &mut [T]) {
    for (r, o) in out.chunks_exact_mut(len).enumerate() {
        o.copy_from_slice(&x[r * stride..][..len]);
    }
}

/// Whether ascending queries are neighbours, so that their rows of a tile are one slice: always in dense attention.
fn neighbours(queries: &[u32]) -> bool {
    (queries[queries.len() - 1] - queries[0]) as usize + 1 == queries.len()
}

/// The rows of `queries` in a tile `[queries, len]`: in place where they are neighbours, else gathered into `scratch`.
fn rows_of<'a, T: Real>(tile: &'a [T], queries: &[u32], len: usize, scratch: &'a mut [T]) -> &'a [T] {
    if neighbours(queries) {
        return &tile[queries[0] as usize * len..][..queries.len() * len];
    }
    for (o, &r) in scratch.chunks_exact_mut(len).zip(queries) {
        o.copy_from_slice(&tile[r as usize * len..][..len]);
    }
    &scratch[..queries.len() * len]
}

/// Forward over `q [b, t, h, d]`, `k`, `v [b, t, g, d]`. Returns out `[b, t, h, d]` and lse `[b, t, h]`. In bf16, the
/// operands of every product are rounded, the probabilities too; softmax and sums are not.
pub(crate) fn forward<T: Real>(
    device: &CpuDevice,
    compute: Compute,
    dims: Dims,
    (q, k, v): (&[T], &[T], &[T]),
    visits: &impl Visits,
    bias: &[T],
) -> (Buffer<T>, Buffer<T>) {
    let Dims { b, t, h, g, d } = dims;
    let (group, width) = (dims.group(), visits.block_size());
    let scale = T::of(1.0 / (d as f64).sqrt());
    let words = compute.words::<T>();
    let kt = Right::transposed(device, words, k, dims, width);
    let values = words.map(|words| Right::rows(device, words, v, dims, width));
    let (mut out, mut lse) = (device.alloc::<T>(b * t * h * d), device.alloc::<T>(b * t * h));
    let tiles = t.div_ceil(QUERIES);
    let mut pieces = Vec::with_capacity(b * tiles);
    for (batch, (o, l)) in out.chunks_mut((t * h * d).max(1)).zip(lse.chunks_mut((t * h).max(1))).enumerate() {
        for (tile, (o, l)) in o.chunks_mut(QUERIES * h * d).zip(l.chunks_mut(QUERIES * h)).enumerate() {
            pieces.push((batch, tile, o, l));
        }
    }
    device.for_each(pieces, |(batch, tile, out, lse)| {
        let first = tile * QUERIES;
        let rows = lse.len() / h;
        let at_once = (ROWS / group).max(1);
        let batch_rows = at_once * group;
        let mut products = Products::new(device, words, (batch_rows, width, d));
        let len = group * products.len(d);
        let (mut qs, mut os) = (device.alloc::<T>(batch_rows * d), device.alloc::<T>(batch_rows * d));
        let (mut q_tile, mut q_words) = (device.alloc::<T>(rows * group * d), products.room(device, rows * len));
        let mut scores = device.alloc::<T>(batch_rows * width);
        let mut factors = device.alloc::<T>(batch_rows);
        let mut state = Vec::with_capacity(batch_rows);
        let mut acc = device.alloc::<T>(rows * group * d);
        let (mut max, mut sum) = (device.alloc::<T>(rows * group), device.alloc::<T>(rows * group));
        for kv in 0..g {
            acc.fill(T::ZERO);
            max.fill(T::NEG_INF);
            sum.fill(T::ZERO);
            take_tile(&q[((batch * t + first) * h + kv * group) * d..], h * d, group * d, &mut q_tile);
            let lefts = products.lefts(&q_tile, d, &mut q_words);
            visits.for_each(batch, kv, tile, |block, queries, entries| {
                let key0 = block * width;
                let keys = width.min(t - key0);
                let bg = batch * g + kv;
                let value = match &values {
                    Some(values) => values.block(bg, block),
                    None => (&v[((batch * t + key0) * g + kv) * d..], g * d),
                };
                for (i, queries) in queries.chunks(at_once).enumerate() {
                    let m = queries.len() * group;
                    // keys that the last of these queries sees: near the diagonal fewer than the block has
                    let keys = keys.min(first + queries[queries.len() - 1] as usize + 1 - key0);
                    let left = Mat::rows(rows_of(lefts, queries, len, &mut qs), len / group);
                    products.multiply((m, keys, d), left, kt.block(bg, block), &mut scores, width, false);
                    state.clear();
                    for (j, &query) in queries.iter().enumerate() {
                        let query = query as usize;
                        let live = keys.min(first + query + 1 - key0);
                        let bias = entries.get(i * at_once + j).map_or(T::ZERO, |&e| bias[e as usize]);
                        state.extend((0..group).map(|head| Row { slot: query * group + head, live, bias }));
                    }
                    absorb(&state, &mut scores, (width, keys), scale, &mut max, &mut sum, &mut factors);
                    products.over_keys((m, d, keys), (&scores, width), value, &mut os, false);
                    accumulate(&state, &factors, &os, d, &mut acc);
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
    compute: Compute,
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
    let tiles = t.div_ceil(QUERIES);
    let splits = BACKWARD_TASKS.div_ceil(b * g).min(tiles).max(1);
    let words = compute.words::<T>();
    let right = |x| Right::transposed(device, words, x, dims, width);
    let (kt, vt, keys_packed) = (right(k), right(v), words.map(|words| Right::rows(device, words, k, dims, width)));
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
        for (tile, dq) in dq.chunks_mut(QUERIES * group * d).enumerate() {
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
        let mut products = Products::new(device, words, (m_max, width, d));
        let (len, len_left) = (group * d, group * products.len(d));
        let room = |n: usize| (products.room(device, n), products.room(device, n));
        let ((mut q_words, mut g_words), (mut qs, mut gs)) = (room(QUERIES * len_left), room(m_max * d));
        let (mut qls, mut gls) = (device.alloc::<T>(m_max * d), device.alloc::<T>(m_max * d));
        let (mut p, mut ds) = (device.alloc::<T>(m_max * width), device.alloc::<T>(m_max * width));
        let mut dqs = device.alloc::<T>(m_max * d);
        let (mut q_tile, mut g_tile) = (device.alloc::<T>(QUERIES * group * d), device.alloc::<T>(QUERIES * group * d));
        let mut delta = device.alloc::<T>(QUERIES * group);
        let mut totals = device.alloc::<T>(m_max);
        let mut state = Vec::with_capacity(m_max);
        for (tile, first_entry, dq, dbias) in task.tiles {
            let first = tile * QUERIES;
            let rows = QUERIES.min(t - first);
            dq.fill(T::ZERO);
            let base = (batch * t + first) * h + kv * group;
            for r in 0..rows {
                for i in 0..group {
                    let at = (base + r * h + i) * d;
                    delta[r * group + i] = row_dot(&out[at..][..d], &dout[at..][..d]);
                }
            }
            take_tile(&q[base * d..], h * d, group * d, &mut q_tile[..rows * group * d]);
            take_tile(&dout[base * d..], h * d, group * d, &mut g_tile[..rows * group * d]);
            let q_lefts = products.lefts(&q_tile[..rows * len], d, &mut q_words);
            let g_lefts = products.lefts(&g_tile[..rows * len], d, &mut g_words);
            visits.for_each(batch, kv, tile, |block, queries, entries| {
                let key0 = block * width;
                let keys = width.min(t - key0);
                let (kt, vt) = (kt.block(task.bg, block), vt.block(task.bg, block));
                let key = match &keys_packed {
                    Some(packed) => packed.block(task.bg, block),
                    None => (&k[((batch * t + key0) * g + kv) * d..], g * d),
                };
                for (i, queries) in queries.chunks(at_once).enumerate() {
                    let m = queries.len() * group;
                    let keys = keys.min(first + queries[queries.len() - 1] as usize + 1 - key0);
                    let (ql, gl) =
                        (rows_of(q_lefts, queries, len_left, &mut qls), rows_of(g_lefts, queries, len_left, &mut gls));
                    products.multiply((m, keys, d), Mat::rows(ql, len_left / group), kt, &mut p, width, false);
                    products.multiply((m, keys, d), Mat::rows(gl, len_left / group), vt, &mut ds, width, false);
                    state.clear();
                    for (j, &query) in queries.iter().enumerate() {
                        let query = query as usize;
                        let live = keys.min(first + query + 1 - key0);
                        let bias = entries.get(i * at_once + j).map_or(T::ZERO, |&e| bias[e as usize]);
                        state.extend((0..group).map(|head| {
                            let bias = bias - lse[base + query * h + head];
                            Row { slot: query * group + head, live, bias }
                        }));
                    }
                    differentiate(&state, &mut p, &mut ds, (width, keys), scale, &delta, &mut totals);
                    for (j, &e) in entries.iter().skip(i * at_once).take(queries.len()).enumerate() {
                        let mut sum = T::ZERO;
                        totals[j * group..][..group].iter().for_each(|&x| sum += x);
                        dbias[e as usize - first_entry] = sum;
                    }
                    if neighbours(queries) {
                        let dq = &mut dq[queries[0] as usize * len..];
                        products.over_keys((m, d, keys), (&ds, width), key, dq, true);
                    } else {
                        // through a copy, so that the sums run in the same order as in place
                        rows_of(dq, queries, len, &mut dqs);
                        products.over_keys((m, d, keys), (&ds, width), key, &mut dqs, true);
                        for (row, &query) in dqs.chunks_exact(len).zip(queries) {
                            dq[query as usize * len..][..len].copy_from_slice(row);
                        }
                    }
                    let (qs, gs) = match words {
                        None => (ql, gl),
                        Some(_) => (rows_of(&q_tile, queries, len, &mut qs), rows_of(&g_tile, queries, len, &mut gs)),
                    };
                    products.over_rows((keys, d, m), (&ds, width), qs, &mut task.dk[key0 * d..]);
                    products.over_rows((keys, d, m), (&p, width), gs, &mut task.dv[key0 * d..]);
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
