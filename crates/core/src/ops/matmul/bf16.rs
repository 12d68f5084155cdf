//! Products with bf16 operands and f32 accumulators, for processors with AVX512_BF16 (twice the f32 rate on Zen 4).
//!
//! The layout is that of the f32 product with words of two neighbours along k in place of single elements: B in panels
//! [k / 2, 32], A as [rows, k / 2] or, transposed, [k / 2, rows], packed by each task. Operands are rounded while packing;
//! sums, C and everything outside stay f32.

use std::arch::x86_64::*;

use super::cpu::{Left, Operands, multiply};
use crate::device::CpuDevice;
use crate::device::kernel::{Block, COLS, ROWS, pair, run_bf16};
use crate::device::tile::Mat;

/// Words of `x`'s neighbours; an odd last element pairs with zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_along(x: &[f32], out: &mut [f32]) {
    let whole = x.len() / 32;
    for i in 0..whole {
        // SAFETY: 32 elements from 32 i are inside x, 16 words from 16 i inside out, which has half as many.
        unsafe {
            let low = _mm512_loadu_ps(x.as_ptr().add(32 * i));
            let high = _mm512_loadu_ps(x.as_ptr().add(32 * i + 16));
            let words = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out[16 * i..16 * i + 16].as_mut_ptr().cast(), words);
        }
    }
    for (o, p) in out[16 * whole..].iter_mut().zip(x[32 * whole..].chunks(2)) {
        *o = f32::from_bits(pair(p[0], p.get(1).copied().unwrap_or(0.0)));
    }
}

/// Words of two rows: (first[j], second[j]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_across(first: &[f32], second: &[f32], out: &mut [f32]) {
    let whole = first.len() / 16;
    for j in 0..whole {
        let range = 16 * j..16 * j + 16;
        // SAFETY: the slices have 16 elements from 16 j; __m256bh and __m256i are the same 32 bytes.
        unsafe {
            let wide = |x: &[f32]| {
                let half = _mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr()));
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(half))
            };
            let words =
                _mm512_or_si512(wide(&first[range.clone()]), _mm512_slli_epi32::<16>(wide(&second[range.clone()])));
            _mm512_storeu_si512(out[range].as_mut_ptr().cast(), words);
        }
    }
    for j in 16 * whole..first.len() {
        out[j] = f32::from_bits(pair(first[j], second[j]));
    }
}

/// Operands of [m, k] times [k, n] on a processor that has AVX512_BF16. One of the strides of each is 1.
struct Pairs<'a> {
    n: usize,
    k: usize,
    a: Mat<'a, f32>,
    b: Mat<'a, f32>,
    /// as long as a row of either operand: what an odd last row pairs with
    zeros: &'a [f32],
}

impl Operands<f32> for Pairs<'_> {
    const COPIES: bool = true;

    fn words(&self) -> usize {
        self.k.div_ceil(2)
    }

    fn panels(&self, first: usize, p0: usize, depth: usize, out: &mut [f32]) {
        let Mat { data, row, col } = self.b;
        if col == 1 {
            for p in 0..depth {
                let at = |p: usize| if p < self.k { &data[p * row + first..][..self.n - first] } else { self.zeros };
                let (even, odd) = (at(2 * (p0 + p)), at(2 * (p0 + p) + 1));
                for (j, panel) in out.chunks_exact_mut(depth * COLS).enumerate() {
                    let (columns, to) =
                        (j * COLS..(self.n - first).min((j + 1) * COLS), &mut panel[p * COLS..][..COLS]);
                    to[columns.len()..].fill(0.0);
                    // SAFETY: made for such a processor only.
                    unsafe { pack_across(&even[columns.clone()], &odd[columns.clone()], &mut to[..columns.len()]) };
                }
            }
            return;
        }
        let mut column = [0.0; 16];
        for (j0, panel) in out.chunks_exact_mut(depth * COLS).enumerate() {
            // 16 words of each column at a time: the piece of the panel stays in cache
            for (block, out) in panel.chunks_mut(16 * COLS).enumerate() {
                let p = 2 * p0 + 32 * block;
                let words = &mut column[..out.len() / COLS];
                for j in 0..COLS {
                    let from = first + j0 * COLS + j;
                    if from < self.n {
                        // SAFETY: as above.
                        unsafe { pack_along(&data[from * col + p..][..(2 * words.len()).min(self.k - p)], words) };
                    } else {
                        words.fill(0.0);
                    }
                    for (p, &word) in words.iter().enumerate() {
                        out[p * COLS + j] = word;
                    }
                }
            }
        }
    }

    fn left<'a>(&'a self, i0: usize, rows: usize, p0: usize, depth: usize, scratch: &'a mut [f32]) -> Left<'a, f32> {
        let Mat { data, row, col } = self.a;
        let p0 = 2 * p0;
        if col == 1 {
            let len = (2 * depth).min(self.k - p0);
            for (i, out) in scratch.chunks_exact_mut(depth).enumerate().take(rows) {
                // SAFETY: as above.
                unsafe { pack_along(&data[(i0 + i) * row + p0..][..len], out) };
            }
            return Left { data: scratch, block: ROWS * depth, row: depth, col: 1 };
        }
        for (p, out) in scratch.chunks_exact_mut(rows).enumerate().take(depth) {
            let at = |p: usize| if p < self.k { &data[p * col + i0..][..rows] } else { &self.zeros[..rows] };
            // SAFETY: as above.
            unsafe { pack_across(at(p0 + 2 * p), at(p0 + 2 * p + 1), out) };
        }
        Left { data: scratch, block: ROWS, row: 1, col: rows }
    }

    unsafe fn run(&self, rows: usize, cols: usize, depth: usize, x: Block<f32>) {
        // SAFETY: the caller's contract; words are bits that are read as u32.
        unsafe { run_bf16(rows, cols, depth, (x.a.cast(), x.row, x.col), x.b.cast(), (x.c, x.ldc), x.add) };
    }
}

/// `c = a b` or `c += a b` with operands rounded to bf16. One of the strides of each operand must be 1.
///
/// # Safety
/// The processor must have AVX512_BF16. The caller has checked that the operands hold [m, k] and [k, n].
pub(super) unsafe fn gemm(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    a: Mat<f32>,
    b: Mat<f32>,
    c: &mut [f32],
    add: bool,
) {
    let zeros = device.zeros::<f32>(m.max(n));
    multiply(device, (m, n), &Pairs { n, k, a, b, zeros: &zeros }, c, add);
}
