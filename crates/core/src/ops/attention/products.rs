//! The small products of block-wise attention, in the element type or in bf16 words, and the operands prepared for them.
//!
//! Scores are `[keys, rows]`: rows are lanes. Operands that enter as they are stay where they are.

use super::Dims;
use crate::device::CpuNumber;
use crate::device::kernel::COLS;
use crate::device::simd::LANES;
use crate::device::tile::{Mat, gemm, transpose_into};
use crate::device::words::{self, Words, pack_rows, pack_transposed};
use crate::device::{Buffer, CpuDevice};

/// Keys or values `[b, t, g, d]` as the left sides of products over d.
pub(super) struct Lefts<'a, T: CpuNumber> {
    words: Option<Buffer<T>>,
    elements: &'a [T],
    dims: Dims,
}

impl<'a, T: CpuNumber> Lefts<'a, T> {
    pub(super) fn new(device: &CpuDevice, words: Option<Words<T>>, x: &'a [T], dims: Dims) -> Self {
        let words = words.map(|words| {
            const ROWS: usize = 256;
            let (d, len) = (dims.d, dims.d.div_ceil(2));
            let mut data = device.alloc(dims.b * dims.t * dims.g * len);
            device.for_chunks(&mut data, ROWS * len, |i, out| {
                for (row, out) in x[i * ROWS * d..].chunks_exact(d).zip(out.chunks_exact_mut(len)) {
                    (words.along)(row, out);
                }
            });
            data
        });
        Lefts { words, elements: x, dims }
    }

    /// The rows from `token` on of one head.
    pub(super) fn from(&self, batch: usize, kv: usize, token: usize) -> Mat<'_, T> {
        let Dims { t, g, d, .. } = self.dims;
        let (data, len) = self.words.as_ref().map_or((self.elements, d), |words| (words, d.div_ceil(2)));
        Mat::rows(&data[((batch * t + token) * g + kv) * len..], g * len)
    }
}

/// Blocks of `width` rows of x `[b, t, g, d]` as the right sides of products over their rows: x itself, or panels of words
/// packed block by block, once a pass, so that every product reads them in order.
pub(super) struct Rights<'a, T: CpuNumber> {
    /// panels, their size a block, and the distance of two
    words: Option<(Buffer<T>, usize, usize)>,
    elements: &'a [T],
    dims: Dims,
    width: usize,
}

impl<'a, T: CpuNumber> Rights<'a, T> {
    pub(super) fn new(device: &CpuDevice, words: Option<Words<T>>, x: &'a [T], dims: Dims, width: usize) -> Self {
        let Dims { b, t, g, d, .. } = dims;
        let words = words.map(|words| {
            let (blocks, ld) = (t.div_ceil(width), width.div_ceil(2) * COLS);
            let size = d.div_ceil(COLS) * ld;
            let zeros = device.zeros::<T>(d);
            let mut data = device.alloc(b * g * blocks * size);
            device.for_chunks(&mut data, size, |i, out| {
                let (bg, first) = (i / blocks, i % blocks * width);
                let from = &x[(bg / g * t + first) * g * d + bg % g * d..];
                pack_rows(words, (from, g * d), (width.min(t - first), d), &zeros, out, ld);
            });
            (data, size, ld)
        });
        Rights { words, elements: x, dims, width }
    }

    /// A block of one head, and the distance of its rows or panels.
    pub(super) fn block(&self, batch: usize, kv: usize, block: usize) -> (&[T], usize) {
        let Dims { t, g, d, .. } = self.dims;
        match &self.words {
            Some((data, size, ld)) => {
                (&data[((batch * g + kv) * t.div_ceil(self.width) + block) * size..][..*size], *ld)
            }
            None => (&self.elements[((batch * t + block * self.width) * g + kv) * d..], g * d),
        }
    }
}

/// The products of a task, in the element type or in bf16 words: scores of up to `lanes` rows with up to `width` keys.
pub(super) struct Products<T: CpuNumber> {
    words: Option<Words<T>>,
    lanes: usize,
    d: usize,
    zeros: Buffer<T>,
    /// words of the scores and of a right side
    left: Buffer<T>,
    right: Buffer<T>,
}

