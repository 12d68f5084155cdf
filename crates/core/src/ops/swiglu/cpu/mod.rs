//! Tasks own a block of rows and a range of features. What other tasks contribute to the same numbers, other features to y
//! and dx, other rows to the weights' gradients, is written apart and added in order; every cut follows from the shape.

mod backward;
mod few;
mod forward;

pub use backward::backward;
pub use few::few;
pub use forward::forward;

use crate::device::cpu::kernel_f32::NR;
use crate::device::cpu::matrix::{MatRef, Panels};
use crate::device::cpu::simd::add_into;
use crate::device::{Buffer, CpuDevice, CpuNumber};
use crate::ops::matmul::{Format, pack};
use crate::tensor::ELEMENTWISE;

/// Rows of a block: with as many of x, gate, up, h and y in f32, FEATURES features and width 256 they are 640 KiB, in the
/// second cache.
const ROW_BLOCK: usize = 128;
/// Rows that backward takes at once, two blocks: a weight's gradient is read and written once for so many. Also the longest row of
/// an operand that is neither x's nor a weight's.
pub const BACKWARD_ROWS: usize = 2 * ROW_BLOCK;
/// Features at a time.
const FEATURES: usize = 192;
/// Tasks to cut the work into at least.
const MIN_TASKS: usize = 16;

/// Rows of x, its width c, and features f.
pub type Extents = (usize, usize, usize);

/// Numbers in gate and in up as they are kept: blocks of rows, in them panels of features as wide as the format's, in them
/// rows.
pub fn kept(rows: usize, f: usize) -> usize {
    rows * f.next_multiple_of(NR)
}

#[inline(always)]
fn sigmoid<T: CpuNumber>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

/// Features a task owns, a multiple of 32, when the rows are cut into `parts`.
fn features(f: usize, parts: usize) -> usize {
    f.div_ceil(MIN_TASKS.div_ceil(parts)).next_multiple_of(NR)
}

/// Rows and features that a task of backward owns: of the ways to make 16 tasks the one with the fewest numbers to add.
fn cut(rows: usize, c: usize, f: usize) -> (usize, usize) {
    let ways = [1, 2, 4, 8, 16].map(|parts| {
        let own = rows.div_ceil(parts).next_multiple_of(BACKWARD_ROWS);
        let (parts, cols) = (rows.div_ceil(own), features(f, parts));
        (((f.div_ceil(cols) - 1) * rows + (parts - 1) * 3 * f) * c, own, cols)
    });
    let (_, rows, cols) = ways.into_iter().min().expect("there are ways");
    (rows, cols)
}

/// Numbers that [`backward`] takes beside what it is given and the gradients of the weights: dx, panels of x and of the
/// weights, parts of sums.
pub fn scratch((rows, c, f): Extents) -> usize {
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
    device.for_pieces(first, ELEMENTWISE, |i, out| {
        for part in others.chunks_exact(len) {
            add_into(&part[i * ELEMENTWISE..], out);
        }
    });
}

/// A weight, packed as the right operand of products.
struct PackedWeight<T: CpuNumber> {
    panels: Buffer<T>,
    stride: usize,
    width: usize,
}

impl<T: CpuNumber> PackedWeight<T> {
    fn new<F: Format<T>>(device: &CpuDevice, format: &F, b: MatRef<T>, k: usize, n: usize) -> Self {
        let width = format.panel_width();
        PackedWeight { panels: pack(device, format, b, k, n), stride: k.div_ceil(F::PACK) * width, width }
    }

    /// From column `j`, a multiple of 32, and packed row `p` on.
    fn from(&self, p: usize, j: usize) -> Panels<'_, T> {
        Panels { data: &self.panels[j / self.width * self.stride + p * self.width..], stride: self.stride }
    }
}
