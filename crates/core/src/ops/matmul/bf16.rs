//! Large products of bf16 operands: the layout is that of the f32 product with words of two neighbours along k in place of
//! single elements, B in panels [k / 2, 32], A as [rows, k / 2] or, transposed, [k / 2, rows], packed by each task.

use super::cpu::Format;
use crate::device::CpuNumber;
use crate::device::kernel::{Block, COLS};
use crate::device::tile::Mat;
use crate::device::words::{Words, pack_rows, pack_transposed};

/// Pairs of neighbours along the inner axis.
pub(crate) struct Pairs<'a, T> {
    /// What makes and multiplies them.
    pub words: Words<T>,
    /// As long as a row of either operand: what an odd last row pairs with.
    pub zeros: &'a [T],
}

impl<T: CpuNumber> Format<T> for Pairs<'_, T> {
    const WORD: usize = 2;

    fn width(&self) -> usize {
        COLS
    }

    fn panels(&self, b: Mat<T>, inner: usize, columns: usize, out: &mut [T]) {
        let depth = inner.div_ceil(2);
        let (columns, ld) = ((out.len() / depth).min(columns), depth * COLS);
        if b.col == 1 {
            pack_rows(self.words, (b.data, b.row), (inner, columns), self.zeros, out, ld);
        } else {
            pack_transposed(self.words, (b.data, b.col), (columns, inner), out, ld);
        }
    }

    fn scratch(&self, _: Mat<T>, rows: usize, inner: usize) -> usize {
        rows * inner.div_ceil(2)
    }

    fn left<'a>(&self, a: Mat<'a, T>, rows: usize, inner: usize, scratch: &'a mut [T]) -> Mat<'a, T> {
        let depth = inner.div_ceil(2);
        if a.col == 1 {
            for (i, out) in scratch.chunks_exact_mut(depth).enumerate().take(rows) {
                (self.words.along)(&a.data[i * a.row..][..inner], out);
            }
            return Mat { data: scratch, row: depth, col: 1 };
        }
        for (p, out) in scratch.chunks_exact_mut(rows).enumerate().take(depth) {
            let at = |p: usize| if p < inner { &a.data[p * a.col..][..rows] } else { &self.zeros[..rows] };
            (self.words.across)(at(2 * p), at(2 * p + 1), out);
        }
        Mat { data: scratch, row: 1, col: rows }
    }

    unsafe fn run(&self, rows: usize, cols: usize, depth: usize, block: Block<T>) {
        // SAFETY: the caller's contract.
        unsafe { (self.words.multiply)(rows, cols, depth, block) };
    }
}
