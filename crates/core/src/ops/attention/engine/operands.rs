//! The small products of block-wise attention, in the element type or in pairs of bf16, and the operands prepared for them.
//!
//! Scores are `[keys, lanes]`: a lane is a row, one (query, head) pair. In the element type, operands stay where they are.

use crate::device::cpu::kernel_bf16::Bf16Kernels;
use crate::device::cpu::kernel_f32::NR;
use crate::device::cpu::matrix::{MatMut, MatRef, Panels};
use crate::device::cpu::simd::LANES;
use crate::device::cpu::transpose::transpose_into;
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber, Gemm, NoResidual};
use crate::ops::attention::Dims;

/// Keys or values `[b, t, g, d]` as the left operands of products over d.
pub(super) struct LhsRows<'a, T: CpuNumber> {
    /// `[b, t, g, d / 2]`
    pairs: Option<Buffer<T>>,
    elements: &'a [T],
    dims: Dims,
}

impl<'a, T: CpuNumber> LhsRows<'a, T> {
    pub(super) fn new(device: &CpuDevice, bf16: Option<Bf16Kernels<T>>, x: &'a [T], dims: Dims) -> Self {
        let pairs = bf16.map(|kernels| {
            const TASK_ROWS: usize = 256;
            let (d, len) = (dims.d, dims.d.div_ceil(2));
            let mut pairs = device.alloc(dims.b * dims.t * dims.g * len);
            device.for_pieces(&mut pairs, TASK_ROWS * len, |i, out| {
                for (row, out) in x[i * TASK_ROWS * d..].chunks_exact(d).zip(out.chunks_exact_mut(len)) {
                    (kernels.pair_neighbours)(row, out);
                }
            });
            pairs
        });
        LhsRows { pairs, elements: x, dims }
    }

    /// The rows from `token` on of one head.
    pub(super) fn from(&self, batch: usize, kv: usize, token: usize) -> MatRef<'_, T> {
        let Dims { t, g, d, .. } = self.dims;
        let (data, len) = self.pairs.as_ref().map_or((self.elements, d), |pairs| (pairs, d.div_ceil(2)));
        MatRef::rows(&data[((batch * t + token) * g + kv) * len..], g * len)
    }
}

/// Blocks of `width` rows of x `[b, t, g, d]` as the right operands of products over their rows: x itself, or panels of pairs
/// packed block by block, once a pass, so that every product reads them in order.
pub(super) struct RhsBlocks<'a, T: CpuNumber> {
    packed: Option<PackedBlocks<T>>,
    elements: &'a [T],
    dims: Dims,
    width: usize,
}

struct PackedBlocks<T: CpuNumber> {
    data: Buffer<T>,
    /// numbers of a block, and of a panel
    block: usize,
    panel: usize,
}

/// A block as a right operand.
#[derive(Clone, Copy)]
pub(super) enum RhsBlock<'a, T> {
    Rows(MatRef<'a, T>),
    Pairs(Panels<'a, T>),
}

impl<'a, T: CpuNumber> RhsBlocks<'a, T> {
    pub(super) fn new(device: &CpuDevice, bf16: Option<Bf16Kernels<T>>, x: &'a [T], dims: Dims, width: usize) -> Self {
        let Dims { b, t, g, d, .. } = dims;
        let packed = bf16.map(|kernels| {
            let (blocks, panel) = (t.div_ceil(width), width.div_ceil(2) * NR);
            let block = d.div_ceil(NR) * panel;
            let zeros = device.zeros::<T>(d);
            let mut data = device.alloc(b * g * blocks * block);
            device.for_pieces(&mut data, block, |i, out| {
                let (bg, first) = (i / blocks, i % blocks * width);
                let rows = MatRef::rows(&x[(bg / g * t + first) * g * d + bg % g * d..], g * d);
                kernels.pack_rows(rows, (width.min(t - first), d), &zeros, out, panel);
            });
            PackedBlocks { data, block, panel }
        });
        RhsBlocks { packed, elements: x, dims, width }
    }

    /// A block of one head.
    pub(super) fn block(&self, batch: usize, kv: usize, block: usize) -> RhsBlock<'_, T> {
        let Dims { t, g, d, .. } = self.dims;
        match &self.packed {
            Some(packed) => {
                let i = (batch * g + kv) * t.div_ceil(self.width) + block;
                RhsBlock::Pairs(Panels { data: &packed.data[i * packed.block..][..packed.block], stride: packed.panel })
            }
            None => {
                let first = ((batch * t + block * self.width) * g + kv) * d;
                RhsBlock::Rows(MatRef::rows(&self.elements[first..], g * d))
            }
        }
    }
}

/// The products of a task, in the element type or in pairs of bf16: scores of up to `lanes` rows with up to `width` keys.
pub(super) struct Products<T: CpuNumber> {
    bf16: Option<Bf16Kernels<T>>,
    lanes: usize,
    d: usize,
    zeros: Buffer<T>,
    /// pairs of the scores, `[keys / 2, lanes]` or `[keys, lanes / 2]`, and panels of a right operand over the lanes, `[d / NR, lanes / 2, NR]`
    lhs: Buffer<T>,
    rhs: Buffer<T>,
}

