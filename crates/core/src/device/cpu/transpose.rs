//! Transposes, through registers.

#[cfg(target_arch = "x86_64")]
use super::level::Level;
use super::level::level;
use super::matrix::{MatMut, MatRef, holds};
use super::simd::simd;
use crate::device::CpuNumber;

simd! {
    /// Writes the transpose of the `[rows, cols]` of `from`, whose rows are contiguous, as [cols, width], zero past the last row.
    pub fn transpose_into<T>(from: MatRef<T>, rows: usize, cols: usize, to: MatMut<T>, width: usize) {
        let (MatRef { data: src, row_stride: stride, .. }, MatMut { data: out, row_stride: ld }) = (from, to);
        debug_assert!(from.col_stride == 1, "contiguous rows");
        // 16 x 16 elements at a time, through registers: every line is read and written once
        for i0 in (0..width).step_by(SIDE) {
            let (out_cols, in_rows) = (SIDE.min(width - i0), SIDE.min(rows.saturating_sub(i0)));
            for p0 in (0..cols).step_by(SIDE) {
                let out_rows = SIDE.min(cols - p0);
                let square: [[T; SIDE]; SIDE];
                let (from, from_stride) = if (in_rows, out_rows) == (SIDE, SIDE) {
                    (&src[i0 * stride + p0..], stride)
                } else {
                    square = padded_square(&src[(i0 * stride + p0).min(src.len())..], stride, (in_rows, out_rows));
                    (square.as_flattened(), SIDE)
                };
                let to = &mut out[p0 * ld + i0..];
                if (out_cols, out_rows) == (SIDE, SIDE) {
                    let square_of = |stride: usize| [(SIDE, stride), (SIDE, 1)];
                    let fits = holds(from.len(), square_of(from_stride)) && holds(to.len(), square_of(ld));
                    assert!(fits, "{SIDE} rows of {SIDE}");
                    // SAFETY: the assert bounds every row; the level is this processor's.
                    if unsafe { T::transpose(level(), from.as_ptr(), from_stride, to.as_mut_ptr(), ld) } {
                        continue;
                    }
                }
                for p in 0..out_rows {
                    let line: [T; SIDE] = std::array::from_fn(|i| from[i * from_stride + p]);
                    to[p * ld..][..out_cols].copy_from_slice(&line[..out_cols]);
                }
            }
        }
    }
}

/// `rows` rows of `cols` numbers, `stride` apart, as a square with zeros around them.
#[inline(always)]
fn padded_square<T: CpuNumber>(src: &[T], stride: usize, (rows, cols): (usize, usize)) -> [[T; SIDE]; SIDE] {
    std::array::from_fn(|i| {
        let mut row = [T::ZERO; SIDE];
        if i < rows {
            let from = &src[i * stride..][..cols];
            match from.first_chunk() {
                Some(from) => row = *from,
                None => row[..cols].copy_from_slice(from),
            }
        }
        row
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_every_shape_and_fills_with_zeros() {
        for (rows, cols, width, ld) in
            [(16, 16, 16, 16), (32, 40, 32, 33), (17, 33, 48, 48), (3, 5, 7, 9), (0, 4, 32, 32), (31, 16, 32, 64)]
        {
            let stride = cols + 3;
            let src: Vec<f32> = (0..rows * stride).map(|i| 1.0 + i as f32).collect();
            let mut out = vec![f32::INFINITY; cols * ld];
            transpose_into(MatRef::rows(&src, stride), rows, cols, MatMut::rows(&mut out, ld), width);
            for p in 0..cols {
                for i in 0..ld {
                    let past = if i < width { 0.0 } else { f32::INFINITY };
                    let want = if i < rows { src[i * stride + p] } else { past };
                    assert_eq!(out[p * ld + i], want, "{rows} x {cols} at {p}, {i}");
                }
            }
        }
    }
}
