//! Cross-entropy fused with the output projection: loss = sum_i (lse_i - logit_i[target_i]) / divisor, logits = x w^T.
//!
//! The logits of [`ROWS`] tokens exist at a time, never [tokens, v] in full. On a recording tape the gradients are made
//! while the logits are in cache (dlogits = (softmax - onehot) / divisor, dx = dlogits w, dw = dlogits^T x), and backward
//! only multiplies with the gradient of the scalar: three products instead of four.

pub mod cuda;
#[cfg(test)]
mod tests;

use crate::device::cpu::simd::{self, simd};
use crate::device::cpu::{MatMut, MatRef};
use crate::device::cuda::Kind;
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber, Gemm};
use crate::dispatch::on_device;
use crate::error::{Error, Result, ensure};
use crate::ids::{IGNORE, Ids};
use crate::number::Compute;
use crate::ops::cuda::elementwise::scale_by;
use crate::ops::matmul::gemm;
use crate::tape::{Tape, Var};
use crate::tensor::{ELEMENTWISE, Tensor};

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

fn check(op: &'static str, x: &Tensor, w: &Tensor, targets: &Ids) -> Result<(usize, usize, usize)> {
    let [vocab, width] = w.dims(op)?;
    let (rows, inner) = x.rows();
    ensure!(inner == width, op, "x has shape {:?}, w has shape {:?}", x.shape(), w.shape());
    ensure!(targets.len() == rows, op, "{} targets for {rows} rows", targets.len());
    targets.check_below(op, "target", vocab, "the vocabulary size")?;
    Ok((rows, width, vocab))
}

/// Distance of the rows of logits: an odd number of cache lines. At a vocabulary of a power of two, rows that follow each
/// other directly meet in the same few sets of a cache, and eight of them fill every way of one.
fn stride(vocab: usize) -> usize {
    (vocab.div_ceil(LINE) | 1) * LINE
}

/// Runs `visit(first row, logits)` over blocks of rows of logits `[rows, v]`, [`stride`] apart.
fn for_logits<T: CpuNumber>(
    cpu: &CpuDevice,
    compute: Compute,
    (x, w): (&[T], &[T]),
    (rows, width, vocab): (usize, usize, usize),
    mut visit: impl FnMut(usize, &mut [T]),
) {
    let ld = stride(vocab);
    let mut logits = cpu.alloc::<T>(ROWS.min(rows) * ld);
    for first in (0..rows).step_by(ROWS) {
        let m = ROWS.min(rows - first);
        let logits = &mut logits[..m * ld];
        let a = MatRef::rows(&x[first * width..], width);
        let size = Gemm::new(m, vocab, width).with(Accumulate::Overwrite);
        gemm(cpu, compute, size, a, MatRef::rows(w, width).t(), MatMut::rows(&mut *logits, ld));
        visit(first, logits);
    }
}

/// The sum over rows of `-log softmax(x w^T)[target]`, divided by `divisor` (usually the number of tokens of the global
/// batch): a scalar of shape []. `x [.., c]`, `w [v, c]`, one target a row; [`IGNORE`] leaves a row out.
///
/// # Errors
/// When widths differ, or a target is not below the vocabulary size.
pub fn linear_cross_entropy(tape: &Tape, x: &Var, w: &Var, targets: &Ids, divisor: f64) -> Result<Var> {
    let op = "cross_entropy";
    let sizes = check(op, &x.value, &w.value, targets)?;
    let (compute, recording) = (tape.compute(), tape.is_recording());
    let (loss, grads) = on_device!(op, [&x.value, &w.value]; Cpu<T>(cpu, [xs, ws]) => {
        let targets = targets.on_cpu(op, cpu)?;
        let (total, grads) = forward::<T>(cpu, compute, (xs, ws), sizes, targets, recording.then_some(1.0 / divisor));
        let wrap = |(dx, dw)| (Tensor::from_buffer(x.value.shape(), dx), Tensor::from_buffer(w.value.shape(), dw));
        (Tensor::from_buffer(&[], cpu.copy(&[T::of(total / divisor)])), grads.map(wrap))
    }, Cuda(gpu, [xs, ws]) => {
        let (kind, targets) = (Kind::of_operands(compute, xs.dtype()), targets.on_cuda(op, gpu)?);
        let operands = (xs.of_kind(kind)?, ws.of_kind(kind)?);
        let (nll, grads) = cuda::rows_of(op, operands, &targets.ids, sizes, recording.then_some(1.0 / divisor))?;
        let wrap = |(dx, dw)| (Tensor::from_cuda(x.value.shape(), dx), Tensor::from_cuda(w.value.shape(), dw));
        (Tensor::from_cuda(&[], cuda::sum(&nll, 1.0 / divisor)?), grads.map(wrap))
    });
    let (ix, iw) = (x.id(), w.id());
    tape.record(op, loss, move |dy, out| {
        let (dx, dw) = grads.ok_or_else(|| Error::invalid(op, "the tape kept no gradients"))?;
        out.add(ix, scaled(dx, &dy)?)?;
        out.add(iw, scaled(dw, &dy)?)
    })
}

