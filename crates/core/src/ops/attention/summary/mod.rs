//! Chunk summaries (arXiv 2605.18753, stage 0), per kv head and complete chunk: a_j = softmax_{j in c}(qbar . k_j / sqrt d),
//! kbar_c = sum_j a_j k_j. qbar = 0 gives the mean of the chunk's keys. Kept for backward: k, qbar and a.
//! da_j = dkbar . k_j, dz = a (da - <a, da>), dk_j = a_j dkbar + dz_j qbar / sqrt d, dqbar = sum dz_j k_j / sqrt d.

#[cfg(test)]
mod tests;

use crate::device::CudaData;
use crate::device::cpu::matrix::MatRef;
use crate::device::cpu::simd::{self, simd};
use crate::dispatch::on_device;
use crate::error::{Result, ensure};
use crate::ops::attention::{Dims, cuda};
use crate::ops::softmax::softmax_row;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

simd! {
    /// One chunk of one head: keys are rows `stride` apart. Writes a [s] and kbar [d].
    fn summarize<T>(k: &[T], stride: usize, qbar: &[T], scale: T, a: &mut [T], out: &mut [T]) {
        let d = qbar.len();
        for (j, a) in a.iter_mut().enumerate() {
            *a = simd::dot(qbar, &k[j * stride..][..d]) * scale;
        }
        softmax_row(a);
        out.fill(T::ZERO);
        for (j, &a) in a.iter().enumerate() {
            simd::axpy(a, &k[j * stride..][..d], out);
        }
    }
}

simd! {
    /// Adds the chunk's dk, whose rows are as far apart as k's, and dqbar.
    fn summarize_backward<T>(k: MatRef<T>, qbar: &[T], scale: T, a: &[T], dout: &[T], dk: &mut [T], dqbar: &mut [T]) {
        let (MatRef { data: k, row_stride: stride, .. }, d) = (k, qbar.len());
        let mut inner = T::ZERO;
        for (j, &a) in a.iter().enumerate() {
            inner = a.mul_add(simd::dot(dout, &k[j * stride..][..d]), inner);
        }
        for (j, &a) in a.iter().enumerate() {
            let key = &k[j * stride..][..d];
            let dz = a * (simd::dot(dout, key) - inner) * scale;
            let dk = &mut dk[j * stride..][..d];
            for (dk, (&dout, &q)) in dk.iter_mut().zip(dout.iter().zip(qbar)) {
                *dk = a.mul_add(dout, dz * q);
            }
            simd::axpy(dz, key, dqbar);
        }
    }
}

