use super::super::Dims;
use super::super::engine::{SCORE_TILE, interleave, scale_row};
use super::super::list::BlockList;
use super::{Center, Entmax, Pooling, RouterGradient, WindowChoice};
use crate::device::cpu::gemm::Gemm;
use crate::device::cpu::matrix::{MatMut, MatRef};
use crate::device::cpu::simd::{self, simd};
use crate::device::cpu::transpose::transpose_into;
use crate::device::{Buffer, CpuDevice, Shared};
use crate::device::{CpuElement, CpuNumber};
use crate::ops::attention::Span;
use crate::ops::entmax::{entmax_row, jacobian_factor};
use crate::ops::softmax::softmax_row;

/// Lists and numbers of one tile of one kv head, in order of query.
struct Part<T: CpuNumber> {
    counts: Buffer<u32>,
    chunks: Buffer<u32>,
    weights: Buffer<T>,
    bias: Buffer<T>,
    /// per entry, p of every head of the group
    heads: Buffer<T>,
}

pub struct Forward<T: CpuNumber> {
    pub list: BlockList,
    pub weights: Buffer<T>,
    pub bias: Buffer<T>,
    pub head_weights: Buffer<T>,
}

/// Runs `choose(kv head, first query of the tile, scores, part)` for every tile of every kv head and returns the parts in order.
/// Row `r * group + i` of the scores, `n` wide, is head `i` of query `r`; only its first `visible(query)` are valid, a
/// number that grows with the query.
fn for_tiles<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    n: usize,
    visible: impl Fn(usize) -> usize + Sync + Send,
    (q, kbar): (&[T], &[T]),
    gamma: f64,
    choose: impl Fn(usize, usize, &mut [T], &mut Part<T>) + Sync + Send,
) -> Vec<Part<T>> {
    let Dims { b, t, h, g, d } = dims;
    let group = dims.group();
    let mut kt = device.alloc::<T>(b * g * d * n);
    device.for_chunks(&mut kt, (d * n).max(1), |i, out| {
        let rows = MatRef::rows(&kbar[(i / g * n * g + i % g) * d..], g * d);
        transpose_into(rows, n, d, MatMut::rows(out, n), n);
    });
    let tiles = t.div_ceil(SCORE_TILE);
    let factor = T::of(gamma / (d as f64).sqrt());
    device.map(b * g * tiles, |i| {
        let (bg, tile) = (i / tiles, i % tiles);
        let (batch, kv) = (bg / g, bg % g);
        let first = tile * SCORE_TILE;
        let rows = SCORE_TILE.min(t - first);
        let most = visible(first + rows - 1);
        let (mut qs, mut scores) = (device.alloc::<T>(rows * group * d), device.alloc::<T>(rows * group * n));
        for (r, out) in qs.chunks_exact_mut(group * d).enumerate() {
            out.copy_from_slice(&q[((batch * t + first + r) * h + kv * group) * d..][..group * d]);
        }
        if most > 0 {
            let keys = MatRef::rows(&kt[bg * d * n..], n);
            Gemm::new(rows * group, most, d).run(MatRef::rows(&qs, d), keys, MatMut::rows(&mut scores, n));
        }
        for (r, row) in scores.chunks_exact_mut(n.max(1)).enumerate() {
            scale_row(&mut row[..visible(first + r / group)], factor);
        }
        let mut part = Part {
            counts: device.list(rows),
            chunks: device.list(rows),
            weights: device.list(rows),
            bias: device.list(rows),
            heads: device.list(rows),
        };
        choose(kv, first, &mut scores, &mut part);
        part
    })
}

simd! {
    /// The mean of rows `n` wide, as far as `out` reaches.
    fn mean_of_rows<T>(rows: &[T], n: usize, out: &mut [T]) {
        let share = T::of(n as f64 / rows.len() as f64);
        out.fill(T::ZERO);
        for row in rows.chunks_exact(n.max(1)) {
            out.iter_mut().zip(row).for_each(|(o, &x)| *o += x);
        }
        out.iter_mut().for_each(|o| *o *= share);
    }
}

