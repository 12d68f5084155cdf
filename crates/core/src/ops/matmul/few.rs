//! The product of a few rows with a transposed matrix, x w^T: what one new token asks of every weight. Panels of w would be
//! written and read once more than the product itself reads w; here its rows are read in place, once.

use crate::device::cpu::matrix::{MatMut, MatRef};
use crate::device::cpu::simd::{LANES, simd, sum_lanes};
use crate::device::{Accumulate, CpuDevice, CpuNumber, Gemm};

/// Rows of x at most: one new token of a few sequences; a training step has hundreds of rows.
pub(crate) const FEW_ROWS: usize = 4;
/// Multiply-adds of a task at least: some 10 microseconds, long against waking a thread.
const TASK: usize = 1 << 16;
/// Rows of w that are multiplied at once, so that a chain of additions does not wait for itself.
const REGISTER_ROWS: usize = 4;

/// x times each of four rows of w.
#[inline(always)]
fn dots<T: CpuNumber>(x: &[T], w: [&[T]; REGISTER_ROWS]) -> [T; REGISTER_ROWS] {
    let whole = x.len() / LANES * LANES;
    let mut lanes = [[T::ZERO; LANES]; REGISTER_ROWS];
    for at in (0..whole).step_by(LANES) {
        let x = &x[at..at + LANES];
        for (lanes, w) in lanes.iter_mut().zip(w) {
            for ((lane, &x), &w) in lanes.iter_mut().zip(x).zip(&w[at..at + LANES]) {
                *lane = x.mul_add(w, *lane);
            }
        }
    }
    for (lanes, w) in lanes.iter_mut().zip(w) {
        for ((lane, &x), &w) in lanes.iter_mut().zip(&x[whole..]).zip(&w[whole..]) {
            *lane = x.mul_add(w, *lane);
        }
    }
    lanes.map(sum_lanes)
}

simd! {
    /// `out [columns, m]`: the rows of w from the first on, times each of the m rows of x. Rows are `k` long, `ldx` and `ldw` apart.
    fn columns<T>(x: MatRef<T>, w: MatRef<T>, m: usize, k: usize, out: &mut [T]) {
        let count = out.len() / m;
        for j in (0..count).step_by(REGISTER_ROWS) {
            // behind the last column the last one again
            let of = |i: usize| &w.data[(j + i).min(count - 1) * w.row_stride..][..k];
            let w = [of(0), of(1), of(2), of(3)];
            for i in 0..m {
                let sums = dots(&x.data[i * x.row_stride..][..k], w);
                for (l, &sum) in sums.iter().enumerate().take(count - j) {
                    out[(j + l) * m + i] = sum;
                }
            }
        }
    }
}

/// Whether [`product`] computes it: few rows, x and w with contiguous rows.
pub(super) fn takes<T>(m: usize, a: MatRef<T>, b: MatRef<T>) -> bool {
    m <= FEW_ROWS && a.col_stride == 1 && b.row_stride == 1
}

/// See [`super::cpu::gemm`]; its operands are checked.
pub(super) fn product<T: CpuNumber>(
    device: &CpuDevice,
    size: Gemm<Accumulate<&[T]>>,
    a: MatRef<T>,
    b: MatRef<T>,
    c: MatMut<T>,
) {
    let Gemm { m, n, k, accumulate } = size;
    let w = b.t();
    let mut sums = device.alloc::<T>(n * m);
    let per_task = TASK.div_ceil(k * m).next_multiple_of(REGISTER_ROWS);
    device.for_pieces(&mut sums, per_task * m, |task, out| columns(a, w.from(task * per_task, 0), m, k, out));
    for (i, c) in c.data.chunks_mut(c.row_stride).enumerate().take(m) {
        for (j, c) in c[..n].iter_mut().enumerate() {
            let sum = sums[j * m + i];
            *c = match accumulate {
                Accumulate::Overwrite => sum,
                Accumulate::Existing => *c + sum,
                Accumulate::Residual(residual) => residual[i * n + j] + sum,
            };
        }
    }
}
