//! The launches: a block a row.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::Result;
use crate::ops::cuda::{alike, infinity, rows};

static SOURCE: Source = Source { name: "softmax", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into()), ("INFINITY_OF_R", infinity(number).into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// p of rows `width` wide.
///
/// # Errors
/// When memory runs out.
pub fn forward(x: &CudaBuffer, width: usize) -> Result<CudaBuffer> {
    let (op, device) = ("softmax", x.device());
    let p = device.alloc(op, x.kind(), x.len())?;
    let kernel = device.kernel(&unit(x.kind()), "softmax_forward")?;
    let args = [Arg::Buffer(x), Arg::Buffer(&p), Arg::int(width)];
    // SAFETY: the kernel's parameters in order; a block a row.
    unsafe { kernel.launch(Grid::line(rows(op, x, width)?, 256), &args)? };
    Ok(p)
}

/// The gradient of x from p.
///
/// # Errors
/// When kinds or lengths differ.
pub fn backward(dy: &CudaBuffer, p: &CudaBuffer, width: usize) -> Result<CudaBuffer> {
    let (op, device) = ("softmax", dy.device());
    alike(op, &[dy, p])?;
    let dx = device.alloc(op, p.kind(), p.len())?;
    let kernel = device.kernel(&unit(p.kind()), "softmax_backward")?;
    let args = [Arg::Buffer(dy), Arg::Buffer(p), Arg::Buffer(&dx), Arg::int(width)];
    // SAFETY: the kernel's parameters in order; a block a row.
    unsafe { kernel.launch(Grid::line(rows(op, dy, width)?, 256), &args)? };
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::super::softmax;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (rows, width) in [(1, 1), (3, 7), (5, 257), (2, 4099)] {
            for kind in [Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[rows, width], kind), (&[rows, width], kind)]);
                let (want, [dx_want]) = reference(&inputs, |tape, [x]| softmax(tape, x));
                let [x_, dy] = [0, 1].map(|i| device.tensor(&inputs[i], kind));
                let name = format!("{rows} x {width} {kind:?}");
                let bound = Bound::of(kind, kind, width);
                compare(&name, &super::forward(&x_, width).unwrap(), &want, bound);
                let p = device.tensor(&want, kind);
                let dx = super::backward(&dy, &p, width).unwrap();
                compare(&name, &dx, &dx_want, bound);
            }
        }
    }
}
