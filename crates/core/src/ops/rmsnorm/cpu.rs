use crate::device::simd::{self, simd};
use crate::device::{Buffer, CpuDevice};
use crate::storage::Real;

/// Rows a task handles. The partial sums of dw are one row a task, added in order of task.
const ROWS: usize = 64;

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
    fn backward_rows<T>(dy: &[T], x: &[T], w: &[T], rstd: &[T], dx: &mut [T], dw: &mut [T]) {
        let width = w.len();
        let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(rstd);
        for (((dy, x), dx), &r) in rows {
            // dx serves as scratch for dy * w
            for ((d, &g), &w) in dx.iter_mut().zip(dy).zip(w) {
                *d = g * w;
            }
            let c = simd::dot(dx, x) * r * r / T::of(width as f64);
            for ((d, &x), (dw, &g)) in dx.iter_mut().zip(x).zip(dw.iter_mut().zip(dy)) {
                *d = r * (*d - x * c);
                *dw = (g * x).mul_add(r, *dw);
            }
        }
    }
}

pub fn forward<T: Real>(device: &CpuDevice, x: &[T], w: &[T], eps: f64, y: &mut [T], rstd: &mut [T]) {
    let width = w.len();
    device.for_chunks2((y, ROWS * width), (rstd, ROWS), |i, y, rstd| {
        forward_rows(&x[i * ROWS * width..][..y.len()], w, eps, y, rstd);
    });
}

pub fn backward<T: Real>(device: &CpuDevice, dy: &[T], x: &[T], w: &[T], rstd: &[T], dx: &mut [T]) -> Buffer<T> {
    let width = w.len();
    let tasks = rstd.len().div_ceil(ROWS);
    let mut partial = device.zeros::<T>(tasks * width);
    device.for_chunks2((dx, ROWS * width), (&mut partial, width), |i, dx, dw| {
        let at = i * ROWS * width;
        backward_rows(&dy[at..][..dx.len()], &x[at..][..dx.len()], w, &rstd[i * ROWS..], dx, dw);
    });
    let mut dw = device.zeros::<T>(width);
    for row in partial.chunks_exact(width) {
        dw.iter_mut().zip(row).for_each(|(d, &p)| *d += p);
    }
    dw
}