simd! {
    /// Writes the chunks with a weight above zero to the front of `chunks`, ascending, and returns their number. Without a
    /// branch, which weights that follow no pattern would have guessed wrong.
    fn support<T>(weights: &[T], chunks: &mut [u32]) -> usize {
        let mut count = 0;
        for (c, &w) in weights.iter().enumerate() {
            chunks[count] = c as u32;
            count += (w > T::ZERO) as usize;
        }
        count
    }
}

/// Where each query's entries begin, and the end.
fn offsets<T: CpuNumber>(device: &CpuDevice, parts: &[Part<T>]) -> Buffer<u32> {
    let mut out = device.list(1 + parts.iter().map(|p| p.counts.len()).sum::<usize>());
    let mut total = 0u32;
    out.push(0);
    for &count in parts.iter().flat_map(|p| &*p.counts) {
        total = total.checked_add(count).expect("fewer than 2^32 (query, chunk) pairs");
        out.push(total);
    }
    out
}

fn concat<E: CpuElement, P>(device: &CpuDevice, parts: &[P], field: impl Fn(&P) -> &[E]) -> Buffer<E> {
    let mut out = device.list(parts.iter().map(|p| field(p).len()).sum());
    parts.iter().for_each(|p| out.extend(field(p)));
    out
}

pub fn forward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    n: usize,
    q: &[T],
    kbar: &[T],
    diagonal: Option<&[T]>,
    settings: Entmax,
) -> Forward<T> {
    let (group, s) = (dims.group(), settings.chunk_size);
    let parts = for_tiles(
        device,
        dims,
        n,
        |query| query / s,
        (q, kbar),
        settings.gamma,
        |kv, first, scores, part| {
            let (mut group_mean, mut listed) = (device.alloc::<T>(n), device.alloc::<u32>(n + 1));
            let (mut kept, mut heads) = (device.alloc::<T>(n + 1), device.alloc::<T>((n + 1) * group));
            for r in 0..SCORE_TILE.min(dims.t - first) {
                let own = (first + r) / s;
                let rows = &mut scores[r * group * n..][..group * n];
                for head in 0..group {
                    entmax_row(&mut rows[head * n..][..own], settings.alpha);
                }
                mean_of_rows(rows, n, &mut group_mean[..own]);
                let count = support(&group_mean[..own], &mut listed);
                listed[count] = own as u32;
                for (e, heads) in heads.chunks_exact_mut(group).enumerate().take(count) {
                    let c = listed[e] as usize;
                    kept[e] = group_mean[c];
                    heads.iter_mut().enumerate().for_each(|(head, p)| *p = rows[head * n + c]);
                }
                kept[count] = T::ZERO;
                heads[count * group..][..group].fill(T::ZERO);
                part.counts.push(count as u32 + 1);
                part.chunks.extend(&listed[..=count]);
                part.weights.extend(&kept[..=count]);
                part.heads.extend(&heads[..(count + 1) * group]);
                kept[count] = diagonal.map_or(T::ZERO, |d| d[kv]);
                let logs = &mut kept[..count];
                logs.iter_mut().for_each(|w| *w = w.ln());
                let mean = match settings.center {
                    Center::Mean | Center::MeanDetached if !logs.is_empty() => {
                        simd::sum(logs) / T::of(logs.len() as f64)
                    }
                    _ => T::ZERO,
                };
                logs.iter_mut().for_each(|b| *b = (*b - mean) / T::of(settings.sigma));
                part.bias.extend(&kept[..=count]);
            }
        },
    );
    let (offsets, chunks) = (offsets(device, &parts), concat(device, &parts, |p| &p.chunks));
    let list = BlockList::new(device, (dims.b, dims.g, dims.t), s, offsets, chunks);
    Forward {
        list,
        weights: concat(device, &parts, |p| &p.weights),
        bias: concat(device, &parts, |p| &p.bias),
        head_weights: concat(device, &parts, |p| &p.heads),
    }
}

