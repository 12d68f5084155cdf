//! Products of bf16 operands with f32 sums, for processors with AVX512_BF16 (twice the f32 rate on Zen 4).
//!
//! The processor multiplies *pairs* of two bf16 that are neighbours along the inner axis, packed into 32 bits. Pairs are made
//! while an operand is packed and live in f32 buffers, one a number. Sums, results and everything outside stay f32.

#![cfg_attr(
    target_arch = "x86_64",
    expect(
        clippy::needless_range_loop,
        reason = "registers of a block are indexed by row and column, as in the formula"
    )
)]

use super::kernel_f32::{NR, Operands};
#[cfg(target_arch = "x86_64")]
use super::level::{Level, level};
use super::matrix::{MatMut, MatRef, Panels, holds};
use crate::device::{CpuNumber, Gemm};

/// What makes pairs and multiplies them, on a processor that can.
#[derive(Clone, Copy)]
pub struct Bf16Kernels<T> {
    /// Pairs of the neighbours in a row; an odd last element pairs with zero.
    pub pair_neighbours: fn(&[T], &mut [T]),
    /// Pairs of two rows: (first[j], second[j]).
    pub pair_rows: fn(&[T], &[T], &mut [T]),
    /// m rows by n <= 32 columns over k pairs: `c[i, j] (+)=` the sum of both products of `a[i * rs_a + p * cs_a]` and
    /// `b[p * 32 + j]`. The contract is that of [`super::kernel_f32::run_f32`], with 32 columns of B whatever n is.
    pub multiply: unsafe fn(usize, usize, usize, Operands<T>),
}

/// None: for other element types and processors.
pub fn none<T>() -> Option<Bf16Kernels<T>> {
    None
}

/// Those of this processor; in this crate's tests portable ones everywhere else, so that what packs for the kernels and calls
/// them is tested on every machine.
pub fn of_f32() -> Option<Bf16Kernels<f32>> {
    #[cfg(test)]
    let elsewhere = Some(portable::KERNELS);
    #[cfg(not(test))]
    let elsewhere = None;
    #[cfg(target_arch = "x86_64")]
    let here = has_bf16(level()).then_some(Bf16Kernels {
        // SAFETY: this table is handed out only where the processor has been asked.
        pair_neighbours: |x, out| unsafe { x86::pair_neighbours(x, out) },
        // SAFETY: as above.
        pair_rows: |first, second, out| unsafe { x86::pair_rows(first, second, out) },
        multiply: x86::run_bf16,
    });
    #[cfg(not(target_arch = "x86_64"))]
    let here = None;
    here.or(elsewhere)
}

/// Whether this processor multiplies pairs of bf16 into f32 (AVX512_BF16).
#[cfg(target_arch = "x86_64")]
fn has_bf16(level: Level) -> bool {
    level == Level::Avx512 && is_x86_feature_detected!("avx512bf16")
}

/// Two neighbours along the inner axis, rounded to bf16 (nearest, ties to even) in 32 bits, the first in the low half.
#[cfg(any(test, target_arch = "x86_64"))]
#[inline(always)]
pub fn pair(first: f32, second: f32) -> u32 {
    let round = |x: f32| {
        let bits = x.to_bits();
        // the quiet bit keeps a NaN a NaN
        if x.is_nan() { (bits >> 16) | 0x40 } else { bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16 }
    };
    round(first) | round(second) << 16
}

impl<T: CpuNumber> Bf16Kernels<T> {
    /// `[rows, n]` of b, whose rows are contiguous, as the right operand of a product over them: panels of 32 columns,
    /// `panel_stride` apart, one line of pairs for two rows. `zeros` is what an odd last row pairs with.
    pub fn pack_rows(self, b: MatRef<T>, (rows, n): (usize, usize), zeros: &[T], out: &mut [T], panel_stride: usize) {
        for p in 0..rows.div_ceil(2) {
            let row = |p: usize| if p < rows { &b.data[p * b.row_stride..][..n] } else { &zeros[..n] };
            let (first, second) = (row(2 * p), row(2 * p + 1));
            for (j, (first, second)) in first.chunks(NR).zip(second.chunks(NR)).enumerate() {
                let line = &mut out[j * panel_stride + p * NR..][..NR];
                (self.pair_rows)(first, second, &mut line[..first.len()]);
                line[first.len()..].fill(T::ZERO);
            }
        }
    }

