//! Backward of lists of chunks of 64 at width 64, both sides at once (`wide_joint.cu`, `joint_parts.cu`): rows are gathered by chunk, and what a chunk
//! adds to dq goes to memory in the order of chunks.

use super::Gradients;
use super::pass::{Form, KEYS, Pass};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::Result;

static JOINT: Source = Source {
    name: "attention_wide_joint",
    text: concat!(include_str!("wide.cu"), include_str!("joint_parts.cu"), include_str!("wide_joint.cu")),
};

/// Tiles of 64 rows in shared memory: keys, the gradients of scores, three slots of queries and gradients of outputs, and two pieces of dq in f32.
const TILES: usize = 2 + 3 * 2 + 2 * 2;

/// Blocks from which on this is the faster way. A turn takes 4 us, so a sequence 4 us a chunk at least; two passes take 5 ns for a chunk of a kv head,
/// a chunk of queries and 10 % density, which is less below 1000 blocks. What was timed has 4096.
const LEAST_BLOCKS: usize = 2048;

fn unit(form: Form) -> Unit {
    let numbers = [("D", form.wide), ("HEAD", form.head), ("LISTED", 1), ("CHUNK", KEYS), ("GROUPS", 1)];
    Unit::new(&JOINT, numbers.map(|(name, value)| (name, value.to_string())))
}

/// What is compiled here, at the width that needs no padding.
pub(super) fn units() -> Vec<Unit> {
    vec![unit(Form { head: 64, wide: 64, chunk: Some(KEYS), span: false, power: 0 })]
}

/// In which order blocks work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    /// Kv heads of sequences at a time.
    pub together: usize,
    /// Chains of chunks, each with its own sums: 1, 2 or 4. Other chains are another order of sums.
    pub chains: usize,
}

impl Order {
    /// What was fastest (the table of docs/log/cuda-attention.md). Few kv heads at a time are near each other in the caches, but then more chunks of
    /// each wait for one another, which short sequences have no room for. Two chains wait less; their sums are added once more.
    pub fn of(chunks: usize) -> Self {
        if chunks < 192 { Order { together: 16, chains: 1 } } else { Order { together: 8, chains: 2 } }
    }
}

impl Pass<'_> {
    /// Whether backward goes here.
    pub(super) fn sides_are_joint(&self) -> bool {
        self.rows_may_be_gathered() && self.dims.b * self.dims.g * self.chunks() >= LEAST_BLOCKS
    }

    /// Both sides, from lse and delta of every row.
    pub(super) fn joint(&self, [dout, rows, delta]: [&CudaBuffer; 3], order: Order) -> Result<Gradients> {
        let ((q, k, v), dims) = ((self.operands.q, self.operands.k, self.operands.v), self.dims);
        let (device, lists) = (q.0.device(), self.lists());
        let (pairs, tiles, chunks) = (dims.b * dims.g, dims.t.div_ceil(64), self.chunks());
        let (numbers, of_keys) = (dims.b * dims.t * dims.h * dims.d, dims.b * dims.t * dims.g * dims.d);
        let dq = device.zeros(self.op, Kind::F32, numbers)?;
        let rest = device.zeros(self.op, Kind::F32, (order.chains - 1) * numbers)?;
        let (dk, dv) = (self.floats(of_keys)?, self.floats(of_keys)?);
        let dbias = self.dbias()?;
        let turns = device.alloc(self.op, Kind::U32, pairs * tiles * chunks)?;
        let launch = |name, grid, args: &[Arg]| {
            // SAFETY: the kernels' parameters in order, for extents that were compared with the buffers when the pass was made: a warp a tile of
            // tokens, a block a chunk, a thread four numbers of dq.
            device.kernel(&unit(self.form), name).and_then(|kernel| unsafe { kernel.launch(grid, args) })
        };
        let sizes = [pairs * tiles, dims.t, chunks, order.chains].map(Arg::int);
        let args = [&[lists[0], Arg::Buffer(&turns)], &sizes[..]].concat();
        launch("joint_turns", Grid::line((pairs * tiles).div_ceil(8), 256), &args)?;
        // a number a tile and chain, and that of blocks which have started
        let done = device.zeros(self.op, Kind::U32, pairs * tiles * order.chains + 1)?;
        let operands = [q, k, v].map(|(buffer, first, _)| Arg::At(buffer, first));
        let inputs = [dout, rows, delta].map(Arg::Buffer);
        let outputs =
            [Arg::Buffer(&dq), dbias.as_ref().map_or(Arg::Null, Arg::Buffer), Arg::Buffer(&dk), Arg::Buffer(&dv)];
        let buffers = [&turns, &done, &rest].map(Arg::Buffer);
        let sizes = [dims.t, dims.g, dims.group(), q.2, k.2, chunks, pairs, order.together.min(pairs), order.chains];
        let args = [&operands[..], &inputs, &outputs, &lists, &buffers, &sizes.map(Arg::int), &[self.scale()]].concat();
        launch("wide_joint", Grid::line(pairs * chunks, 256).shared(TILES * KEYS * 128 + (tiles + 1) * 4), &args)?;
        if order.chains > 1 {
            let args = [Arg::Buffer(&dq), buffers[2], Arg::Long(numbers as i64 / 4), Arg::int(order.chains)];
            launch("joint_sum", Grid::line((numbers / 4).div_ceil(256), 256), &args)?;
        }
        Ok(Gradients { dq, dk, dv, dbias })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{differ_by_rounding, over_uneven_lists};
    use super::*;
    use crate::ops::attention::Dims;
    use crate::ops::cuda::testing::cuda;

    /// With more kv heads than are worked on at a time, with fewer in the last set, and with chains that have nothing of a tile.
    #[test]
    fn the_order_of_blocks_changes_no_bit_and_that_of_sums_their_rounding() {
        let Some(gpu) = cuda() else { return };
        over_uneven_lists(gpu, Dims { b: 2, t: 700, h: 10, g: 5, d: 64 }, |pass, inputs| {
            let run = |together, chains| {
                let d = pass.joint(inputs, Order { together, chains }).unwrap();
                [d.dq, d.dk, d.dv, d.dbias.unwrap()].map(|x| gpu.numbers(&x))
            };
            gpu.same_bits(|| {
                let d = pass.joint(inputs, Order { together: 4, chains: 2 })?;
                Ok([d.dq, d.dk, d.dv].into_iter().chain(d.dbias).collect())
            });
            for chains in [1, 2, 4] {
                let one = run(100, chains);
                for together in [1, 3, 10] {
                    assert!(one == run(together, chains), "{together} together, {chains} chains");
                }
                let [dq, rest @ ..] = run(100, 1);
                assert!(one[1..] == rest, "{chains} chains");
                // a sum of up to eleven numbers, each time rounded to 24 bits, both times
                differ_by_rounding(&format!("{chains} chains"), &dq, &one[0], 22.0);
            }
        });
    }
}