/// Keeps the `count` chunks with the largest scores, ties to the lower chunk, in ascending order.
fn keep_best<T: CpuNumber>(chunks: &mut Vec<u32>, scores: &[T], count: usize) {
    if chunks.len() <= count {
        return;
    }
    chunks.sort_by(|&a, &b| {
        let (x, y) = (scores[a as usize], scores[b as usize]);
        y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
    });
    chunks.truncate(count);
    chunks.sort_unstable();
}

pub fn windows<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    m: usize,
    q: &[T],
    keys: &[T],
    span: Span,
    c: WindowChoice,
) -> BlockList {
    let (group, s, n) = (dims.group(), c.chunk_size, dims.t.div_ceil(c.chunk_size));
    // the windows that touch a chunk, and the whole strides that each shares with it
    let touching = |chunk: usize| {
        let (from, to) = (chunk * s, (chunk + 1) * s);
        let first = (from + c.stride).saturating_sub(c.length) / c.stride;
        (first..m.min(to.div_ceil(c.stride))).filter_map(move |w| {
            let (low, high) = (from.max(w * c.stride), to.min(w * c.stride + c.length));
            let strides = high.saturating_sub(low) / c.stride;
            (strides > 0).then_some((w, strides))
        })
    };
    let touches: Vec<Vec<(usize, usize)>> = (0..n).map(|chunk| touching(chunk).collect()).collect();
    let parts = for_tiles(
        device,
        dims,
        m,
        |query| span.of(query).end,
        (q, keys),
        1.0,
        |_, first, scores, part| {
            let (mut sum, mut block, mut free) = (vec![T::ZERO; m], vec![T::ZERO; n], Vec::with_capacity(n));
            for r in 0..SCORE_TILE.min(dims.t - first) {
                let (own, visible) = ((first + r) / s, span.of(first + r).end);
                let rows = &mut scores[r * group * m..][..group * m];
                sum.fill(T::ZERO);
                for head in 0..group {
                    let row = &mut rows[head * m..][..visible];
                    softmax_row(row);
                    sum.iter_mut().zip(&*row).for_each(|(s, &p)| *s += p);
                }
                for (score, touch) in block.iter_mut().zip(&touches).take(own + 1) {
                    *score = T::ZERO;
                    for &(w, strides) in touch {
                        match c.pooling {
                            Pooling::Max => *score = score.max(sum[w]),
                            Pooling::Overlap => *score = T::of(strides as f64).mul_add(sum[w], *score),
                        }
                    }
                }
                let forced = |chunk: usize| chunk < c.init || chunk + c.local > own;
                free.clear();
                free.extend((0..=own as u32).filter(|&chunk| !forced(chunk as usize)));
                let left = c.top - (own + 1 - free.len());
                keep_best(&mut free, &block, left);
                free.extend((0..=own as u32).filter(|&chunk| forced(chunk as usize)));
                free.sort_unstable();
                part.counts.push(free.len() as u32);
                part.chunks.extend(&free);
            }
        },
    );
    let (offsets, chunks) = (offsets(device, &parts), concat(device, &parts, |p| &p.chunks));
    BlockList::new(device, (dims.b, dims.g, dims.t), s, offsets, chunks)
}

pub fn topk<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    n: usize,
    q: &[T],
    kbar: &[T],
    s: usize,
    top: usize,
    gamma: f64,
) -> BlockList {
    let group = dims.group();
    let parts = for_tiles(
        device,
        dims,
        n,
        |query| query / s,
        (q, kbar),
        gamma,
        |_, first, scores, part| {
            let (mut mean, mut order) = (device.alloc::<T>(n), Vec::with_capacity(n));
            for r in 0..SCORE_TILE.min(dims.t - first) {
                let own = (first + r) / s;
                let rows = &mut scores[r * group * n..][..group * n];
                for head in 0..group {
                    softmax_row(&mut rows[head * n..][..own]);
                }
                mean_of_rows(rows, n, &mut mean[..own]);
                order.clear();
                order.extend(0..own as u32);
                keep_best(&mut order, &mean, top - 1);
                part.counts.push(order.len() as u32 + 1);
                part.chunks.extend(&order);
                part.chunks.push(own as u32);
            }
        },
    );
    let (offsets, chunks) = (offsets(device, &parts), concat(device, &parts, |p| &p.chunks));
    BlockList::new(device, (dims.b, dims.g, dims.t), s, offsets, chunks)
}

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

