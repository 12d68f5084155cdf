//! The launches: x and its gradient are f32 (or f64), y and its gradient that or bf16.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{real, rows, same, same_len};
use crate::ops::reduce::cuda::sum_axis;

static SOURCE: Source = Source { name: "rmsnorm", text: include_str!("kernel.cu") };

/// Rows whose part of dw a block adds.
const ROWS: usize = 32;

fn unit(number: Kind, y: Kind) -> Unit {
    let names = [("R", number), ("Y", y)].map(|(name, kind)| (name, kind.source_name().to_string()));
    let [r, y] = names;
    Unit::new(&SOURCE, [r, y, ("ROWS", ROWS.to_string())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [(Kind::F32, Kind::Bf16), (Kind::F32, Kind::F32), (Kind::F64, Kind::F64)].map(|(r, y)| unit(r, y)).into()
}

/// y of kind `kind`, and rstd, one number a row.
///
/// # Errors
/// When x and w are of different kinds, x is not of whole rows, or memory runs out.
pub fn forward(x: &CudaBuffer, w: &CudaBuffer, eps: f64, kind: Kind) -> Result<(CudaBuffer, CudaBuffer)> {
    let (op, device, width) = ("rmsnorm", x.device(), w.len());
    same(op, &[x, w])?;
    let rows = rows(op, x, width)?;
    let (y, rstd) = (device.alloc(op, kind, x.len())?, device.alloc(op, x.kind(), rows)?);
    let kernel = device.kernel(&unit(x.kind(), kind), "rmsnorm_forward")?;
    let sizes = [Arg::int(rows), Arg::int(width), real(x.kind(), eps)];
    let buffers = [x, w, &y, &rstd].map(Arg::Buffer);
    // SAFETY: the kernel's parameters in order; a warp takes one of the `rows` rows of `width`.
    unsafe { kernel.launch(Grid::line(rows.div_ceil(8), 256), &[&buffers[..], &sizes].concat())? };
    Ok((y, rstd))
}

/// Writes dx, or adds it to what is there, and returns dw.
///
/// # Errors
/// As [`forward`], and when lengths differ.
pub fn backward(
    dy: &CudaBuffer,
    x: &CudaBuffer,
    w: &CudaBuffer,
    rstd: &CudaBuffer,
    dx: &mut CudaBuffer,
    add: bool,
) -> Result<CudaBuffer> {
    let (op, device, width) = ("rmsnorm", x.device(), w.len());
    same(op, &[x, w, rstd, dx])?;
    same_len(op, &[dy, x, dx])?;
    let rows = rows(op, x, width)?;
    ensure!(rstd.len() == rows, op, "{rstd:?} for {rows} rows");
    let blocks = rows.div_ceil(ROWS);
    let partial = device.alloc(op, x.kind(), blocks * width)?;
    let kernel = device.kernel(&unit(x.kind(), dy.kind()), "rmsnorm_backward")?;
    let buffers = [dy, x, w, rstd, dx, &partial].map(Arg::Buffer);
    let sizes = [Arg::int(rows), Arg::int(width), Arg::Int(add.into())];
    // SAFETY: the kernel's parameters in order; a block takes ROWS of the rows and one row of `partial`.
    unsafe { kernel.launch(Grid::line(blocks, 256), &[&buffers[..], &sizes].concat())? };
    sum_axis(&partial, (1, blocks, width))
}

#[cfg(test)]
mod tests {
    use super::super::rmsnorm;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, kinds, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        // at width 1 the gradient is the rounding of a difference of equal numbers
        for (rows, width) in [(1, 5), (3, 7), (37, 257), (65, 768), (130, 1025)] {
            for (number, y) in kinds() {
                let inputs = tensors(&[(&[rows, width], number), (&[width], number), (&[rows, width], y)]);
                let (want, [dx_want, dw_want]) = reference(&inputs, |tape, [x, w]| rmsnorm(tape, x, w, 1e-6));
                let [gx, gw, gdy] = [(0, number), (1, number), (2, y)].map(|(i, k)| device.tensor(&inputs[i], k));
                let (got, rstd) = super::forward(&gx, &gw, 1e-6, y).unwrap();
                let name = format!("{rows} x {width} {y:?}");
                compare(&name, &got, &want, Bound::of(number, y, width));
                let mut dx = device.tensor(&inputs[0], number);
                let dw = super::backward(&gdy, &gx, &gw, &rstd, &mut dx, false).unwrap();
                compare(&name, &dx, &dx_want, Bound::of(number, number, width));
                compare(&name, &dw, &dw_want, Bound::of(number, number, rows));
                let once: Vec<f64> = device.numbers(&dx);
                super::backward(&gdy, &gx, &gw, &rstd, &mut dx, true).unwrap();
                let twice: Vec<f64> = once.iter().map(|d| 2.0 * d).collect();
                assert_eq!(device.numbers(&dx), twice, "{name}: added to itself");
            }
        }
    }

    #[test]
    fn same_bits_every_run() {
        let Some(device) = cuda() else { return };
        let inputs = tensors(&[(&[4099, 96], Kind::F32), (&[96], Kind::F32), (&[4099, 96], Kind::Bf16)]);
        let [x, w, dy] = [(0, Kind::F32), (1, Kind::F32), (2, Kind::Bf16)].map(|(i, k)| device.tensor(&inputs[i], k));
        device.same_bits(|| {
            let (y, rstd) = super::forward(&x, &w, 1e-6, Kind::Bf16)?;
            let mut dx = x.device().alloc("rmsnorm", Kind::F32, x.len())?;
            let dw = super::backward(&dy, &x, &w, &rstd, &mut dx, false)?;
            Ok(vec![y, rstd, dx, dw])
        });
    }
}
