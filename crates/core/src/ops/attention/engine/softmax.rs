//! The loops over scores `[keys, lanes]`: a lane is a row, one (query, head) pair, and a vector holds one key of [`LANES`] rows.

use crate::device::cpu::simd::{self, LANES, simd};
use crate::device::cpu::softmax::{ScoreGrad, SoftmaxKernels};
use crate::device::{Buffer, CpuDevice, CpuNumber};

/// What the engine knows of the rows that work on a block, in whole vectors.
pub(super) struct Lanes<T: CpuNumber> {
    /// lanes that count now, whole vectors
    pub used: usize,
    /// `[lanes]`: keys of the block that a row sees
    pub live: Buffer<u32>,
    /// `[lanes]`: bias times log2 e, in backward minus lse
    pub bias: Buffer<T>,
}

impl<T: CpuNumber> Lanes<T> {
    pub fn new(device: &CpuDevice, lanes: usize) -> Self {
        Lanes { used: 0, live: device.zeros(lanes), bias: device.zeros(lanes) }
    }

    /// Takes the heads of `queries`, each of which sees `sees(query)` keys of a block of `keys`. Lanes without a row see all, so
    /// that they do not slow their vector down.
    pub fn take(&mut self, queries: &[u32], group: usize, keys: usize, sees: impl Fn(u32) -> usize) {
        let m = queries.len() * group;
        self.used = m.next_multiple_of(LANES);
        for (live, &query) in self.live.chunks_exact_mut(group).zip(queries) {
            live.fill(keys.min(sees(query)) as u32);
        }
        self.live[m..self.used].fill(keys as u32);
    }
}

/// The largest of the scores `s [keys, lanes]` of each lane of a vector, over the keys that it sees: all lanes see the first `all_live` of `keys`.
#[inline(always)]
fn lane_max<T: CpuNumber>(
    kernels: Option<SoftmaxKernels<T>>,
    s: &[T],
    (first, lanes): (usize, usize),
    all_live: usize,
    keys: usize,
    live: &[u32; LANES],
) -> [T; LANES] {
    let mut max = [T::NEG_INF; LANES];
    let done = kernels.map_or(0, |kernels| kernels.row_max(&s[first..], (all_live, lanes), &mut max));
    for key in done..all_live {
        let z = vector(s, key * lanes + first);
        for l in 0..LANES {
            max[l] = z[l].max(max[l]);
        }
    }
    for key in all_live..keys {
        let z = vector(s, key * lanes + first);
        for l in 0..LANES {
            max[l] = if live[l] > key as u32 { z[l].max(max[l]) } else { max[l] };
        }
    }
    max
}

/// Turns the scores of a vector of `s [keys, lanes]` into 2^(z scale + shift), zero past the live keys, and returns the sum of each lane.
#[inline(always)]
fn lane_exp<T: CpuNumber>(
    kernels: Option<SoftmaxKernels<T>>,
    s: &mut [T],
    (first, lanes): (usize, usize),
    all_live: usize,
    keys: usize,
    live: &[u32; LANES],
    (scale, shift): (T, &[T; LANES]),
) -> [T; LANES] {
    let mut total = [T::ZERO; LANES];
    let done =
        kernels.map_or(0, |kernels| kernels.exp_sum(&mut s[first..], (all_live, lanes), (scale, shift), &mut total));
    for key in done..all_live {
        let z = vector_mut(s, key * lanes + first);
        for l in 0..LANES {
            z[l] = z[l].mul_add(scale, shift[l]).exp2();
            total[l] += z[l];
        }
    }
    for key in all_live..keys {
        let z = vector_mut(s, key * lanes + first);
        for l in 0..LANES {
            let p = z[l].mul_add(scale, shift[l]).exp2();
            z[l] = if live[l] > key as u32 { p } else { T::ZERO };
            total[l] += z[l];
        }
    }
    total
}

