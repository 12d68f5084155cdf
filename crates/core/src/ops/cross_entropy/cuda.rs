//! The launches. The logits of [`ROWS`] tokens exist at a time and become their own gradient in place.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Operand, Source, Unit};
use crate::device::{Accumulate, Gemm};
use crate::error::{Result, ensure};
use crate::ops::cuda::{infinity, real, same, wide};
use crate::ops::reduce::cuda::sum_axis;

static SOURCE: Source = Source { name: "cross_entropy", text: include_str!("kernel.cu") };

/// Tokens whose logits exist at a time: 1 GB of bf16 at a vocabulary of 32768, and products large enough for every
/// multiprocessor.
const ROWS: usize = 16384;

fn unit(x: Kind) -> Unit {
    let r = wide(x);
    let names = [("X", x.source_name().into()), ("R", r.source_name().into()), ("INFINITY_OF_R", infinity(r).into())];
    Unit::new(&SOURCE, names)
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::Bf16, Kind::F32, Kind::F64].map(unit).into()
}

/// nll `[rows]` of rows of logits, `stride` apart; with a factor the logits become (softmax - onehot) times it.
///
/// # Errors
/// When the extents do not fit.
pub fn rows(
    logits: &CudaBuffer,
    (count, vocab, stride): (usize, usize, usize),
    targets: (&CudaBuffer, usize),
    nll: (&CudaBuffer, usize),
    factor: Option<f64>,
) -> Result<()> {
    let (op, kind) = ("cross_entropy", logits.kind());
    ensure!(count * stride <= logits.len() && vocab <= stride, op, "{count} rows of {stride} in {logits:?}");
    let kernel = logits.device().kernel(&unit(kind), "cross_entropy")?;
    let args = [
        Arg::Buffer(logits),
        Arg::At(targets.0, targets.1),
        Arg::At(nll.0, nll.1),
        Arg::int(vocab),
        Arg::Long(stride as i64),
        real(wide(kind), factor.unwrap_or(0.0)),
        Arg::Int(factor.is_some().into()),
    ];
    // SAFETY: the kernel's parameters in order; a block a row, whose target is below vocab (the caller checked on the host).
    unsafe { kernel.launch(Grid::line(count, 512), &args) }
}

/// The loss, summed nll times `factor` (one number), for `x [rows, c]` and `w [v, c]` of one kind and targets on the device.
/// With `dx [rows, c]` (x's kind, written) and `dw [v, c]` (f32 or f64, added to) the gradients for a loss's gradient of 1.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn linear_cross_entropy(
    x: &CudaBuffer,
    w: &CudaBuffer,
    targets: &CudaBuffer,
    width: usize,
    factor: f64,
    mut gradients: Option<(&mut CudaBuffer, &mut CudaBuffer)>,
) -> Result<CudaBuffer> {
    let (op, device, kind) = ("cross_entropy", x.device(), x.kind());
    same(op, &[x, w])?;
    let (count, vocab) = (x.len() / width, w.len() / width);
    ensure!(targets.len() == count, op, "{} targets for {count} rows", targets.len());
    let stride = vocab.next_multiple_of(64);
    let logits = device.alloc(op, kind, ROWS.min(count) * stride)?;
    let nll = device.alloc(op, wide(kind), count)?;
    for first in (0..count).step_by(ROWS) {
        let m = ROWS.min(count - first);
        let (x, w, z) =
            (Operand::rows(x, width).from(first * width), Operand::rows(w, width), Operand::rows(&logits, stride));
        device.gemm(Gemm::new(m, vocab, width).with(Accumulate::Overwrite), x, w.t(), z)?;
        rows(&logits, (m, vocab, stride), (targets, first), (&nll, first), gradients.is_some().then_some(factor))?;
        if let Some((dx, dw)) = &mut gradients {
            let (dx, dw) = (Operand::rows(dx, width).from(first * width), Operand::rows(dw, width));
            device.gemm(Gemm::new(m, width, vocab).with(Accumulate::Overwrite), z, w, dx)?;
            device.gemm(Gemm::new(vocab, width, m).with(Accumulate::Existing), z.t(), x, dw)?;
        }
    }
    let sum = sum_axis(&nll, (1, count, 1))?;
    crate::ops::elementwise::cuda::scale(&sum, factor)
}

#[cfg(test)]
mod tests {
    use super::super::{IGNORE, linear_cross_entropy};
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::ops::cuda::wide;
    use crate::tape::Tape;

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (rows, width, vocab) in [(1, 8, 16), (37, 24, 65), (300, 64, 1000)] {
            for kind in [Kind::Bf16, Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[rows, width], kind), (&[vocab, width], kind)]);
                let mut targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
                if rows > 1 {
                    targets[1] = IGNORE;
                }
                let tape = Tape::new();
                let [x, w] = [0, 1].map(|i| tape.leaf(inputs[i].clone()));
                let ids = crate::Ids::new(inputs[0].device(), &[rows], &targets).unwrap();
                let loss = linear_cross_entropy(&tape, &x, &w, &ids, rows as f64).unwrap();
                let grads = tape.backward(&loss).unwrap();
                let [gx, gw] = [0, 1].map(|i| device.tensor(&inputs[i], kind));
                let on = device.cuda().upload("targets", &targets).unwrap();
                let mut dx = device.cuda().alloc("dx", kind, rows * width).unwrap();
                let mut dw = device.cuda().zeros("dw", wide(kind), vocab * width).unwrap();
                let factor = 1.0 / rows as f64;
                let got = super::linear_cross_entropy(&gx, &gw, &on, width, factor, Some((&mut dx, &mut dw))).unwrap();
                // bf16: logits of size sqrt(width) are rounded, then their gradients
                let bound = match kind {
                    Kind::Bf16 => Bound::relative(4.0 * (width as f64).sqrt() / 256.0),
                    _ => Bound::of(kind, kind, width + vocab),
                };
                let name = format!("{rows} x {width} x {vocab} {kind:?}");
                compare(&name, &got, &loss.value, bound);
                compare(&name, &dx, grads.get(&x).unwrap(), bound);
                compare(&name, &dw, grads.get(&w).unwrap(), bound);
            }
        }
    }
}
