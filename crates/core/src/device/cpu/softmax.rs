//! The inner loops of block-wise softmax in f32, in registers.
//!
//! 2^x is a chain of 14 dependent operations. Compiled for one vector after the other, the chains fill the queues of the
//! processor before they fill its multipliers: 13 cycles a vector on AVX2. Here [`KEYS`] keys take every step together, which
//! takes 7. Every element goes through the operations of [`crate::number::Number::exp2`] and is added in the order of keys, so
//! the bits are those of the plain loop.

#[cfg(target_arch = "x86_64")]
use super::level::{Level, level};
use super::matrix::holds;
use super::simd::LANES;

/// Keys that take every step together: 2, 4 and 6 were measured, 4 and 6 are equal.
const KEYS: usize = 4;

/// Loops over scores `[keys, ..]`, keys `stride` apart, of [`LANES`] rows: the first whole [`KEYS`] of them. Each returns how
/// many keys it has done.
#[derive(Clone, Copy)]
pub struct SoftmaxKernels<T> {
    row_max: unsafe fn(*const T, usize, usize, &mut [T; LANES]),
    exp_sum: unsafe fn(*mut T, usize, usize, T, &[T; LANES], &mut [T; LANES]),
    score_grad: unsafe fn(*mut T, *mut T, usize, usize, &ScoreGrad<T>, &mut [T; LANES]),
}

/// What [`SoftmaxKernels::score_grad`] computes with, a lane a row where it is an array.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for the register kernels of x86-64"))]
pub struct ScoreGrad<T> {
    /// Scores are multiplied with it.
    pub scale: T,
    /// Added to scaled scores.
    pub shift: [T; LANES],
    /// Subtracted from dp.
    pub delta: [T; LANES],
    /// ds is multiplied with it.
    pub factor: T,
}

/// The keys in whole groups of [`KEYS`], of `keys` whose lanes are inside `len` elements.
fn grouped(len: usize, keys: usize, stride: usize) -> usize {
    assert!(holds(len, [(keys, stride), (LANES, 1)]), "{len} elements, {keys} keys {stride} apart");
    keys - keys % KEYS
}

impl<T> SoftmaxKernels<T> {
    /// `max = max(max, s)`.
    pub fn row_max(&self, s: &[T], (keys, stride): (usize, usize), max: &mut [T; LANES]) -> usize {
        let done = grouped(s.len(), keys, stride);
        // SAFETY: every key's lanes are inside the slice, and who handed the table out knows the processor.
        unsafe { (self.row_max)(s.as_ptr(), done, stride, max) };
        done
    }

    /// `s = 2^(s scale + shift)`, `total += s`.
    pub fn exp_sum(
        &self,
        s: &mut [T],
        (keys, stride): (usize, usize),
        (scale, shift): (T, &[T; LANES]),
        total: &mut [T; LANES],
    ) -> usize {
        let done = grouped(s.len(), keys, stride);
        // SAFETY: as above.
        unsafe { (self.exp_sum)(s.as_mut_ptr(), done, stride, scale, shift, total) };
        done
    }

    /// `s = 2^(s scale + shift)`, `ds = s (dp - delta)`, `total += ds`, `dp = ds factor`.
    pub fn score_grad(
        &self,
        (s, dp): (&mut [T], &mut [T]),
        (keys, stride): (usize, usize),
        x: &ScoreGrad<T>,
        total: &mut [T; LANES],
    ) -> usize {
        let done = grouped(s.len().min(dp.len()), keys, stride);
        // SAFETY: as above.
        unsafe { (self.score_grad)(s.as_mut_ptr(), dp.as_mut_ptr(), done, stride, x, total) };
        done
    }
}

/// None: for other element types and processors.
pub fn none<T>() -> Option<SoftmaxKernels<T>> {
    None
}

/// Of this processor.
#[cfg(target_arch = "x86_64")]
pub fn of_f32() -> Option<SoftmaxKernels<f32>> {
    of(level())
}

#[cfg(target_arch = "x86_64")]
fn of(level: Level) -> Option<SoftmaxKernels<f32>> {
    match level {
        Level::Avx512 => Some(avx512::KERNELS),
        Level::Avx2 => Some(avx2::KERNELS),
        Level::Baseline => None,
    }
}

