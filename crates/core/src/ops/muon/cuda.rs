//! The launches. The products between them are those of `ops::matmul`.

use super::{Muon, SMALLEST_NORM};
use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{alike, real};

static SOURCE: Source = Source { name: "muon", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Refuses what is not one f64.
fn scalar(x: &CudaBuffer) -> Result<()> {
    ensure!((x.kind(), x.len()) == (Kind::F64, 1), "muon", "{x:?} is no f64 scalar");
    Ok(())
}

/// Moves the momentum and gives what is made orthogonal: zeros, and the momentum as it was, where the scale is not finite.
///
/// # Errors
/// When kinds or lengths differ, or memory runs out.
pub fn nesterov(b: f64, m: &mut CudaBuffer, g: &CudaBuffer, scale: &CudaBuffer) -> Result<CudaBuffer> {
    alike("muon", &[g, m])?;
    scalar(scale)?;
    let (kind, device) = (g.kind(), g.device());
    let x = device.alloc("muon", kind, g.len())?;
    let buffers = [g, &*m, &x, scale].map(Arg::Buffer);
    let numbers = [Arg::Long(g.len() as i64), real(kind, b), real(kind, 1.0 - b)];
    let kernel = device.kernel(&unit(kind), "nesterov")?;
    // SAFETY: the kernel's parameters in order; a thread an element of buffers of one length.
    unsafe { kernel.launch(Grid::over(g.len(), 256), &[&buffers[..], &numbers].concat())? };
    Ok(x)
}

/// Divides by the norm.
///
/// # Errors
/// When the norm is no f64 scalar.
pub fn divide(x: &mut CudaBuffer, norm: &CudaBuffer) -> Result<()> {
    scalar(norm)?;
    let kernel = x.device().kernel(&unit(x.kind()), "divide")?;
    let args = [Arg::Buffer(x), Arg::Buffer(norm), Arg::Long(x.len() as i64), Arg::F64(SMALLEST_NORM)];
    // SAFETY: the kernel's parameters in order; a thread an element.
    unsafe { kernel.launch(Grid::over(x.len(), 256), &args) }
}

/// `y <- keep y + add x`.
///
/// # Errors
/// When kinds or lengths differ.
pub fn blend(y: &mut CudaBuffer, keep: f64, x: &CudaBuffer, add: f64) -> Result<()> {
    alike("muon", &[y, x])?;
    let (kind, n) = (y.kind(), y.len());
    let kernel = y.device().kernel(&unit(kind), "blend")?;
    let args = [Arg::Buffer(y), Arg::Buffer(x), Arg::Long(n as i64), real(kind, keep), real(kind, add)];
    // SAFETY: the kernel's parameters in order; a thread an element of buffers of one length.
    unsafe { kernel.launch(Grid::over(n, 256), &args) }
}

/// Decays the parameter and subtracts the step; `operand` gets it as bf16. Nothing changes where the scale is not finite.
///
/// # Errors
/// When kinds or lengths differ.
pub fn apply(
    s: Muon,
    p: &mut CudaBuffer,
    operand: Option<&mut CudaBuffer>,
    x: &CudaBuffer,
    scale: &CudaBuffer,
) -> Result<()> {
    alike("muon", &[p, x])?;
    scalar(scale)?;
    if let Some(o) = &operand {
        ensure!((o.kind(), o.len()) == (Kind::Bf16, p.len()), "muon", "operand {o:?} for {p:?}");
    }
    let (kind, n) = (p.kind(), p.len());
    let kernel = p.device().kernel(&unit(kind), "apply")?;
    let operand = operand.as_deref().map_or(Arg::Null, Arg::Buffer);
    let args = [
        Arg::Buffer(p),
        operand,
        Arg::Buffer(x),
        Arg::Buffer(scale),
        Arg::Long(n as i64),
        real(kind, 1.0 - s.decay),
        real(kind, s.step),
    ];
    // SAFETY: the kernel's parameters in order; a thread an element of buffers of one length.
    unsafe { kernel.launch(Grid::over(n, 256), &args) }
}

#[cfg(test)]
mod tests {
    use super::super::{Muon, muon};
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::{DType, Device, Tensor};

    /// In f64, and in f32 with room for what five steps make of a rounding (each multiplies it by up to 3.4).
    #[test]
    fn agrees_with_the_cpu_over_three_updates_and_stops_where_the_factor_is_not_finite() {
        let Some(device) = cuda() else { return };
        let gpu = Device::Cuda(device.cuda().clone());
        for (dtype, kind, bound) in [(DType::F64, Kind::F64, 1e-9), (DType::F32, Kind::F32, 2e-3)] {
            for shape in [[33, 70], [70, 33], [48, 48]] {
                let inputs = tensors(&[(&shape, kind), (&shape, kind), (&shape, kind), (&shape, kind)]);
                let there = |x: &Tensor| {
                    let x = Tensor::from_vec(&gpu, &shape, x.to_f64().unwrap()).unwrap();
                    x.to_dtype(dtype).unwrap()
                };
                let mut p = inputs[0].clone();
                let mut m = Tensor::zeros(p.device(), &shape, p.dtype()).unwrap();
                let (mut gp, mut gm) = (there(&p), there(&m));
                let s = Muon { momentum: 0.95, step: 0.3, decay: 0.01 };
                for (i, scale) in [0.5, f64::NAN, 2.0, 1.0].into_iter().enumerate() {
                    let g = &inputs[1 + i % 3];
                    let factor = |d: &Device| Tensor::full(d, &[], DType::F64, scale).unwrap();
                    muon(s, &mut p, &mut m, g, &factor(g.device())).unwrap();
                    muon(s, &mut gp, &mut gm, &there(g), &factor(&gpu)).unwrap();
                }
                let Device::Cuda(on) = &gpu else { unreachable!() };
                for (name, got, want) in [("parameter", &gp, &p), ("momentum", &gm, &m)] {
                    let got = got.on_cuda("test", on).unwrap().full().unwrap();
                    compare(&format!("{kind:?} {shape:?} {name}"), got, want, Bound::relative(bound));
                }
            }
        }
    }
}
