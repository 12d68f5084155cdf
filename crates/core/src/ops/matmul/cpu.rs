//! Large products: B is packed once into panels as wide as the register kernel, then tasks own blocks of C.
//!
//! A panel is [k, 32] contiguous, so the kernel reads B in order and never past a page it knows. A is read in place: the
//! kernel broadcasts its elements, so eight sequential streams are all it needs, or, where A is transposed (the weight
//! gradient), half a cache line a step.
//!
//! Where C has too few blocks for the threads, which is the weight gradient again (few outputs, thousands of tokens), the
//! inner axis is cut too: the first part is C, every other a C of its own, and they are added in order. Every cut follows
//! from the shape alone, so the bits do not depend on the number of threads.

use super::bf16::Pairs;
use crate::device::kernel::{Block, COLS, ROWS};
use crate::device::simd::{self, add_into, simd};
use crate::device::tile::{self, Mat};
use crate::device::{CpuDevice, Shared};
use crate::storage::{Compute, Real};
use crate::tensor::ELEMENTWISE;

/// Words of the inner axis in one pass over C: a panel piece of 256 x 32 f32 is 32 KiB, the L1 cache, and re-reading C
/// costs 3 %. A part of the inner axis has at least as many.
const DEPTH: usize = 256;
/// Tasks to cut a product into at least.
const TASKS: usize = 16;
/// Rows of C a task owns at most, and columns at least while the inner axis can be cut instead; 256 rows with DEPTH
/// columns of A fill a quarter of a 1 MiB L2.
const BLOCK: usize = 256;
/// Rows and columns below which a block is cut no further: packing would cost more than it feeds.
const SMALLEST: (usize, usize) = (32, 64);
/// Multiply-adds below which one task does it all.
const ALONE: usize = 1 << 15;

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Onto<'a, T> {
    Nothing,
    /// What C holds.
    Itself,
    /// `[m, n]`, added to the finished sums while they are in cache.
    Rows(&'a [T]),
}

/// A task's block of C and its part of the inner axis.
#[derive(Debug, PartialEq)]
struct Cut {
    rows: usize,
    cols: usize,
    depth: usize,
}

fn cut(m: usize, n: usize, k: usize) -> Cut {
    let even = |n: usize, pieces: usize, unit: usize| n.div_ceil(pieces).next_multiple_of(unit);
    let (mut rows, mut cols) = (even(m, m.div_ceil(BLOCK), ROWS), n.next_multiple_of(COLS));
    if m * n * k < ALONE {
        return Cut { rows: m, cols, depth: k };
    }
    let missing = TASKS.div_ceil(m.div_ceil(rows));
    cols = even(n, missing.clamp(1, n.div_ceil(BLOCK)), COLS);
    let blocks = |rows: usize, cols: usize| m.div_ceil(rows) * n.div_ceil(cols);
    let parts = TASKS.div_ceil(blocks(rows, cols)).clamp(1, (k / DEPTH).max(1));
    while blocks(rows, cols) * parts < TASKS && (rows > SMALLEST.0 || cols > SMALLEST.1) {
        if rows > SMALLEST.0 && (rows >= cols || cols <= SMALLEST.1) {
            rows = even(rows, 2, ROWS);
        } else {
            cols = even(cols, 2, COLS);
        }
    }
    // where tasks share the panels of B, smaller blocks pack nothing twice, and a thread waits for half as long a task
    if parts == 1 && rows > BLOCK / 2 {
        rows = even(rows, 2, ROWS);
    }
    Cut { rows, cols, depth: k.div_ceil(parts) }
}

/// Operands in the words that a register kernel multiplies: elements, or bf16 pairs of neighbours along k.
pub(super) trait Operands<T: Real>: Sync {
    /// Length of the inner axis in words.
    fn words(&self) -> usize;
    /// Writes words `p0..p0 + depth` of B's columns from `first` as panels [depth, 32], as many as `out` holds, zero past
    /// the last column.
    fn panels(&self, first: usize, p0: usize, depth: usize, out: &mut [T]);
    /// Whether [`Operands::left`] copies.
    const COPIES: bool;
    /// Rows `i0..i0 + rows` of A, words `p0..p0 + depth`, in place or copied to `scratch`, which has room for them.
    fn left<'a>(&'a self, i0: usize, rows: usize, p0: usize, depth: usize, scratch: &'a mut [T]) -> Mat<'a, T>;
    /// Rows of C in at most 32 columns.
    ///
    /// # Safety
    /// As [`crate::device::kernel::run_f32`]; `block.b` is a piece of a panel.
    unsafe fn run(&self, rows: usize, cols: usize, depth: usize, block: Block<T>);
}