/// Summaries `[b, n, g, d]` of the `n = t / s` complete chunks of `k [b, t, g, d]` with the learned query `qbar [g * d]`.
///
/// # Errors
/// When `qbar` has another size, or the chunk size, the number of heads or their width is 0.
// Above 60 lines: the passes of both devices share what is checked and kept here.
pub fn chunk_summary(tape: &Tape, k: &Var, qbar: &Var, chunk_size: usize) -> Result<Var> {
    let op = "chunk_summary";
    let [b, t, g, d] = k.value.dims(op)?;
    ensure!(chunk_size > 0, op, "a chunk has at least one token");
    ensure!(g > 0 && d > 0, op, "k is {:?}: no heads, or of width 0", k.value.shape());
    ensure!(qbar.value.numel() == g * d, op, "qbar is {:?}, keys have {g} heads of width {d}", qbar.value.shape());
    let (n, s, compute) = (t / chunk_size, chunk_size, tape.compute());
    let scale = 1.0 / (d as f64).sqrt();
    let (value, weights) = on_device!(op, [&k.value, &qbar.value]; Cpu<T>(cpu, [keys, query]) => {
        let (mut out, mut a) = (cpu.alloc::<T>(b * n * g * d), cpu.alloc::<T>(b * n * g * s));
        cpu.for_pieces2((&mut out, g * d), (&mut a, g * s), |i, out, a| {
            let first = (i / n * t + i % n * s) * g * d;
            for (kv, (out, a)) in out.chunks_exact_mut(d).zip(a.chunks_exact_mut(s)).enumerate() {
                summarize(&keys[first + kv * d..], g * d, &query[kv * d..][..d], T::of(scale), a, out);
            }
        });
        (Tensor::from_buffer(&[b, n, g, d], out), Tensor::from_buffer(&[b, n, g, s], a))
    }, Cuda(_, [keys, query]) => {
        let dims = Dims { b, t, h: g, g, d };
        if !cuda::streams(compute, keys, dims, Some(chunk_size)) {
            let (kbar, weights) = cuda::plain::summary(dims, keys.full()?, query.full()?, chunk_size)?;
            (Tensor::from_cuda(&[b, n, g, d], kbar), Tensor::from_cuda(&[b, n, g, s], weights))
        } else {
            let of = cuda::summary(dims, (keys.rounded()?, 0, g * d), query.full()?, chunk_size)?;
            let value = Tensor::from_cuda_data(&[b, n, g, d], CudaData::both(of.kbar, of.operand));
            (value, Tensor::from_cuda(&[b, n, g, s], of.weights))
        }
    });
    let (k, qbar) = (k.clone(), qbar.clone());
    tape.record(op, value, move |dy, grads| {
        let (dk, dqbar) = on_device!(op, [&k.value, &qbar.value, &weights, &dy]; Cpu<T>(cpu, [keys, query, a, dout]) => {
            // tokens of a ragged last chunk have no summary
            let mut dk = cpu.zeros::<T>(b * t * g * d);
            let mut partial = cpu.zeros::<T>(b * n * g * d);
            let mut pieces = Vec::with_capacity(b * n);
            for (batch, dk) in dk.chunks_mut((t * g * d).max(1)).enumerate() {
                pieces.extend(dk.chunks_mut(s * g * d).take(n).enumerate().map(|(c, dk)| (batch * n + c, dk)));
            }
            let pieces = pieces.into_iter().zip(partial.chunks_mut(g * d)).collect();
            cpu.for_each(pieces, |((i, dk), dqbar): ((usize, &mut [T]), &mut [T])| {
                let first = (i / n * t + i % n * s) * g * d;
                for kv in 0..g {
                    let (a, dout) = (&a[(i * g + kv) * s..][..s], &dout[(i * g + kv) * d..][..d]);
                    let (q, dq) = (&query[kv * d..][..d], &mut dqbar[kv * d..][..d]);
                    let k = MatRef::rows(&keys[first + kv * d..], g * d);
                    summarize_backward(k, q, T::of(scale), a, dout, &mut dk[kv * d..], dq);
                }
            });
            let mut dqbar = cpu.zeros::<T>(g * d);
            for row in partial.chunks_exact(g * d) {
                dqbar.iter_mut().zip(row).for_each(|(d, &p)| *d += p);
            }
            (Tensor::from_buffer(k.value.shape(), dk), Tensor::from_buffer(qbar.value.shape(), dqbar))
        }, Cuda(gpu, [keys, query, a, dout]) => {
            let dims = Dims { b, t, h: g, g, d };
            let (mut dk, add) = grads.begin(&k)?;
            let sum = dk.cuda_mut(op, gpu)?.full_mut()?;
            if !add {
                sum.fill_bytes(0)?;
            }
            let kept = (a.full()?, dout.full()?);
            let dqbar = if cuda::streams(compute, keys, dims, Some(chunk_size)) {
                let keys = (keys.rounded()?, 0, g * d);
                cuda::summary_backward(dims, keys, query.full()?, chunk_size, kept, sum)?
            } else {
                cuda::plain::summary_backward(dims, (keys.full()?, query.full()?), chunk_size, kept, sum)?
            };
            (dk, Tensor::from_cuda(qbar.value.shape(), dqbar))
        });
        grads.add(k.id(), dk)?;
        grads.add(qbar.id(), dqbar)
    })
}
