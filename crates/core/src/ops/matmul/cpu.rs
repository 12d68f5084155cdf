//! Large products: B is packed once into panels as wide as the register kernel, then tasks own blocks of C.
//!
//! A panel is [k, 32] contiguous, [k, 16] on AVX2, so the kernel reads B in order and never past a page it knows. A is read
//! in place: the kernel broadcasts its elements, so eight sequential streams are all it needs, or, where A is transposed (the
//! weight gradient), half a cache line a step.
//!
//! Where C has too few blocks for the threads, which is the weight gradient again (few outputs, thousands of tokens), the
//! inner axis is cut too: the first part is C, every other a C of its own, and they are added in order. Every cut follows
//! from the shape alone, so the bits do not depend on the number of threads.

use super::bf16::Bf16Format;
use super::few;
use super::format::{Format, FullFormat, RawPanels, run_panels};
use crate::device::cpu::kernel_f32::{MR, NR};
use crate::device::cpu::level::{Level, level};
use crate::device::cpu::matrix::{MatMut, MatRef, Panels};
use crate::device::cpu::simd::add_into;
use crate::device::{Accumulate, Buffer, CpuDevice, CpuNumber, Gemm, Shared};
use crate::number::Compute;
use crate::tensor::ELEMENTWISE;

/// Packed numbers of the inner axis in one pass over C at most, and in a part of it at least.
const KC: usize = 256;

/// Packed numbers of the inner axis in one pass over C. A panel piece of 256 x 32 f32 is 32 KiB, the L1 cache, and re-reading C
/// costs 3 %. On AVX2 it is half of that, but every step of a transposed A is a line of its own: 256 of them and the panel's 256
/// are all 512 lines of the cache, and shorter passes make a feed-forward layer 4 % faster. The sums are the same.
pub(super) fn k_per_pass<T>(a: MatRef<T>) -> usize {
    if level() == Level::Avx2 && a.col_stride != 1 { KC / 2 } else { KC }
}

/// Rows of C a task owns at most, and columns at least while the inner axis can be cut instead; 256 rows with KC columns of A fill
/// a quarter of a 1 MiB L2.
pub(super) const MC: usize = 256;
/// Tasks to cut a product into at least.
const MIN_TASKS: usize = 16;
/// Rows and columns below which a block is cut no further: packing would cost more than it feeds.
const MIN_BLOCK: (usize, usize) = (32, 64);
/// Multiply-adds below which one task does it all.
const ONE_TASK: usize = 1 << 15;

/// A task's block of C and its part of the inner axis, in packed numbers.
#[derive(Debug, PartialEq, Clone, Copy)]
struct Partition {
    rows: usize,
    cols: usize,
    depth: usize,
}

fn partition(m: usize, n: usize, kp: usize) -> Partition {
    let even = |n: usize, pieces: usize, unit: usize| n.div_ceil(pieces).next_multiple_of(unit);
    let (mut rows, mut cols) = (even(m, m.div_ceil(MC), MR), n.next_multiple_of(NR));
    if m * n * kp < ONE_TASK {
        return Partition { rows: m, cols, depth: kp };
    }
    let missing = MIN_TASKS.div_ceil(m.div_ceil(rows));
    cols = even(n, missing.clamp(1, n.div_ceil(MC)), NR);
    let blocks = |rows: usize, cols: usize| m.div_ceil(rows) * n.div_ceil(cols);
    let parts = MIN_TASKS.div_ceil(blocks(rows, cols)).clamp(1, (kp / KC).max(1));
    while blocks(rows, cols) * parts < MIN_TASKS && (rows > MIN_BLOCK.0 || cols > MIN_BLOCK.1) {
        if rows > MIN_BLOCK.0 && (rows >= cols || cols <= MIN_BLOCK.1) {
            rows = even(rows, 2, MR);
        } else {
            cols = even(cols, 2, NR);
        }
    }
    // where tasks share the panels of B, smaller blocks pack nothing twice, and a thread waits for half as long a task
    if parts == 1 && rows > MC / 2 {
        rows = even(rows, 2, MR);
    }
    Partition { rows, cols, depth: kp.div_ceil(parts) }
}

