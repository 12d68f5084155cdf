//! The small products of block-wise attention, in the element type or in bf16 words, and the right sides packed for them.
//!
//! A right side is packed block by block, once a pass, so that every product reads it in order. In the element type,
//! blocks that enter as they are stay where they are.

use super::Dims;
use crate::device::kernel::COLS;
use crate::device::tile::{Mat, gemm, transpose_into};
use crate::device::words::{self, Words, pack_rows, pack_transposed};
use crate::device::{Buffer, CpuDevice};
use crate::storage::Real;

/// Blocks of `width` rows of x `[b, t, g, d]` as the right sides of products, `[b, g, blocks, size]`: f32 and f64 rows of the
/// inner axis, or panels of words, `ld` apart.
pub(super) struct Right<T: Real> {
    data: Buffer<T>,
    blocks: usize,
    size: usize,
    ld: usize,
}

impl<T: Real> Right<T> {
    fn new(
        device: &CpuDevice,
        (x, dims): (&[T], Dims),
        width: usize,
        (size, ld): (usize, usize),
        pack: impl Fn(&[T], usize, usize, &mut [T]) + Sync + Send,
    ) -> Self {
        let Dims { b, t, g, d, .. } = dims;
        let blocks = t.div_ceil(width);
        let mut data = device.alloc(b * g * blocks * size);
        device.for_chunks(&mut data, size, |i, out| {
            let (bg, first) = (i / blocks, i % blocks * width);
            pack(&x[(bg / g * t + first) * g * d + bg % g * d..], g * d, width.min(t - first), out);
        });
        Right { data, blocks, size, ld }
    }

    /// For products with the transpose of a block: over d.
    pub(super) fn transposed(device: &CpuDevice, words: Option<Words<T>>, x: &[T], dims: Dims, width: usize) -> Self {
        let d = dims.d;
        match words {
            None => Self::new(device, (x, dims), width, (d * width, width), |src, stride, rows, out| {
                transpose_into(src, rows, d, stride, out, width);
            }),
            Some(words) => {
                let ld = d.div_ceil(2) * COLS;
                Self::new(device, (x, dims), width, (width.div_ceil(COLS) * ld, ld), |src, stride, rows, out| {
                    pack_transposed(words, (src, stride), (rows, d), out, ld);
                })
            }
        }
    }

    /// For products with a block itself, over its rows. Without words it is read in place.
    pub(super) fn rows(device: &CpuDevice, words: Words<T>, x: &[T], dims: Dims, width: usize) -> Self {
        let (d, ld) = (dims.d, width.div_ceil(2) * COLS);
        let zeros = device.zeros::<T>(d);
        Self::new(device, (x, dims), width, (d.div_ceil(COLS) * ld, ld), |src, stride, rows, out| {
            pack_rows(words, (src, stride), (rows, d), &zeros, out, ld);
        })
    }

    pub(super) fn block(&self, bg: usize, block: usize) -> (&[T], usize) {
        (&self.data[(bg * self.blocks + block) * self.size..][..self.size], self.ld)
    }
}

/// The products of a task, in the element type or in bf16 words.
pub(super) struct Products<T: Real> {
    words: Option<Words<T>>,
    zeros: Buffer<T>,
    /// words of the left sides and of a gathered right side
    left: Buffer<T>,
    right: Buffer<T>,
}

impl<T: Real> Products<T> {
    /// For up to `rows` gathered rows of `d` elements on blocks of `width`.
    pub(super) fn new(device: &CpuDevice, words: Option<Words<T>>, (rows, width, d): (usize, usize, usize)) -> Self {
        let n = |n: usize| if words.is_some() { n } else { 0 };
        let pairs = rows.div_ceil(2);
        Products {
            words,
            zeros: device.zeros(n(width.max(d))),
            left: device.alloc(n((rows * width.div_ceil(2)).max(pairs * width))),
            right: device.alloc(n(pairs * d.next_multiple_of(COLS))),
        }
    }

    /// Memory for `n` words or elements that only products of words need; empty for others.
    pub(super) fn room(&self, device: &CpuDevice, n: usize) -> Buffer<T> {
        device.alloc(if self.words.is_some() { n } else { 0 })
    }

    /// Length of a row of `n` elements as a left side.
    pub(super) fn len(&self, n: usize) -> usize {
        if self.words.is_some() { n.div_ceil(2) } else { n }
    }

    /// Rows of `n` elements as left sides of products over n, for many of them: `rows` itself where they are.
    pub(super) fn lefts<'a>(&self, rows: &'a [T], n: usize, out: &'a mut [T]) -> &'a [T] {
        let Some(words) = self.words else { return rows };
        for (row, out) in rows.chunks_exact(n).zip(out.chunks_exact_mut(n.div_ceil(2))) {
            (words.along)(row, out);
        }
        out
    }

    /// `c (+)= a b` over k elements; a and b are left and right sides made for it.
    pub(super) fn multiply(
        &self,
        (m, n, k): (usize, usize, usize),
        a: Mat<T>,
        b: (&[T], usize),
        c: &mut [T],
        ldc: usize,
        add: bool,
    ) {
        match self.words {
            None => gemm(m, n, k, a, b.0, b.1, c, ldc, add),
            Some(w) => words::gemm(w, (m, n, k.div_ceil(2)), a, b, c, ldc, add),
        }
    }

    /// `c (+)= x b` over the first `keys` of the rows of x, which are `width` apart.
    pub(super) fn over_keys(
        &mut self,
        (m, n, keys): (usize, usize, usize),
        (x, width): (&[T], usize),
        b: (&[T], usize),
        c: &mut [T],
        add: bool,
    ) {
        let Some(words) = self.words else { return gemm(m, n, keys, Mat::rows(x, width), b.0, b.1, c, n, add) };
        let half = width.div_ceil(2);
        for (x, out) in x.chunks_exact(width).zip(self.left.chunks_exact_mut(half)).take(m) {
            (words.along)(&x[..keys], &mut out[..keys.div_ceil(2)]);
        }
        words::gemm(words, (m, n, keys.div_ceil(2)), Mat::rows(&self.left, half), b, c, n, add);
    }

    /// `c += x^T y` over m rows: x `width` apart, of which `keys` columns count, and y `[m, d]`.
    pub(super) fn over_rows(
        &mut self,
        (keys, d, m): (usize, usize, usize),
        (x, width): (&[T], usize),
        y: &[T],
        c: &mut [T],
    ) {
        let Some(words) = self.words else { return gemm(keys, d, m, Mat::rows(x, width).t(), y, d, c, d, true) };
        let pairs = m.div_ceil(2);
        for (p, out) in self.left.chunks_exact_mut(width).enumerate().take(pairs) {
            let row = |r: usize| if r < m { &x[r * width..][..keys] } else { &self.zeros[..keys] };
            (words.across)(row(2 * p), row(2 * p + 1), &mut out[..keys]);
        }
        let ld = pairs * COLS;
        pack_rows(words, (y, d), (m, d), &self.zeros, &mut self.right, ld);
        let left = Mat { data: &self.left, row: 1, col: width };
        words::gemm(words, (keys, d, pairs), left, (&self.right, ld), c, d, true);
    }
}
