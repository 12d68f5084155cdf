//! The register kernels under every f32 matrix product: up to 8 rows by up to 32 columns of C in registers.
//!
//! One C element is one chain of fused multiply-adds over the inner index in ascending order, in every instruction set
//! and whatever the blocking, so results do not depend on how rows and columns are grouped. On AVX-512, 8 x 32 are 16
//! accumulators: 16 multiply-adds for 2 loads and 8 broadcasts, which keeps the multipliers of Zen 4 busy. On AVX2 the
//! registers hold 6 x 16.

#![cfg_attr(
    target_arch = "x86_64",
    expect(
        clippy::needless_range_loop,
        reason = "registers of a block are indexed by row and column, as in the formula"
    )
)]

#[cfg(all(test, target_arch = "x86_64", not(miri)))]
mod tests;

use super::level::Level;
#[cfg(target_arch = "x86_64")]
use super::simd::prefetch;

/// Rows of a register block.
pub const MR: usize = 8;
/// Columns of a register block.
pub const NR: usize = 32;

/// Columns of a register block on an instruction set that has a kernel: the width of a panel whose rows follow each other in
/// B. On AVX2, panels of 32 of which the kernel takes 16 fill only every other set of the L1 cache.
pub fn panel_width(level: Level) -> usize {
    if level == Level::Avx2 { 16 } else { NR }
}

/// Operands of a register kernel: `c[i * rs_c + j] (+)= sum_p a[i * rs_a + p * cs_a] * b[p * rs_b + j]`.
#[derive(Clone, Copy)]
pub struct Operands<T> {
    /// First element of A.
    pub a: *const T,
    /// Distance of A's rows.
    pub rs_a: usize,
    /// Distance of A's columns.
    pub cs_a: usize,
    /// First element of B.
    pub b: *const T,
    /// Distance of B's rows.
    pub rs_b: usize,
    /// First element of C.
    pub c: *mut T,
    /// Distance of C's rows.
    pub rs_c: usize,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
    /// A and C come from beyond the second cache: the f32 kernels prefetch the next rows while they work on these. On AVX2 of C
    /// only: there, prefetching A too costs 6 % where A is near and gains nothing where it is far.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for the register kernels of x86-64"))]
    pub prefetch: bool,
}

impl<T> Operands<T> {
    /// The block that begins `i` rows and `j` columns further.
    ///
    /// # Safety
    /// Its first elements must be inside the allocations.
    #[inline(always)]
    pub unsafe fn at(self, i: usize, j: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Operands { a: self.a.add(i * self.rs_a), b: self.b.add(j), c: self.c.add(i * self.rs_c + j), ..self } }
    }
}

/// `$body` with the number of rows, one of those listed, as the constant `$m`.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($rows:expr, [$($listed:literal)*], $m:ident => $body:expr) => {
        match $rows {
            $($listed => {
                const $m: usize = $listed;
                $body
            })*
            rows => unreachable!("{rows} rows"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) use by_rows;

/// Computes `m` rows by `n` columns over inner length `k`, at least one each, register block by register block.
///
/// The last step stores a row of C as soon as it is done. Stores in a row that all wait for the last sums hold up the next
/// block: on Zen 3, 22 cycles a block instead of 2, of 192 over 32 steps.
///
/// # Safety
/// Every element that the formula of [`Operands`] reads or writes must be inside live allocations, and C must not alias A or
/// B. The processor must have the features of `level`, which is not the baseline.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn run_f32(level: Level, m: usize, n: usize, k: usize, x: Operands<f32>) {
    // SAFETY: the caller's contract.
    unsafe {
        match level {
            Level::Avx512 => all_avx512(m, n, k, x),
            Level::Avx2 => all_avx2(m, n, k, x),
            Level::Baseline => unreachable!("the baseline has no kernel"),
        }
    }
}

/// The loop is compiled for the kernel's instruction set, so that the kernel is a part of it: calls for every register block
/// cost 3.5 % of a training step in f32 and 6 % in bf16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn all_avx512(m: usize, n: usize, k: usize, x: Operands<f32>) {
    for j in (0..n).step_by(NR) {
        let cols = NR.min(n - j);
        for i in (0..m).step_by(MR) {
            // SAFETY: the caller's contract; the block is a part of what it vouches for.
            unsafe {
                let x = x.at(i, j);
                if cols > 16 {
                    by_rows!(MR.min(m - i), [1 2 3 4 5 6 7 8], M => block_avx512::<M, 2>(cols, k, x));
                } else {
                    by_rows!(MR.min(m - i), [1 2 3 4 5 6 7 8], M => block_avx512::<M, 1>(cols, k, x));
                }
            }
        }
    }
}

