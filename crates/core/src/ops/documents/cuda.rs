//! The launches: a thread an element.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ids::{CudaIds, IGNORE};

static SOURCE: Source = Source { name: "documents", text: include_str!("kernel.cu") };

fn unit(kind: Kind) -> Unit {
    let word = match kind {
        Kind::Bf16 => "bf16",
        Kind::F32 | Kind::U32 => "u32",
        Kind::F64 | Kind::U64 => "u64",
    };
    Unit::new(&SOURCE, [("W", word.into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::Bf16, Kind::F32, Kind::F64].map(unit).into()
}

/// Every row is one of `x`, `width` wide, or none.
fn check(x: &CudaBuffer, rows: &CudaIds, width: usize) -> Result<()> {
    let count = x.len() / width.max(1);
    ensure!(width > 0 && x.len() == count * width, "documents", "{x:?} in rows of {width}");
    let inside = rows.host().iter().all(|&row| row == IGNORE || (row as usize) < count);
    ensure!(inside, "documents", "a row is not below {count}");
    Ok(())
}

/// The rows of `x`, each `width` wide; zeros for [`IGNORE`].
///
/// # Errors
/// When a row does not exist or memory runs out.
pub(crate) fn take(x: &CudaBuffer, rows: &CudaIds, width: usize) -> Result<CudaBuffer> {
    check(x, rows, width)?;
    let out = x.device().alloc("documents", x.kind(), rows.host().len() * width)?;
    let kernel = x.device().kernel(&unit(x.kind()), "take_rows")?;
    let args = [&[x, &rows.ids, &out].map(Arg::Buffer)[..], &[Arg::Long(out.len() as i64), Arg::int(width)]].concat();
    // SAFETY: the kernel's parameters in order; a thread an element of the output, rows are those of x.
    unsafe { kernel.launch(Grid::over(out.len(), 256), &args)? };
    Ok(out)
}

/// Writes the rows of `x` to those of `out`; [`IGNORE`] is dropped.
///
/// # Errors
/// When a row does not exist.
pub(crate) fn put(x: &CudaBuffer, rows: &CudaIds, width: usize, out: &mut CudaBuffer) -> Result<()> {
    check(out, rows, width)?;
    let total = rows.host().len() * width;
    ensure!(x.len() == total && x.kind() == out.kind(), "documents", "{x:?} for {total} numbers of {out:?}");
    let kernel = x.device().kernel(&unit(x.kind()), "put_rows")?;
    let args = [&[x, &rows.ids, out].map(Arg::Buffer)[..], &[Arg::Long(total as i64), Arg::int(width)]].concat();
    // SAFETY: the kernel's parameters in order; a thread an element of x, rows are those of out and no two are the same.
    unsafe { kernel.launch(Grid::over(total, 256), &args) }
}

#[cfg(test)]
mod tests {
    use crate::device::cuda::Kind;
    use crate::ids::{IGNORE, Ids};
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::tensor::Tensor;

    #[test]
    fn rows_move_there_and_back() {
        let Some(device) = cuda() else { return };
        // 60 rows in another order, with room at every eighth place
        let rows: Vec<u32> =
            (0..60 * 8 / 7 + 1).map(|i| if i % 8 == 7 { IGNORE } else { (i - i / 8) * 7 % 61 }).collect();
        let rows: Vec<u32> = rows.into_iter().map(|row| if row == 60 { IGNORE } else { row }).collect();
        let ids = Ids::new(&device.device(), &[rows.len()], &rows).unwrap();
        let ids = ids.on_cuda("test", device.cuda()).unwrap();
        for width in [1, 33] {
            for kind in [Kind::Bf16, Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[60, width], kind)]);
                let x = inputs[0].to_f64().unwrap();
                let row = |&row: &u32| match row {
                    IGNORE => vec![0.0; width],
                    row => x[row as usize * width..][..width].to_vec(),
                };
                let want: Vec<f64> = rows.iter().flat_map(row).collect();
                let want = Tensor::from_vec(inputs[0].device(), &[rows.len(), width], want).unwrap();
                let taken = super::take(&device.tensor(&inputs[0], kind), ids, width).unwrap();
                compare(&format!("take {width} {kind:?}"), &taken, &want, Bound::exact());
                let mut back = device.cuda().zeros("back", kind, 60 * width).unwrap();
                super::put(&taken, ids, width, &mut back).unwrap();
                let kept: Vec<f64> =
                    (0..60 * width).map(|i| if rows.contains(&((i / width) as u32)) { x[i] } else { 0.0 }).collect();
                let kept = Tensor::from_vec(inputs[0].device(), &[60, width], kept).unwrap();
                compare(&format!("put {width} {kind:?}"), &back, &kept, Bound::exact());
            }
        }
    }
}
