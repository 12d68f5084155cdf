//! The launches of the kernels on `wgmma`, and where they are faster than those on `mma.sync` (docs/log/cuda-attention.md): dense attention, and
//! of lists of chunks of 64 the key side at width 128, and the query side's backward there if a warpgroup's 64 rows are few tokens.

use super::pass::{Form, KEYS, Pass};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Source, Unit};
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

    pub(super) fn wide_keys(&self, inputs: [&CudaBuffer; 3], outputs: [&CudaBuffer; 2]) -> Result<()> {
        let (q, k, v) = (self.operands.q, self.operands.k, self.operands.v);
        let operands = [q, k, v].map(|(buffer, first, _)| Arg::At(buffer, first));
        let sizes = [self.dims.t, self.dims.g, self.dims.group(), q.2, k.2, self.chunks()].map(Arg::int);
        let (inputs, outputs) = (inputs.map(Arg::Buffer), outputs.map(Arg::Buffer));
        let args = [&operands[..], &inputs, &outputs, &self.lists(), &sizes, &[self.scale()]].concat();
        let lists = if self.form.chunk.is_some() { 2 * (self.dims.t.div_ceil(64) + 1) * 4 } else { 0 };
        let blocks = [self.keys.div_ceil(2 * ROWS_EACH), self.dims.b * self.dims.g, 1];
        let grid = Grid { blocks, threads: threads(groups(&KEY_SIDE, self.form)), ..Grid::default() };
        let kernel = q.0.device().kernel(&unit(&KEY_SIDE, self.form), "wide_keys")?;
        // SAFETY: as above.
        unsafe { kernel.launch(grid.shared((4 + SLOTS) * self.tile() + lists), &args) }
    }
}