impl<T: CpuNumber> Products<T> {
    pub(super) fn new(device: &CpuDevice, bf16: Option<Bf16Kernels<T>>, lanes: usize, width: usize, d: usize) -> Self {
        let n = |n: usize| if bf16.is_some() { n } else { 0 };
        Products {
            bf16,
            lanes,
            d,
            zeros: device.zeros(n(lanes.max(d))),
            lhs: device.alloc(n((width.div_ceil(2) * lanes).max(width * lanes.div_ceil(2)))),
            rhs: device.alloc(n(lanes.div_ceil(2) * d.next_multiple_of(NR))),
        }
    }

    /// Size of what [`Products::columns`] writes.
    pub(super) fn columns_len(&self) -> usize {
        match self.bf16 {
            None => self.d * self.lanes,
            Some(_) => self.lanes.div_ceil(NR) * self.d.div_ceil(2) * NR,
        }
    }

    /// Queries `[m, d]` as the columns of the right operand of a product over d, zero up to a whole vector or panel of lanes.
    pub(super) fn columns(&self, rows: &[T], out: &mut [T]) {
        let (d, m) = (self.d, rows.len() / self.d);
        let rows = MatRef::rows(rows, d);
        match self.bf16 {
            None => {
                transpose_into(rows, m, d, MatMut::rows(out, self.lanes), m.next_multiple_of(LANES));
            }
            Some(kernels) => {
                let panel = d.div_ceil(2) * NR;
                kernels.pack_transposed(rows, (m, d), &mut out[..m.div_ceil(NR) * panel], panel);
            }
        }
    }

    /// `c [keys, lanes] = a b` over d, of which n lanes are written: a `[keys, d]` as [`LhsRows`] gives it, b as [`Products::columns`].
    pub(super) fn over_d(&self, (keys, n): (usize, usize), a: MatRef<T>, b: &[T], c: &mut [T]) {
        let c = MatMut::rows(c, self.lanes);
        match self.bf16 {
            None => Gemm::new(keys, n, self.d).run(a, MatRef::rows(b, self.lanes), c),
            Some(kernels) => {
                let pairs = self.d.div_ceil(2);
                Gemm::new(keys, n, pairs).run_bf16(kernels, a, Panels { data: b, stride: pairs * NR }, c);
            }
        }
    }

    /// `c (+)= x^T b` over the keys of x `[keys, lanes]` and b `[keys, d]`: c `[m, d]`.
    pub(super) fn over_keys(
        &mut self,
        (m, keys): (usize, usize),
        x: &[T],
        b: RhsBlock<T>,
        c: &mut [T],
        accumulate: Accumulate<NoResidual>,
    ) {
        let (lanes, n, c) = (self.lanes, self.d, MatMut::rows(c, self.d));
        match (self.bf16, b) {
            (None, RhsBlock::Rows(b)) => {
                Gemm { m, n, k: keys, accumulate }.run(MatRef::rows(x, lanes).t(), b, c);
            }
            (Some(kernels), RhsBlock::Pairs(b)) => {
                let pairs = keys.div_ceil(2);
                let row = |key: usize| if key < keys { &x[key * lanes..][..m] } else { &self.zeros[..m] };
                for (p, out) in self.lhs.chunks_exact_mut(lanes).enumerate().take(pairs) {
                    (kernels.pair_rows)(row(2 * p), row(2 * p + 1), &mut out[..m]);
                }
                Gemm { m, n, k: pairs, accumulate }.run_bf16(kernels, MatRef::rows(&self.lhs, lanes).t(), b, c);
            }
            _ => unreachable!("operands are packed for the kernels that multiply them"),
        }
    }

    /// `c += x y` over the rows: x `[keys, lanes]`, y `[m, d]`, c `[keys, d]`.
    pub(super) fn over_rows(&mut self, keys: usize, x: &[T], y: &[T], c: &mut [T]) {
        let (lanes, d) = (self.lanes, self.d);
        let (m, y, c) = (y.len() / d, MatRef::rows(y, d), MatMut::rows(c, d));
        let Some(kernels) = self.bf16 else {
            return Gemm::adding(keys, d, m).run(MatRef::rows(x, lanes), y, c);
        };
        let (pairs, half) = (m.div_ceil(2), lanes.div_ceil(2));
        for (x, out) in x.chunks_exact(lanes).zip(self.lhs.chunks_exact_mut(half)).take(keys) {
            (kernels.pair_neighbours)(&x[..m], &mut out[..pairs]);
        }
        let panel = pairs * NR;
        kernels.pack_rows(y, (m, d), &self.zeros, &mut self.rhs, panel);
        let b = Panels { data: &self.rhs, stride: panel };
        Gemm::adding(keys, d, pairs).run_bf16(kernels, MatRef::rows(&self.lhs, half), b, c);
    }
}
