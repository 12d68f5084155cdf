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

/// Computes `m` rows by `n` columns, at least one each, over inner length `k`, register block by register block.
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

/// `blocks` blocks of M rows, one under the other: a function of its own, so that the loop's addresses stay in registers.
#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2<const M: usize>(blocks: usize, n: usize, k: usize, x: Block<f32>) {
    for j in (0..n).step_by(16) {
        let cols = 16.min(n - j);
        for i in 0..blocks {
            // SAFETY: as above.
            unsafe {
                let x = x.at(i * M, j);
                match (cols > 8, x.ldb) {
                    (true, 16) => avx2::<M, 2, 16>(cols, k, x),
                    (true, _) => avx2::<M, 2, 0>(cols, k, x),
                    (false, _) => avx2::<M, 1, 0>(cols, k, x),
                }
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
        let mut step = |a: usize, p: usize| {
            let b = x.b.add(p * x.ldb);
            let mut right = [_mm512_setzero_ps(); V];
            for j in 0..V {
                right[j] = if j + 1 < V || cols == 16 * V {
                    _mm512_loadu_ps(b.add(16 * j))
                } else {
                    _mm512_maskz_loadu_ps(masks[j], b.add(16 * j))
                };
            }
            for i in 0..M {
                let left = _mm512_set1_ps(*rows[i].add(a));
                for j in 0..V {
                    acc[i][j] = _mm512_fmadd_ps(left, right[j], acc[i][j]);
                }
            }
        };
        if x.col == 1 && x.cold {
            // 16 steps use a line of every row
            for p0 in (0..k).step_by(16) {
                for row in rows {
                    prefetch(row.wrapping_add(M * x.row + p0));
                }
                for p in p0..k.min(p0 + 16) {
                    step(p, p);
                }
            }
        } else if x.col == 1 {
            for p in 0..k {
                step(p, p);
            }
        } else if x.cold {
            for p in 0..k {
                // rows are neighbours here: two blocks of 8 share a line, so the line after it
                prefetch(rows[0].wrapping_add(p * x.col + 16));
                step(p * x.col, p);
            }
        } else {
            for p in 0..k {
                step(p * x.col, p);
            }
        }
        for i in 0..M {
            for j in 0..V {
                _mm512_mask_storeu_ps(x.c.add(i * x.ldc + 16 * j), masks[j], acc[i][j]);
            }
        }
    }
}

/// `LDB` is the distance of B's rows where the compiler may know it, else 0.
///
/// Steps are written four at a time, so that little but loads and multiply-adds is issued: on a core that another thread shares,
/// the instructions around the multiply-adds cost time (79 instead of 88 GFLOP/s of 104); on a core of its own it makes no
/// difference.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const M: usize, const V: usize, const LDB: usize>(cols: usize, k: usize, x: Block<f32>) {
    use std::arch::x86_64::*;
    const STEPS: usize = 4;
    let ldb = if LDB > 0 { LDB } else { x.ldb };
    let full = cols == 8 * V;
    let last =
        _mm256_cmpgt_epi32(_mm256_set1_epi32((cols - 8 * (V - 1)) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    // SAFETY: the caller vouches for every element; masked lanes are not touched.
    unsafe {
        let load = |at: *const f32, j: usize| {
            if j + 1 < V || full { _mm256_loadu_ps(at.add(8 * j)) } else { _mm256_maskload_ps(at.add(8 * j), last) }
        };
        let mut acc = [[_mm256_setzero_ps(); V]; M];
        if x.add {
            for i in 0..M {
                for j in 0..V {
                    acc[i][j] = load(x.c.add(i * x.ldc), j);
                }
            }
        }
        let mut rows = [x.a; M];
        for i in 0..M {
            rows[i] = x.a.add(i * x.row);
        }
        if x.cold {
            for i in 0..M {
                prefetch(x.c.wrapping_add((M + i) * x.ldc));
            }
        }
        let mut step = |left: [*const f32; M], b: *const f32, full: bool| {
            let mut right = [_mm256_setzero_ps(); V];
            for j in 0..V {
                right[j] = if full { _mm256_loadu_ps(b.add(8 * j)) } else { load(b, j) };
            }
            for i in 0..M {
                let left = _mm256_set1_ps(*left[i]);
                for j in 0..V {
                    acc[i][j] = _mm256_fmadd_ps(left, right[j], acc[i][j]);
                }
            }
        };
        // addresses past the last step are made, not read
        let (mut done, mut a, mut b) = (0, x.a, x.b);
        if full && x.col == 1 {
            while done + STEPS <= k {
                for p in done..done + STEPS {
                    step(rows.map(|row| row.add(p)), b, true);
                    b = b.wrapping_add(ldb);
                }
                done += STEPS;
            }
        } else if full && x.row == 1 {
            // rows are neighbours: one address serves them all
            while done + STEPS <= k {
                for _ in 0..STEPS {
                    step(std::array::from_fn(|i| a.add(i)), b, true);
                    (a, b) = (a.wrapping_add(x.col), b.wrapping_add(ldb));
                }
                done += STEPS;
            }
        }
        if full {
            for p in done..k {
                step(rows.map(|row| row.add(p * x.col)), x.b.add(p * ldb), true);
            }
        } else {
            for p in 0..k {
                step(rows.map(|row| row.add(p * x.col)), x.b.add(p * ldb), false);
            }
        }
        for i in 0..M {
            for j in 0..V {
                let to = x.c.add(i * x.ldc + 8 * j);
                if j + 1 < V || full {
                    _mm256_storeu_ps(to, acc[i][j]);
                } else {
                    _mm256_maskstore_ps(to, last, acc[i][j]);
                }
            }
        }
    }
}

/// Side of the square that [`transpose_f32`] transposes: a vector of vectors.
pub const SIDE: usize = 16;

/// Writes the transpose of a square to rows `width` apart, in 64 shuffles of registers: 0.23 cycles a number where the
/// compiler's code for it takes 1.5. Returns whether this instruction set has it.
///
/// # Safety
/// [`SIDE`] rows of `out` must be inside a live allocation, and the processor must have the features of `level`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn transpose_f32(level: Level, square: &[[f32; SIDE]; SIDE], out: *mut f32, width: usize) -> bool {
    if level == Level::Avx512 {
        // SAFETY: the caller's contract.
        unsafe { transpose_avx512(square, out, width) };
    }
    level == Level::Avx512
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_avx512(square: &[[f32; SIDE]; SIDE], out: *mut f32, width: usize) {
    use std::arch::x86_64::*;
    let mut rows = [_mm512_setzero_ps(); SIDE];
    for (row, from) in rows.iter_mut().zip(square) {
        // SAFETY: a row of the square is 16 numbers.
        *row = unsafe { _mm512_loadu_ps(from.as_ptr()) };
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
                    for (transposed, add, cold) in [
                        (false, false, false),
                        (false, true, false),
                        (true, true, false),
                        (false, true, true),
                        (true, false, true),
                    ] {
                        // as narrow a panel as holds the columns: the AVX2 kernel has code of its own for 16
                        let ldb = cols.next_multiple_of(16);
                        let (a, b, start) = (draw(rows * k), draw(k * ldb), draw(rows * COLS));
                        let (row, col) = if transposed { (1, rows) } else { (k, 1) };
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
                        // SAFETY: a holds rows x k, b k x ldb, c rows x 32; the processor has this level.
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
