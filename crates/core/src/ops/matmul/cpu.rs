//! Large products: B is packed once into panels as wide as the register kernel, then tasks own blocks of C.
//!
//! A panel is [k, 32] contiguous, so the kernel reads B in order and never past a page it knows. Rows of A are read in
//! place: the kernel broadcasts its elements, so eight sequential streams are all it needs. A transposed A (the weight
//! gradient) is copied per task into [k, rows] first, where the rows of a register block are neighbours.
//!
//! C is cut by shape alone, and each element is one chain of multiply-adds over k in order: the bits do not depend on the
//! number of threads.

use crate::device::CpuDevice;
use crate::device::kernel::{Block, COLS, ROWS};
use crate::device::simd::{self, simd};
use crate::device::tile::{self, Mat};
use crate::storage::{Compute, Real};

/// Inner length of a pass over C: a panel piece of 256 x 32 f32 is 32 KiB, the L1 cache, and re-reading C costs 3 %.
const DEPTH: usize = 256;
/// Tasks to cut C into.
const TASKS: usize = 16;
/// Rows of C a task owns at most; with DEPTH columns of A they fill a quarter of a 1 MiB L2.
const MAX_ROWS: usize = 256;

/// C, shared by tasks that write disjoint blocks of it.
pub(super) struct Out<T>(*mut T);
// SAFETY: each task writes its own block of C, and no block overlaps another.
unsafe impl<T: Send> Send for Out<T> {}
// SAFETY: as above; the pointer itself is only read.
unsafe impl<T: Send> Sync for Out<T> {}

impl<T> Out<T> {
    pub(super) fn new(c: &mut [T]) -> Self {
        Out(c.as_mut_ptr())
    }

    pub(super) fn at(&self, offset: usize) -> *mut T {
        // SAFETY: callers pass offsets inside the slice that the pointer was taken from.
        unsafe { self.0.add(offset) }
    }
}

/// Rows and columns of a task's block: multiples of the register block, rows cut first.
pub(super) fn cut(m: usize, n: usize) -> (usize, usize) {
    let rows = m.div_ceil(TASKS).next_multiple_of(ROWS).clamp(ROWS.min(m), MAX_ROWS);
    let down = m.div_ceil(rows);
    let across = (TASKS / down).clamp(1, n.div_ceil(2 * COLS));
    (rows, n.div_ceil(across).next_multiple_of(COLS))
}

simd! {
    /// One panel of B: columns `first..first + 32` (zero past n) of every row, as [k, 32].
    fn pack_panel<T>(b: Mat<T>, k: usize, first: usize, n: usize, out: &mut [T]) {
        let cols = COLS.min(n - first);
        if b.col == 1 {
            for (p, out) in out.chunks_exact_mut(COLS).enumerate().take(k) {
                let row = &b.data[p * b.row + first..][..cols];
                out[..cols].copy_from_slice(row);
                out[cols..].fill(T::ZERO);
            }
            return;
        }
        // Transposed: 16 inner indices at a time, so that each source line is read once.
        for p0 in (0..k).step_by(16) {
            let depth = 16.min(k - p0);
            for j in 0..COLS {
                for p in p0..p0 + depth {
                    out[p * COLS + j] = if j < cols { b.data[p * b.row + (first + j) * b.col] } else { T::ZERO };
                }
            }
        }
    }
}

/// `c = a b` or `c += a b`: a [m, k], b [k, n] with any strides, c [m, n] row-major. `compute` says how operands are
/// rounded; without a kernel for it (another processor, f64) the product runs in full precision.
pub(crate) fn gemm<T: Real>(
    device: &CpuDevice,
    compute: Compute,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    b: Mat<T>,
    c: &mut [T],
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !add {
            c[..m * n].fill(T::ZERO);
        }
        return;
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "a holds [{m}, {k}]");
    assert!(b.data.len() > (k - 1) * b.row + (n - 1) * b.col, "b holds [{k}, {n}]");
    assert!(c.len() >= m * n, "c holds [{m}, {n}]");
    let straight = |x: Mat<T>| x.row == 1 || x.col == 1;
    if compute == Compute::Bf16 && straight(a) && straight(b) && T::gemm_bf16(device, (m, n, k), a, b, c, add) {
        return;
    }
    let panels = n.div_ceil(COLS);
    let mut packed = device.alloc::<T>(panels * k * COLS);
    device.for_chunks(&mut packed, k * COLS, |j, out| pack_panel(b, k, j * COLS, n, out));
    let (rows, cols) = if m * n * k < 1 << 15 { (m, n.next_multiple_of(COLS)) } else { cut(m, n) };
    let across = n.div_ceil(cols);
    let tasks = m.div_ceil(rows) * across;
    let out = Out::new(c);
    let task = |task: usize| {
        let (i0, j0) = (task / across * rows, task % across * cols);
        let (rows, cols) = (rows.min(m - i0), cols.min(n - j0));
        let mut copy = device.alloc::<T>(if a.col == 1 { 0 } else { DEPTH.min(k) * rows });
        for p0 in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - p0);
            let left = if a.col == 1 {
                Mat { data: &a.data[i0 * a.row + p0..], ..a }
            } else {
                for (p, out) in copy.chunks_exact_mut(rows).enumerate().take(depth) {
                    let from = &a.data[(p0 + p) * a.col + i0 * a.row..];
                    if a.row == 1 {
                        out.copy_from_slice(&from[..rows]);
                    } else {
                        out.iter_mut().enumerate().for_each(|(i, x)| *x = from[i * a.row]);
                    }
                }
                Mat { data: &copy[..], row: 1, col: rows }
            };
            for j in (j0..j0 + cols).step_by(COLS) {
                let panel = &packed[(j / COLS * k + p0) * COLS..][..depth * COLS];
                let width = COLS.min(j0 + cols - j);
                for i in (0..rows).step_by(ROWS) {
                    let block = Block {
                        a: left.data[i * left.row..].as_ptr(),
                        row: left.row,
                        col: left.col,
                        b: panel.as_ptr(),
                        ldb: COLS,
                        c: out.at((i0 + i) * n + j),
                        ldc: n,
                        add: add || p0 > 0,
                    };
                    let height = ROWS.min(rows - i);
                    // SAFETY: the asserts above bound A and C; `copy` and the panel hold `depth` rows; blocks of C are
                    // disjoint and C is borrowed mutably, so it aliases neither operand.
                    let done = unsafe { T::kernel(simd::level(), height, width, depth, block) };
                    if !done {
                        let left = Mat { data: &left.data[i * left.row..], ..left };
                        for r in 0..height {
                            let left = Mat { data: &left.data[r * left.row..], ..left };
                            // SAFETY: row i + r of the task's own block of C; see above.
                            let c = unsafe { std::slice::from_raw_parts_mut(out.at((i0 + i + r) * n + j), width) };
                            tile::gemm(1, width, depth, left, panel, COLS, c, width, block.add);
                        }
                    }
                }
            }
        }
    };
    if tasks == 1 {
        task(0);
    } else {
        device.map(tasks, task);
    }
}

/// The bf16 product where this processor has it; false elsewhere. Extents and operands have been checked.
#[cfg(target_arch = "x86_64")]
pub(crate) fn gemm_bf16(
    device: &CpuDevice,
    sizes: (usize, usize, usize),
    a: Mat<f32>,
    b: Mat<f32>,
    c: &mut [f32],
    add: bool,
) -> bool {
    let can = crate::device::kernel::has_bf16(simd::level());
    if can {
        // SAFETY: just asked; `gemm` has checked the extents.
        unsafe { super::bf16::gemm(device, sizes, a, b, c, add) };
    }
    can
}
