//! Large products of bf16 operands: the layout is that of the f32 product with pairs of neighbours along k in place of
//! single elements, B in panels [k / 2, 32], A as [m, k / 2] or, transposed, [k / 2, m], packed by each task.

use super::format::Format;
use crate::device::CpuNumber;
use crate::device::cpu::kernel_bf16::Bf16Kernels;
use crate::device::cpu::kernel_f32::{NR, Operands};
use crate::device::cpu::matrix::MatRef;

/// Pairs of neighbours along the inner axis.
pub(crate) struct Bf16Format<'a, T> {
    /// What makes and multiplies them.
    pub kernels: Bf16Kernels<T>,
    /// As long as a row of either operand: what an odd last row pairs with.
    pub zeros: &'a [T],
}

impl<T: CpuNumber> Format<T> for Bf16Format<'_, T> {
    const PACK: usize = 2;

    fn panel_width(&self) -> usize {
        NR
    }

    fn pack_b(&self, b: MatRef<T>, k: usize, n: usize, out: &mut [T]) {
        let kp = k.div_ceil(2);
        let (n, panel_stride) = ((out.len() / kp).min(n), kp * NR);
        if b.col_stride == 1 {
            self.kernels.pack_rows(b, (k, n), self.zeros, out, panel_stride);
        } else {
            self.kernels.pack_transposed(b.t(), (n, k), out, panel_stride);
        }
    }

    fn a_scratch(&self, _: MatRef<T>, m: usize, k: usize) -> usize {
        m * k.div_ceil(2)
    }

    fn pack_a<'a>(&self, a: MatRef<'a, T>, m: usize, k: usize, scratch: &'a mut [T]) -> MatRef<'a, T> {
        let kp = k.div_ceil(2);
        if a.col_stride == 1 {
            for (i, out) in scratch.chunks_exact_mut(kp).enumerate().take(m) {
                (self.kernels.pair_neighbours)(&a.data[i * a.row_stride..][..k], out);
            }
            return MatRef::rows(scratch, kp);
        }
        for (p, out) in scratch.chunks_exact_mut(m).enumerate().take(kp) {
            let row = |p: usize| if p < k { &a.data[p * a.col_stride..][..m] } else { &self.zeros[..m] };
            (self.kernels.pair_rows)(row(2 * p), row(2 * p + 1), out);
        }
        MatRef::rows(scratch, m).t()
    }

    unsafe fn run(&self, m: usize, n: usize, kp: usize, operands: Operands<T>) {
        // SAFETY: the caller's contract.
        unsafe { (self.kernels.multiply)(m, n, kp, operands) };
    }
}