impl<T: CpuNumber> Products<T> {
    pub(super) fn new(device: &CpuDevice, words: Option<Words<T>>, lanes: usize, width: usize, d: usize) -> Self {
        let n = |n: usize| if words.is_some() { n } else { 0 };
        Products {
            words,
            lanes,
            d,
            zeros: device.zeros(n(lanes.max(d))),
            left: device.alloc(n((width.div_ceil(2) * lanes).max(width * lanes.div_ceil(2)))),
            right: device.alloc(n(lanes.div_ceil(2) * d.next_multiple_of(COLS))),
        }
    }

    /// Size of what [`Products::columns`] writes.
    pub(super) fn columns_len(&self) -> usize {
        match self.words {
            None => self.d * self.lanes,
            Some(_) => self.lanes.div_ceil(COLS) * self.d.div_ceil(2) * COLS,
        }
    }

    /// Queries `[m, d]` as the columns of the right side of a product over d, zero up to a whole vector or panel of lanes.
    pub(super) fn columns(&self, rows: &[T], out: &mut [T]) {
        let (d, m) = (self.d, rows.len() / self.d);
        match self.words {
            None => transpose_into(rows, m, d, d, out, (m.next_multiple_of(LANES), self.lanes)),
            Some(words) => {
                let ld = d.div_ceil(2) * COLS;
                pack_transposed(words, (rows, d), (m, d), &mut out[..m.div_ceil(COLS) * ld], ld);
            }
        }
    }

    /// `c = a b` over d: `keys` rows by n of the lanes. a as [`Lefts`] gives it, b as [`Products::columns`].
    pub(super) fn over_d(&self, (keys, n): (usize, usize), a: Mat<T>, b: &[T], c: &mut [T]) {
        let ld = self.lanes;
        match self.words {
            None => gemm(keys, n, self.d, a, b, ld, c, ld, false),
            Some(w) => {
                let k = self.d.div_ceil(2);
                words::gemm(w, (keys, n, k), a, (b, k * COLS), c, ld, false);
            }
        }
    }

    /// `c (+)= x^T b` over the keys of x `[keys, lanes]`: m rows of d. b as [`Rights`] gives it.
    pub(super) fn over_keys(&mut self, (m, keys): (usize, usize), x: &[T], b: (&[T], usize), c: &mut [T], add: bool) {
        let (n, d) = (self.lanes, self.d);
        let Some(words) = self.words else {
            return gemm(m, d, keys, Mat::rows(x, n).t(), b.0, b.1, c, d, add);
        };
        let pairs = keys.div_ceil(2);
        for (p, out) in self.left.chunks_exact_mut(n).enumerate().take(pairs) {
            let second = if 2 * p + 1 < keys { &x[(2 * p + 1) * n..][..m] } else { &self.zeros[..m] };
            (words.across)(&x[2 * p * n..][..m], second, &mut out[..m]);
        }
        words::gemm(words, (m, d, pairs), Mat::rows(&self.left, n).t(), b, c, d, add);
    }

    /// `c += x y` over the rows: x `[keys, lanes]`, y `[m, d]`.
    pub(super) fn over_rows(&mut self, keys: usize, x: &[T], y: &[T], c: &mut [T]) {
        let (n, d) = (self.lanes, self.d);
        let m = y.len() / d;
        let Some(words) = self.words else { return gemm(keys, d, m, Mat::rows(x, n), y, d, c, d, true) };
        let (pairs, half) = (m.div_ceil(2), n.div_ceil(2));
        for (x, out) in x.chunks_exact(n).zip(self.left.chunks_exact_mut(half)).take(keys) {
            (words.along)(&x[..m], &mut out[..pairs]);
        }
        let ld = pairs * COLS;
        pack_rows(words, (y, d), (m, d), &self.zeros, &mut self.right, ld);
        words::gemm(words, (keys, d, pairs), Mat::rows(&self.left, half), (&self.right, ld), c, d, true);
    }
}
