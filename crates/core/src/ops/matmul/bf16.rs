//! Large products of bf16 operands: the layout is that of the f32 product with words of two neighbours along k in place of
//! single elements, B in panels [k / 2, 32], A as [rows, k / 2] or, transposed, [k / 2, rows], packed by each task.

use super::cpu::Operands;
use crate::device::kernel::{Block, COLS};
use crate::device::tile::Mat;
use crate::device::words::{Words, pack_rows, pack_transposed};
use crate::storage::Real;

/// Operands of [m, k] times [k, n]. One of the strides of each is 1.
pub(super) struct Pairs<'a, T> {
    pub words: Words<T>,
    pub n: usize,
    pub k: usize,
    pub a: Mat<'a, T>,
    pub b: Mat<'a, T>,
    /// as long as a row of either operand: what an odd last row pairs with
    pub zeros: &'a [T],
}

impl<T: Real> Operands<T> for Pairs<'_, T> {
    const COPIES: bool = true;

    fn words(&self) -> usize {
        self.k.div_ceil(2)
    }

    fn panels(&self, first: usize, p0: usize, depth: usize, out: &mut [T]) {
        let Mat { data, row, col } = self.b;
        let (inner, ld) = ((2 * depth).min(self.k - 2 * p0), depth * COLS);
        let columns = (out.len() / depth).min(self.n - first);
        if col == 1 {
            pack_rows(self.words, (&data[2 * p0 * row + first..], row), (inner, columns), self.zeros, out, ld);
        } else {
            pack_transposed(self.words, (&data[2 * p0 + first * col..], col), (columns, inner), out, ld);
        }
    }

    fn left<'a>(&'a self, i0: usize, rows: usize, p0: usize, depth: usize, scratch: &'a mut [T]) -> Mat<'a, T> {
        let Mat { data, row, col } = self.a;
        let (p0, inner) = (2 * p0, (2 * depth).min(self.k - 2 * p0));
        if col == 1 {
            for (i, out) in scratch.chunks_exact_mut(depth).enumerate().take(rows) {
                (self.words.along)(&data[(i0 + i) * row + p0..][..inner], out);
            }
            return Mat { data: scratch, row: depth, col: 1 };
        }
        for (p, out) in scratch.chunks_exact_mut(rows).enumerate().take(depth) {
            let at = |p: usize| if p < inner { &data[(p0 + p) * col + i0..][..rows] } else { &self.zeros[..rows] };
            (self.words.across)(at(2 * p), at(2 * p + 1), out);
        }
        Mat { data: scratch, row: 1, col: rows }
    }

    unsafe fn run(&self, rows: usize, cols: usize, depth: usize, block: Block<T>) {
        // SAFETY: the caller's contract.
        unsafe { (self.words.multiply)(rows, cols, depth, block) };
    }
}
