//! The launches: a warp a row.

use crate::device::cuda::{Arg, CudaBuffer, Grid, Kind, Source, Unit};
use crate::error::{Result, ensure};
use crate::ops::cuda::{alike, rows, same};

static SOURCE: Source = Source { name: "gated_sum", text: include_str!("kernel.cu") };

fn unit(number: Kind) -> Unit {
    Unit::new(&SOURCE, [("R", number.source_name().into())])
}

/// Everything that this op compiles.
pub fn units() -> Vec<Unit> {
    [Kind::F32, Kind::F64].map(unit).into()
}

/// Refuses what does not fit, and says how many rows there are.
fn check(gates: &CudaBuffer, branches: &[&CudaBuffer], width: usize) -> Result<usize> {
    let op = "gated_sum";
    alike(op, branches)?;
    same(op, &[gates, branches[0]])?;
    let count = if branches[0].is_empty() { gates.len() / 3 } else { rows(op, branches[0], width)? };
    ensure!(gates.len() == 3 * count, op, "{gates:?} for {count} rows");
    Ok(count)
}

/// The sum of branches `[rows, width]`, each times its gate of `gates [rows, 3]`.
///
/// # Errors
/// When kinds or lengths differ.
pub fn forward(gates: &CudaBuffer, x: [&CudaBuffer; 3], width: usize) -> Result<CudaBuffer> {
    let (count, device) = (check(gates, &x, width)?, gates.device());
    let y = device.alloc("gated_sum", x[0].kind(), x[0].len())?;
    let buffers = [gates, x[0], x[1], x[2], &y].map(Arg::Buffer);
    let args = [&buffers[..], &[Arg::int(count), Arg::int(width)]].concat();
    let kernel = device.kernel(&unit(y.kind()), "gated_sum_forward")?;
    // SAFETY: the kernel's parameters in order, for buffers that were compared; a warp a row.
    unsafe { kernel.launch(Grid::line(count.div_ceil(8), 256), &args)? };
    Ok(y)
}

/// The gradients of the gates and of each branch.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dy: &CudaBuffer,
    gates: &CudaBuffer,
    x: [&CudaBuffer; 3],
    width: usize,
) -> Result<(CudaBuffer, [CudaBuffer; 3])> {
    let (count, device) = (check(gates, &[x[0], x[1], x[2], dy], width)?, gates.device());
    let like = |of: &CudaBuffer| device.alloc("gated_sum", of.kind(), of.len());
    let (dgates, dx) = (like(gates)?, [like(dy)?, like(dy)?, like(dy)?]);
    let buffers = [dy, gates, x[0], x[1], x[2], &dgates, &dx[0], &dx[1], &dx[2]].map(Arg::Buffer);
    let args = [&buffers[..], &[Arg::int(count), Arg::int(width)]].concat();
    let kernel = device.kernel(&unit(dy.kind()), "gated_sum_backward")?;
    // SAFETY: as above.
    unsafe { kernel.launch(Grid::line(count.div_ceil(8), 256), &args)? };
    Ok((dgates, dx))
}

#[cfg(test)]
mod tests {
    use super::super::gated_sum;
    use crate::device::cuda::Kind;
    use crate::ops::cuda::testing::{Bound, compare, cuda, reference, tensors};

    #[test]
    fn agrees_with_the_cpu() {
        let Some(device) = cuda() else { return };
        for (rows, width) in [(1, 1), (13, 7), (9, 128), (5, 257)] {
            for kind in [Kind::F32, Kind::F64] {
                let of = [rows, width];
                let inputs = tensors(&[(&[rows, 3], kind), (&of, kind), (&of, kind), (&of, kind), (&of, kind)]);
                let (want, grads) = reference(&inputs, |tape, [g, a, b, c]| gated_sum(tape, g, [a, b, c]));
                let [gates, a, b, c, dy] = [0, 1, 2, 3, 4].map(|i| device.tensor(&inputs[i], kind));
                let (name, bound) = (format!("{rows} x {width} {kind:?}"), Bound::of(kind, kind, width.max(3)));
                compare(&name, &super::forward(&gates, [&a, &b, &c], width).unwrap(), &want, bound);
                let (dgates, dx) = super::backward(&dy, &gates, [&a, &b, &c], width).unwrap();
                for (got, want) in [&dgates].into_iter().chain(&dx).zip(&grads) {
                    compare(&name, got, want, bound);
                }
            }
        }
    }
}
