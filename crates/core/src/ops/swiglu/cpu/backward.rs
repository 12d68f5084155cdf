use super::{BACKWARD_ROWS, Extents, FEATURES, PackedWeight, ROW_BLOCK, cut, parts, sigmoid, sum};
use crate::device::cpu::kernel_f32::NR;
use crate::device::cpu::matrix::{MatRef, Panels, PanelsMut};
use crate::device::cpu::simd::{add_into, simd};
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber, Gemm};
use crate::ops::matmul::{Format, padded_stride};

/// Distance of rows of dgate and dup: 13 lines, so that a column of theirs reaches every set of the first cache.
const D_STRIDE: usize = padded_stride(FEATURES);
simd! {
    /// Turns dh of one panel into h and writes dgate and dup in rows [`D_STRIDE`] apart.
    fn differentiate<T>(width: usize, gate: &[T], up: &[T], dh: &mut [T], dgate: &mut [T], dup: &mut [T]) {
        let kept = gate.chunks_exact(width).zip(up.chunks_exact(width));
        let rows = dh.chunks_exact_mut(width).zip(dgate.chunks_mut(D_STRIDE).zip(dup.chunks_mut(D_STRIDE)));
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

/// What every task of backward reads. The weights are those of dy D, dgate G and dup U.
struct Backward<'a, T: CpuNumber, F> {
    format: &'a F,
    device: &'a CpuDevice,
    extents: Extents,
    dy: &'a [T],
    /// gate and up as they are kept
    gates: &'a [T],
    ups: &'a [T],
    /// x as the right operand of dG and dU, [`BACKWARD_ROWS`] rows after the other
    x_panels: Buffer<T>,
    gate: PackedWeight<T>,
    up: PackedWeight<T>,
    down: PackedWeight<T>,
    /// features of a task
    cols: usize,
}

/// What a task of backward writes, from row `i0` and feature `j0` on: its features of dG and dU `[features, c]` and of dD
/// `[c, features]`, and its rows of dx.
struct BackwardTask<'a, T> {
    i0: usize,
    j0: usize,
    dgate: &'a mut [T],
    dup: &'a mut [T],
    ddown: &'a mut [T],
    dx: &'a mut [T],
}

/// The rows of dy that a task works on, packed for dy D and for dy^T h.
struct RowBlock<'a, T> {
    i0: usize,
    m: usize,
    dy: MatRef<'a, T>,
    dy_t: MatRef<'a, T>,
}

/// What a task of backward computes with, for [`BACKWARD_ROWS`] rows of [`FEATURES`].
struct Scratch<T: CpuNumber> {
    /// in panels: dh, then h
    h: Buffer<T>,
    h_packed: Buffer<T>,
    /// rows [`D_STRIDE`] apart
    dgate: Buffer<T>,
    dup: Buffer<T>,
    d_packed: Buffer<T>,
    d_t_packed: Buffer<T>,
}

impl<T: CpuNumber> Scratch<T> {
    fn new<F: Format<T>>(device: &CpuDevice, format: &F) -> Self {
        let alloc = |n: usize| device.alloc::<T>(n);
        let dgate = alloc(BACKWARD_ROWS * D_STRIDE);
        let d = MatRef::rows(&dgate, D_STRIDE);
        Scratch {
            h: alloc(BACKWARD_ROWS * FEATURES),
            h_packed: alloc(if F::PACK > 1 { BACKWARD_ROWS.div_ceil(F::PACK) * FEATURES } else { 0 }),
            d_packed: alloc(format.a_scratch(d, BACKWARD_ROWS, FEATURES)),
            d_t_packed: alloc(format.a_scratch(d.t(), FEATURES, BACKWARD_ROWS)),
            dup: alloc(BACKWARD_ROWS * D_STRIDE),
            dgate,
        }
    }
}

