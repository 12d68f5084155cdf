//! The launches.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};

static SOURCE: Source = Source { name: "reduce", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Where a sum over an axis goes in two steps: columns below which, terms of a column from which on, and parts of a column.
const FEW: usize = 1024;
const LONG: usize = 4096;
const PARTS: usize = 256;
/// Columns from which on each is a thread's: half of what an H100 holds at a time (60 registers each), whose loads are eight at a time.
const MANY: usize = 1 << 16;

/// The sum over the middle axis of `x [outer, n, inner]`: `[outer, inner]`.
///
/// # Errors
/// When the extents do not fit x.
pub fn sum_axis(x: &CudaBuffer, (outer, n, inner): (usize, usize, usize)) -> Result<CudaBuffer> {
    let (op, device) = ("sum_axis", x.device());
    ensure!(x.len() == outer * n * inner, op, "{x:?} as [{outer}, {n}, {inner}]");
    // few columns, and long ones: parts of each first, so that more than a few blocks work
    if inner > 1 && outer * inner < FEW && n >= LONG && n.is_multiple_of(PARTS) {
        let parts = sum_axis(x, (outer * PARTS, n / PARTS, inner))?;
        return sum_axis(&parts, (outer, PARTS, inner));
    }
    let out = device.alloc(op, x.kind(), outer * inner)?;
    let buffers = [x, &out].map(Arg::Buffer);
    // SAFETY: the kernels' parameters in order; blocks cover the columns of every outer index.
    unsafe {
        if inner == 1 {
            let kernel = device.kernel(&unit(x.kind()), "sum_row")?;
            kernel.launch(Grid::line(outer, 512), &[buffers[0], buffers[1], Arg::Long(n as i64)])?;
        } else if outer * inner >= MANY {
            let kernel = device.kernel(&unit(x.kind()), "sum_columns")?;
            let sizes = [Arg::Long(out.len() as i64), Arg::int(n), Arg::int(inner)];
            kernel.launch(Grid::over(out.len(), 256), &[&buffers[..], &sizes].concat())?;
        } else {
            let kernel = device.kernel(&unit(x.kind()), "sum_axis")?;
            let grid = Grid::line(inner.div_ceil(32) * outer, 256);
            kernel.launch(grid, &[buffers[0], buffers[1], Arg::int(n), Arg::int(inner)])?;
        }
    }
    Ok(out)
}

/// Its gradient: dy `[outer, inner]` for every one of n.
///
/// # Errors
/// When the extents do not fit dy.
pub fn sum_axis_backward(dy: &CudaBuffer, (outer, n, inner): (usize, usize, usize)) -> Result<CudaBuffer> {
    let (op, device) = ("sum_axis", dy.device());
    ensure!(dy.len() == outer * inner, op, "{dy:?} as [{outer}, {inner}]");
    let dx = device.alloc(op, dy.kind(), outer * n * inner)?;
    let kernel = device.kernel(&unit(dy.kind()), "repeat_axis")?;
    let sizes = [Arg::Long(dx.len() as i64), Arg::int(n), Arg::int(inner)];
    // SAFETY: the kernel's parameters in order; a thread an element of dx.
    unsafe { kernel.launch(Grid::over(dx.len(), 256), &[&[dy, &dx].map(Arg::Buffer)[..], &sizes].concat())? };
    Ok(dx)
}

/// Whether every element of x (f32 or f64) is finite: the host waits for the answer.
///
/// # Errors
/// When a kernel failed.
pub fn is_finite(x: &CudaBuffer) -> Result<bool> {
    let device = x.device();
    let found = device.zeros("is_finite", Kind::U32, 1)?;
    let kernel = device.kernel(&unit(x.kind()), "find_infinite")?;
    let blocks = x.len().div_ceil(256).min(4096);
    let args = [Arg::Buffer(x), Arg::Buffer(&found), Arg::Long(x.len() as i64)];
    // SAFETY: the kernel's parameters in order; the threads walk over x.
    unsafe { kernel.launch(Grid::line(blocks, 256), &args)? };
    Ok(found.download::<u32>()? == [0])
}

#[cfg(test)]
mod tests {
    use super::super::sum_axis;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};

    /// 70,001 columns are a thread's each and 7,000 of them a block's parts: the same eight sums.
    #[test]
    fn many_columns_have_the_bits_of_few() {
        let Some(device) = cuda() else { return };
        let (n, many, few) = (21, 70_001, 7_000);
        let all = device.numbers(&device.tensor(&tensors(&[(&[n, many], Kind::F32)])[0], Kind::F32));
        let sums = |columns: usize| {
            let some: Vec<f32> = all.chunks(many).flat_map(|row| &row[..columns]).map(|&x| x as f32).collect();
            let x = device.cuda().upload("test", &some).unwrap();
            device.numbers(&super::sum_axis(&x, (1, n, columns)).unwrap())
        };
        assert!(many >= super::MANY && few < super::MANY && sums(many)[..few] == sums(few));
    }

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (outer, n, inner) in [
            (1, 1, 1),
            (3, 5, 7),
            (2, 257, 65),
            (3, 1000, 1),
            (1, 4099, 33),
            (2, 4096, 3),
            (70000, 2, 3),
            (2, 21, 40000),
        ] {
            for kind in [Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[outer, n, inner], kind), (&[outer, inner], kind)]);
                let (want, [dx_want]) = reference(&inputs, |tape, [x]| sum_axis(tape, x, 1));
                let name = format!("[{outer}, {n}, {inner}] {kind:?}");
                let got = super::sum_axis(&device.tensor(&inputs[0], kind), (outer, n, inner)).unwrap();
                compare(&name, &got, &want, Bound::of(kind, kind, n));
                let dx = super::sum_axis_backward(&device.tensor(&inputs[1], kind), (outer, n, inner)).unwrap();
                compare(&name, &dx, &dx_want, Bound::exact());
            }
        }
    }
}
