use super::{Extents, FEATURES, PackedWeight, ROW_BLOCK, features, parts, sigmoid, sum};
use crate::device::cpu::kernel_f32::NR;
use crate::device::cpu::matrix::{MatRef, PanelsMut};
use crate::device::cpu::simd::{add_into, simd};
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber, Gemm};
use crate::ops::matmul::Format;

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

/// What every task of forward reads. The weights are those of x G^T, x U^T and h D^T.
struct Forward<'a, T: CpuNumber, F> {
    format: &'a F,
    device: &'a CpuDevice,
    extents: Extents,
    x: &'a [T],
    residual: Option<&'a [T]>,
    gate_t: PackedWeight<T>,
    up_t: PackedWeight<T>,
    down_t: PackedWeight<T>,
    /// features of a task
    cols: usize,
}

/// What a task of forward writes, from row `i0` and feature `j0` on.
struct ForwardTask<'a, T> {
    i0: usize,
    j0: usize,
    gate: &'a mut [T],
    up: &'a mut [T],
    y: &'a mut [T],
}

impl<T: CpuNumber, F: Format<T>> Forward<'_, T, F> {
    fn run(&self, task: ForwardTask<T>) {
        let (format, (_, c, f), width) = (self.format, self.extents, self.format.panel_width());
        let ForwardTask { i0, j0, gate, up, y } = task;
        let (m, end, cp) = (y.len() / c, f.min(j0 + self.cols), c.div_ceil(F::PACK));
        let mut h = self.device.alloc::<T>(m * FEATURES);
        let x = MatRef::rows(&self.x[i0 * c..], c);
        let mut x_scratch = self.device.alloc::<T>(format.a_scratch(x, m, c));
        let mut h_scratch = self.device.alloc::<T>(format.a_scratch(MatRef::rows(&h, FEATURES), m, FEATURES));
        let x = format.pack_a(x, m, c, &mut x_scratch);
        let panel = m * width;
        for j in (j0..end).step_by(FEATURES) {
            let n = FEATURES.min(end - j);
            let at = (j - j0) / width * panel..((j - j0) / width + n.div_ceil(width)) * panel;
            for (weight, out) in [(&self.gate_t, &mut *gate), (&self.up_t, &mut *up)] {
                let out = PanelsMut { data: &mut out[at.clone()], row_stride: width, panel_stride: panel };
                Gemm::new(m, n, cp).run_packed(format, x, weight.from(0, j), out);
            }
            for (p, (gate, up)) in gate[at.clone()].chunks_exact(panel).zip(up[at].chunks_exact(panel)).enumerate() {
                activate(width, gate, up, &mut h[p * width..], FEATURES);
            }
            let h = format.pack_a(MatRef::rows(&h, FEATURES), m, n, &mut h_scratch);
            let size = Gemm { m, n: c, k: n.div_ceil(F::PACK), accumulate: Accumulate::existing_if(j > j0) };
            let y = PanelsMut { data: &mut *y, row_stride: c, panel_stride: width };
            size.run_packed(format, h, self.down_t.from(j / F::PACK, 0), y);
        }
        if let (Some(residual), 0) = (self.residual, j0) {
            add_into(&residual[i0 * c..], y);
        }
    }
}

/// y `[rows, c]`, and gate and up as they are kept.
pub fn forward<T: CpuNumber, F: Format<T>>(
    format: &F,
    device: &CpuDevice,
    extents: Extents,
    x: &[T],
    [gate, up, down]: [&[T]; 3],
    residual: Option<&[T]>,
) -> (Buffer<T>, Buffer<T>, Buffer<T>) {
    let (rows, c, f) = extents;
    let (padded, cols) = (f.next_multiple_of(NR), features(f, rows.div_ceil(ROW_BLOCK)));
    let forward = Forward {
        gate_t: PackedWeight::new(device, format, MatRef::rows(gate, c).t(), c, f),
        up_t: PackedWeight::new(device, format, MatRef::rows(up, c).t(), c, f),
        down_t: PackedWeight::new(device, format, MatRef::rows(down, f).t(), f, c),
        format,
        device,
        extents,
        x,
        residual,
        cols,
    };
    let mut y = device.alloc::<T>(rows * c);
    let mut others = device.alloc::<T>((f.div_ceil(cols) - 1) * rows * c);
    let (mut gates, mut ups) = (device.alloc::<T>(rows * padded), device.alloc::<T>(rows * padded));

    let mut y_of: Vec<_> = parts(&mut y, &mut others).map(|part| part.chunks_mut(ROW_BLOCK * c)).collect();
    let mut tasks = Vec::new();
    let blocks = gates.chunks_mut(ROW_BLOCK * padded).zip(ups.chunks_mut(ROW_BLOCK * padded));
    for (block, (gates, ups)) in blocks.enumerate() {
        let own = gates.len() / padded * cols;
        let pieces = gates.chunks_mut(own).zip(ups.chunks_mut(own)).zip(&mut y_of);
        for (range, ((gate, up), y)) in pieces.enumerate() {
            let y = y.next().expect("as many blocks");
            tasks.push(ForwardTask { i0: block * ROW_BLOCK, j0: range * cols, gate, up, y });
        }
    }
    device.for_each(tasks, |task| forward.run(task));
    drop(y_of);
    sum(device, &mut y, &others);
    (y, gates, ups)
}
