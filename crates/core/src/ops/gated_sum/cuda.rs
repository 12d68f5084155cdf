//! The launches: neighbouring lanes share a row. Branches that attention made in bf16 are read as they are, and what leaves here is rounded, too:
//! products alone take it.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{alike, rows, unit_at_once, wide};

static SOURCE: Source = Source { name: "gated_sum", text: include_str!("kernel.cu") };

/// Elements that a lane takes in one access: 16 bytes where rows are whole pieces of that.
fn at_once(x: Kind, width: usize) -> usize {
    match x {
        Kind::Bf16 if width.is_multiple_of(8) => 8,
        Kind::F32 if width.is_multiple_of(4) => 4,
        Kind::Bf16 | Kind::F32 | Kind::F64 | Kind::U32 | Kind::U64 => 1,
    }
}

fn unit(x: Kind, at_once: usize) -> Unit {
    unit_at_once(&SOURCE, x, at_once)
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [(Kind::Bf16, 8), (Kind::Bf16, 1), (Kind::F32, 4), (Kind::F32, 1), (Kind::F64, 1)].map(|(x, n)| unit(x, n)).into()
}

/// Starts a kernel over rows `width` wide of the first of the `branches`, with `buffers`.
fn over_rows(
    name: &'static str,
    (gates, branches, width): (&CudaBuffer, &[&CudaBuffer], usize),
    buffers: &[&CudaBuffer],
) -> Result<()> {
    let (op, x) = ("gated_sum", branches[0]);
    alike(op, branches)?;
    let count = if x.is_empty() { gates.len() / 3 } else { rows(op, x, width)? };
    ensure!((gates.kind(), gates.len()) == (wide(x.kind()), 3 * count), op, "{gates:?} for {count} rows of {x:?}");
    let step = at_once(x.kind(), width);
    let lanes = (width / step).next_power_of_two().clamp(1, 32);
    let sizes = [count, width, lanes].map(Arg::int);
    let args: Vec<Arg> = buffers.iter().map(|&b| Arg::Buffer(b)).chain(sizes).collect();
    let kernel = x.device().kernel(&unit(x.kind(), step), name)?;
    // SAFETY: the kernel's parameters in order, for buffers that were compared or made for them; `lanes` threads a row.
    unsafe { kernel.launch(Grid::line((count * lanes).div_ceil(256), 256), &args) }
}

/// The sum of branches `[rows, width]`, each times its gate of `gates [rows, 3]`, of the branches' kind.
///
/// # Errors
/// When kinds or lengths differ.
pub fn forward(gates: &CudaBuffer, x: [&CudaBuffer; 3], width: usize) -> Result<CudaBuffer> {
    let y = gates.device().alloc("gated_sum", x[0].kind(), x[0].len())?;
    over_rows("gated_sum_forward", (gates, &x, width), &[gates, x[0], x[1], x[2], &y])?;
    Ok(y)
}

/// The gradients of the gates, and of each branch in its kind, from `dy` in full.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &CudaBuffer,
    gates: &CudaBuffer,
    x: [&CudaBuffer; 3],
    width: usize,
) -> Result<(CudaBuffer, [CudaBuffer; 3])> {
    let (op, device) = ("gated_sum", gates.device());
    ensure!((dy.kind(), dy.len()) == (gates.kind(), x[0].len()), op, "{dy:?} for {:?}", x[0]);
    let like = |of: &CudaBuffer| device.alloc(op, of.kind(), of.len());
    let (dgates, [a, b, c]) = (like(gates)?, [like(x[0])?, like(x[1])?, like(x[2])?]);
    let buffers = [dy, gates, x[0], x[1], x[2], &dgates, &a, &b, &c];
    over_rows("gated_sum_backward", (gates, &x, width), &buffers)?;
    Ok((dgates, [a, b, c]))
}

#[cfg(test)]
mod tests {
    use super::super::gated_sum;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (rows, width) in [(1, 1), (13, 7), (9, 128), (37, 24), (5, 257), (3, 516)] {
            for kind in [Kind::Bf16, Kind::F32, Kind::F64] {
                let (of, whole) = ([rows, width], super::wide(kind));
                let inputs = tensors(&[(&[rows, 3], whole), (&of, kind), (&of, kind), (&of, kind), (&of, whole)]);
                let (want, grads) = reference(&inputs, |tape, [g, a, b, c]| gated_sum(tape, g, [a, b, c]));
                let [a, b, c] = [1, 2, 3].map(|i| device.tensor(&inputs[i], kind));
                let [gates, dy] = [0, 4].map(|i| device.tensor(&inputs[i], whole));
                let (name, bound) = (format!("{rows} x {width} {kind:?}"), |of| Bound::of(kind, of, width.max(3)));
                compare(&name, &super::forward(&gates, [&a, &b, &c], width).unwrap(), &want, bound(kind));
                let (dgates, dx) = super::backward(&dy, &gates, [&a, &b, &c], width).unwrap();
                compare(&name, &dgates, &grads[0], bound(whole));
                for (got, want) in dx.iter().zip(&grads[1..]) {
                    compare(&name, got, want, bound(kind));
                }
            }
        }
    }
}
