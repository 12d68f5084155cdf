use super::sigmoid;
use crate::device::cpu::matrix::{MatMut, MatRef};
use crate::device::cpu::simd::simd;
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber, Gemm};
use crate::number::Compute;
use crate::ops::matmul::gemm;

simd! {
    /// h in the place of gate.
    fn activate<T>(gate: &mut [T], up: &[T]) {
        for (g, &u) in gate.iter_mut().zip(up) {
            *g = *g * sigmoid(*g) * u;
        }
    }
}

/// y `[rows, c]` of so few rows that packing the weights would take longer than the products.
pub fn few<T: CpuNumber>(
    device: &CpuDevice,
    (rows, c, f): super::Extents,
    x: &[T],
    [gate, up, down]: [&[T]; 3],
    residual: Option<&[T]>,
) -> Buffer<T> {
    let product = |x: &[T], w: &[T], (k, n): (usize, usize), accumulate: Accumulate<&[T]>| {
        let mut y = device.alloc::<T>(rows * n);
        let (a, b) = (MatRef::rows(x, k), MatRef::rows(w, k).t());
        gemm(device, Compute::Full, Gemm::new(rows, n, k).with(accumulate), a, b, MatMut::rows(&mut y, n));
        y
    };
    let (mut h, up) = (product(x, gate, (c, f), Accumulate::Overwrite), product(x, up, (c, f), Accumulate::Overwrite));
    activate(&mut h, &up);
    product(&h, down, (f, c), residual.map_or(Accumulate::Overwrite, Accumulate::Residual))
}
