//! The launches: x and its gradient are f32 (or f64), y and its gradient that or bf16.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{real, rows, same, same_len};
use crate::ops::reduce::cuda::sum_axis;

static SOURCE: Source = Source { name: "rmsnorm", text: include_str!("kernel.cu") };

/// Blocks of backward at most, two a multiprocessor of an H100: each reads its rows once and leaves one row of dw.
const BLOCKS: usize = 264;

/// Numbers of 128 columns that a warp keeps of a row in registers.
const PIECES: [usize; 4] = [2, 4, 6, 8];

/// How many for rows of that width; 0 where they are read twice.
fn pieces(number: Kind, width: usize) -> usize {
    let fits = |&pieces: &usize| number == Kind::F32 && width.is_multiple_of(4) && width <= 128 * pieces;
    PIECES.into_iter().find(fits).unwrap_or(0)
}

fn unit(number: Kind, y: Kind, pieces: usize) -> Unit {
    let names = [("R", number), ("Y", y)].map(|(name, kind)| (name, kind.source_name().to_string()));
    let [r, y] = names;
    Unit::new(&SOURCE, [r, y, ("PIECES", pieces.to_string())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    let kinds = [(Kind::F32, Kind::Bf16), (Kind::F32, Kind::F32), (Kind::F64, Kind::F64)];
    let any = kinds.map(|(r, y)| unit(r, y, 0));
    let kept = PIECES.into_iter().flat_map(|n| [Kind::Bf16, Kind::F32].map(|y| unit(Kind::F32, y, n)));
    any.into_iter().chain(kept).collect()
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
    let kernel = device.kernel(&unit(x.kind(), kind, pieces(x.kind(), width)), "rmsnorm_forward")?;
    let sizes = [Arg::int(rows), Arg::int(width), real(x.kind(), eps)];
    let buffers = [x, w, &y, &rstd].map(Arg::Buffer);
    // SAFETY: the kernel's parameters in order; a warp takes one of the `rows` rows of `width`.
    unsafe { kernel.launch(Grid::line(rows.div_ceil(8), 256), &[&buffers[..], &sizes].concat())? };
    Ok((y, rstd))
}

/// Writes dx, or adds it to what is there, and returns dw, and, if asked, what dx then is, rounded to bf16.
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
    round: bool,
) -> Result<(CudaBuffer, Option<CudaBuffer>)> {
    let (op, device, width) = ("rmsnorm", x.device(), w.len());
    same(op, &[x, w, rstd, dx])?;
    same_len(op, &[dy, x, dx])?;
    let rows = rows(op, x, width)?;
    ensure!(rstd.len() == rows, op, "{rstd:?} for {rows} rows");
    let together = rows.div_ceil(BLOCKS).next_multiple_of(8).max(8);
    let blocks = rows.div_ceil(together);
    let partial = device.alloc(op, x.kind(), blocks * width)?;
    let rounded = round.then(|| device.alloc(op, Kind::Bf16, x.len())).transpose()?;
    let kernel = device.kernel(&unit(x.kind(), dy.kind(), pieces(x.kind(), width)), "rmsnorm_backward")?;
    let buffers = [dy, x, w, rstd, dx].map(Arg::Buffer);
    let outputs = [rounded.as_ref().map_or(Arg::Null, Arg::Buffer), Arg::Buffer(&partial)];
    let sizes = [Arg::int(rows), Arg::int(width), Arg::int(together), Arg::Int(add.into())];
    // SAFETY: the kernel's parameters in order; a block takes `together` of the rows and one row of `partial`.
    unsafe { kernel.launch(Grid::line(blocks, 256), &[&buffers[..], &outputs, &sizes].concat())? };
    Ok((sum_axis(&partial, (1, blocks, width))?, rounded))
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
        for (rows, width) in [(1, 5), (3, 7), (37, 257), (65, 768), (130, 1025), (2500, 132), (9, 512), (70, 1024)] {
            for (number, y) in kinds() {
                let inputs = tensors(&[(&[rows, width], number), (&[width], number), (&[rows, width], y)]);
                let (want, [dx_want, dw_want]) = reference(&inputs, |tape, [x, w]| rmsnorm(tape, x, w, 1e-6));
                let [gx, gw, gdy] = [(0, number), (1, number), (2, y)].map(|(i, k)| device.tensor(&inputs[i], k));
                let (got, rstd) = super::forward(&gx, &gw, 1e-6, y).unwrap();
                let name = format!("{rows} x {width} {y:?}");
                compare(&name, &got, &want, Bound::of(number, y, width));
                let mut dx = device.tensor(&inputs[0], number);
                let round = number == Kind::F32;
                let (dw, rounded) = super::backward(&gdy, &gx, &gw, &rstd, &mut dx, false, round).unwrap();
                compare(&name, &dx, &dx_want, Bound::of(number, number, width));
                compare(&name, &dw, &dw_want, Bound::of(number, number, rows));
                let once: Vec<f64> = device.numbers(&dx);
                let (_, again) = super::backward(&gdy, &gx, &gw, &rstd, &mut dx, true, round).unwrap();
                let twice: Vec<f64> = once.iter().map(|d| 2.0 * d).collect();
                assert_eq!(device.numbers(&dx), twice, "{name}: added to itself");
                for (rounded, full) in [(rounded, once), (again, twice)] {
                    let want: Vec<f64> = full.into_iter().map(crate::testing::bf16).collect();
                    assert!(
                        rounded.is_none_or(|r| device.numbers(&r) == want),
                        "{name}: dx is rounded as it is written"
                    );
                }
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
            let (dw, rounded) = super::backward(&dy, &x, &w, &rstd, &mut dx, false, true)?;
            Ok([y, rstd, dx, dw].into_iter().chain(rounded).collect())
        });
    }
}
