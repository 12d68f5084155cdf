//! The register kernels under every f32 matrix product: up to 8 rows by up to 32 columns of C in registers.
//!
//! One C element is one chain of fused multiply-adds over the inner index in ascending order, in every instruction set
//! and whatever the blocking, so results do not depend on how rows and columns are grouped. On AVX-512, 8 x 32 are 16
//! accumulators: 16 multiply-adds for 2 loads and 8 broadcasts, which keeps the multipliers of Zen 4 busy. On AVX2 the
//! registers hold 6 x 16.

use super::simd::{Level, prefetch};

/// Rows of a register block.
pub const ROWS: usize = 8;
/// Columns of a register block.
pub const COLS: usize = 32;

/// Columns of a register block on an instruction set that has a kernel: the width of a panel whose rows follow each other in
/// B. On AVX2, panels of 32 of which the kernel takes 16 fill only every other set of the L1 cache.
pub fn width(level: Level) -> usize {
    if level == Level::Avx2 { 16 } else { COLS }
}

/// Operands of one register block: `c[i * ldc + j] (+)= sum_p a[i * row + p * col] * b[p * ldb + j]`.
#[derive(Clone, Copy)]
pub struct Block<T> {
    /// First element of A.
    pub a: *const T,
    /// Distance of A's rows.
    pub row: usize,
    /// Distance of A's columns.
    pub col: usize,
    /// First element of B.
    pub b: *const T,
    /// Distance of B's rows.
    pub ldb: usize,
    /// First element of C.
    pub c: *mut T,
    /// Distance of C's rows.
    pub ldc: usize,
    /// Add to C instead of overwriting it.
    pub add: bool,
    /// A and C come from beyond the second cache: the f32 kernels ask for the next rows while they work on these. On AVX2 of C
    /// only: there, asking for A too costs 6 % where A is near and gains nothing where it is far.
    pub cold: bool,
}