/// `c = a b` added to `onto`, the rows of c `ldc` apart.
pub(super) fn multiply<T: Real, O: Operands<T>>(
    device: &CpuDevice,
    (m, n): (usize, usize),
    x: &O,
    (c, ldc): (&mut [T], usize),
    onto: Onto<T>,
) {
    let (k, add) = (x.words(), matches!(onto, Onto::Itself));
    assert!(ldc >= n && c.len() >= (m - 1) * ldc + n, "c holds [{m}, {n}]");
    let Cut { rows, cols, depth } = cut(m, n, k);
    let (down, across, parts) = (m.div_ceil(rows), n.div_ceil(cols), k.div_ceil(depth));
    // Panels for all tasks, unless a task is alone with its part of B or nearly so: then it packs what it needs into its
    // cache, and B is read once instead of read, written and read.
    let mut shared = device.alloc::<T>(if parts == 1 { n.div_ceil(COLS) * k * COLS } else { 0 });
    if parts == 1 {
        device.for_chunks(&mut shared, k * COLS, |panel, out| x.panels(panel * COLS, 0, k, out));
    }
    // the first part is C itself
    let mut partial = device.alloc::<T>((parts - 1) * m * n);
    let (first, others) = (Shared::new(c), Shared::new(&mut partial));
    let task = |task: usize| {
        let (part, i0, j0) = (task / (down * across), task / across % down * rows, task % across * cols);
        let (rows, cols, end) = (rows.min(m - i0), cols.min(n - j0), k.min((part + 1) * depth));
        let (out, ld) = match part {
            0 => (first.at(i0 * ldc), ldc),
            _ => (others.at(((part - 1) * m + i0) * n), n),
        };
        let mut scratch = device.alloc::<T>(if O::COPIES { rows * DEPTH.min(depth) } else { 0 });
        let mut own = device.alloc::<T>(if parts == 1 { 0 } else { cols.next_multiple_of(COLS) * DEPTH });
        for p0 in (part * depth..end).step_by(DEPTH) {
            let depth_here = DEPTH.min(end - p0);
            let left = x.left(i0, rows, p0, depth_here, &mut scratch);
            if parts > 1 {
                x.panels(j0, p0, depth_here, &mut own[..cols.next_multiple_of(COLS) * depth_here]);
            }
            for j in (j0..j0 + cols).step_by(COLS) {
                let panel = match parts {
                    1 => &shared[(j / COLS * k + p0) * COLS..],
                    _ => &own[(j - j0) * depth_here..],
                };
                let panel = &panel[..depth_here * COLS];
                let block = Block {
                    a: left.data.as_ptr(),
                    row: left.row,
                    col: left.col,
                    b: panel.as_ptr(),
                    ldb: COLS,
                    c: out.wrapping_add(j),
                    ldc: ld,
                    add: (add && part == 0) || p0 > part * depth,
                    cold: true,
                };
                // SAFETY: `left` and the panel hold `depth_here` words of every row and column; C, or the parts, hold m
                // rows each, no two tasks share a block of them, and they are borrowed mutably.
                unsafe { x.run(rows, COLS.min(j0 + cols - j), depth_here, block) };
            }
        }
        if let (Onto::Rows(from), 1) = (onto, parts) {
            for i in 0..rows {
                // SAFETY: `cols` elements from column j0 of a row that this task owns.
                let c = unsafe { first.piece((i0 + i) * ldc + j0, cols) };
                add_into(&from[(i0 + i) * n + j0..], c);
            }
        }
    };
    let tasks = down * across * parts;
    if tasks == 1 {
        task(0);
    } else {
        device.map(tasks, task);
    }
    if parts > 1 {
        let rows = (ELEMENTWISE / n).max(1);
        device.for_chunks(&mut c[..(m - 1) * ldc + n], rows * ldc, |i, c| {
            for (row, c) in c.chunks_mut(ldc).enumerate() {
                for part in 0..parts - 1 {
                    add_into(&partial[(part * m + i * rows + row) * n..][..n], c);
                }
                if let Onto::Rows(from) = onto {
                    add_into(&from[(i * rows + row) * n..][..n], c);
                }
            }
        });
    }
}

/// A line of a panel, zero past the end of `from`.
#[inline(always)]
fn copy_line<T: Real>(from: &[T], to: &mut [T]) {
    match (from.first_chunk::<COLS>(), to.first_chunk_mut::<COLS>()) {
        (Some(from), Some(to)) => *to = *from,
        _ => {
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(T::ZERO);
        }
    }
}

