//! Products by cuBLASLt; sums come in f32, or f64 of f64.

use crate::device::cuda::{CudaBuffer, CudaDevice, Kind, Operand};
use crate::device::{Accumulate, Gemm};
use crate::error::Result;
use crate::ops::cuda::wide;
use crate::tape::{Grads, Var};

/// m, n and k.
pub type Extents = (usize, usize, usize);

/// a [m, k] times b [k, n], on top of `below` where there is one: `[m, n]`.
///
/// # Errors
/// When kinds or extents do not fit, or memory runs out.
pub fn product(
    op: &'static str,
    (m, n, k): Extents,
    a: Operand,
    b: Operand,
    below: Option<&CudaBuffer>,
) -> Result<CudaBuffer> {
    let device = a.buffer.device();
    let mut c = device.alloc(op, wide(a.buffer.kind()), m * n)?;
    if k == 0 {
        match below {
            Some(below) => c.copy_from(below)?,
            None => c.fill_bytes(0)?,
        }
        return Ok(c);
    }
    let accumulate = below.map_or(Accumulate::Overwrite, |x| Accumulate::Residual(Operand::rows(x, n)));
    device.gemm(Gemm::new(m, n, k).with(accumulate), a, b, Operand::rows(&c, n))?;
    Ok(c)
}

/// Adds a [m, k] times b [k, n] to the gradient of a variable of as many numbers, in place where it has been begun.
///
/// # Errors
/// As [`product`].
pub fn add_product(
    op: &'static str,
    gpu: &CudaDevice,
    grads: &mut Grads,
    var: &Var,
    (m, n, k): Extents,
    (a, b): (Operand, Operand),
) -> Result<()> {
    let (mut d, add) = grads.begin(var)?;
    add_to((d.cuda_mut(op, gpu)?.full_mut()?, add), (m, n, k), a, b)?;
    grads.add(var.id(), d)
}

/// Writes a [m, k] times b [k, n], or (`true`) adds it to what is there.
///
/// # Errors
/// As [`product`].
pub fn add_to((sum, add): (&mut CudaBuffer, bool), (m, n, k): Extents, a: Operand, b: Operand) -> Result<()> {
    if k == 0 {
        return if add { Ok(()) } else { sum.fill_bytes(0) };
    }
    let c = Operand::rows(sum, n);
    let accumulate = if add { Accumulate::Existing } else { Accumulate::Overwrite };
    a.buffer.device().gemm(Gemm::new(m, n, k).with(accumulate), a, b, c)
}

/// a [m, k] times b [k, n] for each of a batch, both of one kind, either transposed as it lies: `[batch, m, n]`.
///
/// # Errors
/// As [`product`].
pub fn batched(
    op: &'static str,
    batch: usize,
    (m, n, k): Extents,
    (a, a_transposed): (&CudaBuffer, bool),
    (b, b_transposed): (&CudaBuffer, bool),
) -> Result<CudaBuffer> {
    let device = a.device();
    let mut c = device.alloc(op, a.kind(), batch * m * n)?;
    if k == 0 {
        c.fill_bytes(0)?;
        return Ok(c);
    }
    let lying = |x, rows: usize, columns: usize, transposed: bool| {
        let row_stride = if transposed { rows } else { columns };
        Operand { buffer: x, first: 0, row_stride, transposed, batch_stride: rows * columns }
    };
    let gemm = Gemm::new(m, n, k).with(Accumulate::Overwrite);
    let out = Operand { batch_stride: m * n, ..Operand::rows(&c, n) };
    device.gemm_batched(batch, gemm, lying(a, m, k, a_transposed), lying(b, k, n, b_transposed), out)?;
    Ok(c)
}

/// What the products of one call multiply.
pub fn operand_kind(compute: crate::number::Compute, x: &crate::device::CudaData) -> Kind {
    Kind::of_operands(compute, x.dtype())
}
