//! Small matrix products on data that is already in cache: the inner loops of the attention rooms.
//!
//! One C element is one chain of fused multiply-adds over the inner index in ascending order, whatever the blocking, so
//! a row's result does not depend on which rows it is computed with.

use super::kernel::{Block, ROWS, SIDE};
use super::simd::{self, simd};
use crate::device::CpuNumber;

/// A strided read-only matrix: element (i, p) is `data[i * row + p * col]`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    /// Elements.
    pub data: &'a [T],
    /// Distance of rows.
    pub row: usize,
    /// Distance of columns.
    pub col: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major with `row` elements from one row to the next.
    pub fn rows(data: &'a [T], row: usize) -> Self {
        Mat { data, row, col: 1 }
    }
    /// The transpose.
    pub fn t(self) -> Self {
        Mat { data: self.data, row: self.col, col: self.row }
    }
    /// What begins at element (i, p).
    pub fn from(self, i: usize, p: usize) -> Self {
        Mat { data: &self.data[i * self.row + p * self.col..], ..self }
    }
}

#[inline(always)]
fn block<T: CpuNumber, const M: usize, const N: usize>(
    k: usize,
    a: Mat<T>,
    b: &[T],
    ldb: usize,
    c: &mut [T],
    ldc: usize,
    add: bool,
) {
    let mut acc = [[T::ZERO; N]; M];
    if add {
        for i in 0..M {
            acc[i].copy_from_slice(&c[i * ldc..][..N]);
        }
    }
    // One bounds check for the whole block instead of one per element.
    let a_need = if k == 0 { 0 } else { (M - 1) * a.row + (k - 1) * a.col + 1 };
    let data = &a.data[..a_need];
    for p in 0..k {
        let b: &[T; N] = b[p * ldb..][..N].try_into().expect("N elements");
        for i in 0..M {
            // SAFETY: i < M and p < k, so the index is below a_need, which was sliced above.
            let x = unsafe { *data.get_unchecked(i * a.row + p * a.col) };
            for j in 0..N {
                acc[i][j] = x.mul_add(b[j], acc[i][j]);
            }
        }
    }
    for i in 0..M {
        c[i * ldc..][..N].copy_from_slice(&acc[i]);
    }
}

#[inline(always)]
fn tail<T: CpuNumber>(
    m: usize,
    n: usize,
    k: usize,
    a: Mat<T>,
    b: &[T],
    ldb: usize,
    c: &mut [T],
    ldc: usize,
    add: bool,
) {
    for i in 0..m {
        let row = &mut c[i * ldc..][..n];
        if !add {
            row.fill(T::ZERO);
        }
        for p in 0..k {
            let x = a.data[i * a.row + p * a.col];
            for (c, &b) in row.iter_mut().zip(&b[p * ldb..][..n]) {
                *c = x.mul_add(b, *c);
            }
        }
    }
}

#[inline(always)]
fn columns<T: CpuNumber, const N: usize>(
    m: usize,
    k: usize,
    a: Mat<T>,
    b: &[T],
    ldb: usize,
    c: &mut [T],
    ldc: usize,
    add: bool,
) {
    let mut i = 0;
    while i + ROWS <= m {
        block::<T, ROWS, N>(k, Mat { data: &a.data[i * a.row..], ..a }, b, ldb, &mut c[i * ldc..], ldc, add);
        i += ROWS;
    }
    while i + 4 <= m {
        block::<T, 4, N>(k, Mat { data: &a.data[i * a.row..], ..a }, b, ldb, &mut c[i * ldc..], ldc, add);
        i += 4;
    }
    while i < m {
        block::<T, 1, N>(k, Mat { data: &a.data[i * a.row..], ..a }, b, ldb, &mut c[i * ldc..], ldc, add);
        i += 1;
    }
}

simd! {
    /// [`gemm`] without a hand-written kernel: f64, and processors without one.
    fn portable<T>(m: usize, n: usize, k: usize, a: Mat<T>, b: &[T], ldb: usize, c: &mut [T], ldc: usize, add: bool) {
        if k == 0 {
            for i in 0..if add { 0 } else { m } {
                c[i * ldc..][..n].fill(T::ZERO);
            }
            return;
        }
        let mut j = 0;
        while j + 32 <= n {
            columns::<T, 32>(m, k, a, &b[j..], ldb, &mut c[j..], ldc, add);
            j += 32;
        }
        while j + 16 <= n {
            columns::<T, 16>(m, k, a, &b[j..], ldb, &mut c[j..], ldc, add);
            j += 16;
        }
        while j + 8 <= n {
            columns::<T, 8>(m, k, a, &b[j..], ldb, &mut c[j..], ldc, add);
            j += 8;
        }
        if j < n && m > 0 {
            tail(m, n - j, k, a, &b[j..], ldb, &mut c[j..], ldc, add);
        }
    }
}

