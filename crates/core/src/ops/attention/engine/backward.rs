use super::operands::{LhsRows, Products, RhsBlocks};
use super::softmax::{Lanes, differentiate, row_dot};
use super::tile::{QueryTile, are_contiguous, gather, scatter};
use super::{BACKWARD_TASKS, HeadTile, Pass, QUERY_TILE, Step, Visits, interleave, owner};
use crate::device::cpu::simd::prefetch_rows;
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber, Shared};
use crate::number::Compute;
use crate::ops::attention::Dims;

/// Gradients of [`super::forward`].
pub(crate) struct Gradients<T: CpuNumber> {
    pub dq: Buffer<T>,
    pub dk: Buffer<T>,
    pub dv: Buffer<T>,
    /// one number per entry; empty where there is no bias
    pub dbias: Buffer<T>,
}

/// What every task reads.
struct Backward<'a, T: CpuNumber, V> {
    pass: Pass<'a, T, V>,
    outputs: Outputs<'a, T>,
    keys_lhs: LhsRows<'a, T>,
    values_lhs: LhsRows<'a, T>,
    keys_rhs: RhsBlocks<'a, T>,
}

/// What a task owns.
struct Task<'a, T> {
    /// number of its (batch, kv head)
    bg: usize,
    /// `[t, d]`, both
    dk: &'a mut [T],
    dv: &'a mut [T],
    tiles: Vec<TaskTile<'a, T>>,
}

/// A tile of a task, its first entry, and the gradient of the bias of its entries.
struct TaskTile<'a, T> {
    tile: usize,
    first_entry: usize,
    dbias: &'a mut [T],
}

/// What the blocks of a tile add to: the task's dk and dv `[t, d]`, and the gradient of the bias.
struct TileGrads<'a, T> {
    dk: &'a mut [T],
    dv: &'a mut [T],
    first_entry: usize,
    dbias: &'a mut [T],
}

/// What a task computes with.
struct Scratch<T: CpuNumber> {
    products: Products<T>,
    q: QueryTile<T>,
    dout: QueryTile<T>,
    lanes: Lanes<T>,
    /// of the rows that work on a block: scores and dp, then p and ds, `[keys, lanes]`; delta and sums of ds `[lanes]`; dq `[lanes, d]`
    p: Buffer<T>,
    ds: Buffer<T>,
    step_delta: Buffer<T>,
    totals: Buffer<T>,
    step_dq: Buffer<T>,
    /// of the tile: <out, dout> of every row `[queries, group]`, and dq `[queries, group, d]`
    delta: Buffer<T>,
    dq: Buffer<T>,
}

