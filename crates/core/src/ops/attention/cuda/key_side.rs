//! Backward on `mma.sync`, key side (`keys.cu`): dk and dv of 64 keys a block, and where keys are few, of shares of the tokens.

use super::Operands;
use super::pass::{Cut, Form, KEYS, Pass};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Source, Unit};
use crate::error::Result;
use crate::ops::attention::{Dims, Span};
use crate::ops::reduce::cuda::sum_axis;

static KEY_SIDE: Source =
    Source { name: "attention_keys", text: concat!(include_str!("tiles.cu"), include_str!("keys.cu")) };

/// Blocks of the key side that an H100 works on at a time: two on each of 132 multiprocessors. A number of its own, so that the order of sums is
/// that of the shape.
const FULL_CARD: usize = 264;
/// Rows of a share of the tokens at least: what starting a block takes is a tenth of their time.
const LEAST_ROWS: usize = 2048;

/// Four warps of 16 keys.
pub(super) fn unit(form: Form) -> Unit {
    let scores = match (form.wide, form.chunk) {
        (128, Some(64) | None) => 32,
        (128, _) => 16,
        (64, _) => 32,
        _ => 64,
    };
    form.unit(&KEY_SIDE, &Cut { warps: 4, slabs: 1, scores })
}

impl Pass<'_> {
    /// Blocks that share the rows of the same keys, with [`LEAST_ROWS`] each at least: where all keys are seen by as many tokens, as many as fill a
    /// card once; where the last are seen by few, eight times that, because many shares are empty and what is left does not end together.
    pub(super) fn key_parts(&self) -> usize {
        let Dims { b, t, g, .. } = self.dims;
        let (tokens, times) = match self.span {
            Some(Span::Sliding(width)) => (t.min(width.saturating_add(KEYS)), 1),
            None | Some(Span::Causal | Span::Windows { .. }) => (t, 8),
        };
        let most = (tokens * self.dims.group()).div_ceil(LEAST_ROWS);
        (times * FULL_CARD / (self.keys.div_ceil(KEYS) * b * g).max(1)).clamp(1, most.max(1))
    }

    /// dk and dv from the gradient of the output, lse (or the thresholds) and delta (or the means) of every row, added up in `parts` shares.
    pub(super) fn key_side(&self, inputs: [&CudaBuffer; 3], parts: usize) -> Result<[CudaBuffer; 2]> {
        let Dims { b, t, g, d, .. } = self.dims;
        let Operands { q, k, v } = self.operands;
        let len = b * self.keys * g * d;
        let shares = [self.floats(parts * len)?, self.floats(parts * len)?];
        let operands = [q, k, v].map(|(buffer, first, _)| Arg::At(buffer, first));
        let sizes = [t, g, self.dims.group(), q.2, k.2, self.chunks()].map(Arg::int);
        let tail = self.tail();
        let args = [
            &operands[..],
            &inputs.map(Arg::Buffer),
            &shares.each_ref().map(Arg::Buffer),
            &self.lists(),
            &sizes,
            &tail[..1],
            &[Arg::int(self.keys)],
            &tail[1..],
        ]
        .concat();
        let grid = Grid { blocks: [self.keys.div_ceil(KEYS), b * g, parts], ..Grid::line(1, 128) };
        // keys, values, and two batches of rows of q and of the output's gradient
        let shared = 6 * KEYS * self.form.wide.div_ceil(64) * 128;
        let kernel = q.0.device().kernel(&unit(self.form), "attention_keys")?;
        // SAFETY: as in `query_side`.
        unsafe { kernel.launch(grid.shared(shared), &args)? };
        if parts == 1 {
            return Ok(shares);
        }
        let [k, v] = shares.map(|x| sum_axis(&x, (1, parts, len)));
        Ok([k?, v?])
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::differ_by_rounding;
    use super::*;
    use crate::device::cuda::Kind::{Bf16, F32};
    use crate::ops::cuda::testing::{cuda, tensors};

    /// Shares that are whole, ragged and empty, of windows and of a sliding span, whose first token is not 0.
    #[test]
    fn shares_of_the_tokens_change_the_rounding_of_sums_alone() {
        let Some(gpu) = cuda() else { return };
        let dims = Dims { b: 2, t: 700, h: 8, g: 2, d: 64 };
        for span in [Span::Windows { length: 8, stride: 4 }, Span::Sliding(200)] {
            let (wide, narrow) = ([dims.b, dims.t, dims.h, dims.d], [dims.b, span.keys(dims.t), dims.g, dims.d]);
            let host = tensors(&[(&wide, Bf16), (&narrow, Bf16), (&narrow, Bf16), (&wide, Bf16)]);
            let card: Vec<_> = host.iter().map(|x| gpu.tensor(x, Bf16)).collect();
            let operands = Operands::separate(dims, &card[0], &card[1], &card[2]);
            let pass = Pass::span("span_attention", dims, operands, span, 1.0).unwrap();
            let lse = gpu.cuda().alloc("test", F32, dims.b * dims.t * dims.h).unwrap();
            let o = pass.forward(&lse).unwrap();
            let delta = pass.delta(&o, &card[3]).unwrap();
            let run = |parts| pass.key_side([&card[3], &lse, &delta], parts);
            gpu.same_bits(|| run(5).map(Vec::from));
            let one = run(1).unwrap().map(|x| gpu.numbers(&x));
            for parts in [2, 5, 11, 16] {
                for (of_one, got) in one.iter().zip(run(parts).unwrap().map(|x| gpu.numbers(&x))) {
                    // 2800 numbers, each addition rounded to 24 bits, in one order and in another
                    differ_by_rounding(&format!("{span:?} in {parts}"), of_one, &got, 2800.0);
                }
            }
        }
    }
}