/// 16 registers hold 6 x 16 accumulators, two of B and one of A: 12 multiply-adds for 2 loads and 6 broadcasts. Rows that are
/// no multiple of 6 are cut into blocks of nearly equal length, since 4 and fewer do not keep the multipliers busy.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn all_avx2(m: usize, n: usize, k: usize, x: Operands<f32>) {
    let blocks = m.div_ceil(6);
    let (rows, longer) = (m / blocks, m % blocks);
    // SAFETY: the caller's contract; both are parts of what it vouches for.
    unsafe {
        if longer > 0 {
            by_rows!(rows + 1, [2 3 4 5 6], M => rows_avx2::<M>(longer, n, k, x));
        }
        by_rows!(rows, [1 2 3 4 5 6], M => rows_avx2::<M>(blocks - longer, n, k, x.at(longer * (rows + 1), 0)));
    }
}

/// `blocks` blocks of M rows, one under the other.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2<const M: usize>(blocks: usize, n: usize, k: usize, x: Operands<f32>) {
    for j in (0..n).step_by(16) {
        let cols = 16.min(n - j);
        // SAFETY: as above.
        unsafe {
            let x = x.at(0, j);
            match (cols, x.rs_b, x.cs_a, x.rs_a) {
                (16, 16, 1, _) => strip_avx2::<M, 16, true>(blocks, k, x),
                (16, 16, _, 1) => strip_avx2::<M, 16, false>(blocks, k, x),
                (16, _, 1, _) => strip_avx2::<M, 0, true>(blocks, k, x),
                (16, _, _, 1) => strip_avx2::<M, 0, false>(blocks, k, x),
                (9.., ..) => masked_avx2::<M, 2>(blocks, cols, k, x),
                _ => masked_avx2::<M, 1>(blocks, cols, k, x),
            }
        }
    }
}

/// M rows by V vectors, of which the last may be partial. Above 60 lines: the four ways to walk A share accumulators that must not
/// leave their registers.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn block_avx512<const M: usize, const V: usize>(cols: usize, k: usize, x: Operands<f32>) {
    use std::arch::x86_64::*;
    let mut masks = [0xffffu16; V];
    masks[V - 1] = 0xffff >> (16 * V - cols);
    let mut acc = [[_mm512_setzero_ps(); V]; M];
    // SAFETY: the caller vouches for every element; masked lanes are not touched.
    unsafe {
        if x.accumulate {
            for i in 0..M {
                for j in 0..V {
                    acc[i][j] = _mm512_maskz_loadu_ps(masks[j], x.c.add(i * x.rs_c + 16 * j));
                }
            }
        }
        let mut rows = [x.a; M];
        for i in 0..M {
            rows[i] = x.a.add(i * x.rs_a);
        }
        if x.prefetch {
            for i in 0..M {
                for j in 0..V {
                    _mm_prefetch::<_MM_HINT_ET0>(x.c.wrapping_add((M + i) * x.rs_c + 16 * j).cast());
                }
            }
        }
        let full = |j: usize| j + 1 < V || cols == 16 * V;
        let mut step = |a: usize, p: usize, last: bool| {
            let b = x.b.add(p * x.rs_b);
            let mut b_row = [_mm512_setzero_ps(); V];
            for j in 0..V {
                let from = b.add(16 * j);
                b_row[j] = if full(j) { _mm512_loadu_ps(from) } else { _mm512_maskz_loadu_ps(masks[j], from) };
            }
            for i in 0..M {
                let a_value = _mm512_set1_ps(*rows[i].add(a));
                for j in 0..V {
                    acc[i][j] = _mm512_fmadd_ps(a_value, b_row[j], acc[i][j]);
                    let to = x.c.add(i * x.rs_c + 16 * j);
                    match (last, full(j)) {
                        (false, _) => {}
                        (true, true) => _mm512_storeu_ps(to, acc[i][j]),
                        (true, false) => _mm512_mask_storeu_ps(to, masks[j], acc[i][j]),
                    }
                }
            }
        };
        let last = k - 1;
        if x.cs_a == 1 && x.prefetch {
            // 16 steps use a line of every row
            for p0 in (0..last).step_by(16) {
                for row in rows {
                    prefetch(row.wrapping_add(M * x.rs_a + p0));
                }
                for p in p0..last.min(p0 + 16) {
                    step(p, p, false);
                }
            }
        } else if x.cs_a == 1 {
            for p in 0..last {
                step(p, p, false);
            }
        } else if x.prefetch {
            for p in 0..last {
                // rows are neighbours here: two blocks of 8 share a line, so the line after it
                prefetch(rows[0].wrapping_add(p * x.cs_a + 16));
                step(p * x.cs_a, p, false);
            }
        } else {
            for p in 0..last {
                step(p * x.cs_a, p, false);
            }
        }
        step(last * x.cs_a, last, true);
    }
}

