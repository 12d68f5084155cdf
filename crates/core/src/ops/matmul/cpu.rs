//! Large products: B is packed once into panels as wide as the register kernel, then tasks own blocks of C.
//!
//! A panel is [k, 32] contiguous, [k, 16] on AVX2, so the kernel reads B in order and never past a page it knows. A is read
//! in place: the kernel broadcasts its elements, so eight sequential streams are all it needs, or, where A is transposed (the
//! weight gradient), half a cache line a step.
//!
//! Where C has too few blocks for the threads, which is the weight gradient again (few outputs, thousands of tokens), the
//! inner axis is cut too: the first part is C, every other a C of its own, and they are added in order. Every cut follows
//! from the shape alone, so the bits do not depend on the number of threads.

use super::bf16::Pairs;
use crate::device::CpuNumber;
use crate::device::kernel::{self, Block, COLS, ROWS};
use crate::device::simd::{self, Level, add_into, simd};
use crate::device::tile::{self, Mat};
use crate::device::{Buffer, CpuDevice, Shared};
use crate::number::Compute;
use crate::tensor::ELEMENTWISE;

/// Words of the inner axis in one pass over C at most, and in a part of it at least.
const DEPTH: usize = 256;

/// Words of the inner axis in one pass over C. A panel piece of 256 x 32 f32 is 32 KiB, the L1 cache, and re-reading C costs
/// 3 %. On AVX2 it is half of that, but every step of a transposed A is a line of its own: 256 of them and the panel's 256 are
/// all 512 lines of the cache, and shorter passes make a feed-forward layer 4 % faster. The sums are the same.
fn pass<T>(a: Mat<T>) -> usize {
    if simd::level() == Level::Avx2 && a.col != 1 { DEPTH / 2 } else { DEPTH }
}
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

/// How a register kernel reads operands: in *words* along the inner axis, an element or two neighbours in bf16.
pub(crate) trait Format<T: CpuNumber>: Sync {
    /// Elements in a word.
    const WORD: usize;
    /// Columns of a panel of B, which divide [`COLS`].
    fn width(&self) -> usize;
    /// Writes the words of B's first `inner` rows as panels [words, width], as many as `out` holds, zero past column
    /// `columns`.
    fn panels(&self, b: Mat<T>, inner: usize, columns: usize, out: &mut [T]);
    /// Numbers that [`Format::left`] writes to its scratch memory: 0 if it reads A in place.
    fn scratch(&self, a: Mat<T>, rows: usize, inner: usize) -> usize;
    /// A's [rows, inner] in words: in place, or copied to `scratch`.
    fn left<'a>(&self, a: Mat<'a, T>, rows: usize, inner: usize, scratch: &'a mut [T]) -> Mat<'a, T>;
    /// Rows of C in at most [`Format::width`] columns, over `depth` words.
    ///
    /// # Safety
    /// As [`crate::device::kernel::run_f32`]; `block.b` is a piece of a panel.
    unsafe fn run(&self, rows: usize, cols: usize, depth: usize, block: Block<T>);
}

/// Where a block of C lies: column j of row i is `row` i + `panel` (j / width) + j % width numbers after `at`.
#[derive(Clone, Copy)]
pub(crate) struct Place<T> {
    at: *mut T,
    row: usize,
    panel: usize,
    add: bool,
}

/// One pass over a block of C: words of A times panels that begin `stride` apart.
///
/// # Safety
/// `left` must hold [rows, depth], and every element of the block must be inside a live allocation that nobody else uses
/// meanwhile.
#[inline(always)]
unsafe fn sweep<T: CpuNumber, F: Format<T>>(
    format: &F,
    left: Mat<T>,
    (panels, stride): (&[T], usize),
    (rows, cols, depth): (usize, usize, usize),
    c: Place<T>,
) {
    let width = format.width();
    for (panel, j) in (0..cols).step_by(width).enumerate() {
        let right = &panels[panel * stride..][..depth * width];
        let block = Block {
            a: left.data.as_ptr(),
            row: left.row,
            col: left.col,
            b: right.as_ptr(),
            ldb: width,
            c: c.at.wrapping_add(panel * c.panel),
            ldc: c.row,
            add: c.add,
            cold: true,
        };
        // SAFETY: the caller's contract; the panel was sliced.
        unsafe { format.run(rows, width.min(cols - j), depth, block) };
    }
}

/// `c = a b` or `c += a b` on one thread: a [m, k] in words, b in panels `stride` apart, c in rows `row` and panels `panel`
/// apart.
pub(crate) fn product<T: CpuNumber, F: Format<T>>(
    format: &F,
    (m, n, k): (usize, usize, usize),
    a: Mat<T>,
    (b, stride): (&[T], usize),
    (c, row, panel): (&mut [T], usize, usize),
    add: bool,
) {
    if m == 0 || n == 0 || k == 0 {
        assert!(add || m == 0 || n == 0, "an empty product is added, never stored");
        return;
    }
    let width = format.width();
    let last = n.div_ceil(width) - 1;
    assert!(last == 0 || panel >= width, "panels of {width} columns, {panel} apart");
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "a holds [{m}, {k}]");
    assert!(c.len() >= last * panel + (m - 1) * row + n - last * width, "c holds [{m}, {n}]");
    for i in (0..m).step_by(BLOCK) {
        for p in (0..k).step_by(pass(a)) {
            let place = Place { at: c[i * row..].as_mut_ptr(), row, panel, add: add || p > 0 };
            let size = (BLOCK.min(m - i), n, pass(a).min(k - p));
            // SAFETY: the asserts bound every element of A and C, which is borrowed mutably.
            unsafe { sweep(format, a.from(i, p), (&b[p * width..], stride), size, place) };
        }
    }
}

