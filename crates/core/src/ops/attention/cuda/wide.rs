//! The launches of the kernels on `wgmma`, and where they are faster than those on `mma.sync` (docs/log/cuda-attention.md): dense attention, and
//! of lists of chunks of 64 the key side at width 128, and the query side's backward there if a warpgroup's 64 rows are few tokens.

use super::pass::{Form, KEYS, Pass};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::Result;

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
/// Tokens of a sequence with lists at most: the key side counts them in shared memory.
const MOST_TOKENS: usize = 1 << 17;
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
        let listed = self.form.chunk == Some(KEYS) && self.form.wide == 128 && self.dims.t <= MOST_TOKENS;
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
    pub(super) fn wide_keys(&self, inputs: [&CudaBuffer; 3], outputs: [&CudaBuffer; 2], most: usize) -> Result<()> {
        let (q, k, v) = (self.operands.q, self.operands.k, self.operands.v);
        let (t, pairs, chunks) = (self.dims.t, self.dims.b * self.dims.g, self.chunks());
        let (device, unit) = (q.0.device(), unit(&KEY_SIDE, self.form));
        let keys = self.keys.div_ceil(2 * ROWS_EACH);
        let (mut grid, mut shared) = (Grid { blocks: [keys, pairs, 1], ..Grid::default() }, (4 + SLOTS) * self.tile());
        grid.threads = threads(groups(&KEY_SIDE, self.form));
        let mut counted = None;
        if self.form.chunk.is_some() {
            grid.blocks[2] = t.div_ceil(most);
            shared += 2 * (t.div_ceil(64) + 1) * 4;
            let attend = device.alloc(self.op, Kind::U32, pairs * chunks)?;
            let args = [self.lists()[0], Arg::Buffer(&attend), Arg::int(t), Arg::int(chunks)];
            let warps = Grid { blocks: [chunks.div_ceil(32), pairs, 1], ..Grid::line(1, 256) };
            // SAFETY: the kernel's parameters in order; a lane a chunk.
            unsafe { device.kernel(&unit, "wide_keys_count")?.launch(warps, &args)? };
            // the number of blocks that have started, and of each chunk the parts that have been added
            counted = Some((attend, device.zeros(self.op, Kind::U32, 1 + pairs * keys * 2)?));
        }
        let counted = counted.as_ref().map_or([Arg::Null; 2], |(attend, turns)| [attend, turns].map(Arg::Buffer));
        let operands = [q, k, v].map(|(buffer, first, _)| Arg::At(buffer, first));
        let sizes = [t, self.dims.g, self.dims.group(), q.2, k.2, chunks].map(Arg::int);
        let (inputs, outputs) = (inputs.map(Arg::Buffer), outputs.map(Arg::Buffer));
        let rest = [Arg::int(most), self.scale()];
        let args = [&operands[..], &inputs, &outputs, &self.lists(), &sizes, &counted, &rest].concat();
        // SAFETY: as above.
        unsafe { device.kernel(&unit, "wide_keys")?.launch(grid.shared(shared), &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Kind::{Bf16, F32};
    use crate::ops::attention::{Dims, Routes};
    use crate::ops::cuda::attention::{BlockMask, Operands, forward};
    use crate::ops::cuda::testing::{cuda, tensors};
    use crate::testing;

    /// Chunk 0 is every query's, others are few queries', so that chunks side by side have one part and many.
    #[test]
    fn parts_of_a_chunk_change_the_rounding_of_sums_alone() {
        let Some(gpu) = cuda() else { return };
        let dims = Dims { b: 2, t: 900, h: 24, g: 2, d: 128 };
        let (wide, narrow) = ([dims.b, dims.t, dims.h, dims.d], [dims.b, dims.t, dims.g, dims.d]);
        let host = tensors(&[(&wide, Bf16), (&narrow, Bf16), (&narrow, Bf16), (&wide, Bf16)]);
        let card: Vec<_> = host.iter().map(|x| gpu.tensor(x, Bf16)).collect();
        let mut rng = crate::rng::Rng::new(3);
        let choose = |_, _, query: usize, chosen: &mut Vec<u32>| {
            chosen.extend((0..(query / 64) as u32).filter(|&c| c == 0 || rng.uniform() < 0.2));
        };
        let list = Routes::from_choice(host[0].device(), (dims.b, dims.g, dims.t), 64, choose).unwrap();
        let list = list.to_host().unwrap();
        let mask = BlockMask::from_host(gpu.cuda(), &list).unwrap();
        let bias = gpu.tensor(&testing::normal(host[0].device(), &[list.len()], 5), F32);
        let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
        let (o, lse) = forward(dims, operands, Some(&mask), Some(&bias)).unwrap();
        let pass = Pass::listed("attention", dims, operands, Some(&mask), Some(&bias)).unwrap();
        assert!(pass.keys_are_wide());
        let delta = pass.delta(&o, &card[3]).unwrap();
        let run = |most| {
            let d = [(); 2].map(|()| gpu.cuda().alloc("test", F32, narrow.iter().product()).unwrap());
            pass.wide_keys([&card[3], &lse, &delta], [&d[0], &d[1]], most).map(|()| d)
        };
        gpu.same_bits(|| run(64).map(Vec::from));
        let one = run(dims.t).unwrap().map(|x| gpu.numbers(&x));
        for most in [1000, 450, 100, 37] {
            for (of_one, got) in one.iter().zip(run(most).unwrap().map(|x| gpu.numbers(&x))) {
                let most = of_one.iter().fold(0f64, |m, x| m.max(x.abs()));
                let far = of_one.iter().zip(&got).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                // 900 tokens of twelve heads, each addition rounded to 24 bits, in one order and in another
                assert!(far <= 10800.0 * most / f64::from(1 << 24), "{most} tokens a part: {far:e} of {most:e}");
            }
        }
    }
}