/// `blocks` blocks of M rows by 16 columns, one under the other: a function of its own, so that the loop's addresses stay in
/// registers. `LDB` is the distance of B's rows where the compiler may know it, else 0. A's columns are neighbours (`ALONG`), or
/// its rows are.
///
/// Steps are written four at a time and share the address of A's first row: 21 instructions for 12 multiply-adds. On a core of
/// its own it makes no difference; on one that another thread shares, what is issued beside the multiply-adds costs time.
#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
unsafe fn strip_avx2<const M: usize, const LDB: usize, const ALONG: bool>(blocks: usize, k: usize, x: Operands<f32>) {
    use std::arch::x86_64::*;
    const STEPS: usize = 4;
    let ldb = if LDB > 0 { LDB } else { x.rs_b };
    let (row, col) = if ALONG { (x.rs_a, 1) } else { (1, x.cs_a) };
    // SAFETY: the caller vouches for every element; what is only asked for may be anywhere.
    unsafe {
        for block in 0..blocks {
            let (mut a, mut b, c) = (x.a.add(block * M * row), x.b, x.c.add(block * M * x.rs_c));
            let mut acc = [[_mm256_setzero_ps(); 2]; M];
            if x.accumulate {
                for i in 0..M {
                    for j in 0..2 {
                        acc[i][j] = _mm256_loadu_ps(c.add(i * x.rs_c + 8 * j));
                    }
                }
            }
            if x.prefetch {
                for i in 0..M {
                    prefetch(c.wrapping_add((M + i) * x.rs_c));
                }
            }
            let mut step = |a: *const f32, b: *const f32, last: bool| {
                let b_row = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
                for i in 0..M {
                    let a_value = _mm256_set1_ps(*a.add(i * row));
                    for j in 0..2 {
                        acc[i][j] = _mm256_fmadd_ps(a_value, b_row[j], acc[i][j]);
                        if last {
                            _mm256_storeu_ps(c.add(i * x.rs_c + 8 * j), acc[i][j]);
                        }
                    }
                }
            };
            for _ in 0..(k - 1) / STEPS {
                for s in 0..STEPS {
                    step(a.add(s * col), b.add(s * ldb), false);
                }
                (a, b) = (a.add(STEPS * col), b.add(STEPS * ldb));
                // else the compiler keeps one more address for every row and adds to each
                std::arch::asm!("/* {0} */", inout(reg) a, options(pure, readonly, nostack, preserves_flags));
            }
            for _ in 0..(k - 1) % STEPS {
                step(a, b, false);
                (a, b) = (a.add(col), b.add(ldb));
            }
            step(a, b, true);
        }
    }
}

/// As [`strip_avx2`], for fewer columns, in V vectors, and for an A without neighbours.
#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
unsafe fn masked_avx2<const M: usize, const V: usize>(blocks: usize, cols: usize, k: usize, x: Operands<f32>) {
    use std::arch::x86_64::*;
    let (in_last, all) = ((cols - 8 * (V - 1)) as i32, cols == 8 * V);
    let last = _mm256_cmpgt_epi32(_mm256_set1_epi32(in_last), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    // SAFETY: the caller vouches for every element; masked lanes are not touched.
    unsafe {
        let load = |from: *const f32, j: usize| {
            let from = from.add(8 * j);
            if j + 1 < V || all { _mm256_loadu_ps(from) } else { _mm256_maskload_ps(from, last) }
        };
        for block in 0..blocks {
            let (a, c) = (x.a.add(block * M * x.rs_a), x.c.add(block * M * x.rs_c));
            let mut acc = [[_mm256_setzero_ps(); V]; M];
            if x.accumulate {
                for i in 0..M {
                    for j in 0..V {
                        acc[i][j] = load(c.add(i * x.rs_c), j);
                    }
                }
            }
            for p in 0..k {
                let mut b_row = [_mm256_setzero_ps(); V];
                for j in 0..V {
                    b_row[j] = load(x.b.add(p * x.rs_b), j);
                }
                for i in 0..M {
                    let a_value = _mm256_set1_ps(*a.add(i * x.rs_a + p * x.cs_a));
                    for j in 0..V {
                        acc[i][j] = _mm256_fmadd_ps(a_value, b_row[j], acc[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..V {
                    let to = c.add(i * x.rs_c + 8 * j);
                    if j + 1 < V || all {
                        _mm256_storeu_ps(to, acc[i][j]);
                    } else {
                        _mm256_maskstore_ps(to, last, acc[i][j]);
                    }
                }
            }
        }
    }
}
