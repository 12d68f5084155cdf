//! The engine of dense and block attention: a tile of neighbouring queries walks blocks of keys and keeps a running
//! softmax, so no t x t matrix exists.
//!
//! The rows that work on a block at once are (query, head of the group) pairs of the queries that attend it, gathered:
//! neighbours share most of their chunks, so even a sparse list gives the small products enough rows. A row meets its blocks
//! in ascending order, whatever its neighbours do, so its bits depend on its own list alone.
//!
//! Scores stand as [keys, rows], so that a vector holds one key of 16 rows: the running maximum and the sum of a row are
//! lanes, and nothing is summed across one. With keys along the vector and e^x, 16 scores took 37 cycles, 13 of them for
//! the exponentials; they take 12, and 9.5. Logarithms are to base 2, lse too.
//!
//! Backward recomputes the probabilities from lse and needs five products a block. Tasks own disjoint query tiles and a
//! private dk and dv that are added in order of task. The number of tasks follows from the shape alone.

use super::Dims;
use super::products::{Lefts, Products, Rights};
use crate::device::CpuNumber;
use crate::device::simd::{self, LANES, add_into, simd};
use crate::device::softmax::Slope;
use crate::device::{Buffer, CpuDevice, Shared};
use crate::number::Compute;

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

/// What the engine knows of the rows that work on a block, in whole vectors.
struct Lanes<T: CpuNumber> {
    /// lanes that count now, whole vectors
    used: usize,
    /// keys of the block that a row sees
    live: Buffer<u32>,
    /// bias times log2 e, in backward minus lse
    bias: Buffer<T>,
}

impl<T: CpuNumber> Lanes<T> {
    fn new(device: &CpuDevice, lanes: usize) -> Self {
        Lanes { used: 0, live: device.zeros(lanes), bias: device.zeros(lanes) }
    }

    /// Takes the heads of `queries`, each of which sees `sees(query)` keys of a block of `keys`. Lanes without a row see all, so
    /// that they do not slow their vector down.
    fn take(&mut self, queries: &[u32], group: usize, keys: usize, sees: impl Fn(u32) -> usize) {
        let m = queries.len() * group;
        self.used = m.next_multiple_of(LANES);
        for (live, &query) in self.live.chunks_exact_mut(group).zip(queries) {
            live.fill(keys.min(sees(query)) as u32);
        }
        self.live[m..self.used].fill(keys as u32);
    }
}

simd! {
    /// Absorbs scores `[keys, lanes]` into the running softmax of their rows: on return they hold 2^(z - new max), zero past
    /// the live keys. `factors` are for what was accumulated before. Lanes without a row must hold finite numbers.
    fn absorb<T>(s: &mut [T], keys: usize, x: &Lanes<T>, scale: T, max: &mut [T], sum: &mut [T], factors: &mut [T]) {
        let (lanes, steps) = (x.live.len(), T::steps());
        for first in (0..x.used).step_by(LANES) {
            let live = vector(&x.live, first);
            let all_live = least(&live).min(keys);
            let mut top = [T::NEG_INF; LANES];
            let done = steps.map_or(0, |steps| steps.top(&s[first..], all_live, lanes, &mut top));
            for key in done..all_live {
                let z = vector(s, key * lanes + first);
                for l in 0..LANES {
                    top[l] = z[l].max(top[l]);
                }
            }
            for key in all_live..keys {
                let z = vector(s, key * lanes + first);
                for l in 0..LANES {
                    top[l] = if live[l] > key as u32 { z[l].max(top[l]) } else { top[l] };
                }
            }
            let (bias, before) = (vector(&x.bias, first), vector(max, first));
            let (mut shift, mut factor) = ([T::ZERO; LANES], [T::ZERO; LANES]);
            for l in 0..LANES {
                top[l] = top[l].mul_add(scale, bias[l]).max(before[l]);
                shift[l] = bias[l] - top[l];
                factor[l] = (before[l] - top[l]).exp2();
            }
            let mut total = [T::ZERO; LANES];
            let done = steps.map_or(0, |steps| {
                steps.powers(&mut s[first..], (all_live, lanes), (scale, &shift), &mut total)
            });
            for key in done..all_live {
                let z = vector_mut(s, key * lanes + first);
                for l in 0..LANES {
                    z[l] = z[l].mul_add(scale, shift[l]).exp2();
                    total[l] += z[l];
                }
            }
            for key in all_live..keys {
                let z = vector_mut(s, key * lanes + first);
                for l in 0..LANES {
                    let p = z[l].mul_add(scale, shift[l]).exp2();
                    z[l] = if live[l] > key as u32 { p } else { T::ZERO };
                    total[l] += z[l];
                }
            }
            let sum = vector_mut(sum, first);
            for l in 0..LANES {
                sum[l] = sum[l].mul_add(factor[l], total[l]);
            }
            *vector_mut(max, first) = top;
            *vector_mut(factors, first) = factor;
        }
    }
}