    /// `[rows, k]` of x, whose rows are contiguous, as the right operand of a product with their transpose: panels of 32 rows,
    /// `panel_stride` apart, each [k / 2, 32], zero past the last row up to the end of `out`.
    pub fn pack_transposed(self, x: MatRef<T>, (rows, k): (usize, usize), out: &mut [T], panel_stride: usize) {
        let mut column = [T::ZERO; 16];
        for (panel, out) in out.chunks_mut(panel_stride).enumerate() {
            // 16 pairs of each row at a time: the piece of the panel stays in cache
            for (piece, out) in out.chunks_mut(16 * NR).enumerate() {
                let column = &mut column[..out.len() / NR];
                let from = 32 * piece..k.min(32 * piece + 2 * column.len());
                for j in 0..NR {
                    match panel * NR + j {
                        row if row < rows => {
                            (self.pair_neighbours)(&x.data[row * x.row_stride..][from.clone()], column);
                        }
                        _ => column.fill(T::ZERO),
                    }
                    column.iter().enumerate().for_each(|(p, &pair)| out[p * NR + j] = pair);
                }
            }
        }
    }
}

impl Gemm {
    /// Computes it on one thread over k pairs: a in pairs with any strides, b in panels of 32 columns.
    ///
    /// # Panics
    /// When an operand is too small, or an empty sum would overwrite c.
    pub fn run_bf16<T: CpuNumber>(self, kernels: Bf16Kernels<T>, a: MatRef<T>, b: Panels<T>, c: MatMut<T>) {
        let Gemm { m, n, k, accumulate } = self;
        if m == 0 || n == 0 || k == 0 {
            assert!(accumulate.adds() || m == 0 || n == 0, "an empty product is added, never stored");
            return;
        }
        a.assert_holds("a", m, k);
        c.assert_holds("c", m, n);
        let panels = n.div_ceil(NR);
        assert!(holds(b.data.len(), [(panels, b.stride), (k, NR), (NR, 1)]), "b holds {panels} panels of [{k}, {NR}]");
        for (panel, j) in (0..n).step_by(NR).enumerate() {
            let operands = Operands {
                a: a.data.as_ptr(),
                rs_a: a.row_stride,
                cs_a: a.col_stride,
                b: b.data[panel * b.stride..].as_ptr(),
                rs_b: NR,
                c: c.data[j..].as_mut_ptr(),
                rs_c: c.row_stride,
                accumulate: accumulate.adds(),
                prefetch: false,
            };
            // SAFETY: the asserts bound every element; C is borrowed mutably, so it aliases neither operand.
            unsafe { (kernels.multiply)(m, NR.min(n - j), k, operands) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::super::kernel_f32::{MR, NR, Operands, by_rows};
    use super::pair;

    /// Pairs of `x`'s neighbours; an odd last element pairs with zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub fn pair_neighbours(x: &[f32], out: &mut [f32]) {
        let vectors = x.len() / 32;
        for i in 0..vectors {
            // SAFETY: 32 elements from 32 i are inside x, 16 pairs from 16 i inside out, which has half as many.
            unsafe {
                let low = _mm512_loadu_ps(x.as_ptr().add(32 * i));
                let high = _mm512_loadu_ps(x.as_ptr().add(32 * i + 16));
                let pairs = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(out[16 * i..16 * i + 16].as_mut_ptr().cast(), pairs);
            }
        }
        for (o, p) in out[16 * vectors..].iter_mut().zip(x[32 * vectors..].chunks(2)) {
            *o = f32::from_bits(pair(p[0], p.get(1).copied().unwrap_or(0.0)));
        }
    }

    /// Pairs of two rows: (first[j], second[j]).
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub fn pair_rows(first: &[f32], second: &[f32], out: &mut [f32]) {
        let vectors = first.len() / 16;
        // lane 2 j is element j of the low half, lane 2 j + 1 that of the high half
        let interleave: [u16; 32] = std::array::from_fn(|lane| (lane / 2 + lane % 2 * 16) as u16);
        // SAFETY: 32 lanes of 16 bits are the 64 bytes that are read.
        let interleave = unsafe { _mm512_loadu_si512(interleave.as_ptr().cast()) };
        for j in 0..vectors {
            let range = 16 * j..16 * j + 16;
            // SAFETY: the slices have 16 elements from 16 j; __m512bh and __m512i are the same 64 bytes.
            unsafe {
                let low = _mm512_loadu_ps(first[range.clone()].as_ptr());
                let high = _mm512_loadu_ps(second[range.clone()].as_ptr());
                let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                let pairs = _mm512_permutexvar_epi16(interleave, both);
                _mm512_storeu_si512(out[range].as_mut_ptr().cast(), pairs);
            }
        }
        for j in 16 * vectors..first.len() {
            out[j] = f32::from_bits(pair(first[j], second[j]));
        }
    }

    /// The product of pairs of bf16, read as bits of f32, in at most [`NR`] columns: both products of a pair are added to an f32 sum.
    /// B has 32 columns a row, whatever `n` and `rs_b` are.
    ///
    /// # Safety
    /// As [`super::super::kernel_f32::run_f32`], and [`super::has_bf16`] must hold.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn run_bf16(m: usize, n: usize, k: usize, x: Operands<f32>) {
        for i in (0..m).step_by(MR) {
            // SAFETY: the caller's contract; the block is a part of what it vouches for.
            unsafe { by_rows!(MR.min(m - i), [1 2 3 4 5 6 7 8], M => block_bf16::<M>(n, k, x.at(i, 0))) };
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn block_bf16<const M: usize>(cols: usize, k: usize, x: Operands<f32>) {
        let all = if cols >= NR { u32::MAX } else { (1u32 << cols) - 1 };
        let masks = [all as u16, (all >> 16) as u16];
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        // SAFETY: the caller vouches for every element; masked lanes are not touched. __m512bh and __m512i are the same 64
        // bytes.
        unsafe {
            if x.accumulate {
                for i in 0..M {
                    for j in 0..2 {
                        acc[i][j] = _mm512_maskz_loadu_ps(masks[j], x.c.add(i * x.rs_c + 16 * j));
                    }
                }
            }
            let mut rows = [x.a.cast::<i32>(); M];
            for i in 0..M {
                rows[i] = x.a.add(i * x.rs_a).cast();
            }
            for p in 0..k {
                let b_row: [__m512bh; 2] = [
                    transmute::<__m512i, __m512bh>(_mm512_loadu_si512(x.b.add(p * NR).cast())),
                    transmute::<__m512i, __m512bh>(_mm512_loadu_si512(x.b.add(p * NR + 16).cast())),
                ];
                for i in 0..M {
                    let a_value = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*rows[i].add(p * x.cs_a)));
                    acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a_value, b_row[0]);
                    acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a_value, b_row[1]);
                }
            }
            for i in 0..M {
                for j in 0..2 {
                    _mm512_mask_storeu_ps(x.c.add(i * x.rs_c + 16 * j), masks[j], acc[i][j]);
                }
            }
        }
    }
}

