use super::super::super::Dims;
use super::super::super::engine::interleave;
use super::super::super::list::BlockList;
use super::backward::{Entries, split, spread};
use super::concat;
use crate::device::cpu::matrix::MatRef;
use crate::device::cpu::simd;
use crate::device::{Buffer, CpuDevice, CpuNumber, Shared};
use crate::ops::softmax::softmax_row;

/// Numbers of the entries of a list.
pub struct Bias<T: CpuNumber> {
    pub bias: Buffer<T>,
    pub weights: Buffer<T>,
    /// `[entries, group]`
    pub heads: Buffer<T>,
}

/// Below it log w is that of it: with w = 0 the bias would be minus infinity and its gradient nothing over nothing.
pub const LEAST: f64 = 1e-37;

/// The keys of one kv head of one sequence: rows `g * d` apart.
fn keys<T>(kbar: &[T], (dims, n): (Dims, usize), bg: usize) -> MatRef<'_, T> {
    // without a chunk there is nothing behind the first head
    let first = (bg / dims.g * n * dims.g + bg % dims.g) * dims.d;
    MatRef::rows(kbar.get(first..).unwrap_or_default(), dims.g * dims.d)
}

/// Weights, p of every head and bias of the entries of `list`.
pub fn bias_of<T: CpuNumber>(
    device: &CpuDevice,
    (dims, n): (Dims, usize),
    (q, kbar): (&[T], &[T]),
    list: &BlockList,
    gamma: f64,
) -> Bias<T> {
    let Dims { b, t, h, g, d } = dims;
    let (group, factor) = (dims.group(), T::of(gamma / (d as f64).sqrt()));
    let parts = device.map(b * g, |bg| {
        let (batch, kv) = (bg / g, bg % g);
        let (offsets, _) = list.lists();
        let all = offsets[bg * t] as usize..offsets[(bg + 1) * t] as usize;
        let (mut bias, mut weights) = (device.zeros::<T>(all.len()), device.zeros::<T>(all.len()));
        let mut heads = device.zeros::<T>(all.len() * group);
        let kbar = keys(kbar, (dims, n), bg);
        let mut row = Vec::new();
        for query in 0..t {
            let first = list.entries_of(batch, kv, query).start - all.start;
            let (_, chunks) = list.chunks_of(batch, kv, query).split_last().expect("the own chunk");
            for head in 0..group {
                let q = &q[((batch * t + query) * h + kv * group + head) * d..][..d];
                let key = |c: u32| &kbar.data[c as usize * kbar.row_stride..][..d];
                row.clear();
                row.extend(chunks.iter().map(|&c| simd::dot(q, key(c)) * factor));
                softmax_row(&mut row);
                for (e, &p) in row.iter().enumerate() {
                    heads[(first + e) * group + head] = p;
                    weights[first + e] += p / T::of(group as f64);
                }
            }
            for e in first..first + chunks.len() {
                bias[e] = weights[e].max(T::of(LEAST)).ln();
            }
        }
        (bias, weights, heads)
    });
    Bias {
        bias: concat(device, &parts, |p| &p.0),
        weights: concat(device, &parts, |p| &p.1),
        heads: concat(device, &parts, |p| &p.2),
    }
}

/// See [`super::backward::Gradients`].
pub struct BiasGradients<T: CpuNumber> {
    pub dq: Buffer<T>,
    pub dkbar: Buffer<T>,
    pub squares: f64,
    pub scores: Buffer<T>,
    pub pairs: u64,
}

/// What a task sums beside dq and dkbar.
struct Sums<T> {
    squares: f64,
    scores: Vec<T>,
}

/// d score of one head from d bias, over its entries: p (dp - <p, dp>) with dp = db / (group w).
fn score_gradient<T: CpuNumber>((w, p, db): (&[T], &[T], &[T]), (group, head): (usize, usize), ds: &mut Vec<T>) {
    let upstream = |e: usize| if w[e] > T::of(LEAST) { db[e] / (w[e] * T::of(group as f64)) } else { T::ZERO };
    ds.clear();
    ds.extend((0..w.len()).map(|e| p[e * group + head] * upstream(e)));
    let inner = simd::sum(ds);
    ds.iter_mut().enumerate().for_each(|(e, d)| *d -= p[e * group + head] * inner);
}

/// Gradients of [`bias_of`]; with `keep_scores` those of the scores, too.
pub fn bias_backward<T: CpuNumber>(
    device: &CpuDevice,
    (dims, n): (Dims, usize),
    (q, kbar): (&[T], &[T]),
    (list, weights, heads, dbias): Entries<T>,
    gamma: f64,
    keep_scores: bool,
) -> BiasGradients<T> {
    let Dims { b, t, h, g, d } = dims;
    let (group, factor) = (dims.group(), T::of(gamma / (d as f64).sqrt()));
    let (mut dq, mut dkbar) = (device.zeros::<T>(b * t * h * d), device.zeros::<T>(b * g * n * d));
    let mut sums: Vec<Sums<T>> = (0..b * g).map(|_| Sums { squares: 0.0, scores: Vec::new() }).collect();
    let shared_dq = Shared::new(&mut dq);
    let pieces = split(&mut dkbar, n * d, b * g).into_iter().zip(&mut sums).enumerate();
    device.for_each(pieces.collect(), |(bg, (dkbar, sums)): (usize, (&mut [T], &mut Sums<T>))| {
        let (batch, kv, mut ds) = (bg / g, bg % g, Vec::new());
        let kbar = keys(kbar, (dims, n), bg);
        for query in 0..t {
            let entries = list.entries_of(batch, kv, query);
            let routed = entries.start..entries.end - 1;
            let kept = sums.scores.len();
            if keep_scores {
                sums.scores.resize(kept + entries.len() * group, T::ZERO);
            }
            let chunks = &list.chunks_of(batch, kv, query)[..routed.len()];
            let of = (&weights[routed.clone()], &heads[routed.start * group..routed.end * group], &dbias[routed]);
            for head in 0..group {
                score_gradient(of, (group, head), &mut ds);
                sums.squares += simd::dot(&ds, &ds).f64();
                if keep_scores {
                    ds.iter().enumerate().for_each(|(e, &ds)| sums.scores[kept + e * group + head] = ds);
                }
                let place = ((batch * t + query) * h + kv * group + head) * d;
                // SAFETY: a query's head of one kv head, which no other task has.
                let dq = unsafe { shared_dq.piece(place, d) };
                spread(chunks, &ds, factor, &q[place..][..d], kbar, dq, dkbar);
            }
        }
    });
    let touched = |heads: &&[T]| heads.iter().any(|&ds| ds != T::ZERO);
    let scores: Buffer<T> = concat(device, &sums, |s| &s.scores[..]);
    let mut out = BiasGradients {
        dq,
        dkbar: device.alloc(b * n * g * d),
        squares: sums.iter().map(|s| s.squares).sum(),
        pairs: scores.chunks_exact(group).filter(touched).count() as u64,
        scores,
    };
    interleave(device, &dkbar, (b, g, n, d), 1, &mut out.dkbar);
    out
}