impl<T: CpuNumber, F: Format<T>> Backward<'_, T, F> {
    fn run(&self, mut task: BackwardTask<T>) {
        let (format, (_, c, f)) = (self.format, self.extents);
        let mut scratch = Scratch::new(self.device, format);
        let all = MatRef::rows(self.dy, c);
        let mut dy_scratch = self.device.alloc::<T>(format.a_scratch(all, BACKWARD_ROWS, c));
        let mut dy_t_scratch = self.device.alloc::<T>(format.a_scratch(all.t(), c, BACKWARD_ROWS));
        let end = f.min(task.j0 + self.cols);
        for (block, dx) in std::mem::take(&mut task.dx).chunks_mut(BACKWARD_ROWS * c).enumerate() {
            let (i0, m) = (task.i0 + block * BACKWARD_ROWS, dx.len() / c);
            let dy = MatRef::rows(&self.dy[i0 * c..][..m * c], c);
            let rows = RowBlock {
                i0,
                m,
                dy: format.pack_a(dy, m, c, &mut dy_scratch),
                dy_t: format.pack_a(dy.t(), c, m, &mut dy_t_scratch),
            };
            for j in (task.j0..end).step_by(FEATURES) {
                self.features(&rows, (j, FEATURES.min(end - j)), &mut task, dx, &mut scratch);
            }
        }
    }

    /// Everything that the rows and the `n` features from `j` on contribute.
    fn features(
        &self,
        rows: &RowBlock<T>,
        (j, n): (usize, usize),
        task: &mut BackwardTask<T>,
        dx: &mut [T],
        scratch: &mut Scratch<T>,
    ) {
        let (format, (_, c, f), width) = (self.format, self.extents, self.format.panel_width());
        let (m, mp, panel) = (rows.m, rows.m.div_ceil(F::PACK), rows.m * width);
        let (first_rows, first_features) = (rows.i0 == task.i0, j == task.j0);
        let (at, own) = (j - task.j0, f.min(task.j0 + self.cols) - task.j0);
        let Scratch { h, h_packed, dgate, dup, d_packed, d_t_packed } = scratch;
        let h = &mut h[..n.div_ceil(width) * panel];
        let dh = PanelsMut { data: &mut *h, row_stride: width, panel_stride: panel };
        Gemm::new(m, n, c.div_ceil(F::PACK)).run_packed(format, rows.dy, self.down.from(0, j), dh);
        self.differentiate(rows, j, h, dgate, dup);
        // dD = dy^T h
        let h = if F::PACK == 1 {
            Panels { data: &*h, stride: panel }
        } else {
            for (h, packed) in h.chunks_exact(panel).zip(h_packed.chunks_exact_mut(mp * width)) {
                format.pack_b(MatRef::rows(h, width), m, width, packed);
            }
            Panels { data: h_packed, stride: mp * width }
        };
        let ddown = PanelsMut { data: &mut task.ddown[at..], row_stride: own, panel_stride: width };
        let of_rows = Accumulate::existing_if(!first_rows);
        Gemm { m: c, n, k: mp, accumulate: of_rows }.run_packed(format, rows.dy_t, h, ddown);
        // dG = dgate^T x and dx = dgate G, then the same of up
        let x_stride = c.next_multiple_of(width);
        let x = Panels { data: &self.x_panels[rows.i0.div_ceil(F::PACK) * x_stride..], stride: mp * width };
        for (d, dw, weight, is_first) in
            [(&*dgate, &mut *task.dgate, &self.gate, true), (&*dup, &mut *task.dup, &self.up, false)]
        {
            let d = MatRef::rows(d, D_STRIDE);
            let d_t = format.pack_a(d.t(), n, m, d_t_packed);
            let dw = PanelsMut { data: &mut dw[at * c..], row_stride: c, panel_stride: width };
            Gemm { m: n, n: c, k: mp, accumulate: of_rows }.run_packed(format, d_t, x, dw);
            let d = format.pack_a(d, m, n, d_packed);
            let dx = PanelsMut { data: &mut *dx, row_stride: c, panel_stride: width };
            let accumulate = Accumulate::existing_if(!is_first || !first_features);
            let size = Gemm { m, n: c, k: n.div_ceil(F::PACK), accumulate };
            size.run_packed(format, d, weight.from(j / F::PACK, 0), dx);
        }
    }

    /// Turns panels of dh, from feature `j` on, into h, and writes dgate and dup.
    fn differentiate(&self, rows: &RowBlock<T>, j: usize, h: &mut [T], dgate: &mut [T], dup: &mut [T]) {
        let (width, padded) = (self.format.panel_width(), self.extents.2.next_multiple_of(NR));
        for (p, h) in h.chunks_exact_mut(rows.m * width).enumerate() {
            let mut i = 0;
            for h in h.chunks_mut(ROW_BLOCK * width) {
                // the block of rows is kept as panels of all features
                let from = (rows.i0 + i) * padded + (j / width + p) * h.len();
                let (gate, up) = (&self.gates[from..][..h.len()], &self.ups[from..][..h.len()]);
                let at = i * D_STRIDE + p * width;
                differentiate(width, gate, up, h, &mut dgate[at..], &mut dup[at..]);
                i += h.len() / width;
            }
        }
    }
}