/// `c = a b` or `c += a b`: a [m, k] with any strides, b [k, n] and c [m, n] with contiguous rows `ldb` and `ldc` apart.
#[inline]
pub fn gemm<T: CpuNumber>(
    m: usize,
    n: usize,
    k: usize,
    a: Mat<T>,
    b: &[T],
    ldb: usize,
    c: &mut [T],
    ldc: usize,
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    let level = simd::level();
    if k == 0 || !T::has_kernel(level) {
        return portable(m, n, k, a, b, ldb, c, ldc, add);
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "a holds [{m}, {k}]");
    assert!(b.len() >= (k - 1) * ldb + n, "b holds [{k}, {n}]");
    assert!(c.len() >= (m - 1) * ldc + n, "c holds [{m}, {n}]");
    let (a_at, b_at, c_at) = (a.data.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    let block = Block { a: a_at, row: a.row, col: a.col, b: b_at, ldb, c: c_at, ldc, add, cold: false };
    // SAFETY: the asserts bound every element of [m, k], [k, n] and [m, n], and C is borrowed mutably.
    unsafe { T::kernel(level, m, n, k, block) };
}

simd! {
    /// Writes the transpose of `rows` rows of width `cols`, `stride` apart, as [cols, width], zero past the last row; lines
    /// are `ld` apart.
    pub fn transpose_into<T>(src: &[T], rows: usize, cols: usize, stride: usize, out: &mut [T], to: (usize, usize)) {
        let (width, ld) = to;
        // 16 x 16 elements at a time, through registers: every line is read and written once
        for i0 in (0..width).step_by(SIDE) {
            let (columns, here) = (SIDE.min(width - i0), SIDE.min(rows.saturating_sub(i0)));
            for p0 in (0..cols).step_by(SIDE) {
                let lines = SIDE.min(cols - p0);
                let square: [[T; SIDE]; SIDE];
                let (from, apart) = if (here, lines) == (SIDE, SIDE) {
                    (&src[i0 * stride + p0..], stride)
                } else {
                    square = std::array::from_fn(|i| {
                        let mut row = [T::ZERO; SIDE];
                        if i < here {
                            let from = &src[(i0 + i) * stride + p0..][..lines];
                            match from.first_chunk() {
                                Some(from) => row = *from,
                                None => row[..lines].copy_from_slice(from),
                            }
                        }
                        row
                    });
                    (square.as_flattened(), SIDE)
                };
                let to = &mut out[p0 * ld + i0..];
                if (columns, lines) == (SIDE, SIDE) {
                    let reaches = |apart: usize| (SIDE - 1) * apart + SIDE;
                    assert!(from.len() >= reaches(apart) && to.len() >= reaches(ld), "16 rows of 16");
                    // SAFETY: the assert bounds every row; the level is this processor's.
                    if unsafe { T::transpose(simd::level(), from.as_ptr(), apart, to.as_mut_ptr(), ld) } {
                        continue;
                    }
                }
                for p in 0..lines {
                    let line: [T; SIDE] = std::array::from_fn(|i| from[i * apart + p]);
                    to[p * ld..][..columns].copy_from_slice(&line[..columns]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn gemm_agrees_with_the_triple_loop_at_every_edge() {
        agrees::<f32>();
        agrees::<f64>();
    }

    #[test]
    fn transposes_every_shape_and_fills_with_zeros() {
        for (rows, cols, width, ld) in
            [(16, 16, 16, 16), (32, 40, 32, 33), (17, 33, 48, 48), (3, 5, 7, 9), (0, 4, 32, 32), (31, 16, 32, 64)]
        {
            let stride = cols + 3;
            let src: Vec<f32> = (0..rows * stride).map(|i| 1.0 + i as f32).collect();
            let mut out = vec![f32::INFINITY; cols * ld];
            transpose_into(&src, rows, cols, stride, &mut out, (width, ld));
            for p in 0..cols {
                for i in 0..ld {
                    let past = if i < width { 0.0 } else { f32::INFINITY };
                    let want = if i < rows { src[i * stride + p] } else { past };
                    assert_eq!(out[p * ld + i], want, "{rows} x {cols} at {p}, {i}");
                }
            }
        }
    }

    fn agrees<T: CpuNumber>() {
        let mut rng = Rng::new(1);
        for (m, n, k) in
            [(1, 1, 1), (3, 5, 2), (8, 32, 16), (9, 33, 7), (13, 63, 8), (17, 97, 5), (4, 24, 0), (20, 49, 33)]
        {
            for transposed in [false, true] {
                for add in [false, true] {
                    let a: Vec<T> = (0..m * k).map(|_| T::of(rng.normal())).collect();
                    let b: Vec<T> = (0..k * (n + 3)).map(|_| T::of(rng.normal())).collect();
                    let start: Vec<T> = (0..m * (n + 1)).map(|_| T::of(rng.normal())).collect();
                    let mat = if transposed { Mat::rows(&a, m).t() } else { Mat::rows(&a, k) };
                    let mut c = start.clone();
                    gemm(m, n, k, mat, &b, n + 3, &mut c, n + 1, add);
                    for i in 0..m {
                        for j in 0..n {
                            let mut want = if add { start[i * (n + 1) + j] } else { T::ZERO };
                            for p in 0..k {
                                want = a[i * mat.row + p * mat.col].mul_add(b[p * (n + 3) + j], want);
                            }
                            assert_eq!(c[i * (n + 1) + j], want, "{m} {n} {k} at {i},{j}");
                        }
                        assert_eq!(c[i * (n + 1) + n], start[i * (n + 1) + n], "the gap between rows is not touched");
                    }
                }
            }
        }
    }
}
