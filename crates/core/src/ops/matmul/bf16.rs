//! Products with bf16 operands and f32 accumulators, for processors with AVX512_BF16 (twice the f32 rate on Zen 4).
//!
//! The layout is that of the f32 product with words of two neighbours along k in place of single elements: B in panels
//! [k / 2, 32], A as [rows, k / 2] or, transposed, [k / 2, rows], packed by each task. Operands are rounded while packing;
//! sums, C and everything outside stay f32.

use std::arch::x86_64::*;

use super::cpu::{Out, cut};
use crate::device::CpuDevice;
use crate::device::kernel::{COLS, ROWS, pair, run_bf16};
use crate::device::tile::Mat;

/// Inner length of a pass over C: 256 words by 32 columns of B are 32 KiB.
const DEPTH: usize = 512;

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

/// `c = a b` or `c += a b` with operands rounded to bf16. One of the strides of each operand must be 1.
///
/// # Safety
/// The processor must have AVX512_BF16. The caller has checked that the operands hold [m, k] and [k, n] and c [m, n].
pub(super) unsafe fn gemm(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    a: Mat<f32>,
    b: Mat<f32>,
    c: &mut [f32],
    add: bool,
) {
    let words = k.div_ceil(2);
    let mut packed = device.alloc::<f32>(n.div_ceil(COLS) * words * COLS);
    let zeros = vec![0.0; m.max(n)];
    device.for_chunks(&mut packed, words * COLS, |panel, out| {
        let first = panel * COLS;
        let cols = COLS.min(n - first);
        let mut column = vec![0.0; if b.col == 1 { 0 } else { words }];
        if b.col == 1 {
            for (p, out) in out.chunks_exact_mut(COLS).enumerate() {
                let row = |p: usize| if p < k { &b.data[p * b.row + first..][..cols] } else { &zeros[..cols] };
                // SAFETY: the caller vouches for the processor.
                unsafe { pack_across(row(2 * p), row(2 * p + 1), &mut out[..cols]) };
                out[cols..].fill(0.0);
            }
            return;
        }
        for j in 0..COLS {
            if j < cols {
                // SAFETY: as above.
                unsafe { pack_along(&b.data[(first + j) * b.col..][..k], &mut column) };
            } else {
                column.fill(0.0);
            }
            for (p, &word) in column.iter().enumerate() {
                out[p * COLS + j] = word;
            }
        }
    });
    let (rows, cols) = cut(m, n);
    let across = n.div_ceil(cols);
    let out = Out::new(c);
    let task = |task: usize| {
        let (i0, j0) = (task / across * rows, task % across * cols);
        let (rows, cols) = (rows.min(m - i0), cols.min(n - j0));
        let mut left = device.alloc::<f32>(DEPTH.min(k).div_ceil(2) * rows);
        for p0 in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - p0);
            let pairs = depth.div_ceil(2);
            let (row, col) = if a.col == 1 {
                for (i, out) in left.chunks_exact_mut(pairs).enumerate().take(rows) {
                    // SAFETY: as above.
                    unsafe { pack_along(&a.data[(i0 + i) * a.row + p0..][..depth], out) };
                }
                (pairs, 1)
            } else {
                for (p, out) in left.chunks_exact_mut(rows).enumerate().take(pairs) {
                    let at = |p: usize| if p < k { &a.data[p * a.col + i0..][..rows] } else { &zeros[..rows] };
                    // SAFETY: as above.
                    unsafe { pack_across(at(p0 + 2 * p), at(p0 + 2 * p + 1), out) };
                }
                (1, rows)
            };
            for j in (j0..j0 + cols).step_by(COLS) {
                let panel = &packed[(j / COLS * words + p0 / 2) * COLS..][..pairs * COLS];
                let width = COLS.min(j0 + cols - j);
                for i in (0..rows).step_by(ROWS) {
                    let height = ROWS.min(rows - i);
                    let a = (left[i * row..].as_ptr().cast::<u32>(), row, col);
                    let c = (out.at((i0 + i) * n + j), n);
                    // SAFETY: `left` holds `rows` rows and the panel 32 columns of `pairs` words, whose bits are read as
                    // u32; blocks of C are disjoint, inside c, and c is borrowed mutably.
                    unsafe { run_bf16(height, width, pairs, a, panel.as_ptr().cast(), c, add || p0 > 0) };
                }
            }
        }
    };
    device.map(m.div_ceil(rows) * across, task);
}
