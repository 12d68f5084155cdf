//! What a matrix product multiplies, and what tells products apart.

use super::api::Address;
use super::{CudaBuffer, Kind};
use crate::device::cpu::matrix::reach;
use crate::error::{Result, ensure};

/// One operand: a row-major matrix somewhere in a buffer.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// Where it lies.
    pub buffer: &'a CudaBuffer,
    /// Its first element.
    pub first: usize,
    /// Elements from row to row.
    pub row_stride: usize,
    /// Whether the product takes its transpose.
    pub transposed: bool,
    /// Elements from one matrix of a batch to the next.
    pub batch_stride: usize,
}

impl<'a> Operand<'a> {
    /// A whole buffer of rows `width` elements wide.
    pub fn rows(buffer: &'a CudaBuffer, width: usize) -> Self {
        Operand { buffer, first: 0, row_stride: width, transposed: false, batch_stride: 0 }
    }

    /// A batch of matrices `[rows, columns]`, one behind the other.
    pub fn matrices(buffer: &'a CudaBuffer, rows: usize, columns: usize) -> Self {
        Operand { batch_stride: rows * columns, ..Operand::rows(buffer, columns) }
    }

    /// The transpose of it.
    pub fn t(self) -> Self {
        Operand { transposed: !self.transposed, ..self }
    }

    /// The same from another element on.
    pub fn from(self, first: usize) -> Self {
        Operand { first, ..self }
    }

    /// Where its first element lies on the device.
    pub(super) fn address(&self) -> Address {
        self.buffer.address() + (self.first * self.buffer.kind().size()) as Address
    }

    /// The last element that a product reads, one past; `None` if the number overflows.
    fn end(&self, rows: usize, columns: usize, batch: usize) -> Option<usize> {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        reach([(batch, self.batch_stride), (rows, self.row_stride), (columns, 1)])?.checked_add(self.first)
    }
}

/// What tells products apart for the choice of an algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Shape {
    pub size: (usize, usize, usize),
    pub batch: usize,
    pub transposed: (bool, bool),
    pub row_strides: [usize; 3],
    pub batch_strides: [usize; 3],
    pub kinds: [u8; 2],
    /// Bytes that divide the addresses of a, b and c, 256 at most.
    pub aligned: [u32; 3],
    pub added: bool,
}

impl Shape {
    /// The shape of a product that is checked: kinds go together and every matrix fits its buffer.
    pub fn of(
        size: (usize, usize, usize),
        batch: usize,
        [a, b, c]: [Operand; 3],
        addend: Option<Operand>,
    ) -> Result<Self> {
        let (m, n, k) = size;
        let (kind, to, added) = (a.buffer.kind(), c.buffer.kind(), addend.unwrap_or(c));
        let alike = b.buffer.kind() == kind && (to == kind || (kind, to) == (Kind::Bf16, Kind::F32));
        ensure!(alike, "product", "{kind:?} times {:?} into {to:?}", b.buffer.kind());
        let like = (added.buffer.kind(), added.row_stride, added.batch_stride, added.transposed);
        ensure!(like == (to, c.row_stride, c.batch_stride, false), "product", "{added:?} does not lie as {c:?}");
        for (name, o, rows, columns) in
            [("a", &a, m, k), ("b", &b, k, n), ("c", &c, m, n), ("the residual", &added, m, n)]
        {
            let (end, buffer) = (o.end(rows, columns, batch), o.buffer);
            let fits = end.is_some_and(|end| end <= buffer.len());
            ensure!(fits, "product", "{name} [{rows}, {columns}] ends at {end:?} of {buffer:?}");
        }
        let aligned = |address: Address| 1u32 << address.trailing_zeros().min(8);
        Ok(Shape {
            size,
            batch,
            transposed: (a.transposed, b.transposed),
            row_strides: [a.row_stride, b.row_stride, c.row_stride],
            batch_strides: [a.batch_stride, b.batch_stride, c.batch_stride],
            kinds: [kind as u8, to as u8],
            aligned: [aligned(a.address()), aligned(b.address()), aligned(c.address() | added.address())],
            added: addend.is_some(),
        })
    }
}

impl Shape {
    /// Elements from the first to the last of A, B and C. (`Shape::of` found them inside buffers, so they can be counted.)
    pub fn extents(&self) -> [usize; 3] {
        let (m, n, k) = self.size;
        let stored = |rows, columns, transposed| if transposed { (columns, rows) } else { (rows, columns) };
        let sides = [stored(m, k, self.transposed.0), stored(k, n, self.transposed.1), (m, n)];
        let mut extents = [0; 3];
        for (i, (rows, columns)) in sides.into_iter().enumerate() {
            let axes = [(self.batch, self.batch_strides[i]), (rows, self.row_strides[i]), (columns, 1)];
            extents[i] = reach(axes).unwrap_or(0);
        }
        extents
    }
}
