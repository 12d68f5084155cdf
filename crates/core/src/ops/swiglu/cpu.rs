//! Tasks own a block of rows and a range of features. What other tasks contribute to the same numbers, other features to y
//! and dx, other rows to the weights' gradients, is written apart and added in order; every cut follows from the shape.

use crate::device::CpuNumber;
use crate::device::kernel::COLS;
use crate::device::simd::{add_into, simd};
use crate::device::tile::Mat;
use crate::device::{Buffer, CpuDevice};
use crate::ops::matmul::{Format, apart, pack, product};
use crate::tensor::ELEMENTWISE;

/// Rows of a block: with as many of x, gate, up, h and y in f32, WIDE features and width 256 they are 640 KiB, in the
/// second cache.
const BLOCK: usize = 128;
/// Blocks that backward takes at once: a weight's gradient is read and written once for so many rows.
const BLOCKS: usize = 2;
/// Features at a time.
const WIDE: usize = 192;
/// Distance of rows of dgate and dup: 13 lines, so that a column of theirs reaches every set of the first cache.
const LINE: usize = apart(WIDE);
/// Tasks to cut the work into at least.
const TASKS: usize = 16;
/// Longest row of an operand that is neither x's nor a weight's.
pub const LONGEST: usize = BLOCK * BLOCKS;

/// Numbers in gate and in up as they are kept: blocks of rows, in them panels of features as wide as the format's, in them
/// rows.
pub fn kept(rows: usize, f: usize) -> usize {
    rows * f.next_multiple_of(COLS)
}

simd! {
    /// h of one panel, in rows `ld` apart.
    fn activate<T>(width: usize, gate: &[T], up: &[T], h: &mut [T], ld: usize) {
        for ((g, u), h) in gate.chunks_exact(width).zip(up.chunks_exact(width)).zip(h.chunks_mut(ld)) {
            for ((h, &g), &u) in h.iter_mut().zip(g).zip(u) {
                *h = g * sigmoid(g) * u;
            }
        }
    }
}

simd! {
    /// Turns dh of one panel into h and writes dgate and dup in rows `ld` apart.
    fn differentiate<T>(width: usize, gate: &[T], up: &[T], dh: &mut [T], dgate: &mut [T], dup: &mut [T], ld: usize) {
        let kept = gate.chunks_exact(width).zip(up.chunks_exact(width));
        let rows = dh.chunks_exact_mut(width).zip(dgate.chunks_mut(ld).zip(dup.chunks_mut(ld)));
        for ((g, u), (d, (dg, du))) in kept.zip(rows) {
            for (((dg, du), d), (&g, &u)) in dg.iter_mut().zip(du).zip(d).zip(g.iter().zip(u)) {
                let s = sigmoid(g);
                *du = *d * (g * s);
                *dg = *d * u * s * (T::ONE + g * (T::ONE - s));
                *d = g * s * u;
            }
        }
    }
}

#[inline(always)]
fn sigmoid<T: CpuNumber>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

/// Features a task owns, a multiple of 32, when the rows are cut into `parts`.
fn features(f: usize, parts: usize) -> usize {
    f.div_ceil(TASKS.div_ceil(parts)).next_multiple_of(COLS)
}

/// Rows and features that a task of backward owns: of the ways to make 16 tasks the one with the fewest numbers to add.
fn cut(rows: usize, c: usize, f: usize) -> (usize, usize) {
    let ways = [1, 2, 4, 8, 16].map(|parts| {
        let own = rows.div_ceil(parts).next_multiple_of(LONGEST);
        let (parts, cols) = (rows.div_ceil(own), features(f, parts));
        (((f.div_ceil(cols) - 1) * rows + (parts - 1) * 3 * f) * c, own, cols)
    });
    let (_, rows, cols) = ways.into_iter().min().expect("there are ways");
    (rows, cols)
}

