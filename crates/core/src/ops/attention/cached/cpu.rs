//! One task a (query, kv head): a pass over the keys for the scores of the group's heads, a softmax or entmax of each head's row, a
//! pass over the values. Every key and value is read once for the group.

use super::super::list::BlockList;
use super::super::{Dims, Span};
use crate::device::cpu::matrix::MatRef;
use crate::device::cpu::simd::{self, simd};
use crate::device::{Buffer, CpuDevice, CpuNumber};
use crate::ops::entmax::entmax_row;
use crate::ops::softmax::softmax_row;

/// See [`super::Seen`].
#[derive(Clone, Copy)]
pub enum Seen<'a, T> {
    Span(Span, f64),
    Routes(&'a BlockList, Option<&'a [T]>),
}

/// Neighbouring keys with one bias.
struct Piece<T> {
    first: usize,
    len: usize,
    bias: T,
}

impl<T: CpuNumber> Seen<'_, T> {
    /// The keys of the query number `query`, at position `past + query`, and their number.
    fn pieces(&self, past: usize, (batch, kv): (usize, usize), query: usize) -> (Vec<Piece<T>>, usize) {
        let pieces: Vec<Piece<T>> = match *self {
            Seen::Span(span, _) => {
                let keys = span.of(past + query);
                vec![Piece { first: keys.start, len: keys.len(), bias: T::ZERO }]
            }
            Seen::Routes(list, bias) => {
                let (size, end) = (list.chunk_size(), past + query + 1);
                let entries = list.entries_of(batch, kv, query).zip(list.chunks_of(batch, kv, query));
                let piece = |(entry, &chunk): (usize, &u32)| {
                    let first = chunk as usize * size;
                    Piece { first, len: size.min(end - first), bias: bias.map_or(T::ZERO, |bias| bias[entry]) }
                };
                entries.map(piece).collect()
            }
        };
        let keys = pieces.iter().map(|p| p.len).sum();
        (pieces, keys)
    }
}

simd! {
    /// Scores of the heads `q [group, d]` and the keys `k [.., d]`: rows of `p` that are `n` wide.
    fn score<T>(q: &[T], k: MatRef<T>, d: usize, pieces: &[Piece<T>], scale: T, p: &mut [T], n: usize) {
        let mut at = 0;
        for piece in pieces {
            for j in piece.first..piece.first + piece.len {
                let key = &k.data[j * k.row_stride..][..d];
                for (q, row) in q.chunks_exact(d).zip(p.chunks_exact_mut(n)) {
                    row[at] = simd::dot(q, key).mul_add(scale, piece.bias);
                }
                at += 1;
            }
        }
    }
}

simd! {
    /// The values `v [.., d]` with the weights p, whose rows are `n` wide: `out [group, d]`.
    fn mix<T>(p: &[T], n: usize, v: MatRef<T>, d: usize, pieces: &[Piece<T>], out: &mut [T]) {
        out.fill(T::ZERO);
        let mut at = 0;
        for piece in pieces {
            for j in piece.first..piece.first + piece.len {
                let value = &v.data[j * v.row_stride..][..d];
                for (row, out) in p.chunks_exact(n).zip(out.chunks_exact_mut(d)) {
                    simd::axpy(row[at], value, out);
                }
                at += 1;
            }
        }
    }
}

/// Out `[b, t, h, d]`.
pub fn forward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    (past, capacity): (usize, usize),
    (q, k, v): (&[T], &[T], &[T]),
    seen: Seen<T>,
) -> Buffer<T> {
    let Dims { b, t, h, g, d } = dims;
    let group = dims.group();
    let scale = T::of(1.0 / (d as f64).sqrt());
    let alpha = match seen {
        Seen::Span(_, alpha) => alpha,
        Seen::Routes(..) => 1.0,
    };
    let mut out = device.alloc::<T>(b * t * h * d);
    device.for_pieces(&mut out, group * d, |task, out| {
        let (batch, query, kv) = (task / g / t, task / g % t, task % g);
        let (pieces, n) = seen.pieces(past, (batch, kv), query);
        if n == 0 {
            return out.fill(T::ZERO);
        }
        let mut p = device.alloc::<T>(group * n);
        let (k, v) = {
            let first = (batch * capacity * g + kv) * d;
            (MatRef::rows(&k[first..], g * d), MatRef::rows(&v[first..], g * d))
        };
        score(&q[task * group * d..][..group * d], k, d, &pieces, scale, &mut p, n);
        for row in p.chunks_exact_mut(n) {
            if alpha == 1.0 { softmax_row(row) } else { entmax_row(row, alpha) }
        }
        mix(&p, n, v, d, &pieces, out);
    });
    out
}
