//! The layer as three products with an elementwise kernel between them.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Operand, Source, Unit};
use crate::device::{Accumulate, Gemm, NoResidual};
use crate::error::Result;
use crate::ops::cuda::{alike, wide};
use crate::ops::matmul::cuda::{product, product_into};

static SOURCE: Source = Source { name: "swiglu", text: include_str!("kernel.cu") };

fn unit(x: Kind) -> Unit {
    Unit::new(&SOURCE, [("X", x.source_name().into()), ("R", wide(x).source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::Bf16, Kind::F32, Kind::F64].map(unit).into()
}

/// h = silu(gate) up.
///
/// # Errors
/// When kinds or lengths differ.
pub fn activate(gate: &CudaBuffer, up: &CudaBuffer) -> Result<CudaBuffer> {
    let (op, device) = ("swiglu", gate.device());
    alike(op, &[gate, up])?;
    let h = device.alloc(op, gate.kind(), gate.len())?;
    let kernel = device.kernel(&unit(gate.kind()), "swiglu_forward")?;
    let args = [Arg::Buffer(gate), Arg::Buffer(up), Arg::Buffer(&h), Arg::Long(gate.len() as i64)];
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(gate.len(), 256), &args)? };
    Ok(h)
}

/// The gradients of gate and up, and h again.
///
/// # Errors
/// When kinds or lengths differ.
pub fn activate_backward(dh: &CudaBuffer, gate: &CudaBuffer, up: &CudaBuffer) -> Result<[CudaBuffer; 3]> {
    let (op, device, n) = ("swiglu", gate.device(), gate.len());
    alike(op, &[dh, gate, up])?;
    let fresh = || device.alloc(op, gate.kind(), n);
    let out = [fresh()?, fresh()?, fresh()?];
    let kernel = device.kernel(&unit(gate.kind()), "swiglu_backward")?;
    let [dgate, dup, h] = &out;
    let args = [&[dh, gate, up, dgate, dup, h].map(Arg::Buffer)[..], &[Arg::Long(n as i64)]].concat();
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(n, 256), &args)? };
    Ok(out)
}

/// The layer on `x [rows, c]` with the weights gate and up `[f, c]` and down `[c, f]`, of x's kind, on top of `residual` where
/// there is one: `[rows, c]` in full, and gate and up `[rows, f]` of x's kind, which backward needs again.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn forward(
    x: &CudaBuffer,
    [gate, up, down]: [&CudaBuffer; 3],
    (rows, c, f): (usize, usize, usize),
    residual: Option<&CudaBuffer>,
) -> Result<(CudaBuffer, CudaBuffer, CudaBuffer)> {
    let (op, device, kind) = ("swiglu", x.device(), x.kind());
    let hidden = |w| -> Result<CudaBuffer> {
        let out = device.alloc(op, kind, rows * f)?;
        let (x, w) = (Operand::rows(x, c), Operand::rows(w, c).t());
        device.gemm(Gemm::new(rows, f, c).with(Accumulate::Overwrite), x, w, Operand::rows(&out, f))?;
        Ok(out)
    };
    let (gate, up) = (hidden(gate)?, hidden(up)?);
    let h = activate(&gate, &up)?;
    let size = Gemm::new(rows, c, f).with(residual.map_or(Accumulate::Overwrite, Accumulate::Residual));
    let y = product(op, size, Operand::rows(&h, f), Operand::rows(down, f).t())?;
    Ok((y, gate, up))
}

/// Gradients: dx `[rows, c]` in full, and those of the three weights, written or added to.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &CudaBuffer,
    x: &CudaBuffer,
    [gate, up, down]: [&CudaBuffer; 3],
    [kept_gate, kept_up]: [&CudaBuffer; 2],
    (rows, c, f): (usize, usize, usize),
    [dgates, dups, ddowns]: [(&mut CudaBuffer, Accumulate<NoResidual>); 3],
) -> Result<CudaBuffer> {
    let (op, device, of) = ("swiglu", x.device(), Operand::rows);
    let dh = device.alloc(op, x.kind(), rows * f)?;
    device.gemm(Gemm::new(rows, f, c).with(Accumulate::Overwrite), of(dy, c), of(down, f), of(&dh, f))?;
    let [dgate, dup, h] = activate_backward(&dh, kept_gate, kept_up)?;
    product_into(ddowns.0, Gemm::new(c, f, rows).with(ddowns.1), of(dy, c).t(), of(&h, f))?;
    product_into(dgates.0, Gemm::new(f, c, rows).with(dgates.1), of(&dgate, f).t(), of(x, c))?;
    product_into(dups.0, Gemm::new(f, c, rows).with(dups.1), of(&dup, f).t(), of(x, c))?;
    let dx = product(op, Gemm::new(rows, c, f).with(Accumulate::Overwrite), of(&dgate, f), of(gate, c))?;
    device.gemm(Gemm::new(rows, c, f).with(Accumulate::Existing), of(&dup, f), of(up, c), of(&dx, c))?;
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
        for (rows, c, f) in [(8, 8, 8), (37, 24, 40), (130, 64, 176)] {
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
                let weights = [&on[1], &on[2], &on[3]];
                let (y, gates, ups) = super::forward(&on[0], weights, (rows, c, f), Some(&on[4])).unwrap();
                // bf16: hidden activations are rounded in both directions, each once
                let bound = if kind == Kind::Bf16 { Bound::relative(4.0 / 256.0) } else { Bound::of(kind, to, c + f) };
                let name = format!("{rows} x {c} x {f} {kind:?}");
                compare(&name, &y, &want, bound);
                // two are written, over NaN; one is added to
                let fresh = |n| device.cuda().alloc("swiglu", to, n).unwrap();
                let mut dw = [fresh(f * c), device.cuda().zeros("swiglu", to, f * c).unwrap(), fresh(c * f)];
                let [dg, du, dd] = dw.each_mut();
                let into = [(dg, Accumulate::Overwrite), (du, Accumulate::Existing), (dd, Accumulate::Overwrite)];
                let kept = [&gates, &ups];
                let dx = super::backward(&on[5], &on[0], weights, kept, (rows, c, f), into).unwrap();
                for (got, want) in [&dx, &dw[0], &dw[1], &dw[2]].into_iter().zip(&grads) {
                    compare(&name, got, want, bound);
                }
            }
        }
    }
}