/// Numbers that [`backward`] takes beside what it is given and the gradients of the weights: dx, panels of x and of the
/// weights, parts of sums.
pub fn scratch((rows, c, f): Size) -> usize {
    let (own, cols) = cut(rows, c, f);
    let (down, across) = (rows.div_ceil(own), f.div_ceil(cols));
    (rows + 3 * f + across * rows + 3 * (down - 1) * f + f) * c
}

/// `[parts, len]` cut into parts of which the first is `first`.
fn parts<'a, T>(first: &'a mut [T], others: &'a mut [T]) -> impl Iterator<Item = &'a mut [T]> {
    let len = first.len();
    std::iter::once(first).chain(others.chunks_mut(len))
}

/// Adds the parts in order.
fn sum<T: CpuNumber>(device: &CpuDevice, first: &mut [T], others: &[T]) {
    let len = first.len();
    if others.is_empty() {
        return;
    }
    device.for_chunks(first, ELEMENTWISE, |i, out| {
        for part in others.chunks_exact(len) {
            add_into(&part[i * ELEMENTWISE..], out);
        }
    });
}

type Size = (usize, usize, usize);

/// Panels of a weight.
struct Panels<T: CpuNumber> {
    data: Buffer<T>,
    /// distance of two, and columns of each
    stride: usize,
    width: usize,
}

impl<T: CpuNumber> Panels<T> {
    fn new<F: Format<T>>(device: &CpuDevice, format: &F, b: Mat<T>, k: usize, n: usize) -> Self {
        let width = format.width();
        Panels { data: pack(device, format, b, k, n), stride: k.div_ceil(F::WORD) * width, width }
    }
    /// From column `j`, a multiple of 32, and word `p` on.
    fn from(&self, p: usize, j: usize) -> (&[T], usize) {
        (&self.data[j / self.width * self.stride + p * self.width..], self.stride)
    }
}

/// y `[rows, c]`, and gate and up as they are kept.
pub fn forward<T: CpuNumber, F: Format<T>>(
    format: &F,
    device: &CpuDevice,
    (rows, c, f): Size,
    x: &[T],
    [gate, up, down]: [&[T]; 3],
    residual: Option<&[T]>,
) -> (Buffer<T>, Buffer<T>, Buffer<T>) {
    let (cw, padded, width) = (c.div_ceil(F::WORD), f.next_multiple_of(COLS), format.width());
    let gate_t = Panels::new(device, format, Mat::rows(gate, c).t(), c, f);
    let up_t = Panels::new(device, format, Mat::rows(up, c).t(), c, f);
    let down_t = Panels::new(device, format, Mat::rows(down, f).t(), f, c);
    let cols = features(f, rows.div_ceil(BLOCK));
    let mut y = device.alloc::<T>(rows * c);
    let mut others = device.alloc::<T>((f.div_ceil(cols) - 1) * rows * c);
    let (mut gates, mut ups) = (device.alloc::<T>(rows * padded), device.alloc::<T>(rows * padded));

    let mut y_of: Vec<_> = parts(&mut y, &mut others).map(|part| part.chunks_mut(BLOCK * c)).collect();
    let mut tasks = Vec::new();
    let blocks = gates.chunks_mut(BLOCK * padded).zip(ups.chunks_mut(BLOCK * padded));
    for (block, (gates, ups)) in blocks.enumerate() {
        let own = gates.len() / padded * cols;
        let pieces = gates.chunks_mut(own).zip(ups.chunks_mut(own)).zip(&mut y_of);
        for (range, ((gates, ups), y)) in pieces.enumerate() {
            tasks.push((block * BLOCK, range * cols, gates, ups, y.next().expect("as many blocks")));
        }
    }
    device.for_each(tasks, |(i0, j0, gates, ups, y)| {
        let (m, end) = (y.len() / c, f.min(j0 + cols));
        let mut h = device.alloc::<T>(m * WIDE);
        let x = Mat::rows(&x[i0 * c..], c);
        let mut x_words = device.alloc::<T>(format.scratch(x, m, c));
        let mut h_words = device.alloc::<T>(format.scratch(Mat::rows(&h, WIDE), m, WIDE));
        let left = format.left(x, m, c, &mut x_words);
        let panel = m * width;
        for j in (j0..end).step_by(WIDE) {
            let n = WIDE.min(end - j);
            let at = (j - j0) / width * panel..((j - j0) / width + n.div_ceil(width)) * panel;
            let (g, u) = (&mut gates[at.clone()], &mut ups[at]);
            product(format, (m, n, cw), left, gate_t.from(0, j), (g, width, panel), false);
            product(format, (m, n, cw), left, up_t.from(0, j), (u, width, panel), false);
            for (p, (g, u)) in g.chunks_exact(panel).zip(u.chunks_exact(panel)).enumerate() {
                activate(width, g, u, &mut h[p * width..], WIDE);
            }
            let left = format.left(Mat::rows(&h, WIDE), m, n, &mut h_words);
            let right = down_t.from(j / F::WORD, 0);
            product(format, (m, c, n.div_ceil(F::WORD)), left, right, (y, c, width), j > j0);
        }
        if let (Some(residual), 0) = (residual, j0) {
            add_into(&residual[i0 * c..], y);
        }
    });
    drop(y_of);
    sum(device, &mut y, &others);
    (y, gates, ups)
}

