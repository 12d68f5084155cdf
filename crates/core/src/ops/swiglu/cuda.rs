//! The layer as two products with an elementwise kernel between them: gate and up come of one product with both weights, one below the
//! other, so that the input is read once and its gradient is one product.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Operand, Source, Unit};
use crate::device::{Accumulate, Gemm, NoResidual};
use crate::error::{Result, ensure};
use crate::ops::cuda::elementwise::join;
use crate::ops::cuda::{same, unit_at_once};
use crate::ops::matmul::cuda::{product, product_into};

static SOURCE: Source = Source { name: "swiglu", text: include_str!("kernel.cu") };

/// Rows on the second axis of a grid at most; blocks take several where there are more.
const GRID_ROWS: usize = 65535;

/// Elements that a thread takes in one access: 16 bytes of bf16 where rows are whole pieces of that.
fn at_once(x: Kind, f: usize) -> usize {
    if x == Kind::Bf16 && f.is_multiple_of(8) { 8 } else { 1 }
}

fn unit(x: Kind, at_once: usize) -> Unit {
    unit_at_once(&SOURCE, x, at_once)
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [(Kind::Bf16, 8), (Kind::Bf16, 1), (Kind::F32, 1), (Kind::F64, 1)].map(|(x, n)| unit(x, n)).into()
}

/// Runs a kernel over the rows of `both [rows, 2 f]`.
fn over_rows(name: &'static str, both: &CudaBuffer, buffers: &[&CudaBuffer], f: usize) -> Result<()> {
    let (op, device, kind) = ("swiglu", both.device(), both.kind());
    same(op, buffers)?;
    ensure!(f > 0 && both.len().is_multiple_of(2 * f), op, "{both:?} in rows of twice {f}");
    let (rows, step) = (both.len() / (2 * f), at_once(kind, f));
    let kernel = device.kernel(&unit(kind, step), name)?;
    let buffers: Vec<Arg> = buffers.iter().map(|&b| Arg::Buffer(b)).collect();
    let blocks = [(f / step).div_ceil(256), rows.min(GRID_ROWS), 1];
    let sizes = [Arg::int(rows), Arg::int(f / step)];
    // SAFETY: the kernel's parameters in order; a thread `step` elements of f of a row at a time.
    unsafe { kernel.launch(Grid { blocks, ..Grid::line(1, 256) }, &[&buffers[..], &sizes].concat()) }
}

/// h = silu(gate) up `[rows, f]`, of gate and up side by side, `[rows, 2 f]`.
///
/// # Errors
/// When the extents do not fit, or memory runs out.
pub fn activate(both: &CudaBuffer, f: usize) -> Result<CudaBuffer> {
    let h = both.device().alloc("swiglu", both.kind(), both.len() / 2)?;
    over_rows("swiglu_forward", both, &[both, &h], f)?;
    Ok(h)
}

/// The gradients of gate and up, side by side, and h again.
///
/// # Errors
/// When kinds or lengths differ.
pub fn activate_backward(dh: &CudaBuffer, both: &CudaBuffer, f: usize) -> Result<[CudaBuffer; 2]> {
    let (op, device) = ("swiglu", both.device());
    ensure!(dh.len() * 2 == both.len(), op, "{dh:?} beside {both:?}");
    let (dboth, h) = (device.alloc(op, both.kind(), both.len())?, device.alloc(op, both.kind(), dh.len())?);
    over_rows("swiglu_backward", both, &[dh, both, &dboth, &h], f)?;
    Ok([dboth, h])
}

fn of(buffer: &CudaBuffer, width: usize) -> Operand<'_> {
    Operand::rows(buffer, width)
}

/// What [`forward`] keeps for backward, of x's kind.
pub struct Kept {
    /// Gate and up side by side, `[rows, 2 f]`.
    pub both: CudaBuffer,
    /// Their weights, one below the other, `[2 f, c]`.
    pub weights: CudaBuffer,
}

