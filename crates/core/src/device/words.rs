//! Products of bf16 operands with f32 sums, for processors with AVX512_BF16 (twice the f32 rate on Zen 4).
//!
//! The processor multiplies *words* of two bf16 that are neighbours along the inner axis. Words are made while an operand
//! is packed, are as wide as an f32, and live in f32 buffers. Sums, results and everything outside stay f32.

use super::kernel::{Block, COLS};
use super::tile::Mat;
use crate::device::CpuNumber;

/// What makes words and multiplies them, on a processor that can.
#[derive(Clone, Copy)]
pub struct Words<T> {
    /// Words of the neighbours in a row; an odd last element pairs with zero.
    pub along: fn(&[T], &mut [T]),
    /// Words of two rows: (first[j], second[j]).
    pub across: fn(&[T], &[T], &mut [T]),
    /// m rows by n <= 32 columns over k words: `c[i, j] (+)=` the sum of both products of `a[i * row + p * col]` and
    /// `b[p * 32 + j]`. The contract is that of [`super::kernel::run_f32`], with 32 columns of B whatever n is.
    pub multiply: unsafe fn(usize, usize, usize, Block<T>),
}

/// None: for other element types and processors.
pub fn none<T>() -> Option<Words<T>> {
    None
}

/// Of bf16, where the processor multiplies them; in this crate's tests everywhere, so that what packs for the kernels and
/// calls them is tested on every machine.
#[cfg(target_arch = "x86_64")]
pub fn bf16() -> Option<Words<f32>> {
    #[cfg(test)]
    let elsewhere = Some(portable::WORDS);
    #[cfg(not(test))]
    let elsewhere = None;
    let here = super::kernel::has_bf16(super::simd::level()).then_some(Words {
        // SAFETY: this table is handed out only where the processor has been asked.
        along: |x, out| unsafe { x86::along(x, out) },
        // SAFETY: as above.
        across: |first, second, out| unsafe { x86::across(first, second, out) },
        multiply: super::kernel::run_bf16,
    });
    here.or(elsewhere)
}

/// Rows of `src`, `stride` apart and `n` wide, as the right side of a product over them: panels of 32 columns `ld` apart,
/// one line of words for two rows. `zeros` is what an odd last row pairs with.
pub fn pack_rows<T: CpuNumber>(
    words: Words<T>,
    (src, stride): (&[T], usize),
    (rows, n): (usize, usize),
    zeros: &[T],
    out: &mut [T],
    ld: usize,
) {
    for p in 0..rows.div_ceil(2) {
        let first = &src[2 * p * stride..][..n];
        let second = if 2 * p + 1 < rows { &src[(2 * p + 1) * stride..][..n] } else { &zeros[..n] };
        for (j, (first, second)) in first.chunks(COLS).zip(second.chunks(COLS)).enumerate() {
            let line = &mut out[j * ld + p * COLS..][..COLS];
            (words.across)(first, second, &mut line[..first.len()]);
            line[first.len()..].fill(T::ZERO);
        }
    }
}

/// Rows of `src`, `stride` apart and `k` long, as the right side of a product with their transpose: panels of 32 rows `ld`
/// apart, each [k / 2, 32], zero past the last row up to the end of `out`.
pub fn pack_transposed<T: CpuNumber>(
    words: Words<T>,
    (src, stride): (&[T], usize),
    (rows, k): (usize, usize),
    out: &mut [T],
    ld: usize,
) {
    let mut column = [T::ZERO; 16];
    for (panel, out) in out.chunks_mut(ld).enumerate() {
        // 16 words of each row at a time: the piece of the panel stays in cache
        for (piece, out) in out.chunks_mut(16 * COLS).enumerate() {
            let column = &mut column[..out.len() / COLS];
            let from = 32 * piece..k.min(32 * piece + 2 * column.len());
            for j in 0..COLS {
                match panel * COLS + j {
                    row if row < rows => (words.along)(&src[row * stride..][from.clone()], column),
                    _ => column.fill(T::ZERO),
                }
                column.iter().enumerate().for_each(|(p, &word)| out[p * COLS + j] = word);
            }
        }
    }
}