/// Gradients of x, gate, up and down.
pub fn backward<T: CpuNumber, F: Format<T>>(
    format: &F,
    device: &CpuDevice,
    (rows, c, f): Size,
    dy: &[T],
    x: &[T],
    [gate, up, down]: [&[T]; 3],
    [gates, ups]: [&[T]; 2],
) -> [Buffer<T>; 4] {
    let (cw, padded, width) = (c.div_ceil(F::WORD), f.next_multiple_of(COLS), format.width());
    let down_ = Panels::new(device, format, Mat::rows(down, f), c, f);
    let gate_ = Panels::new(device, format, Mat::rows(gate, c), f, c);
    let up_ = Panels::new(device, format, Mat::rows(up, c), f, c);
    // x as the right side of dG and dU, for all ranges of features
    let (wide, alloc) = (c.next_multiple_of(width), |n: usize| device.alloc::<T>(n));
    let mut x_panels = alloc(rows.div_ceil(LONGEST) * LONGEST.div_ceil(F::WORD) * wide);
    device.for_chunks(&mut x_panels, LONGEST.div_ceil(F::WORD) * wide, |i, out| {
        let m = LONGEST.min(rows - i * LONGEST);
        format.panels(Mat::rows(&x[i * LONGEST * c..], c), m, c, &mut out[..m.div_ceil(F::WORD) * wide]);
    });
    let (own, cols) = cut(rows, c, f);
    let (down_parts, across) = (rows.div_ceil(own), f.div_ceil(cols));
    let (mut dx, mut dx_others) = (alloc(rows * c), alloc((across - 1) * rows * c));
    let (mut dgate, mut dgate_others) = (alloc(f * c), alloc((down_parts - 1) * f * c));
    let (mut dup, mut dup_others) = (alloc(f * c), alloc((down_parts - 1) * f * c));
    // a part holds [c, features] of one range of features after the other
    let mut ddown_parts = alloc(down_parts * f * c);

    let mut tasks = Vec::new();
    let mut dx_of: Vec<_> = parts(&mut dx, &mut dx_others).map(|part| part.chunks_mut(own * c)).collect();
    let weights =
        parts(&mut dgate, &mut dgate_others).zip(parts(&mut dup, &mut dup_others)).zip(ddown_parts.chunks_mut(f * c));
    for (part, ((dgate, dup), ddown)) in weights.enumerate() {
        let ranges = dgate.chunks_mut(cols * c).zip(dup.chunks_mut(cols * c)).zip(ddown.chunks_mut(cols * c));
        for (range, (d, dx)) in ranges.zip(&mut dx_of).enumerate() {
            tasks.push((part * own, range * cols, d, dx.next().expect("as many parts")));
        }
    }
    device.for_each(tasks, |(first, j0, ((dgate, dup), ddown), dx)| {
        let (end, mine) = (f.min(j0 + cols), f.min(j0 + cols) - j0);
        let (mut dh, mut dg, mut du) = (alloc(LONGEST * WIDE), alloc(LONGEST * LINE), alloc(LONGEST * LINE));
        let words = |a: Mat<T>, rows: usize, inner: usize| alloc(format.scratch(a, rows, inner));
        let (dys, d) = (Mat::rows(dy, c), Mat::rows(&dg, LINE));
        let (mut dy_words, mut dyt_words) = (words(dys, LONGEST, c), words(dys.t(), c, LONGEST));
        let (mut d_words, mut dt_words) = (words(d, LONGEST, WIDE), words(d.t(), WIDE, LONGEST));
        let mut h_words = alloc(if F::WORD > 1 { LONGEST.div_ceil(F::WORD) * WIDE } else { 0 });
        for (block, dx) in dx.chunks_mut(LONGEST * c).enumerate() {
            let (i0, m, add) = (first + block * LONGEST, dx.len() / c, block > 0);
            let (mw, panel) = (m.div_ceil(F::WORD), m * width);
            let right = (&x_panels[i0.div_ceil(F::WORD) * wide..], mw * width);
            let dys = Mat::rows(&dy[i0 * c..][..m * c], c);
            let left = format.left(dys, m, c, &mut dy_words);
            let left_t = format.left(dys.t(), c, m, &mut dyt_words);
            for j in (j0..end).step_by(WIDE) {
                let (n, at) = (WIDE.min(end - j), j - j0);
                let nw = n.div_ceil(F::WORD);
                let dh = &mut dh[..n.div_ceil(width) * panel];
                product(format, (m, n, cw), left, down_.from(0, j), (dh, width, panel), false);
                for (p, dh) in dh.chunks_exact_mut(panel).enumerate() {
                    let mut i = 0;
                    for dh in dh.chunks_mut(BLOCK * width) {
                        // the block of rows is kept as panels of all features
                        let from = (i0 + i) * padded + (j / width + p) * dh.len();
                        let (dg, du) = (&mut dg[i * LINE + p * width..], &mut du[i * LINE + p * width..]);
                        differentiate(width, &gates[from..][..dh.len()], &ups[from..][..dh.len()], dh, dg, du, LINE);
                        i += dh.len() / width;
                    }
                }
                // dD = dy^T h
                let h = match F::WORD {
                    1 => (&dh[..], panel),
                    _ => {
                        for (h, words) in dh.chunks_exact(panel).zip(h_words.chunks_exact_mut(mw * width)) {
                            format.panels(Mat::rows(h, width), m, width, words);
                        }
                        (&h_words[..], mw * width)
                    }
                };
                product(format, (c, n, mw), left_t, h, (&mut ddown[at..], mine, width), add);
                for (d, dw, w, more) in [(&dg, &mut *dgate, &gate_, false), (&du, &mut *dup, &up_, true)] {
                    let d = Mat::rows(d, LINE);
                    let d_t = format.left(d.t(), n, m, &mut dt_words);
                    product(format, (n, c, mw), d_t, right, (&mut dw[at * c..], c, width), add);
                    let d = format.left(d, m, n, &mut d_words);
                    product(format, (m, c, nw), d, w.from(j / F::WORD, 0), (dx, c, width), more || at > 0);
                }
            }
        }
    });
    drop(dx_of);
    sum(device, &mut dx, &dx_others);
    sum(device, &mut dgate, &dgate_others);
    sum(device, &mut dup, &dup_others);
    let mut ddown = alloc(c * f);
    device.for_chunks(&mut ddown, f, |i, row| {
        for (range, out) in row.chunks_mut(cols).enumerate() {
            let from = &ddown_parts[range * cols * c + i * out.len()..];
            out.copy_from_slice(&from[..out.len()]);
            for part in 1..down_parts {
                add_into(&from[part * f * c..], out);
            }
        }
    });
    [dx, dgate, dup, ddown]
}
