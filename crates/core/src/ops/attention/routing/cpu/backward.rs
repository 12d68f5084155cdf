use super::super::super::Dims;
use super::super::super::engine::interleave;
use super::super::super::list::BlockList;
use super::super::{Center, Entmax, RouterGradient};
use super::{concat, placebo};
use crate::device::cpu::matrix::MatRef;
use crate::device::cpu::simd::{self, simd};
use crate::device::{Buffer, CpuDevice, CpuNumber, Shared};
use crate::ops::entmax::jacobian_factor;
use crate::ops::softmax::softmax_row;

pub struct Gradients<T: CpuNumber> {
    pub dq: Buffer<T>,
    pub dkbar: Buffer<T>,
    pub diagonal: Buffer<T>,
    /// sum of squares of the score gradients
    pub squares: f64,
    /// per entry, the score gradient of every head of the group; empty unless asked for
    pub scores: Buffer<T>,
    /// (query, chunk) pairs with a score gradient other than zero; 0 unless asked for
    pub pairs: u64,
}

/// The entries of a routing: their list, w, p of every head `[entries, group]`, and the gradient of their bias.
pub type Entries<'a, T> = (&'a BlockList, &'a [T], &'a [T], &'a [T]);

/// What a task sums and keeps beside dq and dkbar.
struct Sums<T> {
    /// of the own chunks' dbias
    own: T,
    squares: f64,
    scores: Vec<T>,
    pairs: u64,
}

/// One query of one kv head, and what its scores' gradients are spread over.
struct Query<'a, T> {
    /// number of its first head among those of all queries
    first_head: usize,
    /// the chunks of its support
    chunks: &'a [u32],
    /// `[group, d]`
    q: &'a [T],
    dq: &'a mut [T],
    /// `[n, d]` of the kv head
    kbar: MatRef<'a, T>,
    dkbar: &'a mut [T],
}

simd! {
    /// d score of one head from d log w. `t = r / (group w) dlogw` is formed as one quotient: both factors of
    /// `r * (dlogw / w)` go to their limits at the support edge.
    fn score_gradient<T>(heads: &[T], group: usize, head: usize, w: &[T], dlogw: &[T], alpha: f64, ds: &mut [T]) {
        let (mut sum, mut inner) = (T::ZERO, T::ZERO);
        for (e, d) in ds.iter_mut().enumerate() {
            let r = jacobian_factor(heads[e * group + head], alpha);
            *d = if r == T::ZERO { T::ZERO } else { r / (w[e] * T::of(group as f64)) * dlogw[e] };
            sum += r;
            inner += *d;
        }
        let mean = if sum == T::ZERO { T::ZERO } else { inner / sum };
        for (e, d) in ds.iter_mut().enumerate() {
            *d -= jacobian_factor(heads[e * group + head], alpha) * mean;
        }
    }
}

simd! {
    /// dq += ds_c kbar_c and dkbar_c += ds_c q over the listed chunks.
    pub(super) fn spread<T>(chunks: &[u32], ds: &[T], factor: T, q: &[T], kbar: MatRef<T>, dq: &mut [T], dkbar: &mut [T]) {
        let d = q.len();
        for (&c, &ds) in chunks.iter().zip(ds) {
            let ds = ds * factor;
            simd::axpy(ds, &kbar.data[c as usize * kbar.row_stride..][..d], dq);
            simd::axpy(ds, q, &mut dkbar[c as usize * d..][..d]);
        }
    }
}

/// What every task reads.
struct Backward<'a, T> {
    dims: Dims,
    n: usize,
    q: &'a [T],
    kbar: &'a [T],
    entries: Entries<'a, T>,
    settings: Entmax,
    keep_scores: bool,
    /// gamma / sqrt d
    factor: f64,
}

