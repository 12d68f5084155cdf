use std::cmp::Reverse;

use super::operands::{LhsRows, Products, RhsBlocks};
use super::softmax::{Lanes, absorb, accumulate, scale_into};
use super::tile::{QueryTile, are_contiguous, gather, scatter};
use super::{HeadTile, Pass, QUERY_TILE, Step, Visits};
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber};
use crate::number::Compute;
use crate::ops::attention::Dims;

/// What every tile reads.
struct Forward<'a, T: CpuNumber, V> {
    pass: Pass<'a, T, V>,
    keys: LhsRows<'a, T>,
    values: RhsBlocks<'a, T>,
}

/// What a tile computes with. Everything that is kept for a row is `[queries, group, ..]`.
struct Scratch<T: CpuNumber> {
    products: Products<T>,
    q: QueryTile<T>,
    lanes: Lanes<T>,
    /// of the rows that work on a block: scores `[keys, lanes]`, running maximum, sum and factors `[lanes]`, new outputs `[lanes, d]`
    scores: Buffer<T>,
    step_max: Buffer<T>,
    step_sum: Buffer<T>,
    factors: Buffer<T>,
    new: Buffer<T>,
    /// of the tile: outputs before the division `[queries, group, d]`, running maximum and sum `[queries, group]`
    acc: Buffer<T>,
    max: Buffer<T>,
    sum: Buffer<T>,
}

impl<T: CpuNumber, V: Visits> Forward<'_, T, V> {
    fn scratch(&self, rows: usize) -> Scratch<T> {
        let Pass { device, bf16, dims, visits, .. } = self.pass;
        let (d, group, width, (per_step, lanes)) = (dims.d, dims.group(), visits.block_size(), self.pass.step_size());
        let products = Products::new(device, bf16, lanes, width, d);
        Scratch {
            q: QueryTile::new(device, &products, per_step, group * d),
            products,
            scores: device.alloc(width * lanes),
            new: device.alloc(lanes * d),
            lanes: Lanes::new(device, lanes),
            step_max: device.zeros(lanes),
            step_sum: device.zeros(lanes),
            factors: device.alloc(lanes),
            acc: device.alloc(rows * group * d),
            max: device.alloc(rows * group),
            sum: device.alloc(rows * group),
        }
    }

    /// All kv heads of a tile: its rows of out and lse.
    fn tile(&self, batch: usize, tile: usize, out: &mut [T], lse: &mut [T]) {
        let Pass { dims, q, visits, .. } = self.pass;
        let Dims { h, g, d, .. } = dims;
        let (first, rows) = (tile * QUERY_TILE, lse.len() / h);
        let mut scratch = self.scratch(rows);
        for kv in 0..g {
            let at = HeadTile { batch, kv, first, rows };
            let s = &mut scratch;
            s.acc.fill(T::ZERO);
            s.max.fill(T::NEG_INF);
            s.sum.fill(T::ZERO);
            s.q.fill(&s.products, &q[at.base(dims) * d..], h * d, rows);
            visits.for_each(batch, kv, tile, |block, queries, entries| self.block(at, block, queries, entries, s));
            self.finish(at, s, out, lse);
        }
    }

    /// What the keys of a block are to the queries that attend it, as many of them at a time as a step takes.
    fn block(&self, at: HeadTile, block: usize, queries: &[u32], entries: &[u32], s: &mut Scratch<T>) {
        let (d, group, (key0, _)) = (self.pass.dims.d, self.pass.dims.group(), self.pass.keys_of(block));
        let (keys_lhs, value) = (self.keys.from(at.batch, at.kv, key0), self.values.block(at.batch, at.kv, block));
        for step in self.pass.steps(at, block, queries, entries) {
            let Step { queries, keys, .. } = step;
            let m = queries.len() * group;
            s.lanes.take(queries, group, keys, |query| at.sees(query, key0));
            let (_, columns) = s.q.of(&s.products, queries);
            s.products.over_d((keys, s.lanes.used), keys_lhs, columns, &mut s.scores);
            for (j, bias) in s.lanes.bias.chunks_exact_mut(group).enumerate().take(queries.len()) {
                bias.fill(self.pass.bias_of(&step, j));
            }
            gather(&s.max, queries, group, &mut s.step_max);
            gather(&s.sum, queries, group, &mut s.step_sum);
            absorb(&mut s.scores, keys, &s.lanes, self.pass.scale, &mut s.step_max, &mut s.step_sum, &mut s.factors);
            scatter(&s.step_max, queries, group, &mut s.max);
            scatter(&s.step_sum, queries, group, &mut s.sum);
            s.products.over_keys((m, keys), &s.scores, value, &mut s.new, Accumulate::Overwrite);
            let len = group * d;
            if are_contiguous(queries) {
                accumulate(&mut s.acc[queries[0] as usize * len..][..m * d], &s.factors, &s.new, d);
            } else {
                let rows = s.new.chunks_exact(len).zip(s.factors.chunks_exact(group));
                for (&query, (new, factors)) in queries.iter().zip(rows) {
                    accumulate(&mut s.acc[query as usize * len..][..len], factors, new, d);
                }
            }
        }
    }

    /// Divides by the sums, and writes out and lse.
    fn finish(&self, at: HeadTile, s: &Scratch<T>, out: &mut [T], lse: &mut [T]) {
        let (Dims { h, d, .. }, group) = (self.pass.dims, self.pass.dims.group());
        for (slot, &sum) in s.sum.iter().enumerate() {
            let inverse = if sum == T::ZERO { T::ZERO } else { T::ONE / sum };
            let place = slot / group * h + at.kv * group + slot % group;
            scale_into(&s.acc[slot * d..][..d], inverse, &mut out[place * d..][..d]);
            lse[place] = sum.ln().mul_add(self.pass.log2_e, s.max[slot]);
        }
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
    let Dims { b, t, h, d, .. } = dims;
    let pass = Pass::new(device, compute, dims, q, visits, bias);
    let keys = LhsRows::new(device, pass.bf16, k, dims);
    let values = RhsBlocks::new(device, pass.bf16, v, dims, visits.block_size());
    let forward = Forward { pass, keys, values };
    let (mut out, mut lse) = (device.alloc::<T>(b * t * h * d), device.alloc::<T>(b * t * h));
    let mut pieces = Vec::with_capacity(b * t.div_ceil(QUERY_TILE));
    for (batch, (o, l)) in out.chunks_mut((t * h * d).max(1)).zip(lse.chunks_mut((t * h).max(1))).enumerate() {
        for (tile, (o, l)) in o.chunks_mut(QUERY_TILE * h * d).zip(l.chunks_mut(QUERY_TILE * h)).enumerate() {
            pieces.push((batch, tile, o, l));
        }
    }
    // the tiles that see most first, so that the last ones, which a thread may have to wait for, are short
    pieces.sort_by_key(|piece| Reverse(piece.1));
    device.for_each(pieces, |(batch, tile, out, lse)| forward.tile(batch, tile, out, lse));
    (out, lse)
}