/// All of B [k, n] as panels, packed by all threads.
pub(crate) fn pack<T: CpuNumber, F: Format<T>>(
    device: &CpuDevice,
    format: &F,
    b: MatRef<T>,
    k: usize,
    n: usize,
) -> Buffer<T> {
    let width = format.panel_width();
    let panel = k.div_ceil(F::PACK) * width;
    let mut panels = device.alloc::<T>(n.div_ceil(width) * panel);
    device.for_pieces(&mut panels, panel, |i, out| format.pack_b(b.from(0, i * width), k, n - i * width, out));
    panels
}

/// A large product while it is computed.
struct Product<'a, T: CpuNumber, F> {
    device: &'a CpuDevice,
    format: &'a F,
    size: Gemm<Accumulate<&'a [T]>>,
    a: MatRef<'a, T>,
    b: MatRef<'a, T>,
    /// inner extent in packed numbers
    kp: usize,
    cut: Partition,
    /// Parts of the inner axis.
    parts: usize,
    /// Panels for all tasks, unless a task is alone with its part of B or nearly so: then it packs what it needs into its
    /// cache, and B is read once instead of read, written and read.
    shared_b: Option<Buffer<T>>,
}

impl<'a, T: CpuNumber, F: Format<T>> Product<'a, T, F> {
    fn new(
        device: &'a CpuDevice,
        format: &'a F,
        size: Gemm<Accumulate<&'a [T]>>,
        a: MatRef<'a, T>,
        b: MatRef<'a, T>,
    ) -> Self {
        let kp = size.k.div_ceil(F::PACK);
        let cut = partition(size.m, size.n, kp);
        let parts = kp.div_ceil(cut.depth);
        let shared_b = (parts == 1).then(|| pack(device, format, b, size.k, size.n));
        Product { device, format, size, a, b, kp, cut, parts, shared_b }
    }

    fn run(&self, c: MatMut<T>) {
        let Gemm { m, n, .. } = self.size;
        let blocks = m.div_ceil(self.cut.rows) * n.div_ceil(self.cut.cols);
        // the first part is C itself
        let mut partial = self.device.alloc::<T>((self.parts - 1) * m * n);
        let (first, others) = (Shared::new(&mut *c.data), Shared::new(&mut partial));
        self.device.run(blocks * self.parts, &|task| self.task(task, (&first, c.row_stride), &others));
        if self.parts > 1 {
            self.add_parts(c, &partial);
        }
    }

    /// One part of one block of C: of the first part in C itself, `ldc` apart, of the others in `partial` `[parts - 1, m, n]`.
    fn task(&self, task: usize, (c, ldc): (&Shared<T>, usize), partial: &Shared<T>) {
        let (Gemm { m, n, k, accumulate }, Partition { rows, cols, depth }) = (self.size, self.cut);
        let (down, across) = (m.div_ceil(rows), n.div_ceil(cols));
        let (part, i0, j0) = (task / (down * across), task / across % down * rows, task % across * cols);
        let (rows, cols, end) = (rows.min(m - i0), cols.min(n - j0), self.kp.min((part + 1) * depth));
        let (first, row_stride) = match part {
            0 => (c.at(i0 * ldc + j0), ldc),
            _ => (partial.at(((part - 1) * m + i0) * n + j0), n),
        };
        let width = self.format.panel_width();
        let (wide, pass) = (cols.next_multiple_of(width), k_per_pass(self.a).min(depth));
        let mut a_scratch = self.device.alloc::<T>(self.format.a_scratch(self.a, rows, pass * F::PACK));
        let mut own_b = self.device.alloc::<T>(if self.parts == 1 { 0 } else { wide * pass });
        for p in (part * depth..end).step_by(pass) {
            let here = pass.min(end - p);
            let (p0, k) = (p * F::PACK, (here * F::PACK).min(k - p * F::PACK));
            let a = self.format.pack_a(self.a.from(i0, p0), rows, k, &mut a_scratch);
            let panels = match &self.shared_b {
                Some(shared) => Panels { data: &shared[j0 * self.kp + p * width..], stride: self.kp * width },
                None => {
                    self.format.pack_b(self.b.from(p0, j0), k, n - j0, &mut own_b[..wide * here]);
                    Panels { data: &own_b, stride: here * width }
                }
            };
            let begun = (accumulate.adds() && part == 0) || p > part * depth;
            let size = Gemm { m: rows, n: cols, k: here, accumulate: Accumulate::existing_if(begun) };
            let block = RawPanels { c: first, row_stride, panel_stride: width };
            // SAFETY: `a` and the panels hold `here` packed numbers of every row and column; C, or the parts, hold m rows
            // each, no two tasks share a block of them, and they are borrowed mutably.
            unsafe { run_panels(self.format, size, a, panels, block) };
        }
        if let (Accumulate::Residual(residual), 1) = (accumulate, self.parts) {
            for i in i0..i0 + rows {
                // SAFETY: `cols` elements from column j0 of a row that this task owns.
                let c = unsafe { c.piece(i * ldc + j0, cols) };
                add_into(&residual[i * n + j0..], c);
            }
        }
    }