simd! {
    /// Panels of B: every 32 of its first `n` columns as [depth, 32], zero past the last.
    fn pack_panels<T>(b: Mat<T>, depth: usize, n: usize, out: &mut [T]) {
        if b.col == 1 {
            // 8 rows at a time, so that B is read nearly in order and a panel written in pieces of 1 KiB; a copy of known
            // length is two registers instead of a call. The next 8 rows are asked for: x waits in memory since forward
            for p0 in (0..depth).step_by(8) {
                for (j, panel) in out.chunks_exact_mut(depth * COLS).enumerate() {
                    for p in p0..depth.min(p0 + 8) {
                        let row = &b.data[p * b.row..];
                        let from = &row[j * COLS..n.min(row.len())];
                        for line in [0, 16] {
                            simd::prefetch(from.as_ptr().wrapping_add(8 * b.row + line));
                        }
                        copy_line(from, &mut panel[p * COLS..][..COLS]);
                    }
                }
            }
            return;
        }
        for (j, panel) in out.chunks_exact_mut(depth * COLS).enumerate() {
            let first = (j * COLS).min(n);
            tile::transpose_into(&b.data[first * b.col..], COLS.min(n - first), depth, b.col, panel, (COLS, COLS));
        }
    }
}

/// Operands as they are.
struct Full<'a, T> {
    n: usize,
    k: usize,
    a: Mat<'a, T>,
    b: Mat<'a, T>,
}

impl<T: Real> Operands<T> for Full<'_, T> {
    const COPIES: bool = false;

    fn words(&self) -> usize {
        self.k
    }

    fn panels(&self, first: usize, p0: usize, depth: usize, out: &mut [T]) {
        let Mat { data, row, col } = self.b;
        let b = Mat { data: &data[p0 * row + first * col..], row, col };
        pack_panels(b, depth, self.n - first, out);
    }

    fn left<'a>(&'a self, i0: usize, _: usize, p0: usize, _: usize, _: &'a mut [T]) -> Mat<'a, T> {
        let Mat { data, row, col } = self.a;
        Mat { data: &data[i0 * row + p0 * col..], row, col }
    }

    unsafe fn run(&self, rows: usize, cols: usize, depth: usize, block: Block<T>) {
        // SAFETY: the caller's contract.
        let done = unsafe { T::kernel(simd::level(), rows, cols, depth, block) };
        for i in 0..if done < cols { rows } else { 0 } {
            // SAFETY: the block's formula reads this far and no further, and writes `cols` elements of each row of C.
            unsafe {
                let block = block.at(i, done);
                let left = std::slice::from_raw_parts(block.a, (depth - 1) * block.col + 1);
                let panel = std::slice::from_raw_parts(block.b, depth * COLS - done);
                let c = std::slice::from_raw_parts_mut(block.c, cols - done);
                let left = Mat { data: left, row: 0, col: block.col };
                tile::gemm(1, cols - done, depth, left, panel, COLS, c, cols - done, block.add);
            }
        }
    }
}

/// `c = a b` added to `onto`: a [m, k] with any strides, b [k, n] or its transpose with contiguous rows, c [m, n] with
/// contiguous rows `ldc` apart. `compute` says how operands are rounded; without a kernel for it (another processor, f64) the
/// product runs in full precision.
pub(crate) fn gemm<T: Real>(
    device: &CpuDevice,
    compute: Compute,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    b: Mat<T>,
    (c, ldc): (&mut [T], usize),
    onto: Onto<T>,
) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for (i, row) in c.chunks_mut(ldc).take(m).enumerate() {
            match onto {
                Onto::Nothing => row[..n].fill(T::ZERO),
                Onto::Itself => {}
                Onto::Rows(from) => row[..n].copy_from_slice(&from[i * n..][..n]),
            }
        }
        return;
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "a holds [{m}, {k}]");
    assert!(b.data.len() > (k - 1) * b.row + (n - 1) * b.col, "b holds [{k}, {n}]");
    let straight = |x: Mat<T>| x.row == 1 || x.col == 1;
    assert!(straight(b), "the elements of b are neighbours along rows or columns");
    if let Some(words) = compute.words::<T>()
        && straight(a)
    {
        let zeros = device.zeros::<T>(m.max(n));
        return multiply(device, (m, n), &Pairs { words, n, k, a, b, zeros: &zeros }, (c, ldc), onto);
    }
    multiply(device, (m, n), &Full { n, k, a, b }, (c, ldc), onto);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_products_have_enough_tasks_and_parts_of_whole_passes() {
        for m in [1, 8, 64, 256, 688, 1000, 4096] {
            for n in [1, 32, 64, 256, 688, 4096] {
                for k in [1, 64, 256, 1024, 4096] {
                    let Cut { rows, cols, depth } = cut(m, n, k);
                    assert!(rows > 0 && cols.is_multiple_of(COLS) && (1..=k).contains(&depth), "{m} {n} {k}");
                    let parts = k.div_ceil(depth);
                    assert!(parts == 1 || depth >= DEPTH, "{m} {n} {k}: parts of {depth}");
                    let tasks = m.div_ceil(rows) * n.div_ceil(cols) * parts;
                    let smallest = rows <= SMALLEST.0 && cols <= SMALLEST.1;
                    // rounding up to the register block may leave fewer tasks than asked for, but not half
                    assert!(tasks > TASKS / 2 || smallest || m * n * k < ALONE, "{m} {n} {k}: {tasks} tasks");
                }
            }
        }
    }
}