/// The layer on `x [rows, c]` with the weights gate and up `[f, c]` in full and down `[c, f]` of x's kind, on top of `residual` where
/// there is one: `[rows, c]` in full.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn forward(
    x: &CudaBuffer,
    [gate, up, down]: [&CudaBuffer; 3],
    (rows, c, f): (usize, usize, usize),
    residual: Option<&CudaBuffer>,
) -> Result<(CudaBuffer, Kept)> {
    let op = "swiglu";
    let weights = join(op, &[gate, up], x.kind())?;
    let both = x.device().alloc(op, x.kind(), rows * 2 * f)?;
    let size = Gemm::new(rows, 2 * f, c).with(Accumulate::Overwrite);
    x.device().gemm(size, of(x, c), of(&weights, c).t(), of(&both, 2 * f))?;
    let h = activate(&both, f)?;
    let size = Gemm::new(rows, c, f).with(residual.map_or(Accumulate::Overwrite, Accumulate::Residual));
    let y = product(op, size, of(&h, f), of(down, f).t())?;
    Ok((y, Kept { both, weights }))
}

/// Gradients: dx `[rows, c]` of x's kind, and those of the three weights, written or added to. `both` and `weights` are [`Kept`].
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &CudaBuffer,
    x: &CudaBuffer,
    [both, weights, down]: [&CudaBuffer; 3],
    (rows, c, f): (usize, usize, usize),
    [dgates, dups, ddowns]: [(&mut CudaBuffer, Accumulate<NoResidual>); 3],
) -> Result<CudaBuffer> {
    let (op, device) = ("swiglu", x.device());
    let dh = device.alloc(op, x.kind(), rows * f)?;
    device.gemm(Gemm::new(rows, f, c).with(Accumulate::Overwrite), of(dy, c), of(down, f), of(&dh, f))?;
    let [dboth, h] = activate_backward(&dh, both, f)?;
    drop(dh);
    product_into(ddowns.0, Gemm::new(c, f, rows).with(ddowns.1), of(dy, c).t(), of(&h, f))?;
    drop(h);
    product_into(dgates.0, Gemm::new(f, c, rows).with(dgates.1), of(&dboth, 2 * f).t(), of(x, c))?;
    product_into(dups.0, Gemm::new(f, c, rows).with(dups.1), of(&dboth, 2 * f).from(f).t(), of(x, c))?;
    let dx = device.alloc(op, x.kind(), rows * c)?;
    device.gemm(
        Gemm::new(rows, c, 2 * f).with(Accumulate::Overwrite),
        of(&dboth, 2 * f),
        of(weights, c),
        of(&dx, c),
    )?;
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::super::swiglu;
    use crate::device::Accumulate;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (rows, c, f) in [(8, 8, 8), (37, 24, 40), (130, 64, 176), (9, 8, 12)] {
            for (kind, to) in [(Kind::F64, Kind::F64), (Kind::F32, Kind::F32), (Kind::Bf16, Kind::F32)] {
                let shapes: [(&[usize], Kind); 6] = [
                    (&[rows, c], kind),
                    (&[f, c], kind),
                    (&[f, c], kind),
                    (&[c, f], kind),
                    (&[rows, c], to),
                    (&[rows, c], kind),
                ];
                let inputs = tensors(&shapes);
                let (want, grads) = reference(&inputs, |tape, [x, gate, up, down, residual]| {
                    swiglu(tape, x, [gate, up, down], Some(residual))
                });
                let on: Vec<_> = inputs.iter().zip(&shapes).map(|(x, s)| device.tensor(x, s.1)).collect();
                let full = [1, 2].map(|i| device.tensor(&inputs[i], to));
                let (y, kept) =
                    super::forward(&on[0], [&full[0], &full[1], &on[3]], (rows, c, f), Some(&on[4])).unwrap();
                // bf16: hidden activations are rounded in both directions, each once
                let bound = if kind == Kind::Bf16 { Bound::relative(4.0 / 256.0) } else { Bound::of(kind, to, c + f) };
                let name = format!("{rows} x {c} x {f} {kind:?}");
                compare(&name, &y, &want, bound);
                // two are written, over NaN; one is added to
                let fresh = |n| device.cuda().alloc("swiglu", to, n).unwrap();
                let mut dw = [fresh(f * c), device.cuda().zeros("swiglu", to, f * c).unwrap(), fresh(c * f)];
                let [dg, du, dd] = dw.each_mut();
                let into = [(dg, Accumulate::Overwrite), (du, Accumulate::Existing), (dd, Accumulate::Overwrite)];
                let kept = [&kept.both, &kept.weights, &on[3]];
                let dx = super::backward(&on[5], &on[0], kept, (rows, c, f), into).unwrap();
                for (got, want) in [&dx, &dw[0], &dw[1], &dw[2]].into_iter().zip(&grads) {
                    compare(&name, got, want, bound);
                }
            }
        }
    }
}
