//! Forward of lists of chunks of 64 at width 64, rows gathered by chunk (`gathered_forward.cu`), where few query heads share a kv head.

use super::pass::{Form, KEYS, Pass};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Source, Unit};
use crate::error::Result;

static FORWARD: Source = Source {
    name: "attention_gathered_forward",
    text: concat!(include_str!("wide.cu"), include_str!("wide_walk.cu"), include_str!("gathered_forward.cu")),
};

/// Chunks on their way at a time: keys and values are a tile of 64 rows of 128 bytes each.
const SLOTS: usize = 4;

/// How a block is cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Tokens of a warpgroup, 32 or 64.
    tokens: usize,
    /// Warpgroups that multiply, beside one that brings.
    groups: usize,
}

impl Cut {
    /// Where this is faster than a slab of 16 rows of neighbours a warp (the table of docs/log/cuda-attention.md), as far as shared memory holds it: 384
    /// bytes a row. With one or two query heads a kv head it is slower where neighbours attend the same chunks.
    fn of(group: usize) -> Option<Self> {
        match group {
            3 => Some(Cut { tokens: 64, groups: 2 }),
            4 => Some(Cut { tokens: 32, groups: 3 }),
            _ => None,
        }
    }
}

fn unit(form: Form, group: usize, cut: Cut) -> Unit {
    let numbers = [
        ("D", form.wide),
        ("HEAD", form.head),
        ("LISTED", 1),
        ("CHUNK", KEYS),
        ("GROUPS", cut.groups),
        ("GROUP", group),
        ("TOKENS", cut.tokens),
    ];
    Unit::new(&FORWARD, numbers.map(|(name, value)| (name, value.to_string())))
}

/// What is compiled here, at the width that needs no padding.
pub(super) fn units() -> Vec<Unit> {
    let form = Form { head: 64, wide: 64, chunk: Some(KEYS), span: false, power: 0 };
    (1..=16).filter_map(|group| Cut::of(group).map(|cut| unit(form, group, cut))).collect()
}

impl Pass<'_> {
    /// How forward goes here, if it does.
    pub(super) fn gathers_forward(&self) -> Option<Cut> {
        Cut::of(self.dims.group()).filter(|_| self.rows_may_be_gathered())
    }

    /// o in bf16 and every row's lse.
    pub(super) fn gathered_forward(&self, cut: Cut, o: &CudaBuffer, lse: &CudaBuffer) -> Result<()> {
        let (group, q, (k, v)) = (self.dims.group(), self.operands.q, self.maps()?);
        let first = [Arg::At(q.0, q.1), Arg::Map(&k), Arg::Map(&v), Arg::Buffer(o), Arg::Buffer(lse)];
        let sizes = [self.dims.t, self.dims.g, q.2, self.chunks()].map(Arg::int);
        let args = [&first[..], &self.lists(), &sizes, &[self.scale()]].concat();
        let grid = Grid {
            blocks: [self.dims.t.div_ceil(cut.groups * cut.tokens), self.dims.b * self.dims.g, 1],
            threads: 128 * (cut.groups as u32 + 1),
            ..Grid::default()
        };
        // queries in bf16 and outputs in f32, keys and values, the list of chunks
        let rows = cut.groups * cut.tokens * group;
        let shared = rows * (128 + 256) + SLOTS * 2 * KEYS * 128 + self.chunks().next_multiple_of(8) * 2;
        let kernel = q.0.device().kernel(&unit(self.form, group, cut), "gathered_forward")?;
        // SAFETY: the kernel's parameters in order, for extents that were compared with the buffers when the pass was made.
        unsafe { kernel.launch(grid.shared(shared), &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{error, over_uneven_lists};
    use crate::device::cuda::Kind;
    use crate::ops::attention::Dims;
    use crate::ops::cuda::testing::cuda;

    /// Last blocks with warpgroups that have no tokens, chunks that one warpgroup attends and the other does not, and batches of one to 192 rows.
    #[test]
    fn rows_gathered_by_chunk_are_those_of_slabs() {
        let Some(gpu) = cuda() else { return };
        for (h, g, t) in [(6, 2, 450), (6, 2, 430), (12, 3, 331)] {
            let dims = Dims { b: 2, t, h, g, d: 64 };
            over_uneven_lists(gpu, dims, |pass, _| {
                let cut = pass.gathers_forward().expect("few query heads share a kv head");
                let rows = |kind, each| gpu.cuda().alloc("attention", kind, 2 * t * h * each).unwrap();
                let run = |gathered: bool| {
                    let (o, lse) = (rows(Kind::Bf16, 64), rows(Kind::F32, 1));
                    if gathered {
                        pass.gathered_forward(cut, &o, &lse)?
                    } else {
                        pass.slabs_forward(&o, &lse)?
                    }
                    Ok([o, lse])
                };
                gpu.same_bits(|| run(true).map(Vec::from));
                let [here, there] = [true, false].map(|gathered| run(gathered).unwrap().map(|x| gpu.numbers(&x)));
                // weights and outputs are rounded to nine bits, both times, to the same ones but for what maxima lie between: 2^-9 four times. The
                // logarithm has neither: sums of 64 products and of up to t weights, rounded to 24 bits
                for (name, here, there, bound) in [
                    ("o", &here[0], &there[0], 4.0 / 512.0),
                    ("lse", &here[1], &there[1], (t + 64) as f64 / f64::from(1 << 24)),
                ] {
                    let far = error(here, there);
                    assert!(far <= bound, "{name}, {h} heads: {far:e} of the largest, at most {bound:e}");
                }
            });
        }
    }
}
