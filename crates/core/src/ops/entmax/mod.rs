//! alpha-entmax over the last axis (Peters et al. 2019, arXiv 1905.05702), 1 < alpha <= 2:
//! p_i = [(alpha-1) z_i - tau]_+^(1/(alpha-1)) with tau such that sum p = 1. Minus infinity gives exactly 0; a row of
//! nothing else gives all zeros. Kept for backward: p. With r = p^(2-alpha) on the support and 0 off it,
//! dz = r (dp - <r, dp> / sum r).
//!
//! The solver. Let x = (alpha-1)(z - max z), beta = 1/(alpha-1), u = [x - tau]_+. The norm |u|_beta is convex and
//! falling in tau, because it is a norm of convex non-negative functions, so Newton on |u|_beta = 1 started at tau = -1
//! (where the largest element alone has norm 1) rises to the root and never passes it. For equal scores the norm is
//! linear in tau and one step is exact: the flat rows of a fresh model, on which a fixed number of Halley steps on
//! sum p = 1 fails, are the easiest here. Iteration ends when rounding stops the rise.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::CpuNumber;
use crate::device::cpu::simd::{self, LANES, simd, sum_lanes};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Rounding ends the rise after 4 to 9 steps on real rows; no row of the tests needs more than 40.
const MAX_STEPS: usize = 100;

/// (sum u, sum u^2) for u = [x - tau]_+
#[inline(always)]
fn moments<T: CpuNumber>(x: &[T], tau: T) -> (T, T) {
    let (mut first, mut second) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for l in 0..LANES {
            let u = (x[l] - tau).max(T::ZERO);
            first[l] += u;
            second[l] = u.mul_add(u, second[l]);
        }
    }
    for (l, &x) in rest.iter().enumerate() {
        let u = (x - tau).max(T::ZERO);
        first[l] += u;
        second[l] = u.mul_add(u, second[l]);
    }
    (sum_lanes(first), sum_lanes(second))
}

/// (sum u^(beta-1), sum u^beta) over the support
#[inline(always)]
fn powers<T: CpuNumber>(x: &[T], tau: T, beta: T) -> (T, T) {
    let (mut low, mut high) = (T::ZERO, T::ZERO);
    for &x in x {
        if x > tau {
            let u = x - tau;
            let power = if beta == T::ONE { T::ONE } else { u.powf(beta - T::ONE) };
            low += power;
            high += power * u;
        }
    }
    (low, high)
}

simd! {
    /// Replaces the scores of one row by their alpha-entmax.
    pub(crate) fn entmax_row<T>(row: &mut [T], alpha: f64) {
        let top = simd::max(row);
        if top == T::NEG_INF {
            row.fill(T::ZERO);
            return;
        }
        let factor = T::of(alpha - 1.0);
        for x in row.iter_mut() {
            *x = (*x - top) * factor;
        }
        let mut tau = -T::ONE;
        if alpha == 1.5 {
            for _ in 0..MAX_STEPS {
                let (first, second) = moments(row, tau);
                let norm = second.sqrt();
                let next = tau + (norm - T::ONE) * norm / first;
                if next <= tau || !next.is_finite() {
                    break;
                }
                tau = next;
            }
            for x in row.iter_mut() {
                let u = (*x - tau).max(T::ZERO);
                *x = u * u;
            }
        } else {
            let beta = T::of(1.0 / (alpha - 1.0));
            for _ in 0..MAX_STEPS {
                let (low, high) = powers(row, tau, beta);
                let norm = high.powf(T::ONE / beta);
                let next = tau + (norm - T::ONE) * norm.powf(beta - T::ONE) / low;
                if next <= tau || !next.is_finite() {
                    break;
                }
                tau = next;
            }
            for x in row.iter_mut() {
                *x = if *x > tau { (*x - tau).powf(beta) } else { T::ZERO };
            }
        }
    }
}

/// `p^(2 - alpha)` on the support, 0 off it: the factor r of the Jacobian; alpha 1 is softmax.
#[inline(always)]
pub(crate) fn jacobian_factor<T: CpuNumber>(p: T, alpha: f64) -> T {
    if p == T::ZERO {
        T::ZERO
    } else if alpha == 1.5 {
        p.sqrt()
    } else if alpha == 1.0 {
        p
    } else if alpha == 2.0 {
        T::ONE
    } else {
        p.powf(T::of(2.0 - alpha))
    }
}

/// Of attention's weights, which may be softmax.
pub(crate) fn check_alpha_or_softmax(op: &'static str, alpha: f64) -> Result<()> {
    ensure!((1.0..=2.0).contains(&alpha), op, "alpha is {alpha}, it must be 1 (softmax) to 2 (sparsemax)");
    Ok(())
}

pub(crate) fn check_alpha(op: &'static str, alpha: f64) -> Result<()> {
    ensure!(
        alpha > 1.0 && alpha <= 2.0,
        op,
        "alpha is {alpha}, it must be above 1 (softmax) and at most 2 (sparsemax)"
    );
    Ok(())
}

/// alpha-entmax over the last axis.
///
/// # Errors
/// When alpha is not in (1, 2].
pub fn entmax(tape: &Tape, z: &Var, alpha: f64) -> Result<Var> {
    check_alpha("entmax", alpha)?;
    let (_, width) = z.value.rows();
    let p = on_device!("entmax", [&z.value]; Cpu<T>(cpu, [numbers]) => {
        let mut out = cpu.copy::<T>(numbers);
        cpu.for_pieces(&mut out, width.max(1), |_, row| entmax_row(row, alpha));
        Tensor::from_buffer(z.value.shape(), out)
    }, Cuda(_, [numbers]) => Tensor::from_cuda(z.value.shape(), cuda::forward(numbers.full()?, width, alpha)?));
    let (id, kept) = (z.id(), p.clone());
    tape.record("entmax", p, move |dy, grads| {
        let dz = on_device!("entmax", [&dy, &kept]; Cpu<T>(cpu, [g, p]) => {
            let mut dz = cpu.alloc::<T>(g.len());
            cpu.for_pieces(&mut dz, width.max(1), |i, row| {
                let (g, p) = (&g[i * width..][..width], &p[i * width..][..width]);
                let (mut inner, mut sum) = (T::ZERO, T::ZERO);
                for (&g, &p) in g.iter().zip(p) {
                    let r = jacobian_factor(p, alpha);
                    inner += r * g;
                    sum += r;
                }
                let mean = if sum == T::ZERO { T::ZERO } else { inner / sum };
                for ((d, &g), &p) in row.iter_mut().zip(g).zip(p) {
                    *d = jacobian_factor(p, alpha) * (g - mean);
                }
            });
            Tensor::from_buffer(dy.shape(), dz)
        }, Cuda(_, [g, p]) => Tensor::from_cuda(dy.shape(), cuda::backward(g.full()?, p.full()?, width, alpha)?));
        grads.add(id, dz)
    })
}