/// x as the right operand of dG and dU, for all ranges of features: panels of [`BACKWARD_ROWS`] rows after the other.
fn pack_x<T: CpuNumber, F: Format<T>>(device: &CpuDevice, format: &F, x: &[T], (rows, c, _): Extents) -> Buffer<T> {
    let (wide, rows_packed) = (c.next_multiple_of(format.panel_width()), BACKWARD_ROWS.div_ceil(F::PACK));
    let mut panels = device.alloc::<T>(rows.div_ceil(BACKWARD_ROWS) * rows_packed * wide);
    device.for_pieces(&mut panels, rows_packed * wide, |i, out| {
        let m = BACKWARD_ROWS.min(rows - i * BACKWARD_ROWS);
        let x = MatRef::rows(&x[i * BACKWARD_ROWS * c..], c);
        format.pack_b(x, m, c, &mut out[..m.div_ceil(F::PACK) * wide]);
    });
    panels
}

/// dD `[c, f]` from its parts, in each `[c, features]` of one range of `cols` features after the other.
fn join_ddown<T: CpuNumber>(device: &CpuDevice, parts: &[T], (_, c, f): Extents, cols: usize) -> Buffer<T> {
    let mut ddown = device.alloc::<T>(c * f);
    device.for_pieces(&mut ddown, f, |i, row| {
        for (range, out) in row.chunks_mut(cols).enumerate() {
            let from = &parts[range * cols * c + i * out.len()..];
            out.copy_from_slice(&from[..out.len()]);
            for part in 1..parts.len() / (f * c) {
                add_into(&from[part * f * c..], out);
            }
        }
    });
    ddown
}

/// Gradients of x, gate, up and down.
pub fn backward<T: CpuNumber, F: Format<T>>(
    format: &F,
    device: &CpuDevice,
    extents: Extents,
    dy: &[T],
    x: &[T],
    [gate, up, down]: [&[T]; 3],
    [gates, ups]: [&[T]; 2],
) -> [Buffer<T>; 4] {
    let (rows, c, f) = extents;
    let (own, cols) = cut(rows, c, f);
    let backward = Backward {
        down: PackedWeight::new(device, format, MatRef::rows(down, f), c, f),
        gate: PackedWeight::new(device, format, MatRef::rows(gate, c), f, c),
        up: PackedWeight::new(device, format, MatRef::rows(up, c), f, c),
        x_panels: pack_x(device, format, x, extents),
        format,
        device,
        extents,
        dy,
        gates,
        ups,
        cols,
    };
    let (row_parts, across, alloc) = (rows.div_ceil(own), f.div_ceil(cols), |n: usize| device.alloc::<T>(n));
    let (mut dx, mut dx_others) = (alloc(rows * c), alloc((across - 1) * rows * c));
    let (mut dgate, mut dgate_others) = (alloc(f * c), alloc((row_parts - 1) * f * c));
    let (mut dup, mut dup_others) = (alloc(f * c), alloc((row_parts - 1) * f * c));
    let mut ddown_parts = alloc(row_parts * f * c);

    let mut tasks = Vec::new();
    let mut dx_of: Vec<_> = parts(&mut dx, &mut dx_others).map(|part| part.chunks_mut(own * c)).collect();
    let weights =
        parts(&mut dgate, &mut dgate_others).zip(parts(&mut dup, &mut dup_others)).zip(ddown_parts.chunks_mut(f * c));
    for (part, ((dgate, dup), ddown)) in weights.enumerate() {
        let ranges = dgate.chunks_mut(cols * c).zip(dup.chunks_mut(cols * c)).zip(ddown.chunks_mut(cols * c));
        for (range, (((dgate, dup), ddown), dx)) in ranges.zip(&mut dx_of).enumerate() {
            let dx = dx.next().expect("as many parts");
            tasks.push(BackwardTask { i0: part * own, j0: range * cols, dgate, dup, ddown, dx });
        }
    }
    device.for_each(tasks, |task| backward.run(task));
    drop(dx_of);
    sum(device, &mut dx, &dx_others);
    sum(device, &mut dgate, &dgate_others);
    sum(device, &mut dup, &dup_others);
    let ddown = join_ddown(device, &ddown_parts, extents, cols);
    [dx, dgate, dup, ddown]
}
