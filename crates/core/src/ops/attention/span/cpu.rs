use std::ops::Range;

use super::super::Dims;
use super::super::engine::{SCORE_TILE, interleave, owner, scale_row, take_tile};
use super::Span;
use crate::device::cpu::matrix::{MatMut, MatRef};
use crate::device::cpu::simd::simd;
use crate::device::cpu::transpose::transpose_into;
use crate::device::{Buffer, CpuDevice};
use crate::device::{CpuNumber, Gemm};
use crate::ops::entmax::{entmax_row, jacobian_factor};
use crate::ops::softmax::softmax_row;

/// Tasks of a backward pass at least; each has a dk and dv of its own.
const BACKWARD_TASKS: usize = 8;

/// `[b, m, g, d]` as `[b, g, d, m]`.
fn transposed<T: CpuNumber>(device: &CpuDevice, x: &[T], dims: Dims, m: usize) -> Buffer<T> {
    let Dims { b, g, d, .. } = dims;
    let mut out = device.alloc::<T>(b * g * d * m);
    device.for_pieces(&mut out, (d * m).max(1), |i, out| {
        let rows = MatRef::rows(&x[(i / g * m * g + i % g) * d..], g * d);
        transpose_into(rows, m, d, MatMut::rows(out, m), m);
    });
    out
}

/// The keys that the queries `first..first + rows` see together.
fn union(span: Span, first: usize, rows: usize) -> Range<usize> {
    span.of(first).start..span.of(first + rows - 1).end
}

/// Keys that a tile of `t` queries sees at most. Its scores are given this room whatever they need, so that free lists hold
/// one buffer a thread and not one a length.
fn longest(span: Span, t: usize) -> usize {
    (0..t).step_by(SCORE_TILE).map(|first| union(span, first, SCORE_TILE.min(t - first)).len()).max().unwrap_or(0)
}

/// Scores to probabilities, zero outside each query's span; row `r * group + i` is head `i` of query `first + r`, and
/// column 0 is key `keys.start`.
fn normalize<T: CpuNumber>(
    p: &mut [T],
    group: usize,
    first: usize,
    keys: &Range<usize>,
    span: Span,
    scale: T,
    alpha: f64,
) {
    for (r, row) in p.chunks_exact_mut(keys.len()).enumerate() {
        let own = span.of(first + r / group);
        let (before, rest) = row.split_at_mut(own.start - keys.start);
        let (live, after) = rest.split_at_mut(own.len());
        before.fill(T::ZERO);
        after.fill(T::ZERO);
        if live.is_empty() {
            continue;
        }
        scale_row(live, scale);
        if alpha == 1.0 {
            softmax_row(live);
        } else {
            entmax_row(live, alpha);
        }
    }
}

simd! {
    /// dp to scale * ds, in place.
    fn differentiate_row<T>(p: &[T], dp: &mut [T], alpha: f64, scale: T) {
        let (mut inner, mut sum) = (T::ZERO, T::ZERO);
        for (&p, &g) in p.iter().zip(dp.iter()) {
            let r = jacobian_factor(p, alpha);
            inner = r.mul_add(g, inner);
            sum += r;
        }
        let mean = if sum == T::ZERO { T::ZERO } else { inner / sum };
        for (&p, g) in p.iter().zip(dp.iter_mut()) {
            *g = jacobian_factor(p, alpha) * (*g - mean) * scale;
        }
    }
}

pub fn forward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    m: usize,
    (q, k, v): (&[T], &[T], &[T]),
    span: Span,
    alpha: f64,
) -> Buffer<T> {
    let Dims { b, t, h, g, d } = dims;
    let group = dims.group();
    let scale = T::of(1.0 / (d as f64).sqrt());
    let kt = transposed(device, k, dims, m);
    let mut out = device.alloc::<T>(b * t * h * d);
    let (tiles, most) = (t.div_ceil(SCORE_TILE), longest(span, t));
    let mut pieces = Vec::with_capacity(b * tiles);
    for (batch, out) in out.chunks_mut((t * h * d).max(1)).enumerate() {
        pieces.extend(out.chunks_mut(SCORE_TILE * h * d).enumerate().map(|(tile, out)| (batch, tile, out)));
    }
    device.for_each(pieces, |(batch, tile, out)| {
        let (first, rows) = (tile * SCORE_TILE, out.len() / (h * d));
        let keys = union(span, first, rows);
        if keys.is_empty() {
            out.fill(T::ZERO);
            return;
        }
        let lines = rows * group;
        let (mut qs, mut os) = (device.alloc::<T>(lines * d), device.alloc::<T>(lines * d));
        let mut p = device.alloc::<T>(lines * most);
        let p = &mut p[..lines * keys.len()];
        for kv in 0..g {
            take_tile(&q[((batch * t + first) * h + kv * group) * d..], h * d, group * d, &mut qs);
            let kt = MatRef::rows(&kt[(batch * g + kv) * d * m + keys.start..], m);
            let n = keys.len();
            Gemm::new(lines, n, d).run(MatRef::rows(&qs, d), kt, MatMut::rows(p, n));
            normalize(p, group, first, &keys, span, scale, alpha);
            let v = MatRef::rows(&v[((batch * m + keys.start) * g + kv) * d..], g * d);
            Gemm::new(lines, d, n).run(MatRef::rows(p, n), v, MatMut::rows(&mut os, d));
            for (r, os) in os.chunks_exact(group * d).enumerate() {
                out[(r * h + kv * group) * d..][..group * d].copy_from_slice(os);
            }
        }
    });
    out
}

/// What a backward task owns: its (batch, kv head), dk and dv `[m, d]`, and (tile, dq `[rows, group * d]`) pairs.
struct Task<'a, T> {
    bg: usize,
    dk: &'a mut [T],
    dv: &'a mut [T],
    tiles: Vec<(usize, &'a mut [T])>,
}

