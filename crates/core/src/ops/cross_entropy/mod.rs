//! Cross-entropy fused with the output projection: loss = sum_i (lse_i - logit_i[target_i]) / divisor, logits = x w^T.
//!
//! The logits of [`ROWS`] tokens exist at a time, never [tokens, v] in full. On a recording tape the gradients are made
//! while the logits are in cache (dlogits = (softmax - onehot) / divisor, dx = dlogits w, dw = dlogits^T x), and backward
//! only multiplies with the gradient of the scalar: three products instead of four.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::CpuNumber;
use crate::device::cpu::simd::{self, simd};
use crate::device::cpu::{Gemm, MatMut, MatRef};
use crate::error::{Result, ensure};
use crate::number::{Compute, with_number};
use crate::ops::matmul::{Accumulate, gemm};
use crate::tape::{Tape, Var};
use crate::tensor::{ELEMENTWISE, Tensor, same_dtype};

/// A target that takes no part in the loss.
pub const IGNORE: u32 = u32::MAX;

/// Elements of f32 in a cache line.
const LINE: usize = 16;
/// Tokens whose logits exist at a time: 16 MiB of f32 at a vocabulary of 4096, inside the last-level cache, and enough
/// rows that packing w again for each block of them costs little.
const ROWS: usize = 1024;

simd! {
    /// -log softmax(row)[target]; leaves exp(row - max) and returns (nll, 1 / sum).
    fn nll_row<T>(row: &mut [T], target: usize) -> (T, T) {
        let top = simd::max(row);
        let logit = row[target];
        for z in row.iter_mut() {
            *z = (*z - top).exp();
        }
        let sum = simd::sum(row);
        (sum.ln() + top - logit, T::ONE / sum)
    }
}

simd! {
    fn scale_row<T>(row: &mut [T], factor: T) {
        for z in row.iter_mut() {
            *z *= factor;
        }
    }
}

fn check(op: &'static str, x: &Tensor, w: &Tensor, targets: &[u32]) -> Result<(usize, usize, usize)> {
    let [vocab, width] = w.dims(op)?;
    let (rows, inner) = x.rows();
    ensure!(inner == width, op, "x has shape {:?}, w has shape {:?}", x.shape(), w.shape());
    ensure!(targets.len() == rows, op, "{} targets for {rows} rows", targets.len());
    if let Some(&bad) = targets.iter().find(|&&t| t as usize >= vocab && t != IGNORE) {
        return Err(crate::Error::invalid(op, format!("target {bad} is not below the vocabulary size {vocab}")));
    }
    same_dtype(op, x, w)?;
    Ok((rows, width, vocab))
}

/// Distance of the rows of logits: an odd number of cache lines. At a vocabulary of a power of two, rows that follow each
/// other directly meet in the same few sets of a cache, and eight of them fill every way of one.
fn stride(vocab: usize) -> usize {
    (vocab.div_ceil(LINE) | 1) * LINE
}

/// Runs `visit(first row, logits)` over blocks of rows of logits `[rows, v]`, [`stride`] apart.
fn for_logits<T: CpuNumber>(
    compute: Compute,
    x: &Tensor,
    w: &Tensor,
    (rows, width, vocab): (usize, usize, usize),
    mut visit: impl FnMut(usize, &mut [T]),
) {
    let ld = stride(vocab);
    let mut logits = x.cpu().alloc::<T>(ROWS.min(rows) * ld);
    for first in (0..rows).step_by(ROWS) {
        let m = ROWS.min(rows - first);
        let logits = &mut logits[..m * ld];
        let (a, b) = (MatRef::rows(&x.data::<T>()[first * width..], width), MatRef::rows(w.data(), width).t());
        let size = Gemm::new(m, vocab, width).with(Accumulate::Overwrite);
        gemm(x.cpu(), compute, size, a, b, MatMut::rows(&mut *logits, ld));
        visit(first, logits);
    }
}

