//! Small matrix products on data that is already in cache: the inner loops of the attention ops.
//!
//! One C element is one chain of fused multiply-adds over the inner index in ascending order, whatever the blocking, so
//! a row's result does not depend on which rows it is computed with.

use super::kernel_f32::{MR, Operands};
use super::level::level;
use super::matrix::{MatMut, MatRef};
use super::simd::simd;
use crate::device::{CpuNumber, Gemm};

impl Gemm {
    /// Computes it on one thread: a with any strides, b with contiguous rows.
    ///
    /// # Panics
    /// When an operand is too small, or b's rows are not contiguous.
    #[inline]
    pub(crate) fn run<T: CpuNumber>(self, a: MatRef<T>, b: MatRef<T>, c: MatMut<T>) {
        let Gemm { m, n, k, accumulate } = self;
        if m == 0 || n == 0 {
            return;
        }
        assert!(b.col_stride == 1, "b has contiguous rows");
        let level = level();
        if k == 0 || !T::has_kernel(level) {
            return portable(self, a, b, c);
        }
        a.assert_holds("a", m, k);
        b.assert_holds("b", k, n);
        c.assert_holds("c", m, n);
        let operands = Operands {
            a: a.data.as_ptr(),
            rs_a: a.row_stride,
            cs_a: a.col_stride,
            b: b.data.as_ptr(),
            rs_b: b.row_stride,
            c: c.data.as_mut_ptr(),
            rs_c: c.row_stride,
            accumulate: accumulate.adds(),
            prefetch: false,
        };
        // SAFETY: the asserts bound every element of [m, k], [k, n] and [m, n], and C is borrowed mutably.
        unsafe { T::kernel(level, m, n, k, operands) };
    }
}

/// M rows by N columns of C in registers.
#[inline(always)]
fn register_block<T: CpuNumber, const M: usize, const N: usize>(
    k: usize,
    a: MatRef<T>,
    b: MatRef<T>,
    c: MatMut<T>,
    accumulate: bool,
) {
    let mut acc = [[T::ZERO; N]; M];
    if accumulate {
        for (i, acc) in acc.iter_mut().enumerate() {
            acc.copy_from_slice(&c.data[i * c.row_stride..][..N]);
        }
    }
    // one check of bounds for all of A instead of one per element
    a.assert_holds("a", M, k);
    for p in 0..k {
        let b: &[T; N] = b.data[p * b.row_stride..][..N].try_into().expect("N elements");
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: i < M and p < k, and a holds [M, k].
            let x = unsafe { *a.data.get_unchecked(i * a.row_stride + p * a.col_stride) };
            for (acc, &b) in acc.iter_mut().zip(b) {
                *acc = x.mul_add(b, *acc);
            }
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        c.data[i * c.row_stride..][..N].copy_from_slice(acc);
    }
}

/// Fewer columns than the narrowest register block.
#[inline(always)]
fn narrow<T: CpuNumber>(gemm: Gemm, a: MatRef<T>, b: MatRef<T>, c: MatMut<T>) {
    let Gemm { m, n, k, accumulate } = gemm;
    for i in 0..m {
        let row = &mut c.data[i * c.row_stride..][..n];
        if !accumulate.adds() {
            row.fill(T::ZERO);
        }
        for p in 0..k {
            let x = a.data[i * a.row_stride + p * a.col_stride];
            for (c, &b) in row.iter_mut().zip(&b.data[p * b.row_stride..][..n]) {
                *c = x.mul_add(b, *c);
            }
        }
    }
}

/// N columns of C, as many rows at a time as there are.
#[inline(always)]
fn columns<T: CpuNumber, const N: usize>(gemm: Gemm, a: MatRef<T>, b: MatRef<T>, c: MatMut<T>) {
    let (Gemm { m, k, .. }, accumulate) = (gemm, gemm.accumulate.adds());
    let MatMut { data: c, row_stride } = c;
    let mut i = 0;
    while i + MR <= m {
        let c = MatMut::rows(&mut c[i * row_stride..], row_stride);
        register_block::<T, MR, N>(k, a.from(i, 0), b, c, accumulate);
        i += MR;
    }
    while i + 4 <= m {
        let c = MatMut::rows(&mut c[i * row_stride..], row_stride);
        register_block::<T, 4, N>(k, a.from(i, 0), b, c, accumulate);
        i += 4;
    }
    while i < m {
        let c = MatMut::rows(&mut c[i * row_stride..], row_stride);
        register_block::<T, 1, N>(k, a.from(i, 0), b, c, accumulate);
        i += 1;
    }
}