/// What a task of [`backward`] sums and keeps beside dq and dkbar.
struct Sums<T> {
    own: T,
    squares: f64,
    scores: Vec<T>,
    pairs: u64,
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
    /// dq += ds_c kbar_c and dkbar_c += ds_c q over the listed chunks; summaries are rows `stride` apart.
    fn spread<T>(chunks: &[u32], ds: &[T], factor: T, q: &[T], kbar: &[T], stride: usize, dq: &mut [T], dkbar: &mut [T]) {
        let d = q.len();
        for (&c, &g) in chunks.iter().zip(ds) {
            let g = g * factor;
            simd::axpy(g, &kbar[c as usize * stride..][..d], dq);
            simd::axpy(g, q, &mut dkbar[c as usize * d..][..d]);
        }
    }
}

/// One (batch, kv head) a task: dq of its heads, dkbar `[n, d]` and the sum of the own chunks' dbias.
pub fn backward<T: CpuNumber>(
    device: &CpuDevice,
    dims: Dims,
    n: usize,
    (q, kbar): (&[T], &[T]),
    (list, weights, heads): (&BlockList, &[T], &[T]),
    dbias: &[T],
    settings: Entmax,
    keep_scores: bool,
) -> Gradients<T> {
    let Dims { b, t, h, g, d } = dims;
    let group = dims.group();
    let factor = settings.gamma / (d as f64).sqrt();
    let (mut dq, mut dkbar) = (device.alloc::<T>(b * t * h * d), device.alloc::<T>(b * g * n * d));
    let mut sums: Vec<Sums<T>> =
        (0..b * g).map(|_| Sums { own: T::ZERO, squares: 0.0, scores: Vec::new(), pairs: 0 }).collect();
    let shared_dq = Shared::new(&mut dq);
    let tasks: Vec<_> = split(&mut dkbar, n * d, b * g)
        .into_iter()
        .zip(&mut sums)
        .enumerate()
        .map(|(bg, (dkbar, sums))| (bg, dkbar, sums))
        .collect();
    device.for_each(tasks, |(bg, dkbar, sums)| {
        let (batch, kv) = (bg / g, bg % g);
        dkbar.fill(T::ZERO);
        let kbar = &kbar[(batch * n * g + kv) * d..];
        let (mut ds, mut dlogw): (Vec<T>, Vec<T>) = Default::default();
        for query in 0..t {
            let place = ((batch * t + query) * h + kv * group) * d;
            // SAFETY: the heads of one kv head of one query, which no other task has.
            let dq_rows = unsafe { shared_dq.piece(place, group * d) };
            dq_rows.fill(T::ZERO);
            let entries = list.entries_of(batch, kv, query);
            let routed = entries.start..entries.end - 1;
            sums.own += dbias[entries.end - 1];
            let kept = sums.scores.len();
            if keep_scores {
                sums.scores.resize(kept + entries.len() * group, T::ZERO);
            }
            if routed.is_empty() || settings.gradient == RouterGradient::Stopped {
                continue;
            }
            dlogw.clear();
            dlogw.extend(dbias[routed.clone()].iter().map(|&g| g / T::of(settings.sigma)));
            if settings.center == Center::Mean {
                let mean = simd::sum(&dlogw) / T::of(dlogw.len() as f64);
                dlogw.iter_mut().for_each(|g| *g -= mean);
            }
            let chunks = &list.chunks_of(batch, kv, query)[..routed.len()];
            let q_rows = &q[place..][..group * d];
            if settings.gradient == RouterGradient::StraightThrough {
                let visible = query / settings.chunk_size;
                let all =
                    straight_through(chunks, &dlogw, (visible, group), factor, q_rows, kbar, g * d, dq_rows, dkbar);
                sums.squares += simd::dot(&all, &all).f64();
                if keep_scores {
                    for head in 0..group {
                        for (e, &c) in chunks.iter().enumerate() {
                            sums.scores[kept + e * group + head] = all[head * visible + c as usize];
                        }
                    }
                    let touched = |c: &usize| (0..group).any(|head| all[head * visible + c] != T::ZERO);
                    sums.pairs += (0..visible).filter(touched).count() as u64;
                }
                continue;
            }
            for head in 0..group {
                ds.clear();
                ds.resize(routed.len(), T::ZERO);
                let heads = &heads[routed.start * group..routed.end * group];
                score_gradient(heads, group, head, &weights[routed.clone()], &dlogw, settings.alpha, &mut ds);
                sums.squares += simd::dot(&ds, &ds).f64();
                if keep_scores {
                    ds.iter().enumerate().for_each(|(e, &d)| sums.scores[kept + e * group + head] = d);
                }
                let (q, dq) = (&q_rows[head * d..][..d], &mut dq_rows[head * d..][..d]);
                spread(chunks, &ds, T::of(factor), q, kbar, g * d, dq, dkbar);
            }
            if keep_scores {
                let touched = |heads: &&[T]| heads.iter().any(|&d| d != T::ZERO);
                sums.pairs += sums.scores[kept..].chunks_exact(group).filter(touched).count() as u64;
            }
        }
    });
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
fn split<T>(mut x: &mut [T], len: usize, parts: usize) -> Vec<&mut [T]> {
    (0..parts)
        .map(|_| {
            let (head, tail) = std::mem::take(&mut x).split_at_mut(len);
            x = tail;
            head
        })
        .collect()
}

/// The straight-through gradient of one query: d log of the group mean of softmax over all `visible` chunks, for the
/// chunks of the support. Returns the score gradients `[group, visible]`.
fn straight_through<T: CpuNumber>(
    chunks: &[u32],
    dlogw: &[T],
    (visible, group): (usize, usize),
    factor: f64,
    q: &[T],
    kbar: &[T],
    stride: usize,
    dq: &mut [T],
    dkbar: &mut [T],
) -> Vec<T> {
    let d = q.len() / group;
    let mut scores = Vec::with_capacity(group * visible);
    let mut soft = vec![T::ZERO; group * visible];
    let mut mean = vec![T::ZERO; visible];
    for (head, row) in soft.chunks_exact_mut(visible).enumerate() {
        for (c, x) in row.iter_mut().enumerate() {
            *x = simd::dot(&q[head * d..][..d], &kbar[c * stride..][..d]) * T::of(factor);
        }
        softmax_row(row);
        mean.iter_mut().zip(&*row).for_each(|(m, &x)| *m += x);
    }
    let all: Vec<u32> = (0..visible as u32).collect();
    for (head, row) in soft.chunks_exact_mut(visible).enumerate() {
        // d log(mean) / d soft = 1 / sum over heads: the 1/group of the mean cancels
        let mut inner = T::ZERO;
        let upstream = |c: u32, g: T| if mean[c as usize] > T::ZERO { g / mean[c as usize] } else { T::ZERO };
        for (&c, &g) in chunks.iter().zip(dlogw) {
            inner += row[c as usize] * upstream(c, g);
        }
        let mut ds: Vec<T> = row.iter().map(|&p| -p * inner).collect();
        for (&c, &g) in chunks.iter().zip(dlogw) {
            ds[c as usize] += row[c as usize] * upstream(c, g);
        }
        let (q, dq) = (&q[head * d..][..d], &mut dq[head * d..][..d]);
        spread(&all, &ds, T::of(factor), q, kbar, stride, dq, dkbar);
        scores.extend_from_slice(&ds);
    }
    scores
}
