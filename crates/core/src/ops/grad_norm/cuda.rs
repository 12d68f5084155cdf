//! The launches. Norm and clip factor stay on the device.

use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Table, Unit};
use crate::error::{Result, ensure};

static SOURCE: Source = Source { name: "grad_norm", text: include_str!("kernel.cu") };

/// Elements whose squares a block adds.
const PIECE: usize = 1 << 16;
/// Gradients of a launch: 24 bytes each of the 4096 that a kernel's parameters may have.
const MANY: usize = 128;

fn unit(number: Kind) -> Unit {
    let numbers = [("PIECE", PIECE), ("MANY", MANY)].map(|(name, value)| (name, value.to_string()));
    let [piece, many] = numbers;
    Unit::new(&SOURCE, [("R", number.source_name().into()), piece, many])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Sums of squares that [`squares_of`] makes of so many elements.
pub fn parts(numel: usize) -> usize {
    numel.div_ceil(PIECE)
}

/// The sums of squares of the pieces of all buffers, in order: f64.
///
/// # Errors
/// When memory runs out.
pub fn squares_of(device: &CudaDevice, grads: &[&CudaBuffer]) -> Result<CudaBuffer> {
    let op = "grad_norm";
    let blocks = |g: &CudaBuffer| parts(g.len());
    let sums = device.alloc(op, Kind::F64, grads.iter().map(|g| blocks(g)).sum())?;
    let mut first = 0;
    for grads in grads.chunk_by(|a, b| a.kind() == b.kind()).flat_map(|alike| alike.chunks(MANY)) {
        let (mut table, mut own) = (Table::new(MANY * 3), 0);
        for grad in grads {
            table.buffer(grad);
            table.long(grad.len() as u64);
            table.long(own as u64);
            own += blocks(grad);
        }
        let kernel = device.kernel(&unit(grads[0].kind()), "squares")?;
        let args = [Arg::Table(&table), Arg::int(grads.len()), Arg::At(&sums, first)];
        // SAFETY: the kernel's parameters in order; the table has its three words a row, and a block is a piece and a part.
        unsafe { kernel.launch(Grid::line(own, 512), &args)? };
        first += own;
    }
    Ok(sums)
}

/// The root of the sum of `parts`, added in order: one f64.
///
/// # Errors
/// When memory runs out.
pub fn root_of_sum(parts: &CudaBuffer) -> Result<CudaBuffer> {
    let (op, device) = ("grad_norm", parts.device());
    ensure!(parts.kind() == Kind::F64, op, "{parts:?} are no sums of squares");
    let out = device.alloc(op, Kind::F64, 1)?;
    let kernel = device.kernel(&unit(Kind::F32), "norm_of_parts")?;
    let args = [Arg::Buffer(parts), Arg::Buffer(&out), Arg::int(parts.len())];
    // SAFETY: the kernel's parameters in order; one block reads all parts.
    unsafe { kernel.launch(Grid::line(1, 512), &args)? };
    Ok(out)
}

/// `min(1, clip / (norm + 1e-6))`, 1 where clip is 0, NaN where the norm or one of `losses` (one number each) is not finite: one
/// f64 on the device.
///
/// # Errors
/// When memory runs out, the norm is no f64, or a loss is not one number.
pub fn clip_factor(norm: &CudaBuffer, clip: f64, losses: &[&CudaBuffer]) -> Result<CudaBuffer> {
    let (op, device) = ("clip_factor", norm.device());
    ensure!((norm.kind(), norm.len()) == (Kind::F64, 1), op, "{norm:?} is no norm");
    let out = device.alloc(op, Kind::F64, 1)?;
    let args = [Arg::Buffer(norm), Arg::Buffer(&out), Arg::F64(clip)];
    // SAFETY: the kernel's parameters in order; one thread.
    unsafe { device.kernel(&unit(Kind::F32), "clip_factor")?.launch(Grid::line(1, 1), &args)? };
    for loss in losses {
        ensure!(loss.len() == 1, op, "{loss:?} is no loss");
        let kernel = device.kernel(&unit(loss.kind()), "stop_unless_finite")?;
        // SAFETY: as above.
        unsafe { kernel.launch(Grid::line(1, 1), &[Arg::Buffer(loss), Arg::Buffer(&out)])? };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::{clip_factor, grad_norm};
    use crate::device::cuda::{CudaBuffer, Kind};
    use crate::ops::cuda::testing::{cuda, tensors};
    use crate::{DType, Tensor};

    #[test]
    fn agrees_with_the_cpu_and_clips() {
        let Some(device) = cuda() else { return };
        for kind in [Kind::F32, Kind::F64] {
            let inputs = tensors(&[(&[200_001], kind), (&[7], kind)]);
            let want = grad_norm(inputs[0].device(), &inputs).unwrap();
            let on: Vec<_> = inputs.iter().map(|x| device.tensor(x, kind)).collect();
            let of = |some: &[CudaBuffer]| super::squares_of(device.cuda(), &some.iter().collect::<Vec<_>>()).unwrap();
            let got = super::root_of_sum(&of(&on)).unwrap();
            // made apart it has the same bits
            let apart = CudaBuffer::concatenation(device.cuda(), Kind::F64, &[&of(&on[..1]), &of(&on[1..])]).unwrap();
            let apart = super::root_of_sum(&apart).unwrap().download::<f64>().unwrap();
            assert_eq!(apart[0].to_bits(), got.download::<f64>().unwrap()[0].to_bits());
            let norm = got.download::<f64>().unwrap()[0];
            assert!((norm / want.item().unwrap() - 1.0).abs() < 1e-12, "{norm}, {want:?}");
            for clip in [1.0, 1e9, 0.0] {
                for loss in [1.0, f64::NAN, f64::INFINITY] {
                    let losses = [1.0, loss].map(|x| Tensor::full(want.device(), &[], DType::F64, x).unwrap());
                    let factor = clip_factor(&want, clip, &losses).unwrap().item().unwrap();
                    let losses = losses.map(|x| device.tensor(&x, kind));
                    let on_card = super::clip_factor(&got, clip, &losses.each_ref()).unwrap();
                    let on_card = on_card.download::<f64>().unwrap()[0];
                    let equal = (on_card / factor - 1.0).abs() < 1e-12;
                    assert!(equal || (factor.is_nan() && on_card.is_nan()), "{clip}, {loss}: {on_card}, {factor}");
                }
            }
        }
        // more than a table holds, of both kinds
        let kind = |i: usize| if i.is_multiple_of(200) { Kind::F64 } else { Kind::F32 };
        let many: Vec<_> =
            (0..2 * super::MANY + 5).map(|i| tensors(&[(&[1 + i * 7 % 90], kind(i))]).remove(0)).collect();
        let want: f64 = many.iter().flat_map(|x| x.to_f64().unwrap()).map(|x| x * x).sum::<f64>().sqrt();
        let on: Vec<_> = many.iter().enumerate().map(|(i, x)| device.tensor(x, kind(i))).collect();
        let norm = |all: &[&CudaBuffer]| super::root_of_sum(&super::squares_of(device.cuda(), all).unwrap()).unwrap();
        let got = norm(&on.iter().collect::<Vec<_>>());
        assert!((got.download::<f64>().unwrap()[0] / want - 1.0).abs() < 1e-12);
        assert_eq!(norm(&[]).download::<f64>().unwrap(), [0.0]);
    }
}