simd! {
    /// [`Gemm::run`] without a hand-written kernel: f64, and processors without one.
    fn portable<T>(gemm: Gemm, a: MatRef<T>, b: MatRef<T>, c: MatMut<T>) {
        let Gemm { m, n, k, accumulate } = gemm;
        let MatMut { data: c, row_stride } = c;
        if k == 0 {
            if !accumulate.adds() {
                (0..m).for_each(|i| c[i * row_stride..][..n].fill(T::ZERO));
            }
            return;
        }
        let mut j = 0;
        while j + 32 <= n {
            columns::<T, 32>(gemm, a, b.from(0, j), MatMut::rows(&mut c[j..], row_stride));
            j += 32;
        }
        while j + 16 <= n {
            columns::<T, 16>(gemm, a, b.from(0, j), MatMut::rows(&mut c[j..], row_stride));
            j += 16;
        }
        while j + 8 <= n {
            columns::<T, 8>(gemm, a, b.from(0, j), MatMut::rows(&mut c[j..], row_stride));
            j += 8;
        }
        if j < n && m > 0 {
            narrow(Gemm { n: n - j, ..gemm }, a, b.from(0, j), MatMut::rows(&mut c[j..], row_stride));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Accumulate;
    use crate::rng::Rng;

    #[test]
    fn gemm_agrees_with_the_triple_loop_at_every_edge() {
        agrees::<f32>();
        agrees::<f64>();
    }

    fn agrees<T: CpuNumber>() {
        let mut rng = Rng::new(1);
        for (m, n, k) in
            [(1, 1, 1), (3, 5, 2), (8, 32, 16), (9, 33, 7), (13, 63, 8), (17, 97, 5), (4, 24, 0), (20, 49, 33)]
        {
            for (transposed, accumulate) in [(false, false), (false, true), (true, false), (true, true)] {
                let a: Vec<T> = (0..m * k).map(|_| T::of(rng.normal())).collect();
                let b: Vec<T> = (0..k * (n + 3)).map(|_| T::of(rng.normal())).collect();
                let start: Vec<T> = (0..m * (n + 1)).map(|_| T::of(rng.normal())).collect();
                let mat = if transposed { MatRef::rows(&a, m).t() } else { MatRef::rows(&a, k) };
                let mut c = start.clone();
                let gemm = Gemm { m, n, k, accumulate: Accumulate::existing_if(accumulate) };
                gemm.run(mat, MatRef::rows(&b, n + 3), MatMut::rows(&mut c, n + 1));
                for i in 0..m {
                    for j in 0..n {
                        let mut want = if accumulate { start[i * (n + 1) + j] } else { T::ZERO };
                        for p in 0..k {
                            want = a[i * mat.row_stride + p * mat.col_stride].mul_add(b[p * (n + 3) + j], want);
                        }
                        assert_eq!(c[i * (n + 1) + j], want, "{m} {n} {k} at {i},{j}");
                    }
                    assert_eq!(c[i * (n + 1) + n], start[i * (n + 1) + n], "the gap between rows is not touched");
                }
            }
        }
    }

    /// An operand that is too small is refused, also where its extent wraps around to one that would fit.
    #[test]
    fn operands_that_are_too_small_are_refused() {
        let refused = |gemm: Gemm, a: (usize, usize), b: usize, c: usize| {
            std::panic::catch_unwind(|| {
                let (x, mut y) = (vec![0.0f32; 64], vec![0.0f32; 64]);
                let a = MatRef { data: &x, row_stride: a.0, col_stride: a.1 };
                gemm.run(a, MatRef::rows(&x, b), MatMut::rows(&mut y, c));
            })
            .is_err()
        };
        let half = 1 << (usize::BITS - 1);
        assert!(!refused(Gemm::new(4, 16, 4), (4, 1), 16, 16));
        assert!(refused(Gemm::new(4, 17, 4), (4, 1), 16, 16));
        assert!(refused(Gemm::new(3, 16, 1), (half, 1), 16, 16));
        assert!(refused(Gemm::new(1, 16, 3), (1, half), 16, 16));
        assert!(refused(Gemm::new(1, 16, 3), (3, 1), half, 16));
        assert!(refused(Gemm::new(3, 16, 1), (1, 1), 16, half));
    }
}
