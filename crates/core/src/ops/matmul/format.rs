//! How the register kernels read operands: as they are, or in pairs of bf16; and the packing for the first.

use crate::device::cpu::kernel_f32::{self, NR, Operands};
use crate::device::cpu::level::{Level, level};
use crate::device::cpu::matrix::{MatMut, MatRef, Panels, PanelsMut, holds};
use crate::device::cpu::simd::{self, simd};
use crate::device::cpu::transpose::transpose_into;
use crate::device::{Accumulate, CpuNumber, Gemm};

use super::cpu::{MC, k_per_pass};

/// The form in which a register kernel reads its operands. Along the inner axis one packed number stands for one element, or for
/// a pair of neighbours in bf16: `kp` counts packed numbers, `k` elements.
pub(crate) trait Format<T: CpuNumber>: Sync {
    /// Elements of the inner axis in a packed number.
    const PACK: usize;
    /// Columns of a panel of B, which divide [`NR`].
    fn panel_width(&self) -> usize;
    /// Packs B's first `k` rows as panels `[kp, width]`, as many as `out` holds, zero past column `n`.
    fn pack_b(&self, b: MatRef<T>, k: usize, n: usize, out: &mut [T]);
    /// Numbers that [`Format::pack_a`] writes to its scratch memory: 0 if it reads A in place.
    fn a_scratch(&self, a: MatRef<T>, m: usize, k: usize) -> usize;
    /// A's `[m, k]` as `[m, kp]`: in place, or copied to `scratch`.
    fn pack_a<'a>(&self, a: MatRef<'a, T>, m: usize, k: usize, scratch: &'a mut [T]) -> MatRef<'a, T>;
    /// m rows of C in at most [`Format::panel_width`] columns.
    ///
    /// # Safety
    /// As [`crate::device::cpu::kernel_f32::run_f32`]; `operands.b` is a piece of a panel.
    unsafe fn run(&self, m: usize, n: usize, kp: usize, operands: Operands<T>);
}

/// Where a block of C lies: as [`PanelsMut`], `c` being its first element.
#[derive(Clone, Copy)]
pub(super) struct RawPanels<T> {
    pub c: *mut T,
    pub row_stride: usize,
    pub panel_stride: usize,
}

/// A block of C: packed A `[m, k]` times panels, where `size.k` counts packed numbers.
///
/// # Safety
/// `a` must hold [m, k], and every element of the block must be inside a live allocation that nobody else uses meanwhile.
#[inline(always)]
pub(super) unsafe fn run_panels<T: CpuNumber, F: Format<T>>(
    format: &F,
    size: Gemm,
    a: MatRef<T>,
    b: Panels<T>,
    c: RawPanels<T>,
) {
    let Gemm { m, n, k, accumulate } = size;
    let width = format.panel_width();
    for (panel, j) in (0..n).step_by(width).enumerate() {
        let panel_b = &b.data[panel * b.stride..][..k * width];
        let operands = Operands {
            a: a.data.as_ptr(),
            rs_a: a.row_stride,
            cs_a: a.col_stride,
            b: panel_b.as_ptr(),
            rs_b: width,
            c: c.c.wrapping_add(panel * c.panel_stride),
            rs_c: c.row_stride,
            accumulate: accumulate.adds(),
            prefetch: true,
        };
        // SAFETY: the caller's contract; the panel was sliced.
        unsafe { format.run(m, width.min(n - j), k, operands) };
    }
}

impl Gemm {
    /// Computes it on one thread: a `[m, k]` packed, b in panels, where k counts packed numbers.
    ///
    /// # Panics
    /// When an operand is too small, or an empty sum would overwrite c.
    pub(crate) fn run_packed<T: CpuNumber, F: Format<T>>(
        self,
        format: &F,
        a: MatRef<T>,
        b: Panels<T>,
        c: PanelsMut<T>,
    ) {
        let Gemm { m, n, k, accumulate } = self;
        if m == 0 || n == 0 || k == 0 {
            assert!(accumulate.adds() || m == 0 || n == 0, "an empty product is added, never stored");
            return;
        }
        let width = format.panel_width();
        let PanelsMut { data: c, row_stride, panel_stride } = c;
        let panels = n.div_ceil(width);
        let in_last = n - (panels - 1) * width;
        assert!(panels == 1 || panel_stride >= width, "panels of {width} columns, {panel_stride} apart");
        a.assert_holds("a", m, k);
        let axes = [(panels, panel_stride), (m, row_stride), (in_last, 1)];
        assert!(holds(c.len(), axes), "c holds [{m}, {n}]");
        for i in (0..m).step_by(MC) {
            for p in (0..k).step_by(k_per_pass(a)) {
                let c = RawPanels { c: c[i * row_stride..].as_mut_ptr(), row_stride, panel_stride };
                let (m, k) = (MC.min(m - i), k_per_pass(a).min(k - p));
                let size = Gemm { m, n, k, accumulate: Accumulate::existing_if(accumulate.adds() || p > 0) };
                let b = Panels { data: &b.data[p * width..], stride: b.stride };
                // SAFETY: the asserts bound every element of A and of the last panel of C, before which all other elements lie, since
                // panels are at least their width apart; C is borrowed mutably.
                unsafe { run_panels(format, size, a.from(i, p), b, c) };
            }
        }
    }
}