/// The sum over rows of `-log softmax(x w^T)[target]`, divided by `divisor` (usually the number of tokens of the global
/// batch): a scalar of shape []. `x [.., c]`, `w [v, c]`, one target a row; [`IGNORE`] leaves a row out.
///
/// # Errors
/// When widths differ, or a target is not below the vocabulary size.
pub fn linear_cross_entropy(tape: &Tape, x: &Var, w: &Var, targets: &[u32], divisor: f64) -> Result<Var> {
    let (rows, width, vocab) = check("cross_entropy", &x.value, &w.value, targets)?;
    let (device, compute) = (x.value.cpu(), tape.compute());
    let (loss, grads) = with_number!(x.value.dtype(), T => {
        let mut total = 0.0;
        let mut gradients = tape.is_recording().then(|| (device.alloc::<T>(rows * width), device.zeros::<T>(vocab * width)));
        let factor = T::of(1.0 / divisor);
        let (recording, ld) = (tape.is_recording(), stride(vocab));
        for_logits::<T>(compute, &x.value, &w.value, (rows, width, vocab), |first, logits| {
            let m = logits.len() / ld;
            let mut nll = device.alloc::<T>(m);
            device.for_chunks2((&mut *logits, ld), (&mut nll, 1), |i, row, nll| {
                let (row, target) = (&mut row[..vocab], targets[first + i]);
                if target == IGNORE {
                    row.fill(T::ZERO);
                    nll[0] = T::ZERO;
                    return;
                }
                let (loss, inverse) = nll_row(row, target as usize);
                nll[0] = loss;
                if recording {
                    scale_row(row, inverse * factor);
                    row[target as usize] -= factor;
                }
            });
            total += nll.iter().map(|x| x.f64()).sum::<f64>();
            if let Some((dx, dw)) = &mut gradients {
                let (xs, ws) = (&x.value.data::<T>()[first * width..], w.value.data::<T>());
                let dx = &mut dx[first * width..][..m * width];
                let dlogits = MatRef::rows(logits, ld);
                let size = Gemm::new(m, width, vocab).with(Accumulate::Overwrite);
                gemm(device, compute, size, dlogits, MatRef::rows(ws, width), MatMut::rows(dx, width));
                let size = Gemm::new(vocab, width, m).with(Accumulate::Existing);
                gemm(device, compute, size, dlogits.t(), MatRef::rows(xs, width), MatMut::rows(dw, width));
            }
        });
        let loss = Tensor::full(x.value.device(), &[], x.value.dtype(), total / divisor);
        let wrap = |(dx, dw)| (Tensor::from_buffer(x.value.shape(), dx), Tensor::from_buffer(w.value.shape(), dw));
        (loss, gradients.map(wrap))
    });
    let (ix, iw) = (x.id(), w.id());
    tape.record("cross_entropy", loss, move |dy, out| {
        let (dx, dw) = grads.expect("a recording tape made them");
        let factor = dy.item()?;
        out.add(ix, scaled(dx, factor))?;
        out.add(iw, scaled(dw, factor))
    })
}

fn scaled(mut x: Tensor, factor: f64) -> Tensor {
    if factor != 1.0 {
        let device = x.cpu().clone();
        with_number!(x.dtype(), T => {
            device.for_chunks(x.data_mut::<T>(), ELEMENTWISE, |_, piece| scale_row(piece, T::of(factor)));
        });
    }
    x
}

/// `-log softmax(x w^T)[target]` of every row, in nats; 0 where the target is [`IGNORE`]. No gradient.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn token_nll(x: &Tensor, w: &Tensor, targets: &[u32], compute: Compute) -> Result<Vec<f64>> {
    let sizes = check("token_nll", x, w, targets)?;
    with_number!(x.dtype(), T => {
        let (mut out, ld) = (Vec::with_capacity(sizes.0), stride(sizes.2));
        for_logits::<T>(compute, x, w, sizes, |first, logits| {
            let mut nll = x.cpu().alloc::<T>(logits.len() / ld);
            x.cpu().for_chunks2((logits, ld), (&mut nll, 1), |i, row, nll| {
                let (row, target) = (&mut row[..sizes.2], targets[first + i]);
                nll[0] = if target == IGNORE { T::ZERO } else { nll_row(row, target as usize).0 };
            });
            out.extend(nll.iter().map(|x| x.f64()));
        });
        Ok(out)
    })
}
