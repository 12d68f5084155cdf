//! The launch. The angles are computed on the host in f64, as for the CPU, and uploaded once a table.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::real;

static SOURCE: Source = Source { name: "rope", text: include_str!("kernel.cu") };

fn unit(number: Kind, y: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into()), ("Y", y.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [(Kind::F32, Kind::Bf16), (Kind::F32, Kind::F32), (Kind::F64, Kind::F64)].map(|(r, y)| unit(r, y)).into()
}

/// Rotates `x [b, tokens, heads, d]`, whose first token stands at position `first`, by the angles `[positions, d]` (cosines, then
/// sines) of x's kind; backwards for the gradient. What comes out is of kind `to`: x's, or bf16.
///
/// # Errors
/// When the extents do not fit x or the table.
pub fn rotate(
    x: &CudaBuffer,
    angles: &CudaBuffer,
    (tokens, heads, d): (usize, usize, usize),
    first: usize,
    backwards: bool,
    to: Kind,
) -> Result<CudaBuffer> {
    let (op, device, kind) = ("rope", x.device(), x.kind());
    ensure!(x.len().is_multiple_of((tokens * heads * d).max(1)), op, "{x:?} as [b, {tokens}, {heads}, {d}]");
    ensure!((first + tokens) * d <= angles.len(), op, "positions up to {}", first + tokens);
    ensure!(angles.kind() == kind, op, "{x:?} with angles {angles:?}");
    let y = device.alloc(op, to, x.len())?;
    let kernel = device.kernel(&unit(kind, to), "rope")?;
    let sizes = [tokens, heads, d / 2, first].map(Arg::int);
    let ends = ([Arg::Long(x.len() as i64 / 2)], [real(kind, if backwards { -1.0 } else { 1.0 })]);
    let args = [&[x, angles, &y].map(Arg::Buffer)[..], &ends.0, &sizes, &ends.1].concat();
    // SAFETY: the kernel's parameters in order; a thread a pair of x.
    unsafe { kernel.launch(Grid::over(x.len() / 2, 256), &args)? };
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::super::{RopeTable, rope};
    use crate::ops::cuda::testing::{Bound, compare, cuda, kinds, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (b, t, h, d, first) in [(1, 1, 1, 2, 0), (2, 37, 3, 6, 5), (2, 65, 4, 64, 0)] {
            for (number, to) in kinds() {
                let inputs = tensors(&[(&[b, t, h, d], number), (&[b, t, h, d], number)]);
                let table = RopeTable::new(inputs[0].device(), crate::DType::F64, 80, d, 1e4).unwrap();
                let (want, [dx_want]) = reference(&inputs, |tape, [x]| rope(tape, x, &table, first));
                let angles = device.tensor(&table.angles, number);
                let [x_, dy] = [0, 1].map(|i| device.tensor(&inputs[i], number));
                let (name, bound) = (format!("{t} x {h} x {d} {to:?}"), Bound::of(number, to, 4));
                let rotated = |x, backwards| super::rotate(x, &angles, (t, h, d), first, backwards, to).unwrap();
                compare(&name, &rotated(&x_, false), &want, bound);
                compare(&name, &rotated(&dy, true), &dx_want, bound);
            }
        }
    }
}