/// Panels of `N` columns of a row-major B, 8 rows at a time, so that B is read nearly in order and a panel written in pieces
/// of 512 or 1024 bytes; a copy of known length is two registers instead of a call. The next 8 rows are prefetched: x waits in
/// memory since forward.
#[inline(always)]
fn pack_rows<T: CpuNumber, const N: usize>(b: MatRef<T>, k: usize, n: usize, out: &mut [T]) {
    for p0 in (0..k).step_by(8) {
        for (j, panel) in out.chunks_exact_mut(k * N).enumerate() {
            for p in p0..k.min(p0 + 8) {
                let row = &b.data[p * b.row_stride..];
                let from = &row[j * N..n.min(row.len())];
                for line in (0..N).step_by(16) {
                    simd::prefetch(from.as_ptr().wrapping_add(8 * b.row_stride + line));
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
    /// Panels of B: every `width`, 16 or 32, of its first `n` columns as [k, width], zero past the last.
    fn pack_panels<T>(b: MatRef<T>, k: usize, n: usize, width: usize, out: &mut [T]) {
        match (b.col_stride, width) {
            (1, 16) => return pack_rows::<T, 16>(b, k, n, out),
            (1, NR) => return pack_rows::<T, NR>(b, k, n, out),
            _ => {}
        }
        for (j, panel) in out.chunks_exact_mut(k * width).enumerate() {
            let first = (j * width).min(n);
            let columns = MatRef::rows(&b.data[first * b.col_stride..], b.col_stride);
            transpose_into(columns, width.min(n - first), k, MatMut::rows(panel, width), width);
        }
    }
}

/// Whether the lines of A that the kernel of AVX2 works on share so few sets of the L1 cache (64 sets of 8 lines) that they
/// push each other and B out: one line of 6 rows that are a multiple of 2 KiB apart, or of a transposed A one line of every
/// step of a pass, a multiple of 256 bytes apart. Then A is copied to rows of a [`padded_stride`]: with shorter passes that made
/// dy^T x at 4096 x 4096 x 256 a third faster.
fn conflicts_in_l1<T: CpuNumber>(a: MatRef<T>) -> bool {
    let level = level();
    let far = if a.col_stride == 1 {
        a.row_stride.is_multiple_of(512)
    } else {
        a.row_stride == 1 && a.col_stride.is_multiple_of(64)
    };
    level == Level::Avx2 && T::has_kernel(level) && far
}

/// Rows, and their length, of the copy of an A that conflicts in the cache: its own rows, or those of its transpose.
fn copied_rows<T: CpuNumber>(a: MatRef<T>, m: usize, k: usize) -> Option<(usize, usize)> {
    conflicts_in_l1(a).then_some(if a.col_stride == 1 { (m, k) } else { (k, m) })
}

/// Distance of rows of `len` numbers of f32 that reaches every set of the L1 cache: an odd number of lines.
pub(crate) const fn padded_stride(len: usize) -> usize {
    16 * (len.div_ceil(16) | 1)
}

/// Operands as they are.
pub(crate) struct FullFormat;

impl<T: CpuNumber> Format<T> for FullFormat {
    const PACK: usize = 1;

    fn panel_width(&self) -> usize {
        let level = level();
        if T::has_kernel(level) { kernel_f32::panel_width(level) } else { NR }
    }

    fn pack_b(&self, b: MatRef<T>, k: usize, n: usize, out: &mut [T]) {
        pack_panels(b, k, n, Format::<T>::panel_width(self), out);
    }

    fn a_scratch(&self, a: MatRef<T>, m: usize, k: usize) -> usize {
        copied_rows(a, m, k).map_or(0, |(rows, len)| rows * padded_stride(len))
    }

    fn pack_a<'a>(&self, a: MatRef<'a, T>, m: usize, k: usize, scratch: &'a mut [T]) -> MatRef<'a, T> {
        let Some((rows, len)) = copied_rows(a, m, k) else { return a };
        let stride = if a.col_stride == 1 { a.row_stride } else { a.col_stride };
        for (i, out) in scratch.chunks_mut(padded_stride(len)).enumerate().take(rows) {
            out[..len].copy_from_slice(&a.data[i * stride..][..len]);
        }
        let copy = MatRef::rows(scratch, padded_stride(len));
        if a.col_stride == 1 { copy } else { copy.t() }
    }

    unsafe fn run(&self, m: usize, n: usize, kp: usize, operands: Operands<T>) {
        let level = level();
        if T::has_kernel(level) {
            // SAFETY: the caller's contract; the level is this processor's.
            return unsafe { T::kernel(level, m, n, kp, operands) };
        }
        for i in 0..m {
            // SAFETY: the operands' formula reads this far and no further, and writes `n` elements of each row of C.
            unsafe {
                let x = operands.at(i, 0);
                let row = std::slice::from_raw_parts(x.a, (kp - 1) * x.cs_a + 1);
                let panel = std::slice::from_raw_parts(x.b, (kp - 1) * x.rs_b + n);
                let c = std::slice::from_raw_parts_mut(x.c, n);
                let a = MatRef { data: row, row_stride: 0, col_stride: x.cs_a };
                let size = Gemm { m: 1, n, k: kp, accumulate: Accumulate::existing_if(x.accumulate) };
                size.run(a, MatRef::rows(panel, x.rs_b), MatMut::rows(c, n));
            }
        }
    }
}
