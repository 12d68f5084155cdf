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

mod backward;
mod forward;
mod operands;
mod softmax;
mod tile;

pub(crate) use backward::{Outputs, backward};
pub(crate) use forward::forward;
pub(crate) use softmax::scale_row;

use super::Dims;
use crate::device::cpu::kernel_bf16::Bf16Kernels;
use crate::device::cpu::simd::{LANES, add_into};
use crate::device::{CpuDevice, CpuNumber};
use crate::number::Compute;

/// Queries of a tile whose scores are computed in full: routing and spans.
pub(crate) const SCORE_TILE: usize = 64;
/// Queries of a tile of this engine: the more, the fewer times every block of keys is read, and the more rows share it.
pub(crate) const QUERY_TILE: usize = 128;
/// Gathered rows that work on a block in one step: 64 x 64 f32 scores are 16 KiB, half of the L1 cache.
const STEP_ROWS: usize = 64;
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

/// One (batch, kv head) of a tile of queries.
#[derive(Clone, Copy)]
struct HeadTile {
    batch: usize,
    kv: usize,
    /// first query
    first: usize,
    /// number of queries
    rows: usize,
}

impl HeadTile {
    /// Keys from `key0` on that a query of the tile sees.
    fn sees(self, query: u32, key0: usize) -> usize {
        self.first + query as usize + 1 - key0
    }

    /// Where its first query stands in `[b, t, h]`.
    fn base(self, dims: Dims) -> usize {
        (self.batch * dims.t + self.first) * dims.h + self.kv * dims.group()
    }
}

/// What every tile of a pass reads, forward and backward.
struct Pass<'a, T: CpuNumber, V> {
    device: &'a CpuDevice,
    bf16: Option<Bf16Kernels<T>>,
    dims: Dims,
    /// `[b, t, h, d]`
    q: &'a [T],
    visits: &'a V,
    /// `[entries]`, empty where there is none
    bias: &'a [T],
    log2_e: T,
    /// log2 e / sqrt d
    scale: T,
}

/// Queries that work on a block at once, the numbers of their entries (none where there is no bias), and the keys of the block
/// that the last of them sees: near the diagonal fewer than the block has.
struct Step<'a> {
    queries: &'a [u32],
    entries: &'a [u32],
    keys: usize,
}

impl<'a, T: CpuNumber, V: Visits> Pass<'a, T, V> {
    fn new(device: &'a CpuDevice, compute: Compute, dims: Dims, q: &'a [T], visits: &'a V, bias: &'a [T]) -> Self {
        let log2_e = std::f64::consts::LOG2_E;
        let scale = T::of(log2_e / (dims.d as f64).sqrt());
        Pass { device, bf16: compute.bf16_kernels::<T>(), dims, q, visits, bias, log2_e: T::of(log2_e), scale }
    }

    /// Queries of a step, and lanes for the heads of theirs that share a kv head: whole vectors.
    fn step_size(&self) -> (usize, usize) {
        let queries = (STEP_ROWS / self.dims.group()).max(1);
        (queries, (queries * self.dims.group()).next_multiple_of(LANES))
    }

    /// The first key of a block, and how many it has.
    fn keys_of(&self, block: usize) -> (usize, usize) {
        let first = block * self.visits.block_size();
        (first, self.visits.block_size().min(self.dims.t - first))
    }

    /// The queries that attend a block, step by step.
    fn steps<'q>(
        &self,
        at: HeadTile,
        block: usize,
        queries: &'q [u32],
        entries: &'q [u32],
    ) -> impl Iterator<Item = Step<'q>> + use<'q, T, V> {
        let ((per_step, _), (key0, keys)) = (self.step_size(), self.keys_of(block));
        let entries = entries.chunks(per_step).chain(std::iter::repeat(&[][..]));
        queries.chunks(per_step).zip(entries).map(move |(queries, entries)| {
            let keys = keys.min(at.sees(queries[queries.len() - 1], key0));
            Step { queries, entries, keys }
        })
    }

    /// The bias of query `j` of a step, to base 2.
    fn bias_of(&self, step: &Step, j: usize) -> T {
        step.entries.get(j).map_or(T::ZERO, |&e| self.bias[e as usize] * self.log2_e)
    }
}

/// Which of `splits` tasks has a tile. Later tiles see more keys, so every other round is dealt in reverse: in turn, two tasks
/// would have 16 and 20 of 36 parts of a causal triangle of 8 tiles, and a thread waited 6 % of a backward pass.
pub(crate) fn owner(tile: usize, splits: usize) -> usize {
    let (round, i) = (tile / splits, tile % splits);
    if round.is_multiple_of(2) { i } else { splits - 1 - i }
}

/// Copies the queries of a tile of one kv head out of `x [t, h, d]`, which begins at the first of them, `stride` apart, into
/// `out [queries, len]`, where len is that of the kv head's group, group * d.
pub(crate) fn take_tile<T: CpuNumber>(x: &[T], stride: usize, len: usize, out: &mut [T]) {
    for (r, o) in out.chunks_exact_mut(len).enumerate() {
        o.copy_from_slice(&x[r * stride..][..len]);
    }
}

/// Sums `parts [b, g, splits, t, len]` over the splits into `out [b, t, g, len]`.
pub(crate) fn interleave<T: CpuNumber>(
    device: &CpuDevice,
    parts: &[T],
    (_, g, t, len): (usize, usize, usize, usize),
    splits: usize,
    out: &mut [T],
) {
    const TOKENS: usize = 64;
    let row = g * len;
    device.for_pieces(out, TOKENS * row, |task, out| {
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