impl<T: CpuNumber, V: Visits> Backward<'_, T, V> {
    fn scratch(&self) -> Scratch<T> {
        let Pass { device, bf16, dims, visits, .. } = self.pass;
        let (d, group, width, (per_step, lanes)) = (dims.d, dims.group(), visits.block_size(), self.pass.step_size());
        let products = Products::new(device, bf16, lanes, width, d);
        Scratch {
            q: QueryTile::new(device, &products, per_step, group * d),
            dout: QueryTile::new(device, &products, per_step, group * d),
            products,
            lanes: Lanes::new(device, lanes),
            p: device.alloc(width * lanes),
            ds: device.alloc(width * lanes),
            step_delta: device.zeros(lanes),
            totals: device.alloc(lanes),
            step_dq: device.alloc(lanes * d),
            delta: device.alloc(QUERY_TILE * group),
            dq: device.alloc(QUERY_TILE * group * d),
        }
    }

    /// Tiles of one kv head: their dq, and the task's dk and dv.
    fn run(&self, task: Task<T>, shared_dq: &Shared<T>) {
        let Pass { dims, q, visits, .. } = self.pass;
        let (Dims { t, h, g, d, .. }, group, Outputs { out, dout, .. }) = (dims, dims.group(), self.outputs);
        let Task { bg, dk, dv, tiles } = task;
        dk.fill(T::ZERO);
        dv.fill(T::ZERO);
        let s = &mut self.scratch();
        for TaskTile { tile, first_entry, dbias } in tiles {
            let first = tile * QUERY_TILE;
            let at = HeadTile { batch: bg / g, kv: bg % g, first, rows: QUERY_TILE.min(t - first) };
            let base = at.base(dims);
            s.dq.fill(T::ZERO);
            for (slot, delta) in s.delta.iter_mut().enumerate().take(at.rows * group) {
                let place = (base + slot / group * h + slot % group) * d;
                *delta = row_dot(&out[place..][..d], &dout[place..][..d]);
            }
            s.q.fill(&s.products, &q[base * d..], h * d, at.rows);
            s.dout.fill(&s.products, &dout[base * d..], h * d, at.rows);
            let grads = &mut TileGrads { dk, dv, first_entry, dbias };
            visits.for_each(at.batch, at.kv, tile, |block, queries, entries| {
                self.block(at, block, queries, entries, s, grads);
            });
            for (r, dq) in s.dq.chunks_exact(group * d).enumerate().take(at.rows) {
                // SAFETY: the heads of this kv head of a query of this tile, which no other task has.
                unsafe { shared_dq.piece((base + r * h) * d, group * d) }.copy_from_slice(dq);
            }
        }
    }

    /// The keys of a block and the queries that attend it, as many of them at a time as a step takes.
    fn block(
        &self,
        at: HeadTile,
        block: usize,
        queries: &[u32],
        entries: &[u32],
        s: &mut Scratch<T>,
        grads: &mut TileGrads<T>,
    ) {
        let (d, group, (key0, all_keys)) = (self.pass.dims.d, self.pass.dims.group(), self.pass.keys_of(block));
        let (key, value) = (self.keys_lhs.from(at.batch, at.kv, key0), self.values_lhs.from(at.batch, at.kv, key0));
        let key_rhs = self.keys_rhs.block(at.batch, at.kv, block);
        let (dk, dv) = (&mut grads.dk[key0 * d..], &mut grads.dv[key0 * d..]);
        prefetch_rows(&dk[..all_keys * d]);
        prefetch_rows(&dv[..all_keys * d]);
        for step in self.pass.steps(at, block, queries, entries) {
            let Step { queries, entries, keys } = step;
            let m = queries.len() * group;
            s.lanes.take(queries, group, keys, |query| at.sees(query, key0));
            let (q_rows, q_columns) = s.q.of(&s.products, queries);
            let (dout_rows, dout_columns) = s.dout.of(&s.products, queries);
            s.products.over_d((keys, s.lanes.used), key, q_columns, &mut s.p);
            s.products.over_d((keys, s.lanes.used), value, dout_columns, &mut s.ds);
            self.shift_by_lse(at, &step, &mut s.lanes);
            gather(&s.delta, queries, group, &mut s.step_delta);
            let scales = (self.pass.scale, T::of(1.0 / (d as f64).sqrt()));
            differentiate(&mut s.p, &mut s.ds, keys, &s.lanes, scales, &s.step_delta, &mut s.totals);
            for (&e, totals) in entries.iter().zip(s.totals.chunks_exact(group)) {
                let mut sum = T::ZERO;
                totals.iter().for_each(|&x| sum += x);
                grads.dbias[e as usize - grads.first_entry] = sum;
            }
            let len = group * d;
            if are_contiguous(queries) {
                let dq = &mut s.dq[queries[0] as usize * len..];
                s.products.over_keys((m, keys), &s.ds, key_rhs, dq, Accumulate::Existing);
            } else {
                // through a copy, so that the sums run in the same order as in place
                gather(&s.dq, queries, len, &mut s.step_dq);
                s.products.over_keys((m, keys), &s.ds, key_rhs, &mut s.step_dq, Accumulate::Existing);
                scatter(&s.step_dq[..m * d], queries, len, &mut s.dq);
            }
            s.products.over_rows(keys, &s.ds, q_rows, dk);
            s.products.over_rows(keys, &s.p, dout_rows, dv);
        }
    }

    /// Sets what is added to the scores of a step's queries: their bias minus lse, both to base 2.
    fn shift_by_lse(&self, at: HeadTile, step: &Step, lanes: &mut Lanes<T>) {
        let Dims { h, .. } = self.pass.dims;
        let (group, base) = (self.pass.dims.group(), at.base(self.pass.dims));
        for (j, (&query, shifts)) in step.queries.iter().zip(lanes.bias.chunks_exact_mut(group)).enumerate() {
            let bias = self.pass.bias_of(step, j);
            let lse = &self.outputs.lse[base + query as usize * h..][..group];
            shifts.iter_mut().zip(lse).for_each(|(shift, &lse)| *shift = bias - lse);
        }
    }
}