    /// Adds the other parts, and the residual, to the first.
    fn add_parts(&self, c: MatMut<T>, partial: &[T]) {
        let (Gemm { m, n, accumulate, .. }, ldc) = (self.size, c.row_stride);
        let rows = (ELEMENTWISE / n).max(1);
        self.device.for_pieces(&mut c.data[..(m - 1) * ldc + n], rows * ldc, |i, c| {
            for (row, c) in c.chunks_mut(ldc).enumerate() {
                for part in 0..self.parts - 1 {
                    add_into(&partial[(part * m + i * rows + row) * n..][..n], c);
                }
                if let Accumulate::Residual(residual) = accumulate {
                    add_into(&residual[(i * rows + row) * n..][..n], c);
                }
            }
        });
    }
}

/// A large product on all threads: a [m, k] with any strides, b [k, n] or its transpose with contiguous rows, c [m, n] with
/// contiguous rows. `compute` says how operands are rounded; without a kernel for it (another processor, f64) the product runs in
/// full precision.
pub(crate) fn gemm<T: CpuNumber>(
    device: &CpuDevice,
    compute: Compute,
    size: Gemm<Accumulate<&[T]>>,
    a: MatRef<T>,
    b: MatRef<T>,
    c: MatMut<T>,
) {
    let Gemm { m, n, k, accumulate } = size;
    if m == 0 || n == 0 {
        return;
    }
    assert!(c.row_stride >= n, "rows of {n}, {} apart", c.row_stride);
    c.assert_holds("c", m, n);
    if k == 0 {
        for (i, row) in c.data.chunks_mut(c.row_stride).take(m).enumerate() {
            match accumulate {
                Accumulate::Overwrite => row[..n].fill(T::ZERO),
                Accumulate::Existing => {}
                Accumulate::Residual(residual) => row[..n].copy_from_slice(&residual[i * n..][..n]),
            }
        }
        return;
    }
    a.assert_holds("a", m, k);
    b.assert_holds("b", k, n);
    assert!(b.has_unit_stride(), "the elements of b are neighbours along rows or columns");
    if let Some(kernels) = compute.bf16_kernels::<T>()
        && a.has_unit_stride()
    {
        let zeros = device.zeros::<T>(m.max(n));
        return Product::new(device, &Bf16Format { kernels, zeros: &zeros }, size, a, b).run(c);
    }
    if few::takes(m, a, b) {
        return few::product(device, size, a, b, c);
    }
    Product::new(device, &FullFormat, size, a, b).run(c);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_products_have_enough_tasks_and_parts_of_whole_passes() {
        for m in [1, 8, 64, 256, 688, 1000, 4096] {
            for n in [1, 32, 64, 256, 688, 4096] {
                for k in [1, 64, 256, 1024, 4096] {
                    let Partition { rows, cols, depth } = partition(m, n, k);
                    assert!(rows > 0 && cols.is_multiple_of(NR) && (1..=k).contains(&depth), "{m} {n} {k}");
                    let parts = k.div_ceil(depth);
                    assert!(parts == 1 || depth >= KC, "{m} {n} {k}: parts of {depth}");
                    let tasks = m.div_ceil(rows) * n.div_ceil(cols) * parts;
                    let smallest = rows <= MIN_BLOCK.0 && cols <= MIN_BLOCK.1;
                    // rounding up to the register block may leave fewer tasks than asked for, but not half
                    assert!(tasks > MIN_TASKS / 2 || smallest || m * n * k < ONE_TASK, "{m} {n} {k}: {tasks} tasks");
                }
            }
        }
    }
}