/// The vector that begins at `first`.
#[inline(always)]
fn vector<T: Copy>(x: &[T], first: usize) -> [T; LANES] {
    x[first..][..LANES].try_into().expect("a whole vector")
}

#[inline(always)]
fn vector_mut<T>(x: &mut [T], first: usize) -> &mut [T; LANES] {
    (&mut x[first..][..LANES]).try_into().expect("a whole vector")
}

#[inline(always)]
fn least(live: &[u32; LANES]) -> usize {
    live.iter().fold(u32::MAX, |least, &n| least.min(n)) as usize
}

simd! {
    /// Adds new outputs of rows, `d` wide, to what they accumulated.
    fn accumulate<T>(acc: &mut [T], factors: &[T], new: &[T], d: usize) {
        for ((acc, &factor), new) in acc.chunks_exact_mut(d).zip(factors).zip(new.chunks_exact(d)) {
            for (a, &x) in acc.iter_mut().zip(new) {
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
    /// From scores and dp `[keys, lanes]`: p into `s`, factor * ds into `dp`, and sum ds (without the factor) of each row into
    /// `totals`. The scales are factor * log2 e and factor.
    fn differentiate<T>(
        s: &mut [T],
        dp: &mut [T],
        keys: usize,
        x: &Lanes<T>,
        scales: (T, T),
        delta: &[T],
        totals: &mut [T],
    ) {
        let (lanes, (scale, factor), steps) = (x.live.len(), scales, T::steps());
        for first in (0..x.used).step_by(LANES) {
            let (live, bias, delta) = (vector(&x.live, first), vector(&x.bias, first), vector(delta, first));
            let all_live = least(&live).min(keys);
            let mut total = [T::ZERO; LANES];
            let slope = Slope { scale, shift: bias, delta, factor };
            let done = steps.map_or(0, |steps| {
                steps.slopes((&mut s[first..], &mut dp[first..]), (all_live, lanes), &slope, &mut total)
            });
            for key in done..all_live {
                let (z, g) = (vector_mut(s, key * lanes + first), vector_mut(dp, key * lanes + first));
                for l in 0..LANES {
                    let p = z[l].mul_add(scale, bias[l]).exp2();
                    let ds = p * (g[l] - delta[l]);
                    z[l] = p;
                    total[l] += ds;
                    g[l] = ds * factor;
                }
            }
            for key in all_live..keys {
                let (z, g) = (vector_mut(s, key * lanes + first), vector_mut(dp, key * lanes + first));
                for l in 0..LANES {
                    let p = z[l].mul_add(scale, bias[l]).exp2();
                    let ds = p * (g[l] - delta[l]);
                    let sees = live[l] > key as u32;
                    z[l] = if sees { p } else { T::ZERO };
                    let ds = if sees { ds } else { T::ZERO };
                    total[l] += ds;
                    g[l] = ds * factor;
                }
            }
            *vector_mut(totals, first) = total;
        }
    }
}

simd! {
    fn row_dot<T>(a: &[T], b: &[T]) -> T {
        simd::dot(a, b)
    }
}

/// Asks for rows that a later product of this visit adds to: a visit of few queries is over before the processor has
/// guessed what comes next.
fn ask<T>(rows: &[T]) {
    for line in rows.chunks(64 / size_of::<T>()) {
        simd::prefetch(line.as_ptr());
    }
}

/// Which of `splits` tasks has a tile. Later tiles see more keys, so every other round is dealt in reverse: in turn, two tasks
/// would have 16 and 20 of 36 parts of a causal triangle of 8 tiles, and a thread waited 6 % of a backward pass.
pub(crate) fn owner(tile: usize, splits: usize) -> usize {
    let (round, i) = (tile / splits, tile % splits);
    if round.is_multiple_of(2) { i } else { splits - 1 - i }
}

/// Copies the queries of a tile of one kv head out of `[t, h, d]`, `stride` apart, as `[queries, len]`.
pub(crate) fn take_tile<T: CpuNumber>(x: &[T], stride: usize, len: usize, out: &mut [T]) {
    for (r, o) in out.chunks_exact_mut(len).enumerate() {
        o.copy_from_slice(&x[r * stride..][..len]);
    }
}

/// Whether ascending queries are neighbours, so that their rows of a tile are one slice: always in dense attention.
fn neighbours(queries: &[u32]) -> bool {
    (queries[queries.len() - 1] - queries[0]) as usize + 1 == queries.len()
}

/// Copies the rows of `queries`, `len` long, out of a tile.
fn gather<T: Copy>(tile: &[T], queries: &[u32], len: usize, out: &mut [T]) {
    if neighbours(queries) {
        let n = queries.len() * len;
        return out[..n].copy_from_slice(&tile[queries[0] as usize * len..][..n]);
    }
    for (o, &r) in out.chunks_exact_mut(len).zip(queries) {
        o.copy_from_slice(&tile[r as usize * len..][..len]);
    }
}

/// Copies them back.
fn scatter<T: Copy>(rows: &[T], queries: &[u32], len: usize, tile: &mut [T]) {
    if neighbours(queries) {
        let n = queries.len() * len;
        return tile[queries[0] as usize * len..][..n].copy_from_slice(&rows[..n]);
    }
    for (row, &r) in rows.chunks_exact(len).zip(queries) {
        tile[r as usize * len..][..len].copy_from_slice(row);
    }
}

/// The rows of `queries` in a tile `[queries, len]`: in place where they are neighbours, else gathered into `scratch`.
fn rows_of<'a, T: Copy>(tile: &'a [T], queries: &[u32], len: usize, scratch: &'a mut [T]) -> &'a [T] {
    let n = queries.len() * len;
    if neighbours(queries) {
        return &tile[queries[0] as usize * len..][..n];
    }
    gather(tile, queries, len, scratch);
    &scratch[..n]
}

/// A tile of queries, or of gradients of their outputs: as rows, and as the columns of products over d.
struct Tile<T: CpuNumber> {
    rows: Buffer<T>,
    /// of [`Tile::at_once`] neighbouring queries after the other
    columns: Buffer<T>,
    /// queries that work on a block at once, and heads of each times d
    at_once: usize,
    len: usize,
    gathered_rows: Buffer<T>,
    gathered_columns: Buffer<T>,
}

impl<T: CpuNumber> Tile<T> {
    fn new(device: &CpuDevice, products: &Products<T>, at_once: usize, len: usize) -> Self {
        let columns = products.columns_len();
        Tile {
            rows: device.alloc(QUERIES * len),
            columns: device.alloc(QUERIES.div_ceil(at_once) * columns),
            at_once,
            len,
            gathered_rows: device.alloc(at_once * len),
            gathered_columns: device.alloc(columns),
        }
    }

    /// Takes `queries` rows that are `stride` apart.
    fn fill(&mut self, products: &Products<T>, x: &[T], stride: usize, queries: usize) {
        let rows = &mut self.rows[..queries * self.len];
        take_tile(x, stride, self.len, rows);
        let columns = self.columns.chunks_exact_mut(products.columns_len());
        for (rows, columns) in rows.chunks(self.at_once * self.len).zip(columns) {
            products.columns(rows, columns);
        }
    }

    /// Rows and columns of `queries`. The columns past theirs are those of others, or zero.
    fn of(&mut self, products: &Products<T>, queries: &[u32]) -> (&[T], &[T]) {
        let first = queries[0] as usize;
        let rows = rows_of(&self.rows, queries, self.len, &mut self.gathered_rows);
        if neighbours(queries) && first.is_multiple_of(self.at_once) {
            let size = products.columns_len();
            return (rows, &self.columns[first / self.at_once * size..][..size]);
        }
        products.columns(rows, &mut self.gathered_columns);
        (rows, &self.gathered_columns)
    }
}

/// Forward over `q [b, t, h, d]`, `k`, `v [b, t, g, d]`. Returns out `[b, t, h, d]` and lse `[b, t, h]`, the latter to
/// base 2. In bf16, the operands of every product are rounded, the probabilities too; softmax and sums are not.
pub(crate) fn forward<T: CpuNumber>(
    device: &CpuDevice,
    compute: Compute,
    dims: Dims,
    (q, k, v): (&[T], &[T], &[T]),
    visits: &impl Visits,
    bias: &[T],
) -> (Buffer<T>, Buffer<T>) {
    let Dims { b, t, h, g, d } = dims;
    let (group, width) = (dims.group(), visits.block_size());
    let log2_e = T::of(std::f64::consts::LOG2_E);
    let scale = T::of(std::f64::consts::LOG2_E / (d as f64).sqrt());
    let words = compute.words::<T>();
    let (keys_left, values) = (Lefts::new(device, words, k, dims), Rights::new(device, words, v, dims, width));
    let (mut out, mut lse) = (device.alloc::<T>(b * t * h * d), device.alloc::<T>(b * t * h));
    let tiles = t.div_ceil(QUERIES);
    let mut pieces = Vec::with_capacity(b * tiles);
    for (batch, (o, l)) in out.chunks_mut((t * h * d).max(1)).zip(lse.chunks_mut((t * h).max(1))).enumerate() {
        for (tile, (o, l)) in o.chunks_mut(QUERIES * h * d).zip(l.chunks_mut(QUERIES * h)).enumerate() {
            pieces.push((batch, tile, o, l));
        }
    }
    // the tiles that see most first, so that the last ones, which a thread may have to wait for, are short
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.1));
    device.for_each(pieces, |(batch, tile, out, lse)| {
        let first = tile * QUERIES;
        let rows = lse.len() / h;
        let at_once = (ROWS / group).max(1);
        let lanes = (at_once * group).next_multiple_of(LANES);
        let mut products = Products::new(device, words, lanes, width, d);
        let mut queries_tile = Tile::new(device, &products, at_once, group * d);
        let mut scores = device.alloc::<T>(width * lanes);
        let mut new = device.alloc::<T>(lanes * d);
        let mut x = Lanes::new(device, lanes);
        let (mut row_max, mut row_sum) = (device.zeros::<T>(lanes), device.zeros::<T>(lanes));
        let mut factors = device.alloc::<T>(lanes);
        let mut acc = device.alloc::<T>(rows * group * d);
        let (mut max, mut sum) = (device.alloc::<T>(rows * group), device.alloc::<T>(rows * group));
        for kv in 0..g {
            acc.fill(T::ZERO);
            max.fill(T::NEG_INF);
            sum.fill(T::ZERO);
            queries_tile.fill(&products, &q[((batch * t + first) * h + kv * group) * d..], h * d, rows);
            visits.for_each(batch, kv, tile, |block, queries, entries| {
                let key0 = block * width;
                let keys = width.min(t - key0);
                let sees = |query: u32| first + query as usize + 1 - key0;
                let (left, value) = (keys_left.from(batch, kv, key0), values.block(batch, kv, block));
                for (i, queries) in queries.chunks(at_once).enumerate() {
                    let m = queries.len() * group;
                    // keys that the last of these queries sees: near the diagonal fewer than the block has
                    let keys = keys.min(sees(queries[queries.len() - 1]));
                    x.take(queries, group, keys, sees);
                    let (_, columns) = queries_tile.of(&products, queries);
                    products.over_d((keys, x.used), left, columns, &mut scores);
                    for (j, x) in x.bias.chunks_exact_mut(group).enumerate().take(queries.len()) {
                        x.fill(entries.get(i * at_once + j).map_or(T::ZERO, |&e| bias[e as usize] * log2_e));
                    }
                    gather(&max, queries, group, &mut row_max);
                    gather(&sum, queries, group, &mut row_sum);
                    absorb(&mut scores, keys, &x, scale, &mut row_max, &mut row_sum, &mut factors);
                    scatter(&row_max, queries, group, &mut max);
                    scatter(&row_sum, queries, group, &mut sum);
                    products.over_keys((m, keys), &scores, value, &mut new, false);
                    let len = group * d;
                    if neighbours(queries) {
                        accumulate(&mut acc[queries[0] as usize * len..][..m * d], &factors, &new, d);
                    } else {
                        for ((&query, new), factors) in
                            queries.iter().zip(new.chunks_exact(len)).zip(factors.chunks_exact(group))
                        {
                            accumulate(&mut acc[query as usize * len..][..len], factors, new, d);
                        }
                    }
                }
            });
            for r in 0..rows {
                for i in 0..group {
                    let slot = r * group + i;
                    let inverse = if sum[slot] == T::ZERO { T::ZERO } else { T::ONE / sum[slot] };
                    let place = r * h + kv * group + i;
                    scale_into(&acc[slot * d..][..d], inverse, &mut out[place * d..][..d]);
                    lse[place] = sum[slot].ln().mul_add(log2_e, max[slot]);
                }
            }
        }
    });
    (out, lse)
}

/// Gradients of [`forward`].
pub(crate) struct Gradients<T: CpuNumber> {
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
    /// (tile, first entry, dbias of the tile)
    tiles: Vec<(usize, usize, &'a mut [T])>,
}

/// Backward of [`forward`]. `entries_per_tile` lists the number of entries of every (batch, kv head, tile), in order, or
/// is empty where there is no bias.
pub(crate) fn backward<T: CpuNumber>(
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
    let (log2_e, factor) = (T::of(std::f64::consts::LOG2_E), T::of(1.0 / (d as f64).sqrt()));
    let scale = T::of(std::f64::consts::LOG2_E / (d as f64).sqrt());
    let tiles = t.div_ceil(QUERIES);
    // two at least: a thread that waits for the last task of another waits half as long
    let splits = BACKWARD_TASKS.div_ceil(b * g).max(2).min(tiles).max(1);
    let words = compute.words::<T>();
    let (keys_left, values_left) = (Lefts::new(device, words, k, dims), Lefts::new(device, words, v, dims));
    let keys_right = Rights::new(device, words, k, dims, width);
    let mut dq = device.alloc::<T>(b * t * h * d);
    let mut dbias = device.alloc::<T>(bias.len());
    let (mut dk_parts, mut dv_parts) =
        (device.alloc::<T>(b * g * splits * t * d), device.alloc::<T>(b * g * splits * t * d));

    let mut tasks: Vec<Task<T>> = Vec::with_capacity(b * g * splits);
    for (i, (dk, dv)) in dk_parts.chunks_mut(t * d).zip(dv_parts.chunks_mut(t * d)).enumerate() {
        tasks.push(Task { bg: i / splits, dk, dv, tiles: Vec::new() });
    }
    let (mut rest, mut entry) = (&mut dbias[..], 0);
    for bg in 0..b * g {
        for tile in 0..tiles {
            let n = entries_per_tile.get(bg * tiles + tile).copied().unwrap_or(0);
            let (mine, others) = std::mem::take(&mut rest).split_at_mut(n);
            rest = others;
            tasks[bg * splits + owner(tile, splits)].tiles.push((tile, entry, mine));
            entry += n;
        }
    }

    let shared_dq = Shared::new(&mut dq);
    device.for_each(tasks, |task| {
        let (batch, kv) = (task.bg / g, task.bg % g);
        task.dk.fill(T::ZERO);
        task.dv.fill(T::ZERO);
        let (at_once, len) = ((ROWS / group).max(1), group * d);
        let lanes = (at_once * group).next_multiple_of(LANES);
        let mut products = Products::new(device, words, lanes, width, d);
        let mut q_tile = Tile::new(device, &products, at_once, len);
        let mut g_tile = Tile::new(device, &products, at_once, len);
        let (mut p, mut ds) = (device.alloc::<T>(width * lanes), device.alloc::<T>(width * lanes));
        let mut x = Lanes::new(device, lanes);
        let (mut row_delta, mut totals) = (device.zeros::<T>(lanes), device.alloc::<T>(lanes));
        let mut dqs = device.alloc::<T>(lanes * d);
        let mut delta = device.alloc::<T>(QUERIES * group);
        let mut dq = device.alloc::<T>(QUERIES * len);
        for (tile, first_entry, dbias) in task.tiles {
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
            q_tile.fill(&products, &q[base * d..], h * d, rows);
            g_tile.fill(&products, &dout[base * d..], h * d, rows);
            visits.for_each(batch, kv, tile, |block, queries, entries| {
                let key0 = block * width;
                let keys = width.min(t - key0);
                let sees = |query: u32| first + query as usize + 1 - key0;
                let (key, value) = (keys_left.from(batch, kv, key0), values_left.from(batch, kv, key0));
                let key_right = keys_right.block(batch, kv, block);
                ask(&task.dk[key0 * d..][..keys * d]);
                ask(&task.dv[key0 * d..][..keys * d]);
                for (i, queries) in queries.chunks(at_once).enumerate() {
                    let m = queries.len() * group;
                    let keys = keys.min(sees(queries[queries.len() - 1]));
                    x.take(queries, group, keys, sees);
                    let (q_rows, q_columns) = q_tile.of(&products, queries);
                    let (g_rows, g_columns) = g_tile.of(&products, queries);
                    products.over_d((keys, x.used), key, q_columns, &mut p);
                    products.over_d((keys, x.used), value, g_columns, &mut ds);
                    for (j, &query) in queries.iter().enumerate() {
                        let bias = entries.get(i * at_once + j).map_or(T::ZERO, |&e| bias[e as usize] * log2_e);
                        let lse = &lse[base + query as usize * h..][..group];
                        for (x, &lse) in x.bias[j * group..].iter_mut().zip(lse) {
                            *x = bias - lse;
                        }
                    }
                    gather(&delta, queries, group, &mut row_delta);
                    differentiate(&mut p, &mut ds, keys, &x, (scale, factor), &row_delta, &mut totals);
                    for (j, &e) in entries.iter().skip(i * at_once).take(queries.len()).enumerate() {
                        let mut sum = T::ZERO;
                        totals[j * group..][..group].iter().for_each(|&x| sum += x);
                        dbias[e as usize - first_entry] = sum;
                    }
                    if neighbours(queries) {
                        let dq = &mut dq[queries[0] as usize * len..];
                        products.over_keys((m, keys), &ds, key_right, dq, true);
                    } else {
                        // through a copy, so that the sums run in the same order as in place
                        gather(&dq, queries, len, &mut dqs);
                        products.over_keys((m, keys), &ds, key_right, &mut dqs, true);
                        scatter(&dqs[..m * d], queries, len, &mut dq);
                    }
                    products.over_rows(keys, &ds, q_rows, &mut task.dk[key0 * d..]);
                    products.over_rows(keys, &p, g_rows, &mut task.dv[key0 * d..]);
                }
            });
            for (r, dq) in dq.chunks_exact(len).enumerate().take(rows) {
                // SAFETY: the heads of this kv head of a query of this tile, which no other task has.
                unsafe { shared_dq.piece((base + r * h) * d, len) }.copy_from_slice(dq);
            }
        }
    });

    let (mut dk, mut dv) = (device.alloc::<T>(b * t * g * d), device.alloc::<T>(b * t * g * d));
    interleave(device, &dk_parts, (b, g, t, d), splits, &mut dk);
    interleave(device, &dv_parts, (b, g, t, d), splits, &mut dv);
    Gradients { dq, dk, dv, dbias }
}

/// `[b, g, splits, t, len]` summed over the splits, as `[b, t, g, len]`.
pub(crate) fn interleave<T: CpuNumber>(
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