/// dx and dw.
type Gradients<T> = (Buffer<T>, Buffer<T>);

/// The sum of the rows' losses; with `factor`, dx and dw of that times the sum.
fn forward<T: CpuNumber>(
    cpu: &CpuDevice,
    compute: Compute,
    (xs, ws): (&[T], &[T]),
    (rows, width, vocab): (usize, usize, usize),
    targets: &[u32],
    factor: Option<f64>,
) -> (f64, Option<Gradients<T>>) {
    let mut total = 0.0;
    let mut gradients = factor.map(|_| (cpu.alloc::<T>(rows * width), cpu.zeros::<T>(vocab * width)));
    let (factor, ld) = (factor.map(T::of), stride(vocab));
    for_logits::<T>(cpu, compute, (xs, ws), (rows, width, vocab), |first, logits| {
        let m = logits.len() / ld;
        let mut nll = cpu.alloc::<T>(m);
        cpu.for_pieces2((&mut *logits, ld), (&mut nll, 1), |i, row, nll| {
            let (row, target) = (&mut row[..vocab], targets[first + i]);
            if target == IGNORE {
                row.fill(T::ZERO);
                nll[0] = T::ZERO;
                return;
            }
            let (loss, inverse) = nll_row(row, target as usize);
            nll[0] = loss;
            if let Some(factor) = factor {
                scale_row(row, inverse * factor);
                row[target as usize] -= factor;
            }
        });
        total += nll.iter().map(|x| x.f64()).sum::<f64>();
        if let Some((dx, dw)) = &mut gradients {
            let dx = &mut dx[first * width..][..m * width];
            let logits = MatRef::rows(logits, ld);
            let size = Gemm::new(m, width, vocab).with(Accumulate::Overwrite);
            gemm(cpu, compute, size, logits, MatRef::rows(ws, width), MatMut::rows(dx, width));
            let xs = MatRef::rows(&xs[first * width..], width);
            let size = Gemm::new(vocab, width, m).with(Accumulate::Existing);
            gemm(cpu, compute, size, logits.t(), xs, MatMut::rows(dw, width));
        }
    });
    (total, gradients)
}

/// x times the scalar `factor`, in place.
fn scaled(mut x: Tensor, factor: &Tensor) -> Result<Tensor> {
    on_device!("cross_entropy", [factor]; Cpu<T>(cpu, [factor]) => {
        let factor: T = factor[0];
        if factor != T::ONE {
            cpu.for_pieces(x.cpu_mut::<T>("cross_entropy")?, ELEMENTWISE, |_, piece| scale_row(piece, factor));
        }
    }, Cuda(gpu, [factor]) => scale_by(x.cuda_mut("cross_entropy", gpu)?.full_mut()?, factor.full()?)?);
    Ok(x)
}

/// `-log softmax(x w^T)[target]` of every row, in nats, of the inputs' element type: `[rows]`; 0 where the target is
/// [`IGNORE`]. No gradient.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn token_nll(x: &Tensor, w: &Tensor, targets: &Ids, compute: Compute) -> Result<Tensor> {
    let op = "token_nll";
    let sizes = check(op, x, w, targets)?;
    on_device!(op, [x, w]; Cpu<T>(cpu, [xs, ws]) => {
        let (targets, ld) = (targets.on_cpu(op, cpu)?, stride(sizes.2));
        let mut out = cpu.alloc::<T>(sizes.0);
        for_logits::<T>(cpu, compute, (xs, ws), sizes, |first, logits| {
            let nll = &mut out[first..][..logits.len() / ld];
            cpu.for_pieces2((logits, ld), (nll, 1), |i, row, nll| {
                let (row, target) = (&mut row[..sizes.2], targets[first + i]);
                nll[0] = if target == IGNORE { T::ZERO } else { nll_row(row, target as usize).0 };
            });
        });
        Ok(Tensor::from_buffer(&[sizes.0], out))
    }, Cuda(gpu, [xs, ws]) => {
        let (kind, targets) = (Kind::of_operands(compute, xs.dtype()), targets.on_cuda(op, gpu)?);
        let operands = (xs.of_kind(kind)?, ws.of_kind(kind)?);
        Ok(Tensor::from_cuda(&[sizes.0], cuda::rows_of(op, operands, &targets.ids, sizes, None)?.0))
    })
}
