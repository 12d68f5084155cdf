//! The launches. Norm and clip factor stay on the device.

use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::Result;

static SOURCE: Source = Source { name: "grad_norm", text: include_str!("kernel.cu") };

/// Elements whose squares a block adds.
const PIECE: usize = 1 << 16;

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into()), ("PIECE", PIECE.to_string())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// The norm of all elements of all buffers, and the factor that brings it down to `most`: two f64 on the device.
///
/// # Errors
/// When memory runs out.
pub fn grad_norm(device: &CudaDevice, grads: &[&CudaBuffer], most: f64) -> Result<CudaBuffer> {
    let op = "grad_norm";
    let blocks: Vec<usize> = grads.iter().map(|g| g.len().div_ceil(PIECE)).collect();
    let total: usize = blocks.iter().sum();
    let (parts, out) = (device.alloc(op, Kind::F64, total)?, device.alloc(op, Kind::F64, 2)?);
    let mut first = 0;
    for (grad, &blocks) in grads.iter().zip(&blocks) {
        let kernel = device.kernel(&unit(grad.kind()), "squares")?;
        let args = [Arg::Buffer(grad), Arg::At(&parts, first), Arg::Long(grad.len() as i64)];
        // SAFETY: the kernel's parameters in order; a block a piece and a part.
        unsafe { kernel.launch(Grid::line(blocks, 512), &args)? };
        first += blocks;
    }
    let kernel = device.kernel(&unit(Kind::F32), "norm_of_parts")?;
    let args = [Arg::Buffer(&parts), Arg::Buffer(&out), Arg::int(total), Arg::F64(most)];
    // SAFETY: the kernel's parameters in order; one block reads all parts.
    unsafe { kernel.launch(Grid::line(1, 512), &args)? };
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::grad_norm;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{cuda, tensors};

    #[test]
    fn agrees_with_the_cpu_and_clips() {
        let Some(device) = cuda() else { return };
        for kind in [Kind::F32, Kind::F64] {
            let inputs = tensors(&[(&[200_001], kind), (&[7], kind)]);
            let want = grad_norm(inputs[0].device(), &inputs).unwrap().item().unwrap();
            let on: Vec<_> = inputs.iter().map(|x| device.tensor(x, kind)).collect();
            for most in [1.0, 1e9] {
                let got = super::grad_norm(device.cuda(), &on.iter().collect::<Vec<_>>(), most).unwrap();
                let got: Vec<f64> = got.download().unwrap();
                assert!((got[0] / want - 1.0).abs() < 1e-12, "{got:?}, {want}");
                assert!((got[1] - (most / want).min(1.0)).abs() < 1e-12, "{got:?}");
            }
        }
    }
}
