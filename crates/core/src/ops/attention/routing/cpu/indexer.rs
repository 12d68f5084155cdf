use super::super::super::Dims;
use super::super::super::list::BlockList;
use crate::device::cpu::simd;
use crate::device::{Buffer, CpuDevice, CpuNumber};
use crate::ops::softmax::softmax_row;

/// Queries and keys of the indexer, then those of attention.
type Operands<'a, T> = ([&'a [T]; 2], [&'a [T]; 2]);

/// What one query puts on its chunks.
struct Shares<T> {
    /// P by chunk, the layer's.
    teacher: Vec<T>,
    /// log p by chunk, the indexer's.
    student: Vec<T>,
    /// The indexer's softmax within each chunk, by token.
    inside: Vec<T>,
    /// The tokens, and where each chunk's end among them.
    tokens: Vec<usize>,
    ends: Vec<usize>,
    scores: Vec<T>,
}

impl<T: CpuNumber> Shares<T> {
    fn new() -> Self {
        let none = Vec::new;
        Shares {
            teacher: none(),
            student: none(),
            inside: none(),
            tokens: Vec::new(),
            ends: Vec::new(),
            scores: none(),
        }
    }

    /// Tokens of chunk `i`.
    fn of(ends: &[usize], i: usize) -> std::ops::Range<usize> {
        i.checked_sub(1).map_or(0, |before| ends[before])..ends[i]
    }

    /// Of a query of a kv head of a sequence, with the indexer's width.
    fn read(
        &mut self,
        (Dims { t, h, g, d, .. }, width): (Dims, usize),
        ([iq, ik], [q, k]): Operands<T>,
        list: &BlockList,
        (batch, kv, query): (usize, usize, usize),
    ) {
        let s = list.chunk_size();
        self.tokens.clear();
        self.ends.clear();
        for &c in list.chunks_of(batch, kv, query) {
            self.tokens.extend(c as usize * s..(query + 1).min((c as usize + 1) * s));
            self.ends.push(self.tokens.len());
        }
        let (n, group) = (self.ends.len(), h / g);
        self.teacher.clear();
        self.teacher.resize(n, T::ZERO);
        let place = |token: usize| (batch * t + token) * g + kv;
        let score = |scores: &mut Vec<T>, q: &[T], keys: &[T], width: usize| {
            let factor = T::of(1.0 / (width as f64).sqrt());
            scores.clear();
            scores.extend(self.tokens.iter().map(|&j| simd::dot(q, &keys[place(j) * width..][..width]) * factor));
        };
        for head in kv * group..(kv + 1) * group {
            score(&mut self.scores, &q[((batch * t + query) * h + head) * d..][..d], k, d);
            softmax_row(&mut self.scores);
            for (i, share) in self.teacher.iter_mut().enumerate() {
                *share += simd::sum(&self.scores[Self::of(&self.ends, i)]) / T::of(group as f64);
            }
        }
        score(&mut self.inside, &iq[place(query) * width..][..width], ik, width);
        let top = simd::max(&self.inside);
        self.student.clear();
        let mut all = T::ZERO;
        for i in 0..n {
            let scores = &mut self.inside[Self::of(&self.ends, i)];
            let highest = simd::max(scores);
            let sum = scores.iter().fold(T::ZERO, |sum, &z| sum + (z - highest).exp());
            let log = highest + sum.ln();
            all += (log - top).exp();
            self.student.push(log);
            softmax_row(scores);
        }
        let all = top + all.ln();
        self.student.iter_mut().for_each(|log| *log -= all);
    }

    fn divergence(&self) -> f64 {
        let term = |(&p, &log): (&T, &T)| if p > T::ZERO { (p * (p.ln() - log)).f64() } else { 0.0 };
        self.teacher.iter().zip(&self.student).map(term).sum()
    }
}

/// The mean divergence; see [`super::super::indexer_kl`].
pub fn indexer_kl<T: CpuNumber>(device: &CpuDevice, dims: (Dims, usize), x: Operands<T>, list: &BlockList) -> T {
    let Dims { b, t, g, .. } = dims.0;
    let parts = device.map(b * g, |bg| {
        let mut shares = Shares::new();
        (0..t).fold(0.0, |sum, query| {
            shares.read(dims, x, list, (bg / g, bg % g, query));
            sum + shares.divergence()
        })
    });
    T::of(parts.iter().sum::<f64>() / (b * g * t).max(1) as f64)
}

/// Gradients of `upstream` times [`indexer_kl`] to the indexer's queries and keys.
pub fn indexer_kl_backward<T: CpuNumber>(
    device: &CpuDevice,
    dims: (Dims, usize),
    x: Operands<T>,
    list: &BlockList,
    upstream: T,
) -> [Buffer<T>; 2] {
    let (Dims { b, t, g, .. }, width) = dims;
    let [iq, ik] = x.0;
    let factor = upstream * T::of(1.0 / (width as f64).sqrt() / (b * g * t).max(1) as f64);
    // of one kv head each, and put in their places afterwards: heads are interleaved
    let parts = device.map(b * g, |bg| {
        let (batch, kv) = (bg / g, bg % g);
        let [mut dq, mut dk] = [(); 2].map(|()| device.zeros::<T>(t * width));
        let mut shares = Shares::new();
        let row = |token: usize| ((batch * t + token) * g + kv) * width;
        for query in 0..t {
            shares.read(dims, x, list, (batch, kv, query));
            let q = &iq[row(query)..][..width];
            for i in 0..shares.ends.len() {
                let ds = (shares.student[i].exp() - shares.teacher[i]) * factor;
                for at in Shares::<T>::of(&shares.ends, i) {
                    let (dz, token) = (ds * shares.inside[at], shares.tokens[at]);
                    simd::axpy(dz, &ik[row(token)..][..width], &mut dq[query * width..][..width]);
                    simd::axpy(dz, q, &mut dk[token * width..][..width]);
                }
            }
        }
        [dq, dk]
    });
    std::array::from_fn(|which| {
        let mut out = device.zeros::<T>(b * t * g * width);
        for (bg, part) in parts.iter().enumerate() {
            for (token, from) in part[which].chunks_exact(width).enumerate() {
                out[((bg / g * t + token) * g + bg % g) * width..][..width].copy_from_slice(from);
            }
        }
        out
    })
}