impl<T> Block<T> {
    /// The block that begins `i` rows and `j` columns further.
    ///
    /// # Safety
    /// Its first elements must be inside the allocations.
    #[inline(always)]
    pub unsafe fn at(self, i: usize, j: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Block { a: self.a.add(i * self.row), b: self.b.add(j), c: self.c.add(i * self.ldc + j), ..self } }
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

/// Computes `m` rows by `n` columns over inner length `k`, at least one each, register block by register block.
///
/// The last step stores a row of C as soon as it is done. Stores in a row that all wait for the last sums hold up the next
/// block: on Zen 3, 22 cycles a block instead of 2, of 192 over 32 steps.
///
/// # Safety
/// Every element that the formula of [`Block`] reads or writes must be inside live allocations, and C must not alias A or
/// B. The processor must have the features of `level`, which is not the baseline.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn run_f32(level: Level, m: usize, n: usize, k: usize, x: Block<f32>) {
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
unsafe fn all_avx512(m: usize, n: usize, k: usize, x: Block<f32>) {
    for j in (0..n).step_by(COLS) {
        let cols = COLS.min(n - j);
        for i in (0..m).step_by(ROWS) {
            // SAFETY: the caller's contract; the block is a part of what it vouches for.
            unsafe {
                let x = x.at(i, j);
                if cols > 16 {
                    by_rows!(ROWS.min(m - i), [1 2 3 4 5 6 7 8], M => avx512::<M, 2>(cols, k, x));
                } else {
                    by_rows!(ROWS.min(m - i), [1 2 3 4 5 6 7 8], M => avx512::<M, 1>(cols, k, x));
                }
            }
        }
    }
}

/// 16 registers hold 6 x 16 accumulators, two of B and one of A: 12 multiply-adds for 2 loads and 6 broadcasts. Rows that are
/// no multiple of 6 are cut into blocks of nearly equal length, since 4 and fewer do not keep the multipliers busy.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn all_avx2(m: usize, n: usize, k: usize, x: Block<f32>) {
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
unsafe fn rows_avx2<const M: usize>(blocks: usize, n: usize, k: usize, x: Block<f32>) {
    for j in (0..n).step_by(16) {
        let cols = 16.min(n - j);
        // SAFETY: as above.
        unsafe {
            let x = x.at(0, j);
            match (cols, x.ldb, x.col, x.row) {
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

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const M: usize, const V: usize>(cols: usize, k: usize, x: Block<f32>) {
    use std::arch::x86_64::*;
    let mut masks = [0xffffu16; V];
    masks[V - 1] = 0xffff >> (16 * V - cols);
    let mut acc = [[_mm512_setzero_ps(); V]; M];
    // SAFETY: the caller vouches for every element; masked lanes are not touched.
    unsafe {
        if x.add {
            for i in 0..M {
                for j in 0..V {
                    acc[i][j] = _mm512_maskz_loadu_ps(masks[j], x.c.add(i * x.ldc + 16 * j));
                }
            }
        }
        let mut rows = [x.a; M];
        for i in 0..M {
            rows[i] = x.a.add(i * x.row);
        }
        if x.cold {
            for i in 0..M {
                for j in 0..V {
                    _mm_prefetch::<_MM_HINT_ET0>(x.c.wrapping_add((M + i) * x.ldc + 16 * j).cast());
                }
            }
        }
        let full = |j: usize| j + 1 < V || cols == 16 * V;
        let mut step = |a: usize, p: usize, last: bool| {
            let b = x.b.add(p * x.ldb);
            let mut right = [_mm512_setzero_ps(); V];
            for j in 0..V {
                let from = b.add(16 * j);
                right[j] = if full(j) { _mm512_loadu_ps(from) } else { _mm512_maskz_loadu_ps(masks[j], from) };
            }
            for i in 0..M {
                let left = _mm512_set1_ps(*rows[i].add(a));
                for j in 0..V {
                    acc[i][j] = _mm512_fmadd_ps(left, right[j], acc[i][j]);
                    let to = x.c.add(i * x.ldc + 16 * j);
                    match (last, full(j)) {
                        (false, _) => {}
                        (true, true) => _mm512_storeu_ps(to, acc[i][j]),
                        (true, false) => _mm512_mask_storeu_ps(to, masks[j], acc[i][j]),
                    }
                }
            }
        };
        let last = k - 1;
        if x.col == 1 && x.cold {
            // 16 steps use a line of every row
            for p0 in (0..last).step_by(16) {
                for row in rows {
                    prefetch(row.wrapping_add(M * x.row + p0));
                }
                for p in p0..last.min(p0 + 16) {
                    step(p, p, false);
                }
            }
        } else if x.col == 1 {
            for p in 0..last {
                step(p, p, false);
            }
        } else if x.cold {
            for p in 0..last {
                // rows are neighbours here: two blocks of 8 share a line, so the line after it
                prefetch(rows[0].wrapping_add(p * x.col + 16));
                step(p * x.col, p, false);
            }
        } else {
            for p in 0..last {
                step(p * x.col, p, false);
            }
        }
        step(last * x.col, last, true);
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
unsafe fn strip_avx2<const M: usize, const LDB: usize, const ALONG: bool>(blocks: usize, k: usize, x: Block<f32>) {
    use std::arch::x86_64::*;
    const STEPS: usize = 4;
    let ldb = if LDB > 0 { LDB } else { x.ldb };
    let (row, col) = if ALONG { (x.row, 1) } else { (1, x.col) };
    // SAFETY: the caller vouches for every element; what is only asked for may be anywhere.
    unsafe {
        for block in 0..blocks {
            let (mut a, mut b, c) = (x.a.add(block * M * row), x.b, x.c.add(block * M * x.ldc));
            let mut acc = [[_mm256_setzero_ps(); 2]; M];
            if x.add {
                for i in 0..M {
                    for j in 0..2 {
                        acc[i][j] = _mm256_loadu_ps(c.add(i * x.ldc + 8 * j));
                    }
                }
            }
            if x.cold {
                for i in 0..M {
                    prefetch(c.wrapping_add((M + i) * x.ldc));
                }
            }
            let mut step = |a: *const f32, b: *const f32, last: bool| {
                let right = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
                for i in 0..M {
                    let left = _mm256_set1_ps(*a.add(i * row));
                    for j in 0..2 {
                        acc[i][j] = _mm256_fmadd_ps(left, right[j], acc[i][j]);
                        if last {
                            _mm256_storeu_ps(c.add(i * x.ldc + 8 * j), acc[i][j]);
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
unsafe fn masked_avx2<const M: usize, const V: usize>(blocks: usize, cols: usize, k: usize, x: Block<f32>) {
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
            let (a, c) = (x.a.add(block * M * x.row), x.c.add(block * M * x.ldc));
            let mut acc = [[_mm256_setzero_ps(); V]; M];
            for i in 0..if x.add { M } else { 0 } {
                for j in 0..V {
                    acc[i][j] = load(c.add(i * x.ldc), j);
                }
            }
            for p in 0..k {
                let mut right = [_mm256_setzero_ps(); V];
                for j in 0..V {
                    right[j] = load(x.b.add(p * x.ldb), j);
                }
                for i in 0..M {
                    let left = _mm256_set1_ps(*a.add(i * x.row + p * x.col));
                    for j in 0..V {
                        acc[i][j] = _mm256_fmadd_ps(left, right[j], acc[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..V {
                    let to = c.add(i * x.ldc + 8 * j);
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

/// Side of the square that [`transpose_f32`] transposes.
pub const SIDE: usize = 16;

/// Writes the transpose of a square, rows `stride` apart, to rows `width` apart, by shuffles of registers: 0.23 cycles a number
/// on AVX-512 where the compiler's code for it takes 1.5. Returns whether this instruction set has it.
///
/// # Safety
/// [`SIDE`] rows of both must be inside live allocations, and the processor must have the features of `level`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn transpose_f32(level: Level, from: *const f32, stride: usize, out: *mut f32, width: usize) -> bool {
    // SAFETY: the caller's contract.
    unsafe {
        match level {
            Level::Avx512 => transpose_avx512(from, stride, out, width),
            Level::Avx2 => transpose_avx2(from, stride, out, width),
            Level::Baseline => return false,
        }
    }
    true
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose_avx2(from: *const f32, stride: usize, out: *mut f32, width: usize) {
    use std::arch::x86_64::*;
    const LOWER: i32 = 0x20;
    const UPPER: i32 = 0x31;
    for (i, j) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
        // four rows r: columns c of them in the lower half, columns 4 + c in the upper
        let columns = |r: usize| {
            // SAFETY: the caller vouches for 16 rows of 16.
            let [a, b, c, d] = std::array::from_fn(|k| unsafe { _mm256_loadu_ps(from.add((i + r + k) * stride + j)) });
            let low = |x, y| _mm256_castps_pd(_mm256_unpacklo_ps(x, y));
            let high = |x, y| _mm256_castps_pd(_mm256_unpackhi_ps(x, y));
            let (ab_low, ab_high, cd_low, cd_high) = (low(a, b), high(a, b), low(c, d), high(c, d));
            [
                _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)),
                _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)),
            ]
        };
        for (c, (x, y)) in columns(0).into_iter().zip(columns(4)).enumerate() {
            // SAFETY: as above.
            unsafe {
                _mm256_storeu_ps(out.add((j + c) * width + i), _mm256_permute2f128_ps::<LOWER>(x, y));
                _mm256_storeu_ps(out.add((j + 4 + c) * width + i), _mm256_permute2f128_ps::<UPPER>(x, y));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_avx512(from: *const f32, stride: usize, out: *mut f32, width: usize) {
    use std::arch::x86_64::*;
    let mut rows = [_mm512_setzero_ps(); SIDE];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller vouches for 16 rows of 16.
        *row = unsafe { _mm512_loadu_ps(from.add(i * stride)) };
    }
    // quarters[4 k + c]: in its lane l of four, column 4 l + c of rows 4 k to 4 k + 3
    let mut quarters = rows;
    for k in 0..4 {
        let low = |x, y| _mm512_castps_pd(_mm512_unpacklo_ps(x, y));
        let high = |x, y| _mm512_castps_pd(_mm512_unpackhi_ps(x, y));
        let (a, b, c, d) = (rows[4 * k], rows[4 * k + 1], rows[4 * k + 2], rows[4 * k + 3]);
        let (ab_low, ab_high, cd_low, cd_high) = (low(a, b), high(a, b), low(c, d), high(c, d));
        quarters[4 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
        quarters[4 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
        quarters[4 * k + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
        quarters[4 * k + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
    }
    // lanes 0 and 2, or 1 and 3, of two registers
    const EVEN: i32 = 0x88;
    const ODD: i32 = 0xdd;
    for c in 0..4 {
        let [a, b, d, e] = [quarters[c], quarters[4 + c], quarters[8 + c], quarters[12 + c]];
        let (low, high) = (_mm512_shuffle_f32x4::<EVEN>(a, b), _mm512_shuffle_f32x4::<EVEN>(d, e));
        let lanes_0_2 = [_mm512_shuffle_f32x4::<EVEN>(low, high), _mm512_shuffle_f32x4::<ODD>(low, high)];
        let (low, high) = (_mm512_shuffle_f32x4::<ODD>(a, b), _mm512_shuffle_f32x4::<ODD>(d, e));
        let lanes_1_3 = [_mm512_shuffle_f32x4::<EVEN>(low, high), _mm512_shuffle_f32x4::<ODD>(low, high)];
        for (lane, column) in [(0, lanes_0_2[0]), (1, lanes_1_3[0]), (2, lanes_0_2[1]), (3, lanes_1_3[1])] {
            // SAFETY: the caller vouches for 16 rows of 16.
            unsafe { _mm512_storeu_ps(out.add((4 * lane + c) * width), column) };
        }
    }
}

/// Whether this processor multiplies pairs of bf16 into f32 (AVX512_BF16).
pub fn has_bf16(level: Level) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        level == Level::Avx512 && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        false
    }
}

/// Two neighbours along the inner axis, rounded to bf16 (nearest, ties to even) in one word, the first in the low half.
#[inline(always)]
pub fn pair(first: f32, second: f32) -> u32 {
    let round = |x: f32| {
        let bits = x.to_bits();
        // the quiet bit keeps a NaN a NaN
        if x.is_nan() { (bits >> 16) | 0x40 } else { bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16 }
    };
    round(first) | round(second) << 16
}

/// The same for at most [`COLS`] columns of words of two bf16, read as bits of f32, with f32 sums: both products of a word
/// are added. B has 32 columns a row, whatever `n` and `ldb` are.
///
/// # Safety
/// As [`run_f32`], and [`has_bf16`] must hold.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn run_bf16(m: usize, n: usize, k: usize, x: Block<f32>) {
    for i in (0..m).step_by(ROWS) {
        // SAFETY: the caller's contract; the block is a part of what it vouches for.
        unsafe { by_rows!(ROWS.min(m - i), [1 2 3 4 5 6 7 8], M => avx512_bf16::<M>(n, k, x.at(i, 0))) };
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16<const M: usize>(cols: usize, words: usize, x: Block<f32>) {
    use std::arch::x86_64::*;
    use std::mem::transmute;
    let all = if cols >= COLS { u32::MAX } else { (1u32 << cols) - 1 };
    let masks = [all as u16, (all >> 16) as u16];
    let mut acc = [[_mm512_setzero_ps(); 2]; M];
    // SAFETY: the caller vouches for every element; masked lanes are not touched. __m512bh and __m512i are the same 64
    // bytes.
    unsafe {
        if x.add {
            for i in 0..M {
                for j in 0..2 {
                    acc[i][j] = _mm512_maskz_loadu_ps(masks[j], x.c.add(i * x.ldc + 16 * j));
                }
            }
        }
        let mut rows = [x.a.cast::<i32>(); M];
        for i in 0..M {
            rows[i] = x.a.add(i * x.row).cast();
        }
        for p in 0..words {
            let right: [__m512bh; 2] = [
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(x.b.add(p * COLS).cast())),
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(x.b.add(p * COLS + 16).cast())),
            ];
            for i in 0..M {
                let left = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*rows[i].add(p * x.col)));
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], left, right[0]);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], left, right[1]);
            }
        }
        for i in 0..M {
            for j in 0..2 {
                _mm512_mask_storeu_ps(x.c.add(i * x.ldc + 16 * j), masks[j], acc[i][j]);
            }
        }
    }
}

/// Fused multiply-adds in independent chains that touch no memory: what one core can do at best. Returns the number of
/// f32 operations done, 0 where this instruction set has no kernel. `work` is called with a value that depends on all.
pub fn multiply_add_probe(level: Level, rounds: usize, work: impl FnOnce(f32)) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f")]
        fn wide(rounds: usize) -> f32 {
            let (x, mut acc) = (_mm512_set1_ps(std::hint::black_box(0.5)), [_mm512_set1_ps(1.0); 16]);
            for _ in 0..rounds {
                for a in acc.iter_mut() {
                    *a = _mm512_fmadd_ps(*a, x, x);
                }
            }
            acc.into_iter().map(|a| _mm512_reduce_add_ps(a)).sum()
        }
        #[target_feature(enable = "avx2,fma")]
        fn narrow(rounds: usize) -> f32 {
            let (x, mut acc) = (_mm256_set1_ps(std::hint::black_box(0.5)), [_mm256_set1_ps(1.0); 12]);
            for _ in 0..rounds {
                for a in acc.iter_mut() {
                    *a = _mm256_fmadd_ps(*a, x, x);
                }
            }
            acc.into_iter().map(|a| _mm256_cvtss_f32(a)).sum()
        }
        match level {
            Level::Avx512 => {
                // SAFETY: the level says that the processor has it.
                work(unsafe { wide(rounds) });
                return rounds * 16 * 16 * 2;
            }
            Level::Avx2 => {
                // SAFETY: as above.
                work(unsafe { narrow(rounds) });
                return rounds * 12 * 8 * 2;
            }
            Level::Baseline => {}
        }
    }
    let _ = (level, rounds, work);
    0
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::device::simd::level;
    use crate::rng::Rng;

    /// Every instruction set that this processor has gives the bits of the triple loop, for every number of rows.
    #[test]
    fn every_instruction_set_gives_the_bits_of_the_triple_loop() {
        let mut rng = Rng::new(1);
        let mut draw = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
        let k = 19;
        let mut ran = 0;
        for which in [Level::Avx2, Level::Avx512].into_iter().filter(|w| *w as u8 <= level() as u8) {
            for rows in 1..=ROWS {
                for cols in 1..=COLS {
                    // A's rows, its columns, and neither next to each other
                    for ((row, col), add, cold) in [
                        ((k, 1), false, false),
                        ((k, 1), true, false),
                        ((1, rows), true, false),
                        ((k, 1), true, true),
                        ((1, rows), false, true),
                        ((2 * k, 2), true, false),
                    ] {
                        // as narrow a panel as holds the columns: the AVX2 kernel has code of its own for 16
                        let ldb = cols.next_multiple_of(16);
                        let (a, b, start) = (draw(2 * rows * k), draw(k * ldb), draw(rows * COLS));
                        let mut c = start.clone();
                        let block = Block {
                            a: a.as_ptr(),
                            row,
                            col,
                            b: b.as_ptr(),
                            ldb,
                            c: c.as_mut_ptr(),
                            ldc: COLS,
                            add,
                            cold,
                        };
                        // SAFETY: a holds 2 x rows x k, b k x ldb, c rows x 32; the processor has this level.
                        unsafe { run_f32(which, rows, cols, k, block) };
                        ran += 1;
                        for i in 0..rows {
                            for j in 0..COLS {
                                let mut want = if add || j >= cols { start[i * COLS + j] } else { 0.0 };
                                for p in 0..if j < cols { k } else { 0 } {
                                    want = a[i * row + p * col].mul_add(b[p * ldb + j], want);
                                }
                                assert_eq!(c[i * COLS + j], want, "{which:?} {rows} x {cols} at {i}, {j}");
                            }
                        }
                    }
                }
            }
        }
        assert!(ran > 0 || level() == Level::Baseline);
    }
}
