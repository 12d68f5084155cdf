//! The launches of the kernels on `wgmma`, and where they are faster than those on `mma.sync` (docs/log/cuda-attention.md): dense attention, and
//! of lists of chunks of 64 the key side at width 128, and the query side's backward there if a warpgroup's 64 rows are few tokens.

use super::pass::{Form, KEYS, MOST_LISTED, Pass};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::Result;
use crate::ops::attention::Dims;

static FORWARD: Source = Source {
    name: "attention_wide_forward",
    text: concat!(include_str!("wide.cu"), include_str!("wide_walk.cu"), include_str!("wide_forward.cu")),
};
static ROWS: Source = Source {
    name: "attention_wide_rows",
    text: concat!(include_str!("wide.cu"), include_str!("wide_walk.cu"), include_str!("wide_rows.cu")),
};
static KEY_SIDE: Source =
    Source { name: "attention_wide_keys", text: concat!(include_str!("wide.cu"), include_str!("wide_keys.cu")) };

/// Rows, or keys, of a warpgroup.
const ROWS_EACH: usize = 64;
/// Tiles of 64 rows that the slots hold.
const SLOTS: usize = 8;
/// Rows of a list that a block of the key side takes: their 128 batches take 0.2 ms, what starts and ends a block a twentieth of that.
const PART_ROWS: usize = 8192;
/// Query heads of a kv head from which on the query side's backward takes lists: five tokens a warpgroup.
const LEAST_GROUP: usize = 12;

/// Warpgroups that multiply, beside one that brings: three where the registers of a thread allow it, so that two multiply while one
/// computes powers.
fn groups(source: &'static Source, form: Form) -> usize {
    let few_sums = std::ptr::eq(source, &FORWARD) || (std::ptr::eq(source, &ROWS) && form.wide == 64);
    if few_sums { 3 } else { 2 }
}

fn threads(groups: usize) -> u32 {
    128 * (groups as u32 + 1)
}

fn unit(source: &'static Source, form: Form) -> Unit {
    let listed = usize::from(form.chunk.is_some());
    let groups = groups(source, form);
    let numbers = [("D", form.wide), ("HEAD", form.head), ("LISTED", listed), ("CHUNK", KEYS), ("GROUPS", groups)];
    Unit::new(source, numbers.map(|(name, value)| (name, value.to_string())))
}

/// Everything that is compiled here, at the widths that need no padding.
pub(super) fn units() -> Vec<Unit> {
    let form = |wide, chunk| Form { head: wide, wide, chunk, span: false, power: 0 };
    let dense = [64, 128].into_iter().flat_map(|wide| [&FORWARD, &ROWS, &KEY_SIDE].map(|s| unit(s, form(wide, None))));
    dense.chain([&ROWS, &KEY_SIDE].map(|source| unit(source, form(128, Some(KEYS))))).collect()
}