/// What every tile of a backward pass reads.
struct Backward<'a, T> {
    dims: Dims,
    m: usize,
    q: &'a [T],
    k: &'a [T],
    /// Keys and values `[b, g, d, m]`.
    kt: &'a [T],
    vt: &'a [T],
    dout: &'a [T],
    span: Span,
    alpha: f64,
    /// The most keys that a tile sees.
    most: usize,
}

impl<T: CpuNumber> Backward<'_, T> {
    /// Writes dq `[rows, group * d]` of a tile and adds to dk and dv `[m, d]` of its (batch, kv head).
    fn tile(&self, device: &CpuDevice, (bg, tile): (usize, usize), dq: &mut [T], (dk, dv): (&mut [T], &mut [T])) {
        let (Dims { t, h, g, d, .. }, m, most) = (self.dims, self.m, self.most);
        let (span, alpha, group) = (self.span, self.alpha, self.dims.group());
        let scale = T::of(1.0 / (d as f64).sqrt());
        let (batch, kv) = (bg / g, bg % g);
        let first = tile * SCORE_TILE;
        let lines = dq.len() / d;
        let keys = union(span, first, lines / group);
        if keys.is_empty() {
            dq.fill(T::ZERO);
            return;
        }
        let (mut qs, mut gs) = (device.alloc::<T>(lines * d), device.alloc::<T>(lines * d));
        let (mut p, mut ds) = (device.alloc::<T>(lines * most), device.alloc::<T>(lines * most));
        let (p, ds) = (&mut p[..lines * keys.len()], &mut ds[..lines * keys.len()]);
        let from = ((batch * t + first) * h + kv * group) * d;
        take_tile(&self.q[from..], h * d, group * d, &mut qs);
        take_tile(&self.dout[from..], h * d, group * d, &mut gs);
        let at = bg * d * m + keys.start;
        let n = keys.len();
        let (q_rows, dout_rows) = (MatRef::rows(&qs, d), MatRef::rows(&gs, d));
        Gemm::new(lines, n, d).run(q_rows, MatRef::rows(&self.kt[at..], m), MatMut::rows(p, n));
        normalize(p, group, first, &keys, span, scale, alpha);
        Gemm::new(lines, n, d).run(dout_rows, MatRef::rows(&self.vt[at..], m), MatMut::rows(ds, n));
        for (p, ds) in p.chunks_exact(keys.len()).zip(ds.chunks_exact_mut(keys.len())) {
            differentiate_row(p, ds, alpha, scale);
        }
        let k = MatRef::rows(&self.k[((batch * m + keys.start) * g + kv) * d..], g * d);
        Gemm::new(lines, d, n).run(MatRef::rows(ds, n), k, MatMut::rows(dq, d));
        let (dk, dv) = (&mut dk[keys.start * d..], &mut dv[keys.start * d..]);
        Gemm::adding(n, d, lines).run(MatRef::rows(ds, n).t(), q_rows, MatMut::rows(dk, d));
        Gemm::adding(n, d, lines).run(MatRef::rows(p, n).t(), dout_rows, MatMut::rows(dv, d));
    }
}

/// dq `[b, t, h, d]`, dk and dv `[b, m, g, d]`.
pub fn backward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    m: usize,
    (q, k, v): (&[T], &[T], &[T]),
    dout: &[T],
    span: Span,
    alpha: f64,
) -> [Buffer<T>; 3] {
    let Dims { b, t, h, g, d } = dims;
    let group = dims.group();
    if m == 0 || b == 0 {
        return [device.zeros(b * t * h * d), device.zeros(0), device.zeros(0)];
    }
    let (kt, vt) = (transposed(device, k, dims, m), transposed(device, v, dims, m));
    let (tiles, most) = (t.div_ceil(SCORE_TILE), longest(span, t));
    let splits = BACKWARD_TASKS.div_ceil(b * g).min(tiles).max(1);
    let len = t * group * d;
    let mut dq_bg = device.alloc::<T>(b * g * len);
    let (mut dk_parts, mut dv_parts) =
        (device.alloc::<T>(b * g * splits * m * d), device.alloc::<T>(b * g * splits * m * d));
    let mut tasks: Vec<Task<T>> = Vec::with_capacity(b * g * splits);
    for (i, (dk, dv)) in dk_parts.chunks_mut(m * d).zip(dv_parts.chunks_mut(m * d)).enumerate() {
        tasks.push(Task { bg: i / splits, dk, dv, tiles: Vec::new() });
    }
    for (bg, dq) in dq_bg.chunks_mut(len).enumerate() {
        for (tile, dq) in dq.chunks_mut(SCORE_TILE * group * d).enumerate() {
            tasks[bg * splits + owner(tile, splits)].tiles.push((tile, dq));
        }
    }
    let pass = Backward { dims, m, q, k, kt: &kt, vt: &vt, dout, span, alpha, most };
    device.for_each(tasks, |task| {
        task.dk.fill(T::ZERO);
        task.dv.fill(T::ZERO);
        for (tile, dq) in task.tiles {
            pass.tile(device, (task.bg, tile), dq, (&mut *task.dk, &mut *task.dv));
        }
    });
    let mut dq = device.alloc::<T>(b * t * h * d);
    interleave(device, &dq_bg, (b, g, t, group * d), 1, &mut dq);
    let (mut dk, mut dv) = (device.alloc::<T>(b * m * g * d), device.alloc::<T>(b * m * g * d));
    interleave(device, &dk_parts, (b, g, m, d), splits, &mut dk);
    interleave(device, &dv_parts, (b, g, m, d), splits, &mut dv);
    [dq, dk, dv]
}