/// All of B [k, n] as panels, packed by all threads.
pub(crate) fn pack<T: CpuNumber, F: Format<T>>(
    device: &CpuDevice,
    format: &F,
    b: Mat<T>,
    k: usize,
    n: usize,
) -> Buffer<T> {
    let width = format.width();
    let panel = k.div_ceil(F::WORD) * width;
    let mut panels = device.alloc::<T>(n.div_ceil(width) * panel);
    device.for_chunks(&mut panels, panel, |i, out| format.panels(b.from(0, i * width), k, n - i * width, out));
    panels
}

/// `c = a b` added to `onto`, the rows of c `ldc` apart.
fn multiply<T: CpuNumber, F: Format<T>>(
    device: &CpuDevice,
    format: &F,
    (m, n, k): (usize, usize, usize),
    (a, b): (Mat<T>, Mat<T>),
    (c, ldc): (&mut [T], usize),
    onto: Onto<T>,
) {
    let (words, width, add) = (k.div_ceil(F::WORD), format.width(), matches!(onto, Onto::Itself));
    assert!(ldc >= n && c.len() >= (m - 1) * ldc + n, "c holds [{m}, {n}]");
    let Cut { rows, cols, depth } = cut(m, n, words);
    let (down, across, parts) = (m.div_ceil(rows), n.div_ceil(cols), words.div_ceil(depth));
    // Panels for all tasks, unless a task is alone with its part of B or nearly so: then it packs what it needs into its
    // cache, and B is read once instead of read, written and read.
    let shared = (parts == 1).then(|| pack(device, format, b, k, n));
    // the first part is C itself
    let mut partial = device.alloc::<T>((parts - 1) * m * n);
    let (first, others) = (Shared::new(c), Shared::new(&mut partial));
    let task = |task: usize| {
        let (part, i0, j0) = (task / (down * across), task / across % down * rows, task % across * cols);
        let (rows, cols, end) = (rows.min(m - i0), cols.min(n - j0), words.min((part + 1) * depth));
        let (at, row) = match part {
            0 => (first.at(i0 * ldc + j0), ldc),
            _ => (others.at(((part - 1) * m + i0) * n + j0), n),
        };
        let wide = cols.next_multiple_of(width);
        let pass = pass(a).min(depth);
        let mut scratch = device.alloc::<T>(format.scratch(a, rows, pass * F::WORD));
        let mut own = device.alloc::<T>(if parts == 1 { 0 } else { wide * pass });
        for p in (part * depth..end).step_by(pass) {
            let here = pass.min(end - p);
            let (p0, inner) = (p * F::WORD, (here * F::WORD).min(k - p * F::WORD));
            let left = format.left(a.from(i0, p0), rows, inner, &mut scratch);
            let panels = match &shared {
                Some(shared) => (&shared[j0 * words + p * width..], words * width),
                None => {
                    format.panels(b.from(p0, j0), inner, n - j0, &mut own[..wide * here]);
                    (&own[..], here * width)
                }
            };
            let place = Place { at, row, panel: width, add: (add && part == 0) || p > part * depth };
            // SAFETY: `left` and the panels hold `here` words of every row and column; C, or the parts, hold m rows
            // each, no two tasks share a block of them, and they are borrowed mutably.
            unsafe { sweep(format, left, panels, (rows, cols, here), place) };
        }
        if let (Onto::Rows(from), 1) = (onto, parts) {
            for i in 0..rows {
                // SAFETY: `cols` elements from column j0 of a row that this task owns.
                let c = unsafe { first.piece((i0 + i) * ldc + j0, cols) };
                add_into(&from[(i0 + i) * n + j0..], c);
            }
        }
    };
    device.run(down * across * parts, &task);
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

/// Panels of `N` columns of a row-major B, 8 rows at a time, so that B is read nearly in order and a panel written in pieces
/// of 512 or 1024 bytes; a copy of known length is two registers instead of a call. The next 8 rows are asked for: x waits in
/// memory since forward.
#[inline(always)]
fn pack_rows<T: CpuNumber, const N: usize>(b: Mat<T>, depth: usize, n: usize, out: &mut [T]) {
    for p0 in (0..depth).step_by(8) {
        for (j, panel) in out.chunks_exact_mut(depth * N).enumerate() {
            for p in p0..depth.min(p0 + 8) {
                let row = &b.data[p * b.row..];
                let from = &row[j * N..n.min(row.len())];
                for line in (0..N).step_by(16) {
                    simd::prefetch(from.as_ptr().wrapping_add(8 * b.row + line));
                }
                let to = &mut panel[p * N..][..N];
                match (from.first_chunk::<N>(), to.first_chunk_mut::<N>()) {
                    (Some(from), Some(to)) => *to = *from,
                    _ => {
                        to[..from.len()].copy_from_slice(from);
                        to[from.len()..].fill(T::ZERO);
                    }
                }
            }
        }
    }
}

simd! {
    /// Panels of B: every `width`, 16 or 32, of its first `n` columns as [depth, width], zero past the last.
    fn pack_panels<T>(b: Mat<T>, depth: usize, n: usize, width: usize, out: &mut [T]) {
        match (b.col, width) {
            (1, 16) => return pack_rows::<T, 16>(b, depth, n, out),
            (1, COLS) => return pack_rows::<T, COLS>(b, depth, n, out),
            _ => {}
        }
        for (j, panel) in out.chunks_exact_mut(depth * width).enumerate() {
            let first = (j * width).min(n);
            tile::transpose_into(&b.data[first * b.col..], width.min(n - first), depth, b.col, panel, (width, width));
        }
    }
}

/// Whether the lines of A that the kernel of AVX2 works on share so few sets of the L1 cache (64 sets of 8 lines) that they
/// push each other and B out: one line of 6 rows that are a multiple of 2 KiB apart, or of a transposed A one line of every
/// step of a pass, a multiple of 256 bytes apart. Then A is copied to rows [`apart`]: with shorter passes that made dy^T x at
/// 4096 x 4096 x 256 a third faster.
fn crowded<T: CpuNumber>(a: Mat<T>) -> bool {
    let level = simd::level();
    let far = if a.col == 1 { a.row.is_multiple_of(512) } else { a.row == 1 && a.col.is_multiple_of(64) };
    level == Level::Avx2 && T::has_kernel(level) && far
}

/// Rows, and their length, of the copy of a crowded A: its own rows, or those of its transpose.
fn copied<T: CpuNumber>(a: Mat<T>, rows: usize, inner: usize) -> Option<(usize, usize)> {
    crowded(a).then_some(if a.col == 1 { (rows, inner) } else { (inner, rows) })
}

/// Distance of rows of `len` numbers of f32 that reaches every set of the L1 cache: an odd number of lines.
pub(crate) const fn apart(len: usize) -> usize {
    16 * (len.div_ceil(16) | 1)
}

/// Operands as they are.
pub(crate) struct Full;

impl<T: CpuNumber> Format<T> for Full {
    const WORD: usize = 1;

    fn width(&self) -> usize {
        let level = simd::level();
        if T::has_kernel(level) { kernel::width(level) } else { COLS }
    }

    fn panels(&self, b: Mat<T>, inner: usize, columns: usize, out: &mut [T]) {
        pack_panels(b, inner, columns, Format::<T>::width(self), out);
    }

    fn scratch(&self, a: Mat<T>, rows: usize, inner: usize) -> usize {
        copied(a, rows, inner).map_or(0, |(lines, len)| lines * apart(len))
    }

    fn left<'a>(&self, a: Mat<'a, T>, rows: usize, inner: usize, scratch: &'a mut [T]) -> Mat<'a, T> {
        let Some((lines, len)) = copied(a, rows, inner) else { return a };
        let from = if a.col == 1 { a.row } else { a.col };
        for (i, out) in scratch.chunks_mut(apart(len)).enumerate().take(lines) {
            out[..len].copy_from_slice(&a.data[i * from..][..len]);
        }
        let copy = Mat::rows(scratch, apart(len));
        if a.col == 1 { copy } else { copy.t() }
    }

    unsafe fn run(&self, rows: usize, cols: usize, depth: usize, block: Block<T>) {
        let level = simd::level();
        if T::has_kernel(level) {
            // SAFETY: the caller's contract; the level is this processor's.
            return unsafe { T::kernel(level, rows, cols, depth, block) };
        }
        for i in 0..rows {
            // SAFETY: the block's formula reads this far and no further, and writes `cols` elements of each row of C.
            unsafe {
                let block = block.at(i, 0);
                let left = std::slice::from_raw_parts(block.a, (depth - 1) * block.col + 1);
                let panel = std::slice::from_raw_parts(block.b, depth * block.ldb);
                let c = std::slice::from_raw_parts_mut(block.c, cols);
                let left = Mat { data: left, row: 0, col: block.col };
                tile::gemm(1, cols, depth, left, panel, block.ldb, c, cols, block.add);
            }
        }
    }
}

/// `c = a b` added to `onto`: a [m, k] with any strides, b [k, n] or its transpose with contiguous rows, c [m, n] with
/// contiguous rows `ldc` apart. `compute` says how operands are rounded; without a kernel for it (another processor, f64) the
/// product runs in full precision.
pub(crate) fn gemm<T: CpuNumber>(
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
        return multiply(device, &Pairs { words, zeros: &zeros }, (m, n, k), (a, b), (c, ldc), onto);
    }
    multiply(device, &Full, (m, n, k), (a, b), (c, ldc), onto);
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