impl<T: CpuNumber> Backward<'_, T> {
    /// One (batch, kv head): dq of its heads, dkbar `[n, d]` and the sums.
    fn run(&self, bg: usize, shared_dq: &Shared<T>, dkbar: &mut [T], sums: &mut Sums<T>) {
        let Dims { t, h, g, d, .. } = self.dims;
        let (batch, kv, group) = (bg / g, bg % g, self.dims.group());
        let (list, _, _, dbias) = self.entries;
        // without a chunk there is nothing behind the first head
        let kbar = self.kbar.get((batch * self.n * g + kv) * d..).unwrap_or_default();
        let kbar = MatRef::rows(kbar, g * d);
        dkbar.fill(T::ZERO);
        let (mut ds, mut dlogw) = (Vec::new(), Vec::new());
        for query in 0..t {
            let place = ((batch * t + query) * h + kv * group) * d;
            // SAFETY: the heads of one kv head of one query, which no other task has.
            let dq = unsafe { shared_dq.piece(place, group * d) };
            dq.fill(T::ZERO);
            let entries = list.entries_of(batch, kv, query);
            let routed = entries.start..entries.end - 1;
            sums.own += dbias[entries.end - 1];
            let kept = sums.scores.len();
            if self.keep_scores {
                sums.scores.resize(kept + entries.len() * group, T::ZERO);
            }
            if routed.is_empty() || self.settings.gradient == RouterGradient::Stopped {
                continue;
            }
            dlogw.clear();
            dlogw.extend(dbias[routed.clone()].iter().map(|&db| db / T::of(self.settings.backward_sigma())));
            if self.settings.center == Center::Mean {
                let mean = simd::sum(&dlogw) / T::of(dlogw.len() as f64);
                dlogw.iter_mut().for_each(|x| *x -= mean);
            }
            let chunks = &list.chunks_of(batch, kv, query)[..routed.len()];
            let first_head = place / d;
            let at = Query { first_head, chunks, q: &self.q[place..][..group * d], dq, kbar, dkbar: &mut *dkbar };
            if self.settings.gradient == RouterGradient::StraightThrough {
                self.straight_through(at, query / self.settings.chunk_size, &dlogw, kept, sums);
            } else {
                self.through_entmax(at, routed, &dlogw, &mut ds, kept, sums);
            }
        }
    }

    /// The gradient of entmax. Score gradients are kept from `kept` on.
    fn through_entmax(
        &self,
        at: Query<T>,
        routed: std::ops::Range<usize>,
        dlogw: &[T],
        ds: &mut Vec<T>,
        kept: usize,
        sums: &mut Sums<T>,
    ) {
        let (d, group) = (self.dims.d, self.dims.group());
        let (_, weights, heads, _) = self.entries;
        let heads = &heads[routed.start * group..routed.end * group];
        ds.resize(routed.len(), T::ZERO);
        for head in 0..group {
            score_gradient(heads, group, head, &weights[routed.clone()], dlogw, self.settings.alpha, ds);
            if self.settings.gradient == RouterGradient::Placebo {
                let inside = |e: usize| heads[e * group + head] > T::ZERO;
                placebo::replace(ds, inside, at.first_head + head);
            }
            sums.squares += simd::dot(ds, ds).f64();
            if self.keep_scores {
                ds.iter().enumerate().for_each(|(e, &ds)| sums.scores[kept + e * group + head] = ds);
            }
            let (q, dq) = (&at.q[head * d..][..d], &mut at.dq[head * d..][..d]);
            spread(at.chunks, ds, T::of(self.factor), q, at.kbar, dq, at.dkbar);
        }
        if self.keep_scores {
            let touched = |heads: &&[T]| heads.iter().any(|&ds| ds != T::ZERO);
            sums.pairs += sums.scores[kept..].chunks_exact(group).filter(touched).count() as u64;
        }
    }

    /// The straight-through gradient: d log of the group mean of softmax over all `visible` chunks, for the chunks of the
    /// support. Score gradients are kept from `kept` on.
    fn straight_through(&self, at: Query<T>, visible: usize, dlogw: &[T], kept: usize, sums: &mut Sums<T>) {
        let (d, group, factor) = (self.dims.d, self.dims.group(), T::of(self.factor));
        let (soft, mean) = self.soft_scores(&at, visible);
        let all: Vec<u32> = (0..visible as u32).collect();
        let mut scores = Vec::with_capacity(group * visible);
        for (head, row) in soft.chunks_exact(visible).enumerate() {
            // d log(mean) / d soft = 1 / sum over heads: the 1/group of the mean cancels
            let mut inner = T::ZERO;
            let upstream = |c: u32, dw: T| if mean[c as usize] > T::ZERO { dw / mean[c as usize] } else { T::ZERO };
            for (&c, &dw) in at.chunks.iter().zip(dlogw) {
                inner += row[c as usize] * upstream(c, dw);
            }
            let mut ds: Vec<T> = row.iter().map(|&p| -p * inner).collect();
            for (&c, &dw) in at.chunks.iter().zip(dlogw) {
                ds[c as usize] += row[c as usize] * upstream(c, dw);
            }
            let (q, dq) = (&at.q[head * d..][..d], &mut at.dq[head * d..][..d]);
            spread(&all, &ds, factor, q, at.kbar, dq, at.dkbar);
            scores.extend_from_slice(&ds);
        }
        sums.squares += simd::dot(&scores, &scores).f64();
        if self.keep_scores {
            for (head, scores) in scores.chunks_exact(visible).enumerate() {
                for (e, &c) in at.chunks.iter().enumerate() {
                    sums.scores[kept + e * group + head] = scores[c as usize];
                }
            }
            let touched = |c: &usize| (0..group).any(|head| scores[head * visible + c] != T::ZERO);
            sums.pairs += (0..visible).filter(touched).count() as u64;
        }
    }

    /// Softmax of every head over the visible chunks `[group, visible]`, and its sum over the heads.
    fn soft_scores(&self, at: &Query<T>, visible: usize) -> (Vec<T>, Vec<T>) {
        let (d, group) = (self.dims.d, self.dims.group());
        let (mut soft, mut mean) = (vec![T::ZERO; group * visible], vec![T::ZERO; visible]);
        for (head, row) in soft.chunks_exact_mut(visible).enumerate() {
            for (c, x) in row.iter_mut().enumerate() {
                let kbar = &at.kbar.data[c * at.kbar.row_stride..][..d];
                *x = simd::dot(&at.q[head * d..][..d], kbar) * T::of(self.factor);
            }
            softmax_row(row);
            mean.iter_mut().zip(&*row).for_each(|(m, &x)| *m += x);
        }
        (soft, mean)
    }
}

