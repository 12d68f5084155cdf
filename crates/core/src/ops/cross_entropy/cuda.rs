//! The launches. The logits of [`ROWS`] tokens exist at a time, in full; their gradient beside them is an operand of two products
//! and rounded like one.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Operand, Source, Unit};
use crate::device::{Accumulate, Gemm};
use crate::error::{Result, ensure};
use crate::ops::cuda::{infinity, real, same, wide};
use crate::ops::reduce::cuda::sum_axis;

static SOURCE: Source = Source { name: "cross_entropy", text: include_str!("kernel.cu") };

/// Tokens whose logits exist at a time: 800 MB with their gradient at a vocabulary of 32768, and products large enough for every
/// multiprocessor.
const ROWS: usize = 4096;

/// Numbers of 4096 logits that a block keeps of a row in registers.
const PIECES: [usize; 3] = [2, 4, 8];

/// How many for rows of that length; 0 where they are read several times: in f64, when they are too long, or so short that a block of 1024
/// threads would have little to do.
fn pieces(x: Kind, vocab: usize) -> usize {
    let fits = |&pieces: &usize| x != Kind::F64 && (2048..=4096 * pieces).contains(&vocab);
    PIECES.into_iter().find(fits).unwrap_or(0)
}

/// `x` is what dlogits are.
fn unit(x: Kind, pieces: usize) -> Unit {
    let r = wide(x);
    let [x, r_name] = [x, r].map(|kind| kind.source_name().to_string());
    Unit::new(&SOURCE, [("X", x), ("R", r_name), ("INFINITY_OF_R", infinity(r).into()), ("PIECES", pieces.to_string())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    let kept = PIECES.into_iter().flat_map(|n| [Kind::Bf16, Kind::F32].map(|x| unit(x, n)));
    [Kind::Bf16, Kind::F32, Kind::F64].map(|x| unit(x, 0)).into_iter().chain(kept).collect()
}

/// dx `[rows, c]` and dw `[v, c]`.
pub type Gradients = (CudaBuffer, CudaBuffer);

/// `-log softmax(x w^T)[target]` of every row in full, for `x [rows, c]` and `w [v, c]` of one kind and targets on the device, below
/// v or IGNORE; with a factor also dx and dw, in full, of the factor times their sum.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn rows_of(
    op: &'static str,
    (x, w): (&CudaBuffer, &CudaBuffer),
    targets: &CudaBuffer,
    (count, width, vocab): (usize, usize, usize),
    factor: Option<f64>,
) -> Result<(CudaBuffer, Option<Gradients>)> {
    let (device, kind) = (x.device(), x.kind());
    same(op, &[x, w])?;
    ensure!(targets.len() == count && w.len() == vocab * width, op, "{targets:?} for {count} rows, {w:?}");
    let (full, stride) = (wide(kind), vocab.next_multiple_of(64));
    let logits = device.alloc(op, full, ROWS.min(count) * stride)?;
    let dlogits = factor.map(|_| device.alloc(op, kind, logits.len())).transpose()?;
    let nll = device.alloc(op, full, count)?;
    let fresh = |_| Ok((device.alloc(op, full, count * width)?, device.zeros(op, full, vocab * width)?));
    let gradients: Option<Gradients> = factor.map(fresh).transpose()?;
    let pieces = pieces(kind, vocab);
    let kernel = device.kernel(&unit(kind, pieces), "cross_entropy")?;
    for first in (0..count).step_by(ROWS) {
        let m = ROWS.min(count - first);
        let (x, w) = (Operand::rows(x, width).from(first * width), Operand::rows(w, width));
        device.gemm(
            Gemm::new(m, vocab, width).with(Accumulate::Overwrite),
            x,
            w.t(),
            Operand::rows(&logits, stride),
        )?;
        let args = [
            Arg::Buffer(&logits),
            dlogits.as_ref().map_or(Arg::Null, Arg::Buffer),
            Arg::At(targets, first),
            Arg::At(&nll, first),
            Arg::int(m),
            Arg::int(vocab),
            Arg::Long(stride as i64),
            real(full, factor.unwrap_or(0.0)),
        ];
        let grid = match pieces {
            0 => Grid::line(m, 512),
            _ => Grid::line(m.min(device.properties().multiprocessors as usize), 1024).shared(vocab.div_ceil(4) * 16),
        };
        // SAFETY: the kernel's parameters in order; a block a row, or every so manieth row, whose target is below vocab (the caller checked on
        // the host).
        unsafe { kernel.launch(grid, &args)? };
        if let (Some((dx, dw)), Some(dlogits)) = (&gradients, &dlogits) {
            let (dx, dw) = (Operand::rows(dx, width).from(first * width), Operand::rows(dw, width));
            let z = Operand::rows(dlogits, stride);
            device.gemm(Gemm::new(m, width, vocab).with(Accumulate::Overwrite), z, w, dx)?;
            device.gemm(Gemm::new(vocab, width, m).with(Accumulate::Existing), z.t(), x, dw)?;
        }
    }
    Ok((nll, gradients))
}

/// The sum of `nll` times `factor`: one number.
///
/// # Errors
/// When memory runs out.
pub fn sum(nll: &CudaBuffer, factor: f64) -> Result<CudaBuffer> {
    crate::ops::elementwise::cuda::scale(&sum_axis(nll, (1, nll.len(), 1))?, factor)
}

#[cfg(test)]
mod tests {
    use super::super::{IGNORE, linear_cross_entropy};
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (rows, width, vocab) in
            [(1, 8, 16), (37, 24, 65), (300, 64, 1000), (300, 16, 2051), (140, 8, 12000), (7, 8, 32765)]
        {
            for kind in [Kind::Bf16, Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[rows, width], kind), (&[vocab, width], kind)]);
                let mut targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
                if rows > 1 {
                    targets[1] = IGNORE;
                }
                let ids = crate::Ids::new(inputs[0].device(), &[rows], &targets).unwrap();
                let (want, [dx_want, dw_want]) =
                    reference(&inputs, |tape, [x, w]| linear_cross_entropy(tape, x, w, &ids, rows as f64));
                let [gx, gw] = [0, 1].map(|i| device.tensor(&inputs[i], kind));
                let on = device.cuda().upload("targets", &targets).unwrap();
                let (factor, sizes) = (1.0 / rows as f64, (rows, width, vocab));
                let (nll, d) = super::rows_of("test", (&gx, &gw), &on, sizes, Some(factor)).unwrap();
                let (got, (dx, dw)) = (super::sum(&nll, factor).unwrap(), d.unwrap());
                // bf16: the gradients of logits of size sqrt(width) are rounded
                let bound = match kind {
                    Kind::Bf16 => Bound::relative(4.0 * (width as f64).sqrt() / 256.0),
                    _ => Bound::of(kind, kind, width + vocab),
                };
                let name = format!("{rows} x {width} x {vocab} {kind:?}");
                compare(&name, &got, &want, bound);
                compare(&name, &dx, &dx_want, bound);
                compare(&name, &dw, &dw_want, bound);
            }
        }
    }
}