#[cfg(test)]
mod portable {
    use super::*;

    pub const KERNELS: Bf16Kernels<f32> = Bf16Kernels { pair_neighbours, pair_rows, multiply };

    fn pair_neighbours(x: &[f32], out: &mut [f32]) {
        for (o, p) in out.iter_mut().zip(x.chunks(2)) {
            *o = f32::from_bits(pair(p[0], p.get(1).copied().unwrap_or(0.0)));
        }
    }

    fn pair_rows(first: &[f32], second: &[f32], out: &mut [f32]) {
        for ((o, &first), &second) in out.iter_mut().zip(first).zip(second) {
            *o = f32::from_bits(pair(first, second));
        }
    }

    /// Low and high half of a pair.
    fn halves(pair: f32) -> (f32, f32) {
        (f32::from_bits(pair.to_bits() << 16), f32::from_bits(pair.to_bits() & 0xffff_0000))
    }

    unsafe fn multiply(m: usize, n: usize, k: usize, x: Operands<f32>) {
        for (i, j) in (0..m * n).map(|e| (e / n, e % n)) {
            // SAFETY: the contract of `Bf16Kernels::multiply`.
            unsafe {
                let c = x.c.add(i * x.rs_c + j);
                let mut sum = if x.accumulate { *c } else { 0.0 };
                for p in 0..k {
                    let a = halves(*x.a.add(i * x.rs_a + p * x.cs_a));
                    let b = halves(*x.b.add(p * NR + j));
                    sum = a.1.mul_add(b.1, sum);
                    sum = a.0.mul_add(b.0, sum);
                }
                *c = sum;
            }
        }
    }
}