simd! {
    /// Absorbs scores `[keys, lanes]` into the running softmax of their rows: on return they hold 2^(z - new max), zero past
    /// the live keys. `factors` are for what was accumulated before. Lanes without a row must hold finite numbers.
    pub(super) fn absorb<T>(s: &mut [T], keys: usize, x: &Lanes<T>, scale: T, max: &mut [T], sum: &mut [T], factors: &mut [T]) {
        let (lanes, kernels) = (x.live.len(), T::softmax_kernels());
        for first in (0..x.used).step_by(LANES) {
            let live = vector(&x.live, first);
            let all_live = least(&live).min(keys);
            let mut new_max = lane_max(kernels, s, (first, lanes), all_live, keys, &live);
            let (bias, before) = (vector(&x.bias, first), vector(max, first));
            let (mut shift, mut factor) = ([T::ZERO; LANES], [T::ZERO; LANES]);
            for l in 0..LANES {
                new_max[l] = new_max[l].mul_add(scale, bias[l]).max(before[l]);
                shift[l] = bias[l] - new_max[l];
                factor[l] = (before[l] - new_max[l]).exp2();
            }
            let total = lane_exp(kernels, s, (first, lanes), all_live, keys, &live, (scale, &shift));
            let sum = vector_mut(sum, first);
            for l in 0..LANES {
                sum[l] = sum[l].mul_add(factor[l], total[l]);
            }
            *vector_mut(max, first) = new_max;
            *vector_mut(factors, first) = factor;
        }
    }
}

/// The vector that begins at `first`.
#[inline(always)]
fn vector<T: Copy>(x: &[T], first: usize) -> [T; LANES] {
    x[first..][..LANES].try_into().expect("a whole vector")
}

#[inline(always)]
fn vector_mut<T>(x: &mut [T], first: usize) -> &mut [T; LANES] {
    (&mut x[first..][..LANES]).try_into().expect("a whole vector")
}

#[inline(always)]
fn least(live: &[u32; LANES]) -> usize {
    live.iter().fold(u32::MAX, |least, &n| least.min(n)) as usize
}

simd! {
    /// acc = acc * factors + new, of `acc` and `new [rows, d]` and `factors [rows]`.
    pub(super) fn accumulate<T>(acc: &mut [T], factors: &[T], new: &[T], d: usize) {
        for ((acc, &factor), new) in acc.chunks_exact_mut(d).zip(factors).zip(new.chunks_exact(d)) {
            for (a, &x) in acc.iter_mut().zip(new) {
                *a = a.mul_add(factor, x);
            }
        }
    }
}

simd! {
    /// Scores times a factor.
    pub(crate) fn scale_row<T>(row: &mut [T], factor: T) {
        for x in row.iter_mut() {
            *x *= factor;
        }
    }
}

simd! {
    pub(super) fn scale_into<T>(x: &[T], factor: T, out: &mut [T]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = x * factor;
        }
    }
}

simd! {
    /// From scores and dp `[keys, lanes]`: p into `s`, factor * ds into `dp`, and sum ds (without the factor) of each row into
    /// `totals`. The scales are factor * log2 e and factor.
    pub(super) fn differentiate<T>(
        s: &mut [T],
        dp: &mut [T],
        keys: usize,
        x: &Lanes<T>,
        scales: (T, T),
        delta: &[T],
        totals: &mut [T],
    ) {
        let (lanes, (scale, factor), kernels) = (x.live.len(), scales, T::softmax_kernels());
        for first in (0..x.used).step_by(LANES) {
            let (live, bias, delta) = (vector(&x.live, first), vector(&x.bias, first), vector(delta, first));
            let all_live = least(&live).min(keys);
            let mut total = [T::ZERO; LANES];
            let score_grad = ScoreGrad { scale, shift: bias, delta, factor };
            let done = kernels.map_or(0, |kernels| {
                kernels.score_grad((&mut s[first..], &mut dp[first..]), (all_live, lanes), &score_grad, &mut total)
            });
            for key in done..all_live {
                let (z, g) = (vector_mut(s, key * lanes + first), vector_mut(dp, key * lanes + first));
                for l in 0..LANES {
                    let p = z[l].mul_add(scale, bias[l]).exp2();
                    let ds = p * (g[l] - delta[l]);
                    z[l] = p;
                    total[l] += ds;
                    g[l] = ds * factor;
                }
            }
            for key in all_live..keys {
                let (z, g) = (vector_mut(s, key * lanes + first), vector_mut(dp, key * lanes + first));
                for l in 0..LANES {
                    let p = z[l].mul_add(scale, bias[l]).exp2();
                    let ds = p * (g[l] - delta[l]);
                    let sees = live[l] > key as u32;
                    z[l] = if sees { p } else { T::ZERO };
                    let ds = if sees { ds } else { T::ZERO };
                    total[l] += ds;
                    g[l] = ds * factor;
                }
            }
            *vector_mut(totals, first) = total;
        }
    }
}

simd! {
    pub(super) fn row_dot<T>(a: &[T], b: &[T]) -> T {
        simd::dot(a, b)
    }
}