/// `c = a b` or `c += a b` over `k` words: a [m, k] with any strides, b in panels [k, 32] `ld` apart, c [m, n] with rows
/// `ldc` apart.
pub fn gemm<T: CpuNumber>(
    words: Words<T>,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    (b, ld): (&[T], usize),
    c: &mut [T],
    ldc: usize,
    add: bool,
) {
    if m == 0 || n == 0 || k == 0 {
        assert!(add || m == 0 || n == 0, "an empty product is added, never stored");
        return;
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "a holds [{m}, {k}]");
    assert!(b.len() >= (n.div_ceil(COLS) - 1) * ld + k * COLS, "b holds panels of [{k}, 32]");
    assert!(c.len() >= (m - 1) * ldc + n, "c holds [{m}, {n}]");
    for j in (0..n).step_by(COLS) {
        let (a_at, b_at, c_at) = (a.data.as_ptr(), b[j / COLS * ld..].as_ptr(), c[j..].as_mut_ptr());
        let block = Block { a: a_at, row: a.row, col: a.col, b: b_at, ldb: COLS, c: c_at, ldc, add, cold: false };
        // SAFETY: the asserts bound every element; C is borrowed mutably, so it aliases neither operand.
        unsafe { (words.multiply)(m, COLS.min(n - j), k, block) };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::kernel::pair;

    /// Words of `x`'s neighbours; an odd last element pairs with zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub fn along(x: &[f32], out: &mut [f32]) {
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
    pub fn across(first: &[f32], second: &[f32], out: &mut [f32]) {
        let whole = first.len() / 16;
        // lane 2 j is element j of the low half, lane 2 j + 1 that of the high half
        let interleave: [u16; 32] = std::array::from_fn(|lane| (lane / 2 + lane % 2 * 16) as u16);
        // SAFETY: 32 lanes of 16 bits are the 64 bytes that are read.
        let interleave = unsafe { _mm512_loadu_si512(interleave.as_ptr().cast()) };
        for j in 0..whole {
            let range = 16 * j..16 * j + 16;
            // SAFETY: the slices have 16 elements from 16 j; __m512bh and __m512i are the same 64 bytes.
            unsafe {
                let low = _mm512_loadu_ps(first[range.clone()].as_ptr());
                let high = _mm512_loadu_ps(second[range.clone()].as_ptr());
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                let words = _mm512_permutexvar_epi16(interleave, both);
                _mm512_storeu_si512(out[range].as_mut_ptr().cast(), words);
            }
        }
        for j in 16 * whole..first.len() {
            out[j] = f32::from_bits(pair(first[j], second[j]));
        }
    }
}

#[cfg(test)]
mod portable {
    use super::*;
    use crate::device::kernel::pair;

    pub const WORDS: Words<f32> = Words { along, across, multiply };

    fn along(x: &[f32], out: &mut [f32]) {
        for (o, p) in out.iter_mut().zip(x.chunks(2)) {
            *o = f32::from_bits(pair(p[0], p.get(1).copied().unwrap_or(0.0)));
        }
    }

    fn across(first: &[f32], second: &[f32], out: &mut [f32]) {
        for ((o, &first), &second) in out.iter_mut().zip(first).zip(second) {
            *o = f32::from_bits(pair(first, second));
        }
    }

    /// Low and high half of a word.
    fn halves(word: f32) -> (f32, f32) {
        (f32::from_bits(word.to_bits() << 16), f32::from_bits(word.to_bits() & 0xffff_0000))
    }

    unsafe fn multiply(m: usize, n: usize, k: usize, x: Block<f32>) {
        for (i, j) in (0..m * n).map(|e| (e / n, e % n)) {
            // SAFETY: the contract of `Words::multiply`.
            unsafe {
                let c = x.c.add(i * x.ldc + j);
                let mut sum = if x.add { *c } else { 0.0 };
                for p in 0..k {
                    let a = halves(*x.a.add(i * x.row + p * x.col));
                    let b = halves(*x.b.add(p * COLS + j));
                    sum = a.1.mul_add(b.1, sum);
                    sum = a.0.mul_add(b.0, sum);
                }
                *c = sum;
            }
        }
    }
}