/// Gradients of [`super::forward`]; with `keep_scores` those of the scores, too.
pub fn backward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    n: usize,
    (q, kbar): (&[T], &[T]),
    entries: Entries<T>,
    settings: Entmax,
    keep_scores: bool,
) -> Gradients<T> {
    let Dims { b, t, h, g, d } = dims;
    let factor = settings.gamma / (d as f64).sqrt();
    let pass = Backward { dims, n, q, kbar, entries, settings, keep_scores, factor };
    let (mut dq, mut dkbar) = (device.alloc::<T>(b * t * h * d), device.alloc::<T>(b * g * n * d));
    let mut sums: Vec<Sums<T>> =
        (0..b * g).map(|_| Sums { own: T::ZERO, squares: 0.0, scores: Vec::new(), pairs: 0 }).collect();
    let shared_dq = Shared::new(&mut dq);
    let pieces = split(&mut dkbar, n * d, b * g).into_iter().zip(&mut sums).enumerate();
    device.for_each(pieces.collect(), |(bg, (dkbar, sums))| pass.run(bg, &shared_dq, dkbar, sums));
    let mut out = Gradients {
        dq,
        dkbar: device.alloc(b * n * g * d),
        diagonal: device.zeros(g),
        squares: sums.iter().map(|s| s.squares).sum(),
        scores: concat(device, &sums, |s| &s.scores[..]),
        pairs: sums.iter().map(|s| s.pairs).sum(),
    };
    interleave(device, &dkbar, (b, g, n, d), 1, &mut out.dkbar);
    for (bg, sums) in sums.iter().enumerate() {
        out.diagonal[bg % g] += sums.own;
    }
    out
}

/// `parts` pieces of `len`, also when `len` is 0.
pub(super) fn split<T>(mut x: &mut [T], len: usize, parts: usize) -> Vec<&mut [T]> {
    (0..parts)
        .map(|_| {
            let (head, tail) = std::mem::take(&mut x).split_at_mut(len);
            x = tail;
            head
        })
        .collect()
}