/// Which tiles each of `splits` tasks a (batch, kv head) has. `entries_per_tile` as in [`backward`].
fn deal<'a, T>(
    (dk, dv): (&'a mut [T], &'a mut [T]),
    mut dbias: &'a mut [T],
    entries_per_tile: &[usize],
    dims: Dims,
    splits: usize,
) -> Vec<Task<'a, T>> {
    let Dims { b, t, g, d, .. } = dims;
    let mut tasks: Vec<Task<T>> = Vec::with_capacity(b * g * splits);
    for (i, (dk, dv)) in dk.chunks_mut(t * d).zip(dv.chunks_mut(t * d)).enumerate() {
        tasks.push(Task { bg: i / splits, dk, dv, tiles: Vec::new() });
    }
    let (tiles, mut first_entry) = (t.div_ceil(QUERY_TILE), 0);
    for (bg, tile) in (0..b * g).flat_map(|bg| (0..tiles).map(move |tile| (bg, tile))) {
        let n = entries_per_tile.get(bg * tiles + tile).copied().unwrap_or(0);
        let (mine, others) = dbias.split_at_mut(n);
        dbias = others;
        tasks[bg * splits + owner(tile, splits)].tiles.push(TaskTile { tile, first_entry, dbias: mine });
        first_entry += n;
    }
    tasks
}

/// What a pass made, and what its gradients are computed from: out `[b, t, h, d]` and lse `[b, t, h]` of
/// [`super::forward`], and the gradient of out.
#[derive(Clone, Copy)]
pub(crate) struct Outputs<'a, T> {
    pub out: &'a [T],
    pub lse: &'a [T],
    pub dout: &'a [T],
}

/// Backward of [`super::forward`]. `entries_per_tile` lists the number of entries of every (batch, kv head, tile), in order, or
/// is empty where there is no bias.
pub(crate) fn backward<T: CpuNumber>(
    device: &CpuDevice,
    compute: Compute,
    dims: Dims,
    (q, k, v): (&[T], &[T], &[T]),
    outputs: Outputs<T>,
    visits: &impl Visits,
    (bias, entries_per_tile): (&[T], &[usize]),
) -> Gradients<T> {
    let Dims { b, t, h, g, d } = dims;
    if b == 0 || t == 0 {
        let none = || device.alloc::<T>(0);
        return Gradients { dq: none(), dk: none(), dv: none(), dbias: none() };
    }
    let pass = Pass::new(device, compute, dims, q, visits, bias);
    let keys_lhs = LhsRows::new(device, pass.bf16, k, dims);
    let values_lhs = LhsRows::new(device, pass.bf16, v, dims);
    let keys_rhs = RhsBlocks::new(device, pass.bf16, k, dims, visits.block_size());
    let backward = Backward { pass, outputs, keys_lhs, values_lhs, keys_rhs };
    // two at least: a thread that waits for the last task of another waits half as long
    let splits = BACKWARD_TASKS.div_ceil(b * g).max(2).min(t.div_ceil(QUERY_TILE)).max(1);
    let mut dq = device.alloc::<T>(b * t * h * d);
    let mut dbias = device.alloc::<T>(bias.len());
    let (mut dk_parts, mut dv_parts) =
        (device.alloc::<T>(b * g * splits * t * d), device.alloc::<T>(b * g * splits * t * d));
    let tasks = deal((&mut dk_parts, &mut dv_parts), &mut dbias, entries_per_tile, dims, splits);
    let shared_dq = Shared::new(&mut dq);
    device.for_each(tasks, |task| backward.run(task, &shared_dq));
    let (mut dk, mut dv) = (device.alloc::<T>(b * t * g * d), device.alloc::<T>(b * t * g * d));
    interleave(device, &dk_parts, (b, g, t, d), splits, &mut dk);
    interleave(device, &dv_parts, (b, g, t, d), splits, &mut dv);
    Gradients { dq, dk, dv, dbias }
}
