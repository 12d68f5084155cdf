//! The layer as three products with an elementwise kernel between them.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Operand, Source, Unit};
use crate::device::{Accumulate, Gemm};
use crate::error::Result;
use crate::ops::cuda::{same, wide};

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
    same(op, &[gate, up])?;
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
    same(op, &[dh, gate, up])?;
    let fresh = || device.alloc(op, gate.kind(), n);
    let out = [fresh()?, fresh()?, fresh()?];
    let kernel = device.kernel(&unit(gate.kind()), "swiglu_backward")?;
    let [dgate, dup, h] = &out;
    let args = [&[dh, gate, up, dgate, dup, h].map(Arg::Buffer)[..], &[Arg::Long(n as i64)]].concat();
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(n, 256), &args)? };
    Ok(out)
}

/// What backward needs again.
#[derive(Debug)]
pub struct Kept {
    gate: CudaBuffer,
    up: CudaBuffer,
}

/// The layer on `x [rows, c]` with the weights gate and up `[f, c]` and down `[c, f]`, of x's kind, on top of `residual` where
/// there is one: `[rows, c]` of kind `to`.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn forward(
    x: &CudaBuffer,
    [gate, up, down]: [&CudaBuffer; 3],
    (rows, c, f): (usize, usize, usize),
    residual: Option<&CudaBuffer>,
    to: Kind,
) -> Result<(CudaBuffer, Kept)> {
    let (op, device, kind) = ("swiglu", x.device(), x.kind());
    let hidden = |w| -> Result<CudaBuffer> {
        let out = device.alloc(op, kind, rows * f)?;
        let gemm = Gemm::new(rows, f, c).with(Accumulate::Overwrite);
        device.gemm(gemm, Operand::rows(x, c), Operand::rows(w, c).t(), Operand::rows(&out, f))?;
        Ok(out)
    };
    let kept = Kept { gate: hidden(gate)?, up: hidden(up)? };
    let (h, y) = (activate(&kept.gate, &kept.up)?, device.alloc(op, to, rows * c)?);
    let accumulate = residual.map_or(Accumulate::Overwrite, |r| Accumulate::Residual(Operand::rows(r, c)));
    device.gemm(
        Gemm::new(rows, c, f).with(accumulate),
        Operand::rows(&h, f),
        Operand::rows(down, f).t(),
        Operand::rows(&y, c),
    )?;
    Ok((y, kept))
}

/// Gradients: dx `[rows, c]` of kind `to` (written), and those of the three weights, added to `dweights`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &CudaBuffer,
    x: &CudaBuffer,
    [gate, up, down]: [&CudaBuffer; 3],
    kept: &Kept,
    (rows, c, f): (usize, usize, usize),
    dweights: [&mut CudaBuffer; 3],
    to: Kind,
) -> Result<CudaBuffer> {
    let (op, device, kind) = ("swiglu", x.device(), x.kind());
    let [dgate_w, dup_w, ddown_w] = dweights;
    let (dh, dx) = (device.alloc(op, kind, rows * f)?, device.alloc(op, to, rows * c)?);
    let rows_of = Operand::rows;
    device.gemm(
        Gemm::new(rows, f, c).with(Accumulate::Overwrite),
        rows_of(dy, c),
        rows_of(down, f),
        rows_of(&dh, f),
    )?;
    let [dgate, dup, h] = activate_backward(&dh, &kept.gate, &kept.up)?;
    let adding = |m, n, k| Gemm::new(m, n, k).with(Accumulate::Existing);
    device.gemm(adding(c, f, rows), rows_of(dy, c).t(), rows_of(&h, f), rows_of(ddown_w, f))?;
    device.gemm(adding(f, c, rows), rows_of(&dgate, f).t(), rows_of(x, c), rows_of(dgate_w, c))?;
    device.gemm(adding(f, c, rows), rows_of(&dup, f).t(), rows_of(x, c), rows_of(dup_w, c))?;
    device.gemm(
        Gemm::new(rows, c, f).with(Accumulate::Overwrite),
        rows_of(&dgate, f),
        rows_of(gate, c),
        rows_of(&dx, c),
    )?;
    device.gemm(adding(rows, c, f), rows_of(&dup, f), rows_of(up, c), rows_of(&dx, c))?;
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::super::swiglu;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::tape::Tape;

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
                let tape = Tape::new();
                let vars: Vec<_> = inputs[..5].iter().map(|x| tape.leaf(x.clone())).collect();
                let out = swiglu(&tape, &vars[0], [&vars[1], &vars[2], &vars[3]], Some(&vars[4])).unwrap();
                let grads = tape.backward_from(&out, inputs[5].clone()).unwrap();
                let on: Vec<_> = inputs.iter().zip(&shapes).map(|(x, s)| device.tensor(x, s.1)).collect();
                let weights = [&on[1], &on[2], &on[3]];
                let (y, kept) = super::forward(&on[0], weights, (rows, c, f), Some(&on[4]), to).unwrap();
                // bf16: hidden activations are rounded in both directions, each once
                let bound = if kind == Kind::Bf16 { Bound::relative(4.0 / 256.0) } else { Bound::of(kind, to, c + f) };
                let name = format!("{rows} x {c} x {f} {kind:?}");
                compare(&name, &y, &out.value, bound);
                let zeros = |n| device.cuda().zeros("swiglu", to, n).unwrap();
                let mut dw = [zeros(f * c), zeros(f * c), zeros(c * f)];
                let dx = super::backward(&on[5], &on[0], weights, &kept, (rows, c, f), dw.each_mut(), to).unwrap();
                for (got, var) in [&dx, &dw[0], &dw[1], &dw[2]].into_iter().zip(&vars) {
                    compare(&name, got, grads.get(var).unwrap(), bound);
                }
            }
        }
    }
}
