//! What every matrix product of this crate is asked with, on any device.

/// The size of a matrix product, C `[m, n]` = A `[m, k]` B `[k, n]`, and what becomes of C's old elements. The operands are given
/// to whatever computes it: on a CPU `Gemm::run` on one thread or `ops::matmul::gemm` on all, [`super::cuda::CudaDevice::gemm`].
#[derive(Debug, Clone, Copy)]
pub struct Gemm<A = Accumulate<NoResidual>> {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// The inner extent: columns of A, rows of B.
    pub k: usize,
    /// What becomes of C's old elements: an [`Accumulate`].
    pub accumulate: A,
}

impl Gemm {
    /// `c = a b`.
    pub fn new(m: usize, n: usize, k: usize) -> Self {
        Gemm { m, n, k, accumulate: Accumulate::Overwrite }
    }

    /// `c += a b`.
    pub fn adding(m: usize, n: usize, k: usize) -> Self {
        Gemm { m, n, k, accumulate: Accumulate::Existing }
    }
}

impl<A> Gemm<A> {
    /// The same product with something else to do with C's old elements.
    pub fn with<B>(self, accumulate: B) -> Gemm<B> {
        Gemm { m: self.m, n: self.n, k: self.k, accumulate }
    }
}

/// What becomes of C's old elements. `R` is a matrix `[m, n]` of the device, or [`NoResidual`] in a product that takes none: the
/// small ones of one thread, and gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate<R> {
    /// They are overwritten.
    Overwrite,
    /// The product is added to them.
    Existing,
    /// They are overwritten by the product plus this matrix, added before the finished sums are written.
    Residual(R),
}

/// No matrix: a product that overwrites C or adds to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoResidual {}

impl<R> Accumulate<R> {
    /// [`Accumulate::Existing`] where C holds a sum that has been begun.
    pub fn existing_if(begun: bool) -> Self {
        if begun { Accumulate::Existing } else { Accumulate::Overwrite }
    }

    /// Whether the product is added to C's old elements.
    pub fn adds(&self) -> bool {
        matches!(self, Accumulate::Existing)
    }
}