impl Pass<'_> {
    /// Whether forward goes here.
    pub(super) fn forward_is_wide(&self) -> bool {
        !self.form.span && self.form.wide >= 64 && self.form.chunk.is_none()
    }

    /// Whether the key side's backward goes here.
    pub(super) fn keys_are_wide(&self) -> bool {
        let listed = self.form.chunk == Some(KEYS) && self.form.wide == 128 && self.dims.t <= MOST_LISTED;
        self.forward_is_wide() || listed
    }

    /// Whether the query side's backward goes here.
    pub(super) fn rows_are_wide(&self) -> bool {
        self.forward_is_wide() || (self.keys_are_wide() && self.dims.group() >= LEAST_GROUP)
    }

    fn tile(&self) -> usize {
        ROWS_EACH * self.form.wide.div_ceil(64) * 128
    }

    /// Starts a kernel of the query side, with `operands` tiles a warpgroup beside the slots.
    fn wide_side(
        &self,
        (source, name): (&'static Source, &'static str),
        operands: usize,
        buffers: &[Arg],
    ) -> Result<()> {
        let (group, groups) = (self.dims.group(), groups(source, self.form));
        let (q, (k, v)) = (self.operands.q, self.maps()?);
        let first = [Arg::At(q.0, q.1), Arg::Map(&k), Arg::Map(&v)];
        let sizes = [self.dims.t, self.dims.g, group, q.2, self.chunks()].map(Arg::int);
        let args = [&first[..], buffers, &self.lists(), &sizes, &[self.scale()]].concat();
        let tokens = groups * (ROWS_EACH / group);
        let grid = Grid { blocks: [self.dims.t.div_ceil(tokens), self.dims.b * self.dims.g, 1], ..Grid::default() };
        let shared = (groups * operands + SLOTS) * self.tile() + self.dims.t.div_ceil(KEYS).next_multiple_of(8) * 2;
        let kernel = q.0.device().kernel(&unit(source, self.form), name)?;
        // SAFETY: the kernel's parameters in order, for extents that were compared with the buffers when the pass was made and by
        // its methods.
        unsafe { kernel.launch(Grid { threads: threads(groups), ..grid }.shared(shared), &args) }
    }

    pub(super) fn wide_forward(&self, o: &CudaBuffer, lse: &CudaBuffer) -> Result<()> {
        self.wide_side((&FORWARD, "wide_forward"), 1, &[o, lse].map(Arg::Buffer))
    }

    pub(super) fn wide_rows(&self, buffers: &[Arg]) -> Result<()> {
        self.wide_side((&ROWS, "wide_rows"), 2, buffers)
    }

    /// Tokens of a list that a block of the key side takes: [`PART_ROWS`] rows, or more in long sequences, so that a chunk is 16 blocks' at most: of lists
    /// that are even parts balance nothing and take a few percent.
    pub(super) fn tokens_of_part(&self) -> usize {
        (PART_ROWS / self.dims.group()).max(self.dims.t.div_ceil(16))
    }

    /// dk and dv; of a list a block takes `most` tokens at most.
    pub(super) fn wide_keys(&self, inputs: [&CudaBuffer; 3], most: usize) -> Result<[CudaBuffer; 2]> {
        let (q, k, v) = (self.operands.q, self.operands.k, self.operands.v);
        let Dims { b, t, g, d, .. } = self.dims;
        let (pairs, blocks, unit) = (b * g, self.keys.div_ceil(2 * ROWS_EACH), unit(&KEY_SIDE, self.form));
        let counted = self.form.chunk.map(|_| self.count_lists(&unit, 2 * blocks)).transpose()?;
        let (parts, lists) = if counted.is_some() { (t.div_ceil(most), 2 * (t.div_ceil(64) + 1) * 4) } else { (1, 0) };
        let outputs = [self.floats(b * self.keys * g * d)?, self.floats(b * self.keys * g * d)?];
        let operands = [q, k, v].map(|(buffer, first, _)| Arg::At(buffer, first));
        let sizes = [t, g, self.dims.group(), q.2, k.2, self.chunks()].map(Arg::int);
        let counted = counted.as_ref().map_or([Arg::Null; 2], |both| both.each_ref().map(Arg::Buffer));
        let (inputs, to) = (inputs.map(Arg::Buffer), outputs.each_ref().map(Arg::Buffer));
        let rest = [Arg::int(most), self.scale()];
        let args = [&operands[..], &inputs, &to, &self.lists(), &sizes, &counted, &rest].concat();
        let threads = threads(groups(&KEY_SIDE, self.form));
        let grid = Grid { blocks: [blocks, pairs, parts], threads, ..Grid::default() };
        let kernel = q.0.device().kernel(&unit, "wide_keys")?;
        // SAFETY: as above.
        unsafe { kernel.launch(grid.shared((4 + SLOTS) * self.tile() + lists), &args)? };
        Ok(outputs)
    }

    /// How many tokens attend each chunk; and zeros: the number of blocks that have started, and of each of `lists` a kv head the parts that have been
    /// added.
    fn count_lists(&self, unit: &Unit, lists: usize) -> Result<[CudaBuffer; 2]> {
        let (pairs, chunks, device) = (self.dims.b * self.dims.g, self.chunks(), self.operands.q.0.device());
        let attend = device.alloc(self.op, Kind::U32, pairs * chunks)?;
        let args = [self.lists()[0], Arg::Buffer(&attend), Arg::int(self.dims.t), Arg::int(chunks)];
        let grid = Grid { blocks: [chunks.div_ceil(32), pairs, 1], ..Grid::line(1, 256) };
        // SAFETY: the kernel's parameters in order; a lane a chunk.
        unsafe { device.kernel(unit, "wide_keys_count")?.launch(grid, &args)? };
        Ok([attend, device.zeros(self.op, Kind::U32, 1 + pairs * lists)?])
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{differ_by_rounding, over_uneven_lists};
    use super::*;
    use crate::ops::cuda::testing::cuda;

    /// Chunks side by side have one part and many.
    #[test]
    fn parts_of_a_chunk_change_the_rounding_of_sums_alone() {
        let Some(gpu) = cuda() else { return };
        let dims = Dims { b: 2, t: 900, h: 24, g: 2, d: 128 };
        over_uneven_lists(gpu, dims, |pass, inputs| {
            assert!(pass.keys_are_wide());
            let run = |most| pass.wide_keys(inputs, most);
            gpu.same_bits(|| run(64).map(Vec::from));
            let one = run(dims.t).unwrap().map(|x| gpu.numbers(&x));
            for most in [1000, 450, 100, 37] {
                for (of_one, got) in one.iter().zip(run(most).unwrap().map(|x| gpu.numbers(&x))) {
                    // 900 tokens of twelve heads, each addition rounded to 24 bits, in one order and in another
                    differ_by_rounding(&format!("{most} tokens a part"), of_one, &got, 10800.0);
                }
            }
        });
    }
}