/// The three loops in vectors `$V` of `$N` numbers.
#[cfg(target_arch = "x86_64")]
macro_rules! softmax_kernels {
    ($name:ident, $features:literal, $V:ty, $N:literal, $load:ident $store:ident $splat:ident $fma:ident $add:ident $sub:ident
     $mul:ident $max:ident $min:ident $to_bits:ident $from_bits:ident $splat_bits:ident $add_bits:ident $shift_left:ident) => {
        mod $name {
            use std::arch::x86_64::*;
            use std::array::from_fn;

            use super::{KEYS, LANES, ScoreGrad, SoftmaxKernels};
            use crate::number::EXP2;

            pub const KERNELS: SoftmaxKernels<f32> = SoftmaxKernels { row_max, exp_sum, score_grad };

            #[inline]
            #[target_feature(enable = $features)]
            fn exp2(x: [$V; KEYS]) -> [$V; KEYS] {
                // if one is NaN, max and min give the second
                let x = x.map(|x| $min($splat(EXP2.highest), $max($splat(EXP2.lowest), x)));
                let shifted = x.map(|x| $add(x, $splat(EXP2.round)));
                let n = shifted.map(|n| $sub(n, $splat(EXP2.round)));
                let r: [$V; KEYS] = from_fn(|i| $sub(x[i], n[i]));
                let mut p = [$splat(EXP2.polynomial[0]); KEYS];
                for &c in &EXP2.polynomial[1..] {
                    p = from_fn(|i| $fma(p[i], r[i], $splat(c)));
                }
                let field = shifted.map(|n| $from_bits($shift_left::<23>($add_bits($to_bits(n), $splat_bits(127)))));
                from_fn(|i| $mul(p[i], field[i]))
            }

            #[target_feature(enable = $features)]
            unsafe fn row_max(s: *const f32, keys: usize, stride: usize, max: &mut [f32; LANES]) {
                for (lane, max) in max.chunks_exact_mut($N).enumerate() {
                    // SAFETY: the caller vouches for the lanes of every key; max is a vector.
                    unsafe {
                        let mut most = $load(max.as_ptr());
                        for key in 0..keys {
                            most = $max($load(s.add(key * stride + lane * $N)), most);
                        }
                        $store(max.as_mut_ptr(), most);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn exp_sum(
                s: *mut f32,
                keys: usize,
                stride: usize,
                scale: f32,
                shift: &[f32; LANES],
                total: &mut [f32; LANES],
            ) {
                for (lane, (shift, total)) in shift.chunks_exact($N).zip(total.chunks_exact_mut($N)).enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        let (scale, shift) = ($splat(scale), $load(shift.as_ptr()));
                        let mut sum = $load(total.as_ptr());
                        for key in (0..keys).step_by(KEYS) {
                            let at = |i: usize| s.add((key + i) * stride + lane * $N);
                            for (i, p) in exp2(from_fn(|i| $fma($load(at(i)), scale, shift))).into_iter().enumerate() {
                                $store(at(i), p);
                                sum = $add(sum, p);
                            }
                        }
                        $store(total.as_mut_ptr(), sum);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn score_grad(
                s: *mut f32,
                dp: *mut f32,
                keys: usize,
                stride: usize,
                x: &ScoreGrad<f32>,
                total: &mut [f32; LANES],
            ) {
                for (lane, total) in total.chunks_exact_mut($N).enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        let vector = |x: &[f32; LANES]| $load(x[lane * $N..].as_ptr());
                        let (shift, delta) = (vector(&x.shift), vector(&x.delta));
                        let (scale, factor) = ($splat(x.scale), $splat(x.factor));
                        let mut sum = $load(total.as_ptr());
                        for key in (0..keys).step_by(KEYS) {
                            let at = |i: usize| (key + i) * stride + lane * $N;
                            let p = exp2(from_fn(|i| $fma($load(s.add(at(i))), scale, shift)));
                            for (i, p) in p.into_iter().enumerate() {
                                let ds = $mul(p, $sub($load(dp.add(at(i))), delta));
                                $store(s.add(at(i)), p);
                                $store(dp.add(at(i)), $mul(ds, factor));
                                sum = $add(sum, ds);
                            }
                        }
                        $store(total.as_mut_ptr(), sum);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
softmax_kernels!(avx2, "avx2,fma", __m256, 8, _mm256_loadu_ps _mm256_storeu_ps _mm256_set1_ps _mm256_fmadd_ps _mm256_add_ps _mm256_sub_ps
    _mm256_mul_ps _mm256_max_ps _mm256_min_ps _mm256_castps_si256 _mm256_castsi256_ps _mm256_set1_epi32 _mm256_add_epi32
    _mm256_slli_epi32);
#[cfg(target_arch = "x86_64")]
softmax_kernels!(avx512, "avx512f", __m512, 16, _mm512_loadu_ps _mm512_storeu_ps _mm512_set1_ps _mm512_fmadd_ps _mm512_add_ps _mm512_sub_ps
    _mm512_mul_ps _mm512_max_ps _mm512_min_ps _mm512_castps_si512 _mm512_castsi512_ps _mm512_set1_epi32 _mm512_add_epi32
    _mm512_slli_epi32);

#[cfg(all(test, target_arch = "x86_64", not(miri)))]
mod tests {
    use super::*;
    use crate::device::cpu::level::available;
    use crate::number::Number;
    use crate::rng::Rng;

    /// Every instruction set that this processor has gives the bits of the plain loops, and leaves what is not its own.
    #[test]
    fn every_instruction_set_gives_the_bits_of_the_plain_loops() {
        let mut rng = Rng::new(1);
        let mut draw = |n: usize| (0..n).map(|_| 40.0 * rng.normal() as f32).collect::<Vec<f32>>();
        let (keys, stride) = (3 * KEYS + 1, LANES + 3);
        let mut ran = 0;
        for which in available().filter(|&which| which != Level::Baseline) {
            let kernels = of(which).expect("it is no baseline");
            let (mut s, mut dp) = (draw(keys * stride), draw(keys * stride));
            for (i, odd) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30].into_iter().enumerate() {
                (s[i * stride + i], dp[i * stride + 2 * i]) = (odd, odd);
            }
            let lanes = |x: Vec<f32>| <[f32; LANES]>::try_from(x).expect("as many");
            let (shift, delta, before) = (lanes(draw(LANES)), lanes(draw(LANES)), lanes(draw(LANES)));
            let score_grad = ScoreGrad { scale: 0.7, shift, delta, factor: 0.3 };

            let mut top = before;
            assert_eq!(kernels.row_max(&s, (keys, stride), &mut top), 3 * KEYS);
            let (mut power, mut power_total) = (s.clone(), before);
            assert_eq!(kernels.exp_sum(&mut power, (keys, stride), (0.7, &shift), &mut power_total), 3 * KEYS);
            let (mut p, mut ds, mut ds_total) = (s.clone(), dp.clone(), before);
            assert_eq!(kernels.score_grad((&mut p, &mut ds), (keys, stride), &score_grad, &mut ds_total), 3 * KEYS);

            let (mut want_p, mut want_ds) = (s.clone(), dp.clone());
            for lane in 0..LANES {
                let mut want = [before[lane]; 3];
                for at in (0..3 * KEYS).map(|key| key * stride + lane) {
                    let (z, g) = (s[at], dp[at]);
                    want[0] = Number::max(z, want[0]);
                    want_p[at] = Number::exp2(z.mul_add(0.7, shift[lane]));
                    want[1] += want_p[at];
                    let slope = want_p[at] * (g - delta[lane]);
                    want[2] += slope;
                    want_ds[at] = slope * 0.3;
                }
                let got = [top[lane], power_total[lane], ds_total[lane]];
                assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "{which:?} lane {lane}: {got:?}, {want:?}");
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&power), bits(&want_p), "{which:?}");
            assert_eq!(bits(&p), bits(&want_p), "{which:?}");
            assert_eq!(bits(&ds), bits(&want_ds), "{which:?}");
            ran += 1;
        }
        assert!(ran > 0 || available().count() == 1);
    }
}
