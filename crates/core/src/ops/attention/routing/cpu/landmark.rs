use super::super::super::Dims;
use super::super::super::list::BlockList;
use super::concat;
use crate::device::cpu::simd;
use crate::device::{Buffer, CpuDevice, CpuNumber};
use crate::ops::softmax::softmax_row;

/// log sum exp of the scores of a chunk's tokens, and their softmax in the place of the scores.
fn within<T: CpuNumber>(scores: &mut [T]) -> T {
    let top = simd::max(scores);
    let sum = scores.iter().fold(T::ZERO, |sum, &s| sum + (s - top).exp());
    softmax_row(scores);
    top + sum.ln()
}

/// The bias of every entry of `list`; `k` has the keys of `list.first()` tokens before the first query, too.
pub fn landmark<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    (q, k, kbar): (&[T], &[T], &[T]),
    list: &BlockList,
    gamma: f64,
) -> Buffer<T> {
    let Dims { b, t, h, d, .. } = dims;
    let (s, all) = (list.chunk_size(), list.first() + t);
    let (n, scale) = (all / s, T::of(1.0 / (d as f64).sqrt()));
    let parts = device.map(b * h, |bh| {
        let (batch, head) = (bh / h, bh % h);
        let mut bias = Vec::new();
        let mut scores = vec![T::ZERO; s];
        for query in 0..t {
            let q = &q[((batch * t + query) * h + head) * d..][..d];
            let (_, chunks) = list.chunks_of(batch, head, query).split_last().expect("the own chunk");
            for &c in chunks {
                for (j, z) in scores.iter_mut().enumerate() {
                    *z = simd::dot(q, &k[((batch * all + c as usize * s + j) * h + head) * d..][..d]) * scale;
                }
                let r = simd::dot(q, &kbar[((batch * n + c as usize) * h + head) * d..][..d]) * scale;
                bias.push(r * T::of(gamma) - within(&mut scores));
            }
            bias.push(T::ZERO);
        }
        bias
    });
    concat(device, &parts, |p| &p[..])
}

/// Gradients of [`landmark`] to q, k and kbar.
pub fn landmark_backward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    (q, k, kbar): (&[T], &[T], &[T]),
    (list, dbias): (&BlockList, &[T]),
    gamma: f64,
) -> [Buffer<T>; 3] {
    let Dims { b, t, h, d, .. } = dims;
    let s = list.chunk_size();
    let (n, scale) = (t / s, T::of(1.0 / (d as f64).sqrt()));
    // of one head each, and put in their places afterwards: heads are interleaved
    let parts = device.map(b * h, |bh| {
        let (batch, head) = (bh / h, bh % h);
        // of the device's memory, which the next step has again
        let [mut dq, mut dk, mut dkbar] = [t, t, n].map(|rows| device.zeros::<T>(rows * d));
        let mut scores = device.zeros::<T>(s);
        for query in 0..t {
            let q = &q[((batch * t + query) * h + head) * d..][..d];
            let dq = &mut dq[query * d..][..d];
            let entries = list.entries_of(batch, head, query);
            let (_, chunks) = list.chunks_of(batch, head, query).split_last().expect("the own chunk");
            for (entry, &c) in entries.zip(chunks) {
                let (c, db) = (c as usize, dbias[entry] * scale);
                let key = |j: usize| &k[((batch * t + c * s + j) * h + head) * d..][..d];
                for (j, z) in scores.iter_mut().enumerate() {
                    *z = simd::dot(q, key(j)) * scale;
                }
                softmax_row(&mut scores);
                for (j, &p) in scores.iter().enumerate() {
                    simd::axpy(-p * db, key(j), dq);
                    simd::axpy(-p * db, q, &mut dk[(c * s + j) * d..][..d]);
                }
                let dr = db * T::of(gamma);
                simd::axpy(dr, &kbar[((batch * n + c) * h + head) * d..][..d], dq);
                simd::axpy(dr, q, &mut dkbar[c * d..][..d]);
            }
        }
        [dq, dk, dkbar]
    });
    std::array::from_fn(|which| {
        let rows = if which == 2 { n } else { t };
        let mut out = device.zeros::<T>(b * rows * h * d);
        for (bh, part) in parts.iter().enumerate() {
            let (batch, head) = (bh / h, bh % h);
            for (row, from) in part[which].chunks_exact(d).enumerate() {
                out[((batch * rows + row) * h + head) * d..][..d].copy_from_slice(from);
            }
        }
        out
    })
}
