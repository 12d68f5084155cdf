//! The launch. The angles are computed on the host in f64, as for the CPU, and uploaded once a table.

use super::RopeTable;
use crate::device::cuda::{Arg, CudaBuffer, CudaDevice, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{real, wide};

static SOURCE: Source = Source { name: "rope", text: include_str!("kernel.cu") };

fn unit(x: Kind) -> Unit {
    Unit::new(&SOURCE, [("X", x.source_name().into()), ("R", wide(x).source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::Bf16, Kind::F32, Kind::F64].map(unit).into()
}

/// A table on the device.
#[derive(Debug)]
pub struct Angles {
    cosines: CudaBuffer,
    sines: CudaBuffer,
    half: usize,
}

impl Angles {
    /// Copies a table for x of kind `x`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(device: &CudaDevice, table: &RopeTable, x: Kind) -> Result<Self> {
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        for row in table.angles.to_f64()?.chunks_exact(2 * table.half) {
            cosines.extend_from_slice(&row[..table.half]);
            sines.extend_from_slice(&row[table.half..]);
        }
        let upload = |numbers: &[f64]| match wide(x) {
            Kind::F64 => device.upload("rope", numbers),
            _ => device.upload("rope", &numbers.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        };
        Ok(Angles { cosines: upload(&cosines)?, sines: upload(&sines)?, half: table.half })
    }
}

/// Rotates `x [b, tokens, heads, d]`, whose first token stands at position `first`; backwards for the gradient.
///
/// # Errors
/// When the extents do not fit x or the table.
pub fn rotate(
    x: &CudaBuffer,
    angles: &Angles,
    (tokens, heads): (usize, usize),
    first: usize,
    backwards: bool,
) -> Result<CudaBuffer> {
    let (op, device, half) = ("rope", x.device(), angles.half);
    ensure!(x.len().is_multiple_of(tokens * heads * 2 * half), op, "{x:?} as [b, {tokens}, {heads}, {}]", 2 * half);
    ensure!((first + tokens) * half <= angles.cosines.len(), op, "positions up to {}", first + tokens);
    ensure!(angles.cosines.kind() == wide(x.kind()), op, "{x:?} with angles {:?}", angles.cosines);
    let y = device.alloc(op, x.kind(), x.len())?;
    let kernel = device.kernel(&unit(x.kind()), "rope")?;
    let buffers = [x, &angles.cosines, &angles.sines, &y].map(Arg::Buffer);
    let sizes = [tokens, heads, half, first].map(Arg::int);
    let ends = ([Arg::Long(x.len() as i64 / 2)], [real(wide(x.kind()), if backwards { -1.0 } else { 1.0 })]);
    let args = [&buffers[..], &ends.0, &sizes, &ends.1].concat();
    // SAFETY: the kernel's parameters in order; a thread a pair of x.
    unsafe { kernel.launch(Grid::over(x.len() / 2, 256), &args)? };
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::super::{RopeTable, rope};
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, tensors};
    use crate::ops::cuda::wide;
    use crate::tape::Tape;

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (b, t, h, d, first) in [(1, 1, 1, 2, 0), (2, 37, 3, 6, 5), (2, 65, 4, 64, 0)] {
            for kind in [Kind::Bf16, Kind::F32, Kind::F64] {
                let inputs = tensors(&[(&[b, t, h, d], kind), (&[b, t, h, d], kind)]);
                let table = RopeTable::new(inputs[0].device(), crate::DType::F64, 80, d, 1e4).unwrap();
                let tape = Tape::new();
                let x = tape.leaf(inputs[0].clone());
                let out = rope(&tape, &x, &table, first).unwrap();
                let grads = tape.backward_from(&out, inputs[1].clone()).unwrap();
                let angles = super::Angles::new(device.cuda(), &table, kind).unwrap();
                let [x_, dy] = [0, 1].map(|i| device.tensor(&inputs[i], kind));
                let (name, bound) = (format!("{t} x {h} x {d} {kind:?}"), Bound::of(wide(kind), kind, 4));
                compare(&name, &super::rotate(&x_, &angles, (t, h), first, false).unwrap(), &out.value, bound);
                compare(
                    &name,
                    &super::rotate(&dy, &angles, (t, h), first, true).unwrap(),
                    grads.get(&x).unwrap(),
                    bound,
                );
            }
        }
    }
}
