use crate::device::CpuNumber;
use crate::device::cpu::simd::{self, simd};
use crate::device::{Buffer, CpuDevice};

/// Rows of a task. The partial sums of dw are one row a task, added in order of task.
const TASK_ROWS: usize = 64;

simd! {
    fn forward_rows<T>(x: &[T], w: &[T], eps: f64, y: &mut [T], rstd: &mut [T]) {
        let width = w.len();
        for ((x, y), r) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd) {
            let mean = simd::dot(x, x) / T::of(width as f64);
            *r = T::ONE / (mean + T::of(eps)).sqrt();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * *r * w;
            }
        }
    }
}

simd! {
    /// Writes dx, or adds to what is there. `row` is as wide as a row.
    fn backward_rows<T>(inputs: Inputs<T>, row: &mut [T], dx: &mut [T], accumulate: bool, dw: &mut [T]) {
        let Inputs { dy, x, w, rstd } = inputs;
        let width = w.len();
        let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(rstd);
        for (((dy, x), dx), &r) in rows {
            for ((d, &g), &w) in row.iter_mut().zip(dy).zip(w) {
                *d = g * w;
            }
            let c = simd::dot(row, x) * r * r / T::of(width as f64);
            for ((d, &x), (dw, &g)) in row.iter_mut().zip(x).zip(dw.iter_mut().zip(dy)) {
                *d = r * (*d - x * c);
                *dw = (g * x).mul_add(r, *dw);
            }
            if accumulate {
                dx.iter_mut().zip(&*row).for_each(|(sum, &d)| *sum += d);
            } else {
                dx.copy_from_slice(row);
            }
        }
    }
}

/// What backward reads: rows of dy and x, the weight, and 1 / rms of every row.
struct Inputs<'a, T> {
    dy: &'a [T],
    x: &'a [T],
    w: &'a [T],
    rstd: &'a [T],
}

pub fn forward<T: CpuNumber>(device: &CpuDevice, x: &[T], w: &[T], eps: f64, y: &mut [T], rstd: &mut [T]) {
    let width = w.len();
    device.for_pieces2((y, TASK_ROWS * width), (rstd, TASK_ROWS), |i, y, rstd| {
        forward_rows(&x[i * TASK_ROWS * width..][..y.len()], w, eps, y, rstd);
    });
}

/// Writes dx, or adds it to what is there, and returns dw.
pub fn backward<T: CpuNumber>(
    device: &CpuDevice,
    (dy, x, w, rstd): (&[T], &[T], &[T], &[T]),
    dx: &mut [T],
    accumulate: bool,
) -> Buffer<T> {
    let width = w.len();
    let tasks = rstd.len().div_ceil(TASK_ROWS);
    let mut partial = device.zeros::<T>(tasks * width);
    device.for_pieces2((dx, TASK_ROWS * width), (&mut partial, width), |i, dx, dw| {
        let at = i * TASK_ROWS * width;
        let mut row = device.alloc(width);
        let (dy, x) = (&dy[at..][..dx.len()], &x[at..][..dx.len()]);
        backward_rows(Inputs { dy, x, w, rstd: &rstd[i * TASK_ROWS..] }, &mut row, dx, accumulate, dw);
    });
    let mut dw = device.zeros::<T>(width);
    for row in partial.chunks_exact(width) {
        dw.iter_mut().zip(row).for_each(|(d, &p)| *d += p);
    }
    dw
}
